"""Events of the past, newest first: which are wanted, and how to find them in the store's feeds."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from services.schemas import EVENT_PREFIX
from services.store import StateStore
from tsm_core.errors import CallerError

CHUNK = 256
SCANNED = 20_000  # most events that one page looks at

Record = dict[str, Any]


class EventNotFound(CallerError):
    """No event of this id is kept."""

    reason = "event_not_found"


class Place(NamedTuple):
    """Where an event stands in the order; the newest are the greatest."""

    published_s: float
    stream_id: str
    sequence: int


class Page(NamedTuple):
    """Events, newest first, and where the next page begins: behind `last`; None at the end."""

    events: list[Record]
    last: Place | None


@dataclass(frozen=True)
class EventFilter:
    """Which events are wanted; what is None does not matter.

    kind: `action`, `action.new` or a whole CloudEvents type. zone: where the object is or was told to have been, or a
    recogniser's region. after_s, before_s: Unix time of publication by the store's clock, after_s <= t < before_s.
    """

    label: str | None = None
    kind: str | None = None
    zone: str | None = None
    min_score: float | None = None
    after_s: float = -math.inf
    before_s: float = math.inf

    def wants(self, event: Record) -> bool:
        """True for an event that all filters let through."""
        data: Record = event["data"]
        kind = event["type"].removeprefix(f"{EVENT_PREFIX}.")
        asked = None if self.kind is None else self.kind.removeprefix(f"{EVENT_PREFIX}.")
        places = (data.get("region"), *data.get("current_zones", ()), *data.get("entered_zones", ()))
        return (
            (asked is None or kind == asked or kind.startswith(f"{asked}."))
            and (self.label is None or data.get("label") == self.label)
            and (self.zone is None or self.zone in places)
            and (self.min_score is None or data.get("score", -1.0) >= self.min_score)
            and self.after_s <= event.get("published_s", 0.0) < self.before_s
        )


def find_events(
    store: StateStore, stream_ids: Iterable[str], wanted: EventFilter, limit: int, behind: Place | None = None
) -> Page:
    """Up to `limit` events of these streams, newest first, behind a place.

    A page that had to look at many events may be short though there are more.
    """
    until_s = min(wanted.before_s, math.inf if behind is None else behind.published_s)
    feeds = [_backwards(store, stream_id, until_s) for stream_id in stream_ids]
    found: list[Record] = []
    place = behind
    for looked, event in enumerate(heapq.merge(*feeds, key=place_of, reverse=True)):
        if event["published_s"] < wanted.after_s:
            break
        if behind is not None and place_of(event) >= behind:
            continue
        if len(found) == limit or looked >= SCANNED:
            return Page(found, place)
        place = place_of(event)
        if wanted.wants(event):
            found.append(event)
    return Page(found, None)


def place_of(event: Record) -> Place:
    """Where an event stands in the order."""
    return Place(event["published_s"], event["partitionkey"], event["sequence"])


def find_event(store: StateStore, event_id: str) -> Record:
    """One event that is kept; its id begins with its stream's. Raises EventNotFound."""
    stream_id = stream_of(event_id)
    for event in _backwards(store, stream_id, math.inf):
        if event["id"] == event_id:
            return event
    raise EventNotFound(f"no event {event_id[:100]!r} is kept; store.events_kept says how many are")


def stream_of(event_id: str) -> str:
    """The stream that an event's id names."""
    return event_id.partition(".")[0]


def _backwards(store: StateStore, stream_id: str, until_s: float) -> Iterator[Record]:
    """A stream's events from the newest on, of those published until then."""
    high = _newest(store, stream_id, until_s)
    while high > 0:
        chunk = [one for one in store.events(stream_id, max(0, high - CHUNK), CHUNK) if one["sequence"] <= high]
        yield from reversed(chunk)
        high = high - CHUNK if chunk else 0


def _newest(store: StateStore, stream_id: str, until_s: float) -> int:
    """Sequence of the newest event that was published until then, or of one that is no longer kept."""
    low, high = 0, store.latest_sequence(stream_id)
    newest = store.events(stream_id, high - 1, 1) if high else []
    if not newest or newest[0]["published_s"] <= until_s:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        found = store.events(stream_id, middle - 1, 1)
        if found and found[0]["published_s"] <= until_s:
            low = middle
        else:
            high = middle - 1
    return low


def instant(text: str) -> float:
    """Unix seconds of a time that leaves no doubt: ISO 8601 with its zone, or Unix seconds. Raises ValueError."""
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]+)?", text):
        return float(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            "is no time: use 2026-01-31T12:00:00Z, 2026-01-31T13:00:00+01:00 (in an address %2B for +) or Unix seconds"
        ) from None
    if at.tzinfo is None:
        raise ValueError("has no time zone: append Z for UTC, or an offset such as +01:00 (in an address %2B01:00)")
    return at.timestamp()
