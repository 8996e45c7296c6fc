"""The records that every room speaks: they check themselves at birth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tsm_core.errors import ShapeError

EventPhase = Literal["new", "update", "end"]
Direction = Literal["in", "out"]
Box = tuple[float, float, float, float]


def _check_object(label: str, xyxy: Box, *scores: float) -> None:
    x1, y1, x2, y2 = xyxy
    if not all(map(math.isfinite, xyxy)) or x1 >= x2 or y1 >= y2:
        raise ShapeError(f"box of {label!r} must be finite with x1 < x2 and y1 < y2, got {xyxy}")
    if not all(0.0 <= score <= 1.0 for score in scores):
        raise ShapeError(f"scores of {label!r} must be 0..1, got {', '.join(map(str, scores))}")


@dataclass(frozen=True, slots=True)
class Scores:
    """What a recogniser says of one frame, smoothed over time.

    values: one probability per label, same order as labels. warmup_frames counts the frames the shift state has
    seen, up to warmup_total (the model's finite memory); the result is exact once they are equal.
    """

    labels: tuple[str, ...]
    values: tuple[float, ...]
    warmup_frames: int
    warmup_total: int

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.values) or not self.labels:
            raise ShapeError(f"{len(self.labels)} labels but {len(self.values)} values")

    def top(self, k: int = 1) -> tuple[tuple[str, float], ...]:
        """The k best (label, score) pairs, best first."""
        order = sorted(range(len(self.values)), key=lambda i: -self.values[i])
        return tuple((self.labels[i], self.values[i]) for i in order[:k])


@dataclass(frozen=True, slots=True)
class ActionEvent:
    """A recognised action that begins (new), goes on (update) or is over (end).

    action_id is the same through one action's life. Times are `time_s` of frames; pts_s orders frames and places
    overlays. end_time_s is set on `end` alone.
    """

    stream_id: str
    action_id: str
    phase: EventPhase
    label: str
    score: float
    top_score: float
    top_k: tuple[tuple[str, float], ...]
    model: str
    frame_number: int
    pts_s: float
    frame_time_s: float
    start_time_s: float
    start_pts_s: float
    end_time_s: float | None = None

    def __post_init__(self) -> None:
        if (self.phase == "end") != (self.end_time_s is not None):
            raise ShapeError(f"phase {self.phase!r} with end_time_s {self.end_time_s!r}: only an end has an end time")


@dataclass(frozen=True, slots=True)
class Detection:
    """One object on one frame; xyxy in source pixels, it may reach over the picture's edge. Raises ShapeError."""

    label: str
    score: float
    xyxy: Box

    def __post_init__(self) -> None:
        _check_object(self.label, self.xyxy, self.score)


@dataclass(frozen=True, slots=True)
class Track:
    """One object as it stands on one frame, followed over the frames before.

    track_id is "{stream_id}:{n}" with n from 1. label is voted over the track, score the median of its last scores,
    detection_score that of the box on this frame. Between two frames with a box (time_s is the last one's) all stays
    as it was. zones are those it is in, entered_zones all it ever was in, in order; loitering those where it has
    stayed too long. stationary: its box has kept its place for a while. Raises ShapeError.
    """

    track_id: str
    label: str
    score: float
    top_score: float
    xyxy: Box
    detection_score: float
    start_time_s: float
    start_pts_s: float
    time_s: float
    zones: tuple[str, ...] = ()
    entered_zones: tuple[str, ...] = ()
    loitering: tuple[str, ...] = ()
    stationary: bool = False

    def __post_init__(self) -> None:
        _check_object(self.label, self.xyxy, self.score, self.top_score, self.detection_score)


@dataclass(frozen=True, slots=True)
class Crossing:
    """A line that a track went over. Who walks from the line's a to its b has `in` at the right hand."""

    line: str
    direction: Direction


@dataclass(frozen=True, slots=True)
class ObjectEvent:
    """A tracked object that appears (new), goes on or changes (update) or is gone (end).

    before is the track as last told, None on `new`; after is the track now. crossings are the lines it has gone over
    since the event before. source_size is the (width, height) that the boxes are in. end_time_s is set on `end`
    alone.
    """

    stream_id: str
    phase: EventPhase
    before: Track | None
    after: Track
    model: str
    frame_number: int
    pts_s: float
    frame_time_s: float
    source_size: tuple[int, int]
    crossings: tuple[Crossing, ...] = ()
    end_time_s: float | None = None

    def __post_init__(self) -> None:
        if (self.phase == "end") != (self.end_time_s is not None):
            raise ShapeError(f"phase {self.phase!r} with end_time_s {self.end_time_s!r}: only an end has an end time")
        if (self.phase == "new") != (self.before is None):
            raise ShapeError(f"phase {self.phase!r} with before {self.before!r}: only a new object has no before")

    @property
    def track_id(self) -> str:
        """The object's id, the same through its life."""
        return self.after.track_id
