"""What one result of a model costs, counted on a device that computes nothing."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from tsm_core.model import build
from tsm_core.recipes import Recipe


@lru_cache(maxsize=256)
def multiply_adds(recipe: Recipe, px: int | None = None) -> int:
    """Multiplications with their additions in one result: one frame of a model that is stepped, else a whole clip.

    px: side of the input, the recipe's unless given. Convolutions and matrix products count, as torch counts them;
    published figures often add a percent for norms, activations and pooling.
    """
    frames = 1 if recipe.steppable else recipe.frames
    side = px or recipe.preprocess.input_px
    with torch.device("meta"):
        model = build(recipe).eval()
        clip = torch.empty(1, frames, 3, side, side)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    flops: int = counter.get_total_flops()
    return flops // 2
