from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from pipelines.prepare import prepare
from pipelines.ray_local import ENVIRONMENT, ray_session
from pipelines.train import TrainingFailed, run_training
from pipelines.training_data import NoData
from pipelines.training_job import Options, TrainResult
from pipelines.work_dir import WorkDir
from tests.assets.make import make_miniature
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


def checkpoint(place: Path) -> dict[str, Any]:
    with WorkDir(place) as folder:
        state = folder.load_checkpoint()
    assert state is not None
    return state


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


# --- jobs


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Cluster:
    """A Ray cluster of one machine on loopback, and its job commands."""

    def __init__(self, folder: Path) -> None:
        self._folder, port = folder, free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(folder), "GLOO_SOCKET_IFNAME": "lo"}
        self._environment.pop("RAY_ADDRESS", None)
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--port",
            str(free_port()),
        ]
        command += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(port)]
        command += ["--num-cpus", "4", "--num-gpus", "0", "--object-store-memory", str(100 << 20)]
        command += ["--ray-client-server-port", str(free_port()), "--temp-dir", str(folder)]
        command += ["--dashboard-agent-listen-port", str(free_port())]  # there may be other clusters here
        with (folder / "head.log").open("wb") as log:
            self._head = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def ready(self) -> None:
        """Wait until the cluster takes jobs: its node's agent comes up after all else."""
        deadline_s = time.monotonic() + 90
        while self._head.poll() is None and time.monotonic() < deadline_s:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.post(f"{self.url}/api/jobs/", json={"entrypoint": "true"}).is_success:
                    return
            time.sleep(0.5)
        raise AssertionError((self._folder / "head.log").read_text())

    def job(self, *words: str, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
        """`ray job ...`, to its end."""
        return subprocess.run(
            self._command(words), env=self._environment, capture_output=True, text=True, timeout=timeout_s
        )

    def follow(self, name: str, until: Callable[[str], bool], timeout_s: float = 90) -> list[str]:
        """Lines of `ray job logs -f` until one of them is what was waited for."""
        lines: list[str] = []
        process = subprocess.Popen(
            self._command(("logs", "-f", name)), env=self._environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        killer = threading.Timer(timeout_s, process.kill)
        killer.start()
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if until(lines[-1]):
                    break
        finally:
            killer.cancel()
            process.kill()
            process.communicate()
        return lines

    def _command(self, words: tuple[str, ...]) -> list[str]:
        verb, *rest = words
        return [sys.executable, "-m", "ray.scripts.scripts", "job", verb, "--address", self.url, *rest]

    def stop(self) -> None:
        children = psutil.Process(self._head.pid).children(recursive=True) if self._head.poll() is None else []
        self._head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._head.wait(5)
        for process in (*children, self._head):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.kill()
        self._head.wait(10)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="tsm-", dir="/tmp"))
    found = Cluster(folder)
    try:
        found.ready()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(300)
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
