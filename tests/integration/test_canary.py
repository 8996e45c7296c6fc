"""A camera's password and a token go through every door and every cheap fault; no place that people read shows them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import grpc
import httpx
import pytest
import redis
from playwright.sync_api import Response, expect, sync_playwright
from websockets.sync.client import connect

from pipelines.simulator import SimulatorProcess, start_simulator
from services.rpc.tsm.v1 import streams_pb2 as pb
from services.rpc.tsm.v1.streams_pb2_grpc import StreamServiceStub
from tests.integration.conftest import RunningService
from tests.integration.test_page import BROWSERS, FLAGS

PASSWORD = "c4nary p@ss/wörd%"
WRONG = "wr0ngcanary!"  # sent to a camera that refuses it
MADE_UP = "tsm_t0kencanaryt0kencanaryt0kencanaryt0kencanary"
pytestmark = pytest.mark.timeout(600)


def forms(secret: str) -> list[bytes]:
    """The secret as it may be written: plain, in URLs, in JSON, in base64 at any offset of its three."""
    spellings = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]}
    found = [spelling.encode() for spelling in spellings]
    for before in ("", "a", "ab", "eye:"):
        text = base64.b64encode((before + secret).encode()).decode().rstrip("=")
        found.append(text[4 * (len(before) // 3) + 4 : -3].encode())
    return found


def places(secret: str, seen: dict[str, bytes]) -> list[str]:
    return [place for place, data in seen.items() if any(form in data for form in forms(secret))]


@pytest.fixture(scope="module")
def camera() -> Iterator[SimulatorProcess]:
    with start_simulator({"vault": "scene:9"}, username="eye", password=PASSWORD) as simulator:
        yield simulator


@pytest.fixture(autouse=True)
def no_streams_left(service: RunningService) -> Iterator[None]:
    yield
    for view in service.http.get("/v1/streams").json()["streams"]:
        service.http.delete(f"/v1/streams/{view['id']}")


def bodies(uri: str) -> list[tuple[str, dict[str, Any]]]:
    """Requests that hold the password where it belongs, and where it does not."""
    host = uri.removeprefix("rtsp://")
    source = {"uri": uri, "username": "eye", "password": PASSWORD}
    in_uri = f"rtsp://eye:{quote(PASSWORD, safe='')}@{host}"
    return [
        ("refused", {"json": {"id": "refused", "source": {**source, "password": WRONG}}}),
        ("dead", {"json": {"id": "dead", "source": {**source, "uri": "rtsp://127.0.0.1:9/x"}}}),
        ("no name", {"json": {"id": "noname", "source": {**source, "uri": "rtsp://no-such.invalid/x"}}}),
        ("metadata", {"json": {"id": "meta", "source": {**source, "uri": "rtsp://169.254.169.254/x"}}}),
        ("raw", {"json": {"id": "raw", "source": {"uri": f"rtsp://eye:{PASSWORD}@{host}"}}}),
        ("bad port", {"json": {"id": "port", "source": {"uri": f"rtsp://eye:{PASSWORD}@cam:port/x"}}}),
        ("no scheme", {"json": {"id": "scheme", "source": {"uri": f"eye:{PASSWORD}@cam"}}}),
        ("other scheme", {"json": {"id": "other", "source": {"uri": f"http://eye:{PASSWORD}@cam/x"}}}),
        ("misspelt", {"json": {"id": "misspelt", "source": {"uri": uri, "passwort": PASSWORD}}}),
        ("in a list", {"json": {"id": "list", "source": {**source, "password": [PASSWORD]}}}),
        ("too long", {"json": {"id": "long", "source": {**source, "password": PASSWORD * 40}}}),
        ("ffmpeg", {"json": {"id": "ffmpeg", "source": {**source, "decoder": "ffmpeg"}}}),
        ("as an id", {"json": {"id": PASSWORD, "source": source}}),
        ("unknown model", {"json": {"id": "model", "source": source, "models": [{"name": "none"}]}}),
        ("bad JSON", {"content": json.dumps({"id": "json", "source": source})[:-3].encode()}),
        ("no JSON", {"content": f"password={PASSWORD}".encode()}),
        ("in the URI", {"json": {"id": "uri", "source": {"uri": in_uri}}}),
    ]


def test_no_place_shows_a_password(service: RunningService, camera: SimulatorProcess, tmp_path: Path) -> None:
    uri = camera.urls[0]
    source = {"uri": uri, "username": "eye", "password": PASSWORD}
    seen: dict[str, bytes] = {}

    def keep(place: str, answer: httpx.Response) -> httpx.Response:
        seen[place] = answer.content + repr(answer.headers.raw).encode()
        return answer

    made = keep("create", service.http.post("/v1/streams", json={"id": "vault", "source": source}))
    assert made.status_code == 201, made.text
    service.http.post("/v1/streams?probe=false", json={"id": "hooked-wrong", "source": {**source, "password": WRONG}})
    for name, body in bodies(uri):
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(uuid.uuid4())}
        refused = keep(name, service.http.post("/v1/streams", headers=headers, **body))
        assert (refused.status_code < 400) == (name == "in the URI"), (name, refused.text)
    for name, given in (("probe", source), ("probe in vain", {**source, "password": WRONG})):
        keep(name, service.http.post("/v1/streams:probe", json={"source": given}))
    keep("patch", service.http.patch("/v1/streams/vault", json={"source": source}))
    keep("bad patch", service.http.patch("/v1/streams/vault", json={"source": {**source, "colour": PASSWORD}}))

    with grpc.insecure_channel(service.grpc) as channel:
        streams = StreamServiceStub(channel)
        stream = pb.Stream(id="grpc", source=pb.Source(**source))
        seen["grpc"] = str(streams.CreateStream(pb.CreateStreamRequest(stream=stream), timeout=30)).encode()
        for place, password in (("grpc in vain", WRONG), ("grpc too long", PASSWORD * 40)):
            stream = pb.Stream(id="vain", source=pb.Source(**{**source, "password": password}))
            with pytest.raises(grpc.RpcError) as caught:
                streams.CreateStream(pb.CreateStreamRequest(stream=stream), timeout=30)
            seen[place] = (str(caught.value) + repr(caught.value.trailing_metadata())).encode()

    runs = {
        "cli": (("streams", "add", "--uri", uri, "--id", "by-tsm", "--username", "eye", "--password-stdin"), PASSWORD),
        "cli in vain": (("streams", "add", "--uri", uri, "--username", "eye", "--password-stdin"), WRONG),
        "cli list": (("streams", "list", "--json"), ""),
        "cli get": (("streams", "get", "vault"), ""),
    }
    with ThreadPoolExecutor(2) as pool:
        for place, done in zip(runs, pool.map(lambda run: _tsm(service, *run), runs.values()), strict=True):
            seen[place] = done
    service.wait(lambda: service.status("vault")["state"] == "RUNNING", 60, "the password reached the camera")
    service.wait(lambda: service.status("hooked-wrong")["error_code"] == "STREAM_AUTH_FAILED", 60, "the wrong one too")

    for path in ("streams", "streams/vault", "streams/hooked-wrong/status", "events", "stats", "config/schema.json"):
        keep(path, service.http.get(f"/v1/{path}"))
    for path in ("/metrics", "/", "/openapi.json", "/v1/streams/vault/latest.jpg"):
        keep(path, service.http.get(path))
    with httpx.stream(
        "GET", f"{service.url}/v1/streams/hooked-wrong/events?after=0", timeout=10, trust_env=False
    ) as feed:
        lines = feed.iter_lines()
        seen["sse"] = "\n".join(line for line, _ in zip(lines, range(6), strict=False)).encode()
    with connect(service.url.replace("http", "ws", 1) + "/v1/ws", open_timeout=10) as socket:
        seen["websocket"] = str(socket.recv(timeout=10)).encode()

    seen |= _page(service, "hooked-wrong") | _behind(service)
    service.wait(lambda: b"refuses the user name" in _hooked(service), 20, "the webhook is told of the fault")
    service.wait(lambda: b"POST /v1/streams" in _traced(service), 20, "the collector is told of the requests")
    seen |= {"webhook": _hooked(service), "traces": _traced(service)}
    assert b'"sealed":"v1.' in seen["store"], "the dump was looked at"
    assert b"STREAM_AUTH_FAILED" in seen["log"], "and so was the log"
    for secret in (PASSWORD, WRONG):
        assert not places(secret, seen)


def test_no_place_shows_a_token(service: RunningService) -> None:
    name_of_token = f"canary-{uuid.uuid4().hex[:8]}"
    answer = service.http.post("/v1/tokens", json={"name": name_of_token, "role": "operator"})
    assert answer.status_code == 201, answer.text
    token = next(text for text in answer.json().values() if isinstance(text, str) and text.startswith("tsm_"))
    seen: dict[str, bytes] = {}

    def keep(place: str, asked: Callable[[], httpx.Response]) -> None:
        got = asked()
        seen[place] = got.content + repr(got.headers.raw).encode()

    for name, given in (("token", token), ("made up", MADE_UP)):
        headers = {"Authorization": f"Bearer {given}"}
        for path in ("/v1/streams", "/v1/tokens", f"/v1/streams/{given}", f"/v1/streams?cursor={given}"):
            keep(f"{name} {path[:12]}", lambda path=path, headers=headers: service.http.get(path, headers=headers))
        keep(f"{name} login", lambda given=given: service.http.post("/v1/login", json={"token": given + "x"}))
        keep(f"{name} basic", lambda given=given: service.http.get("/v1/streams", auth=("me", given)))
        with grpc.insecure_channel(service.grpc) as channel:
            metadata = (("authorization", f"Bearer {given}"),)
            try:
                found = StreamServiceStub(channel).ListStreams(pb.ListStreamsRequest(), metadata=metadata, timeout=10)
                seen[f"{name} grpc"] = str(found).encode()
            except grpc.RpcError as error:
                seen[f"{name} grpc"] = str(error).encode()
        environment = {"TSM_TOKEN": given}
        seen[f"{name} cli"] = _tsm(service, ("streams", "list"), "", environment)
    keep("metrics", lambda: service.http.get("/metrics"))
    service.wait(lambda: b"GET /v1/tokens" in _traced(service), 20, "the collector is told of the requests")
    seen |= {"traces": _traced(service)} | _behind(service)
    for secret in (token, MADE_UP):
        own = ("/v1/streams/", "/v1/streams?")  # an answer may repeat what stood in its own address
        assert not [place for place in places(secret, seen) if not place.endswith(own)]
    service.http.delete(f"/v1/tokens/{name_of_token}")


def _tsm(
    service: RunningService, arguments: tuple[str, ...], typed: str, environment: dict[str, str] | None = None
) -> bytes:
    command = [sys.executable, "-m", "services.cli", *arguments, "--server", service.url]
    done = subprocess.run(
        command, input=typed.encode(), capture_output=True, timeout=180, env={**os.environ, **(environment or {})}
    )
    return done.stdout + done.stderr


def _hooked(service: RunningService) -> bytes:
    return json.dumps([service.hook.requests, service.hook.events], ensure_ascii=False).encode()


def _traced(service: RunningService) -> bytes:
    return b"".join(service.traces.bodies)


def _page(service: RunningService, stream_id: str) -> dict[str, bytes]:
    """What a browser shows of a stream, and every answer it was sent; nothing without a browser."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        return {}
    answers: list[Response] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        page = browser.new_page()
        page.on("response", lambda answer: answers.append(answer))  # playwright cannot take append itself
        page.goto(f"{service.url}/")
        tile = page.locator(f'[data-stream="{stream_id}"]')
        expect(tile).to_be_visible(timeout=30_000)
        expect(tile).to_contain_text("password", timeout=30_000)  # that it is wrong
        shown = page.content() + page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
        fetched = [answer.url + str(answer.all_headers()) for answer in answers]
        browser.close()
    return {"page": shown.encode(), "page's requests": "\n".join(fetched).encode()}


