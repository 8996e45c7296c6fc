from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.prepare import prepare
from tests.assets.make import make_miniature
from tests.integration.ray_kit import Cluster, ray_cluster
from tests.unit.pipelines.training_kit import checkpoint


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ray_cluster() as found:
        yield found


@pytest.mark.timeout(600)
def test_jobs_are_submitted_followed_stopped_and_go_on(tmp_path, cluster):
    """What `docs` tell people to type, against a cluster on loopback; the code comes with the job."""
    make_miniature("kinetics400", tmp_path, videos_per_class=2)
    prepare("kinetics400", tmp_path)
    code = tmp_path / "code"
    for package in ("pipelines", "tsm_core"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(Path(__file__).parents[2] / package, code / package, ignore=ignored)
    row, place = "tsm_mobilenetv2_dense_1x1x8_100e_kinetics400_rgb_uni", tmp_path / "run"
    entry = [sys.executable, "-m", "pipelines.train", row, "--data", str(tmp_path), "--work-dir", str(place)]
    entry += ["--ray", "--gpus", "0", "--px", "32", "--batch", "1", "--init", "none", "--validate", "0"]
    entry += ["--loaders", "1"]

    def submit(name: str, *more: str) -> None:
        said = cluster.job(
            "submit", "--submission-id", name, "--no-wait", "--working-dir", str(code), "--", *entry, *more
        )
        assert said.returncode == 0, said.stdout + said.stderr

    submit("first")
    lines = cluster.follow("first", lambda line: line.startswith("epoch 1/100 done"))
    assert lines[-1].startswith("epoch 1/100 done"), lines
    assert any("begins with random weights" in line for line in lines)
    assert "RUNNING" in cluster.job("status", "first").stdout
    assert "'first' was stopped" in cluster.job("stop", "first").stdout
    assert "'first' was stopped" in cluster.job("status", "first").stdout
    there = checkpoint(place)["progress"]
    assert there["epoch"] >= 1

    # not in Ray's workers but in the job's own process, with one that reads ahead: stop means both
    entry.remove("--ray")
    submit("second")
    again = cluster.follow("second", lambda line: line.startswith(f"epoch {there['epoch'] + 2}/100 done"))
    assert any(f"goes on at epoch {there['epoch'] + 1}, step {there['step'] + 1}" in line for line in again), again
    assert "'second' was stopped" in cluster.job("stop", "second").stdout
    assert any("goes on from there" in line for line in cluster.job("logs", "second").stdout.splitlines())
    before, there = there, checkpoint(place)["progress"]
    assert there["epoch"] >= before["epoch"] + 2

    submit("third", "--steps", str(6 * there["epoch"] + there["step"] + 2))
    lines = cluster.follow("third", lambda line: "steps in" in line)
    assert any(f"goes on at epoch {there['epoch'] + 1}, step {there['step'] + 1}" in line for line in lines), lines
    deadline_s = time.monotonic() + 30
    while "'third' succeeded" not in cluster.job("status", "third").stdout:
        assert time.monotonic() < deadline_s
    assert checkpoint(place)["progress"]["epoch"] >= there["epoch"]
    assert (place / "last.safetensors").is_file()
