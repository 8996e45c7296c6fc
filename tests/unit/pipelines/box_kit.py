"""Films with boxes that are drawn as they are asked for, and a detector small enough to train in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.box_data import BoxVideo, Objects
from pipelines.box_sets import BOX_SETS
from pipelines.decoding import UnreadableVideo
from pipelines.training_job import Job, Options, new_job
from tsm_core.detector_recipes import BoxTraining, DetectorRecipe

SIDE, FRAMES = 64, 6


class Blocks:
    """A bright (0) or a dark (1) block that moves over grey; every fifth film is a still image. BoxVideos."""

    labels: tuple[str, ...] = ("bright", "dark")

    def __init__(self, count: int, first: int = 0, bad: tuple[int, ...] = ()) -> None:
        self.identity = f"blocks {count} from {first}"
        self._count, self._first, self._bad = count, first, bad

    def __len__(self) -> int:
        return self._count

    def video(self, index: int) -> BoxVideo:
        if index in self._bad:
            raise UnreadableVideo(f"film {index} is damaged")
        rng = np.random.default_rng(self._first + index)
        frames = 1 if index % 5 == 4 else FRAMES
        label, side = int(rng.integers(2)), int(rng.integers(16, 24))
        place, way = rng.integers(4, SIDE - 28, 2), rng.integers(-1, 2, 2)
        pixels = torch.full((frames, 3, SIDE, SIDE), 120, dtype=torch.uint8)
        objects = []
        for number in range(frames):
            x, y = (place + way * number).tolist()
            pixels[number, :, y : y + side, x : x + side] = 20 if label else 230
            objects.append(Objects.of([[x, y, x + side, y + side]], [label], [0]))
        return BoxVideo.of(f"film {index}", pixels, objects)


BOX_SETS["blocks"] = lambda _, part: Blocks(12) if part == "train" else Blocks(6, first=1000)

TRAINING = BoxTraining(
    epochs=2,
    milestones=(1.5,),
    lr=1e-3,
    batch=4,
    gpus=2,
    warmup_steps=0,
    strides=(1, 2),
    reverse=True,
    colour=0.1,
    freeze_norm=False,
)
RECIPE = DetectorRecipe(
    "blocks_uni",
    "fcos_small",
    Blocks.labels,
    (SIDE, SIDE),
    shift="uni",
    frames=4,
    dataset="blocks",
    training=TRAINING,
)


def blocks_job(work_dir: Path, recipe: DetectorRecipe = RECIPE, **options: Any) -> Job:
    """A job of 2 epochs of 6 steps of 2 films."""
    return new_job(recipe, None, work_dir, Options(**{"loaders": 0, **options}), "a command")


def with_training(**changes: Any) -> DetectorRecipe:
    return replace(RECIPE, training=replace(TRAINING, **changes))
