"""The tsm commands that need no service: recipes, models, data sets, evaluation."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from pipelines.datasets import DATASETS
from services.cli import app
from tests.assets.make import make_miniature
from tsm_core.checkpoints import load_model
from tsm_core.detector_recipes import DETECTOR_RECIPES
from tsm_core.model import build
from tsm_core.model_file import read_card
from tsm_core.recipes import PAGE_ROWS, RECIPES, find_recipe

JESTER = "mobilenetv2_jester_online"
UCF = "tsm_k400_pretrained_r50_1x1x8_25e_ucf101_rgb"


@pytest.fixture(autouse=True)
def models_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSM_MODELS__DIR", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def tsm(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def said(*arguments: str) -> object:
    result = tsm(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in MMAction2's layout, with random weights: the UCF101 row's."""
    torch.manual_seed(0)
    weights = {}
    for key, value in build(find_recipe(UCF)).net.state_dict().items():
        name = key.replace("downsample.0.", "downsample.conv.").replace("downsample.1.", "downsample.bn.")
        if key.startswith("fc."):
            weights[f"cls_head.fc_cls.{key[3:]}"] = value
            continue
        if ".downsample." not in key:
            part, kind = name.rsplit(".", 1)
            block, layer = part.rpartition(".")[::2]
            shifted = ".net" if layer == "conv1" and block else ""
            name = f"{block}.conv{layer[-1]}.{layer[:-1]}{shifted}.{kind}".lstrip(".")
        weights[f"backbone.{name}"] = value
    path = tmp_path_factory.mktemp("theirs") / "theirs.pth"
    torch.save({"meta": {"epoch": 25}, "state_dict": weights}, path)
    return path


def test_recipes_are_listed_and_found():
    everything = said("recipes", "list")
    assert [row["name"] for row in everything] == [*RECIPES, *DETECTOR_RECIPES]
    assert len(said("recipes", "list", "ucf101")) == 4
    ours = {row["name"]: row for row in everything}
    assert (ours[JESTER]["mode"], ours[JESTER]["classes"], ours[JESTER]["sha256"]) == ("step", 27, None)
    assert (ours[UCF]["mode"], ours[UCF]["top1_accurate"], ours[UCF]["sha256"]) == ("window", 94.5, "1fae312b")
    table = tsm("recipes", "list").stdout
    for row in PAGE_ROWS:
        assert row.name in table
    assert "45.58 / 47.7" in table
    assert "to be trained" in table


def test_a_recipe_is_shown_whole():
    shown = said("recipes", "show", "tsm_r50_flip_1x1x8_50e_sthv1_rgb")
    assert (shown["params"], shown["training"]["flip_pairs"]) == (23864558, [[2, 4], [30, 41], [52, 66]])
    assert (shown["accurate"], shown["stride_s"]) == ({"clips": "twice", "crop": "three", "crop_px": 256}, 1.0)
    text = tsm("recipes", "show", "tsm_r50_flip_1x1x8_50e_sthv1_rgb").stdout
    for part in (
        "top-1 48.51 %",
        "12596f16",
        "2 clips x three 256 (6)",
        "not measured here",
        "fc_bias 10x lr 0x decay",
    ):
        assert part in text
    refused = tsm("recipes", "show", "tsm_r50_flip_sthv1")
    assert refused.exit_code == 2
    assert "did you mean tsm_r50_flip_1x1x8_50e_sthv1_rgb" in refused.stderr


def test_recipes_of_every_kind_can_be_shown():
    kinds = {(row.backbone, row.non_local, row.shift, bool(row.published)): row.name for row in RECIPES.values()}
    for name in kinds.values():
        assert tsm("recipes", "show", name).exit_code == 0, name


def test_a_checkpoint_becomes_a_model(theirs: Path, models_dir: Path):
    made = said("models", "import", str(theirs), "--recipe", UCF)
    assert made == {"name": UCF, "recipe": UCF, "file": str(models_dir / f"{UCF}.safetensors")}
    model = load_model(made["file"])
    wanted = torch.load(theirs, weights_only=True)["state_dict"]["backbone.layer1.0.conv1.conv.net.weight"]
    assert torch.equal(model.model.net.layer1[0].conv1.weight, wanted)
    card = said("models", "show", UCF)
    assert (card["recipe"], card["mode"], card["stride_s"], len(card["labels"])) == (UCF, "window", 1.75, 101)
    assert "mmaction2" in json.dumps(card["card"])
    assert UCF in tsm("models", "list").stdout
    assert "101: ApplyEyeMakeup" in tsm("models", "list").stdout
    assert said("models", "import", str(theirs), "--recipe", UCF, "--name", "door")["name"] == "door"
    assert {model["name"] for model in said("models", "list")} >= {UCF, "door", "motion9"}


def test_a_checkpoint_that_does_not_fit_leaves_nothing(theirs: Path, models_dir: Path):
    for recipe, part in (
        ("tsm_r50_1x1x8_50e_sthv1_rgb", "101 classes"),
        ("tsm_mobilenetv2_dense_1x1x8_100e_kinetics400_rgb", "mobilenet_v2"),
        (f"{UCF}_uni", "_uni"),
        ("no-such-recipe", "does not exist"),
    ):
        refused = tsm("models", "import", str(theirs), "--recipe", recipe)
        assert refused.exit_code == 2, refused.output
        assert refused.stderr.count("\n") == 1
        assert part in refused.stderr
    assert not models_dir.exists() or not list(models_dir.iterdir())


