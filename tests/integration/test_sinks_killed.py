"""Receiver, broker and courier are killed while thousands of events are under way: none is lost, order is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.couriers.office import Couriers
from services.settings import Settings, StoreSettings
from services.store import RedisStore
from tests.sinks_kit import (
    KEYS,
    SECRETS,
    Listener,
    Mosquitto,
    action,
    free_port,
    in_order,
    needs_mosquitto,
    owned,
    publish,
    wait_for,
)

STREAMS = [f"s{n}" for n in range(10)]
EVENTS = 1000  # of each stream: 10,000 in all
ALL = len(STREAMS) * EVENTS
FEWER = 300  # of each, for couriers: they take their time to begin

RECEIVER = """
import base64, hmac, http.server, json, os, sys

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        body = self.rfile.read(size)
        if len(body) < size:  # the sender died
            self.close_connection = True
            return
        signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + body
        right = "v1," + base64.b64encode(hmac.digest(bytes.fromhex(sys.argv[3]), signed, "sha256")).decode()
        if self.headers["webhook-signature"] != right:
            os._exit(1)
        os.write(file, b"".join(json.dumps(event).encode() + b"\\n" for event in json.loads(body)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass

file = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

COURIER = """
import sys, threading
from pathlib import Path
from services.couriers.office import Couriers
from services.settings import load_settings
from services.store import open_store

settings = load_settings(Path(sys.argv[1]))
store = open_store(settings.store)
Couriers(store, settings, lambda: store.lead(sys.argv[2], 1000)).start()
print("runs", flush=True)
threading.Event().wait()
"""


class Receiver:
    """A receiver of webhooks in a process of its own, which writes down what it takes before it says so."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._file = folder / "events.jsonl"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", RECEIVER, str(self.port), str(self._file), KEYS[0].hex()]
        )

    def kill(self) -> None:
        assert self._process is not None
        assert self._process.poll() is None, "a signature was wrong"
        self._process.kill()
        self._process.wait()

    def events(self) -> list[dict[str, Any]]:
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        return [json.loads(line) for line in lines]

    def count(self) -> int:
        return self._file.read_bytes().count(b"\n") if self._file.exists() else 0


@pytest.fixture
def prefix() -> str:
    return f"killed{time.monotonic_ns()}:"


@pytest.fixture
def store(valkey_url: str, prefix: str) -> Iterator[RedisStore]:
    store = RedisStore(StoreSettings(url=valkey_url, prefix=prefix))
    yield store
    store.close()


def hook(receiver: Receiver) -> dict[str, Any]:
    """Settings with the receiver as a webhook."""
    sink = {"name": "hook", "url": f"http://127.0.0.1:{receiver.port}/", "secrets": [SECRETS[0]], "batch": 20}
    return {
        "couriers": {"retry_first_s": 0.1, "retry_cap_s": 0.5},
        "webhooks": {"sinks": [sink], "networks": ["loopback"]},
    }


def flood(store: RedisStore, events: int = EVENTS) -> None:
    """Publish so many events of each stream, as ten replicas would."""
    leases = [owned(store, name) for name in STREAMS]
    for at in range(0, events, 100):
        for lease in leases:
            publish(store, lease, [action(lease.stream_id, n) for n in range(at, at + 100)])


def waiting(store: RedisStore) -> dict[str, int]:
    """Events of each stream that its sink has not settled."""
    (text,) = store.documents("sinks").values()
    marks = json.loads(text)["marks"]
    return {name: newest - marks.get(name, 0) for name, newest in store.event_feeds().items()}


def check(told: list[dict[str, Any]], events: int = EVENTS) -> None:
    assert in_order(told) == {name: list(range(1, events + 1)) for name in STREAMS}


def test_receiver_is_killed_and_comes_back(store: RedisStore, tmp_path: Path) -> None:
    receiver = Receiver(tmp_path)
    couriers = Couriers(store, Settings(**hook(receiver)), lambda: True)
    receiver.start()
    couriers.start()
    try:
        wait_for(lambda: store.documents("sinks"), "the courier has begun")
        flood(store)
        for share in (0.1, 0.4, 0.7):
            wait_for(lambda share=share: receiver.count() > share * ALL, f"{share} of all events")
            receiver.kill()
            receiver.start()
        wait_for(lambda: sum(waiting(store).values()) == 0, "all is settled", 60)
    finally:
        couriers.stop(15)
        receiver.kill()
    check(receiver.events())


def test_courier_is_killed_and_another_goes_on(store: RedisStore, valkey_url: str, prefix: str, tmp_path: Path) -> None:
    receiver = Receiver(tmp_path)
    receiver.start()
    config = tmp_path / "tsm.yaml"
    config.write_text(json.dumps({"store": {"url": valkey_url, "prefix": prefix}, **hook(receiver)}))
    couriers = [
        subprocess.Popen([sys.executable, "-c", COURIER, str(config), name], stdout=subprocess.PIPE) for name in "ab"
    ]
    try:
        for courier in couriers:
            assert courier.stdout is not None
            assert courier.stdout.readline() == b"runs\n"
        wait_for(lambda: store.documents("sinks"), "one of them leads")
        leads_a = store.lead("a", 1000)
        leader, other = couriers if leads_a else couriers[::-1]
        flood(store, FEWER)
        wait_for(lambda: receiver.count() > FEWER, "some events")
        leader.kill()
        wait_for(lambda: sum(waiting(store).values()) == 0, "the other has settled the rest", 60)
        assert other.poll() is None
    finally:
        for courier in couriers:
            courier.kill()
            courier.communicate()
        receiver.kill()
    check(receiver.events(), FEWER)


@needs_mosquitto
def test_broker_is_killed_and_comes_back(store: RedisStore, tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    broker.start()
    listener = Listener(broker)
    broker.save()
    settings = Settings(couriers={"retry_first_s": 0.1, "retry_cap_s": 0.5}, mqtt={"url": broker.url})
    couriers = Couriers(store, settings, lambda: True)
    couriers.start()
    try:
        wait_for(lambda: store.documents("sinks"), "the courier has begun")
        flood(store)
        for share in (0.1, 0.4, 0.7):
            wait_for(lambda share=share: len(listener.messages) > share * ALL, f"{share} of all events")
            broker.stop(signal.SIGKILL)
            broker.start()
        wait_for(lambda: sum(waiting(store).values()) == 0, "the broker has acknowledged all", 60)
        wait_for(lambda: len({event["id"] for event in listener.events}) == ALL, "the listener has all")
    finally:
        couriers.stop(15)
        listener.close()
        broker.stop()
    check(listener.events)
