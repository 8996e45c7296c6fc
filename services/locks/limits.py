"""How often and how much at once: token buckets by caller or address, and a count of feeds."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tsm_core.errors import WorldError

KEPT = 10_000  # buckets and known tokens that are remembered; the oldest make room


class TooManyRequests(WorldError):
    """The caller calls too often; `retry_after_s` says when to come back."""

    reason = "too_many_requests"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyFeeds(WorldError):
    """The caller follows as many feeds as it may."""

    reason = "too_many_feeds"


class Buckets:
    """One token bucket per name: `burst` at once, `per_s` for long. Thread-safe."""

    def __init__(self, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._lock = threading.Lock()
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name: level, when it was so

    def wait_s(self, name: str) -> float:
        """Seconds until the name's bucket holds one; 0 when it does. Takes nothing."""
        with self._lock:
            return max(0.0, (1.0 - self._level(name)) / self._per_s)

    def take(self, name: str) -> float:
        """Take one and return 0, or take nothing and return the seconds until there is one."""
        with self._lock:
            level = self._level(name)
            if level < 1.0:
                return (1.0 - level) / self._per_s
            self._levels[name] = level - 1.0, self._clock()
            self._levels.move_to_end(name)
            if len(self._levels) > KEPT:
                self._levels.popitem(last=False)
            return 0.0

    def _level(self, name: str) -> float:
        now = self._clock()
        level, since = self._levels.get(name, (self._burst, now))
        return min(self._burst, level + (now - since) * self._per_s)


class Feeds:
    """How many feeds each caller follows, at most `most`. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._open: Counter[str] = Counter()

    @contextmanager
    def taken(self, name: str) -> Iterator[None]:
        """One feed of the caller, while it lasts. Raises TooManyFeeds."""
        with self._lock:
            if self._open[name] >= self._most:
                raise TooManyFeeds(f"{name!r} follows {self._most} feeds already (auth.feeds); close one first")
            self._open[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[name] -= 1
                if not self._open[name]:
                    del self._open[name]
