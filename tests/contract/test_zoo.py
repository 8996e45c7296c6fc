"""Every row of the zoo: it builds, has the published number of parameters, takes a clip; its twin can be stepped."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from tsm_core.cost import multiply_adds
from tsm_core.model import NotSteppable, build
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import PAGE_ROWS, RECIPES, find_recipe

PX = 64  # the laws do not depend on the size of the picture
TOLERANCE = 1e-5  # of the largest logit


@pytest.fixture(autouse=True)
def _single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lively(network: nn.Module) -> None:
    """Statistics that are no identity, so that every layer changes what it is given."""
    torch.manual_seed(0)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.0)
        elif ".nl." in name:
            continue  # dot products without a softmax grow with the cube of their input: small, as they are made
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


def clip_of(frames: int) -> torch.Tensor:
    return torch.randn(1, frames, 3, PX, PX, generator=torch.Generator().manual_seed(1))


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 100 * TOLERANCE * one.abs().max())


@pytest.mark.parametrize("name", [row.name for row in PAGE_ROWS])
def test_a_row_builds_counts_and_takes_a_clip(name):
    recipe = find_recipe(name)
    model = build(recipe).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == recipe.published.params
    lively(model)
    clip = clip_of(recipe.frames)
    with torch.no_grad():
        logits, frames = model(clip), model.forward_frames(clip)
        backwards = model(clip.flip(1))
    assert logits.shape == (1, len(recipe.labels))
    assert torch.isfinite(logits).all()
    assert not far(frames.mean(dim=1), logits)
    assert far(backwards, logits)  # it has a sense of time
    with pytest.raises(NotSteppable):
        model.new_arena(1)

    if recipe.non_local is not None:
        assert f"{name}_uni" not in RECIPES
        return
    small = replace(find_recipe(f"{name}_uni"), preprocess=PreprocessSpec(input_px=PX, resize="exact"))
    twin = build(small).eval()
    twin.load_state_dict(model.state_dict())
    arena = twin.new_arena(1)
    slots = [arena.allocate()]
    with torch.no_grad():
        wanted = twin.forward_frames(clip)
        stepped = torch.stack([twin.step(clip[:, t], arena, slots) for t in range(recipe.frames)], dim=1)
    assert (stepped - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    assert far(wanted, frames)  # one way is not both ways


@pytest.mark.parametrize("name", [name for name, row in RECIPES.items() if row not in PAGE_ROWS])
def test_every_other_row_builds(name):
    with torch.device("meta"):
        model = build(find_recipe(name))
    assert model.labels == find_recipe(name).labels
    if model.recipe.published and model.recipe.published.params:
        assert sum(parameter.numel() for parameter in model.parameters()) == model.recipe.published.params


@pytest.mark.parametrize("name", [row.name for row in PAGE_ROWS if row.non_local is None])
def test_multiply_adds_are_the_published_ones(name):
    """Ours are convolutions and matrix products alone; the page's add norms, activations and pooling.

    Not compared: the non-local rows, whose published counts leave the attention's products out.
    """
    recipe = find_recipe(name)
    px = 256 if any("256 px" in note for note in recipe.published.notes) or "mobilenetv2" in name else 224
    frames = 8 if any("FLOPs of 8 frames" in note for note in recipe.published.notes) else recipe.frames
    counted = multiply_adds(recipe, px) * frames / recipe.frames
    assert counted == pytest.approx(recipe.published.flops, rel=0.07 if "mobilenetv2" in name else 0.02)
