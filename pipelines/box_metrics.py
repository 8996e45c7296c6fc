"""Figures of boxes: how they overlap, how fast objects move, what counts as found, average precision.

The rule is that of ImageNet VID: an object is found by the first detection of its class, best score first, that
overlaps it by its own threshold min(0.5, wh / ((w + 10)(h + 10))), which lets small boxes be some 10 px off; widths and
heights count a pixel more than x2 - x1. Objects that are not counted (ignored ones, those of another speed) are
ignored plainly: a detection that finds no counted object and overlaps one of these is neither right nor wrong, however
many do; every other is wrong. So figures of a speed differ from those that weigh a wrong detection by the speeds
around it, as the code of FGFA does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.box_data import UNKNOWN, BadBoxes, Bools, Floats, Ints, Objects

PIXEL = 1.0  # VID's boxes end on their last pixel
TOLERANCE_PX = 10.0
MOST_IOU = 0.5
REACH = 10  # frames to both sides, for motion
RIGHT, WRONG, FREE = 1, 0, -1

Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a detector found on one frame: boxes (M, 4) xyxy in pixels of the frame, scores (M,), labels (M,)."""

    boxes: Floats
    scores: Floats
    labels: Ints

    def __post_init__(self) -> None:
        shapes = self.boxes.shape, self.scores.shape, self.labels.shape
        count = len(self.scores)
        if shapes != ((count, 4), (count,), (count,)):
            raise BadBoxes(f"boxes, scores and labels have shapes {shapes}; M boxes need M of each")
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise BadBoxes("a detection that is no number; the weights have diverged", reason="not_finite")

    def __len__(self) -> int:
        return len(self.scores)


def overlaps(one: Floats, other: Floats, pixel: float = PIXEL) -> Reals:
    """IoU (N, M) of boxes (N, 4) and (M, 4); `pixel` is what widths have more than x2 - x1."""
    a, b = one[:, None].astype(np.float64), other[None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + pixel
    common = sides.clip(0).prod(2)
    area = (a[..., 2:] - a[..., :2] + pixel).prod(2) + (b[..., 2:] - b[..., :2] + pixel).prod(2)
    found: Reals = common / (area - common)
    return found


def thresholds(boxes: Floats) -> Reals:
    """The overlap (M,) from which a detection finds each object."""
    sides = (boxes[:, 2:] - boxes[:, :2] + PIXEL).astype(np.float64)
    found: Reals = np.minimum(MOST_IOU, sides.prod(1) / (sides + TOLERANCE_PX).prod(1))
    return found


def motion(frames: Sequence[Objects], reach: int = REACH) -> list[Reals]:
    """Of each object of each frame: the mean IoU with itself in the frames up to `reach` before and after.

    NaN: nobody followed it, or it is in no other frame near by.
    """
    places: dict[int, dict[int, int]] = defaultdict(dict)  # track -> frame -> number on it
    for at, objects in enumerate(frames):
        for number, track in enumerate(objects.tracks.tolist()):
            if track != UNKNOWN:
                places[track][at] = number
    found = [np.full(len(objects), np.nan) for objects in frames]
    for track in places.values():
        times = np.array(sorted(track))
        boxes = np.stack([frames[at].boxes[track[at]] for at in times.tolist()])
        for number, at in enumerate(times.tolist()):
            first, last = np.searchsorted(times, [at - reach, at + reach + 1])
            near = np.delete(np.arange(first, last), number - first)
            if len(near):
                found[at][track[at]] = overlaps(boxes[number : number + 1], boxes[near]).mean()
    return found


def match(objects: Objects, counted: Bools, found: Found) -> NDArray[np.int8]:
    """Of each detection (M,), in their order: RIGHT, WRONG or FREE. counted: which objects are to be found."""
    verdict = np.full(len(found), WRONG, np.int8)
    if not len(found) or not len(objects):
        return verdict
    limits = thresholds(objects.boxes)
    fits = overlaps(found.boxes, objects.boxes)
    near = fits >= limits
    same = found.labels[:, None] == objects.labels[None]
    open_ = counted & ~objects.ignore
    spare = near & (same | (objects.labels == UNKNOWN)[None]) & ~open_[None]
    wanted = near & same & open_[None]
    for number in np.argsort(-found.scores, kind="stable").tolist():
        if wanted[number].any():
            best = int(np.where(wanted[number], fits[number], -1.0).argmax())
            wanted[:, best] = False
            verdict[number] = RIGHT
        elif spare[number].any():
            verdict[number] = FREE
    return verdict


def area(right: Reals, wrong: Reals, objects: float) -> float:
    """Average precision of detections in falling order of their scores, as so many right and so many wrong each.

    That is the area under precision over recall, at all points, with precision made monotone.
    """
    hits = np.cumsum(right)
    told = hits + np.cumsum(wrong)
    precision = np.divide(hits, told, out=np.zeros_like(hits), where=told > 0)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * right).sum() / objects)
