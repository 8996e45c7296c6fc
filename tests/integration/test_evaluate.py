"""Evaluation with real processes: Ray workers, kills, data sets from their annotations, real clips."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipelines.datasets import VideoRecord
from pipelines.evaluate import evaluate
from pipelines.ray_local import ray_session
from pipelines.scoring import Videos
from tsm_core.checkpoints import load_model, save_model
from tsm_core.model import build
from tsm_core.preprocess import PreprocessSpec
from tsm_core.recipes import Recipe, Views

CENTER = Views(crop_px=48)
TINY = Recipe(
    "tiny",
    backbone="resnet_small",
    shift="uni",
    labels=("a", "b", "c", "d", "e", "f"),
    frames=4,
    shift_div=4,
    preprocess=PreprocessSpec(input_px=48, resize_px=56),
)


@pytest.fixture(autouse=True)
def _single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file."""
    torch.manual_seed(1)
    model = build(TINY)
    torch.nn.init.normal_(model.net.fc.weight, std=1.0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(path, model)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    """Sixty folders of eight frames, one of them empty."""
    root = tmp_path_factory.mktemp("folders")
    dice = np.random.default_rng(0)
    records = []
    for number in range(60):
        folder = root / f"{number:02}"
        folder.mkdir()
        for frame in range(1, 9) if number != 17 else ():
            noise = dice.integers(0, 256, (7, 9, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((90, 70)).save(folder / f"img_{frame:05}.jpg")
        records.append(VideoRecord(folder.name, number % 6, 8))
    return Videos(tuple(records), root)


# ---- Ray


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    """Ray on this machine, once for the tests of this file."""
    with ray_session("local", cpus=4, gpus=0) as ray:
        yield ray


def workers() -> list[psutil.Process]:
    """Processes of Ray that are at work for us."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Worker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def doors() -> set[str]:
    """Addresses that our child processes listen on."""
    return {
        door.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process().children(recursive=True)
        for door in process.net_connections("tcp")
        if door.status == psutil.CONN_LISTEN
    }


def test_workers_equal_one_process_though_one_is_killed(ray, tiny, folders):
    load = partial(load_model, tiny)
    alone = evaluate(load, TINY, folders, CENTER, batch=2, loaders=0, device="cpu")
    assert alone[17].error is not None
    killed: list[int] = []
    open_doors: set[str] = set()
    told = []

    def kill(done, total, facts):
        told.append((done, total))
        if done >= 10 and not killed:
            open_doors.update(doors())
            victim = workers()[0]
            killed.append(victim.pid)
            victim.kill()

    shared = evaluate(load, TINY, folders, CENTER, batch=2, workers=2, on_progress=kill)
    assert shared == alone
    assert killed
    assert open_doors == {"127.0.0.1"}
    assert told[-1] == (60, 60)
    until = time.monotonic() + 10
    while workers() and time.monotonic() < until:
        time.sleep(0.1)
    assert not workers()
