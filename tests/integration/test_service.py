"""The whole service: Ray Serve, Valkey, real RTSP; what it does, what it refuses, what it shows to nobody."""

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from pipelines.simulator import SimulatorProcess, start_simulator
from services.snapshots import sha256
from tests.integration.conftest import RunningService

CANARY = "c4n4ry pa55@word"
CLOSE = {"timeout": 5.0, "trust_env": False}
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def cameras() -> Iterator[SimulatorProcess]:
    with start_simulator({f"cam{n}": f"scene:{n}" for n in range(1, 5)}) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def guarded() -> Iterator[SimulatorProcess]:
    with start_simulator({"vault": "scene:9"}, username="eye", password=CANARY) as simulator:
        yield simulator


@pytest.fixture(autouse=True)
def no_streams_left(service: RunningService) -> Iterator[None]:
    yield
    for view in service.http.get("/v1/streams").json()["streams"]:
        service.http.delete(f"/v1/streams/{view['id']}")


def tsm(service: RunningService, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", *arguments, "--server", service.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_stream_runs_within_five_seconds_and_tells_what_it_sees(service: RunningService, cameras: SimulatorProcess):
    began = time.monotonic()
    service.add("quick", cameras.urls[0])
    service.wait(lambda: service.status("quick")["state"] == "RUNNING", 5 - (time.monotonic() - began), "RUNNING")
    with httpx.stream("GET", f"{service.url}/v1/streams/quick/events?after=0", **CLOSE) as answer:
        types = (line[7:] for line in answer.iter_lines() if line.startswith("event: "))
        assert next(types) == "tsm.v1.stream.state"
    pictures: set[bytes] = set()
    with httpx.stream("GET", f"{service.url}/v1/streams/quick/mjpeg", **CLOSE) as answer:
        for part in answer.iter_bytes():
            pictures.update(line for line in part.split(b"\r\n") if line.startswith(b"X-Frame-Number"))
            if len(pictures) >= 5:
                break
    service.wait(lambda: service.http.get("/v1/streams/quick/scores").json()["scores"], 5, "scores")
    picture = service.http.get("/v1/streams/quick/latest.jpg")
    assert picture.content[:2] == b"\xff\xd8"
    service.wait(lambda: 'stream_fps{replica="engine-' in service.http.get("/metrics").text, 5, "metrics")
    assert service.http.get("/v1/stats").json()["running"] == 1


def test_command_adds_and_waits(service: RunningService, cameras: SimulatorProcess):
    added = tsm(service, "streams", "add", "--uri", cameras.urls[1], "--id", "cli", "--wait", "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["status"]["state"] == "RUNNING"
    tail = tsm(service, "events", "tail", "--stream", "cli", "--after", "0", "--count", "1", "--json")
    assert json.loads(tail.stdout)["sequence"] == 1, tail.stderr


def test_all_sockets_are_on_loopback(service: RunningService, cameras: SimulatorProcess):
    service.add("sockets", cameras.urls[0], rtsp_transport="tcp")
    service.wait(lambda: service.status("sockets")["state"] == "RUNNING", 10, "RUNNING")
    listening = []
    for process in service.tree():
        try:
            listening += [(process.name(), c.laddr) for c in process.net_connections("inet") if c.status == "LISTEN"]
        except psutil.NoSuchProcess:
            continue
    assert len(listening) > 5
    assert {address.ip for _, address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


@pytest.fixture(scope="module")
def not_rtsp() -> Iterator[str]:
    """A server that answers RTSP with something else."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(4096)
                    peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"rtsp://127.0.0.1:{server.getsockname()[1]}/x"
        server.shutdown(socket.SHUT_RDWR)


BAD_SOURCES = [
    ("unknown host", "rtsp://no-such-host.invalid/x", "stream_dns_failed"),
    ("wrong password", "{guarded}", "stream_auth_failed"),
    ("wrong path", "{camera}-nope", "stream_not_found"),
    ("not RTSP", "{not_rtsp}", "stream_not_rtsp"),
    ("file", "file:///etc/passwd", "source_not_allowed"),
    ("metadata", "rtsp://169.254.169.254/x", "source_not_allowed"),
]


@pytest.mark.parametrize(("uri", "reason"), [row[1:] for row in BAD_SOURCES], ids=[row[0] for row in BAD_SOURCES])
def test_bad_sources_are_told_at_once_by_both_doors(
    service: RunningService, cameras: SimulatorProcess, guarded: SimulatorProcess, not_rtsp: str, uri: str, reason: str
):
    uri = uri.format(camera=cameras.urls[0], guarded=guarded.urls[0], not_rtsp=not_rtsp)
    source = {"uri": uri, "username": "eye", "password": "wrong-" + CANARY}
    began = time.monotonic()
    answer = service.http.post("/v1/streams", json={"id": "bad", "source": source})
    assert time.monotonic() - began < 5
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.json()["reason"], answer.status_code) == (reason, 422), answer.text
    arguments = ["streams", "add", "--uri", uri, "--username", "eye", "--password-stdin"]
    done = tsm(service, *arguments, input=f"wrong-{CANARY}\n")
    assert (done.returncode, done.stderr.strip()[-len(reason) - 1 :]) == (2, f"{reason})"), done.stderr
    assert CANARY not in answer.text + done.stderr + done.stdout
    assert service.http.get("/v1/streams").json()["streams"] == []


def test_bad_requests_are_told_at_once(service: RunningService, cameras: SimulatorProcess):
    source = {"uri": cameras.urls[0]}
    service.add("taken", cameras.urls[0])
    table = [
        ({"json": {"id": "taken", "source": source}}, 409, "stream_exists"),
        ({"json": {"source": source, "models": [{"name": "gpt"}]}}, 422, "unknown_model"),
        ({"json": {"source": source, "colour": "red"}}, 422, "invalid_request"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "invalid_json"),
    ]
    for request, status, reason in table:
        answer = service.http.post("/v1/streams", **request)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), answer.text


def test_two_gigabytes_are_refused_unread(service: RunningService):
    connection = http.client.HTTPConnection(urlsplit(service.url).netloc, timeout=5)
    connection.putrequest("POST", "/v1/streams")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(2 << 30))
    connection.endheaders(b"{")
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["reason"] == "body_too_large"
    connection.close()


def test_taken_port_is_told_before_anything_starts(service: RunningService, tmp_path: Path):
    port = urlsplit(service.url).port
    began = time.monotonic()
    command = [sys.executable, "-m", "services.cli", "serve", "--port", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "--port" in done.stderr
    assert done.stderr.strip().endswith("(reason: port_taken)")
    assert time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []


def test_slow_viewer_costs_nothing(service: RunningService, cameras: SimulatorProcess):
    service.add("viewed", cameras.urls[2])
    service.wait(lambda: service.status("viewed")["state"] == "RUNNING", 10, "RUNNING")
    gateway = next(process for process in service.tree() if "Gateway" in process.name())
    host = urlsplit(service.url)
    with socket.create_connection((host.hostname, host.port)) as viewer:
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asks = f"GET /v1/streams/viewed/mjpeg HTTP/1.1\r\nHost: {host.netloc}\r\n\r\n"
        viewer.sendall(asks.encode())  # and reads nothing
        service.wait(lambda: "viewed" in service.store.watched(), 5, "watched")
        time.sleep(1)
        before = gateway.memory_info().rss
        time.sleep(3)
        assert gateway.memory_info().rss - before < 4 << 20
        assert service.http.get("/healthz").elapsed.total_seconds() < 2


def test_killed_replica_hands_its_streams_over(service: RunningService, cameras: SimulatorProcess):
    names = [f"kill-{n}" for n in range(4)]
    for name, url in zip(names, cameras.urls, strict=True):
        service.add(name, url)
    service.wait(lambda: all(service.status(name)["state"] == "RUNNING" for name in names), 15, "RUNNING")
    service.wait(lambda: all(map(service.store.load, names)), 20, "a saved state of each")
    service.wait(lambda: not any(service.status(n)["warmup"] for n in names), 20, "whole shift states")
    time.sleep(2.5)  # one more save, of the whole states
    owner = service.status(names[0])["worker"]
    leases = service.store.leases()
    moved = [name for name in names if leases[name].owner == owner]
    assert 0 < len(moved) < len(names), "both replicas have streams"
    pid = next(replica.pid for replica in service.store.replicas() if replica.id == owner)

    psutil.Process(pid).kill()
    killed = time.time()
    saved = {name: service.store.load(name) for name in moved}  # nobody writes now
    reassigned_s = service.wait(
        lambda: all((lease := service.store.leases().get(n)) and lease.owner != owner for n in moved), 5, "reassigned"
    )
    epochs = service.store.leases()

    def back(name: str) -> bool:
        status = service.store.status(name)
        return status is not None and status.epoch == epochs[name].epoch and status.restored is not None

    service.wait(lambda: all(map(back, moved)), 10, "a status of the new owner")
    first: dict[str, float] = {}
    for name in moved:

        def fresh(name: str = name) -> bool:
            times = [r["published_s"] for r in service.store.scores(name, limit=200) if r["time_s"] > killed]
            if times:
                first[name] = min(times) - killed
            return bool(times)

        service.wait(fresh, 10, f"results of {name}")
    for name in moved:
        status, blob = service.store.status(name), saved[name]
        assert status is not None
        assert status.restored is not None
        assert blob is not None
        assert (status.restored.mode, status.restored.blob_bytes) == ("checkpoint", len(blob))
        assert status.restored.blob_sha256 == sha256(blob)
        assert not status.warmup, "the shift state is whole from the first frame on"
    print(f"reassigned {reassigned_s:.2f} s, first results {max(first.values()):.2f} s after SIGKILL")
    assert reassigned_s <= 1.2
    assert max(first.values()) <= 2.0 + 1.0
    service.wait(lambda: len(service.store.replicas()) == 2, 60, "Serve replaces the replica")


def test_service_outlives_its_gateway(service: RunningService):
    gateway = next(process for process in service.tree() if "Gateway" in process.name())
    gateway.kill()

    def answers() -> bool:
        try:
            return httpx.get(f"{service.url}/healthz", timeout=1.0, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    service.wait(lambda: not answers(), 5, "gone")
    service.wait(answers, 60, "Serve replaces the gateway")
