import pytest
import torch
import torchvision
from torch import nn

from tsm_core.backbones import (
    NON_LOCAL_PLACES,
    ShiftedConv2d,
    UnknownBackbone,
    build_backbone,
    run,
    shifted_layers,
    state_spec,
)
from tsm_core.errors import ShapeError
from tsm_core.shift import ClipPass, MeasurePass

PLACES = {
    "resnet50": [f"layer{stage}.{i}.conv1" for stage, n in enumerate((3, 4, 6, 3), 1) for i in range(n)],
    "resnet101": [f"layer{stage}.{i}.conv1" for stage, n in enumerate((3, 4, 23, 3), 1) for i in range(0, n, 2)],
    "mobilenet_v2": [f"features.{i}.conv.0.0" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)],
    "resnet_small": [f"layer{stage}.{i}.conv1" for stage, n in enumerate((1, 2, 2, 2), 1) for i in range(n)],
}


@pytest.mark.parametrize("name", PLACES)
def test_shifts_stand_where_the_authors_put_them(name):
    net = build_backbone(name, 5)
    places = [path for path, module in net.named_modules() if isinstance(module, ShiftedConv2d)]
    assert places == PLACES[name]
    assert [net.get_submodule(path).layer for path in places] == list(range(len(places)))
    assert shifted_layers(net) == len(places)
    assert shifted_layers(build_backbone(name, 5, shifted=False)) == 0


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "mobilenet_v2"])
def test_torchvision_weights_load_strictly_and_mean_the_same(name):
    plain = getattr(torchvision.models, name)(num_classes=4).eval()
    shifted = build_backbone(name, 4).eval()
    shifted.load_state_dict(plain.state_dict(), strict=True)
    assert list(shifted.state_dict()) == list(plain.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(run(shifted, x, MeasurePass()), plain(x))  # measuring shifts nothing


@pytest.mark.parametrize(
    ("name", "fold_div", "px", "elements"),
    [("mobilenet_v2", 8, 224, 27_048), ("resnet50", 8, 224, 702_464), ("resnet_small", 4, 64, 14_848)],
)
def test_size_of_the_shift_state(name, fold_div, px, elements):
    spec = state_spec(build_backbone(name, 5, fold_div=fold_div), px)
    assert sum(fold * height * width for fold, height, width in spec) == elements


def test_shapes_of_the_shift_state():
    assert state_spec(build_backbone("mobilenet_v2", 5), 224) == [
        (3, 56, 56), (4, 28, 28), (4, 28, 28), (8, 14, 14), (8, 14, 14), (8, 14, 14), (12, 14, 14), (12, 14, 14),
        (20, 7, 7), (20, 7, 7),
    ]  # fmt: skip
    assert state_spec(build_backbone("resnet50", 5), 224) == (
        [(8, 56, 56)] + [(32, 56, 56)] * 3 + [(64, 28, 28)] * 4 + [(128, 14, 14)] * 6 + [(256, 7, 7)] * 2
    )


def test_measuring_leaves_the_network_alone():
    net = build_backbone("resnet_small", 5).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state_spec(net, 64)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_identity_path_sees_the_frame_unshifted():
    net = build_backbone("resnet_small", 5, fold_div=4).eval()
    block = net.get_submodule("layer1.0")
    nn.init.zeros_(block.get_submodule("bn2").weight)  # closes the residual branch
    x = torch.rand(4, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(run(block, x, ClipPass(4, "uni")), x)


def test_classifier_starts_small_behind_dropout():
    for name in ("resnet_small", "mobilenet_v2"):
        net = build_backbone(name, 400, dropout=0.5)
        weight, bias = list(net.parameters())[-2:]
        assert weight.std().item() == pytest.approx(0.001, rel=0.05)
        assert not bias.any()
        x = torch.randn(2, 3, 64, 64)
        bn_only = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        net.train()
        for module in bn_only:
            module.eval()
        first, second = (run(net, x, MeasurePass()) for _ in range(2))
        assert not torch.equal(first, second)
        net.eval()
        first, second = (run(net, x, MeasurePass()) for _ in range(2))
        assert torch.equal(first, second)


def test_a_shifted_network_does_not_run_without_a_pass():
    with pytest.raises(LookupError):
        build_backbone("resnet_small", 5)(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("backbone", "classes", "non_local", "published"),
    [
        ("resnet50", 400, None, 24_327_632),
        ("resnet50", 174, None, 23_864_558),
        ("resnet101", 174, None, 42_856_686),
        ("mobilenet_v2", 400, None, 2_736_272),
        ("resnet50", 400, "embedded_gaussian", 31_682_000),
        ("resnet50", 400, "dot_product", 31_682_000),
        ("resnet50", 400, "gaussian", 28_007_888),
    ],
)
def test_as_many_parameters_as_published(backbone, classes, non_local, published):
    with torch.device("meta"):
        net = build_backbone(backbone, classes, non_local=non_local)
    assert sum(parameter.numel() for parameter in net.parameters()) == published


def test_non_local_blocks_add_names_and_change_none():
    plain, whole = build_backbone("resnet50", 5), build_backbone("resnet50", 5, non_local="dot_product")
    added = [key for key in whole.state_dict() if ".nl." in key]
    assert [key for key in whole.state_dict() if ".nl." not in key] == list(plain.state_dict())
    assert tuple(dict.fromkeys(key.partition(".nl.")[0] for key in added)) == NON_LOCAL_PLACES
    assert {key.partition(".nl.")[2] for key in added} == {
        *(f"{name}.{kind}" for name in ("g", "theta", "phi") for kind in ("weight", "bias")),
        "out.weight",
        *(f"norm.{kind}" for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    }
    places = [path for path, module in whole.named_modules() if isinstance(module, ShiftedConv2d)]
    assert places == PLACES["resnet50"]


def test_new_non_local_blocks_leave_a_trained_network_as_it_was():
    plain, whole = build_backbone("resnet50", 5).eval(), build_backbone("resnet50", 5, non_local="gaussian").eval()
    whole.load_state_dict(plain.state_dict(), strict=False)
    frames = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(run(whole, frames, ClipPass(4, "bi")), run(plain, frames, ClipPass(4, "bi")))


def test_temporal_pool_keeps_the_larger_of_neighbouring_frames():
    net = build_backbone("resnet_small", 5, fold_div=4, temporal_pool=True).eval()
    assert list(net.state_dict()) == list(build_backbone("resnet_small", 5).state_dict())
    stage, seen = net.get_submodule("layer2"), []
    stage[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    frames = torch.randn(2 * 6, 16, 8, 8)
    how = ClipPass(6, "bi")
    with torch.no_grad():
        out = run(stage, frames, how)
    clips = frames.view(2, 6, 16, 8, 8)
    kept = [clips[:, max(2 * t - 1, 0) : 2 * t + 2].amax(dim=1) for t in range(3)]
    assert torch.equal(seen[0], torch.stack(kept, dim=1).flatten(0, 1))
    assert (how.frames, out.shape) == (3, (2 * 3, 32, 4, 4))
    with pytest.raises(ShapeError, match="even number of frames, got 5"):
        run(stage, torch.randn(5, 16, 8, 8), ClipPass(5, "bi"))


def test_unknown_backbone_lists_what_exists():
    with pytest.raises(UnknownBackbone, match="mobilenet_v2, resnet101, resnet50, resnet_small"):
        build_backbone("vgg16", 5)
    with pytest.raises(UnknownBackbone, match="in resnet50, not in resnet101"):
        build_backbone("resnet101", 5, non_local="gaussian")
    with pytest.raises(UnknownBackbone, match="behind layer1 of a ResNet, not in mobilenet_v2"):
        build_backbone("mobilenet_v2", 5, temporal_pool=True)
