"""Boxes of single frames -> objects followed over time, with ids that last."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchvision.ops import nms

from pipelines.object_rules import ObjectRules
from tsm_core.errors import WorldError
from tsm_core.types import Box, Detection, Track

if TYPE_CHECKING:
    from trackers.core.bytetrack.tracker import ByteTrackTracker
    from trackers.core.bytetrack.tracklet import ByteTrackTracklet

SCORES_KEPT = 10
MIN_HITS = 3
FIRST_STEP_S = 1 / 30
SAME_OBJECT_IOU = 0.8  # two labels for one object: detectors suppress boxes within a label alone
ASSOCIATION_MARGIN = 0.3  # of a box's sides: at 5 frames/s what moves fast leaves its own box between two frames
# standard deviations in sides of a box: of its corners as found, of a change of speed and of the first speed per
# 1/30 s; the library's own are in pixels, whatever the picture's size, and let one box astray throw an object off
FOUND_STD, SPEED_STD, FIRST_SPEED_STD = 0.1, 1 / 160, 0.1
SAME_PLACE_IOU = 0.6
MOVED_FRAMES = 3


class TrackerMissing(WorldError):
    """ByteTrack is not installed."""

    reason = "tracker_missing"


def _new_byte_track(max_disappeared_s: float) -> ByteTrackTracker:
    """ByteTrack that takes boxes of confidence 1 for strong and of 0 for weak. Raises TrackerMissing."""
    try:
        # half a second to import, which no command that tracks nothing should pay
        from trackers.core.bytetrack.tracker import ByteTrackTracker
        from trackers.utils.iou import BIoU
    except ModuleNotFoundError as error:
        raise TrackerMissing(
            f"objects cannot be followed, {error.name} is missing; "
            "run `make setup`, or: pip install -c constraints.txt --no-deps trackers"
        ) from error
    byte_track = ByteTrackTracker(
        track_activation_threshold=0.5, high_conf_det_threshold=0.5, iou=BIoU(ASSOCIATION_MARGIN)
    )
    byte_track.maximum_time_without_update = max_disappeared_s
    return byte_track


def _set_noise(tracklet: ByteTrackTracklet, side_px: float) -> None:
    """Let the tracklet trust boxes and speeds in proportion to its object's size."""
    corners, speeds = np.eye(8)[:4], np.eye(8)[4:]
    push = corners / 2 + speeds  # (4, 8): what a change of speed does within one step
    tracklet.state_estimator.set_kf_covariances(
        measurement_noise=np.eye(4) * (FOUND_STD * side_px) ** 2,
        process_noise=push.T @ push * (SPEED_STD * side_px) ** 2,
        state_covariance=corners.T @ corners * (FOUND_STD * side_px) ** 2
        + speeds.T @ speeds * (FIRST_SPEED_STD * side_px) ** 2,
    )


def _iou(one: Box, two: Box) -> float:
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1]) - shared)


@dataclass(slots=True)
class _Followed:
    """What is remembered of one object; *_clock_s are of the tracker's own clock."""

    start_time_s: float
    start_pts_s: float
    side_px: float  # of its first box
    xyxy: Box
    still_xyxy: Box
    still_clock_s: float
    time_s: float = 0.0
    strong_clock_s: float = 0.0
    score: float = 0.0
    top_score: float = 0.0
    hits: int = 0
    moved: int = 0
    sure: bool = False
    stationary: bool = False
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=SCORES_KEPT))
    votes: dict[str, float] = field(default_factory=dict)

    def see(self, found: Detection, rules: ObjectRules, time_s: float, clock_s: float) -> None:
        """Take in its box on one more frame."""
        self.xyxy, self.time_s, self.score = found.xyxy, time_s, found.score
        self.top_score = max(self.top_score, found.score)
        self.hits += 1
        self.scores.append(found.score)
        self.votes[found.label] = self.votes.get(found.label, 0.0) + found.score
        if found.score >= rules.filter_of(found.label).min_score:
            self.strong_clock_s = clock_s
        self.moved = 0 if _iou(found.xyxy, self.still_xyxy) >= SAME_PLACE_IOU else self.moved + 1
        if self.moved >= MOVED_FRAMES:  # one box astray is no movement
            self.still_xyxy, self.still_clock_s, self.moved = found.xyxy, clock_s, 0
        self.stationary = clock_s - self.still_clock_s >= rules.stationary_s - 1e-6
        label = self.label(rules)
        if not self.sure and self.hits >= MIN_HITS and rules.tells(label):
            self.sure = statistics.median(self.scores) >= rules.filter_of(label).threshold

    def label(self, rules: ObjectRules) -> str:
        """The label with the most votes; of an object that was told once, among those that are told."""
        labels = [label for label in self.votes if not self.sure or rules.tells(label)] or list(self.votes)
        return max(labels, key=self.votes.__getitem__)

    def track(self, track_id: str, rules: ObjectRules) -> Track:
        """The record of it as last seen."""
        return Track(
            track_id=track_id,
            label=self.label(rules),
            score=statistics.median(self.scores),
            top_score=self.top_score,
            xyxy=self.xyxy,
            detection_score=self.score,
            start_time_s=self.start_time_s,
            start_pts_s=self.start_pts_s,
            time_s=self.time_s,
            stationary=self.stationary,
        )

    def state(self) -> dict[str, Any]:
        return {**asdict(self), "scores": list(self.scores)}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> _Followed:
        boxes = {name: tuple(state[name]) for name in ("xyxy", "still_xyxy")}
        return cls(**{**state, **boxes, "scores": deque(state["scores"], maxlen=SCORES_KEPT)})


