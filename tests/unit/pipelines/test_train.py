from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import learner
from pipelines.scoring import DecoderDied, OutOfMemory
from pipelines.study import Team
from pipelines.train import Diverged, Interrupted, fit, main, run_training
from pipelines.training_data import OPENERS, NothingReadable, TrainingData
from pipelines.training_job import BadOptions, TrainResult, at_size, new_job
from pipelines.work_dir import CannotWrite, OtherTraining
from tests.unit.pipelines.training_kit import RECIPE, TRAINING, Moving, checkpoint, moving_job, with_training
from tsm_core.checkpoints import load_model
from tsm_core.model_file import read_card
from tsm_core.recipes import PAGE_ROWS, RECIPES, Recipe

STHV1 = RECIPES["tsm_r50_1x1x8_50e_sthv1_rgb"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def quiet(_: str) -> None:
    pass


def train(tmp_path: Any, recipe: Recipe = RECIPE, say: Any = quiet, **options: Any) -> TrainResult:
    return fit(moving_job(tmp_path, recipe, **options), Team(say=say))


def same_end(one: Any, other: Any) -> None:
    """The same weights, momenta, figures and curves, to the bit."""
    first, second = checkpoint(one), checkpoint(other)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for number, state in first["optimiser"]["state"].items():
        assert torch.equal(state["momentum_buffer"], second["optimiser"]["state"][number]["momentum_buffer"])
    for state in (first, second):
        state["progress"].pop("seconds")
        for row in (*state["progress"]["history"], state["progress"]["best"]):
            row.pop("clips_per_s", None)
    assert first["progress"] == second["progress"]


# --- the whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    lines: list[str] = []
    result = train(place, with_training(epochs=20, milestones=(15,), validate_epochs=5), lines.append)
    return place, result, lines


def test_training_learns_what_only_time_tells(trained):
    place, result, _ = trained
    assert (result.epochs, result.steps, result.bad_steps, result.replaced) == (20, 60, 0, 0)
    assert result.best["top1"] == 1.0
    assert result.last["val_loss"] < 0.5
    assert result.model == f"{place}/best.safetensors"


def test_result_steps_online_as_it_is(trained):
    _, result, _ = trained
    model = load_model(result.model)
    arena = model.new_arena(1)
    slot = arena.allocate()
    clip, label = Moving(6, 4).clip(0, np.random.default_rng(0))
    clip = model.preprocess(clip)
    with torch.no_grad():
        whole = model.forward_frames(clip[None])[0]
    steps = torch.cat([model.step(frame[None], arena, [slot]) for frame in clip])
    torch.testing.assert_close(steps, whole)
    assert int(steps.mean(0).argmax()) == label


def test_card_says_how_the_model_came_about(trained):
    place, _, _ = trained
    recipe, card = read_card(place / "last.safetensors")
    assert recipe.name == "moving_uni"
    assert (card["command"], card["seed"], card["epochs"], card["steps"]) == ("a command", 0, 20, 60)
    assert card["began"] == "begins with random weights"
    assert card["data"]["videos"] == 10
    assert card["scores"]["best"]["top1"] == 1.0
    assert [row["epoch"] for row in card["curves"] if "top1" in row] == [5, 10, 15, 20]
    assert card["versions"]["torch"] == torch.__version__
    json.dumps(card, allow_nan=False)


def test_curves_are_left_as_table_picture_and_events(trained):
    place, _, _ = trained
    with (place / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    assert float(rows[0]["lr"]) == pytest.approx(0.02 * 4 / 8)
    assert float(rows[-1]["lr"]) == pytest.approx(0.002 * 4 / 8)
    assert [row["epoch"] for row in rows if row["top1"]] == ["5", "10", "15", "20"]
    assert sum(bool(row["epoch_loss"]) for row in rows) == 20
    assert Image.open(place / "curves.png").size[0] == 960
    (events,) = (place / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content
    assert b"val/top1" in content


def test_plan_and_rate_are_said_aloud(trained):
    _, _, lines = trained
    text = "\n".join(lines)
    assert "learning rate 0.01 = 0.02 x 4 / 8: 4 videos a step (4 videos x 1 workers x 1 accumulated)" in text
    assert "moving_uni begins with random weights" in text
    assert "10 videos, 3 steps an epoch, 20 epochs; judged by 6 others every 5 epochs" in text
    assert "epoch 20/20 done: loss" in text
    assert "top1 100.00%" in text


def test_progress_line_has_loss_rate_throughput_and_time_to_go(tmp_path):
    lines: list[str] = []
    train(tmp_path, say=lines.append, say_every_s=0.0)
    steps = [line for line in lines if line.startswith("epoch 1/2 step")]
    assert len(steps) == 3
    assert all(word in steps[0] for word in ("loss 0.", "lr 0.01", "clips/s", "0:00:0", "to go"))


# --- going on


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_interrupted_training_ends_as_one_that_was_not(tmp_path, steps):
    train(tmp_path / "whole")
    part = train(tmp_path / "parts", steps=steps)
    assert part.steps == steps
    lines: list[str] = []
    train(tmp_path / "parts", say=lines.append)
    assert lines[0] == f"moving_uni goes on at epoch {steps // 3 + 1}, step {steps % 3 + 1}"
    same_end(tmp_path / "whole", tmp_path / "parts")


def test_killed_training_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    original = learner.Learning.step

    def dies(self: Any, batches: Any, epoch: int, number: int, lr: float) -> Any:
        if (epoch, number) == (1, 1):
            raise KeyboardInterrupt
        return original(self, batches, epoch, number, lr)

    monkeypatch.setattr(learner.Learning, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", checkpoint_minutes=0.0)
    progress = checkpoint(tmp_path / "killed")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)
    monkeypatch.undo()
    train(tmp_path / "killed")
    same_end(tmp_path / "whole", tmp_path / "killed")


def test_stopped_training_says_that_it_goes_on(tmp_path):
    train(tmp_path / "whole")
    asked = iter([False, True])
    with pytest.raises(Interrupted, match="epoch 1 after step 2 of 3; the same command goes on"):
        fit(moving_job(tmp_path / "stopped"), Team(say=quiet, stopping=lambda: next(asked)))
    train(tmp_path / "stopped")
    same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_training_in_order(tmp_path, number):
    before = signal.getsignal(number)

    def say(line: str) -> None:
        if line.startswith("epoch 1/2 done"):
            os.kill(os.getpid(), number)

    options = replace(moving_job(tmp_path).options, say_every_s=0.0)
    with pytest.raises(Interrupted, match="epoch 2 after step 1 of 3"):
        run_training(RECIPE, data=None, work_dir=tmp_path / "run", options=options, gpus=0, say=say)
    assert signal.getsignal(number) == before
    result = run_training(RECIPE, data=None, work_dir=tmp_path / "run", options=options, gpus=0, say=quiet)
    assert result.steps == 6


def test_reader_that_dies_is_told(tmp_path):
    class Deadly(Moving):
        def clip(self, index: int, rng: np.random.Generator) -> Any:
            if index == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().clip(index, rng)

    with pytest.raises(DecoderDied, match="the same command goes on from the last checkpoint"):
        fit_with(Deadly(10, 4), tmp_path, loaders=1)


def test_finished_training_is_not_done_again(tmp_path):
    first = train(tmp_path)
    again = train(tmp_path)
    assert again == first


def test_loaders_do_not_matter(tmp_path):
    train(tmp_path / "none")
    train(tmp_path / "two", loaders=2)
    same_end(tmp_path / "none", tmp_path / "two")


def test_fp16_goes_on_with_its_scale(tmp_path):
    train(tmp_path / "whole", amp="fp16")
    train(tmp_path / "parts", amp="fp16", steps=2)
    train(tmp_path / "parts", amp="fp16")
    same_end(tmp_path / "whole", tmp_path / "parts")


def test_behind_a_uri_all_is_the_same(tmp_path):
    train(tmp_path / "here")
    place = (tmp_path / "there").as_uri()
    train(place, steps=2)
    result = train(place)
    assert result.model == f"{place}/best.safetensors"
    same_end(tmp_path / "here", place)
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names >= {"last.pt", "best.safetensors", "last.safetensors", "metrics.csv", "curves.png", "tensorboard"}


def test_another_training_in_the_folder_is_refused_and_named(tmp_path):
    train(tmp_path, steps=1)
    with pytest.raises(OtherTraining, match=r"seed 0 there, 1 here"):
        train(tmp_path, seed=1)
    with pytest.raises(OtherTraining, match=r"recipe\.dropout 0\.5 there, 0\.0 here"):
        train(tmp_path, replace(RECIPE, dropout=0.0))
    with pytest.raises(OtherTraining, match=r'data\.train "moving 10" there, "moving 12" here'):
        fit_with(Moving(12, 4), tmp_path)
    lines: list[str] = []
    train(tmp_path, seed=1, resume=False, say=lines.append)
    assert lines[0].endswith("begins with random weights")


# --- what goes wrong


def fit_with(source: Any, tmp_path: Any, **options: Any) -> TrainResult:
    original = OPENERS["moving"]
    OPENERS["moving"] = lambda recipe, root, clips: TrainingData(source, Moving(6, recipe.frames))
    try:
        return train(tmp_path, **options)
    finally:
        OPENERS["moving"] = original


def test_unreadable_videos_are_replaced_counted_and_named(tmp_path):
    lines: list[str] = []
    result = fit_with(Moving(10, 4, bad=(3,)), tmp_path, say=lines.append)
    assert result.replaced == 2
    assert sum("unreadable, replaced by another video: video 3 is damaged" in line for line in lines) == 2
    assert read_card(tmp_path / "last.safetensors")[1]["replaced_videos"] == 2


def test_too_many_unreadable_videos_end_it(tmp_path):
    with pytest.raises(NothingReadable, match=r"0\.1 of 10 is the most \(--max-skipped\); the first: video") as caught:
        fit_with(Moving(10, 4, bad=(3, 5, 6)), tmp_path)
    assert caught.value.reason == "too_many_unreadable"
    with pytest.raises(Exception, match="video 3 is damaged"):
        fit_with(Moving(10, 4, bad=(3,)), tmp_path, on_error="raise")


def test_diverged_training_names_step_and_rate(tmp_path):
    with pytest.raises(Diverged, match=r"step \d \(learning rate 1e\+30\): the loss .* 2 steps in a row") as caught:
        train(tmp_path, lr=1e30, max_bad_steps=2, validate=0)
    assert caught.value.reason == "diverged"
    assert "smaller --lr" in str(caught.value)


def test_single_bad_steps_are_left_out_and_counted(tmp_path, monkeypatch):
    calls = []
    normalise = learner.normalise

    def sometimes(pixels: Any, spec: Any) -> Any:
        calls.append(1)
        return normalise(pixels, spec) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(learner, "normalise", sometimes)
    lines: list[str] = []
    result = train(tmp_path, say=lines.append, validate=0)
    assert result.bad_steps == 1
    assert any(line.startswith("epoch 1 step 2 (learning rate 0.01): left out") for line in lines)
    assert all(value.isfinite().all() for value in checkpoint(tmp_path)["model"].values())


def test_memory_that_does_not_suffice_says_what_helps(tmp_path, monkeypatch):
    def no(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(learner.Learning, "step", no)
    with pytest.raises(OutOfMemory, match="smaller --batch, with --accumulate"):
        train(tmp_path)


def test_disk_that_is_full_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, steps=3)

    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CannotWrite, match="the one before it is kept"):
        train(tmp_path)
    monkeypatch.undo()
    assert train(tmp_path).steps == 6


# --- options


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (RECIPE, {"amp": "int8"}, "amp 'int8' must be fp32, bf16, fp16"),
        (RECIPE, {"batch": -1}, "batch -1"),
        (RECIPE, {"px": 8}, "px 8"),
        (STHV1, {"per_frame_loss": True}, "_uni twin"),
        (STHV1, {"carry_state": True}, "carry_state needs a uni-directional recipe"),
        (replace(RECIPE, training=None), {}, "does not say how it is trained"),
    ],
)
def test_options_that_make_no_sense(tmp_path, recipe, options, words):
    with pytest.raises(BadOptions, match=words):
        moving_job(tmp_path, recipe, **options)


