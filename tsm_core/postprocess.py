"""Logits -> probabilities that are smooth in time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tsm_core.errors import CallerError, ShapeError
from tsm_core.recipes import Recipe, SmootherName

if TYPE_CHECKING:
    from torch import Tensor

Row = np.ndarray[Any, np.dtype[np.float64]]


class SmootherMismatch(CallerError):
    """A smoother that does not know the model's labels."""

    reason = "smoother_mismatch"


def new_smoother(recipe: Recipe, name: SmootherName | None = None) -> Smoother | GestureSmoother:
    """The recipe's smoother, or the one of this name. Raises SmootherMismatch."""
    if (name or recipe.smoother) == "gesture":
        return GestureSmoother(recipe.labels)
    return Smoother(recipe.labels, recipe.smoothing_s)


def _row_of(logits: Tensor | Sequence[float], labels: Sequence[str], time_s: float) -> Row:
    """One row of logits (K,). Raises ShapeError when it has another length, ValueError when it is not finite."""
    row = np.asarray(logits if isinstance(logits, Sequence) else logits.tolist(), dtype=np.float64)
    if row.shape != (len(labels),):
        raise ShapeError(f"logits must be ({len(labels)},), got {row.shape}")
    if not np.isfinite(row).all():
        raise ValueError(f"logits at {time_s} s are not finite: {row.tolist()}")
    return row


def _softmax(row: Row) -> Row:
    powers = np.exp(row - row.max())
    shares: Row = powers / powers.sum()
    return shares


class Smoother:
    """Exponential smoothing of softmax probabilities with time constant smoothing_s (0: none).

    It counts seconds, not frames: a result dt after the last one weighs 1 - exp(-dt / smoothing_s). Call `reset`
    after a gap in the video.
    """

    def __init__(self, labels: Sequence[str], smoothing_s: float) -> None:
        self.labels = tuple(labels)
        self.smoothing_s = smoothing_s
        self._values: Row | None = None
        self._time_s = 0.0

    def update(self, logits: Tensor | Sequence[float], time_s: float) -> tuple[float, ...]:
        """Smoothed probabilities, one per label, after one more row of logits (K,) at time_s.

        Raises ShapeError when the row has another length, ValueError when it is not finite (a row that is not due).
        """
        now = _softmax(_row_of(logits, self.labels, time_s))
        if self._values is None:
            self._values = now
        else:
            elapsed_s = max(time_s - self._time_s, 0.0)
            weight = 1.0 if self.smoothing_s == 0 else -math.expm1(-elapsed_s / self.smoothing_s)
            self._values = self._values + weight * (now - self._values)
        self._time_s = time_s
        return tuple(self._values.tolist())

    def reset(self) -> None:
        """Forget the past: the next row counts alone."""
        self._values = None

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {"values": None if self._values is None else self._values.tolist(), "time_s": self._time_s}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. Raises ShapeError when it is another smoother's or has another number of labels."""
        if "values" not in state:
            raise ShapeError("state is of another smoother")
        values = state["values"]
        if values is not None and len(values) != len(self.labels):
            raise ShapeError(f"state has {len(values)} values for {len(self.labels)} labels: another model's?")
        self._values = None if values is None else np.asarray(values, dtype=np.float64)
        self._time_s = float(state["time_s"])


NOTHING, OTHER = "No gesture", "Doing other things"
HASTY = (
    "Pulling Hand In",
    "Rolling Hand Backward",
    "Rolling Hand Forward",
    "Turning Hand Clockwise",
    "Turning Hand Counterclockwise",
)
SUMMED, REMEMBERED = 12, 20


class GestureSmoother:
    """mit-han-lab's rules for the online Jester network; they count results, not seconds.

    The logits of the last 12 results are summed. A label of HASTY gives way to the one before it, `Doing other things`
    counts as `No gesture`, and a change is taken over once the two results before it agreed. Same verbs as Smoother.
    Source: Lin et al., arXiv:1811.08383, online demo. Raises SmootherMismatch for labels without these names.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        missing = [name for name in (NOTHING, OTHER, *HASTY) if name not in self.labels]
        if missing:
            raise SmootherMismatch(
                f"the gesture smoother needs Jester's labels, {', '.join(missing)} are missing; use 'exponential'"
            )
        self._nothing, self._other = self.labels.index(NOTHING), self.labels.index(OTHER)
        self._hasty = {self.labels.index(name) for name in HASTY}
        self.reset()

    def update(self, logits: Tensor | Sequence[float], time_s: float) -> tuple[float, ...]:
        """Probabilities, one per label, after one more row of logits (K,); the accepted label has the highest.

        Raises ShapeError when the row has another length, ValueError when it is not finite.
        """
        self._rows.append(_row_of(logits, self.labels, time_s))
        values = _softmax(np.mean(self._rows, axis=0))
        best = int(values.argmax())
        accepted = self._accept(best)
        values[[best, accepted]] = values[[accepted, best]]
        return tuple(values.tolist())

    def _accept(self, index: int) -> int:
        if index in self._hasty:
            index = self._history[-1]
        if index == self._other:
            index = self._nothing
        settled = len(self._history) < 2 or self._history[-1] == self._history[-2]
        if index != self._history[-1] and not settled:
            index = self._history[-1]
        self._history.append(index)
        return index

    def reset(self) -> None:
        """Forget the past: no gesture."""
        self._rows: deque[Row] = deque(maxlen=SUMMED)
        self._history: deque[int] = deque([self._nothing], maxlen=REMEMBERED)

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {"rows": [row.tolist() for row in self._rows], "history": list(self._history)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. Raises ShapeError when it is another smoother's or another model's."""
        rows = [np.asarray(row, dtype=np.float64) for row in state.get("rows", ())]
        history = [int(index) for index in state.get("history", ())]
        if not history or any(row.shape != (len(self.labels),) for row in rows) or max(history) >= len(self.labels):
            raise ShapeError(f"state is of another smoother or of other than {len(self.labels)} labels")
        self._rows, self._history = deque(rows, maxlen=SUMMED), deque(history, maxlen=REMEMBERED)
