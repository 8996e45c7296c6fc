"""A detector whose finds a test can foresee: a real one, shifted and stepped, that tells of bright paint alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tsm_core.arena import Arena, Slot
from tsm_core.boxes import Boxes
from tsm_core.detector import Dense, TSMDetector
from tsm_core.detector_recipes import MOVING_SHAPES_TSM

EYES = "eyes"
LABELS = ("red", "green", "blue")
WIDTH, HEIGHT = 96, 64  # of the pictures: 3:2 in a square input, so that boxes must be mapped back
Painted = tuple[str, tuple[int, int, int, int]]  # colour, left, top, right, bottom


def painting(*painted: Painted) -> Tensor:
    """uint8 (3, 64, 96): grey with painted boxes, at most one of each colour."""
    image = torch.full((3, HEIGHT, WIDTH), 90, dtype=torch.uint8)
    for colour, (left, top, right, bottom) in painted:
        image[:, top:bottom, left:right] = 0
        image[LABELS.index(colour), top:bottom, left:right] = 255
    return image


class PaintDetector(TSMDetector):
    """The network of `fcos_small` runs as it is; its boxes are where one colour alone is bright."""

    def step(
        self, frames: Tensor, arena: Arena, slots: Sequence[Slot], times_s: Sequence[float] | None = None
    ) -> Dense:
        dense = super().step(frames, arena, slots, times_s)
        self.looked_at = frames
        return dense

    def detect(self, dense: Dense, score_thresh: float | None = None) -> list[Boxes]:
        return [_painted_in(frame) for frame in self.looked_at]


def _painted_in(frame: Tensor) -> Boxes:
    """The box around each colour's bright pixels in a normalised picture (3, h, w)."""
    found = []
    for label in range(3):
        others = [other for other in range(3) if other != label]
        rows, columns = ((frame[label] > 1.5) & (frame[others].amax(dim=0) < 0.0)).nonzero(as_tuple=True)
        if len(rows) >= 4:
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            found.append((label, torch.stack(edges).float()))
    return Boxes(
        torch.stack([box for _, box in found]) if found else torch.empty(0, 4),
        torch.full((len(found),), 0.9),
        torch.tensor([label for label, _ in found], dtype=torch.int64),
    )


@lru_cache
def paint_detector() -> PaintDetector:
    """Ready to serve."""
    torch.manual_seed(0)
    return PaintDetector(replace(MOVING_SHAPES_TSM, name=EYES, labels=LABELS, label_ids=())).eval()
