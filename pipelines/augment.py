"""Train-time randomness: crops and mirror images as a recipe says; ends where preprocess begins.

Bytes in, bytes out, and one draw for all frames of a clip; normalising is left to preprocess. Sources: MMAction2 0.24
(crops, order) and mit-han-lab (crops of the stored frame).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tsm_core.errors import CallerError, ShapeError
from tsm_core.preprocess import PreprocessSpec, resize
from tsm_core.recipes import Training

Rng = np.random.Generator


class AugmentError(CallerError):
    """An augmentation cannot be built."""

    reason = "invalid_augment"


class ClipAugment:
    """A clip as decoded -> a clip to train on, and its label.

    steps: what is done, in order, in the words of the recipe tables. spec: its mmaction2 convention shrinks or enlarges
    the frames before MultiScaleCrop, its mit convention crops them as they are stored. Raises AugmentError.
    """

    def __init__(self, training: Training, spec: PreprocessSpec) -> None:
        if training.crop not in ("multi_scale", "random_resized"):
            raise AugmentError(f"crop {training.crop!r} must be 'multi_scale' or 'random_resized'")
        self.training, self.spec = training, spec
        self._mirrored = _mirror(training.flip_pairs)
        self._resize_first = training.crop == "multi_scale" and spec.convention == "mmaction2"
        self._to_input = replace(spec, resize="exact")
        first = "resize_short_side" if spec.resize == "short" else "resize_fixed"
        self.steps: tuple[str, ...] = (
            *((first,) if self._resize_first else ()),
            "multi_scale_crop" if training.crop == "multi_scale" else "random_resized_crop",
            "resize_fixed",
            *(("flip",) if training.flip else ()),
        )

    def __call__(self, frames: Tensor, label: int, rng: Rng) -> tuple[Tensor, int]:
        """Pixels uint8 (T, 3, input_px, input_px), colours side by side in memory; the label, exchanged if mirrored.

        frames uint8 (T, 3, H, W), RGB, of one clip; not written to, but the pixels may be the very tensor where there
        is nothing to do. rng: decides everything. Raises ShapeError.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
            raise ShapeError(f"frames must be uint8 (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}")
        if self._resize_first:
            frames = resize(frames, self.spec)
        left, top, width, height = self._box(frames.shape[3], frames.shape[2], rng)
        crop = frames[:, :, top : top + height, left : left + width]
        # colours side by side: the resize is several times faster so, and has to copy the crop anyway
        pixels = resize(crop.contiguous(memory_format=torch.channels_last), self._to_input)
        if self.training.flip and rng.random() < 0.5:
            pixels, label = pixels.flip(3), self._mirrored.get(label, label)
        return pixels.contiguous(memory_format=torch.channels_last), label

    def _box(self, width: int, height: int, rng: Rng) -> tuple[int, int, int, int]:
        if self.training.crop == "random_resized":
            return random_resized_box(width, height, rng)
        sizes = multi_scale_sizes(min(width, height), self.spec.input_px)
        size = sizes[rng.integers(len(sizes))]
        offsets = multi_scale_offsets(width, height, *size)
        return *offsets[rng.integers(len(offsets))], *size


def _mirror(pairs: tuple[tuple[int, int], ...]) -> dict[int, int]:
    mirrored = {one: other for a, b in pairs for one, other in ((a, b), (b, a))}
    if len(mirrored) != 2 * len(pairs):
        raise AugmentError(f"flip_pairs {pairs} must name each class once")
    return mirrored


# --- crops

SCALES = (1, 0.875, 0.75, 0.66)
QUARTERS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))
SNAP_PX = 3  # a side nearer than this to the network's becomes it


def multi_scale_sizes(base_px: int, input_px: int) -> list[tuple[int, int]]:
    """(width, height) of the 10 crops to choose from, of a picture whose short side is base_px."""
    sides = [max(1, int(base_px * scale)) for scale in SCALES]
    # never more than there is: a picture 1 or 2 px short would otherwise be cropped outside
    sides = [min(input_px, base_px) if abs(side - input_px) < SNAP_PX else side for side in sides]
    return [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]


def multi_scale_offsets(width: int, height: int, crop_width: int, crop_height: int) -> list[tuple[int, int]]:
    """(left, top) of the 13 places to choose from; where there is no room some are equal, and keep their weight."""
    across, down = (width - crop_width) // 4, (height - crop_height) // 4
    return [(x * across, y * down) for x, y in QUARTERS]


def random_resized_box(width: int, height: int, rng: Rng) -> tuple[int, int, int, int]:
    """(left, top, width, height) of 8 to 100 % of a picture, sides 3:4 to 4:3; the central square if ten draws fail."""
    aspects = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), size=10))
    areas = rng.uniform(0.08, 1.0, size=10) * (width * height)
    for aspect, area in zip(aspects, areas, strict=True):
        w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if w <= width and h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side
