"""Events to an MQTT 5 broker: the events themselves, a state per stream and label, and Home Assistant's discovery."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from services.couriers.sink import Event, EventRefused, Memo, Sink, SinkUnavailable, encode, structured
from services.couriers.webhook import secrets_of_file
from services.schemas import EVENT_PREFIX
from services.settings import MqttSettings, SettingsError

NAME = "mqtt"
BATCH = 100
CONNECT_S = 2.0  # longest wait for the connection
ACK_S = 5.0  # longest wait for the broker's acknowledgements; it may come back meanwhile
SESSION_S = 3600  # how long the broker keeps our session while we are away
RECONNECT_S = (1, 15)
Message = tuple[str, bytes]  # topic, payload
SILENT = {"STOPPED", "PAUSED", "FAILED", "ENDED"}  # states in which nothing goes on in a stream
OFFLINE, ONLINE = "offline", "online"


class MqttSink(Sink):
    """One broker. Everything is QoS 1, and a delivery ends when the broker has acknowledged all of it.

    The connection is kept and opened again by paho's thread, with the session that the broker has kept; what was under
    way is sent again by it. An event that the broker refuses, by its access list for example, is a refusal. Raises
    SettingsError when password or certificates cannot be read. stats gives the counters for `PREFIX/stats`.
    """

    name = NAME
    batch = BATCH

    def __init__(self, settings: MqttSettings, stats: Callable[[], dict[str, Any]]) -> None:
        assert settings.url is not None
        self._settings = settings
        self._stats = stats
        self._url = urlsplit(settings.url)
        self._password = _password(settings)
        self._tls = _tls(settings) if self._url.scheme == "mqtts" else None
        self._event_properties = _properties(PacketTypes.PUBLISH)
        self._event_properties.ContentType = "application/cloudevents+json; charset=utf-8"
        self._client: paho.Client | None = None
        self._changed = threading.Condition()
        self._connected = False
        self._why = "not connected yet"
        self._fresh = False  # connected anew: the broker may have forgotten what is retained
        self._acknowledged: dict[int, bool] = {}  # by message: taken, or refused
        self._under_way: dict[str, list[int]] = {}  # messages by event
        self._open: Memo = {}  # by stream and label: ids of the actions that go on, or of the objects in sight
        self._stats_due = 0.0

    @property
    def target(self) -> str:
        """The broker's address."""
        return f"{self._url.scheme}://{self._url.netloc}"

    def deliver(self, events: Sequence[Event]) -> None:
        """Tell the events and the states that follow from them. Raises SinkUnavailable, EventRefused."""
        client = self._connection()
        for event in events:
            if event["id"] not in self._under_way:
                self._under_way[event["id"]] = [self._publish(client, *message) for message in self._messages(event)]
        wanted = {number for event in events for number in self._under_way[event["id"]]}
        with self._changed:
            if not self._changed.wait_for(lambda: wanted <= self._acknowledged.keys(), ACK_S):
                raise SinkUnavailable(f"{self.target} does not acknowledge within {ACK_S:g} s ({self._why})")
            taken = [self._acknowledged.pop(number) for number in wanted]
        for event in events:
            del self._under_way[event["id"]]
        if not all(taken):
            raise EventRefused(f"{self.target} refuses the message: look at the broker's access list")

    def idle(self) -> None:
        """Tell counters now and then, and what is retained after a new connection. Raises SinkUnavailable."""
        client = self._connection()
        if self._fresh:
            self._fresh = False
            for stream_id, labels in self._open.items():
                for label in labels:
                    for message in (*self._discovery(stream_id, label), self._state(stream_id, label)):
                        self._publish(client, *message)
        if time.monotonic() >= self._stats_due:
            self._stats_due = time.monotonic() + self._settings.stats_s
            self._publish(client, self._topic("stats"), encode(self._stats()))
        told = {number for numbers in self._under_way.values() for number in numbers}
        with self._changed:
            self._acknowledged = {number: taken for number, taken in self._acknowledged.items() if number in told}

    def forget(self, stream_id: str) -> None:
        """Clear what is retained of the stream. Raises SinkUnavailable."""
        client = self._connection()
        for label in self._open.get(stream_id, {}):
            for topic, _ in (*self._discovery(stream_id, label), self._state(stream_id, label)):
                self._publish(client, topic, b"")
        self._open.pop(stream_id, None)

    def memo(self) -> Memo:
        """What goes on, by stream and label."""
        return self._open

    def recall(self, memo: Memo) -> None:
        """Go on from there."""
        self._open = memo

    def close(self) -> None:
        """Say that we are offline, and disconnect."""
        client, self._client = self._client, None
        if client is None:
            return
        with contextlib.suppress(RuntimeError, ValueError):  # not connected: the will has said it
            client.publish(self._topic("available"), OFFLINE, qos=1, retain=True).wait_for_publish(1.0)
        client.disconnect()
        client.loop_stop()
        with self._changed:
            self._connected = False
            self._acknowledged.clear()
        self._under_way.clear()

    # what is told

    def _messages(self, event: Event) -> Iterator[Message]:
        """The event, and the states that it changes."""
        yield self._topic("events"), encode(structured(event))
        stream_id, data = str(event["partitionkey"]), event["data"]
        kind, _, phase = str(event["type"]).removeprefix(f"{EVENT_PREFIX}.").partition(".")
        labels = self._open.setdefault(stream_id, {})
        before = {label: len(state["ids"]) for label, state in labels.items()}
        if kind == "stream" and data["after"] in SILENT:
            for state in labels.values():
                state["ids"] = []
        elif kind in ("action", "detection"):
            label, subject = str(data["label"]), str(event["subject"])
            if label not in labels:
                labels[label] = {"kind": kind, "ids": []}
                yield from self._discovery(stream_id, label)
            for state in labels.values():
                state["ids"] = [one for one in state["ids"] if one != subject]
            if phase != "end":
                labels[label]["ids"].append(subject)
        for label, state in labels.items():
            if before.get(label) != len(state["ids"]):
                yield self._state(stream_id, label)

    def _state(self, stream_id: str, label: str) -> Message:
        """ON or OFF for an action, the number of objects for what is detected."""
        state = self._open[stream_id][label]
        count = len(state["ids"])
        shown = str(count) if state["kind"] == "detection" else "ON" if count else "OFF"
        return self._topic(stream_id, label), shown.encode()

    def _discovery(self, stream_id: str, label: str) -> Iterable[Message]:
        """A binary sensor of Home Assistant for the stream and label, if it is to be discovered."""
        if not self._settings.discovery:
            return
        device, name = f"{self._settings.client_id}_{stream_id}", re.sub(r"[^A-Za-z0-9_-]", "_", label)
        topic = f"{self._settings.discovery}/binary_sensor/{device}/{name}/config"
        told: dict[str, Any] = {
            "name": label,
            "unique_id": f"{device}_{name}",
            "state_topic": self._topic(stream_id, label),
            "availability_topic": self._topic("available"),
            "device": {"identifiers": [device], "name": stream_id, "manufacturer": "tsm-live"},
            "origin": {"name": "tsm-live"},
        }
        if self._open[stream_id][label]["kind"] == "detection":
            told["value_template"] = "{{ 'ON' if value | int > 0 else 'OFF' }}"
        yield topic, encode(told)

    def _topic(self, *parts: str) -> str:
        return "/".join([self._settings.prefix, *(re.sub(r"[/+#\0]", "_", part) for part in parts)])

    # how it is told

    def _publish(self, client: paho.Client, topic: str, payload: bytes) -> int:
        """The number of the message, which paho sends now or once it is connected."""
        event = topic == self._topic("events")
        properties = self._event_properties if event else None
        return client.publish(topic, payload, qos=1, retain=not event, properties=properties).mid

    def _connection(self) -> paho.Client:
        """The connected client. Raises SinkUnavailable."""
        client = self._client or self._connect()
        with self._changed:
            if not self._changed.wait_for(lambda: self._connected, CONNECT_S):
                raise SinkUnavailable(f"{self.target} does not answer: {self._why}")
        return client

    def _connect(self) -> paho.Client:
        settings = self._settings
        client = self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=settings.client_id, protocol=paho.MQTTv5
        )
        client.on_connect, client.on_disconnect = self._on_connect, self._on_disconnect
        client.on_connect_fail, client.on_publish = self._on_connect_fail, self._on_publish
        if settings.username:
            client.username_pw_set(settings.username, self._password)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        client.will_set(self._topic("available"), OFFLINE, qos=1, retain=True)
        client.reconnect_delay_set(*RECONNECT_S)
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = SESSION_S
        port = self._url.port or (8883 if self._tls else 1883)
        client.connect_async(str(self._url.hostname), port, clean_start=False, properties=properties)
        client.loop_start()
        return client

    def _on_connect(self, client: paho.Client, _: Any, __: Any, code: ReasonCode, ___: Any) -> None:
        with self._changed:
            self._connected, self._why = not code.is_failure, str(code)
            self._fresh = self._fresh or self._connected
            self._changed.notify_all()
        if not code.is_failure:
            client.publish(self._topic("available"), ONLINE, qos=1, retain=True)

    def _on_disconnect(self, _: paho.Client, __: Any, ___: Any, code: ReasonCode, ____: Any) -> None:
        with self._changed:
            self._connected, self._why = False, str(code)

    def _on_connect_fail(self, *_: Any) -> None:
        with self._changed:
            self._connected, self._why = False, "no connection"

    def _on_publish(self, _: paho.Client, __: Any, number: int, code: ReasonCode, ___: Any) -> None:
        with self._changed:
            self._acknowledged[number] = not code.is_failure
            self._changed.notify_all()


_properties: Callable[[int], Any] = Properties  # its types are not told


def _password(settings: MqttSettings) -> str | None:
    if settings.password_file is not None:
        lines = secrets_of_file(settings.password_file, "mqtt")
        if len(lines) != 1:
            raise SettingsError(f"mqtt.password_file {settings.password_file} holds {len(lines)} lines: one is needed")
        return lines[0]
    return settings.password.get_secret_value() if settings.password else None


def _tls(settings: MqttSettings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise SettingsError(f"mqtt.ca_file {settings.ca_file} cannot be used: {error.strerror or error}") from None
