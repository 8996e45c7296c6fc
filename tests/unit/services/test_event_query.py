"""Events of the past: order, filters, pages and times."""

import itertools
import random
import time
from typing import Any

import pytest

from services import event_query
from services.event_query import EventFilter, EventNotFound, find_event, find_events, instant
from services.schemas import SourceSpec, StreamSpec
from services.settings import StoreSettings
from services.store import MemoryStore, RedisStore, StateStore


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> StateStore:
    if request.param == "memory":
        return MemoryStore(StoreSettings(events_kept=500))
    url = request.getfixturevalue("valkey_url")
    return RedisStore(StoreSettings(url=url, prefix=f"{request.node.name}:", events_kept=500))


def fill(store: StateStore, counts: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Events of several streams, published in turns; what is kept of each, oldest first."""
    leases = {}
    for name in counts:
        store.put_stream(StreamSpec(id=name, source=SourceSpec(uri="rtsp://127.0.0.1/x")), create=True)
        leases[name] = store.assign(name, "r1")
    turns = [name for name, count in counts.items() for _ in range(count)]
    random.Random(7).shuffle(turns)
    for name, some in itertools.groupby(turns):
        many = len(list(some))
        events = [
            {
                "id": f"{name}.{random.getrandbits(64):x}",
                "type": f"tsm.v1.{random.choice(['action.new', 'action.end', 'detection.new'])}",
                "partitionkey": name,
                "data": {
                    "stream_id": name,
                    "label": random.choice(["left", "right"]),
                    "score": random.random(),
                    "current_zones": random.choice([["drive"], []]),
                },
            }
            for _ in range(many)
        ]
        store.publish(leases[name], events=events)
    return {name: store.events(name, 0, 10_000) for name in counts}


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_pages_hold_all_that_is_kept_once_and_newest_first(store: StateStore, limit: int):
    kept = fill(store, {"a": 900, "b": 40, "c": 1, "d": 0})
    expected = sorted((event_query.place_of(event) for events in kept.values() for event in events), reverse=True)
    if limit == 1:
        expected = expected[:30]
    found, behind = [], None
    while len(found) < len(expected):
        page = find_events(store, kept, EventFilter(), limit, behind)
        assert len(page.events) <= limit
        found += page.events
        behind = page.last
        if behind is None:
            break
    assert [event_query.place_of(event) for event in found] == expected


@pytest.mark.parametrize(
    "wanted",
    [
        EventFilter(label="left"),
        EventFilter(kind="action"),
        EventFilter(kind="action.new"),
        EventFilter(kind="tsm.v1.detection.new"),
        EventFilter(zone="drive", min_score=0.5),
        EventFilter(label="nothing"),
    ],
)
def test_filters_let_through_what_they_say(wanted: EventFilter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(event_query, "SCANNED", 50)  # short pages
    store = MemoryStore(StoreSettings())
    kept = fill(store, {"a": 200, "b": 200})
    found, behind = [], None
    while True:
        page = find_events(store, kept, wanted, 10, behind)
        found += page.events
        behind = page.last
        if behind is None:
            break

    def fits(event: dict[str, Any]) -> bool:
        data, kind = event["data"], event["type"]
        return (
            (wanted.label is None or data["label"] == wanted.label)
            and (wanted.kind is None or wanted.kind in kind)
            and (wanted.zone is None or wanted.zone in data["current_zones"])
            and (wanted.min_score is None or data["score"] >= wanted.min_score)
        )

    expected = {event["id"] for events in kept.values() for event in events if fits(event)}
    assert {event["id"] for event in found} == expected
    assert len(found) == len(expected)


def test_times_are_half_open_and_exact(store: StateStore):
    kept = fill(store, {"a": 1})["a"]
    lease = store.assign("a", "r1")
    while time.time() <= kept[0]["published_s"] + 0.01:
        time.sleep(0.005)
    store.publish(lease, events=[{**kept[0], "id": "a.2"}])
    first, second = (event["published_s"] for event in store.events("a"))
    for after, before, sequences in ((first, second, [1]), (second, 1e12, [2]), (0, first, []), (first, 1e12, [2, 1])):
        page = find_events(store, ["a"], EventFilter(after_s=after, before_s=before), 10)
        assert [event["sequence"] for event in page.events] == sequences


def test_an_event_is_found_by_its_id(store: StateStore):
    kept = fill(store, {"a": 400, "b": 3})
    assert find_event(store, kept["a"][3]["id"])["sequence"] == kept["a"][3]["sequence"]
    for unknown in ("a.0", "nobody.1", "", "a"):
        with pytest.raises(EventNotFound, match="events_kept"):
            find_event(store, unknown)


@pytest.mark.parametrize(
    ("text", "at_s"),
    [
        ("2026-01-31T12:00:00Z", 1769860800.0),
        ("2026-01-31T13:00:00+01:00", 1769860800.0),
        ("2026-01-31T12:00:00.25-00:00", 1769860800.25),
        ("1769860800", 1769860800.0),
        ("1769860800.5", 1769860800.5),
    ],
)
def test_times_that_leave_no_doubt(text: str, at_s: float):
    assert instant(text) == at_s


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2026-01-31T12:00:00", "no time zone"),
        ("2026-01-31", "no time zone"),
        ("2026-01-31T12:00:00 01:00", "%2B"),
        ("yesterday", "no time"),
        ("-5", "no time"),
        ("nan", "no time"),
        ("1e3", "no time"),
        ("", "no time"),
    ],
)
def test_times_in_doubt_are_refused(text: str, says: str):
    with pytest.raises(ValueError, match=says):
        instant(text)
