"""uint8 pixels -> model input: the only resize, crop and normalise; training, evaluation and serving share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from tsm_core.errors import ShapeError
from tsm_core.labels import Convention
from tsm_core.preprocess_spec import Crop, PreprocessSpec


def resized_size(height: int, width: int, spec: PreprocessSpec) -> tuple[int, int]:
    """(height, width) in pixels of a picture after the resize, before the crop."""
    if spec.resize == "exact":
        return spec.input_px, spec.input_px
    short = min(height, width)
    if spec.convention == "mit":
        return spec.resize_px * height // short, spec.resize_px * width // short
    factor = spec.resize_px / short
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize(batch: Tensor, spec: PreprocessSpec) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, h, w), whole pictures."""
    size = resized_size(batch.shape[2], batch.shape[3], spec)
    if size == tuple(batch.shape[2:]):
        return batch
    if batch.device.type == "cpu":
        return functional.interpolate(batch, size, mode="bilinear", antialias=spec.antialias)
    # only the CPU resizes bytes
    floats = functional.interpolate(batch.float(), size, mode="bilinear", antialias=spec.antialias)
    return floats.round_().clamp_(0, 255).to(torch.uint8)


def _middle(side: int, crop_px: int, convention: Convention) -> int:
    return round((side - crop_px) / 2) if convention == "mit" else (side - crop_px) // 2


def crop_offsets(
    height: int, width: int, crop: Crop, crop_px: int, convention: Convention = "mmaction2"
) -> list[tuple[int, int]]:
    """(left, top) in pixels of each crop of a picture, in the convention's order; a crop of `ten` is also mirrored.

    Raises ShapeError when a crop does not fit.
    """
    if crop_px > min(height, width):
        raise ShapeError(f"a crop of {crop_px} px does not fit a picture of {width}x{height}")
    if crop == "center":
        return [(_middle(width, crop_px, convention), _middle(height, crop_px, convention))]
    if crop == "three" and convention == "mmaction2":
        if crop_px not in (height, width):
            raise ShapeError(f"three crops must be as high or wide as the picture: {crop_px} px of {width}x{height}")
        x, y = (width - crop_px) // 2, (height - crop_px) // 2
        return [(0, 0), (2 * x, 2 * y), (x, y)]
    x, y = (width - crop_px) // 4, (height - crop_px) // 4
    if crop == "three":
        return [(0, 2 * y), (4 * x, 2 * y), (2 * x, 2 * y)]
    return [(0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y), (2 * x, 2 * y)]


def crop_views(frames: Tensor, spec: PreprocessSpec, crop: Crop, crop_px: int) -> Tensor:
    """Views of one video: uint8 (F, 3, H, W) -> uint8 (crops, F, 3, crop_px, crop_px), 1, 3 or 10 crops.

    Of `ten`, every second one is the mirror image of the one before. Raises ShapeError.
    """
    pictures = resize(frames, spec)
    views = []
    for left, top in crop_offsets(pictures.shape[2], pictures.shape[3], crop, crop_px, spec.convention):
        view = pictures[:, :, top : top + crop_px, left : left + crop_px]
        views += [view, view.flip(3)] if crop == "ten" else [view]
    return torch.stack(views)


def resize_crop(batch: Tensor, spec: PreprocessSpec) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, input_px, input_px), not yet normalised."""
    pictures = resize(batch, spec)
    top, left = (_middle(side, spec.input_px, spec.convention) for side in pictures.shape[2:])
    return pictures[:, :, top : top + spec.input_px, left : left + spec.input_px]


def normalise(pixels: Tensor, spec: PreprocessSpec) -> Tensor:
    """float32 of the same shape from uint8 (..., 3, H, W): channel order, mean and std as the model wants them."""
    if spec.channels == "bgr":
        pixels = pixels.flip(-3)
    floats = pixels.to(torch.float32, copy=True)
    rows = floats.movedim(-3, -1)  # (..., H, W, 3)
    if rows.is_contiguous():  # colours side by side: whole rows at a time are many times faster than three numbers
        scale, shift = _scale(spec, pixels.device, rows.shape[-2])
        rows.view(-1, scale.numel()).mul_(scale).add_(shift)
        return floats
    scale, shift = _scale(spec, pixels.device, 1)
    return floats.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1))


@lru_cache(maxsize=64)
def _scale(spec: PreprocessSpec, device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """What a row of pixels is multiplied by, and what is added (width * 3,)."""
    mean = torch.tensor(spec.mean, dtype=torch.float64)
    std = torch.tensor(spec.std, dtype=torch.float64)
    scale, shift = (1 / (255 * std)).float().repeat(width), (-mean / std).float().repeat(width)
    return scale.to(device), shift.to(device)


def preprocess(
    images: Sequence[Tensor] | Tensor, spec: PreprocessSpec, device: torch.device | str | None = None
) -> Tensor:
    """float32 (N, 3, input_px, input_px), normalised, on `device`; rows in the order of `images`.

    images: uint8 (3, H, W) each, RGB, of any sizes, or one uint8 (N, 3, H, W) tensor. Pictures of one size are worked
    on together. device None: where the images are. Raises ShapeError.
    """
    return by_size(images, lambda batch: normalise(resize_crop(batch, spec), spec), device)


def by_size(
    images: Sequence[Tensor] | Tensor,
    to_input: Callable[[Tensor], Tensor],
    device: torch.device | str | None = None,
) -> Tensor:
    """Rows (N, ...) in the order of `images`, which `to_input` makes of pictures uint8 (N, 3, H, W) on `device`.

    Pictures of one size are given to it together. images, device: as for `preprocess`. Raises ShapeError.
    """
    if not len(images):
        raise ShapeError("no images: preprocess needs at least one")
    target = torch.device(device) if device is not None else images[0].device
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        return to_input(_on(images.permute(0, 2, 3, 1).contiguous(), target))
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ShapeError(f"image must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
        groups.setdefault((image.shape[1], image.shape[2]), []).append(index)
    inputs = [
        to_input(_on(torch.stack([images[index].permute(1, 2, 0) for index in indices]), target))
        for indices in groups.values()
    ]
    if len(inputs) == 1:
        return inputs[0]
    order = sorted(range(len(images)), key=[index for indices in groups.values() for index in indices].__getitem__)
    return torch.cat(inputs)[order]


def _on(rows: Tensor, device: torch.device) -> Tensor:
    # rows uint8 (N, H, W, 3): decoders give that order, and the resize is several times faster in it
    return rows.to(device, non_blocking=True).permute(0, 3, 1, 2)
