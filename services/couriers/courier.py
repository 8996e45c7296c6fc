"""One sink's courier: from the store's events to the sink, in order, at least once, with marks in the store."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from services.couriers.sink import Event, EventRefused, Sink, SinkUnavailable, wants
from services.settings import CourierSettings, SinkFilter
from services.store import StateStore, StoreDown

LEDGERS = "sinks"  # kind of document: one ledger per sink
ORDERS = "sink_orders"  # kind of document: "redeliver", by sink
PAGE = 100  # most events of one stream in one round
POLL_S = 0.2  # between two looks for events while there are none
RETRY_AFTER_CAP_S = 3600.0  # a sink may ask for so much patience
SAVE_S = 0.2  # between two writes of the ledger while events flow

log = logging.getLogger(__name__)


class Ledger(BaseModel):
    """What the store keeps of a sink: how far it is, and what became of the rest."""

    marks: dict[str, int] = Field(default_factory=dict)  # by stream: sequence of the last event that is settled
    delivered: int = 0
    lost: int = 0  # trimmed from the store before they could be delivered
    dropped_letters: int = 0  # dead letters that made room for newer ones
    failing_since: float | None = None
    error: str | None = None
    memo: dict[str, Any] = Field(default_factory=dict)  # the sink's


class DeadLetter(BaseModel):
    """An event that the sink would not take."""

    event: Event
    why: str
    at: float


class Parcel(NamedTuple):
    """One event on its way, and whether the sink wants it."""

    stream_id: str
    sequence: int
    event: Event
    wanted: bool


def dead_letters(store: StateStore, sink: str) -> list[DeadLetter]:
    """The sink's dead letters, oldest first."""
    found = [DeadLetter.model_validate_json(text) for text in store.documents(_letters(sink)).values()]
    return sorted(found, key=lambda letter: (letter.at, letter.event["sequence"]))


def ledger(store: StateStore, sink: str) -> Ledger | None:
    """What is known of the sink; None before its courier came first."""
    text = store.document(LEDGERS, sink)
    return Ledger.model_validate_json(text) if text is not None else None


