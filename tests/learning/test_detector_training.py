from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from pipelines.learners import new_study
from pipelines.ray_local import ray_session
from pipelines.study import Team
from pipelines.train import run_training
from pipelines.training_data import ClipOptions
from pipelines.training_job import Options, new_job
from pipelines.vid import prepare_vid
from services.cli import app
from tests.unit.pipelines import box_kit
from tests.unit.pipelines.training_kit import checkpoint
from tests.unit.pipelines.vid_kit import make_vid
from tsm_core.detector_recipes import DETECTOR_RECIPES, DetectorRecipe
from tsm_core.model_file import read_card

RFCN = "rfcn_resnet101_vid_uni"
TWINS = [name for name, row in DETECTOR_RECIPES.items() if row.training and row.shift == "uni" and name != RFCN]
LARGEST = "fasterrcnn_resnet50_fpn_v2_uni"
OF_EACH_FAMILY = (
    "ssdlite320_mobilenet_v3_large_uni",
    "fasterrcnn_mobilenet_v3_large_320_fpn_uni",
    "fcos_resnet50_fpn_uni",
    RFCN,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TSM_MODELS__DIR", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)


def tsm(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def said(*arguments: str) -> Any:
    result = tsm(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_rfcn_from_official_xml_to_a_tested_model(tmp_path):
    make_vid(tmp_path)
    data = ("--data", str(tmp_path))
    prepared = said("data", "prepare", "imagenet_vid", *data)
    assert [(row["videos"], row["frames"]) for row in prepared["files"]] == [(2, 22), (2, 12), (3, 3)]
    assert said("data", "check", "imagenet_vid", *data, "--full")["fine"]
    work = tmp_path / "work"
    train = tsm(
        *("train", RFCN, *data, "--work-dir", str(work), "--px", "64", "--init", "none", "--batch", "1"),
        *("--clip-frames", "2", "--steps", "2", "--validate", "0", "--loaders", "0", "--gpus", "0"),
    )
    assert train.exit_code == 0, train.output
    assert "2 steps" in train.output
    model = work / "last.safetensors"
    recipe, card = read_card(model)
    assert (recipe.name, recipe.input_size, card["steps"], card["bad_steps"]) == (RFCN, (64, 112), 2, 0)
    assert card["data"]["videos"] == 33
    found = said("evaluate", RFCN, str(model), *data, "--limit", "1", "--out", str(tmp_path / "result.json"))
    assert (found["counts"]["tested"], found["counts"]["frames"], found["shift"]) == (1, 6, "uni")
    assert found["counts"]["objects"] == {"all": 6, "slow": 6, "medium": 0, "fast": 0}
    assert 0 <= found["metrics"]["vid_all"] <= 1
    assert 0 <= found["metrics"]["coco_ap"] <= 1
    assert found["metrics"]["vid_fast"] is None
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == found["metrics"]
    refused = tsm("evaluate", RFCN, str(model), *data, "--resume", "--workers", "2")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"--resume, --workers: for recognisers; {RFCN} is a detector" in refused.stderr
    shutil.rmtree(work)  # half a gigabyte


def small(name: str) -> DetectorRecipe:
    """A row on films of blocks, in a small input."""
    row = DETECTOR_RECIPES[name]
    return replace(row, labels=box_kit.Blocks.labels, label_ids=(), dataset="blocks")


@pytest.mark.parametrize(
    ("name", "amp"),
    [
        *(pytest.param(name, "fp32", marks=[pytest.mark.slow] if name == LARGEST else []) for name in TWINS),
        *((name, "bf16") for name in OF_EACH_FAMILY if "mobilenet" in name),
        *(pytest.param(name, "bf16", marks=pytest.mark.slow) for name in OF_EACH_FAMILY if "resnet" in name),
    ],
)
def test_every_recipe_takes_two_steps(tmp_path, name, amp):
    # below its own size an SSD has maps of one pixel, whose strided convolutions oneDNN trains on stray memory in bf16
    px = None if name.startswith("ssd") else 64
    options = Options(batch=1, px=px, init="none", validate=0, loaders=0, amp=amp, clips=ClipOptions(frames=2))
    found = new_study(new_job(small(name), None, tmp_path, options), Team())
    found.prepare()
    batches = list(islice(found.batches(), 2))
    before = [parameter.detach().clone() for parameter in found.parameters]
    facts = [found.step([batch], 0, number, 1e-3) for number, batch in enumerate(batches)]
    assert not any(each.bad for each in facts)
    assert all(0 < each.loss < 1000 for each in facts)
    moved = [not torch.equal(old, new) for old, new in zip(before, found.parameters, strict=True)]
    assert sum(moved) > len(moved) / 2  # heads of sizes that no block has learn of nothing


# --- together


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        with ray_session("local", cpus=3) as ray:
            yield ray


@pytest.mark.slow
def test_two_workers_equal_one_that_accumulates(tmp_path, ray_here):
    """Parameters after two steps of a detector whose norms learn of each worker's clips; figures of all videos."""
    make_vid(tmp_path)
    prepare_vid(tmp_path)
    labels = DETECTOR_RECIPES[RFCN].labels
    training = replace(box_kit.TRAINING, optimiser="sgd", epochs=1, milestones=(), lr=0.01)
    recipe = replace(
        box_kit.RECIPE, labels=labels, label_ids=(), input_size=(64, 96), dataset="imagenet_vid", training=training
    )

    def run(name: str, workers: int, **changes: Any) -> dict[str, Any]:
        options = Options(batch=2, loaders=0, steps=2, deterministic=True, **changes)
        run_training(recipe, data=tmp_path, work_dir=tmp_path / name, options=options, workers=workers, gpus=0, say=str)
        model: dict[str, Any] = checkpoint(tmp_path / name)["model"]
        return model

    two, one, other = run("two", 2), run("one", 1, accumulate=2), run("none", 1)
    names = [name for name in one if "running" not in name and "tracked" not in name]
    assert max(float((one[name] - two[name]).abs().max()) for name in names) < 1e-5
    assert max(float((one[name] - other[name]).abs().max()) for name in names) > 1e-4
