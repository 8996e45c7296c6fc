import argparse
import os
import pickle
import re
import sys
import types

import numpy as np
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsm_core.backbones import ShiftedConv2d
from tsm_core.checkpoints import import_checkpoint, load_backbone, load_model, save_model
from tsm_core.model import TSM, WindowTSM, build
from tsm_core.model_file import ModelFileError, read_card
from tsm_core.recipes import find_recipe


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    save_model(path, model_of("resnet_small"), {"trained": "not at all", "top1": 0.14})
    return path


def test_what_is_saved_is_loaded(saved, model_of, device):
    model = load_model(saved, device)
    original = model_of("resnet_small")
    assert isinstance(model, TSM)
    assert not model.training
    assert model.device.type == device.type
    assert model.recipe == original.recipe
    for key, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[key].cpu(), value), key
    recipe, card = read_card(saved)
    assert (recipe, card) == (original.recipe, {"trained": "not at all", "top1": 0.14})
    assert [each.name for each in saved.parent.iterdir()] == ["small.safetensors"]


@pytest.mark.parametrize("network", [{"shift": "bi"}, {"shift": "none", "temporal_pool": True}])
def test_what_cannot_be_stepped_comes_back_in_window_mode(recipe_of, tmp_path, network):
    model = WindowTSM(build(recipe_of("resnet_small", window_s=3.0, **network)))
    save_model(tmp_path / "bi.safetensors", model)
    loaded = load_model(tmp_path / "bi.safetensors")
    assert isinstance(loaded, WindowTSM)
    assert (loaded.mode, loaded.window_s, loaded.training) == ("window", 3.0, False)
    assert read_card(tmp_path / "bi.safetensors")[1] == {}


def test_weights_are_named_as_torchvision_names_them(recipe_of, tmp_path):
    model = build(recipe_of("mobilenet_v2")).to(memory_format=torch.channels_last)
    save_model(tmp_path / "m.safetensors", model)
    torchvision.models.mobilenet_v2(num_classes=7).load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)


