"""A data set that is drawn as it is asked for, and a network small enough to train in a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.decoding import UnreadableVideo
from pipelines.training_data import OPENERS, ClipOptions, TrainingData
from pipelines.training_job import Job, Options, new_job
from pipelines.work_dir import WorkDir
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import Recipe, Training, Views

SIDE = 32


class Moving:
    """A bright bar that moves right (0) or left (1). bad: videos that cannot be read. labels: others than the true."""

    classes = 2

    def __init__(self, videos: int, frames: int, bad: tuple[int, ...] = (), labels: tuple[int, ...] = (0, 1)) -> None:
        self.identity = f"moving {videos}"
        self._videos, self._frames, self._bad, self._labels = videos, frames, bad, labels

    def __len__(self) -> int:
        return self._videos

    def clip(self, index: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        if index in self._bad:
            raise UnreadableVideo(f"video {index} is damaged")
        frames = torch.full((self._frames, 3, SIDE, SIDE), 40, dtype=torch.uint8)
        start = int(rng.integers(SIDE))
        for number in range(self._frames):
            left = (start + (3 if index % 2 == 0 else -3) * number) % SIDE
            frames[number, :, :, left : left + 5] = 220
        return frames, self._labels[index % 2]


TRAINING = Training(
    epochs=2, milestones=(1,), lr=0.02, lr_batch=8, batch=8, gpus=2, flip=False, init="none", validate_epochs=1
)
RECIPE = Recipe(
    "moving_uni",
    backbone="resnet_small",
    shift="uni",
    labels=("right", "left"),
    frames=4,
    preprocess=PreprocessSpec(input_px=SIDE, resize="exact"),
    dropout=0.5,
    efficient=Views(crop_px=SIDE),
    accurate=Views(crop_px=SIDE),
    dataset="moving",
    training=TRAINING,
)


def open_moving(recipe: Recipe, root: Path | str | None, options: ClipOptions) -> TrainingData:
    return TrainingData(Moving(10, options.frames or recipe.frames), Moving(6, recipe.frames))


OPENERS["moving"] = open_moving


def moving_job(work_dir: Path, recipe: Recipe = RECIPE, **options: Any) -> Job:
    """A job of 2 epochs of 3 steps of 4 videos."""
    options = {"deterministic": True, "loaders": 0, **options}
    return new_job(recipe, None, work_dir, Options(**options), "a command")


def with_training(**changes: Any) -> Recipe:
    return replace(RECIPE, training=replace(TRAINING, **changes))


def checkpoint(place: Path) -> dict[str, Any]:
    """What a training has saved."""
    with WorkDir(place) as folder:
        state = folder.load_checkpoint()
    assert state is not None
    return state
