import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsm_core.checkpoints import ModelFileError, load_model, read_card, save_model
from tsm_core.model import TSM, WindowTSM, build


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