def test_a_backbone_begins_a_training(theirs: Path, models_dir: Path):
    made = said("models", "import", str(theirs), "--recipe", f"{UCF}_uni", "--backbone-only")
    recipe, card = read_card(made["file"])
    assert recipe.steppable
    assert "untrained" in card["note"]


def test_nothing_is_published_for_a_twin():
    refused = tsm("models", "pull", f"{UCF}_uni")
    assert refused.exit_code == 2
    assert "(reason: nothing_published)" in refused.stderr


@pytest.mark.parametrize(("suffix", "step"), [(".onnx", True), (".pt2", False)])
def test_a_model_is_exported(tmp_path: Path, suffix: str, step: bool):
    out = tmp_path / f"motion9{suffix}"
    made = said("models", "export", "motion9", "--out", str(out), *(["--step"] if step else []))
    assert made == {"name": "motion9", "what": "step" if step else "clip", "file": str(out)}
    assert out.stat().st_size > 100_000
    assert (out.read_bytes()[:2] == b"PK") == (suffix == ".pt2")


def test_an_export_says_which_format(tmp_path: Path):
    refused = tsm("models", "export", "motion9", "--out", str(tmp_path / "motion9.bin"))
    assert refused.exit_code == 2
    assert "must end in .onnx or .pt2" in refused.stderr


def test_a_data_set_is_listed_and_checked(tmp_path: Path):
    make_miniature("jester", tmp_path, broken=True)
    assert {row["name"] for row in said("data", "list")} == {*DATASETS, "imagenet_vid"}
    prepared = said("data", "prepare", "jester", "--data", str(tmp_path))
    assert [row["list"] for row in prepared["lists"]] == [
        "jester_train_list_rawframes.txt",
        "jester_val_list_rawframes.txt",
    ]
    assert any(prepared["absent"].values())
    table = tsm("data", "prepare", "jester", "--data", str(tmp_path)).stdout
    assert "ABSENT" in table
    assert "absent from jester_" in table
    checked = tsm("data", "check", "jester", "--data", str(tmp_path), "--full")
    assert checked.exit_code == 1
    assert "UNREADABLE" in checked.stdout
    assert "unreadable: " in checked.stdout
    assert (
        json.loads(tsm("data", "check", "jester", "--data", str(tmp_path), "--full", "--json").stdout)["fine"] is False
    )
    for arguments, reason in (
        (("prepare", "k600"), "unknown_dataset"),
        (("prepare", "ucf101"), "no_videos"),
        (("check", "ucf101"), "no_list"),
        (("extract", "jester"), "no_videos"),
    ):
        refused = tsm("data", *arguments, "--data", str(tmp_path))
        assert refused.exit_code == 2, arguments
        assert f"(reason: {reason})" in refused.stderr


def test_a_checkpoint_is_tested(theirs: Path, tmp_path: Path):
    make_miniature("ucf101", tmp_path, videos_per_class=1, classes=2)
    assert tsm("data", "prepare", "ucf101", "--data", str(tmp_path), "--split", "1").exit_code == 0
    base = ["evaluate", UCF, str(theirs), "--data", str(tmp_path), "--out", str(tmp_path / "result.json")]
    done = tsm(*base, "--eval", "top_k_accuracy", "mean_class_accuracy", "--confusion", str(tmp_path / "c.png"))
    assert done.exit_code == 0, done.output
    assert "2 of 2 videos, 1 views each" in done.stdout
    assert "MMAction2 v0.24.1 reports top-1 94.5 %, top-5 99.58 %" in done.stdout
    assert "not measured here" in done.stdout
    assert "2/2 videos" in done.stderr  # how far it is
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["metrics"]) == {"top1_acc", "top5_acc", "mean_class_accuracy"}
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    again = tsm(*base, "--eval", "top_k_accuracy", "--resume", "--json")
    assert json.loads(again.stdout)["metrics"] == {
        name: value for name, value in result["metrics"].items() if name != "mean_class_accuracy"
    }
    for arguments, reason in (
        (["--eval", "recall"], "bad_evaluation"),
        (["--list", "nothing.txt"], "no_list"),
        (["--kind", "videos", "--split", "2"], "no_list"),
        (["--crop", "three", "--crop-px", "224"], "crop_does_not_fit"),
    ):
        refused = tsm(*base, *arguments)
        assert refused.exit_code == 2, arguments
        assert f"(reason: {reason})" in refused.stderr


def test_training_says_what_it_lacks(tmp_path: Path):
    refused = tsm("train", "tsm_r50_1x1x8_50e_jester_rgb", "--work-dir", str(tmp_path / "work"))
    assert refused.exit_code == 2
    assert "with --data (reason: no_data)" in refused.stderr
    unknown = tsm("train", "motion10", "--work-dir", str(tmp_path / "work"))
    assert (unknown.exit_code, "unknown_recipe" in unknown.stderr) == (2, True)
    asked = tsm("train", "--help")
    assert (asked.exit_code, "usage: tsm train" in asked.stdout) == (0, True)


def test_training_shows_what_it_would_do(tmp_path: Path):
    done = tsm("train", "motion8_tsm", "--work-dir", str(tmp_path / "work"), "--dry-run", "--batch", "4")
    assert done.exit_code == 0, done.output
    assert "150" not in done.stdout.split("steps an epoch")[0].splitlines()[-1]  # 600 steps of 4
    assert (tmp_path / "work" / "first_batch.png").is_file()


def test_a_stream_option_needs_its_model():
    refused = tsm("streams", "add", "--uri", "rtsp://127.0.0.1/x", "--stride-s", "1")
    assert refused.exit_code == 2
    assert "--model" in refused.stderr
