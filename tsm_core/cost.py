"""What a network has and what one result of it costs, counted on a device that computes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from tsm_core.detector import build_detector
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.model import build
from tsm_core.recipes import Recipe, generic


def multiply_adds(recipe: Recipe | DetectorRecipe, px: int | None = None) -> int:
    """Multiplications with their additions in one result: one frame of a model that is stepped, else a whole clip.

    px: side of a recogniser's input, the recipe's unless given. Convolutions and matrix products count, as torch counts
    them; published figures often add a percent for norms, activations and pooling. Of a detector they are those of the
    dense outputs: what the second stage of one costs depends on its proposals.
    """
    if isinstance(recipe, DetectorRecipe):
        return _counted_detector(_bare_detector(recipe))[1]
    return _counted(_bare(recipe), px or recipe.preprocess.input_px)[1]


def parameters(recipe: Recipe | DetectorRecipe) -> int:
    """Trained numbers of the network; running statistics are none."""
    if isinstance(recipe, DetectorRecipe):
        return _counted_detector(_bare_detector(recipe))[0]
    return _counted(_bare(recipe), recipe.preprocess.input_px)[0]


def _bare(recipe: Recipe) -> Recipe:
    """The recipe without all that does not change the network: many rows share one."""
    network = generic(recipe.backbone, recipe.shift, [str(place) for place in range(len(recipe.labels))])
    kept = ("frames", "shift_div", "non_local", "temporal_pool")
    return replace(network, **{name: getattr(recipe, name) for name in kept})


@lru_cache(maxsize=256)
def _counted(recipe: Recipe, px: int) -> tuple[int, int]:
    frames = 1 if recipe.steppable else recipe.frames
    with torch.device("meta"):
        model = build(recipe).eval()
        clip = torch.empty(1, frames, 3, px, px)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    flops: int = counter.get_total_flops()
    return sum(parameter.numel() for parameter in model.parameters()), flops // 2


def _bare_detector(recipe: DetectorRecipe) -> DetectorRecipe:
    kept = {name: getattr(recipe, name) for name in ("architecture", "labels", "label_ids", "input_size")}
    return DetectorRecipe(recipe.architecture, **kept)


@lru_cache(maxsize=64)
def _counted_detector(recipe: DetectorRecipe) -> tuple[int, int]:
    with torch.device("meta"):
        model = build_detector(recipe).eval()
        clip = torch.empty(1, 1, 3, *recipe.input_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    flops: int = counter.get_total_flops()
    return sum(parameter.numel() for parameter in model.parameters()), flops // 2
