"""The HTTP door over a memory store: routes, problems, feeds. No network beyond loopback."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from services.http.problems import BodyLimit
from services.manager import StreamManager
from services.schemas import ReplicaInfo, SourceSpec, StreamSpec, StreamStatus, cloud_event, state_event
from services.settings import Settings, SourceSettings, StoreSettings
from services.store import MemoryStore
from services.stream_models import StreamModel
from tests.unit.services.http_kit import CANARY, MODELS, serving
from tsm_core.types import ActionEvent

JSON_BODY = {"Content-Type": "application/json"}
CAMERA = {"id": "door-1", "source": {"uri": "rtsp://127.0.0.1:9/cam", "username": "eye", "password": CANARY}}


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(StoreSettings())


@pytest.fixture
def manager(store: MemoryStore, tmp_path) -> StreamManager:
    settings = Settings(source=SourceSettings(file_roots=(tmp_path,), probe_timeout_s=1.0))
    return StreamManager(store, settings, models=MODELS)


@pytest.fixture
def address(manager: StreamManager) -> Iterator[str]:
    with serving(manager) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, trust_env=False) as client:
        yield client


def add(client: httpx.Client, stream_id: str = "door-1") -> dict:
    answer = client.post("/v1/streams?probe=false", json=CAMERA | {"id": stream_id})
    assert answer.status_code == 201, answer.text
    return answer.json()


def problem(answer: httpx.Response, status: int, reason: str) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["reason"] == reason
    assert body["status"] == status
    assert set(body) >= {"type", "title", "status", "detail", "reason"}
    assert CANARY not in answer.text
    return body


def action(stream_id: str, number: int) -> dict:
    return cloud_event(
        ActionEvent(
            stream_id=stream_id,
            action_id=f"a{number}",
            phase="new",
            label="left",
            score=0.9,
            top_score=0.9,
            top_k=(("left", 0.9),),
            model="motion9",
            frame_number=number,
            pts_s=number / 15,
            frame_time_s=1e9 + number,
            start_time_s=1e9,
            start_pts_s=0.0,
        )
    )


def test_what_is_left_out_of_a_change_stays(client: httpx.Client, manager: StreamManager):
    add(client)
    renamed = client.patch("/v1/streams/door-1", json={"name": "Door", "tags": {"floor": "1"}}).json()
    assert (renamed["name"], renamed["revision"]) == ("Door", 1), "a name does not begin the source anew"
    slower = client.patch("/v1/streams/door-1", json={"max_fps": 5}).json()
    assert (slower["max_fps"], slower["name"], slower["revision"]) == (5.0, "Door", 2)
    assert client.patch("/v1/streams/door-1", json={"max_fps": None}).json()["max_fps"] is None
    assert client.patch("/v1/streams/door-1", json={"enabled": False}).json()["status"]["state"] == "STOPPED"
    kept = manager.store.get_stream("door-1").source.password
    assert kept is not None
    assert kept.get_secret_value() == CANARY


def test_a_new_address_is_sent_no_old_password(client: httpx.Client, manager: StreamManager):
    add(client)
    moved = client.patch("/v1/streams/door-1?probe=false", json={"source": {"uri": "rtsp://127.0.0.1:9/other"}})
    assert moved.json()["source"]["uri"] == "rtsp://127.0.0.1:9/other"
    source = manager.store.get_stream("door-1").source
    assert (source.username, source.password) == (None, None)


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"source": {"uri": "file:///etc/passwd"}}, 422, "source_not_allowed"),
        ({"source": {"uri": "rtsp://no-such-host.invalid/x"}}, 422, "stream_dns_failed"),
        ({"source": None}, 422, "invalid_request"),
        ({"models": [{"name": "gpt"}]}, 422, "unknown_model"),
        ({"id": "other"}, 422, "invalid_request"),
        ({"max_fps": 0}, 422, "invalid_request"),
    ],
)
def test_a_change_is_checked_like_a_new_stream(client: httpx.Client, changes: dict, status: int, reason: str):
    before = add(client)
    problem(client.patch("/v1/streams/door-1", json=changes), status, reason)
    assert client.get("/v1/streams/door-1").json()["revision"] == before["revision"]
    problem(client.patch("/v1/streams/nope", json={"name": "x"}), 404, "stream_not_found")


def test_stream_goes_through_its_life(client: httpx.Client):
    view = add(client)
    assert view["status"]["state"] == "STARTING"
    assert view["models"] == [StreamModel(name="motion9").model_dump(mode="json")]
    assert view["source"]["decoder"] == "pyav"  # a password stays off command lines
    assert "password" not in view["source"]
    assert [one["id"] for one in client.get("/v1/streams").json()["streams"]] == ["door-1"]
    assert client.post("/v1/streams/door-1/stop").json()["status"]["state"] == "STOPPED"
    assert client.get("/v1/streams/door-1/status").json()["state"] == "STOPPED"
    started = client.post("/v1/streams/door-1/start").json()
    assert (started["enabled"], started["revision"], started["status"]["state"]) == (True, 3, "STARTING")
    assert client.get("/v1/streams/door-1/stats").json()["processed"] == 0
    assert client.delete("/v1/streams/door-1").status_code == 204
    problem(client.get("/v1/streams/door-1"), 404, "stream_not_found")
    problem(client.delete("/v1/streams/door-1"), 404, "stream_not_found")


def test_id_is_made_up_when_none_is_given(client: httpx.Client):
    ids = {
        client.post("/v1/streams?probe=false", json={"source": {"uri": "rtsp://127.0.0.1/x"}}).json()["id"]
        for _ in range(3)
    }
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("body", "status", "reason", "says"),
    [
        (CAMERA | {"fps": 3}, 422, "invalid_request", "fps"),
        (CAMERA | {"id": "no spaces"}, 422, "invalid_request", "id"),
        ({"id": "a"}, 422, "invalid_request", "source"),
        ({"source": {"uri": "http://127.0.0.1/x"}}, 422, "invalid_request", "rtsp://"),
        ({"source": {"uri": f"rtsp://eye:{CANARY}@/x"}}, 422, "invalid_request", "host"),
        ({"source": {"uri": f"rtsp://eye:{CANARY}/x@127.0.0.1/x"}}, 422, "invalid_request", "%2F"),
        ({"source": {"uri": "rtsp://127.0.0.1/x", "password": [CANARY]}}, 422, "invalid_request", "source.password"),
        ({"source": {"uri": "file:///etc/passwd"}}, 422, "source_not_allowed", "source.file_roots"),
        ({"source": {"uri": "rtsp://169.254.169.254/latest"}}, 422, "source_not_allowed", "metadata"),
        ({"source": {"uri": "rtsp://[fe80::1]/x"}}, 422, "source_not_allowed", "link-local"),
        ({"source": {"uri": "rtsp://2852039166/x"}}, 422, "source_not_allowed", "169.254.169.254"),
        ({"source": {"uri": "rtsp://[::ffff:169.254.1.1]/x"}}, 422, "source_not_allowed", "link-local"),
        (CAMERA | {"models": [{"name": "gpt"}]}, 422, "unknown_model", "motion9"),
    ],
)
def test_bad_streams_are_refused_with_reason(client: httpx.Client, body: dict, status: int, reason: str, says: str):
    answer = client.post("/v1/streams?probe=false", json=body)
    said = problem(answer, status, reason)
    assert says in answer.text, said
    assert client.get("/v1/streams").json()["streams"] == []


def test_duplicate_is_refused_before_the_probe(client: httpx.Client):
    add(client)
    began = time.monotonic()
    problem(client.post("/v1/streams", json=CAMERA), 409, "stream_exists")
    assert time.monotonic() - began < 0.5


def test_camera_that_is_off_is_told_at_once_and_can_be_registered_anyway(client: httpx.Client):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    body = CAMERA | {"source": CAMERA["source"] | {"uri": f"rtsp://127.0.0.1:{port}/cam"}}
    said = problem(client.post("/v1/streams", json=body), 503, "stream_connection_failed")
    assert "?probe=false" in said["detail"]
    assert client.post("/v1/streams?probe=false", json=body).status_code == 201


def test_probe_reports_stages_with_status_200(client: httpx.Client):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    source = {"uri": f"rtsp://eye:{CANARY}@127.0.0.1:{port}/cam"}
    answer = client.post("/v1/streams:probe", json={"source": source})
    assert answer.status_code == 200, answer.text
    assert answer.json()["error_code"] == "STREAM_CONNECTION_FAILED"
    assert not answer.json()["ok"]
    assert CANARY not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "kwargs", "status", "reason"),
    [
        ("POST", "/v1/streams", {"content": b"{no json", "headers": JSON_BODY}, 400, "invalid_json"),
        ("POST", "/v1/streams", {"content": b"", "headers": JSON_BODY}, 422, "invalid_request"),
        ("GET", "/v1/nothing", {}, 404, "unknown_route"),
        ("PUT", "/v1/streams", {}, 405, "method_not_allowed"),
        ("GET", "/v1/streams/nope/mjpeg", {}, 404, "stream_not_found"),
        ("GET", "/v1/streams/nope/events", {}, 404, "stream_not_found"),
        ("GET", "/v1/streams/nope/latest.jpg", {}, 404, "stream_not_found"),
        ("GET", "/v1/events?stream=nope", {}, 404, "stream_not_found"),
        ("GET", "/v1/events?limit=0", {}, 422, "invalid_request"),
        ("GET", "/healthz", {}, 503, "not_ready"),
    ],
)  # fmt: skip
def test_every_error_is_a_problem(client: httpx.Client, method: str, path: str, kwargs: dict, status: int, reason: str):
    problem(client.request(method, path, **kwargs), status, reason)


def test_bug_shows_no_internals(client: httpx.Client, manager: StreamManager, monkeypatch: pytest.MonkeyPatch):
    def broken() -> list:
        raise RuntimeError(f"secret {CANARY}")

    monkeypatch.setattr(manager, "streams", broken)
    problem(client.get("/v1/streams"), 500, "internal_error")


def test_world_errors_ask_to_come_again(client: httpx.Client):
    assert client.get("/healthz").headers["retry-after"] == "2"


def test_large_body_is_refused_by_length_and_by_counting(client: httpx.Client):
    big = b"x" * (1 << 20) + b"x"
    problem(client.post("/v1/streams", content=big), 413, "body_too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * (1 << 16)

    problem(
        client.post("/v1/streams", content=chunks(), headers={"Content-Type": "application/json"}),
        413,
        "body_too_large",
    )


def test_two_gigabytes_are_refused_unread():
    asked = 0

    async def app(scope, receive, send):
        raise AssertionError("must not be reached")

    async def receive():
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": b"x", "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/streams", "headers": [(b"content-length", str(2 << 30).encode())]}
    asyncio.run(BodyLimit(app, 1 << 20)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert asked == 0


def test_capacity_is_refused_with_429(client: httpx.Client, store: MemoryStore):
    store.heartbeat(ReplicaInfo(id="r1", pid=1, slots_total=1), 60_000)
    add(client)
    answer = client.post("/v1/streams?probe=false", json=CAMERA | {"id": "door-2"})
    assert "1 slots" in problem(answer, 429, "no_capacity")["detail"]
    assert answer.headers["retry-after"]


def test_status_of_a_lost_replica_is_not_believed(client: httpx.Client, store: MemoryStore):
    add(client)
    lease = store.assign("door-1", "r1")
    store.publish(lease, status=StreamStatus(state="RUNNING", since=1.0, worker="r1", fps=15.0))
    assert client.get("/v1/streams/door-1/status").json()["state"] == "RESTARTING"
    store.heartbeat(ReplicaInfo(id="r1", pid=1, slots_total=4), 60_000)
    assert client.get("/v1/streams/door-1/status").json()["state"] == "RUNNING"
    assert client.get("/healthz").json() == {"status": "ok", "replicas": 1}
    stats = client.get("/v1/stats").json()
    assert (stats["streams"], stats["running"], stats["slots_total"]) == (1, 1, 4)
    assert client.get("/v1/replicas").json()["replicas"][0]["id"] == "r1"


def test_picture_and_scores(client: httpx.Client, store: MemoryStore):
    add(client)
    problem(client.get("/v1/streams/door-1/latest.jpg"), 404, "no_picture")
    assert store.watched() == {"door-1"}
    lease = store.assign("door-1", "r1")
    store.put_preview(lease, b"\xff\xd8picture", 7)
    answer = client.get("/v1/streams/door-1/latest.jpg")
    assert (answer.content, answer.headers["x-frame-number"]) == (b"\xff\xd8picture", "7")
    store.publish(lease, scores=[{"frame_number": n, "label": "left"} for n in range(5)])
    numbers = [score["frame_number"] for score in client.get("/v1/streams/door-1/scores?limit=3").json()["scores"]]
    assert numbers == [2, 3, 4]


def test_events_newest_first(client: httpx.Client, store: MemoryStore):
    for name in ("a", "b"):
        add(client, name)
        store.publish(store.assign(name, "r1"), events=[action(name, n) for n in range(3)])
    found = client.get("/v1/events?limit=4").json()["events"]
    assert len(found) == 4
    assert [event["published_s"] for event in found] == sorted((e["published_s"] for e in found), reverse=True)
    assert {event["partitionkey"] for event in client.get("/v1/events?stream=b").json()["events"]} == {"b"}


def test_openapi_page_schema_and_metrics(client: httpx.Client, store: MemoryStore):
    api = client.get("/openapi.json").json()
    assert api["openapi"].startswith("3.1")
    assert api["paths"]["/v1/streams"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], f"{method} {path}"
            assert "4XX" in operation["responses"], f"{method} {path}"
    assert "properties" in client.get("/v1/config/schema.json").json()
    assert client.get("/v1/models").json()["models"][0]["labels"] == ["left", "right"]
    add(client)
    store.put_metrics("r1", "# TYPE batch_size gauge\nbatch_size 3\n", 60)
    text = client.get("/metrics").text
    assert 'num_streams{state="STARTING"} 1' in text
    assert "batch_size" in text


# feeds


@contextlib.contextmanager
def sse(address: str, path: str, **kwargs) -> Iterator[Iterator[tuple[str, dict]]]:
    def parsed(lines: Iterator[str]) -> Iterator[tuple[str, dict]]:
        event_id = ""
        for line in lines:
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                yield event_id, json.loads(line[6:])

    with httpx.stream("GET", address + path, timeout=5, trust_env=False, **kwargs) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines) == ": open"
        yield parsed(lines)


def registered(manager: StreamManager, stream_id: str = "door-1"):
    manager.store.put_stream(StreamSpec(id=stream_id, source=SourceSpec(uri="rtsp://127.0.0.1/x")), create=True)
    return manager.store.assign(stream_id, "r1")


def test_sse_resumes_without_loss_or_duplicates(manager: StreamManager, address: str):
    lease = registered(manager)
    manager.store.publish(lease, events=[action("door-1", n) for n in range(4)])
    with sse(address, "/v1/streams/door-1/events?after=0", headers={"Last-Event-ID": "2"}) as events:
        assert [next(events)[0] for _ in range(2)] == ["3", "4"]
        for n in range(4, 40):
            manager.store.publish(lease, events=[action("door-1", n)])
        assert [int(next(events)[0]) for _ in range(36)] == list(range(5, 41))
        manager.delete("door-1")
        assert list(events) == []  # ends with the stream


def test_sse_without_cursor_begins_now(manager: StreamManager, address: str):
    lease = registered(manager)
    manager.store.publish(lease, events=[action("door-1", 1)])
    with sse(address, "/v1/streams/door-1/events") as events:
        manager.store.publish(lease, events=[action("door-1", 2)])
        assert next(events)[1]["sequence"] == 2


def test_sse_of_all_streams_sees_streams_that_come_later(manager: StreamManager, address: str):
    with sse(address, "/v1/events", headers={"Accept": "text/event-stream"}) as events:
        time.sleep(0.4)
        lease = registered(manager, "late")
        manager.store.publish(lease, events=[state_event("late", None, "STARTING", "", 1.0)])
        event_id, event = next(events)
        assert (event_id, event["type"]) == ("late:1", "tsm.v1.stream.state")


def test_mjpeg_shows_each_picture_once_and_ends_with_the_stream(manager: StreamManager, address: str):
    lease = registered(manager)
    manager.store.put_preview(lease, b"\xff\xd8one", 1)
    seen = b""
    with httpx.stream("GET", f"{address}/v1/streams/door-1/mjpeg", timeout=5, trust_env=False) as answer:
        assert answer.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
        parts = answer.iter_bytes()
        while b"one" not in seen:
            seen += next(parts)
        time.sleep(0.2)
        manager.store.put_preview(lease, b"\xff\xd8two", 2)
        while b"two" not in seen:
            seen += next(parts)
        manager.delete("door-1")
        for part in parts:
            seen += part
    assert seen.count(b"one") == 1
    assert seen.count(b"two") == 1


def test_websocket_tells_everything(address: str, client: httpx.Client, manager: StreamManager):
    with connect(f"ws{address[4:]}/v1/ws", proxy=None) as page:
        assert json.loads(page.recv(5)) == {"type": "streams", "streams": []}
        time.sleep(0.3)
        add(client)
        lease = manager.store.assign("door-1", "r1")
        manager.store.publish(lease, events=[action("door-1", 1)], status=StreamStatus(state="RUNNING", since=1.0))
        manager.store.publish(
            lease, scores=[{"model": "motion9", "frame_number": n, "stream_id": "door-1"} for n in range(30)]
        )
        seen: dict[str, dict] = {}
        while not {"streams", "event", "score"} <= seen.keys() or "door-1" not in seen["status"]["statuses"]:
            message = json.loads(page.recv(5))
            seen[message["type"]] = message
        assert seen["streams"]["streams"][0]["id"] == "door-1"
        assert seen["event"]["event"]["sequence"] == 1
        assert seen["score"]["score"]["frame_number"] == 29  # the newest stands for all
        assert CANARY not in json.dumps(seen)


def test_websocket_of_another_site_is_refused(address: str):
    with pytest.raises(InvalidStatus):
        connect(f"ws{address[4:]}/v1/ws", proxy=None, origin="http://evil.example")