def test_a_file_that_does_not_fit_lists_its_keys(saved, tmp_path, model_of):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    tensors["fc.more"] = tensors.pop("fc.bias")
    tensors["conv1.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(ModelFileError) as caught:
        load_model(tmp_path / "bad.safetensors")
    for part in ("missing fc.bias", "unknown fc.more", "conv1.weight is (1,), not (16, 3, 5, 5)", "resnet_small"):
        assert part in str(caught.value)
    assert caught.value.reason == "bad_model_file"


def test_files_that_are_no_models(saved, tmp_path):
    with pytest.raises(ModelFileError, match="does not exist"):
        load_model(tmp_path / "nothing.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelFileError, match="no safetensors file"):
        load_model(tmp_path / "noise.safetensors")
    (tmp_path / "half.safetensors").write_bytes(saved.read_bytes()[:5000])
    with pytest.raises(ModelFileError, match="no safetensors file"):
        load_model(tmp_path / "half.safetensors")
    save_file(load_file(saved), tmp_path / "plain.safetensors")
    with pytest.raises(ModelFileError, match="no recipe"):
        load_model(tmp_path / "plain.safetensors")
    save_file({}, tmp_path / "odd.safetensors", {"format": "tsm-live/1", "recipe": '{"name": "x"}'})
    with pytest.raises(ModelFileError, match="cannot be read"):
        load_model(tmp_path / "odd.safetensors")


# ---- other projects' files, written from our networks by naming each weight as they do


def marked(model):
    return {path for path, module in model.net.named_modules() if isinstance(module, ShiftedConv2d)}


def in_wrappers(key, places, non_local, pooled):
    """Where shift, non-local block and temporal pool put themselves around what they change."""
    module, _, kind = key.rpartition(".")
    if module in places:
        key = f"{module}.net.{kind}"
    if (block := ".".join(key.split(".")[:2])) in non_local and ".nl." not in key:
        key = key.replace(block, f"{block}.block", 1)
    return key.replace("layer2.", "layer2.net.", 1) if pooled else key


def as_mmaction2(model):
    """A ResNet's weights under MMAction2's names."""

    def name(key):
        key = re.sub(r"(\w)\.nl\.", r"\1.non_local_block.", in_wrappers(key, *wrappers_of(model)))
        key = re.sub(r"\bbn(\d)\.", r"conv\1.bn.", re.sub(r"\bconv(\d)\.", r"conv\1.conv.", key))
        key = key.replace("downsample.0.", "downsample.conv.").replace("downsample.1.", "downsample.bn.")
        parts = {"g.": "g.0.conv.", "theta.": "theta.conv.", "phi.": "phi.0.conv.", "out.": "conv_out.conv."}
        for ours, theirs in {**parts, "norm.": "conv_out.bn."}.items():
            key = key.replace(f"non_local_block.{ours}", f"non_local_block.{theirs}")
        return key.replace("fc.", "cls_head.fc_cls.") if key.startswith("fc.") else f"backbone.{key}"

    return {name(key): as_3d(key, value) for key, value in model.net.state_dict().items()}


def as_mit(model):
    """A ResNet's weights under mit-han-lab's names."""

    def name(key):
        key = in_wrappers(key, *wrappers_of(model))
        for ours, theirs in {"g.": "g.0.", "phi.": "phi.0.", "out.": "W.0.", "norm.": "W.1."}.items():
            key = key.replace(f".nl.{ours}", f".nl.{theirs}")
        return f"module.new_{key}" if key.startswith("fc.") else f"module.base_model.{key}"

    return {name(key): as_3d(key, value) for key, value in model.net.state_dict().items()}


def wrappers_of(model):
    non_local = {key.partition(".nl.")[0] for key in model.net.state_dict() if ".nl." in key}
    return marked(model), non_local, model.recipe.temporal_pool


def as_3d(key, value):
    return value[..., None] if ".nl." in key and value.ndim == 4 else value


def assert_equal_weights(model, original):
    wanted = original.net.state_dict()
    got = model.net.state_dict()
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("write", [as_mmaction2, as_mit])
@pytest.mark.parametrize(
    ("backbone", "network"),
    [
        ("resnet_small", {"frames": 16}),
        ("resnet_small", {"shift": "none"}),
        ("resnet_small", {"temporal_pool": True}),
        ("resnet101", {}),
        ("resnet50", {"non_local": "embedded_gaussian"}),
        ("resnet50", {"non_local": "gaussian"}),
        ("resnet50", {"non_local": "dot_product", "temporal_pool": True}),
    ],
)
def test_networks_of_other_projects(model_of, tmp_path, write, backbone, network):
    original = model_of(backbone, **{"shift": "bi", **network})
    if write is as_mit and network.get("non_local") not in (None, "embedded_gaussian"):
        pytest.skip("mit-han-lab has no such block")
    path = tmp_path / "theirs.pth"
    torch.save({"state_dict": write(original)}, path)
    model = import_checkpoint(path, original.recipe)
    path.unlink()
    assert_equal_weights(model, original)
    assert not model.training
    assert model.recipe == original.recipe
    assert model.source["layout"] == {as_mmaction2: "mmaction2", as_mit: "mit-han-lab"}[write]


def test_bias_before_a_non_local_norm(model_of, tmp_path):
    """Mit-han-lab's blocks add a bias that ours do not have; the sum must be the same."""
    original = build(model_of("resnet50", "bi", non_local="embedded_gaussian").recipe)
    original.load_state_dict(model_of("resnet50", "bi", non_local="embedded_gaussian").state_dict())
    weights = as_mit(original.eval())
    blocks = {key.partition(".nl.")[0] for key in weights if ".nl." in key}
    assert len(blocks) == 5
    for number, block in enumerate(sorted(blocks)):
        bias = torch.randn(len(weights[f"{block}.nl.W.0.weight"]), generator=torch.Generator().manual_seed(number))
        weights[f"{block}.nl.W.0.bias"] = bias
        out = original.net.get_submodule(block.removeprefix("module.base_model.")).nl.out
        out.bias = torch.nn.Parameter(bias)
    torch.save({"state_dict": weights, "epoch": 50, "arch": "resnet50"}, tmp_path / "mit_nl.pth")
    model = import_checkpoint(tmp_path / "mit_nl.pth", original.recipe)
    (tmp_path / "mit_nl.pth").unlink()
    clip = torch.randn(1, 4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        got, wanted = (each.double()(clip) for each in (model, original))
    assert torch.allclose(got, wanted, rtol=1e-5)


@pytest.fixture
def small(model_of):
    return model_of("resnet_small", "bi")


def test_containers(small, tmp_path):
    weights = as_mmaction2(small)
    path = tmp_path / "file.pth"
    uncounted = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    parallel = {f"module.{key}": value for key, value in weights.items()}
    in_double = {key: value.double() if value.is_floating_point() else value for key, value in weights.items()}
    for content in (weights, {"meta": {}, "state_dict": weights, "optimizer": {"state": {}}}, uncounted, parallel):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            assert_equal_weights(import_checkpoint(path, small.recipe), small)
    torch.save({"state_dict": in_double}, path)
    assert_equal_weights(import_checkpoint(path, small.recipe), small)
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "file.safetensors")
    assert_equal_weights(import_checkpoint(tmp_path / "file.safetensors", small.recipe), small)


def test_our_own_names_load_for_any_shift(model_of, small, tmp_path):
    torch.save(small.net.state_dict(), tmp_path / "plain.pth")
    for shift in ("bi", "uni", "none"):
        model = import_checkpoint(tmp_path / "plain.pth", model_of("resnet_small", shift).recipe)
        assert_equal_weights(model, small)
        assert model.source["layout"] == "torchvision"


def test_where_weights_came_from_stays_in_the_file(small, tmp_path):
    torch.save({"state_dict": as_mit(small)}, tmp_path / "theirs.pth")
    model = import_checkpoint(tmp_path / "theirs.pth", small.recipe)
    save_model(tmp_path / "ours.safetensors", model, {"top1": 0.5})
    _, card = read_card(tmp_path / "ours.safetensors")
    assert card["top1"] == 0.5
    assert card["source"] == {"file": "theirs.pth", "sha256": card["source"]["sha256"], "layout": "mit-han-lab"}
    assert len(card["source"]["sha256"]) == 64
    again = load_model(tmp_path / "ours.safetensors")
    assert_equal_weights(again.model, small)
    save_model(tmp_path / "again.safetensors", again)
    assert read_card(tmp_path / "again.safetensors")[1]["source"] == card["source"]
    with pytest.raises(ModelFileError, match="a model of this project already"):
        import_checkpoint(tmp_path / "ours.safetensors", small.recipe)


def test_classes_counted_in_another_order_are_noted(model_of, tmp_path):
    recipe = find_recipe("tsm_r50_1x1x8_50e_sthv1_rgb")
    original = build(recipe)
    for write, noted in ((as_mit, True), (as_mmaction2, False)):
        torch.save({"state_dict": write(original)}, tmp_path / "theirs.pth")
        source = import_checkpoint(tmp_path / "theirs.pth", recipe).source
        assert ("convention=mit" in source.get("note", "")) == noted
    (tmp_path / "theirs.pth").unlink()


def renamed(weights, *pairs):
    return {re.sub(old, new, key): value for key, value in weights.items() for old, new in [*pairs]}


def test_what_does_not_fit_is_said_in_words(model_of, recipe_of, small, tmp_path):
    """Each wrong file: what it is, which recipe is asked for, the reason, and words of the message."""
    bi, uni, none = (recipe_of("resnet_small", shift) for shift in ("bi", "uni", "none"))
    weights = as_mmaction2(small)
    flat = model_of("resnet_small", "none")
    first, last = "backbone.conv1.conv.weight", "cls_head.fc_cls.weight"
    elsewhere = renamed(weights, (r"layer3\.1\.conv1\.conv\.net", "layer3.1.conv1.conv"))
    elsewhere["backbone.layer3.1.conv2.conv.net.weight"] = elsewhere.pop("backbone.layer3.1.conv2.conv.weight")
    short = {key: value for key, value in weights.items() if "layer2.1.conv2.bn" not in key}
    whole = renamed(as_mit(flat), (r"(layer\d\.\d)", r"\1.net"))
    more_classes = {**weights, last: torch.zeros(174, 128), last.replace("weight", "bias"): torch.zeros(174)}
    cases = [
        (more_classes, bi, "other_classes", "has 174 classes, tsm_resnet_small has 7"),
        (weights, recipe_of("resnet50", "bi"), "other_backbone", "holds a resnet_small, tsm_r50 is a resnet50"),
        (weights, recipe_of("mobilenet_v2", "bi"), "other_backbone", "holds a resnet_small, tsm_mobilenetv2 is a"),
        ({"conv1_7x7_s2.weight": torch.zeros(1)}, bi, "other_backbone", "no network known here: its keys are conv1_7x"),
        ({**weights, first: torch.zeros(16, 10, 5, 5)}, bi, "other_input", "reads 10 channels (optical flow: 5 frames"),
        (weights, uni, "other_shift", "shifts both ways (7 convolutions inside a `net`)"),
        (weights, uni, "other_shift", "such as tsm_resnet_small, or train tsm_resnet_small_uni from it"),
        (weights, none, "other_shift", "the file alone shifts layer1.0.conv1, layer2.0.conv1"),
        (as_mit(flat), bi, "other_shift", "no shifted convolutions: it is a 2D network (TSN, say), tsm_resnet_small s"),
        (as_mit(flat), uni, "other_shift", "no shifted convolutions"),
        (
            elsewhere,
            bi,
            "other_shift",
            "the file alone shifts layer3.1.conv2; tsm_resnet_small alone shifts layer3.1.c",
        ),
        (whole, bi, "other_shift", "shifts whole blocks (layer1.0, layer2.0, layer2.1 and 4 more; shift_place=block)"),
        (as_mit(model_of("resnet_small", "bi", temporal_pool=True)), bi, "other_temporal_pool", "time before layer2"),
        (
            renamed(weights, (r"layer3\.", "layer3.net.")),
            bi,
            "other_temporal_pool",
            "before layer3, tsm_resnet_small n",
        ),
        (
            weights,
            recipe_of("resnet_small", "bi", temporal_pool=True),
            "other_temporal_pool",
            "pools over time nowhere, tsm_resnet_small before layer2",
        ),
        (short, bi, "bad_model_file", "missing layer2.1.bn2.weight, layer2.1.bn2.bias"),
        ({**weights, "backbone.more.weight": torch.zeros(1)}, bi, "bad_model_file", "unknown backbone.more.weight"),
        (
            {**weights, first: torch.zeros(16, 3, 7, 7)},
            bi,
            "bad_model_file",
            f"{first} is (16, 3, 7, 7), not (16, 3, 5",
        ),
        (
            {**weights, "fc.weight": weights[last]},
            bi,
            "bad_model_file",
            f"two names for one weight: {last} and fc.weig",
        ),
        ({**weights, first: weights[first] / 0}, bi, "not_finite", f"not finite in {first} (1200 of 1200)"),
        ({key: value for key, value in weights.items() if "cls_head" not in key}, bi, "no_classifier", "no classifier"),
    ]
    for content, recipe, reason, words in cases:
        torch.save({"meta": {}, "state_dict": content}, tmp_path / "wrong.pth")
        with pytest.raises(ModelFileError) as caught:
            import_checkpoint(tmp_path / "wrong.pth", recipe)
        assert words in str(caught.value)
        assert caught.value.reason == reason, words
        assert "wrong.pth" in str(caught.value)


def test_non_local_blocks_of_another_kind(model_of, recipe_of, tmp_path):
    def recipe(mode):
        return recipe_of("resnet50", "bi", non_local=mode)

    embedded, gaussian = (model_of("resnet50", "bi", non_local=mode) for mode in ("embedded_gaussian", "gaussian"))
    config = "non_local_cfg=dict(\n    sub_sample=True,\n    mode='dot_product')"
    unpooled = renamed(as_mit(embedded), (r"\.(g|phi)\.0\.", r".\1."))
    cases = [
        (
            as_mmaction2(embedded),
            "",
            recipe(None),
            "embedded_gaussian non-local blocks or dot_product non-local blocks",
        ),
        (as_mmaction2(embedded), "", recipe("gaussian"), "tsm_r50 has gaussian non-local blocks"),
        (
            as_mmaction2(embedded),
            config,
            recipe("embedded_gaussian"),
            "has dot_product non-local blocks, tsm_r50 has em",
        ),
        (
            as_mit(embedded),
            "",
            recipe("dot_product"),
            "has embedded_gaussian non-local blocks, tsm_r50 has dot_product",
        ),
        (as_mmaction2(gaussian), "", recipe("dot_product"), "has gaussian non-local blocks, tsm_r50 has dot_product"),
        (as_mmaction2(model_of("resnet50", "bi")), "", recipe("gaussian"), "has no non-local blocks, tsm_r50 has gaus"),
        (unpooled, "", recipe("embedded_gaussian"), "unknown module.base_model.layer2.0.nl.g.weight"),
    ]
    for weights, text, asked, words in cases:
        torch.save({"meta": {"config": text}, "state_dict": weights}, tmp_path / "wrong.pth")
        with pytest.raises(ModelFileError) as caught:
            import_checkpoint(tmp_path / "wrong.pth", asked)
        assert words in str(caught.value)
    torch.save({"meta": {"config": config}, "state_dict": as_mmaction2(embedded)}, tmp_path / "right.pth")
    import_checkpoint(tmp_path / "right.pth", recipe("dot_product"))
    for path in tmp_path.iterdir():
        path.unlink()


def test_online_names_are_for_shifts_from_the_past(model_of, recipe_of, tmp_path):
    weights = flat_mobilenet(model_of("mobilenet_v2"))
    torch.save(weights, tmp_path / "online.pth.tar")
    model = import_checkpoint(tmp_path / "online.pth.tar", recipe_of("mobilenet_v2", "uni"))
    assert_equal_weights(model, model_of("mobilenet_v2"))
    assert model.source["layout"] == "mit-han-lab online"
    for shift in ("bi", "none"):
        with pytest.raises(
            ModelFileError, match=f"from the past alone; .* has shift={shift}. Use a recipe with shift="
        ):
            import_checkpoint(tmp_path / "online.pth.tar", recipe_of("mobilenet_v2", shift))
    # the same names with marks are no online network
    marks = {key.replace("features.3.conv.0.", "features.3.conv.0.net."): value for key, value in weights.items()}
    torch.save(marks, tmp_path / "marked.pth")
    with pytest.raises(ModelFileError, match="trained with shifts both ways"):
        import_checkpoint(tmp_path / "marked.pth", recipe_of("mobilenet_v2", "uni"))


def flat_mobilenet(model):
    """A MobileNetV2's weights under mit-han-lab's names: convolution, norm and activation in one row."""

    def name(key):
        if found := re.fullmatch(r"features\.(\d+)\.conv\.(\d)\.(?:(\d)\.)?(\w+)", key):
            block, place, inner, kind = found.groups()
            last = 1 if block == "1" else 2
            place = int(place) * 3 + int(inner) if inner else last * 3 + int(place) - last
            return f"features.{block}.conv.{place}.{kind}"
        return key.replace("classifier.1.", "classifier.")

    return {name(key): value for key, value in model.net.state_dict().items()}


# ---- files that are none, and files that mean harm


@pytest.mark.parametrize(
    ("content", "reason", "words"),
    [
        (b"", "empty_file", "is empty (0 bytes)"),
        (b"\n<!DOCTYPE html><html>404", "not_a_checkpoint", "is a web page, not a checkpoint: it begins"),
        (b"Rar!\x1a\x07" + b"x" * 99, "not_a_checkpoint", "begins b'Rar!"),
        (b"version https://git-lfs.github.com/spec/v1", "not_a_checkpoint", "begins b'version https://"),
        (b"PK\x03\x04" + b"x" * 99, "damaged_file", "is cut short, damaged, or not by torch.save (103 bytes"),
        (pickle.dumps({"a": 1}), "damaged_file", "is cut short, damaged, or not by torch.save"),
    ],
)
def test_files_that_are_no_checkpoints(recipe_of, tmp_path, content, reason, words):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        import_checkpoint(tmp_path / "file.pth", recipe_of("resnet_small"))
    assert caught.value.reason == reason
    assert words in str(caught.value)
    for path, words in ((tmp_path / "nothing.pth", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(ModelFileError, match=words):
            import_checkpoint(path, recipe_of("resnet_small"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_short(small, tmp_path, zipped):
    path = tmp_path / "file.pth"
    torch.save({"state_dict": as_mmaction2(small)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 100, 20_000, 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match=rf"cut short, damaged, .* \({size} bytes") as caught:
            import_checkpoint(path, small.recipe)
        assert caught.value.reason == "damaged_file"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "arch": "resnet50"}, "has no state_dict: its entries are epoch, arch"),
        ({"state_dict": {}}, "has no state_dict: its entries are none"),
        ({"state_dict": [1]}, "holds a list, not a state_dict"),
        (torch.zeros(3), "holds a Tensor, not a state_dict"),
        ({"conv1.weight": torch.zeros(3), "step": 7}, "step (int) among its weights are no plain tensors"),
        ({"conv1.weight": torch.zeros(3).to_sparse()}, "conv1.weight (Tensor) among its weights"),
    ],
)
def test_files_without_weights(recipe_of, tmp_path, content, words):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ModelFileError) as caught:
        import_checkpoint(tmp_path / "file.pth", recipe_of("resnet_small"))
    assert caught.value.reason == "no_weights"
    assert words in str(caught.value)


class Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def dump_0(content, path):
    path.write_bytes(pickle.dumps(content, protocol=0))


def dump_4(content, path):
    path.write_bytes(pickle.dumps(content, protocol=4))


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_protocol_4(content, path):
    torch.save(content, path, pickle_protocol=4)


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_protocol_4, dump_0, dump_4])
def test_nothing_in_a_pickle_is_run(small, tmp_path, save):
    canary = tmp_path / "canary"
    content = {"meta": {"harm": Harm(canary)}, "state_dict": as_mmaction2(small)}
    path = tmp_path / "harm.pth"
    save(content if save in (torch.save, save_legacy) else content["meta"], path)
    for use in (lambda: import_checkpoint(path, small.recipe), lambda: load_backbone(small, path)):
        with pytest.raises(
            ModelFileError, match=r"asks for posix\.system, which weights do not need; nothing"
        ) as caught:
            use()
        assert caught.value.reason == "unsafe_pickle"
        assert not canary.exists()


