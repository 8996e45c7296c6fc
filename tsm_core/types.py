"""The records that every room speaks: they check themselves at birth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tsm_core.errors import ShapeError

EventPhase = Literal["new", "update", "end"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture of a stream, with its times.

    image uint8 (3, H, W), RGB. pts_s is the container's clock, time_s the arrival (Unix time) for cameras and the pts
    for files. number counts the stream's decoded frames from 0 and goes on over reconnections. source_size is the
    (width, height) in pixels of the picture that the camera sent, before the decoder scaled it.
    """

    stream_id: str
    number: int
    image: Tensor
    pts_s: float
    time_s: float
    source_size: tuple[int, int]
    corrupt: bool = False

    def __post_init__(self) -> None:
        if self.image.dtype != torch.uint8 or self.image.ndim != 3 or self.image.shape[0] != 3:
            raise ShapeError(f"image must be uint8 (3, H, W), got {self.image.dtype} {tuple(self.image.shape)}")

    @property
    def to_source(self) -> tuple[float, float]:
        """Factors (x, y) from this picture's pixels to the source's pixels."""
        _, height, width = self.image.shape
        return self.source_size[0] / width, self.source_size[1] / height

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.image.shape)
        return f"Frame({self.stream_id}#{self.number}, {shape}, pts {self.pts_s:.3f} s, time {self.time_s:.3f} s)"


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
