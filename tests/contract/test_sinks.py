"""One suite for every sink of events: webhook, MQTT broker, and the store's own stream that all of them read."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from services.couriers.office import Couriers
from services.settings import Settings, StoreSettings
from services.store import RedisStore, StateStore
from tests.sinks_kit import (
    MOSQUITTO,
    SECRETS,
    Listener,
    Mosquitto,
    Receiver,
    action,
    in_order,
    owned,
    publish,
    wait_for,
)

PREFIXES = (f"sinks{n}:" for n in itertools.count())


@pytest.fixture
def store(valkey_url: str) -> Iterator[RedisStore]:
    store = RedisStore(StoreSettings(url=valkey_url, prefix=next(PREFIXES)))
    yield store
    store.close()


class Told(Protocol):
    """Somebody who is told of events, by one sink."""

    secret: str

    def knobs(self, **only: Any) -> dict[str, Any]:
        """Settings that name it, with a filter."""

    def start(self) -> None:
        """Be there."""

    def stop(self) -> None:
        """Be away, as after a crash."""

    def events(self) -> list[dict[str, Any]]:
        """All that it was told, in order."""

    def close(self) -> None:
        """Be gone."""


class ByWebhook:
    secret = SECRETS[0]

    def __init__(self, batch: int) -> None:
        self.receiver = Receiver()
        self._batch = batch

    def knobs(self, **only: Any) -> dict[str, Any]:
        sink = {"name": "hook", "url": self.receiver.url, "secrets": [self.secret], "batch": self._batch, **only}
        return {"webhooks": {"sinks": [sink], "timeout_s": 2.0, "networks": ["loopback"]}}

    def start(self) -> None:
        self.receiver.start()

    def stop(self) -> None:
        self.receiver.stop()

    def events(self) -> list[dict[str, Any]]:
        assert self.receiver.wrong == []
        return list(self.receiver.events)

    def close(self) -> None:
        self.receiver.stop()


class ByMqtt:
    secret = "br0ker-pa55"

    def __init__(self, folder: Path) -> None:
        import subprocess

        passwords = folder / "passwords"
        tool = str(Path(str(MOSQUITTO)).parents[1] / "bin" / "mosquitto_passwd")
        subprocess.run([tool, "-b", "-c", str(passwords), "tsm", self.secret], check=True, capture_output=True)
        self.broker = Mosquitto(folder, ["allow_anonymous false", f"password_file {passwords}"])
        self.listener: Listener | None = None

    def knobs(self, **only: Any) -> dict[str, Any]:
        return {"mqtt": {"url": self.broker.url, "username": "tsm", "password": self.secret, **only}}

    def start(self) -> None:
        self.broker.start()
        if self.listener is None:
            self.listener = Listener(self.broker, username="tsm", password=self.secret)

    def stop(self) -> None:
        self.broker.stop()

    def events(self) -> list[dict[str, Any]]:
        return self.listener.events if self.listener else []

    def close(self) -> None:
        if self.listener:
            self.listener.close()
        self.broker.stop()


class ByStore:
    """A program that reads the store's stream by itself, and keeps its own place."""

    secret = ""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._cursors: dict[Any, str] = {}
        self._told: list[dict[str, Any]] = []
        self._away = threading.Event()
        self._thread: threading.Thread | None = None

    def knobs(self, **only: Any) -> dict[str, Any]:
        assert not only
        return {}

    def start(self) -> None:
        self._away.clear()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._away.is_set():
            for stream_id in self._store.event_feeds():
                self._cursors.setdefault(("event", stream_id), "0")
            for kind, stream_id, position, record in self._store.tail(self._cursors, 0.1):
                self._cursors[kind, stream_id] = position
                self._told.append(record)

    def stop(self) -> None:
        self._away.set()
        if self._thread:
            self._thread.join()

    def events(self) -> list[dict[str, Any]]:
        return list(self._told)

    def close(self) -> None:
        self.stop()


KINDS = [
    "webhook",
    "webhook-batch",
    pytest.param("mqtt", marks=pytest.mark.skipif(not MOSQUITTO, reason="no mosquitto")),
]


@pytest.fixture(params=[*KINDS, "store"])
def told(request: pytest.FixtureRequest, store: RedisStore, tmp_path: Path) -> Iterator[Told]:
    made: dict[str, Callable[[], Told]] = {
        "webhook": lambda: ByWebhook(1),
        "webhook-batch": lambda: ByWebhook(20),
        "mqtt": lambda: ByMqtt(tmp_path),
        "store": lambda: ByStore(store),
    }
    told = made[request.param]()
    told.start()
    yield told
    told.close()


