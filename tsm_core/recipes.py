"""One frozen Recipe and one table: all that names and reproduces a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from tsm_core.errors import CallerError
from tsm_core.preprocess import PreprocessSpec


class RecipeError(CallerError):
    """A recipe cannot be used."""

    reason = "invalid_recipe"


class UnknownRecipe(CallerError):
    """No recipe of this name."""

    reason = "unknown_recipe"


@dataclass(frozen=True)
class Recipe:
    """All that names and reproduces a model; checks itself at birth and raises RecipeError.

    shift: `uni` reads the past alone and can be stepped, `bi` reads the future too, `none` is a still-image control.
    frames: T of a training clip. fps: rate of the training clips (None: one frame from each of T segments).
    start: what a new stream's first frame reads in place of its past. window_s, stride_s: in window mode, the seconds
    of video one result sees and the seconds between two results (None: a quarter of the window).
    non_local: pairwise function of five non-local blocks in a ResNet-50, which mix all frames of a clip. temporal_pool:
    halve the frames behind layer1. Neither can be stepped.
    smoothing_s: time constant of the smoothed scores. threshold, off_threshold, min_action_s: when a score begins an
    action, ends it, and how long it must last. background: labels that are no action.
    """

    name: str
    backbone: str
    shift: Literal["bi", "uni", "none"]
    labels: tuple[str, ...]
    frames: int = 8
    shift_div: int = 8
    non_local: Literal["embedded_gaussian", "gaussian", "dot_product"] | None = None
    temporal_pool: bool = False
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    dropout: float = 0.5
    fps: float | None = None
    start: Literal["zeros", "own"] = "zeros"
    window_s: float = 8.0
    stride_s: float | None = None
    smoothing_s: float = 0.5
    threshold: float = 0.6
    off_threshold: float = 0.4
    min_action_s: float = 0.5
    background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "background", tuple(self.background))
        unknown = [label for label in self.background if label not in self.labels]
        checks: list[tuple[bool, str]] = [
            (bool(self.name), "name is empty"),
            (bool(self.labels), "labels are empty"),
            (len(set(self.labels)) == len(self.labels), "labels are not unique"),
            (not unknown, f"background {unknown} is not among the labels"),
            (self.shift in ("bi", "uni", "none"), f"shift {self.shift!r} must be 'bi', 'uni' or 'none'"),
            (self.start in ("zeros", "own"), f"start {self.start!r} must be 'zeros' or 'own'"),
            (self.frames >= 1, f"frames {self.frames} must be at least 1"),
            (self.shift_div >= 2, f"shift_div {self.shift_div} must be at least 2"),
            (0 <= self.dropout < 1, f"dropout {self.dropout} must be in [0, 1)"),
            (self.fps is None or self.fps > 0, f"fps {self.fps} must be above 0"),
            (self.window_s > 0, f"window_s {self.window_s} must be above 0"),
            (self.stride_s is None or self.stride_s > 0, f"stride_s {self.stride_s} must be above 0"),
            (self.smoothing_s >= 0, f"smoothing_s {self.smoothing_s} must be at least 0"),
            (0 < self.threshold <= 1, f"threshold {self.threshold} must be in (0, 1]"),
            (
                0 <= self.off_threshold <= self.threshold,
                f"off_threshold {self.off_threshold} must be in [0, threshold {self.threshold}]",
            ),
            (self.min_action_s >= 0, f"min_action_s {self.min_action_s} must be at least 0"),
        ]
        wrong = [text for fine, text in checks if not fine]
        if wrong:
            raise RecipeError(f"recipe {self.name!r}: {'; '.join(wrong)}")

    @property
    def steppable(self) -> bool:
        """Whether a frame needs its past alone; else the model sees windows of `frames` frames."""
        return self.shift != "bi" and self.non_local is None and not self.temporal_pool

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote. Raises RecipeError that names unknown, missing or wrong fields."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"recipe is not JSON: {error}") from None
        try:
            spec = PreprocessSpec(**_known(PreprocessSpec, data.pop("preprocess", {})))
            return cls(**_known(cls, data), preprocess=spec)
        except (TypeError, AttributeError, ValueError) as error:
            raise RecipeError(f"recipe cannot be read: {error}") from None


def _known(kind: Any, data: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(data) - {each.name for each in fields(kind)})
    if unknown:
        raise RecipeError(f"unknown fields {', '.join(unknown)} in a {kind.__name__}: written by a newer version?")
    return data


def generic(backbone: str, shift: Literal["bi", "uni", "none"], labels: Sequence[str], **more: Any) -> Recipe:
    """A recipe at 224 px for any label set, named like tsm_r50 or tsm_mobilenetv2_uni."""
    short = {"resnet50": "r50", "resnet101": "r101", "mobilenet_v2": "mobilenetv2"}.get(backbone, backbone)
    name = f"tsm_{short}" + {"bi": "", "uni": "_uni", "none": "_none"}[shift]
    return Recipe(**{"name": name, "backbone": backbone, "shift": shift, "labels": tuple(labels), **more})


MOTION9 = Recipe(
    "motion9",
    backbone="resnet_small",
    shift="uni",
    labels=("left", "right", "up", "down", "clockwise", "counter-clockwise", "grow", "shrink", "still"),
    frames=16,
    shift_div=4,
    preprocess=PreprocessSpec(input_px=64, resize="exact", antialias=True),
    dropout=0.0,
    fps=15.0,
    window_s=16 / 15,
    smoothing_s=0.25,
    threshold=0.6,
    off_threshold=0.4,
    min_action_s=0.3,
    background=("still",),
)

RECIPES: dict[str, Recipe] = {
    row.name: row
    for row in (
        MOTION9,
        replace(MOTION9, name="motion9_none", shift="none"),  # the same network without time: must stay at chance
    )
}


def find_recipe(name: str) -> Recipe:
    """The row of this name. Raises UnknownRecipe that lists the rows."""
    if name not in RECIPES:
        raise UnknownRecipe(f"recipe {name!r} does not exist; there are {', '.join(sorted(RECIPES))}")
    return RECIPES[name]