def _behind(service: RunningService) -> dict[str, bytes]:
    """What lies behind the doors: command lines and environments, all logs, both stores in memory and on disk."""
    seen = {"log": service.log.read_bytes(), "store": b"".join(map(_dump, _servers(service)))}
    for process in service.tree():
        for name in ("cmdline", "environ"):
            try:
                seen[f"{name} of {process.pid}"] = Path(f"/proc/{process.pid}/{name}").read_bytes()
            except OSError:
                continue  # ended meanwhile
    logs = [path for path in service.temp.rglob("*") if path.is_file() and "logs" in path.parts]
    assert logs, "Ray's logs are below its temporary folder"
    data = [path for path in (service.log.parent / "data").rglob("*") if path.is_file()]
    assert any("appendonly" in path.name for path in data), "Valkey's file is among the data"
    return seen | {str(path): path.read_bytes() for path in (*logs, *data)}


def _servers(service: RunningService) -> list[redis.Redis]:
    settings = service.store._settings
    return [redis.Redis.from_url(url.get_secret_value()) for url in (settings.url, settings.state_url) if url]


def _dump(server: redis.Redis) -> bytes:
    """Every key with all that it holds."""
    readers: dict[bytes, Callable[[bytes], Any]] = {
        b"none": lambda _: b"",  # it expired meanwhile
        b"string": server.get,
        b"hash": server.hgetall,
        b"list": lambda key: server.lrange(key, 0, -1),
        b"set": server.smembers,
        b"zset": lambda key: server.zrange(key, 0, -1),
        b"stream": server.xrange,
    }
    with server:
        return _flat([(key, readers[server.type(key)](key)) for key in server.scan_iter(count=1000)])


def _flat(value: Any) -> bytes:
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple | set):
        return b" ".join(map(_flat, value))
    return value if isinstance(value, bytes) else str(value).encode()
