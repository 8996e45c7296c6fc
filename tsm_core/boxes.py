"""Boxes: how a picture of any size fits a detector's input, and what of its output is worth telling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from tsm_core.errors import ShapeError
from tsm_core.frame import Frame
from tsm_core.types import Detection

Size = tuple[int, int]

LEAST_SIDE_PX = 1.0  # of a box in source pixels: thinner ones are nothing


@dataclass(frozen=True, slots=True)
class Letterbox:
    """How a picture lies in a detector's input: scaled, then `left` and `top` pixels of nothing before it."""

    scale: float
    left: int
    top: int

    def to_input(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) xyxy in pixels of the picture -> of the input."""
        return boxes * self.scale + boxes.new_tensor([self.left, self.top, self.left, self.top])

    def to_source(self, boxes: Tensor) -> Tensor:
        """Boxes (M, 4) xyxy in pixels of the input -> of the picture."""
        return (boxes - boxes.new_tensor([self.left, self.top, self.left, self.top])) / self.scale


def letterbox_of(source_size: Size, input_size: Size) -> Letterbox:
    """Where a picture of (width, height) lies in an input of (height, width): as large as fits, in the middle.

    Raises ShapeError for a picture without pixels.
    """
    (width, height), (input_height, input_width) = source_size, input_size
    if width < 1 or height < 1:
        raise ShapeError(f"a picture of {width}x{height} has no pixels")
    scale = min(input_width / width, input_height / height)
    inner_width, inner_height = _inner(source_size, scale)
    return Letterbox(scale, (input_width - inner_width) // 2, (input_height - inner_height) // 2)


def _inner(source_size: Size, scale: float) -> Size:
    return max(round(source_size[0] * scale), 1), max(round(source_size[1] * scale), 1)


def letterboxed(batch: Tensor, input_size: Size) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Pictures uint8 (N, 3, H, W) -> scaled uint8 (N, 3, h, w), and (left, right, top, bottom) to pad them with.

    Bilinear without antialias, as torchvision's detectors are trained.
    """
    source_size = (batch.shape[3], batch.shape[2])
    box = letterbox_of(source_size, input_size)
    width, height = _inner(source_size, box.scale)
    pads = (box.left, input_size[1] - width - box.left, box.top, input_size[0] - height - box.top)
    if (height, width) == tuple(batch.shape[2:]):
        return batch, pads
    if batch.device.type == "cpu":
        return functional.interpolate(batch, (height, width), mode="bilinear"), pads
    # only the CPU resizes bytes
    floats = functional.interpolate(batch.float(), (height, width), mode="bilinear")
    return floats.round_().clamp_(0, 255).to(torch.uint8), pads


@dataclass(frozen=True, slots=True)
class Boxes:
    """What a detector found on one frame, best first, on the CPU or the detector's device.

    xyxy (M, 4) float32 in pixels of the input, scores (M,) float32, labels (M,) int64: index into the detector's
    labels. M may be 0.
    """

    xyxy: Tensor
    scores: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        found = len(self.scores)
        if tuple(self.xyxy.shape) != (found, 4) or tuple(self.labels.shape) != (found,) or self.scores.ndim != 1:
            shapes = [tuple(each.shape) for each in (self.xyxy, self.scores, self.labels)]
            raise ShapeError(f"boxes must be (M, 4), scores (M,), labels (M,), got {shapes}")

    def __len__(self) -> int:
        return len(self.scores)


def cleaned(xyxy: Tensor, size: Size, least_px: float = LEAST_SIDE_PX) -> tuple[Tensor, Tensor]:
    """Boxes (M, 4) clipped to a picture of (width, height), and which (M,) are boxes at all.

    No boxes are those with a value that is not finite, outside of the picture, turned round, or with a side of less
    than least_px inside of the picture.
    """
    width, height = size
    limits = xyxy.new_tensor([width, height, width, height])
    clipped = torch.minimum(xyxy.clamp(min=0), limits)
    sides = clipped[:, 2:] - clipped[:, :2]
    return clipped, xyxy.isfinite().all(dim=1) & (sides >= least_px).all(dim=1)


def detections_of(boxes: Boxes, labels: Sequence[str], letterbox: Letterbox, source_size: Size) -> list[Detection]:
    """The boxes as records in source pixels, best first, clipped to the picture of source_size (width, height).

    What is no box in the picture (see `cleaned`) is left out, and so is a score that is not finite.
    """
    if not len(boxes):
        return []
    xyxy, fine = cleaned(letterbox.to_source(boxes.xyxy.detach().float()), source_size)
    fine &= boxes.scores.isfinite()
    kept = torch.cat([xyxy, boxes.scores[:, None].float(), boxes.labels[:, None].float()], dim=1)[fine].tolist()
    return [Detection(labels[int(label)], score, (x1, y1, x2, y2)) for x1, y1, x2, y2, score, label in kept]


def detections_on(frame: Frame, boxes: Boxes, labels: Sequence[str], input_size: Size) -> list[Detection]:
    """What was found on a stream's frame, in pixels of its source, whatever size the decoder made of it.

    input_size (height, width) of the detector that found the boxes.
    """
    _, height, width = frame.image.shape
    size = (width, height)
    found = detections_of(boxes, labels, letterbox_of(size, input_size), size)
    if frame.source_size == size:
        return found
    across, down = frame.to_source
    return [
        replace(one, xyxy=(one.xyxy[0] * across, one.xyxy[1] * down, one.xyxy[2] * across, one.xyxy[3] * down))
        for one in found
    ]
