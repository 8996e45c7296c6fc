"""How a model wants its pixels: a description, and nothing that touches a pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tsm_core.errors import CallerError
from tsm_core.labels import Convention

Crop = Literal["center", "three", "ten"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PreprocessSpec:
    """How a model wants its pixels; travels with its weights.

    resize `short`: the short side becomes resize_px, then the centre input_px x input_px is cut. `exact`: straight to
    input_px x input_px. Bilinear; antialias when shrinking as Pillow does, or not as OpenCV does. convention
    `mmaction2` rounds the long side half up and floors the crop's offset, `mit` truncates and rounds half to even.
    channels: `bgr` gives the network blue first. mean and std are per channel of the network's order, of values in
    0..1.
    """

    input_px: int = 224
    resize: Literal["short", "exact"] = "short"
    resize_px: int = 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    antialias: bool = False
    convention: Convention = "mmaction2"
    channels: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if self.resize not in ("short", "exact"):
            raise PreprocessError(f"resize {self.resize!r} must be 'short' or 'exact'")
        if self.convention not in ("mmaction2", "mit"):
            raise PreprocessError(f"convention {self.convention!r} must be 'mmaction2' or 'mit'")
        if self.channels not in ("rgb", "bgr"):
            raise PreprocessError(f"channels {self.channels!r} must be 'rgb' or 'bgr'")
        if self.input_px < 1 or (self.resize == "short" and self.resize_px < self.input_px):
            raise PreprocessError(f"input_px {self.input_px} must be at least 1 and no more than {self.resize_px}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise PreprocessError(f"mean {self.mean} and std {self.std} must be 3 numbers each, std above 0")


class PreprocessError(CallerError):
    """A PreprocessSpec cannot be used."""

    reason = "invalid_preprocess"
