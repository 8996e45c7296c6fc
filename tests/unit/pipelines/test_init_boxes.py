from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision

from pipelines.init_boxes import classifier_names, init_detector
from pipelines.init_weights import NoInitialWeights
from tests.unit.pipelines.box_kit import RECIPE
from tsm_core.checkpoints import save_model
from tsm_core.detector import TSMDetector, build_detector
from tsm_core.detector_recipes import DETECTOR_RECIPES
from tsm_core.model_file import ModelFileError

SSDLITE = DETECTOR_RECIPES["ssdlite320_mobilenet_v3_large"]
TWIN = DETECTOR_RECIPES["ssdlite320_mobilenet_v3_large_uni"]
SMALL_RESNET = replace(DETECTOR_RECIPES["fcos_resnet50_fpn_uni"], input_size=(64, 64))


def same(one: TSMDetector, other: TSMDetector) -> set[str]:
    """Names of the weights that are equal."""
    theirs = other.net.state_dict()
    return {name for name, value in one.net.state_dict().items() if name in theirs and torch.equal(value, theirs[name])}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A file as torchvision publishes them, with random weights."""
    model = build_detector(SSDLITE)
    folder = tmp_path_factory.mktemp("models")
    (folder / "checkpoints").mkdir()
    assert SSDLITE.checkpoint is not None
    path = folder / "checkpoints" / SSDLITE.checkpoint.file
    torch.save(model.net.state_dict(), path)
    return model, path


def test_classifier_is_what_the_number_of_classes_shapes():
    names = classifier_names(RECIPE)
    assert names == {"head.classification_head.cls_logits.weight", "head.classification_head.cls_logits.bias"}
    assert all("classification_head" in name for name in classifier_names(SSDLITE))


def test_twin_begins_with_all_that_the_still_detector_knows(coco):
    theirs, path = coco
    model = build_detector(TWIN)
    assert init_detector(model, models_dir=path.parents[1]) == f"begins with {path.name}, classifier and all"
    assert same(model, theirs) == set(theirs.net.state_dict())


def test_other_classes_get_a_new_classifier(coco):
    theirs, path = coco
    model = build_detector(replace(TWIN, labels=("cat", "dog"), label_ids=()))
    assert (
        init_detector(model, file=path, models_dir="")
        == f"begins with {path.name}, its classifier replaced by a new one"
    )
    assert same(model, theirs) >= set(theirs.net.state_dict()) - classifier_names(TWIN)
    asked = build_detector(TWIN)
    assert "replaced by a new one" in init_detector(asked, file=path, models_dir="", new_head=True)
    assert not classifier_names(TWIN) & {name for name in same(asked, theirs) if name.endswith("weight")}


def test_our_own_files_tell_their_classes(tmp_path):
    still = build_detector(replace(RECIPE, name="blocks_still", shift="none"))
    save_model(tmp_path / "still.safetensors", still)
    model = build_detector(RECIPE)
    said = init_detector(model, file=tmp_path / "still.safetensors", models_dir="")
    assert said == "begins with still.safetensors (blocks_still), classifier and all"
    assert same(model, still) == set(still.net.state_dict())
    other = build_detector(replace(RECIPE, labels=("up", "down")))
    said = init_detector(other, file=tmp_path / "still.safetensors", models_dir="")
    assert said.endswith("replaced by a new one: 2 classes there, 2 here, of other names")


def test_backbone_of_imagenet(tmp_path):
    resnet = torchvision.models.resnet50(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet50-0000.pth")
    model = build_detector(SMALL_RESNET)
    said = init_detector(model, file=tmp_path / "resnet50-0000.pth", models_dir="")
    assert said == "begins with the backbone of resnet50-0000.pth; all else is new"
    state = model.net.state_dict()
    for name, value in resnet.state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(state[f"backbone.body.{name}"], value), name


def test_what_is_not_there_says_what_to_fetch(tmp_path):
    with pytest.raises(NoInitialWeights, match="`tsm models pull ssdlite320_mobilenet_v3_large` fetches them"):
        init_detector(build_detector(TWIN), models_dir=tmp_path)
    with pytest.raises(NoInitialWeights, match="ImageNet weights of resnet101"):
        init_detector(build_detector(TWIN), init="resnet101", models_dir=tmp_path)
    with pytest.raises(NoInitialWeights, match="neither none, a detector's recipe"):
        init_detector(build_detector(TWIN), init="vgg", models_dir=tmp_path)
    assert init_detector(build_detector(TWIN), init="none", models_dir=tmp_path) == "begins with random weights"


def test_files_of_other_networks_are_named(tmp_path, coco):
    _, path = coco
    with pytest.raises(ModelFileError, match=r"is no fcos_small: missing: .*unknown: "):
        init_detector(build_detector(RECIPE), file=path, models_dir="")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "else.pth")
    with pytest.raises(ModelFileError, match="is neither a fcos_small nor its backbone"):
        init_detector(build_detector(RECIPE), file=tmp_path / "else.pth", models_dir="")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for name, message in (("broken.pth", "cannot be read"), ("absent.pth", "does not exist")):
        with pytest.raises(ModelFileError, match=message):
            init_detector(build_detector(RECIPE), file=tmp_path / name, models_dir="")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelFileError, match="no weights by name"):
        init_detector(build_detector(RECIPE), file=tmp_path / "list.pth", models_dir="")
