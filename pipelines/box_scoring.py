"""How well a detector does on videos: COCO's average precision, ImageNet VID's with its speeds, and who is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from pipelines.box_data import Bools, Ints, Objects
from pipelines.box_metrics import RIGHT, WRONG, Found, Reals, area, match, motion
from tsm_core.errors import CallerError

SLOW, FAST = 0.9, 0.7  # motion IoU above, below

Choose = Callable[[Objects, Reals], Bools | None]
"""Objects of a frame and their motion -> which of them (M,) are to be found; None: the frame is left out."""


def every(objects: Objects, _: Reals) -> Bools:
    """All objects."""
    return np.ones(len(objects), np.bool_)


def slow(_: Objects, moves: Reals) -> Bools:
    """Objects that overlap themselves, in the frames up to 10 away, by more than 0.9."""
    found: Bools = moves > SLOW
    return found


def medium(_: Objects, moves: Reals) -> Bools:
    """Between slow and fast."""
    found: Bools = (moves >= FAST) & (moves <= SLOW)
    return found


def fast(_: Objects, moves: Reals) -> Bools:
    """Objects that overlap themselves by less than 0.7."""
    found: Bools = moves < FAST
    return found


SPEEDS: Mapping[str, Choose] = {"all": every, "slow": slow, "medium": medium, "fast": fast}


class BadComparison(CallerError):
    """Two results that are not of the same videos."""

    reason = "bad_comparison"


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """One video: what is on each of its frames, and what was found there."""

    name: str
    objects: Sequence[Objects]
    found: Sequence[Found]

    def __post_init__(self) -> None:
        if len(self.objects) != len(self.found):
            raise BadComparison(f"{self.name}: {len(self.found)} frames were judged of {len(self.objects)}")


# --- VID


@dataclass(frozen=True, slots=True, eq=False)
class _Class:
    """Detections of one class of all videos, in falling order of their scores, and objects (V,) of each video."""

    right: Bools
    wrong: Bools
    video: Ints
    objects: Reals

    def precision(self, times: Reals) -> float:
        """Average precision where video v counts times[v] times."""
        objects = float(self.objects @ times)
        if not objects > 0:
            return math.nan
        weight = times[self.video]
        return area(self.right * weight, self.wrong * weight, objects)


class VideoPrecision:
    """Average precision by ImageNet VID's rule, over the videos that are added; `choose` says what is to be found."""

    def __init__(self, classes: int, choose: Choose = every) -> None:
        self._classes, self._choose = classes, choose
        self._scores: list[Reals] = []
        self._verdicts: list[NDArray[np.int8]] = []
        self._labels: list[Ints] = []
        self._objects: list[Reals] = []  # of each class, a row a video
        self._lengths: list[int] = []  # detections of each video

    def add(self, video: Judged, moves: Sequence[Reals] | None = None) -> None:
        """Match one more video; moves: its `motion`, where it is known already."""
        counts, length = np.zeros(self._classes), 0
        for objects, found, each in zip(video.objects, video.found, moves or motion(video.objects), strict=True):
            counted = self._choose(objects, each)
            if counted is None:
                continue
            np.add.at(counts, objects.labels[counted & ~objects.ignore], 1)
            verdicts = match(objects, counted, found)
            self._scores.append(found.scores.astype(np.float64))
            self._verdicts.append(verdicts)
            self._labels.append(found.labels)
            length += len(found)
        self._objects.append(counts)
        self._lengths.append(length)

    @property
    def objects(self) -> int:
        """How many are to be found."""
        return int(np.sum(self._objects))

    def _sorted(self) -> list[_Class]:
        empty: list[Any] = [np.empty(0)]
        scores = np.concatenate(self._scores or empty)
        verdicts = np.concatenate(self._verdicts or empty)
        labels = np.concatenate(self._labels or empty)
        videos = np.repeat(np.arange(len(self._lengths)), self._lengths)
        order = np.argsort(-scores, kind="stable")
        verdicts, labels, videos = verdicts[order], labels[order], videos[order]
        objects = np.stack(self._objects) if self._objects else np.zeros((0, self._classes))
        found = []
        for label in range(self._classes):
            mine = labels == label
            verdict = verdicts[mine]
            found.append(_Class(verdict == RIGHT, verdict == WRONG, videos[mine], objects[:, label]))
        return found

    def per_class(self) -> list[float]:
        """Average precision of each class; NaN: it is on no frame."""
        times = np.ones(len(self._lengths))
        return [each.precision(times) for each in self._sorted()]

    def mean(self) -> float:
        """The mean over the classes that are there; NaN: none is."""
        return _mean(self.per_class())

    def resampled(self, draws: NDArray[np.int64]) -> Reals:
        """The mean for other videos: a figure for each row of draws (D, V), which are numbers of videos."""
        classes = self._sorted()
        times = [np.bincount(row, minlength=len(self._lengths)).astype(np.float64) for row in draws]
        return np.array([_mean([each.precision(weights) for each in classes]) for weights in times])

    @property
    def videos(self) -> int:
        """How many were added."""
        return len(self._lengths)


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


