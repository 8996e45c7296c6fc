"""What is to be trained, and how: a recipe, with what a person changes in it; and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from pipelines.optim import with_epochs
from pipelines.training_data import ClipOptions
from tsm_core.detector_recipes import ARCHITECTURES, BoxTraining, DetectorRecipe
from tsm_core.errors import CallerError
from tsm_core.recipes import Recipe, Training

Amp = Literal["fp32", "bf16", "fp16"]
AnyRecipe = Recipe | DetectorRecipe
AMP: dict[Amp, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class BadOptions(CallerError):
    """Options that contradict each other or the recipe."""

    reason = "bad_options"


@dataclass(frozen=True, slots=True)
class Options:
    """What a person may say about a training; None is the recipe's.

    batch: videos of one micro-batch of one worker. accumulate: micro-batches of one step. lr: of the first epoch after
    the warm-up, whatever the batch. validate: epochs between two validations, 0 for none. carry_state: a clip of
    several times T frames goes through the network in pieces of T, each with the shift state of the one before.
    per_frame_loss: every frame is to know the class, not the mean of the clip's frames. px: side of the input (of a
    detector's, the shorter one); resize and crops follow. steps: stop after so many, as if somebody had interrupted.
    checkpoint_minutes: longest between two checkpoints; one stands at the end of every epoch anyway. on_error,
    max_skipped: unreadable videos are replaced by others, up to this share of an epoch. max_bad_steps: in a row, whose
    loss or gradient is no number.
    """

    epochs: int | None = None
    batch: int | None = None
    accumulate: int = 1
    lr: float | None = None
    amp: Amp = "fp32"
    seed: int = 0
    deterministic: bool = False
    validate: int | None = None
    loaders: int | None = None
    init: str | None = None
    init_from: str | None = None
    new_head: bool = False
    models_dir: str = "~/.cache/tsm-live"
    clips: ClipOptions = field(default_factory=ClipOptions)
    carry_state: bool = False
    per_frame_loss: bool = False
    partial_bn: bool | None = None
    px: int | None = None
    steps: int | None = None
    checkpoint_minutes: float = 10.0
    resume: bool = True
    on_error: Literal["skip", "raise"] = "skip"
    max_skipped: float = 0.1
    max_bad_steps: int = 5
    say_every_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Job:
    """A training, in values alone: it travels to other processes. recipe: with the options already in it."""

    recipe: AnyRecipe
    data: str | None
    work_dir: str
    options: Options
    command: str = ""

    @property
    def training(self) -> Training | BoxTraining:
        """The recipe's training."""
        assert self.recipe.training is not None
        return self.recipe.training

    @property
    def batch(self) -> int:
        """Videos of one micro-batch."""
        return self.options.batch or max(1, self.training.batch // self.training.gpus)


def new_job(
    recipe: AnyRecipe, data: Path | str | None, work_dir: Path | str, options: Options | None = None, command: str = ""
) -> Job:
    """The training of a recipe with what the options change in it. Raises BadOptions."""
    options = options or Options()
    training, frames = recipe.training, options.clips.frames or recipe.frames
    if training is None:
        raise BadOptions(f"{recipe.name} does not say how it is trained; take a recipe that does (`tsm recipes list`)")
    checks = [
        *_own_checks(recipe, options, frames),
        (options.amp in AMP, f"amp {options.amp!r} must be {', '.join(AMP)}"),
        ((options.batch or 1) >= 1, f"batch {options.batch} must be at least 1"),
        (options.accumulate >= 1, f"accumulate {options.accumulate} must be at least 1"),
        ((options.epochs or 1) >= 1, f"epochs {options.epochs} must be at least 1"),
        (options.lr is None or options.lr > 0, f"lr {options.lr} must be above 0"),
        ((options.px or 32) >= 32, f"px {options.px} must be at least 32"),
        ((options.clips.max_stride or 1) >= 1, f"max_stride {options.clips.max_stride} must be at least 1"),
    ]
    wrong = [text for fine, text in checks if not fine]
    if wrong:
        raise BadOptions("; ".join(wrong))
    return Job(_changed(recipe, options), _text(data), str(work_dir), options, command)


Check = tuple[bool, str]  # whether it is fine; what is wrong if it is not


def _own_checks(recipe: AnyRecipe, options: Options, frames: int) -> list[Check]:
    """Of what only recognisers, or only detectors, can be asked for."""
    if isinstance(recipe, DetectorRecipe):
        others = {
            "carry_state": options.carry_state,
            "per_frame_loss": options.per_frame_loss,
            "partial_bn": options.partial_bn,
            "kind": options.clips.kind,
            "split": options.clips.split != 1,
        }
        asked = [name for name, said in others.items() if said]
        return [(not asked, f"{', '.join(asked)}: {recipe.name} is a detector, and these are for recognisers")]
    return [
        (frames >= recipe.frames, f"clips of {frames} frames are shorter than the recipe's {recipe.frames}"),
        (
            not options.carry_state or (recipe.shift == "uni" and frames % recipe.frames == 0),
            f"carry_state needs a uni-directional recipe, not {recipe.name}, and clips of whole pieces of "
            f"{recipe.frames} frames, not of {frames}",
        ),
        (
            not options.per_frame_loss or recipe.steppable,
            f"per_frame_loss: frames of {recipe.name} also see the future; it is for its _uni twin",
        ),
    ]


def _changed(recipe: AnyRecipe, options: Options) -> AnyRecipe:
    """The recipe with the options in it."""
    if isinstance(recipe, DetectorRecipe):
        boxes = recipe.training
        assert boxes is not None
        if options.epochs:
            boxes = boxes_in(boxes, options.epochs)
        if options.clips.max_stride:
            boxes = replace(boxes, strides=(1, options.clips.max_stride))
        recipe = replace(recipe, training=boxes)
        return box_at_size(recipe, options.px) if options.px else recipe
    training = recipe.training
    assert training is not None
    if options.epochs:
        training = with_epochs(training, options.epochs)
    if options.partial_bn is not None:
        training = replace(training, partial_bn=options.partial_bn)
    recipe = replace(recipe, training=training)
    return at_size(recipe, options.px) if options.px else recipe


def boxes_in(training: BoxTraining, epochs: int) -> BoxTraining:
    """The same training in another number of epochs: milestones keep their place in it."""
    milestones = tuple(milestone * epochs / training.epochs for milestone in training.milestones)
    return replace(training, epochs=epochs, milestones=milestones)


def box_at_size(recipe: DetectorRecipe, px: int) -> DetectorRecipe:
    """The detector for an input whose shorter side is about px; the other keeps its proportion, in whole strides."""
    stride = ARCHITECTURES[recipe.architecture].stride
    scale = px / min(recipe.input_size)
    return replace(
        recipe, input_size=tuple(max(stride, round(side * scale / stride) * stride) for side in recipe.input_size)
    )


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)


def at_size(recipe: Recipe, px: int) -> Recipe:
    """The recipe for an input of px x px: resize and crops keep their proportions."""
    spec = recipe.preprocess

    def scaled(side: int) -> int:
        return round(side * px / spec.input_px)

    smaller = replace(spec, input_px=px, resize_px=max(px, scaled(spec.resize_px)))
    views = [replace(views, crop_px=scaled(views.crop_px)) for views in (recipe.efficient, recipe.accurate)]
    return replace(recipe, preprocess=smaller, efficient=views[0], accurate=views[1])


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came out. last, best: the validated figures of the last and the best epoch ({} without validation).

    model: the model file, of the best epoch where there was a validation. replaced: unreadable videos that others took
    the place of, each time. bad_steps: steps that were left out.
    """

    recipe: str
    work_dir: str
    model: str
    epochs: int
    steps: int
    loss: float
    last: dict[str, float]
    best: dict[str, float]
    replaced: int
    bad_steps: int
    seconds: float
