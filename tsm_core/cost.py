"""What a network has and what one result of it costs, counted on a device that computes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from tsm_core.model import build
from tsm_core.recipes import Recipe, generic


def multiply_adds(recipe: Recipe, px: int | None = None) -> int:
    """Multiplications with their additions in one result: one frame of a model that is stepped, else a whole clip.

    px: side of the input, the recipe's unless given. Convolutions and matrix products count, as torch counts them;
    published figures often add a percent for norms, activations and pooling.
    """
    return _counted(_bare(recipe), px or recipe.preprocess.input_px)[1]


def parameters(recipe: Recipe) -> int:
    """Trained numbers of the network; running statistics are none."""
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
