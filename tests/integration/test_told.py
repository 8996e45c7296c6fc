"""Whom the whole service tells: a webhook of its events, and a collector of its requests and frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.simulator import start_simulator
from tests.integration.conftest import RunningService

STREAM = "hooked-door"


@pytest.fixture(scope="module", autouse=True)
def camera(service: RunningService) -> Iterator[None]:
    with start_simulator({"door": "scene:4"}) as cameras:
        service.add(STREAM, cameras.urls[0])
        yield
        service.http.delete(f"/v1/streams/{STREAM}")


def hook(service: RunningService) -> dict[str, Any]:
    """What the service says of the webhook."""
    (sink,) = service.http.get("/v1/sinks").json()["sinks"]
    assert sink["name"] == "hook"
    return sink


def told(service: RunningService) -> list[str]:
    """Ids of the stream's events that the webhook took, each once, in the order they came."""
    return list(dict.fromkeys(event["id"] for event in service.hook.events if event["partitionkey"] == STREAM))


def test_a_webhook_that_was_away_is_told_every_event_in_order(service: RunningService) -> None:
    service.wait(
        lambda: any("action" in event["type"] for event in service.hook.events if event["partitionkey"] == STREAM),
        60,
        "an action is told",
    )
    service.hook.stop()
    before = service.store.latest_sequence(STREAM)
    service.wait(lambda: service.store.latest_sequence(STREAM) > before + 3, 60, "events go on")
    service.wait(lambda: hook(service)["failing_since"], 20, "the receiver is missed")
    service.hook.start()
    assert service.http.post(f"/v1/streams/{STREAM}/stop").is_success
    service.wait(lambda: service.status(STREAM)["state"] == "STOPPED", 20, "the stream is stopped")
    service.wait(
        lambda: told(service) == [event["id"] for event in service.store.events(STREAM, limit=1000)], 20, "all is told"
    )
    assert service.hook.wrong == []
    service.wait(lambda: hook(service)["failing_since"] is None, 20, "the receiver is back")
    assert hook(service)["dead"] == 0
    metrics = service.http.get("/metrics").text
    assert 'sink_failing{sink="hook"} 0.0' in metrics
    delivered = re.search(r'sink_delivered_total\{sink="hook"\} ([0-9.]+)', metrics)
    assert delivered
    assert float(delivered[1]) >= len(told(service))


def test_a_collector_is_told_of_requests_and_frames(service: RunningService) -> None:
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    service.http.get(f"/v1/streams/{STREAM}", headers={"traceparent": caller})
    service.wait(
        lambda: any(span["trace"] in caller for span in service.traces.named("GET /v1/streams/{stream_id}")),
        20,
        "the request's span",
    )

    def frames() -> list[dict[str, Any]]:
        return [span for span in service.traces.named("frame") if span["stream"] == STREAM]

    service.wait(frames, 20, "a frame's span")
    assert all(span["replica"].startswith("engine-") for span in frames())
