"""One picture of a stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsm_core.errors import ShapeError


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