class ObjectTracker:
    """Follows the objects of one stream by ByteTrack, in seconds.

    Strong boxes (at least min_score of their label) begin tracks and go on with them, weak ones only go on. Ids are
    "{stream_id}:{n}", n from first_number + 1 upwards. A clock that stands or goes back counts as one more step like
    the last. In a gap between two frames nobody looked: it counts for no more than half of max_disappeared_s, so that
    tracks outlast a failover. Raises TrackerMissing.
    """

    def __init__(self, stream_id: str, rules: ObjectRules, first_number: int = 0) -> None:
        self.stream_id = stream_id
        self.rules = rules
        self.clock_s = 0.0  # never goes back
        self._time_s: float | None = None
        self._step_s = FIRST_STEP_S
        self._byte_track = _new_byte_track(rules.max_disappeared_s)
        self._byte_track._next_track_id = first_number
        self._followed: dict[int, _Followed] = {}
        # begun on the last frame; ByteTrack gives them an id when the next frame has them too
        self._begun: list[tuple[ByteTrackTracklet, _Followed]] = []
        self._lost: list[str] = []

    def update(self, detections: Sequence[Detection], pts_s: float, time_s: float) -> list[Track]:
        """Every track that has a box on this frame, in the order of their ids."""
        self._advance(time_s)
        detections = self._without_doubles(detections)
        strong = [found.score >= self.rules.filter_of(found.label).min_score for found in detections]
        seen = self._associate(detections, strong)
        for tracklet, first in self._begun:
            if tracklet.tracker_id != -1:
                self._followed[tracklet.tracker_id] = first
        self._begun = []
        fresh = [tracklet for tracklet in self._byte_track.tracks if tracklet.tracker_id == -1]
        starts = [index for index, number in seen if number == -1 and strong[index]]
        for tracklet, index in zip(fresh, starts, strict=True):
            xyxy = x1, y1, x2, y2 = detections[index].xyxy
            side_px = math.sqrt((x2 - x1) * (y2 - y1))
            _set_noise(tracklet, side_px)
            followed = _Followed(time_s, pts_s, side_px, xyxy, still_xyxy=xyxy, still_clock_s=self.clock_s)
            followed.see(detections[index], self.rules, time_s, self.clock_s)
            self._begun.append((tracklet, followed))
        numbers = sorted((number, index) for index, number in seen if number != -1)
        for number, index in numbers:
            self._followed[number].see(detections[index], self.rules, time_s, self.clock_s)
        self._drop()
        return [
            self._followed[number].track(self._id_of(number), self.rules)
            for number, _ in numbers
            if number in self._followed
        ]

    def lost(self) -> list[str]:
        """Ids of the tracks that the last update gave up."""
        return self._lost

    def is_sure(self, track_id: str) -> bool:
        """Whether the track has had boxes enough, good enough and of a label that is told; once sure, it stays so."""
        followed = self._followed.get(int(track_id.rpartition(":")[2]) - 1)
        return followed is not None and followed.sure and self.rules.tells(followed.label(self.rules))

    @property
    def next_number(self) -> int:
        """A first_number for a tracker that shall give none of this one's ids."""
        return self._byte_track._next_track_id

    def reset(self) -> None:
        """Forget all objects; ids go on."""
        self._byte_track.tracks = []
        self._followed, self._begun, self._lost = {}, [], []

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {
            "clock_s": self.clock_s,
            "time_s": self._time_s,
            "step_s": self._step_s,
            "next": self.next_number,
            "tracklets": [
                {
                    "number": tracklet.tracker_id,
                    "age": tracklet.age,
                    "unseen_frames": tracklet.time_since_update,
                    "unseen_s": tracklet.time_since_update_seconds,
                    "hits": tracklet.number_of_successful_consecutive_updates,
                    "mean": tracklet.state_estimator.kf.state.tolist(),
                    "covariance": tracklet.state_estimator.kf.state_covariance.tolist(),
                }
                for tracklet in self._byte_track.tracks
            ],
            "begun": [followed.state() for _, followed in self._begun],
            "followed": {str(number): followed.state() for number, followed in self._followed.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`: tracks keep their ids and their motion; new ones still begin at first_number."""
        from trackers.core.bytetrack.tracklet import ByteTrackTracklet

        self.clock_s, self._time_s, self._step_s = state["clock_s"], state["time_s"], state["step_s"]
        self._byte_track._next_track_id = max(state["next"], self.next_number)
        self._byte_track._last_timestamp = None if self._time_s is None else self.clock_s
        begun = [_Followed.restored(held) for held in state["begun"]]
        self._followed = {int(number): _Followed.restored(held) for number, held in state["followed"].items()}
        tracklets: list[ByteTrackTracklet] = []
        fresh: list[ByteTrackTracklet] = []
        for held in state["tracklets"]:
            mean = np.asarray(held["mean"])
            tracklet = ByteTrackTracklet(mean[:4, 0])
            tracklet.tracker_id, tracklet.age = held["number"], held["age"]
            tracklet.time_since_update, tracklet.time_since_update_seconds = held["unseen_frames"], held["unseen_s"]
            tracklet.number_of_successful_consecutive_updates = held["hits"]
            if tracklet.tracker_id == -1:
                _set_noise(tracklet, begun[len(fresh)].side_px)
                fresh.append(tracklet)
            else:
                _set_noise(tracklet, self._followed[tracklet.tracker_id].side_px)
            tracklet.state_estimator.kf.state = mean
            tracklet.state_estimator.kf.state_covariance = np.asarray(held["covariance"])
            tracklets.append(tracklet)
        self._byte_track.tracks = tracklets
        self._begun = list(zip(fresh, begun, strict=True))
        self._lost = []

    def _advance(self, time_s: float) -> None:
        step_s = self._step_s if self._time_s is None or time_s <= self._time_s else time_s - self._time_s
        self._step_s = min(step_s, self.rules.max_disappeared_s / 2)
        self._time_s = time_s
        self.clock_s += step_s
        unwatched_s = step_s - self._step_s
        for tracklet in self._byte_track.tracks:
            tracklet.time_since_update_seconds -= unwatched_s
        for followed in self._followed.values():
            followed.strong_clock_s += unwatched_s

    @staticmethod
    def _without_doubles(detections: Sequence[Detection]) -> list[Detection]:
        """One box per object where a detector found it under several labels: the one of the best score."""
        if len(detections) < 2:
            return list(detections)
        boxes = torch.tensor([found.xyxy for found in detections], dtype=torch.float64)
        scores = torch.tensor([found.score for found in detections], dtype=torch.float64)
        return [detections[index] for index in sorted(nms(boxes, scores, SAME_OBJECT_IOU).tolist())]

    def _associate(self, detections: Sequence[Detection], strong: Sequence[bool]) -> list[tuple[int, int]]:
        """(index of the detection, ByteTrack's number or -1) of all detections, in ByteTrack's order."""
        import supervision

        found = supervision.Detections(
            xyxy=np.array([found.xyxy for found in detections], dtype=np.float64).reshape(-1, 4),
            confidence=np.array(strong, dtype=np.float32),
            data={"index": np.arange(len(detections))},
        )
        told = self._byte_track.update(found, timestamp=self.clock_s)
        if told.tracker_id is None or not len(told):
            return []
        return list(zip(np.asarray(told.data["index"]).tolist(), told.tracker_id.tolist(), strict=True))

    def _drop(self) -> None:
        """Give up what ByteTrack gave up, and what only weak boxes keep alive."""
        self._byte_track.tracks = [
            tracklet
            for tracklet in self._byte_track.tracks
            if tracklet.tracker_id == -1
            or self.clock_s - self._followed[tracklet.tracker_id].strong_clock_s <= self.rules.max_weak_s
        ]
        alive = {tracklet.tracker_id for tracklet in self._byte_track.tracks}
        gone = [number for number in self._followed if number not in alive]
        self._lost = [self._id_of(number) for number in gone]
        for number in gone:
            del self._followed[number]

    def _id_of(self, number: int) -> str:
        return f"{self.stream_id}:{number + 1}"
