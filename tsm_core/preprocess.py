"""uint8 pixels -> model input: the only resize, crop and normalise; training, evaluation and serving share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tsm_core.errors import CallerError, ShapeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PreprocessSpec:
    """How a model wants its pixels; travels with its weights.

    resize `short`: the short side becomes resize_px (long side rounded half up), then the centre input_px x input_px
    is cut (offsets floored). `exact`: straight to input_px x input_px. Bilinear; antialias when shrinking as Pillow
    does, or not as OpenCV does. mean and std are per RGB channel, of values in 0..1.
    """

    input_px: int = 224
    resize: Literal["short", "exact"] = "short"
    resize_px: int = 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    antialias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.resize not in ("short", "exact"):
            raise PreprocessError(f"resize {self.resize!r} must be 'short' or 'exact'")
        if self.input_px < 1 or (self.resize == "short" and self.resize_px < self.input_px):
            raise PreprocessError(f"input_px {self.input_px} must be at least 1 and no more than {self.resize_px}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise PreprocessError(f"mean {self.mean} and std {self.std} must be 3 numbers each, std above 0")


class PreprocessError(CallerError):
    """A PreprocessSpec cannot be used."""

    reason = "invalid_preprocess"


def resized_size(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """(height, width) in pixels of a picture after the resize, before the crop."""
    if spec.resize == "exact":
        return spec.input_px, spec.input_px
    factor = spec.resize_px / min(height, width)
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize_crop(batch: Tensor, spec: PreprocessSpec) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, input_px, input_px), not yet normalised."""
    size = resized_size(batch.shape[2], batch.shape[3], spec)
    if size != tuple(batch.shape[2:]):
        if batch.device.type == "cpu":
            batch = functional.interpolate(batch, size, mode="bilinear", antialias=spec.antialias)
        else:  # only the CPU resizes bytes
            floats = functional.interpolate(batch.float(), size, mode="bilinear", antialias=spec.antialias)
            batch = floats.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (size[0] - spec.input_px) // 2, (size[1] - spec.input_px) // 2
    return batch[:, :, top : top + spec.input_px, left : left + spec.input_px]


@lru_cache(maxsize=64)
def _scale(spec: PreprocessSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(spec.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(spec.std, dtype=torch.float64).view(3, 1, 1)
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def preprocess(
    images: Sequence[Tensor] | Tensor, spec: PreprocessSpec, device: torch.device | str | None = None
) -> Tensor:
    """float32 (N, 3, input_px, input_px), normalised, on `device`; rows in the order of `images`.

    images: uint8 (3, H, W) each, RGB, of any sizes, or one uint8 (N, 3, H, W) tensor. Pictures of one size are worked
    on together. device None: where the images are. Raises ShapeError.
    """
    if not len(images):
        raise ShapeError("no images: preprocess needs at least one")
    target = torch.device(device) if device is not None else images[0].device
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        return _to_input(images.permute(0, 2, 3, 1).contiguous(), spec, target)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ShapeError(f"image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
        groups.setdefault((image.shape[1], image.shape[2]), []).append(index)
    inputs = [
        _to_input(torch.stack([images[index].permute(1, 2, 0) for index in indices]), spec, target)
        for indices in groups.values()
    ]
    if len(inputs) == 1:
        return inputs[0]
    order = sorted(range(len(images)), key=[index for indices in groups.values() for index in indices].__getitem__)
    return torch.cat(inputs)[order]


def _to_input(rows: Tensor, spec: PreprocessSpec, device: torch.device) -> Tensor:
    # rows uint8 (N, H, W, 3): decoders give that order, and the resize is several times faster in it
    scale, shift = _scale(spec, device)
    pixels = resize_crop(rows.to(device, non_blocking=True).permute(0, 3, 1, 2), spec)
    return (pixels.float() * scale).add_(shift)
