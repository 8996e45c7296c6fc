"""What the tests of the sinks share: events, a receiver of webhooks, a mosquitto of their own and one who listens."""

from __future__ import annotations

import base64
import hmac
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from services.schemas import Lease, SourceSpec, StreamSpec, cloud_event, state_event
from services.store import StateStore
from tsm_core.types import ActionEvent, EventPhase

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
KEYS = (bytes(range(32)), bytes(range(32, 64)))
SECRETS = tuple("whsec_" + base64.b64encode(key).decode() for key in KEYS)

needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def wait_for(true: Callable[[], Any], what: str, within_s: float = 30.0) -> None:
    """Return once `true`; fails with `what` otherwise."""
    until = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until, f"not within {within_s} s: {what}"
        time.sleep(0.01)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def action(
    stream_id: str, n: int, label: str = "left", phase: EventPhase = "new", subject: str = "a"
) -> dict[str, Any]:
    """An event of an action; its frame number is `n`."""
    end_s = 1e9 + n if phase == "end" else None
    return cloud_event(
        ActionEvent(stream_id, subject, phase, label, 0.9, 0.9, ((label, 0.9),), "m", n, n, 1e9 + n, 1e9, 0.0, end_s)
    )


def stopped(stream_id: str) -> dict[str, Any]:
    """The event of a stream that was stopped."""
    return state_event(stream_id, "RUNNING", "STOPPED", "", 1e9)


def owned(store: StateStore, stream_id: str) -> Lease:
    """A registered stream with an owner."""
    store.put_stream(StreamSpec(id=stream_id, source=SourceSpec(uri="rtsp://127.0.0.1/1")), create=True)
    return store.assign(stream_id, "replica")


def publish(store: StateStore, lease: Lease, events: Sequence[dict[str, Any]]) -> None:
    """Publish in the portions of a replica."""
    for at in range(0, len(events), 200):
        store.publish(lease, events=events[at : at + 200])


class Receiver:
    """A receiver of webhooks that checks every signature; `answer` decides by the number of the request, from 0."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self.events: list[dict[str, Any]] = []
        self.requests: list[dict[str, str]] = []
        self.wrong: list[str] = []
        self.answer: Callable[[int, list[dict[str, Any]]], tuple[int, dict[str, str]]] = lambda n, events: (204, {})
        self.key = KEYS[0]
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver.take(self)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def take(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        names = ("webhook-id", "webhook-timestamp", "webhook-signature", "content-type")
        headers = {name: str(request.headers[name]) for name in names}
        content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        right = "v1," + base64.b64encode(hmac.digest(self.key, content, "sha256")).decode()
        if (
            right not in headers["webhook-signature"].split()
            or abs(time.time() - int(headers["webhook-timestamp"])) > 60
        ):
            self.wrong.append(headers["webhook-signature"])
        told = json.loads(body)
        events = told if isinstance(told, list) else [told]
        status, further = self.answer(len(self.requests), events)
        self.requests.append(headers)
        if self._server is None:
            request.close_connection = True
            return  # stopped: connections that are still open get no answer
        if 200 <= status < 300:
            self.events += events
        request.send_response(status)
        for name, value in {"Content-Length": "0", **further}.items():
            request.send_header(name, value)
        request.end_headers()


class Mosquitto:
    """A broker on a port of its own, whose sessions outlive it; `options` are lines of its configuration."""

    def __init__(self, folder: Path, options: Sequence[str] = ("allow_anonymous true",)) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._saved = folder / "mosquitto.db"
        self._config = folder / "mosquitto.conf"
        lines = [
            f"listener {self.port} 127.0.0.1",
            "persistence true",
            f"persistence_location {folder}/",
            "max_queued_messages 0",
            "queue_qos0_messages true",
            "user root",
            *options,
        ]
        self._config.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert MOSQUITTO is not None
        self._process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self._config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self._listens, "mosquitto listens")

    def save(self) -> None:
        """Have it write its sessions and retained messages to disk."""
        assert self._process is not None
        self._saved.unlink(missing_ok=True)
        self._process.send_signal(signal.SIGUSR1)
        wait_for(self._saved.exists, "mosquitto has saved")

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(10)
            self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class Listener:
    """A subscriber whose session the broker keeps; what it got, in order.

    It acknowledges nothing (QoS 0): an acknowledgement that fails as the broker dies would make it throw away what it
    has received and not yet read.
    """

    def __init__(self, broker: Mosquitto, topics: str = "#", username: str = "", password: str = "") -> None:
        self.messages: list[paho.MQTTMessage] = []
        self._subscribed = threading.Event()
        self._topics = topics
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id="listener", protocol=paho.MQTTv5)
        if username:
            self.client.username_pw_set(username, password)
        self.client.on_message = lambda _, __, message: self.messages.append(message)
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.on_connect = self._on_connect
        self.client.reconnect_delay_set(1, 1)
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self.client.connect("127.0.0.1", broker.port, clean_start=False, properties=properties)
        self.client.loop_start()
        assert self._subscribed.wait(30)

    def _on_connect(self, client: paho.Client, _: Any, flags: Any, *__: Any) -> None:
        if not flags.session_present:
            client.subscribe(self._topics, qos=0)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events, in the order of their arrival."""
        return [json.loads(one.payload) for one in list(self.messages) if one.topic == "tsm/events"]

    def retained(self, topic: str) -> str:
        """What was last told on a topic; empty: nothing."""
        told = [one.payload.decode() for one in list(self.messages) if one.topic == topic]
        return told[-1] if told else ""

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def in_order(events: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Sequences by stream in the order of first arrival; fails where two events share an id, or an event has two."""
    sequences: dict[str, tuple[str, int]] = {}
    for event in events:
        about = (event["partitionkey"], event["sequence"])
        assert sequences.setdefault(event["id"], about) == about
    assert len(set(sequences.values())) == len(sequences), "an event came under two ids"
    found: dict[str, list[int]] = {}
    for stream_id, sequence in sequences.values():
        found.setdefault(stream_id, []).append(sequence)
    return found


def python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of its own that runs `code`."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments])


def each(*ends: Callable[[], None]) -> Iterator[None]:
    """For fixtures: yield once, then call all ends."""
    try:
        yield
    finally:
        for end in ends:
            end()
