"""Window mode beside the batching loop: a whole clip takes long, and other streams' frames must not wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.analytics import View
from services.batcher import Row
from services.served import ServedRecogniser
from services.session import Session
from tsm_core.arena import Slot


@dataclass(frozen=True, slots=True)
class Sight:
    """One view on its way through a model, with the stream and the frame that it belongs to."""

    session: Session
    row: Row
    view: View


@dataclass(frozen=True, slots=True)
class Clip:
    """A result that is due: a copy of the slot's ring (1, T, C, H, W), and the sight and warm-up it belongs to."""

    sight: Sight
    pixels: Tensor
    warmup: tuple[int, int]


Deliver = Callable[[Sequence[Clip], Sequence[list[float]]], None]
Fail = Callable[[Clip, Exception], None]


class ClipLane:
    """Runs one model's clips, at most `most` at a time, oldest first.

    While it is behind, a slot's newer clip takes the place of the one that waits: results get rarer, never older.
    `deliver` and `fail` are called from the thread of `run`.
    """

    def __init__(self, served: ServedRecogniser, most: int, deliver: Deliver, fail: Fail) -> None:
        self.served = served
        self._most = most
        self._deliver = deliver
        self._fail = fail
        self._waiting: dict[Slot, Clip] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._busy_since_s: float | None = None

    @property
    def busy_s(self) -> float:
        """Seconds that the clips at work have taken so far."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def submit(self, clip: Clip) -> None:
        """Let the clip have its turn; never blocks."""
        with self._changed:
            if self._waiting.pop(clip.sight.view.slot, None) is not None:
                clip.sight.session.clip_skipped(self.served.name)
            self._waiting[clip.sight.view.slot] = clip
            self._changed.notify()

    def run(self) -> None:
        """Work until `close`."""
        while clips := self._take():
            self._busy_since_s = time.monotonic()
            try:
                rows = self.served.infer(torch.cat([clip.pixels for clip in clips]))
            except Exception as error:  # noqa: BLE001  whose fault it is, is found out one by one
                for clip in clips:
                    self._alone(clip, error if len(clips) == 1 else None)
            else:
                self._deliver(clips, rows)
            self._busy_since_s = None

    def close(self) -> None:
        """End `run` once the clips at work are done; what waits is dropped."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify()

    def _take(self) -> list[Clip]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            slots = list(self._waiting)[: self._most]
            return [self._waiting.pop(slot) for slot in slots]

    def _alone(self, clip: Clip, error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            rows = self.served.infer(clip.pixels)
        except Exception as own:  # noqa: BLE001
            self._fail(clip, own)
        else:
            self._deliver([clip], rows)
