"""Write-behind publishing: events, scores and status leave in one round trip, and never hold up a frame."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.schemas import Lease, StreamStatus
from services.tracing import FrameTrace
from tsm_core.errors import WorldError

log = logging.getLogger(__name__)

Record = dict[str, Any]
Parcel = tuple[Lease, StreamStatus | None, list[Record], list[Record]]

MAX_EVENTS = 10_000  # all streams of a replica together, while the store is down
MAX_SCORES = 300  # per stream: 20 s of a 15 fps camera
ROUND_RECORDS = 200  # per stream and round trip


@dataclass(frozen=True, slots=True)
class Passage:
    """When a record's frame arrived and when the record was handed over, on the monotonic clock, in seconds."""

    arrived_s: float
    handed_s: float
    trace: FrameTrace | None = None


OnPublished = Callable[[Passage, float], None]


class PublishStore(Protocol):
    """The one verb of the store that publishing needs."""

    def publish_many(self, parcels: Sequence[Parcel]) -> list[str]:
        """Write all, one round trip; ids of the streams whose lease was stale."""


class Outlet:
    """One session's way out. Any thread may emit; nothing here waits for the store."""

    def __init__(
        self,
        publisher: Publisher,
        lease: Lease,
        status: Callable[[], StreamStatus],
        on_published: OnPublished,
        on_refused: Callable[[], None],
    ) -> None:
        self.lease = lease
        self.refused = False
        self._publisher = publisher
        self._status = status
        self._on_published = on_published
        self._on_refused = on_refused
        self._events: deque[Record] = deque()
        self._scores: deque[tuple[Record, Passage]] = deque()
        self._status_due_s = 0.0
        self._closing = False

    def emit(
        self,
        events: Sequence[Record] = (),
        scores: Sequence[Record] = (),
        arrived_s: float = 0.0,
        trace: FrameTrace | None = None,
    ) -> None:
        """Hand over what one frame gave; arrived_s (monotonic clock) is when that frame came in, trace its trace."""
        if events or scores:
            passage = Passage(arrived_s, time.monotonic(), trace)
            self._publisher._accept(self, events, [(score, passage) for score in scores])

    def announce(self, events: Sequence[Record] = ()) -> None:
        """Publish the status at once, with events that belong to the change."""
        self._status_due_s = 0.0
        self._publisher._accept(self, events, [], urgent=True)

    def close(self) -> None:
        """Publish what is left and a last status, then be forgotten."""
        self._closing = True
        self.announce()

    @property
    def pending(self) -> bool:
        """True while something waits to be published."""
        return bool(self._events or self._scores or (self._closing and not self.refused))


