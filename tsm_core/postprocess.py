"""Logits -> probabilities that are smooth in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tsm_core.errors import ShapeError


class Smoother:
    """Exponential smoothing of softmax probabilities with time constant smoothing_s (0: none).

    It counts seconds, not frames: a result dt after the last one weighs 1 - exp(-dt / smoothing_s). Call `reset`
    after a gap in the video.
    """

    def __init__(self, labels: Sequence[str], smoothing_s: float) -> None:
        self.labels = tuple(labels)
        self.smoothing_s = smoothing_s
        self._values: np.ndarray[Any, np.dtype[np.float64]] | None = None
        self._time_s = 0.0

    def update(self, logits: Tensor | Sequence[float], time_s: float) -> tuple[float, ...]:
        """Smoothed probabilities, one per label, after one more row of logits (K,) at time_s.

        Raises ShapeError when the row has another length, ValueError when it is not finite (a row that is not due).
        """
        row = np.asarray(logits.tolist() if isinstance(logits, Tensor) else logits, dtype=np.float64)
        if row.shape != (len(self.labels),):
            raise ShapeError(f"logits must be ({len(self.labels)},), got {row.shape}")
        if not np.isfinite(row).all():
            raise ValueError(f"logits at {time_s} s are not finite: {row.tolist()}")
        powers = np.exp(row - row.max())
        now = powers / powers.sum()
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
        """Go on from a `state`. Raises ShapeError when it has another number of labels."""
        values = state["values"]
        if values is not None and len(values) != len(self.labels):
            raise ShapeError(f"state has {len(values)} values for {len(self.labels)} labels: another model's?")
        self._values = None if values is None else np.asarray(values, dtype=np.float64)
        self._time_s = float(state["time_s"])
