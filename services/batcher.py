"""Ready streams become one batch: one frame per stream, earliest deadline first."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from services.frame_queue import FrameQueue, Waiting
from tsm_core.frame import Frame


@dataclass(frozen=True, slots=True)
class Row:
    """One frame of a batch, and the queue it came from."""

    queue: FrameQueue
    waiting: Waiting

    @property
    def frame(self) -> Frame:
        """The frame itself."""
        return self.waiting.frame


class Batcher:
    """Where reader threads say that a stream is ready, and the batching loop takes its work.

    A batch never holds two frames of one stream, so time stays in order. It leaves when max_batch streams or all open
    ones are ready, at the latest max_wait_s after its first frame arrived; a loop that was busy longer than that does
    not wait at all. Nobody polls: both sides meet at one condition.
    """

    def __init__(self, max_batch: int, max_wait_s: float) -> None:
        self.max_batch = max_batch
        self.max_wait_s = max_wait_s
        self._open: set[FrameQueue] = set()
        self._ready: set[FrameQueue] = set()
        self._changed = threading.Condition()
        self._closed = False

    def open(self, queue: FrameQueue) -> None:
        """Count a stream among those that may come."""
        with self._changed:
            self._open.add(queue)

    def leave(self, queue: FrameQueue) -> None:
        """Forget a stream; its frames stay in its queue."""
        with self._changed:
            self._open.discard(queue)
            self._ready.discard(queue)
            self._changed.notify_all()

    def ready(self, queue: FrameQueue) -> None:
        """Say that a frame waits in this queue."""
        with self._changed:
            if queue in self._open and queue not in self._ready:
                self._ready.add(queue)
                self._changed.notify_all()

    def take(self, timeout_s: float) -> list[Row]:
        """The next batch; empty when nothing came within timeout_s or the batcher was closed."""
        until_s = time.monotonic() + timeout_s
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: self._ready or self._closed, until_s - time.monotonic()):
                    return []
                if self._closed:
                    return []
                self._linger()
                chosen = sorted(self._ready, key=lambda queue: queue.deadline_s)[: self.max_batch]
                self._ready.difference_update(chosen)
            rows = [Row(queue, waiting) for queue in chosen if (waiting := queue.take())]
            for queue in chosen:
                if queue.queued:
                    self.ready(queue)
            if rows:
                return rows

    def _linger(self) -> None:
        """Wait for company (the condition is held)."""
        first_s = min((queue.waiting_since_s for queue in self._ready), default=0.0)
        leave_s = min(first_s, time.monotonic()) + self.max_wait_s
        while not self._closed and len(self._ready) < min(self.max_batch, len(self._open)):
            left_s = leave_s - time.monotonic()
            if left_s <= 0:
                return
            self._changed.wait(left_s)

    @property
    def waiting_since_s(self) -> float | None:
        """When the oldest untaken frame began to wait (monotonic clock); None when there is no work."""
        with self._changed:
            since_s = min((queue.waiting_since_s for queue in self._ready), default=float("inf"))
        return since_s if since_s < float("inf") else None

    def close(self) -> None:
        """Wake whoever waits; `take` returns nothing from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