@dataclass(frozen=True, slots=True)
class Gap:
    """How much better one detector is than another on the same videos: in points, with a 95 % interval over videos."""

    one: float
    other: float
    gap: float
    low: float
    high: float
    samples: int
    videos: int


def compare(one: VideoPrecision, other: VideoPrecision, *, samples: int = 1000, seed: int = 0) -> Gap:
    """Paired bootstrap: both detectors are judged on the same videos, drawn anew with replacement `samples` times.

    The interval tells of the choice of videos alone, not of the training's luck. In shares, not per cent.
    Raises BadComparison.
    """
    if one.videos != other.videos or one.objects != other.objects:
        raise BadComparison(
            f"{one.videos} videos of {one.objects} objects against {other.videos} of {other.objects}; "
            "both must be of the same videos, in the same order"
        )
    draws = np.random.default_rng(seed).integers(0, max(one.videos, 1), (samples, one.videos))
    gaps = one.resampled(draws) - other.resampled(draws)
    gaps = gaps[~np.isnan(gaps)]
    low, high = np.percentile(gaps, [2.5, 97.5]).tolist() if len(gaps) else (math.nan, math.nan)
    first, second = one.mean(), other.mean()
    return Gap(first, second, first - second, low, high, samples, one.videos)


# --- COCO

COCO_FIGURES = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}


@dataclass
class CocoPrecision:
    """COCO's average precision of the frames that are added, by faster-coco-eval."""

    labels: Sequence[str]
    _truths: list[dict[str, Any]] = field(default_factory=list)
    _found: list[Reals] = field(default_factory=list)
    _frames: int = 0

    def add(self, video: Judged) -> None:
        """One more video. What is ignored counts as a crowd; if it is of any class, as one of each."""
        for objects, found in zip(video.objects, video.found, strict=True):
            self._frames += 1
            for box, label, ignore in zip(objects.boxes, objects.labels.tolist(), objects.ignore, strict=True):
                for one in range(len(self.labels)) if label < 0 else (label,):
                    self._truths.append(self._truth(box.astype(np.float64), one, bool(ignore)))
            if len(found):
                sides = found.boxes[:, 2:] - found.boxes[:, :2]
                numbers = np.full((len(found), 1), self._frames)
                self._found.append(
                    np.hstack([numbers, found.boxes[:, :2], sides, found.scores[:, None], found.labels[:, None] + 1.0])
                )

    def _truth(self, box: Reals, label: int, ignore: bool) -> dict[str, Any]:
        x1, y1, x2, y2 = box.tolist()
        return {
            "id": len(self._truths) + 1,
            "image_id": self._frames,
            "category_id": label + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": int(ignore),
        }

    def figures(self) -> dict[str, float]:
        """AP, AP50 and their kin by COCO_FIGURES; NaN where there is nothing to be found."""
        if not any(not truth["iscrowd"] for truth in self._truths):
            return dict.fromkeys(COCO_FIGURES, math.nan)
        truth = COCO(
            {
                "info": {},
                "images": [{"id": number + 1} for number in range(self._frames)],
                "categories": [{"id": number + 1, "name": label} for number, label in enumerate(self.labels)],
                "annotations": self._truths,
            }
        )
        found = truth.loadRes(np.vstack(self._found) if self._found else [])
        judge = COCOeval_faster(truth, found, "bbox", print_function=lambda *_: None)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        stats = [float(value) for value in judge.stats]
        return {name: math.nan if stats[at] < 0 else stats[at] for name, at in COCO_FIGURES.items()}


# --- all


def score(
    videos: Iterable[Judged], labels: Sequence[str], chosen: Mapping[str, Choose] = SPEEDS
) -> tuple[dict[str, float], dict[str, VideoPrecision]]:
    """Figures as shares, and the precisions by which two detectors can be compared.

    The figures: `vid_NAME` for each name of chosen (`vid_all` is ImageNet VID's AP50), and COCO's as `coco_ap` and so
    on. NaN: there was nothing to be found.
    """
    coco = CocoPrecision(labels)
    precisions = {name: VideoPrecision(len(labels), choose) for name, choose in chosen.items()}
    for video in videos:
        moves = motion(video.objects)
        coco.add(video)
        for precision in precisions.values():
            precision.add(video, moves)
    figures = {f"vid_{name}": precision.mean() for name, precision in precisions.items()}
    return figures | {f"coco_{name}": value for name, value in coco.figures().items()}, precisions