@contextlib.contextmanager
def delivering(store: StateStore, knobs: dict[str, Any], leads: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """The couriers of a service with these settings, which have seen the streams that there are."""
    quick = {"retry_first_s": 0.05, "retry_cap_s": 0.2, "attempts": 3}
    couriers = Couriers(store, Settings(**{"couriers": quick, **knobs}), leads)
    couriers.start()
    if knobs and leads():
        wait_for(lambda: store.documents("sinks"), "the couriers have begun")
    yield
    couriers.stop(timeout_s=15)


def test_events_arrive_in_the_order_of_their_stream(store: RedisStore, told: Told) -> None:
    leases = [owned(store, name) for name in ("a", "b", "c")]
    with delivering(store, told.knobs()):
        for n in range(1, 31):
            for lease in leases:
                publish(store, lease, [action(lease.stream_id, n)])
        wait_for(lambda: len(told.events()) >= 90, "all events")
        late = owned(store, "late")
        publish(store, late, [action("late", 1)])
        wait_for(lambda: len(told.events()) == 91, "a stream that came later is told from its first event")
    assert in_order(told.events()) == {**{name: list(range(1, 31)) for name in "abc"}, "late": [1]}
    event = next(one for one in told.events() if one["partitionkey"] == "b")
    kept = store.events("b", limit=1)[0]
    published_s = kept.pop("published_s")
    assert {**event, "published_s": published_s} == {**kept, "published_s": published_s}, "told as it was written"


def test_nothing_is_lost_while_the_sink_is_away(store: RedisStore, told: Told) -> None:
    lease = owned(store, "a")
    with delivering(store, told.knobs()):
        publish(store, lease, [action("a", n) for n in range(20)])
        wait_for(lambda: told.events(), "the first event")
        told.stop()
        publish(store, lease, [action("a", n) for n in range(20, 40)])
        told.start()
        wait_for(lambda: len({event["id"] for event in told.events()}) == 40, "all events")
    assert in_order(told.events()) == {"a": list(range(1, 41))}


def test_nothing_is_lost_while_the_couriers_change(store: RedisStore, told: Told) -> None:
    lease = owned(store, "a")
    first_leads = True
    with delivering(store, told.knobs(), lambda: first_leads), delivering(store, told.knobs(), lambda: not first_leads):
        for n in range(60):
            publish(store, lease, [action("a", n)])
            first_leads = n % 20 < 10
        publish(store, lease, [action("a", 60)])
        wait_for(lambda: len({event["id"] for event in told.events()}) == 61, "all events")
    publish(store, lease, [action("a", n) for n in range(10)])
    store.delete_stream("a")
    with delivering(store, told.knobs()):
        wait_for(lambda: len({event["id"] for event in told.events()}) == 71, "those of a deleted stream, too")
    assert in_order(told.events()) == {"a": list(range(1, 72))}


@pytest.mark.parametrize("told", KINDS, indirect=True)
def test_a_sink_is_told_what_it_wants(store: RedisStore, told: Told) -> None:
    leases = [owned(store, name) for name in ("door-1", "door-2", "yard")]
    with delivering(store, told.knobs(streams=["door-*"], types=["action.new", "*.end"], labels=["left"])):
        for lease in leases:
            phases = [("left", "new"), ("left", "update"), ("right", "new"), ("left", "end")]
            publish(store, lease, [action(lease.stream_id, n, *about) for n, about in enumerate(phases)])
        wait_for(lambda: len(told.events()) == 4, "what is wanted")
        publish(store, leases[0], [action("door-1", 9)])
        wait_for(lambda: len(told.events()) == 5, "the marks went over what is not wanted")
    assert in_order(told.events()) == {"door-1": [1, 4, 5], "door-2": [1, 4]}


@pytest.mark.parametrize("told", KINDS, indirect=True)
def test_no_secret_is_told(store: RedisStore, told: Told, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for noisy in ("httpx", "httpcore"):  # as every actor of the service does
        caplog.set_level(logging.WARNING, noisy)
    lease = owned(store, "a")
    settings = Settings(**told.knobs())
    with delivering(store, told.knobs()):
        told.stop()
        publish(store, lease, [action("a", 1)])
        wait_for(lambda: "fails" in caplog.text, "a failure is logged")
        told.start()
        wait_for(told.events, "the event")
    kept = [text for kind in ("sinks", "dead_letters:hook") for text in store.documents(kind).values()]
    for text in (caplog.text, repr(settings), settings.model_dump_json(), *kept, str(told.events())):
        assert told.secret not in text
        assert "/hook" not in text, "a receiver's path may be a secret"
