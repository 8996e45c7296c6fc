"""Two steps of every row of the page on its miniature data set: at 64 px, in small batches, else as the row says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from pipelines.augment import ClipAugment
from pipelines.init_weights import imagenet_url, init_model
from pipelines.learner import Learning
from pipelines.optim import lr_share
from pipelines.prepare import prepare
from pipelines.study import Team
from pipelines.training_job import Options, new_job
from tests.assets.make import make_miniature
from tsm_core.checkpoints import save_model
from tsm_core.model import build
from tsm_core.recipes import PAGE_ROWS, RECIPES, Recipe

PX, BATCH = 64, 2
FACTORS = {  # of learning rate and weight decay
    "first_conv_weight": (1, 1),
    "normal_weight": (1, 1),
    "normal_bias": (2, 0),
    "bn": (1, 0),
    "fc_weight": (5, 1),
    "fc_bias": (10, 0),
}
AUGMENTATIONS = {"none": [], "imgaug_randaugment": ["imgaug_randaugment"], "ptv_randaugment": ["ptv_randaugment"]}
AUGMENTATIONS["ptv_augmix"] = ["ptv_augmix"]


def _rows() -> Iterator[Any]:
    """All rows; those that train what an earlier one trains, on other frames or for longer, in the slow tier."""
    seen = set()
    for row in PAGE_ROWS:
        training = row.training
        assert training is not None
        kind = (row.dataset, row.backbone, row.non_local, training.augment, training.blend, training.flip)
        yield pytest.param(row, id=row.name, marks=[pytest.mark.slow] if kind in seen else [])
        seen.add(kind)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for dataset in sorted({row.dataset for row in PAGE_ROWS}):
        make_miniature(dataset, root, videos_per_class=2)
        prepare(dataset, root)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random weights in the files that the rows begin with."""
    models = tmp_path_factory.mktemp("models")
    (models / "checkpoints").mkdir()
    for init in {row.training.init for row in PAGE_ROWS}:
        if init in RECIPES:
            save_model(models / f"{init}.safetensors", build(RECIPES[init]))
        else:
            name = imagenet_url(init).rpartition("/")[2]
            torch.save(getattr(torchvision.models, init)().state_dict(), models / "checkpoints" / name)
    return models


@pytest.mark.parametrize("row", _rows())
def test_two_steps(row: Recipe, root: Path, models: Path):
    training = row.training
    assert training is not None
    options = Options(px=PX, batch=BATCH, loaders=0, models_dir=str(models))
    learning = Learning(new_job(row, root, "nowhere", options), Team(say=print))
    began = init_model(learning.model, models_dir=models)
    assert "random" not in began
    assert ("classifier replaced" if training.init in RECIPES else "new classifier") in began
    learning.prepare()
    total = BATCH
    assert learning.lr == pytest.approx(training.lr * total / training.lr_batch)

    batches = list(islice(learning.batches(), 2))
    assert batches[0].pixels.shape == (BATCH, row.frames, 3, PX, PX)
    for number, batch in enumerate(batches):
        lr = learning.lr * lr_share(training, 0, number, learning.order.steps)
        facts = learning.step([batch], 0, number, lr)
        assert not facts.bad
        assert math.isfinite(facts.loss)
        assert facts.clips == BATCH

    groups = {group["name"]: group for group in learning.optimiser.param_groups}
    assert set(groups) == set(FACTORS) - (set() if row.non_local not in (None,) else {"normal_bias"})
    for name, group in groups.items():
        lr_factor, decay_factor = FACTORS[name]
        assert group["lr"] == pytest.approx(lr * lr_factor), name
        assert group["weight_decay"] == pytest.approx(training.weight_decay * decay_factor), name
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, False, 0)

    augment = ClipAugment(training, row.preprocess)
    jester = row.dataset == "jester"
    first = ["random_resized_crop"] if jester else ["resize_short_side", "multi_scale_crop"]
    flip = ["flip"] if training.flip else []
    assert list(augment.steps) == [*first, "resize_fixed", *flip, *AUGMENTATIONS[training.augment]]
    clip, label = learning.data.train.clip(0, np.random.default_rng(0))
    assert clip.shape[0] == row.frames
    assert label < len(row.labels)