@pytest.mark.parametrize("recipe", PAGE_ROWS, ids=lambda row: row.name)
def test_smaller_size_keeps_proportions(recipe):
    small = at_size(recipe, 64)
    assert (small.preprocess.input_px, small.preprocess.resize_px) == (64, 73)
    assert {small.efficient.crop_px, small.accurate.crop_px} <= {64, 73}
    assert small.efficient.clips == recipe.efficient.clips


def test_options_change_the_recipe_that_is_kept(tmp_path):
    job = new_job(STHV1, None, tmp_path, replace(moving_job(tmp_path).options, epochs=10, partial_bn=True, px=64))
    assert (job.training.epochs, job.training.milestones, job.training.partial_bn) == (10, (4, 8), True)
    assert job.batch == 8
    assert job.recipe.preprocess.input_px == 64


# --- the command


def test_run_training_by_recipe(tmp_path):
    lines: list[str] = []
    options = moving_job(tmp_path).options
    result = run_training(RECIPE, data=None, work_dir=tmp_path / "run", options=options, gpus=0, say=lines.append)
    assert result.steps == 6
    assert lines
    with pytest.raises(BadOptions, match="workers 0"):
        run_training(RECIPE, data=None, work_dir=tmp_path / "run", workers=0)


def test_command_tells_errors_in_a_line(tmp_path, capsys):
    assert main(["nothing", "--work-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: recipe 'nothing' does not exist")
    row = STHV1.name
    assert main([row, "--work-dir", str(tmp_path / "run"), "--data", str(tmp_path / "none"), "--gpus", "0"]) == 2
    assert "none is no folder" in capsys.readouterr().err.replace("/sthv1", "")
    assert TRAINING.init == "none"


def test_command_rehearses(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, RECIPE.name, RECIPE)
    words = [RECIPE.name, "--work-dir", str(tmp_path), "--gpus", "0", "--loaders", "0", "--workers", "2"]
    assert main([*words, "--dry-run"]) == 0
    assert "memory of a worker" in capsys.readouterr().out
    assert main([*words, "--profile"]) == 0
    assert "bottleneck: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["first_batch.png"]
    assert main([*words[:-2], "--epochs", "1"]) == 0
    assert "best.safetensors: 3 steps in" in capsys.readouterr().out
