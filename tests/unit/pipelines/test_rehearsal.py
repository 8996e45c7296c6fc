from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.decoding import UnreadableVideo
from pipelines.rehearsal import dry_run, profile
from pipelines.training_data import OPENERS, TrainingData
from tests.unit.pipelines.training_kit import RECIPE, Moving, moving_job, with_training
from tsm_core.cost import parameters


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_dry_run_tells_recipe_batch_memory_and_time(tmp_path):
    lines: list[str] = []
    found = dry_run(moving_job(tmp_path, accumulate=2), workers=2, say=lines.append)
    text = "\n".join(lines)
    assert 'backbone: "resnet_small"' in text
    assert "moving_uni begins with random weights" in text
    assert '"epochs": 2' in text
    assert (found.total_batch, found.steps_per_epoch) == (16, 1)
    assert found.learning_rate == pytest.approx(0.02 * 16 / 8)
    count = parameters(RECIPE)
    assert found.parameters_bytes == found.momentum_bytes == 4 * count
    # at least the input of the first layer and the output of each convolution of 8 x 4 frames
    assert found.activations_bytes > 4 * 4 * 32 * 32 * 3 * 4
    assert found.peak_bytes is None
    assert found.total_s == pytest.approx(found.epoch_s * 2)
    assert found.labels[0] in ("0 right", "1 left")
    sheet = Image.open(found.picture)
    assert sheet.size == (4 * 98, 4 * (96 + 24))
    assert len(np.unique(np.asarray(sheet))) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["first_batch.png"], "nothing to go on from"


def test_activations_grow_with_the_batch(tmp_path):
    small, large = (dry_run(moving_job(tmp_path, batch=batch), say=lambda _: None) for batch in (2, 4))
    assert large.activations_bytes / small.activations_bytes == pytest.approx(2, abs=0.1)


def test_dry_run_goes_on_without_initial_weights(tmp_path):
    lines: list[str] = []
    dry_run(moving_job(tmp_path, with_training(init="resnet50"), models_dir=str(tmp_path)), say=lines.append)
    assert lines[0].startswith("the training would not begin: the ImageNet weights of resnet50")


class Slow(Moving):
    """Data that takes its time."""

    def clip(self, index: int, rng: np.random.Generator) -> Any:
        time.sleep(0.05)
        return super().clip(index, rng)


def test_profile_names_the_slower_part(tmp_path, monkeypatch):
    monkeypatch.setitem(OPENERS, "moving", lambda recipe, root, clips: TrainingData(Slow(10, 4), Moving(6, 4)))
    lines: list[str] = []
    found = profile(moving_job(tmp_path), steps=4, say=lines.append)
    assert found.bottleneck == "data"
    assert found.data < found.compute
    assert found.together <= found.data * 1.1
    assert "--loaders" in lines[-1]
    monkeypatch.undo()
    slow = replace(RECIPE, backbone="mobilenet_v2")
    assert profile(moving_job(tmp_path, slow), steps=3, say=lines.append).bottleneck == "compute"


def test_rehearsals_tell_what_is_wrong_with_the_data(tmp_path, monkeypatch):
    bad = Moving(4, 4, bad=(0, 1, 2, 3))
    monkeypatch.setitem(OPENERS, "moving", lambda recipe, root, clips: TrainingData(bad, Moving(6, 4)))
    job = moving_job(tmp_path, on_error="raise")
    with pytest.raises(UnreadableVideo):
        dry_run(job, say=lambda _: None)
    with pytest.raises(UnreadableVideo):
        profile(job, say=lambda _: None)
