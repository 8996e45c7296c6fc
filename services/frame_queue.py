"""One stream's waiting frames: the newest wins, and every frame that goes unseen is counted by reason."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.tracing import FrameTrace
from tsm_core.frame import Frame

QUEUE_REASONS = ("queue", "age", "fps", "closed", "failed")


@dataclass(frozen=True, slots=True)
class Waiting:
    """A frame, the moment it arrived (monotonic clock), and its trace if it is one that is traced."""

    frame: Frame
    arrived_s: float
    trace: FrameTrace | None = None


class Pace:
    """Lets at most `max_fps` frames a second through, judged by the frames' own time.

    A frame may be early by a quarter of an interval, and what it took early is given back: a camera of 15 fps with
    max_fps 10 gives 10, not 7.5.
    """

    def __init__(self, max_fps: float) -> None:
        self.interval_s = 1.0 / max_fps
        self._due_s = -math.inf

    def admit(self, time_s: float) -> bool:
        """True when this frame's turn has come."""
        early_s = self._due_s - time_s
        if early_s > 0.25 * self.interval_s and early_s < 2 * self.interval_s:
            return False
        on_time = abs(early_s) <= self.interval_s  # else the stream paused or its clock jumped: begin anew
        self._due_s = (self._due_s if on_time else time_s) + self.interval_s
        return True


class FrameQueue:
    """A bounded queue between a reader thread and the batching loop; safe to use from both.

    Frames leave in the order they came. A frame too many pushes out the oldest, so nothing waits behind a slow model.
    Invariant: received == processed + sum(dropped.values()) + waiting, where a frame that was taken waits until
    `done` says what became of it. Reasons: `queue` a newer frame came, `age` older than max_age_s when its turn came,
    `fps` above max_fps, `closed` the session is over, `failed` the model or the analytics threw.
    """

    def __init__(
        self,
        capacity: int = 1,
        *,
        max_age_s: float = math.inf,
        max_fps: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_age_s = max_age_s
        self.received = 0
        self.processed = 0
        self._dropped: Counter[str] = Counter()
        self._frames: deque[Waiting] = deque()
        self._capacity = capacity
        self._taken = 0
        self._closed = False
        self._pace = Pace(max_fps) if max_fps else None
        self._clock = clock
        self._lock = threading.Lock()
        self._since_s = math.inf

    def put(self, frame: Frame, trace: FrameTrace | None = None) -> bool:
        """Take in a frame that has just arrived; True when it waits now, False when it was dropped at once."""
        waiting = Waiting(frame, self._clock(), trace)
        with self._lock:
            self.received += 1
            if self._closed:
                self._drop(waiting, "closed")
                return False
            if self._pace is not None and not self._pace.admit(frame.time_s):
                self._drop(waiting, "fps")
                return False
            if not self._frames:
                self._since_s = waiting.arrived_s
            elif len(self._frames) == self._capacity:
                self._drop(self._frames.popleft(), "queue")
            self._frames.append(waiting)
            return True

    def _drop(self, waiting: Waiting, reason: str) -> None:
        self._dropped[reason] += 1
        if waiting.trace is not None:
            waiting.trace.end(dropped=reason)

    def take(self) -> Waiting | None:
        """The oldest frame that is still young enough; None when there is none. Follow it with `done`."""
        now_s = self._clock()
        with self._lock:
            while self._frames:
                waiting = self._frames.popleft()
                self._since_s = self._frames[0].arrived_s if self._frames else math.inf
                if now_s - waiting.arrived_s <= self.max_age_s:
                    self._taken += 1
                    return waiting
                self._drop(waiting, "age")
            return None

    def done(self, dropped: str | None = None) -> None:
        """Say what became of a frame that was taken: processed, or dropped for a reason."""
        with self._lock:
            self._taken -= 1
            if dropped is None:
                self.processed += 1
            else:
                self._dropped[dropped] += 1

    def close(self) -> None:
        """Drop what waits and everything that still comes."""
        with self._lock:
            self._closed = True
            for waiting in self._frames:
                self._drop(waiting, "closed")
            self._frames.clear()
            self._since_s = math.inf

    def resume(self, received: int, processed: int, dropped: Mapping[str, int]) -> None:
        """Go on counting where an earlier owner of the stream stopped; what it still held counts as closed."""
        with self._lock:
            kept = {reason: count for reason, count in dropped.items() if reason in QUEUE_REASONS}
            self.received += received
            self.processed += processed
            self._dropped.update(kept)
            self._dropped["closed"] += max(0, received - processed - sum(kept.values()))

    @property
    def deadline_s(self) -> float:
        """When the stream's turn is due (monotonic clock).

        Counted from the moment a frame first waited: a newer frame that replaces it does not lose the turn, so a
        fast camera cannot starve.
        """
        return self._since_s + (self.max_age_s if math.isfinite(self.max_age_s) else 1.0)

    @property
    def waiting_since_s(self) -> float:
        """When a frame first waited (monotonic clock); infinite when none does."""
        return self._since_s

    @property
    def waiting(self) -> int:
        """Frames that wait or are being worked on."""
        with self._lock:
            return len(self._frames) + self._taken

    @property
    def queued(self) -> int:
        """Frames that nobody has taken yet."""
        return len(self._frames)

    @property
    def dropped(self) -> dict[str, int]:
        """Frames dropped so far, by reason."""
        with self._lock:
            return {reason: count for reason, count in self._dropped.items() if count}

    def counts(self) -> tuple[int, int, dict[str, int], int]:
        """(received, processed, dropped, waiting) of one moment."""
        with self._lock:
            dropped = {reason: count for reason, count in self._dropped.items() if count}
            return self.received, self.processed, dropped, len(self._frames) + self._taken