def test_a_pickled_network_is_refused_by_name(recipe_of, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pth")
    with pytest.raises(ModelFileError, match=r"asks for torch\.nn\.modules\.linear\.Linear") as caught:
        import_checkpoint(tmp_path / "net.pth", recipe_of("resnet_small"))
    assert caught.value.reason == "unsafe_pickle"


class HistoryBuffer:
    """Looks like mmengine's: arrays, and a table of its own methods."""

    def __init__(self):
        self.__dict__.update(log=np.arange(3.0), count=np.ones(3, dtype=np.int64), methods={"mean": HistoryBuffer.mean})

    def mean(self):
        return 0


@pytest.mark.parametrize("zipped", [True, False])
def test_records_of_training_beside_the_weights_are_idle(small, tmp_path, monkeypatch, zipped):
    module = types.ModuleType("mmengine.logging.history_buffer")
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    monkeypatch.setattr(HistoryBuffer.mean, "__module__", module.__name__)
    module.HistoryBuffer = HistoryBuffer
    config = types.ModuleType("mmengine.config.config")
    config.ConfigDict = type("ConfigDict", (dict,), {"__module__": config.__name__})
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("mmengine.config", config.__name__):
        monkeypatch.setitem(sys.modules, name, config)
    meta = {
        "config": "model = dict()",
        "CLASSES": None,
        "hook_msgs": {"best_score": np.float64(0.7), "best_index": np.int64(3), "path": os.path.join("a", "b")},
        "cfg": config.ConfigDict(model=config.ConfigDict(type="Recognizer2D")),
        "options": argparse.Namespace(lr=0.01),
        "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
    }
    path = tmp_path / "file.pth"
    torch.save({"meta": meta, "state_dict": as_mmaction2(small)}, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    assert_equal_weights(import_checkpoint(path, small.recipe), small)


# ---- beginning from a backbone


def test_imagenet_weights_fill_all_but_the_classifier(recipe_of, tmp_path):
    torch.manual_seed(0)
    plain = torchvision.models.mobilenet_v2()
    ours = build(recipe_of("mobilenet_v2", "uni"))
    before = ours.net.classifier[1].weight.clone()
    flat = {f"module.{key}": value for key, value in flat_mobilenet(types.SimpleNamespace(net=plain)).items()}
    mmcls = {in_mmcls(key): value for key, value in plain.state_dict().items()}
    for content in (plain.state_dict(), flat, {"state_dict": mmcls}):
        ours.load_state_dict(build(ours.recipe).state_dict())
        before = ours.net.classifier[1].weight.clone()
        torch.save(content, tmp_path / "imagenet.pth")
        load_backbone(ours, tmp_path / "imagenet.pth")
        assert torch.equal(ours.net.classifier[1].weight, before)
        for key, value in ours.net.features.state_dict().items():
            assert torch.equal(value, plain.features.state_dict()[key]), key
    with pytest.raises(ModelFileError, match="has 1000 classes, tsm_mobilenetv2_uni has 7"):
        import_checkpoint(tmp_path / "imagenet.pth", ours.recipe)


def in_mmcls(key):
    """A MobileNetV2's name in mmcls and MMAction2, from its place in torchvision's row of blocks."""
    if key.startswith("classifier.1."):
        return key.replace("classifier.1.", "head.fc.")
    if found := re.fullmatch(r"features\.(0|18)\.(\d)\.(\w+)", key):
        return f"backbone.conv{1 if found[1] == '0' else 2}.{('conv', 'bn')[int(found[2])]}.{found[3]}"
    block, place, inner, kind = re.fullmatch(r"features\.(\d+)\.conv\.(\d)\.(?:(\d)\.)?(\w+)", key).groups()
    rows = [(stage, index) for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1), 1) for index in range(blocks)]
    stage, index = rows[int(block) - 1]
    last = 1 if block == "1" else 2
    part, norm = (int(place), int(inner)) if inner else (last, int(place) - last)
    return f"backbone.layer{stage}.{index}.conv.{part}.{('conv', 'bn')[norm]}.{kind}"


