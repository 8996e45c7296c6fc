from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from tsm_core.model import TSM, build
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import MOTION9, Recipe, generic


@pytest.fixture(autouse=True)
def _exact_and_single() -> Iterator[None]:
    """One CPU thread, and no reduced precision on a GPU."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return torch.device(request.param)


def small_recipe(backbone: str, shift: str = "uni", px: int = 64, **more: object) -> Recipe:
    """A recipe of any backbone at a small input, so that the laws are quick to check."""
    spec = PreprocessSpec(input_px=px, resize="exact")
    fold_div = MOTION9.shift_div if backbone == "resnet_small" else 8
    return generic(backbone, shift, tuple("abcdefg"), preprocess=spec, shift_div=fold_div, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def recipe_of() -> Callable[..., Recipe]:
    return small_recipe


def fill(network: nn.Module, seed: int = 0) -> None:
    """Random weights with batch-norm statistics that are no identity, and a classifier that says something."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            noise = 1 + 0.1 * noise.abs()
        elif value.ndim > 1:
            noise = noise * (2 / value[0].numel()) ** 0.5 * 0.9
        else:
            noise = 0.1 * noise + (0.0 if key.endswith(("bias", "running_mean")) else 1.0)
        value.copy_(noise)


@pytest.fixture(scope="session")
def filled() -> Callable[..., None]:
    return fill


@pytest.fixture(scope="session")
def model_of() -> Callable[..., TSM]:
    """Filled models in eval mode, one of each kind per session."""
    made: dict[tuple[object, ...], TSM] = {}

    def get(backbone: str, shift: str = "uni", px: int = 64, device: str | torch.device = "cpu", **more: object) -> TSM:
        key = (backbone, shift, px, str(device), *sorted(more.items()))
        if key not in made:
            model = build(small_recipe(backbone, shift, px, **more))
            fill(model)
            made[key] = model.to(device).eval()
        return made[key]

    return get