class Courier:
    """A thread that reads the events of all streams and hands them to one sink.

    A mark moves only once the sink has acknowledged, so a courier that ends anywhere tells some events twice, under
    the same id, and leaves out none. A new sink begins with what comes after it was first seen; streams that come
    later are told from their first event. While `leads` is false it waits, and goes on from the store's marks.
    """

    def __init__(
        self, store: StateStore, sink: Sink, only: SinkFilter, settings: CourierSettings, leads: Callable[[], bool]
    ) -> None:
        self.sink = sink
        self._store = store
        self._only = only
        self._settings = settings
        self._leads = leads
        self._ledger = Ledger()
        self._written: str | None = None  # the ledger's text in the store, as far as we know
        self._saved_at = 0.0
        self._loaded = False
        self._failures = 0
        self._attempts: dict[str, int] = {}  # by id of the first event of a delivery that was answered with "later"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"courier-{sink.name}", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def stop(self) -> None:
        """End after the delivery in progress."""
        self._stopping.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the end; a delivery in progress may take its sink's timeout."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        reachable = True
        while not self._stopping.is_set():
            wait_s = POLL_S
            try:
                if self._leads():
                    wait_s = self._round()
                elif self._loaded:
                    self._let_go()
                if not reachable:
                    log.info("sink %s: the store is back", self.sink.name)
                reachable = True
            except StoreDown as error:
                if reachable:
                    log.warning("sink %s waits for the store: %s", self.sink.name, error)
                reachable = False
            except SinkUnavailable as error:
                wait_s = self._failed(error)
            except Exception as error:  # a bug with one sink must end neither the others nor the controller
                log.exception("sink %s: a bug", self.sink.name)
                wait_s = self._failed(SinkUnavailable(f"a bug of the service: {type(error).__name__}; see its log"))
            self._stopping.wait(wait_s)
        with contextlib.suppress(StoreDown):
            self._let_go()

    def _let_go(self) -> None:
        if self._loaded:
            self._loaded = False
            self.sink.close()
            self._save()

    def _round(self) -> float:
        """Deliver what waits; seconds until the next round. Raises SinkUnavailable, StoreDown."""
        if not self._loaded:
            self._load()
        feeds = self._store.event_feeds()
        self._redeliver()
        parcels = list(self._collect(feeds))
        chunk: list[Parcel] = []
        wanted = 0
        for parcel in parcels:
            chunk.append(parcel)
            wanted += parcel.wanted
            if wanted >= self.sink.batch:
                self._deliver(chunk)
                chunk, wanted = [], 0
                if self._stopping.is_set() or not self._leads():
                    break
        else:
            self._deliver(chunk)
        self._forget(feeds)
        self.sink.idle()
        if parcels:
            return 0.0
        self._succeeded()  # nothing waits
        self._save()
        return POLL_S

    def _load(self) -> None:
        self._written = self._store.document(LEDGERS, self.sink.name)
        if self._written is None:
            self._ledger = Ledger(marks=self._store.event_feeds())
        else:
            self._ledger = Ledger.model_validate_json(self._written)
        self.sink.recall(self._ledger.memo)
        self._loaded = True
        self._save()

    def _save(self) -> None:
        """Write the ledger, unless another courier wrote it meanwhile: then go on from there. Raises StoreDown."""
        self._ledger.memo = self.sink.memo()
        text = self._ledger.model_dump_json()
        self._saved_at = time.monotonic()
        if text == self._written:
            return
        if self._store.swap_document(LEDGERS, self.sink.name, self._written, text):
            self._written = text
        else:
            self._loaded = False
            log.warning("sink %s: another courier delivers too; some events may be told twice", self.sink.name)

    def _collect(self, feeds: dict[str, int]) -> Iterator[Parcel]:
        """The next events of every stream that has some, each stream's in order."""
        for stream_id, newest in feeds.items():
            mark = self._ledger.marks.get(stream_id)
            if newest <= (mark or 0):
                continue
            events = self._store.events(stream_id, mark or 0, PAGE)
            first = events[0]["sequence"] if events else newest + 1
            if mark is not None and first > mark + 1:
                lost = first - mark - 1
                self._ledger.lost += lost
                self._ledger.marks[stream_id] = first - 1
                log.error(
                    "sink %s: %d events of stream %s were trimmed before they were delivered (store.events_kept)",
                    self.sink.name,
                    lost,
                    stream_id,
                )
            elif not events:
                self._ledger.marks[stream_id] = newest
            for event in events:
                yield Parcel(stream_id, event["sequence"], event, wants(self._only, event))

    def _deliver(self, chunk: list[Parcel]) -> None:
        """Hand over what is wanted of the chunk, then move the marks over all of it. Raises SinkUnavailable."""
        events = [parcel.event for parcel in chunk if parcel.wanted]
        why = self._offer(events) if events else None
        if why and len(events) > 1:
            for parcel in chunk:  # one by one: perhaps only one of them is refused
                self._deliver([parcel])
            return
        if why:
            self._bury(events[0], why)
        for parcel in chunk:
            self._ledger.marks[parcel.stream_id] = parcel.sequence
        if time.monotonic() - self._saved_at >= SAVE_S:
            self._save()

    def _offer(self, events: list[Event]) -> str | None:
        """None once the sink took the events, else why it never will. Raises SinkUnavailable."""
        head, why = events[0]["id"], None
        try:
            self.sink.deliver(events)
        except EventRefused as error:
            why = str(error)
        except SinkUnavailable as error:
            tried = self._attempts[head] = self._attempts.get(head, 0) + error.answered
            if tried < self._settings.attempts:
                raise
            why = f"{error}, {tried} times"
            if len(events) > 1:
                return why  # the count goes on for the first of them
        else:
            self._ledger.delivered += len(events)
            self._succeeded()
        self._attempts.pop(head, None)
        return why

    def _bury(self, event: Event, why: str) -> None:
        letter = DeadLetter(event=event, why=why, at=time.time())
        kind = _letters(self.sink.name)
        self._store.put_document(kind, event["id"], letter.model_dump_json())
        log.error("sink %s: event %s is a dead letter: %s", self.sink.name, event["id"], why)
        for old in dead_letters(self._store, self.sink.name)[: -self._settings.dead_letters]:
            self._store.swap_document(kind, old.event["id"], self._store.document(kind, old.event["id"]), None)
            self._ledger.dropped_letters += 1

    def _redeliver(self) -> None:
        """Try the dead letters again, if somebody asked for it. Raises SinkUnavailable when the sink is not there."""
        if self._store.document(ORDERS, self.sink.name) is None:
            return
        kind = _letters(self.sink.name)
        for letter in dead_letters(self._store, self.sink.name):
            name = letter.event["id"]
            text = self._store.document(kind, name)
            try:
                self.sink.deliver([letter.event])
            except (EventRefused, SinkUnavailable) as error:
                if isinstance(error, SinkUnavailable) and not error.answered:
                    raise
                again = letter.model_copy(update={"why": str(error)})
                self._store.put_document(kind, name, again.model_dump_json())
            else:
                self._ledger.delivered += 1
                self._store.swap_document(kind, name, text, None)
        self._store.swap_document(ORDERS, self.sink.name, self._store.document(ORDERS, self.sink.name), None)

    def _forget(self, feeds: dict[str, int]) -> None:
        """Streams whose feeds are gone: what was not delivered in time is lost, and the rest is tidied up."""
        for stream_id in self._ledger.marks.keys() - feeds.keys():
            self.sink.forget(stream_id)
            missing = self._store.latest_sequence(stream_id) - self._ledger.marks[stream_id]
            if missing > 0:
                self._ledger.lost += missing
                log.error("sink %s: %d events of the deleted stream %s are lost", self.sink.name, missing, stream_id)
            del self._ledger.marks[stream_id]

    def _failed(self, error: SinkUnavailable) -> float:
        """Note the failure; seconds to wait: doubled each time, with jitter, but at least what the sink asked for."""
        self._failures += 1
        if self._ledger.failing_since is None:
            self._ledger.failing_since = time.time()
            log.warning("sink %s fails, events wait: %s", self.sink.name, error)
        self._ledger.error = str(error)
        with contextlib.suppress(StoreDown):
            self._save()
        settings = self._settings
        longest_s: float = min(settings.retry_cap_s, settings.retry_first_s * 2 ** min(self._failures - 1, 30))
        return max(longest_s * random.uniform(0.5, 1.0), min(error.retry_after_s, RETRY_AFTER_CAP_S))

    def _succeeded(self) -> None:
        self._failures = 0
        if self._ledger.failing_since is not None:
            log.info("sink %s takes events again", self.sink.name)
            self._ledger.failing_since = self._ledger.error = None


def _letters(sink: str) -> str:
    return f"dead_letters:{sink}"


def order_redelivery(store: StateStore, sink: str) -> int:
    """Have the courier try the sink's dead letters again; how many there are."""
    letters = store.documents(_letters(sink))
    if letters:
        store.put_document(ORDERS, sink, json.dumps("redeliver"))
    return len(letters)