def test_backbones_of_trained_networks(model_of, recipe_of, small, tmp_path):
    """Shifts and classes of the file do not matter; a file of another network still does."""
    more = {**as_mmaction2(small), "cls_head.fc_cls.weight": torch.zeros(400, 128)}
    torch.save({"state_dict": {**more, "cls_head.fc_cls.bias": torch.zeros(400)}}, tmp_path / "k400.pth")
    save_model(tmp_path / "ours.safetensors", small)
    for file in ("k400.pth", "ours.safetensors"):
        ours = build(recipe_of("resnet_small", "uni"))
        load_backbone(ours, tmp_path / file)
        assert torch.equal(ours.net.layer4.state_dict()["1.bn2.bias"], small.net.layer4.state_dict()["1.bn2.bias"])
    with pytest.raises(ModelFileError, match="holds a resnet_small, tsm_r50_uni is a resnet50"):
        load_backbone(build(recipe_of("resnet50")), tmp_path / "k400.pth")


def test_new_non_local_blocks_stay_new(model_of, recipe_of, tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "imagenet.pth")
    ours = WindowTSM(build(recipe_of("resnet50", "bi", non_local="gaussian")))
    load_backbone(ours, tmp_path / "imagenet.pth")
    (tmp_path / "imagenet.pth").unlink()
    assert not ours.model.net.layer2[0].nl.norm.weight.any()
