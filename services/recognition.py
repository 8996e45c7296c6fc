"""A recogniser on a stream: smoothed scores of the picture, or of each object on it, and the actions that go on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from typing_extensions import override

from services.analytics import Analytics, Look, Record, Result, View
from services.schemas import ModelStatus, cloud_event, score_record
from services.served import Served
from services.snapshots import ModelState, SnapshotError
from services.stream_models import Region, StreamModel
from tsm_core.arena import ArenaFull, Slot
from tsm_core.crops import crop_object, crop_region
from tsm_core.errors import ShapeError
from tsm_core.events import ActionDetector
from tsm_core.frame import Frame
from tsm_core.postprocess import new_smoother
from tsm_core.types import Scores, Track

log = logging.getLogger(__name__)


class Followed(Protocol):
    """Objects that a detector of the same stream follows."""

    @property
    def tracks(self) -> Sequence[Track]:
        """Those that are worth telling and not gone, seen on the newest frame or not."""


class Recognition(Analytics[list[float]]):
    """One recogniser on one picture of each frame, all of it or a region: its slot, the scores, the open action.

    With a subject the picture shows a tracked object, and the slot is of those that are set aside for objects.
    """

    def __init__(
        self, served: Served[list[float]], stream_id: str, options: StreamModel, max_gap_s: float, subject: str = ""
    ) -> None:
        """Allocate the slot. Raises ArenaFull."""
        super().__init__(served, stream_id, options, max_gap_s)
        self.subject = subject
        self.about = {"track_id": subject} if subject else {}
        if isinstance(options.where, Region):
            self.about = {"region": options.where.region}
        self.smoother = new_smoother(served.recipe, options.smoother)
        self.detector = ActionDetector(
            stream_id,
            served.name,
            served.recipe,
            threshold=options.threshold,
            off_threshold=options.off_threshold,
        )
        self.slot = self._allocate()

    @override
    def restart(self) -> list[Record]:
        self.last_time_s = None
        self.free()
        self.slot = self._allocate()
        self.smoother.reset()
        return self.close()

    @override
    def follow(self, frame: Frame) -> Look:
        ended = self.restart() if self.passed_gap(frame) else []
        self.last_time_s = frame.time_s
        where = self.options.where
        picture = crop_region(frame, where.box) if isinstance(where, Region) else frame.image
        return Look([View(picture, self.slot)], ended)

    @override
    def update(self, view: View, output: list[float], frame: Frame, warmup: tuple[int, int] | None = None) -> Result:
        self.results += 1
        values = self.smoother.update(output, frame.time_s)
        scores = Scores(self.served.recipe.labels, values, *(warmup or self.served.warmup(self.slot)))
        at = frame.number, frame.pts_s, frame.time_s
        record = score_record(self.stream_id, self.served.name, *at, scores, about=self.about)
        events = [cloud_event(event, self.about) for event in self.detector.update(scores, *at)]
        return Result([record], events, scores, (scores.warmup_frames, scores.warmup_total))

    @override
    def holds(self, view: View) -> bool:
        return view.slot == self.slot

    @override
    def export(self) -> Sequence[ModelState]:
        arena = self.served.arena
        memory = {"smoother": self.smoother.state(), "actions": self.detector.state()}
        state = ModelState(
            self.served.name,
            self.served.schema,
            arena.steps(self.slot),
            arena.export(self.slot),
            memory,
            self.subject,
        )
        return [state]

    @override
    def restore(self, saved: Sequence[ModelState], time_s: float) -> None:
        (state,) = saved
        if state.schema != self.served.schema:
            raise SnapshotError(f"saved state is of {state.schema}, this replica serves {self.served.schema}")
        try:
            self.smoother.restore(dict(state.memory["smoother"]))
        except ShapeError as error:  # the stream's smoother was changed
            raise SnapshotError(str(error)) from None
        self.served.arena.restore(self.slot, state.state, state.steps)
        self.detector.restore(dict(state.memory["actions"]))
        self.last_time_s = time_s

    @override
    def close(self) -> list[Record]:
        return [cloud_event(event, self.about) for event in self.detector.close()]

    @override
    def free(self) -> None:
        self.served.free(self.slot)

    def _allocate(self) -> Slot:
        options = self.options
        return self.served.allocate(options.window_s, options.stride_s, of_object=bool(self.subject))

    @override
    def status(self) -> ModelStatus:
        return super().status().model_copy(update=self.about)


class ObjectRecognition(Analytics[list[float]]):
    """One recogniser on the surroundings of each tracked object: every track has a slot, scores and actions of its own.

    A track that finds no free slot goes without until one is free.
    """

    def __init__(
        self,
        served: Served[list[float]],
        stream_id: str,
        options: StreamModel,
        max_gap_s: float,
        objects: Followed,
    ) -> None:
        super().__init__(served, stream_id, options, max_gap_s)
        assert options.of_objects is not None
        self.where = options.of_objects
        self.objects = objects
        self.of: dict[str, Recognition] = {}
        self.without: set[str] = set()
        self.without_slot = 0

    @override
    def restart(self) -> list[Record]:
        self.last_time_s = None
        return self.close()

    @override
    def follow(self, frame: Frame) -> Look:
        ended = self.restart() if self.passed_gap(frame) else []
        self.last_time_s = frame.time_s
        wanted = [track for track in self.objects.tracks if not self.where.labels or track.label in self.where.labels]
        alive = {track.track_id for track in wanted}
        for track_id in self.of.keys() - alive:
            ended += self._end(track_id)
        self.without &= alive
        views: list[View] = []
        for track in wanted:
            if track.time_s != frame.time_s:
                continue  # not found on this very frame: its box is an old one
            recognition = self.of.get(track.track_id) or self._begin(track.track_id)
            if recognition is not None:
                picture = crop_object(frame, track.xyxy, self.where.margin)
                views.append(View(picture, recognition.slot, track.track_id))
        return Look(views, ended)

    @override
    def update(self, view: View, output: list[float], frame: Frame, warmup: tuple[int, int] | None = None) -> Result:
        self.results += 1
        return self.of[view.subject].update(view, output, frame, warmup)

    @override
    def holds(self, view: View) -> bool:
        return view.subject in self.of and self.of[view.subject].holds(view)

    @override
    def export(self) -> Sequence[ModelState]:
        return [state for recognition in self.of.values() for state in recognition.export()]

    @override
    def restore(self, saved: Sequence[ModelState], time_s: float) -> None:
        alive = {track.track_id for track in self.objects.tracks}
        for state in saved:
            recognition = self._begin(state.subject) if state.subject in alive else None
            if recognition is not None:
                recognition.restore([state], time_s)
        self.last_time_s = time_s

    @override
    def close(self) -> list[Record]:
        self.without.clear()
        return [event for track_id in list(self.of) for event in self._end(track_id)]

    @override
    def free(self) -> None:
        for recognition in self.of.values():
            recognition.free()
        self.of = {}

    @override
    def status(self) -> ModelStatus:
        labels = Counter(track.label for track in self.objects.tracks if track.track_id in self.of)
        about = {"objects_of": self.where.objects_of, "objects": dict(labels), "without_slot": self.without_slot}
        return super().status().model_copy(update=about)

    def _begin(self, track_id: str) -> Recognition | None:
        try:
            self.of[track_id] = Recognition(
                self.served,
                self.stream_id,
                self.options,
                self.max_gap_s,
                track_id,
            )
        except ArenaFull as full:
            if track_id not in self.without:
                self.without.add(track_id)
                self.without_slot += 1
                log.warning("%s goes without %s: %s", track_id, self.served.name, full)
            return None
        self.without.discard(track_id)
        return self.of[track_id]

    def _end(self, track_id: str) -> list[Record]:
        recognition = self.of.pop(track_id)
        recognition.free()
        return recognition.close()
