"""Train-time randomness: crops, mirror images, colours and blends as a recipe says; ends where preprocess begins.

Bytes in, bytes out, and one draw for all frames of a clip; normalising is left to preprocess. Sources: MMAction2 0.24
(crops, order, blending), mit-han-lab (crops of the stored frame), imgaug 0.4 and pytorchvideo 0.1.5 (operations).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as images

from tsm_core.errors import CallerError, ShapeError
from tsm_core.preprocess import resize
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import Training

Rng = np.random.Generator
BlendKind = Literal["none", "mixup", "cutmix"]


class AugmentError(CallerError):
    """An augmentation cannot be built."""

    reason = "invalid_augment"


class ClipAugment:
    """A clip as decoded -> a clip to train on, and its label.

    steps: what is done, in order, in the words of the recipe tables. spec: its mmaction2 convention shrinks or enlarges
    the frames before MultiScaleCrop, its mit convention crops them as they are stored. worker_seed: decides the signs
    that imgaug_randaugment keeps as long as a worker lives. Raises AugmentError.
    """

    def __init__(self, training: Training, spec: PreprocessSpec, *, worker_seed: int = 0) -> None:
        crops = {"multi_scale": ("multi_scale_crop",), "random_resized": ("random_resized_crop",), "none": ()}
        if training.crop not in crops:
            raise AugmentError(f"crop {training.crop!r} must be one of {', '.join(crops)}")
        policies = {
            "none": None,
            "imgaug_randaugment": ImgaugRandAugment(worker_seed),
            "ptv_randaugment": ptv_randaugment,
            "ptv_augmix": ptv_augmix,
        }
        if training.augment not in policies:
            raise AugmentError(f"augment {training.augment!r} must be one of {', '.join(policies)}")
        self.training, self.spec = training, spec
        self._policy: Callable[[Tensor, Rng], Tensor] | None = policies[training.augment]
        self._mirrored = _mirror(training.flip_pairs)
        self._resize_first = training.crop == "multi_scale" and spec.convention == "mmaction2"
        self._to_input = replace(spec, resize="exact")
        first = "resize_short_side" if spec.resize == "short" else "resize_fixed"
        self.steps: tuple[str, ...] = (
            *((first,) if self._resize_first else ()),
            *crops[training.crop],
            "resize_fixed",
            *(("flip",) if training.flip else ()),
            *((training.augment,) if self._policy else ()),
        )

    def __call__(self, frames: Tensor, label: int, rng: Rng) -> tuple[Tensor, int]:
        """Pixels uint8 (T, 3, input_px, input_px), colours side by side in memory; the label, exchanged if mirrored.

        frames uint8 (T, 3, H, W), RGB, of one clip; not written to, but the pixels may be the very tensor where there
        is nothing to do. rng: decides everything but the worker's signs. Raises ShapeError.
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
        if self._policy:
            pixels = self._policy(pixels, rng)
        return pixels.contiguous(memory_format=torch.channels_last), label

    def _box(self, width: int, height: int, rng: Rng) -> tuple[int, int, int, int]:
        if self.training.crop == "none":
            return 0, 0, width, height
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


# --- operations: a clip uint8 (T, 3, H, W) and a number -> a new clip

Matrix = tuple[float, float, float, float, float, float]


def warp(clip: Tensor, matrix: Matrix, fill: float = 0.0) -> Tensor:
    """Each pixel from where the matrix says, in px from the centre: (a x + b y + c, d x + e y + f).

    Bilinear; black outside, or as torchvision does with a fill, which dims what touches the border twice.
    """
    a, b, c, d, e, f = matrix
    frames, colours, height, width = clip.shape
    theta = torch.tensor([[[a, b * height / width, 2 * c / width], [d * width / height, e, 2 * f / height]]])
    grid = functional.affine_grid(theta, [1, 1, height, width], align_corners=False)
    planes = clip.reshape(1, frames * colours, height, width).float()  # one grid for the whole clip
    warped = functional.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if fill:
        inside = functional.grid_sample(torch.ones(1, 1, height, width), grid, align_corners=False)
        warped.sub_(fill).mul_(inside).add_(fill)
    return warped.round_().to(torch.uint8).view(clip.shape)


