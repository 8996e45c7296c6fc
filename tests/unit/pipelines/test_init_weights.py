from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision

from pipelines.init_weights import NoInitialWeights, imagenet_url, init_model
from tests.unit.pipelines.training_kit import RECIPE
from tsm_core.backbones import build_backbone
from tsm_core.checkpoints import save_model
from tsm_core.model import TSM, build
from tsm_core.model_file import ModelFileError
from tsm_core.recipes import RECIPES, Training, generic

LABELS = ("a", "b", "c")


def small(shift: str = "uni", labels: tuple[str, ...] = LABELS) -> TSM:
    return build(generic("resnet_small", shift, labels))


def same(model: TSM, other: TSM, *, head: bool) -> None:
    theirs = other.net.state_dict()
    for key, value in model.net.state_dict().items():
        assert torch.equal(value, theirs[key]) == (head or key != "fc.weight"), key


def test_none_stays_random(tmp_path):
    model = small()
    before = model.net.conv1.weight.clone()
    assert init_model(model, init="none", models_dir=tmp_path) == "begins with random weights"
    assert torch.equal(model.net.conv1.weight, before)


def test_imagenet_weights_are_found_by_the_backbone(tmp_path):
    recipe = generic("mobilenet_v2", "uni", LABELS, training=Training(init="mobilenet_v2"))
    model = build(recipe)
    with pytest.raises(NoInitialWeights) as caught:
        init_model(model, models_dir=tmp_path)
    name = imagenet_url("mobilenet_v2").rpartition("/")[2]
    assert str(tmp_path / "checkpoints" / name) in str(caught.value)
    assert "--init none" in str(caught.value)

    (tmp_path / "checkpoints").mkdir()
    imagenet = torchvision.models.mobilenet_v2()
    torch.save(imagenet.state_dict(), tmp_path / "checkpoints" / name)
    said = init_model(model, models_dir=tmp_path)
    assert said.startswith(f"begins with {name}, with a new classifier")
    assert torch.equal(model.net.features[0][0].weight, imagenet.features[0][0].weight)


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "mobilenet_v2"])
def test_address_of_imagenet_weights_is_torchvisions(name):
    assert imagenet_url(name).startswith(f"https://download.pytorch.org/models/{name}-")


def test_recipe_weights_are_found_where_they_are_pulled_to(tmp_path):
    row = RECIPES["tsm_k400_pretrained_r50_1x1x8_25e_ucf101_rgb"]
    with torch.device("meta"):
        model = build(row)
    with pytest.raises(NoInitialWeights, match="tsm models pull tsm_r50_1x1x8_50e_kinetics400_rgb__ss256"):
        init_model(model, models_dir=tmp_path)
    with pytest.raises(NoInitialWeights, match="neither none"):
        init_model(model, init="resnet49", models_dir=tmp_path)
    (tmp_path / "tsm_r50_1x1x8_50e_kinetics400_rgb__ss256.safetensors").write_text("not weights")
    with pytest.raises(ModelFileError):
        init_model(model, models_dir=tmp_path)


def test_own_model_of_the_other_direction_fills_all(tmp_path):
    trained = small("bi")
    save_model(tmp_path / "bi.safetensors", trained)
    model = small("uni")
    said = init_model(model, file=tmp_path / "bi.safetensors", models_dir=tmp_path)
    assert said == "begins with bi.safetensors (tsm_resnet_small), classifier and all; shifts bi there, uni here"
    same(model, trained, head=True)


def test_head_is_replaced_when_classes_differ_or_on_request(tmp_path):
    trained = small("bi", ("x", "y"))
    save_model(tmp_path / "bi.safetensors", trained)
    model = small("uni")
    said = init_model(model, file=tmp_path / "bi.safetensors", models_dir=tmp_path)
    assert "its classifier replaced by a new one: 2 classes there, 3 here, of other names" in said
    assert torch.equal(model.net.conv1.weight, trained.net.conv1.weight)
    assert model.net.fc.weight.shape == (3, 128)

    trained = small("uni")
    save_model(tmp_path / "uni.safetensors", trained)
    said = init_model(model, file=tmp_path / "uni.safetensors", models_dir=tmp_path, new_head=True)
    assert said.endswith("its classifier replaced by a new one")
    same(model, trained, head=False)


def test_public_weights_of_both_directions_fill_a_uni_network(tmp_path):
    """MMAction2's names mark the shifted convolutions; the uni net has the same ones."""
    recipe = RECIPES["tsm_mobilenetv2_dense_1x1x8_100e_kinetics400_rgb_uni"]
    theirs = build(replace(recipe, name="bi", shift="bi"))
    weights = {}
    shifted = {name for name, module in theirs.net.named_modules() if type(module).__name__ == "ShiftedConv2d"}
    for key, value in theirs.net.state_dict().items():
        path, _, kind = key.rpartition(".")
        inside = f"{path}.net.{kind}" if path in shifted else key
        weights[f"base_model.{inside}".replace("base_model.classifier.1", "new_fc")] = value
    torch.save({"state_dict": weights}, tmp_path / "public.pth")
    model = build(recipe)
    said = init_model(model, file=tmp_path / "public.pth", models_dir=tmp_path)
    assert said == "begins with public.pth, classifier and all; shifts bi there, uni here"
    assert torch.equal(model.net.classifier[1].weight, theirs.net.classifier[1].weight)

    fewer = build(replace(recipe, labels=LABELS))
    said = init_model(fewer, file=tmp_path / "public.pth", models_dir=tmp_path)
    assert "with a new classifier: " in said
    assert "400 classes" in said
    assert torch.equal(fewer.net.features[3].conv[0][0].weight, theirs.net.features[3].conv[0][0].weight)


def test_files_of_other_networks_are_refused(tmp_path):
    torch.save(build_backbone("resnet_small", 3).state_dict(), tmp_path / "small.pth")
    model = build(generic("mobilenet_v2", "uni", LABELS))
    with pytest.raises(ModelFileError, match="holds a resnet_small"):
        init_model(model, file=tmp_path / "small.pth", models_dir=tmp_path)
    save_model(tmp_path / "small.safetensors", small())
    with pytest.raises(ModelFileError, match="holds a resnet_small"):
        init_model(model, file=tmp_path / "small.safetensors", models_dir=tmp_path)
    with pytest.raises(ModelFileError, match="does not exist"):
        init_model(model, file=tmp_path / "nothing.pth", models_dir=tmp_path)


def test_recipe_of_the_kit_begins_at_random(tmp_path):
    assert init_model(build(RECIPE), models_dir=tmp_path) == "begins with random weights"
