from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipelines.prepare import prepare
from pipelines.ray_local import ray_session
from pipelines.train import TrainingFailed, run_training
from pipelines.training_data import NoData
from pipelines.training_job import Options, TrainResult
from tests.assets.make import make_miniature
from tests.unit.pipelines.training_kit import checkpoint
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import RECIPES, Recipe, Views

SIDE = 32
STHV1 = RECIPES["tsm_r50_1x1x8_50e_sthv1_rgb_uni"]
EXACT = Options(batch=2, deterministic=True, loaders=0, models_dir="nowhere", say_every_s=0.0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_miniature("sthv1", root, videos_per_class=4)
    prepare("sthv1", root)
    return root


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
        with ray_session("local", cpus=4) as ray:
            yield ray


def small(epochs: int, dropout: float = 0.0) -> Recipe:
    """A row's training of a network that a step takes milliseconds of."""
    assert STHV1.training is not None
    training = replace(
        STHV1.training, epochs=epochs, milestones=(epochs // 2,), lr=0.16, init="none", validate_epochs=epochs // 2
    )
    return replace(
        STHV1,
        name="small_uni",
        backbone="resnet_small",
        frames=4,
        dropout=dropout,
        preprocess=PreprocessSpec(input_px=SIDE, resize_px=36),
        efficient=Views(crop_px=SIDE),
        accurate=Views(crop_px=SIDE),
        training=training,
    )


def run(recipe: Recipe, root: Path, place: Path, workers: int, say: Any = None, **changes: Any) -> TrainResult:
    options = replace(EXACT, **changes)
    lines: list[str] = []
    return run_training(
        recipe, data=root, work_dir=place, options=options, workers=workers, gpus=0, say=say or lines.append
    )


def test_two_workers_equal_one_that_accumulates(root, tmp_path, ray_here):
    """Parameters after three steps, to 1e-5; each worker's running statistics are of its own clips."""
    recipe = small(epochs=2)
    run(recipe, root, tmp_path / "two", 2, steps=3)
    run(recipe, root, tmp_path / "one", 1, steps=3, accumulate=2)
    two, one = checkpoint(tmp_path / "two")["model"], checkpoint(tmp_path / "one")["model"]
    parameters = [name for name in one if "running" not in name and "tracked" not in name]
    largest = max(float((one[name] - two[name]).abs().max()) for name in parameters)
    assert largest < 1e-5
    run(recipe, root, tmp_path / "none", 1, steps=3)
    other = checkpoint(tmp_path / "none")["model"]
    assert max(float((one[name] - other[name]).abs().max()) for name in parameters) > 1e-3


def train_workers() -> list[psutil.Process]:
    """Ray Train's worker processes below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.slow
def test_killed_worker_costs_what_came_after_the_checkpoint(root, tmp_path, ray_here):
    """On a CPU, with deterministic algorithms, the end is that of an undisturbed training to the bit."""
    recipe, killed = small(epochs=16, dropout=0.5), []
    undisturbed = run(recipe, root, tmp_path / "whole", 2)

    def kill_one(line: str) -> None:
        lines.append(line)
        if line.startswith("epoch 5/16 done") and not killed:
            killed.extend(train_workers()[-1:])
            killed[0].send_signal(signal.SIGKILL)

    lines: list[str] = []
    disturbed = run(recipe, root, tmp_path / "killed", 2, kill_one)
    assert killed, "there was a worker to kill"
    (again,) = [line for line in lines if "goes on at epoch" in line]
    assert 6 <= int(again.split("epoch ")[1].split(",")[0]) <= 16
    assert disturbed.steps == undisturbed.steps
    for name in ("val_loss", "top1", "top5", "mean_class", "loss"):
        assert disturbed.last[name] == undisturbed.last[name], name
    whole, parts = checkpoint(tmp_path / "whole")["model"], checkpoint(tmp_path / "killed")["model"]
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.slow
def test_errors_of_workers_are_told_as_they_are(tmp_path, ray_here):
    began_s = time.monotonic()
    with pytest.raises(NoData, match="Get it"):
        run(small(epochs=2), tmp_path / "nothing", tmp_path / "run", 2)
    assert time.monotonic() - began_s < 60


def test_more_gpus_than_there_are(root, tmp_path, ray_here):
    if torch.cuda.is_available():
        pytest.skip("there are GPUs")
    with pytest.raises(Exception, match="2 workers with a GPU each, and there are 0"):
        run_training(small(epochs=2), data=root, work_dir=tmp_path, options=EXACT, workers=2, gpus=1)
    assert TrainingFailed.reason == "training_failed"


# --- signals


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_to_all_its_processes_ends_a_training_in_order(tmp_path, number):
    """As a terminal, a container and `ray job stop` send it; the processes that read ahead are hit as well."""
    entry = [sys.executable, "-m", "pipelines.train", "motion8_tsm", "--work-dir", str(tmp_path)]
    entry += ["--gpus", "0", "--validate", "0", "--loaders", "2"]
    process = subprocess.Popen(entry, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    killer = threading.Timer(150, process.kill)
    killer.start()
    try:
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                break
        readers = psutil.Process(process.pid).children()
        os.killpg(process.pid, number)
        _, errors = process.communicate()
    finally:
        killer.cancel()
    assert (process.returncode, len(readers)) == (3, 2), errors
    assert "reason: interrupted" in errors
    assert "goes on from there" in errors
    assert not psutil.wait_procs(readers, timeout=10)[1]
    there = checkpoint(tmp_path)["progress"]
    assert (there["epoch"], there["step"]) > (0, 0)
    again = subprocess.run([*entry, "--steps", "1"], capture_output=True, text=True, timeout=150)
    assert f"goes on at epoch {there['epoch'] + 1}, step {there['step'] + 1}" in again.stdout, again.stderr
