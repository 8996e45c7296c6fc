"""The couriers of one service: they work while its controller leads; and what the door may know of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from services.couriers.courier import Courier, dead_letters, ledger
from services.couriers.courier import order_redelivery as order
from services.couriers.mqtt import NAME as MQTT
from services.couriers.mqtt import MqttSink
from services.couriers.sink import Sink
from services.couriers.webhook import WebhookSink, shown
from services.manager import StreamManager
from services.settings import Settings, SinkFilter
from services.store import StateStore
from services.telemetry import SinkFigures
from services.wire import Wire
from tsm_core.errors import CallerError

LETTERS_SHOWN = 20


class SinkNotFound(CallerError):
    """No sink of this name is configured."""

    reason = "sink_not_found"


class DeadLetterView(Wire):
    """An event that the sink would not take."""

    event_id: str
    stream_id: str
    type: str
    why: str
    at: float = Field(description="Unix time")


class SinkView(Wire):
    """One sink: how far it is, and what became of the rest."""

    name: str
    kind: Literal["webhook", "mqtt"]
    target: str = Field(description="its address, without what may be a secret", examples=["https://example.com"])
    delivered: int = Field(description="events that it acknowledged")
    waiting: int = Field(description="events that are still to be looked at, those that it does not want included")
    lost: int = Field(description="events that left the store before they were delivered (store.events_kept)")
    failing_since: float | None = Field(None, description="Unix time; empty: the last delivery succeeded")
    error: str | None = None
    dead: int = Field(description="dead letters that are kept")
    dropped_letters: int = Field(description="dead letters that made room for newer ones")
    dead_letters: list[DeadLetterView] = Field(description=f"the newest {LETTERS_SHOWN}, newest first")


class Couriers:
    """One courier per configured sink, each with a thread of its own.

    leads tells whether this process is the one that delivers. Raises SettingsError for secrets that cannot be used.
    """

    def __init__(self, store: StateStore, settings: Settings, leads: Callable[[], bool]) -> None:
        def stats() -> dict[str, Any]:
            return StreamManager(store, settings, models=()).service_stats().model_dump(mode="json")

        sinks = _sinks(settings, stats)
        self._couriers = [Courier(store, sink, only, settings.couriers, leads) for sink, only in sinks]

    def start(self) -> None:
        """Begin to deliver."""
        for courier in self._couriers:
            courier.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """End after the deliveries in progress, at the latest after `timeout_s` each."""
        for courier in self._couriers:
            courier.stop()
        for courier in self._couriers:
            courier.join(timeout_s)


def check_sinks(settings: Settings) -> None:
    """Raise SettingsError now for what the couriers would stumble over as they begin."""
    _sinks(settings, dict)


def sink_views(store: StateStore, settings: Settings) -> list[SinkView]:
    """Every configured sink, webhooks first."""
    feeds = store.event_feeds()
    return [_view(store, name, kind, target, feeds) for name, kind, target in _configured(settings)]


def sink_figures(store: StateStore, settings: Settings) -> list[SinkFigures]:
    """The same in figures, for a scrape."""
    return [
        SinkFigures(one.name, one.delivered, one.waiting, one.lost, one.dead, one.failing_since is not None)
        for one in sink_views(store, settings)
    ]


def order_redelivery(store: StateStore, settings: Settings, name: str) -> int:
    """Have a sink's dead letters tried again, once; how many there are. Raises SinkNotFound."""
    names = [known for known, *_ in _configured(settings)]
    if name not in names:
        raise SinkNotFound(f"there is no sink {name!r}; there are: {', '.join(names) or 'none'}")
    return order(store, name)


def _sinks(settings: Settings, stats: Callable[[], dict[str, Any]]) -> list[tuple[Sink, SinkFilter]]:
    webhooks = settings.webhooks
    found: list[tuple[Sink, SinkFilter]] = [
        (WebhookSink(webhook, webhooks.timeout_s, webhooks.networks), webhook) for webhook in webhooks.sinks
    ]
    return found + ([(MqttSink(settings.mqtt, stats), settings.mqtt)] if settings.mqtt.url else [])


def _configured(settings: Settings) -> list[tuple[str, Literal["webhook", "mqtt"], str]]:
    found: list[tuple[str, Literal["webhook", "mqtt"], str]] = [
        (sink.name, "webhook", shown(sink.url.get_secret_value())) for sink in settings.webhooks.sinks
    ]
    return found + ([(MQTT, "mqtt", settings.mqtt.url)] if settings.mqtt.url else [])


def _view(
    store: StateStore, name: str, kind: Literal["webhook", "mqtt"], target: str, feeds: dict[str, int]
) -> SinkView:
    known = ledger(store, name)
    letters = dead_letters(store, name)
    marks = known.marks if known else feeds
    return SinkView(
        name=name,
        kind=kind,
        target=target,
        delivered=known.delivered if known else 0,
        waiting=sum(max(0, newest - marks.get(stream_id, 0)) for stream_id, newest in feeds.items()),
        lost=known.lost if known else 0,
        failing_since=known.failing_since if known else None,
        error=known.error if known else None,
        dead=len(letters),
        dropped_letters=known.dropped_letters if known else 0,
        dead_letters=[
            DeadLetterView(
                event_id=letter.event["id"],
                stream_id=letter.event["partitionkey"],
                type=letter.event["type"],
                why=letter.why,
                at=letter.at,
            )
            for letter in reversed(letters[-LETTERS_SHOWN:])
        ],
    )
