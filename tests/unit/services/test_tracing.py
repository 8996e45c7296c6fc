import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.sdk import trace as sdk

from services import tracing
from services.manager import StreamManager
from services.settings import Settings, SettingsError, TelemetrySettings, load_settings
from services.store import MemoryStore
from services.stream_models import StreamModel
from tests.unit.services.engine_kit import MODEL, give, picture, processed, running, spec, wait
from tests.unit.services.http_kit import MODELS, serving
from tests.unit.services.tracing_kit import Collector

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-2] + "00"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    tracing.shut_down()
    made.stop()


def configure(collector: Collector, **more: Any) -> None:
    tracing.configure(TelemetrySettings(otlp_endpoint=collector.url, **more), "r1")


def test_a_request_reaches_the_collector_below_its_callers_span(collector):
    configure(collector)
    with serving(StreamManager(MemoryStore(), Settings(), models=MODELS)) as url:
        answer = httpx.get(f"{url}/v1/streams/none", headers={"traceparent": CALLER}, trust_env=False)
        alone = httpx.get(f"{url}/v1/streams", trust_env=False)
        unsampled = httpx.get(f"{url}/v1/models", headers={"traceparent": UNSAMPLED}, trust_env=False)
    tracing.shut_down()
    assert collector.paths == {"/v1/traces"}
    (span,) = collector.named("GET /v1/streams/{stream_id}")
    assert (span["trace"], span["parent"]) == (CALLER.split("-")[1], CALLER.split("-")[2])
    assert answer.headers["traceparent"] == f"00-{span['trace']}-{span['span']}-01"
    assert (span["http.response.status_code"], span["service"], span["replica"]) == (404, "tsm-live", "r1")
    (root,) = collector.named("GET /v1/streams")
    assert root["parent"] == ""
    assert alone.headers["traceparent"].split("-")[1] == root["trace"]
    assert collector.named("GET /v1/models") == []  # its caller said so
    assert unsampled.headers["traceparent"].split("-")[1] == CALLER.split("-")[1]


def test_the_settings_share_of_requests_is_traced(collector):
    configure(collector, request_sample=0.0)
    with tracing.request_span("quiet", None):
        assert tracing.current_traceparent() is not None
        with tracing.span("inside"):
            pass
    with tracing.request_span("wanted", CALLER), tracing.span("inside", model="motion9", nothing=None):
        pass
    tracing.shut_down()
    (inside,) = collector.named("inside")
    assert inside["parent"] == collector.named("wanted")[0]["span"]
    assert inside["model"] == "motion9"
    assert "nothing" not in inside
    assert len(collector.spans) == 2


def test_a_sampled_frame_is_followed_through_every_stage_into_its_events(collector):
    configure(collector, frame_sample=1.0)
    store = MemoryStore()
    with running(store) as (engine, cameras):
        give(store, engine, spec("door", models=(StreamModel(name=MODEL, threshold=0.01, off_threshold=0.0),)))
        began = time.time()
        for number in range(30):
            cameras["door"].feed(picture("door", 0), began - 4 + number / 15)
            wait(lambda number=number: processed(engine, "door") == number + 1)
        wait(lambda: len(store.scores("door", limit=100)) == 30)
        events = [event for event in store.events("door") if event["type"].startswith("tsm.v1.action")]
    tracing.shut_down()
    frames = collector.named("frame")
    assert [frame["frame_number"] for frame in frames] == list(range(30))
    assert {frame["stream"] for frame in frames} == {"door"}
    for frame in frames:
        mine = {span["name"]: span for span in collector.spans if span["parent"] == frame["span"]}
        assert {"receive", "queue", "preprocess", "infer", "track", "publish"} == set(mine)
        assert {span["trace"] for span in mine.values()} == {frame["trace"]}
        order = [mine[name]["began"] for name in ("receive", "queue", "preprocess", "infer", "track", "publish")]
        assert order == sorted(order)
        assert all(began - 5 <= span["began"] <= span["ended"] <= time.time() for span in mine.values())
        assert mine["infer"]["model"] == "motion9"
    assert events
    traced = {(frame["trace"], frame["span"]) for frame in frames}
    assert {tuple(event["traceparent"].split("-")[1:3]) for event in events} <= traced


def test_a_frame_that_is_dropped_says_why(collector):
    configure(collector, frame_sample=1.0)
    store = MemoryStore()
    with running(store) as (engine, cameras):
        give(store, engine, spec("door", max_fps=1.0))
        for number in range(3):
            cameras["door"].feed(picture("door", 0), 1000.0 + number / 10)
        wait(lambda: processed(engine, "door") == 1)
    tracing.shut_down()
    assert sorted(str(frame.get("dropped")) for frame in collector.named("frame")) == ["None", "fps", "fps"]


def test_without_a_collector_no_span_is_made(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a span was made")

    monkeypatch.setattr(sdk.Span, "__init__", refuse)
    tracing.configure(TelemetrySettings(frame_sample=1.0), "r1")
    assert tracing.frame_trace("door", 1, None) is None
    with tracing.request_span("request", CALLER) as outer, tracing.span("inside") as inner:
        assert not outer.is_recording()
        assert not inner.is_recording()
        assert tracing.current_traceparent() == CALLER
    assert tracing.current_traceparent() is None


def test_a_collector_that_is_away_harms_nobody():
    tracing.configure(TelemetrySettings(otlp_endpoint="http://127.0.0.1:9", frame_sample=1.0), "r1")
    try:
        with tracing.request_span("request", None) as span:
            assert span.is_recording()
    finally:
        began = time.monotonic()
        tracing.shut_down()
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://me:secret@collector:4318", "grpc://collector"])
def test_an_address_that_cannot_be_a_collector_is_refused(endpoint):
    with pytest.raises(SettingsError, match=r"telemetry\.otlp_endpoint") as caught:
        load_settings(data={"telemetry": {"otlp_endpoint": endpoint}})
    assert "secret" not in str(caught.value)
