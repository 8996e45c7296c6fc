import pytest

from tsm_core.checkpoints import load_model, save_model
from tsm_core.zoo import UnknownModel, available_models, find_model


def test_models_are_found_by_name_and_yours_go_first(model_of, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, name in ((first, "door"), (second, "door"), (second, "motion9")):
        save_model(folder / f"{name}.safetensors", model_of("resnet_small"))
    (second / "notes.txt").write_text("no model")
    models = available_models([first, second, tmp_path / "missing"])
    assert models["door"] == find_model("door", extra_dirs=[first, second]) == second / "door.safetensors"
    assert models["motion9"] == second / "motion9.safetensors"
    assert "notes" not in models
    assert load_model(find_model("anything", path=first / "door.safetensors")).labels == tuple("abcdefg")


def test_unknown_model_lists_what_exists(model_of, tmp_path):
    save_model(tmp_path / "door.safetensors", model_of("resnet_small"))
    with pytest.raises(UnknownModel, match=r"'gate' does not exist here; there are .*door") as caught:
        find_model("gate", extra_dirs=[tmp_path])
    assert caught.value.reason == "unknown_model"
    with pytest.raises(UnknownModel, match=r"gate\.safetensors does not exist"):
        find_model("door", path=tmp_path / "gate.safetensors")
    for name, way in (
        ("mobilenetv2_jester_online", "tsm models pull mobilenetv2_jester_online fetches it, tsm models import FILE"),
        ("tsm_r50_1x1x8_50e_jester_rgb_uni", "tsm models import FILE --recipe tsm_r50_1x1x8_50e_jester_rgb_uni"),
    ):
        with pytest.raises(UnknownModel, match=way):
            find_model(name, extra_dirs=[tmp_path])