def rotation(degrees: float) -> Matrix:
    """Counter-clockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return cos, -sin, 0, sin, cos, 0


def slant_x(clip: Tensor, degrees: float) -> Tensor:
    """As imgaug shears: upright lines lean by an angle and keep their length, so that the picture loses height."""
    lean = math.radians(degrees)
    return warp(clip, (1, math.tan(lean), 0, 0, 1 / math.cos(lean), 0))


def slant_y(clip: Tensor, degrees: float) -> Tensor:
    """Like slant_x, of level lines."""
    lean = math.radians(degrees)
    return warp(clip, (1 / math.cos(lean), 0, 0, -math.tan(lean), 1, 0))


def shear_x(clip: Tensor, factor: float) -> Tensor:
    """As pytorchvideo shears: rows move by a share of their distance from the upper edge."""
    return warp(clip, (1, factor, clip.shape[2] * factor / 2, 0, 1, 0), FILL)


def shear_y(clip: Tensor, factor: float) -> Tensor:
    """Like shear_x, of columns and the left edge."""
    return warp(clip, (1, 0, 0, factor, 1, clip.shape[3] * factor / 2), FILL)


FILL = 0.5  # pytorchvideo's, of 255: meant as grey, but black

# How near the originals they are. pytorchvideo calls torchvision's first version, which is within one level of this one
# everywhere. imgaug has Pillow's arithmetic for colours: the same in brightness, posterize, solarize, equalize and
# invert, within one level in saturation, contrast, sharpness and autocontrast, where Pillow rounds greys and means. It
# warps by OpenCV, also bilinear and black outside, but rounds places to 1/32 px: a few levels at edges. warp rather
# than torchvision's affine: that cannot slant, and makes a grid for each frame.
OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": images.adjust_brightness,
    "contrast": images.adjust_contrast,
    "saturation": images.adjust_saturation,
    "sharpness": images.adjust_sharpness,
    "autocontrast": lambda clip, _: images.autocontrast(clip.contiguous()),  # several times faster plane by plane
    "equalize": lambda clip, _: images.equalize(clip),
    "invert": lambda clip, _: images.invert(clip),
    "posterize": lambda clip, bits: images.posterize(clip, int(bits)),
    "solarize": images.solarize,
    "turn": lambda clip, degrees: warp(clip, rotation(degrees)),
    "move_x": lambda clip, share: warp(clip, (1, 0, share * clip.shape[3], 0, 1, 0)),  # need not be whole pixels
    "move_y": lambda clip, share: warp(clip, (1, 0, 0, 0, 1, share * clip.shape[2])),
    "slant_x": slant_x,
    "slant_y": slant_y,
    "rotate": lambda clip, degrees: warp(clip, rotation(degrees), FILL),
    "translate_x": lambda clip, share: warp(clip, (1, 0, share * clip.shape[3], 0, 1, 0), FILL),
    "translate_y": lambda clip, share: warp(clip, (1, 0, 0, 0, 1, share * clip.shape[2]), FILL),
    "shear_x": shear_x,
    "shear_y": shear_y,
}


def cutout(clip: Tensor, share: float, rng: Rng) -> Tensor:
    """A grey square, as wide as a share of the height, its centre anywhere in the picture."""
    height, width = clip.shape[2:]
    x, y, half = rng.random() * width, rng.random() * height, share * height / 2
    left, top = (int(max(0, at - half)) for at in (x, y))
    cut = clip.clone()
    cut[:, :, top : int(y + half), left : int(x + half)] = 128
    return cut


# --- policies: which operations, how strong

LEVEL = 0.9  # magnitude 9 of 10
IMGAUG: tuple[tuple[str, float], ...] = (
    ("slant_x", 17.19 * LEVEL),
    ("slant_y", 17.19 * LEVEL),
    ("move_x", 0.2 * LEVEL),
    ("move_y", 0.2 * LEVEL),
    ("turn", 30 * LEVEL),
    ("posterize", 3),
    ("solarize", 230),  # of 256 * LEVEL, which imgaug makes whole
    ("saturation", 1.8 * LEVEL + 0.1),
    ("contrast", 1.8 * LEVEL + 0.1),
    ("brightness", 1.8 * LEVEL + 0.1),
    ("sharpness", 1.8 * LEVEL + 0.1),
    ("autocontrast", 0),
    ("equalize", 0),
    ("invert", 0),
    ("cutout", 0.2 * LEVEL),
)
SIGNED = 5  # the first ones go one way or the other


class ImgaugRandAugment:
    """Exactly two of 15 operations in the list's order, always equally strong; each worker knows one direction each."""

    def __init__(self, worker_seed: int) -> None:
        signs = np.random.default_rng(worker_seed).choice((-1.0, 1.0), SIGNED)
        self.operations = tuple(
            (name, value * float(signs[at]) if at < SIGNED else value) for at, (name, value) in enumerate(IMGAUG)
        )

    def __call__(self, clip: Tensor, rng: Rng) -> Tensor:
        """uint8 (T, 3, H, W), another clip of the same shape."""
        for at in sorted(rng.choice(len(self.operations), 2, replace=False)):
            name, value = self.operations[at]
            clip = cutout(clip, value, rng) if name == "cutout" else OPERATIONS[name](clip, value)
        return clip


# Strength at level 0, what level 10 adds, and whether it is taken away as often as added.
Strengths = Mapping[str, tuple[float, float, bool]]

