import pytest
import torch
from torch.nn import functional

from tsm_core.backbones import run
from tsm_core.non_local import NonLocalBlock
from tsm_core.shift import ClipPass

MODES = ["embedded_gaussian", "gaussian", "dot_product"]


def filled(mode, channels=8):
    block = NonLocalBlock(channels, mode).eval()
    generator = torch.Generator().manual_seed(3)
    for key, value in block.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator) * 0.5
            value.copy_(1 + noise.abs() if key.startswith("norm.") and value.ndim == 1 else noise)
    return block


def by_definition(block, clip):
    """The published formula over (N, C, T, H, W), with three-dimensional layers and every pair of places."""
    weights = block.state_dict()

    def conv(name, x):
        return functional.conv3d(x, weights[f"{name}.weight"][..., None], weights.get(f"{name}.bias"))

    def pooled(x):
        return functional.max_pool3d(x, (1, 2, 2))

    gaussian = block.mode == "gaussian"
    theta = (clip if gaussian else conv("theta", clip)).flatten(2)
    phi = pooled(clip if gaussian else conv("phi", clip)).flatten(2)
    g = pooled(conv("g", clip)).flatten(2)
    scores = torch.einsum("nci,ncj->nij", theta, phi)
    likeness = scores / scores.shape[2] if block.mode == "dot_product" else scores.softmax(dim=2)
    y = torch.einsum("nij,ncj->nci", likeness, g).view(len(clip), -1, *clip.shape[2:])
    norm = [weights[f"norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    return clip + functional.batch_norm(conv("out", y), *norm)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", MODES)
def test_block_is_the_published_formula(mode, layout):
    block = filled(mode)
    frames = torch.randn(2 * 3, 8, 5, 4).contiguous(memory_format=layout)  # two clips of three; odd sizes are floored
    with torch.no_grad():
        got = run(block, frames, ClipPass(3, "bi"))
        wanted = by_definition(block, frames.view(2, 3, 8, 5, 4).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert (got - frames).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_every_frame_hears_its_own_clip_and_no_other(mode):
    block = filled(mode)
    frames = torch.randn(2 * 3, 8, 4, 4)
    changed = frames.clone()
    changed[5] += 1  # the last frame of the second clip
    with torch.no_grad():
        before, after = (run(block, x, ClipPass(3, "bi")) for x in (frames, changed))
    different = (before != after).flatten(1).any(dim=1)
    assert different.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("mode", MODES)
def test_a_new_block_is_the_identity_and_can_learn(mode):
    block = NonLocalBlock(8, mode)
    frames = torch.randn(4, 8, 4, 4)
    assert torch.equal(run(block, frames, ClipPass(2, "bi")), frames)
    assert not block.g.bias.any()
    assert NonLocalBlock(256, mode).g.weight.std().item() == pytest.approx(0.01, rel=0.05)
    run(block, frames, ClipPass(2, "bi")).square().sum().backward()
    assert block.norm.weight.grad.any()  # the gate opens first


def test_gaussian_mode_has_no_parameters_of_its_own():
    def names(mode):
        return {name.split(".")[0] for name, _ in NonLocalBlock(8, mode).named_parameters()}

    assert names("gaussian") == {"g", "out", "norm"}
    assert names("embedded_gaussian") == names("dot_product") == {"g", "theta", "phi", "out", "norm"}