class Publisher:
    """The thread that talks to the store.

    While the store is down events wait (at most MAX_EVENTS; `events_lost` counts what did not fit) and scores make
    room for newer ones (`scores_lost`). Delivery is at least once: a round trip that broke midway is sent again.
    """

    def __init__(self, store: PublishStore, *, status_s: float = 0.5, gather_s: float = 0.02) -> None:
        self.events_lost = 0
        self.scores_lost = 0
        self.rounds = 0
        self.last_error: str | None = None
        self._store = store
        self._status_s = status_s
        self._gather_s = gather_s
        self._outlets: list[Outlet] = []
        self._events_waiting = 0
        self._changed = threading.Condition()
        self._urgent = False
        self._busy = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def open(
        self,
        lease: Lease,
        status: Callable[[], StreamStatus],
        on_published: OnPublished,
        on_refused: Callable[[], None],
    ) -> Outlet:
        """A way out for one session.

        status gives its state, asked every status_s; on_published is told each score record's passage and when it was
        published (monotonic clock); on_refused that the lease is stale. Both are called from the publisher's thread.
        """
        outlet = Outlet(self, lease, status, on_published, on_refused)
        with self._changed:
            self._outlets.append(outlet)
            self._changed.notify_all()
        return outlet

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything handed over is published; False when time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy and not self._has_work(), timeout_s)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Publish what is left, for timeout_s at most, and end the thread."""
        if not self._thread.is_alive():
            return
        self.flush(timeout_s)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    @property
    def queue_length(self) -> int:
        """Records that wait."""
        with self._changed:
            return sum(len(outlet._events) + len(outlet._scores) for outlet in self._outlets)

    def _accept(
        self, outlet: Outlet, events: Sequence[Record], scores: Sequence[tuple[Record, Passage]], urgent: bool = False
    ) -> None:
        with self._changed:
            if outlet.refused:
                return
            for event in events:
                if self._events_waiting >= MAX_EVENTS:
                    self.events_lost += 1
                    if not outlet._events:
                        continue
                    outlet._events.popleft()
                    self._events_waiting -= 1
                outlet._events.append(event)
                self._events_waiting += 1
            outlet._scores.extend(scores)
            self._trim(outlet)
            self._urgent |= urgent
            self._changed.notify_all()

    def _trim(self, outlet: Outlet) -> None:
        while len(outlet._scores) > MAX_SCORES:
            outlet._scores.popleft()
            self.scores_lost += 1

    def _has_work(self) -> bool:
        return self._urgent or any(outlet.pending for outlet in self._outlets)

    def _run(self) -> None:
        wait_s = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._has_work(), self._next_status_s())
                if self._stopping:
                    return
                self._urgent = False
                self._busy = True
                collected = self._collect()
            parcels = [
                (outlet, (lease, outlet._status() if due else None, events, scores), passages)
                for outlet, (lease, due, events, scores), passages in collected
            ]
            try:
                refused = set(self._store.publish_many([parcel for _, parcel, _ in parcels])) if parcels else set()
            except WorldError as error:
                wait_s = min(1.0, max(0.1, 2 * wait_s))
                if self.last_error is None:
                    log.warning("publishing waits for the store: %s", error)
                self.last_error = str(error)
                self._put_back(parcels)
            else:
                wait_s = 0.0
                self.last_error = None
                self.rounds += bool(parcels)
                self._settle(parcels, refused)
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                if not self._stopping:
                    self._changed.wait_for(lambda: self._stopping, wait_s or self._gather_s)

    def _next_status_s(self) -> float:
        due_s = min((outlet._status_due_s for outlet in self._outlets if not outlet.refused), default=float("inf"))
        return max(0.0, min(due_s - time.monotonic(), 5.0))

    def _collect(self) -> list[tuple[Outlet, tuple[Lease, bool, list[Record], list[Record]], list[Passage]]]:
        """What goes out now (the condition is held). Of two sessions of one stream the older goes first, alone."""
        now_s = time.monotonic()
        found = []
        taken: set[str] = set()
        for outlet in self._outlets:
            if outlet.lease.stream_id in taken:
                continue
            due = outlet._closing or now_s >= outlet._status_due_s
            events = [outlet._events.popleft() for _ in range(min(len(outlet._events), ROUND_RECORDS))]
            scores = [outlet._scores.popleft() for _ in range(min(len(outlet._scores), ROUND_RECORDS))]
            self._events_waiting -= len(events)
            if due or events or scores:
                taken.add(outlet.lease.stream_id)
                outlet._status_due_s = now_s + self._status_s if due else outlet._status_due_s
                parcel = (outlet.lease, due, events, [score for score, _ in scores])
                found.append((outlet, parcel, [passage for _, passage in scores]))
        return found

    def _put_back(self, parcels: list[tuple[Outlet, Parcel, list[Passage]]]) -> None:
        with self._changed:
            for outlet, (_, status, events, scores), passages in parcels:
                outlet._events.extendleft(reversed(events))
                self._events_waiting += len(events)
                outlet._scores.extendleft(reversed(list(zip(scores, passages, strict=True))))
                self._trim(outlet)
                if status is not None:
                    outlet._status_due_s = 0.0

    def _settle(self, parcels: list[tuple[Outlet, Parcel, list[Passage]]], refused: set[str]) -> None:
        now_s = time.monotonic()
        for outlet, (lease, _, _, _), passages in parcels:
            if lease.stream_id in refused:
                self._refuse(outlet)
                continue
            for passage in passages:
                outlet._on_published(passage, now_s)
            if outlet._closing and not outlet._events and not outlet._scores:
                self._forget(outlet)

    def _refuse(self, outlet: Outlet) -> None:
        with self._changed:
            outlet.refused = True
            self._events_waiting -= len(outlet._events)
            outlet._events.clear()
            outlet._scores.clear()
        self._forget(outlet)
        outlet._on_refused()

    def _forget(self, outlet: Outlet) -> None:
        with self._changed:
            if outlet in self._outlets:
                self._outlets.remove(outlet)
