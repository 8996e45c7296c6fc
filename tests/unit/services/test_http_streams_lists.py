"""Lists over HTTP: filters, pages, cursors, and single events."""

from collections.abc import Iterator

import httpx
import pytest

from services.manager import StreamManager
from services.schemas import SourceSpec, StreamSpec, StreamStatus, state_event
from services.settings import Settings, StoreSettings
from services.store import MemoryStore
from tests.unit.services.http_kit import MODELS, serving


@pytest.fixture
def manager() -> StreamManager:
    manager = StreamManager(MemoryStore(StoreSettings()), Settings(), models=MODELS)
    for number in range(7):
        tags = {"floor": str(number % 2), "site": "a:b"}
        spec = StreamSpec(id=f"cam-{number}", source=SourceSpec(uri="rtsp://127.0.0.1/x"), tags=tags)
        manager.store.put_stream(spec.model_copy(update={"enabled": number != 3}), create=True)
    return manager


@pytest.fixture
def client(manager: StreamManager) -> Iterator[httpx.Client]:
    with serving(manager) as address, httpx.Client(base_url=address, trust_env=False) as client:
        yield client


def ids(client: httpx.Client, **params: object) -> list[str]:
    """All ids, page by page."""
    found: list[str] = []
    while True:
        body = client.get("/v1/streams", params=params).raise_for_status().json()
        found += [stream["id"] for stream in body["streams"]]
        if body["next_cursor"] is None:
            return found
        params["cursor"] = body["next_cursor"]


def test_streams_page_by_page(client: httpx.Client):
    everything = [f"cam-{number}" for number in range(7)]
    assert ids(client) == everything
    for limit in (1, 3, 7, 100):
        assert ids(client, limit=limit) == everything
    assert ids(client, tag="floor:1", limit=2) == ["cam-1", "cam-3", "cam-5"]
    assert ids(client, tag=["floor:1", "site:a:b"], state="STOPPED") == ["cam-3"]
    assert ids(client, state=["STOPPED", "STARTING"]) == everything
    assert ids(client, tag="floor:2") == []


@pytest.mark.parametrize(
    ("path", "reason", "says"),
    [
        ("/v1/streams?cursor=x", "bad_cursor", "next_cursor"),
        ("/v1/streams?cursor=%F0%9F%8E%A5", "bad_cursor", "next_cursor"),
        ("/v1/events?cursor=WyJzdHJlYW1zIiwgImEiXQ", "bad_cursor", "next_cursor"),  # of the list of streams
        ("/v1/streams?limit=0", "invalid_request", "limit"),
        ("/v1/streams?state=ASLEEP", "invalid_request", "RUNNING"),
        ("/v1/streams?tag=floor", "invalid_request", "tag"),
        ("/v1/events?after=2026-01-31T12:00:00", "invalid_request", "no time zone"),
        ("/v1/events?before=2026-01-31T12:00:00+01:00", "invalid_request", "%2B"),
        ("/v1/events?min_score=2", "invalid_request", "min_score"),
    ],
)
def test_what_cannot_be_meant_is_told(client: httpx.Client, path: str, reason: str, says: str):
    answer = client.get(path)
    assert (answer.status_code, answer.json()["reason"]) == (422, reason), answer.text
    assert says in answer.text


def test_events_by_page_filter_and_id(client: httpx.Client, manager: StreamManager):
    for name in ("cam-0", "cam-1"):
        lease = manager.store.assign(name, "r1")
        for _ in range(5):
            event = state_event(name, "STARTING", "RUNNING", "", 1.0)
            manager.store.publish(lease, status=StreamStatus(state="RUNNING", since=1.0), events=[event])
    found, params = [], {"limit": "4", "type": "stream.state", "after": "2020-01-01T00:00:00Z"}
    while True:
        body = client.get("/v1/events", params=params).raise_for_status().json()
        found += body["events"]
        if body["next_cursor"] is None:
            break
        params["cursor"] = body["next_cursor"]
    assert len(found) == len({event["id"] for event in found}) == 10
    assert client.get("/v1/events", params={"before": "2020-01-01T00:00:00Z"}).json()["events"] == []
    assert client.get("/v1/events", params={"type": "action"}).json()["events"] == []
    assert {event["partitionkey"] for event in client.get("/v1/events?stream=cam-1").json()["events"]} == {"cam-1"}
    one = found[3]
    assert client.get(f"/v1/events/{one['id']}").json() == one
    missing = client.get("/v1/events/cam-0.nothing")
    assert (missing.status_code, missing.json()["reason"]) == (404, "event_not_found")