RANDAUGMENT: Strengths = {
    "brightness": (1, 0.9, True),
    "contrast": (1, 0.9, True),
    "saturation": (1, 0.9, True),
    "sharpness": (1, 0.9, True),
    "autocontrast": (0, 0, False),
    "equalize": (0, 0, False),
    "invert": (0, 0, False),
    "rotate": (0, 30, True),
    "posterize": (4, -4, False),
    "solarize": (1, -1, False),
    "shear_x": (0, 0.3, True),
    "shear_y": (0, 0.3, True),
    "translate_x": (0, 0.45, True),
    "translate_y": (0, 0.45, True),
}
AUGMIX: Strengths = {
    "autocontrast": (0, 0, False),
    "equalize": (0, 0, False),
    "rotate": (0, 30, True),
    "posterize": (4, -4, False),
    "solarize": (1, -1, False),
    "shear_x": (0, 0.3, True),
    "shear_y": (0, 0.3, True),
    "translate_x": (0, 1 / 3, True),
    "translate_y": (0, 1 / 3, True),
    "saturation": (0.1, 1.8, False),
    "contrast": (0.1, 1.8, False),
    "brightness": (0.1, 1.8, False),
    "sharpness": (0.1, 1.8, False),
}


def strength(name: str, table: Strengths, level: float, rng: Rng) -> float:
    """The number that a pytorchvideo operation gets at a level of 0 to 10: a factor, degrees, bits or a threshold."""
    base, reach, both_ways = table[name]
    reach *= level / 10
    if name == "posterize":
        return base + int(reach)
    if name == "solarize":
        return int((base + reach) * 255)
    return base - reach if both_ways and rng.random() <= 0.5 else base + reach


def ptv_randaugment(clip: Tensor, rng: Rng) -> Tensor:
    """Two of 14 operations in any order, each left out every second time; level about 9."""
    names = list(RANDAUGMENT)
    for at in rng.choice(len(names), 2, replace=False):
        if rng.random() <= 0.5:
            level = min(max(rng.normal(9, 0.5), 0.0), 10.0)
            clip = OPERATIONS[names[at]](clip, strength(names[at], RANDAUGMENT, level, rng))
    return clip


def ptv_augmix(clip: Tensor, rng: Rng) -> Tensor:
    """The clip mixed with three chains of one to three of 13 operations each, level 0.1 to 3."""
    names = list(AUGMIX)
    weights, kept = rng.dirichlet((1, 1, 1)), rng.beta(1, 1)
    mixed = torch.zeros_like(clip, dtype=torch.float32)
    for weight in weights:
        chain = clip
        for at in rng.integers(len(names), size=rng.integers(1, 4)):
            level = rng.uniform(0.1, 3)
            chain = OPERATIONS[names[at]](chain, strength(names[at], AUGMIX, level, rng))
        mixed.add_(chain, alpha=float(weight))
    return (clip * kept + mixed * (1 - kept)).to(torch.uint8)  # cut off, not rounded, as there


# --- blending of a batch


class Blend:
    """Mixes the clips of a batch with each other, and their labels with them: always, or with `none` never.

    One share from Beta(alpha, alpha) and one permutation for the whole batch; torchvision's MixUp and CutMix pair each
    clip with its neighbour instead. Raises AugmentError.
    """

    def __init__(self, kind: BlendKind, classes: int, alpha: float = 0.2) -> None:
        if kind not in ("none", "mixup", "cutmix"):
            raise AugmentError(f"blend {kind!r} must be 'none', 'mixup' or 'cutmix'")
        if classes < 1 or not alpha > 0:
            raise AugmentError(f"blend of {classes} classes with alpha {alpha}: both must be above 0")
        self.kind, self.classes, self.alpha = kind, classes, alpha

    def __call__(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips like `clips`, which stay as they are, and labels float32 (N, classes) that sum to 1.

        clips float (N, T, C, H, W), normalised. labels int64 (N,). generator: best one of the CPU. Raises ShapeError.
        """
        if clips.ndim != 5 or labels.shape != clips.shape[:1] or not clips.is_floating_point():
            raise ShapeError(
                f"clips must be float (N, T, C, H, W) and labels (N,), got {clips.dtype} {tuple(clips.shape)} "
                f"and {tuple(labels.shape)}"
            )
        soft = functional.one_hot(labels, self.classes).float()
        if self.kind == "none":
            return clips, soft
        seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
        rng = np.random.default_rng(int(seed))
        share = float(rng.beta(self.alpha, self.alpha))
        others = torch.from_numpy(rng.permutation(len(clips))).to(clips.device)
        if self.kind == "mixup":
            clips = torch.lerp(clips[others], clips, share)
        else:
            left, top, right, bottom = cutmix_box(clips.shape[4], clips.shape[3], share, rng)
            share = 1 - (right - left) * (bottom - top) / (clips.shape[3] * clips.shape[4])
            pasted = clips[..., top:bottom, left:right][others]
            clips = clips.clone()
            clips[..., top:bottom, left:right] = pasted
        return clips, share * soft + (1 - share) * soft[others]


def cutmix_box(width: int, height: int, share: float, rng: Rng) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of what another clip covers: 1 - share of the picture, less what is outside."""
    side = math.sqrt(1 - share)
    half_width, half_height = int(width * side) // 2, int(height * side) // 2
    x, y = int(rng.integers(width)), int(rng.integers(height))
    return max(0, x - half_width), max(0, y - half_height), min(width, x + half_width), min(height, y + half_height)


def soft_cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """-sum(p log softmax), mean over the batch. logits and soft (N, classes)."""
    return functional.cross_entropy(logits, soft)
