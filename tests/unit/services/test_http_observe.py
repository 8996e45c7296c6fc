from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.http import observe
from services.manager import StreamManager
from services.schemas import StreamStatus
from services.settings import Settings
from services.store import MemoryStore
from services.telemetry import STATES, DoorTelemetry
from tests.unit.services.engine_kit import spec, wait
from tests.unit.services.http_kit import MODELS, serving

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def http(store: MemoryStore) -> Iterator[httpx.Client]:
    manager = StreamManager(store, Settings(), models=MODELS)
    with serving(manager) as url, httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        yield client


def samples(answer: httpx.Response, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == name
    }


def requests(http: httpx.Client) -> dict[tuple[str, str, str], float]:
    found = samples(http.get("/metrics"), "http_requests_total")
    return {
        (labels["method"], labels["route"], labels["status"]): n for key, n in found.items() if (labels := dict(key))
    }


def test_requests_are_counted_by_template_whatever_the_paths_are(http, store):
    before = requests(http)
    for number in range(30):
        assert http.get(f"/v1/streams/none-{number}").status_code == 404
        assert http.get(f"/nowhere/{number}").status_code == 404
        http.request("PROPFIND", "/v1/streams")
    now = requests(http)
    new = {key: n for key, n in now.items() if key not in before}
    assert new[("GET", "/v1/streams/{stream_id}", "404")] == 30
    assert new[("GET", "other", "404")] == 30
    assert new[("other", "/v1/streams", "405")] == 30
    assert len(new) == 4  # and the first look at /metrics itself
    assert now[("GET", "/metrics", "200")] == 1
    text = http.get("/metrics").text
    assert "none-1" not in text
    assert "nowhere" not in text


def test_what_never_failed_is_there_as_zero(http):
    found = requests(http)
    assert found[("POST", "/v1/streams", "503")] == found[("GET", "/v1/streams/{stream_id}", "500")] == 0


def test_every_state_and_the_waiting_streams_are_told(http, store):
    store.put_stream(spec("waits"), create=True)
    store.put_stream(spec("rests", enabled=False), create=True)
    store.put_stream(spec("over"), create=True)
    store.announce("over", StreamStatus(state="ENDED", since=0, worker="gone"))
    answer = http.get("/metrics")
    assert {labels[0][1]: n for labels, n in samples(answer, "num_streams").items()} == {
        **dict.fromkeys(STATES, 0), "STARTING": 1, "STOPPED": 1, "ENDED": 1
    }  # fmt: skip
    assert samples(answer, "num_streams_waiting") == {(): 1}


@pytest.mark.parametrize("path", ["/v1/streams", "/v1/streams/none", "/nowhere", "/healthz", "/"])
def test_every_answer_says_its_trace(http, path):
    given = http.get(path, headers={"traceparent": CALLER}).headers["traceparent"]
    assert given.split("-")[1] == CALLER.split("-")[1]
    made = [http.get(path, headers=headers).headers["traceparent"] for headers in ({}, {"traceparent": "junk"}, {})]
    traces = {one.split("-")[1] for one in made}
    assert len(traces) == 3
    assert {len(trace) for trace in traces} == {32}


def test_a_bugs_answer_is_counted_and_traced(http, store, monkeypatch):
    monkeypatch.setattr(store, "get_stream", lambda stream_id: 1 / 0)
    answer = http.get("/v1/streams/any", headers={"traceparent": CALLER})
    assert (answer.status_code, answer.json()["reason"]) == (500, "internal_error")
    assert answer.headers["traceparent"].split("-")[1] == CALLER.split("-")[1]
    assert answer.headers["connection"] == "close"
    assert requests(http)[("GET", "/v1/streams/{stream_id}", "500")] == 1


def test_any_gateway_answers_for_the_others(http, store, monkeypatch):
    monkeypatch.setattr(observe, "REPORT_S", 0.2)
    other = DoorTelemetry("gateway-2")
    other.http("GET", "/v1/models", 200, 0.1)
    key = (("method", "GET"), ("replica", "gateway-2"), ("route", "/v1/models"), ("status", "200"))
    reporter = observe.Reporter(store, other)
    try:
        wait(lambda: samples(http.get("/metrics"), "http_requests_total").get(key) == 1, 30)
    finally:
        reporter.stop()
    assert any(("replica", "gateway") in labels for labels in samples(http.get("/metrics"), "http_requests_total"))
