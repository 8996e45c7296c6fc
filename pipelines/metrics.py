"""How good a test was: accuracies, the confusion matrix and a row per class, from ranked classes.

A ranking is (N, k) class indices, best first, one row per video. With predictions of the first rank alone, k is 1.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsm_core.errors import ShapeError
from tsm_core.labels import Convention

Ints = NDArray[np.int64]

NOTHING = "no predictions: a metric needs at least one"


def ranking(scores: ArrayLike, k: int = 5) -> Ints:
    """(N, min(k, K)) classes by falling score of (N, K) scores; of two equal scores the later class goes first."""
    table = np.asarray(scores)
    if table.ndim != 2:
        raise ShapeError(f"scores must be (N, K), got {table.shape}")
    ascending = np.argsort(table, axis=1, kind="stable")  # the last k count, as in MMAction2
    return ascending[:, ::-1][:, :k].astype(np.int64)


def top_k_accuracy(ranks: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Share of videos whose true class is among their first k; all of them once k reaches the number of classes."""
    first, truth = np.asarray(ranks)[:, :k], np.asarray(labels)
    _check(len(first), len(truth))
    return float((first == truth[:, None]).any(axis=1).mean())


def confusion_matrix(predicted: ArrayLike, labels: ArrayLike, classes: int) -> Ints:
    """(K, K) counts: row the true class, column the predicted one."""
    guess, truth = np.asarray(predicted, np.int64), np.asarray(labels, np.int64)
    _check(len(guess), len(truth))
    return np.bincount(truth * classes + guess, minlength=classes * classes).reshape(classes, classes)


def mean_class_accuracy(confusion: Ints, convention: Convention = "mmaction2") -> float:
    """Mean over classes of the share of their videos that were recognised.

    Over the classes that occur: as truth or as prediction, where one that was only predicted counts 0 (mmaction2), or
    as truth (mit).
    """
    per_class, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    occurs = (per_class > 0) | (predicted > 0) if convention == "mmaction2" else per_class > 0
    if not occurs.any():
        raise ShapeError(NOTHING)
    hits = np.diagonal(confusion)[occurs]
    return float((hits / np.maximum(per_class[occurs], 1)).mean())


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class: videos of it, those recognised, and what it is most often taken for (None: nothing else)."""

    index: int
    label: str
    videos: int
    correct: int
    taken_for: str | None
    times: int

    @property
    def accuracy(self) -> float | None:
        """Share recognised; None for a class without videos."""
        return self.correct / self.videos if self.videos else None


def class_scores(confusion: Ints, labels: Sequence[str]) -> list[ClassScore]:
    """A ClassScore per class, in the order of the classes."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    worst = wrong.argmax(axis=1)
    rows = []
    for index, label in enumerate(labels):
        times = int(wrong[index, worst[index]])
        taken_for = labels[worst[index]] if times else None
        rows.append(
            ClassScore(index, label, int(confusion[index].sum()), int(confusion[index, index]), taken_for, times)
        )
    return rows


def class_table(rows: Sequence[ClassScore], *, markdown: bool = False) -> str:
    """The rows as CSV with a heading, or as a table of Markdown; percentages with two decimals."""
    heading = ("class", "label", "videos", "correct", "accuracy", "taken for", "times")
    cells = [
        (
            str(row.index),
            row.label,
            str(row.videos),
            str(row.correct),
            "" if row.accuracy is None else f"{100 * row.accuracy:.2f}",
            row.taken_for or "",
            str(row.times or ""),
        )
        for row in rows
    ]
    if markdown:
        lines = [heading, ("---:", "---", "---:", "---:", "---:", "---", "---:"), *cells]
        return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heading, *cells])
    return text.getvalue()


def _check(predictions: int, labels: int) -> None:
    if predictions != labels:
        raise ShapeError(f"{predictions} predictions for {labels} labels")
    if not labels:
        raise ShapeError(NOTHING)
