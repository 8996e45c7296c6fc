"""What a courier does with refusals, gaps and dead letters, and what the broker's topics say."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.couriers.courier import Ledger
from services.couriers.mqtt import MqttSink
from services.couriers.office import Couriers, sink_views
from services.couriers.sink import SinkUnavailable
from services.couriers.webhook import seconds_of, signed, signing_keys
from services.manager import StreamManager
from services.settings import MqttSettings, Settings, SettingsError, StoreSettings, load_settings
from services.store import MemoryStore, StateStore
from tests.sinks_kit import (
    KEYS,
    SECRETS,
    Listener,
    Mosquitto,
    Receiver,
    action,
    in_order,
    needs_mosquitto,
    owned,
    publish,
    stopped,
    wait_for,
)
from tests.unit.services.http_kit import serving

NONE: dict[str, str] = {}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    receiver.start()
    yield receiver
    receiver.stop()


def hook(receiver: Receiver, couriers: dict[str, Any] | None = None, **knobs: Any) -> Settings:
    """Settings with one webhook."""
    sink = {"name": "hook", "url": receiver.url, "secrets": [SECRETS[0]], **knobs}
    quick = {"retry_first_s": 0.02, "retry_cap_s": 0.05, "attempts": 3, **(couriers or {})}
    return Settings(couriers=quick, webhooks={"sinks": [sink], "timeout_s": 1.0, "networks": ["loopback"]})


@contextlib.contextmanager
def delivering(store: StateStore, settings: Settings) -> Iterator[None]:
    couriers = Couriers(store, settings, lambda: True)
    couriers.start()
    wait_for(lambda: store.documents("sinks"), "the couriers have begun")
    yield
    couriers.stop(timeout_s=15)


def ledger(store: StateStore) -> Ledger:
    (text,) = store.documents("sinks").values()
    return Ledger.model_validate_json(text)


def settled(store: StateStore) -> bool:
    """True when every event is."""
    marks = ledger(store).marks
    return all(marks.get(stream_id, 0) == newest for stream_id, newest in store.event_feeds().items())


@contextlib.contextmanager
def door(store: StateStore, settings: Settings) -> Iterator[httpx.Client]:
    with serving(StreamManager(store, settings, models=())) as url, httpx.Client(base_url=url, trust_env=False) as http:
        yield http


@pytest.mark.parametrize("batch", [1, 10])
def test_one_that_is_refused_is_a_dead_letter_and_the_others_arrive(receiver: Receiver, batch: int) -> None:
    store = MemoryStore()
    lease = owned(store, "a")
    settings = hook(receiver, batch=batch)
    receiver.answer = lambda n, events: (400 if any(e["sequence"] == 3 for e in events) else 200, NONE)
    with delivering(store, settings), door(store, settings) as http:
        publish(store, lease, [action("a", n) for n in range(6)])
        wait_for(lambda: settled(store), "all is settled")
        assert in_order(receiver.events) == {"a": [1, 2, 4, 5, 6]}
        (sink,) = http.get("/v1/sinks").json()["sinks"]
        (letter,) = sink["dead_letters"]
        assert (sink["delivered"], sink["dead"], sink["waiting"], sink["error"]) == (5, 1, 0, None)
        assert letter["event_id"] == store.events("a")[2]["id"]
        assert letter["why"] == f"http://127.0.0.1:{receiver.port} answers 400"

        assert http.post("/v1/sinks/hook/redeliver").json() == {"dead_letters": 1}
        wait_for(lambda: not store.documents("sink_orders"), "it was tried")
        assert len(store.documents("dead_letters:hook")) == 1, "refused again"
        receiver.answer = lambda n, events: (200, NONE)
        assert http.post("/v1/sinks/hook/redeliver").status_code == 202
        wait_for(lambda: not store.documents("dead_letters:hook"), "it is delivered")
        missing = http.post("/v1/sinks/nope/redeliver")
        assert (missing.status_code, missing.json()["reason"]) == (404, "sink_not_found")
    assert in_order(receiver.events) == {"a": [1, 2, 4, 5, 6, 3]}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_sink_that_always_says_later_gets_no_more_than_its_attempts(receiver: Receiver, batch: int) -> None:
    store = MemoryStore()
    lease = owned(store, "a")
    receiver.answer = lambda n, events: (503, NONE)
    with delivering(store, hook(receiver, {"dead_letters": 2}, batch=batch)):
        publish(store, lease, [action("a", n) for n in range(4)])
        wait_for(lambda: settled(store), "all is settled")
        assert len(receiver.requests) < 4 * 3 + 4 + 1
        letters = [json.loads(text) for text in store.documents("dead_letters:hook").values()]
        assert sorted(letter["event"]["sequence"] for letter in letters) == [3, 4], "the newest are kept"
        assert all("answers 503" in letter["why"] for letter in letters)
        assert ledger(store).dropped_letters == 2


def test_retry_after_is_obeyed(receiver: Receiver) -> None:
    store = MemoryStore()
    lease = owned(store, "a")
    times: list[float] = []

    def answer(n: int, events: list[dict[str, Any]]) -> tuple[int, dict[str, str]]:
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}) if n == 0 else (200, NONE)

    receiver.answer = answer
    with delivering(store, hook(receiver)):
        publish(store, lease, [action("a", 1)])
        wait_for(lambda: ledger(store).failing_since, "the failure is noted")
        assert "answers 429" in str(ledger(store).error)
        wait_for(lambda: receiver.events, "the event")
        wait_for(lambda: ledger(store).failing_since is None, "the failure is over")
    assert times[1] - times[0] >= 1.0


def test_seconds_of_a_date() -> None:
    assert seconds_of("7") == 7
    assert seconds_of("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert seconds_of("Fri, 31 Dec 2999 23:59:59 GMT") > 1e9
    assert seconds_of("soon") == seconds_of("") == seconds_of("-1") == 0


def test_a_redirect_is_not_followed(receiver: Receiver) -> None:
    store = MemoryStore()
    lease = owned(store, "a")
    receiver.answer = lambda n, events: (307, {"Location": receiver.url})
    with delivering(store, hook(receiver)):
        publish(store, lease, [action("a", 1)])
        wait_for(lambda: settled(store), "all is settled")
    assert len(receiver.requests) == 1
    (letter,) = store.documents("dead_letters:hook").values()
    assert "redirects are not followed" in letter


def test_an_address_outside_the_policy_is_not_reached(receiver: Receiver) -> None:
    store = MemoryStore()
    lease = owned(store, "a")
    settings = hook(receiver)
    policy = settings.webhooks.model_copy(update={"networks": ("private", "public")})
    with delivering(store, settings.model_copy(update={"webhooks": policy})):
        publish(store, lease, [action("a", 1)])
        wait_for(lambda: ledger(store).failing_since, "the failure is noted")
        assert "webhooks.networks" in str(ledger(store).error)
    assert receiver.requests == []
    assert not settled(store), "nothing is thrown away: the policy may be mended"


def test_what_was_trimmed_is_counted(receiver: Receiver) -> None:
    store = MemoryStore(StoreSettings(events_kept=5))
    lease = owned(store, "a")
    receiver.stop()
    with delivering(store, hook(receiver)):
        publish(store, lease, [action("a", n) for n in range(12)])
        wait_for(lambda: ledger(store).failing_since, "the receiver is away")
        publish(store, lease, [action("a", n) for n in range(8)])
        receiver.start()
        wait_for(lambda: settled(store), "all is settled")
        assert (ledger(store).lost, ledger(store).delivered) == (15, 5)
    assert in_order(receiver.events) == {"a": [16, 17, 18, 19, 20]}


def test_two_secrets_sign_both(receiver: Receiver, tmp_path: Path) -> None:
    store = MemoryStore()
    lease = owned(store, "a")
    file = tmp_path / "secrets"
    file.write_text("\n".join(SECRETS) + "\n")
    with delivering(store, hook(receiver, secrets=[], secret_file=str(file))):
        for n, key in enumerate(KEYS):
            receiver.key = key
            publish(store, lease, [action("a", n)])
            wait_for(lambda n=n: len(receiver.events) == n + 1, "the event")
    assert receiver.wrong == []
    assert receiver.requests[0]["content-type"] == "application/cloudevents+json"
    assert receiver.requests[0]["webhook-id"] == receiver.events[0]["id"].replace(".", "_")
    assert set(receiver.events[0]) >= {"specversion", "id", "source", "type", "time", "data", "sequence"}
    assert all(name.isalnum() for name in receiver.events[0]), "names that CloudEvents allows"


@pytest.mark.parametrize(
    ("secrets", "says"),
    [
        ([], "has 0 secrets"),
        (["hunter2-hunter2"], "is not whsec_"),
        (["whsec_AAAA"], "24 to 64 bytes"),
        ([SECRETS[0].removeprefix("whsec_")], "is not whsec_"),
    ],
)
def test_bad_secrets_are_told_without_repeating_them(receiver: Receiver, secrets: list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as error:
        Couriers(MemoryStore(), hook(receiver, secrets=secrets), lambda: True)
    assert all(secret not in str(error.value) for secret in secrets)


def test_names_of_sinks_differ() -> None:
    for names in (["a", "a"], ["mqtt"]):
        sinks = [{"name": name, "url": "https://example.com"} for name in names]
        with pytest.raises(SettingsError, match="names of sinks must differ"):
            load_settings(data={"webhooks": {"sinks": sinks}})


@needs_mosquitto
def test_topics_say_what_goes_on(tmp_path: Path) -> None:
    store = MemoryStore()
    lease = owned(store, "door")
    broker = Mosquitto(tmp_path)
    broker.start()
    listener = Listener(broker)
    settings = Settings(mqtt={"url": broker.url})
    topic = "homeassistant/binary_sensor/tsm-live_door/left/config"
    try:
        with delivering(store, settings):
            wait_for(lambda: listener.retained("tsm/available") == "online", "online")
            publish(store, lease, [action("door", 1)])
            wait_for(lambda: listener.retained("tsm/door/left") == "ON", "the action goes on")
            found = json.loads(listener.retained(topic))
            assert (found["state_topic"], found["availability_topic"]) == ("tsm/door/left", "tsm/available")
        wait_for(lambda: listener.retained("tsm/available") == "offline", "a planned end is told")
        with delivering(store, settings):
            wait_for(lambda: listener.retained("tsm/available") == "online", "online again")
            publish(store, lease, [action("door", 2, phase="update"), action("door", 3, phase="end")])
            wait_for(lambda: listener.retained("tsm/door/left") == "OFF", "it is over")
            publish(store, lease, [action("door", 4, "up/down", subject="b")])
            wait_for(lambda: listener.retained("tsm/door/up_down") == "ON", "a label that is no topic")
            publish(store, lease, [stopped("door")])
            wait_for(lambda: listener.retained("tsm/door/up_down") == "OFF", "nothing goes on in a stopped stream")
            assert json.loads(listener.retained("tsm/stats"))["streams"] == 1
        assert in_order(listener.events) == {"door": [1, 2, 3, 4, 5]}
    finally:
        listener.close()
        broker.stop()


def reaches(sink: MqttSink) -> bool:
    with contextlib.suppress(SinkUnavailable):
        sink.idle()
        return True
    return False


@needs_mosquitto
def test_a_broker_shows_a_certificate(tmp_path: Path) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    subprocess.run(made, check=True, capture_output=True)
    options = [f"certfile {tmp_path}/cert.pem", f"keyfile {tmp_path}/key.pem", "allow_anonymous true"]
    broker = Mosquitto(tmp_path, options)
    broker.start()
    url = broker.url.replace("mqtt:", "mqtts:")
    known = MqttSink(MqttSettings(url=url, ca_file=tmp_path / "cert.pem"), dict)
    unknown = MqttSink(MqttSettings(url=url, client_id="other"), dict)
    try:
        wait_for(lambda: reaches(known), "the broker")
        with pytest.raises(SinkUnavailable, match="does not answer"):
            unknown.idle()
    finally:
        known.close()
        unknown.close()
        broker.stop()
    with pytest.raises(SettingsError, match=r"mqtt\.ca_file .*nothing\.pem"):
        MqttSink(MqttSettings(url=url, ca_file=tmp_path / "nothing.pem"), dict)


@needs_mosquitto
def test_a_courier_that_dies_is_offline(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    broker.start()
    listener = Listener(broker, "tsm/available")
    sink = MqttSink(MqttSettings(url=broker.url), dict)
    try:
        wait_for(lambda: reaches(sink), "the broker")
        wait_for(lambda: listener.retained("tsm/available") == "online", "online")
        client = sink._client
        assert client is not None
        client.loop_stop()
        client.socket().close()  # as the kernel does for a process that was killed
        wait_for(lambda: listener.retained("tsm/available") == "offline", "the broker tells the last will")
    finally:
        listener.close()
        broker.stop()


def test_a_broker_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    store = MemoryStore()
    lease = owned(store, "a")
    settings = Settings(mqtt={"url": "mqtt://127.0.0.1:1", "password": "s3cret-of-the-broker", "username": "tsm"})
    with delivering(store, settings), door(store, settings) as http:
        publish(store, lease, [action("a", 1)])
        wait_for(lambda: ledger(store).failing_since, "the failure is noted")
        (sink,) = http.get("/v1/sinks").json()["sinks"]
        assert (sink["kind"], sink["target"], sink["waiting"]) == ("mqtt", "mqtt://127.0.0.1:1", 1)
        assert "does not answer" in sink["error"]


def test_the_documented_verification_verifies() -> None:
    page = (Path(__file__).parents[3] / "docs" / "events.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    body = b'{"id": "1"}'
    headers = signed([KEYS[1], KEYS[0]], "1", time.time(), body)
    for secret in SECRETS:
        assert names["verify"](secret, headers, body)
        assert not names["verify"](secret, headers, body + b" ")
        assert not names["verify"](secret, signed([KEYS[0]], "1", time.time() - 400, body), body)
    assert not names["verify"](SECRETS[1], signed([KEYS[0]], "1", time.time(), body), body)


def test_the_documented_command_makes_a_secret(receiver: Receiver) -> None:
    page = (Path(__file__).parents[3] / "docs" / "events.md").read_text()
    (command,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    made = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True).stdout.strip()
    assert len(signing_keys(hook(receiver, secrets=[made]).webhooks.sinks[0])[0]) == 32


def test_the_documented_settings_are_settings(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "events.md").read_text()
    secrets, password = tmp_path / "alarm", tmp_path / "mqtt"
    secrets.write_text(SECRETS[0])
    password.write_text("s3cret\n")
    text = "".join(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    config = tmp_path / "tsm.yaml"
    config.write_text(text.replace("/run/secrets", str(tmp_path)))
    settings = load_settings(config)
    Couriers(MemoryStore(), settings, lambda: False)
    assert [view.target for view in sink_views(MemoryStore(), settings)] == [
        "https://alarm.example.com",
        "mqtts://broker.example.com",
    ]
