"""What every sink has in common: the verb, its errors, and which events it wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from services.schemas import EVENT_PREFIX
from services.settings import SinkFilter
from tsm_core.errors import CallerError, WorldError

Event = dict[str, Any]  # CloudEvents 1.0 with `sequence` and `published_s`, as the store gives it
Memo = dict[str, Any]  # JSON values by stream


class SinkUnavailable(WorldError):
    """The sink took none of it now; the same events are offered again.

    retry_after_s is how long the sink asks to be left alone. answered tells that the sink is there and said no: such
    attempts are counted, and end among the dead letters; those on a sink that is not there do not.
    """

    reason = "sink_unavailable"

    def __init__(self, message: str, *, retry_after_s: float = 0.0, answered: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.answered = answered


class EventRefused(CallerError):
    """The sink will never take these events; sending them again does not help."""

    reason = "event_refused"


class Sink(Protocol):
    """Somebody who is told of events. Its verbs belong to one thread, its courier's."""

    name: str
    batch: int  # most events of one delivery

    def deliver(self, events: Sequence[Event]) -> None:
        """Return once the sink has acknowledged all events, told in this order.

        Raises SinkUnavailable or EventRefused: then some of them may have arrived nevertheless.
        """

    def idle(self) -> None:
        """Called again and again between deliveries. Raises SinkUnavailable."""

    def forget(self, stream_id: str) -> None:
        """The stream was deleted and its last event delivered. Raises SinkUnavailable."""

    def memo(self) -> Memo:
        """What the sink has learned from the events that it acknowledged; kept with the mark of the last one."""

    def recall(self, memo: Memo) -> None:
        """Go on from what `memo` gave, before the first delivery."""

    def close(self) -> None:
        """Let go of connections; `recall` and `deliver` may follow."""


def wants(only: SinkFilter, event: Event) -> bool:
    """True when the filter lets the event through; patterns are those of a shell.

    A type matches with or without its prefix: `action.*`, `tsm.v1.action.new`. With labels given, an event that has
    none, such as a stream's change of state, is not wanted.
    """
    kind, data = str(event["type"]), event["data"]
    return (
        _matches(only.streams, str(event["partitionkey"]))
        and (_matches(only.types, kind) or _matches(only.types, kind.removeprefix(f"{EVENT_PREFIX}.")))
        and _matches(only.labels, str(data.get("label", "")))
    )


def _matches(patterns: Sequence[str], value: str) -> bool:
    return not patterns or any(fnmatchcase(value, pattern) for pattern in patterns if value)


def structured(event: Event) -> Mapping[str, Any]:
    """The event as it is told: names of attributes that CloudEvents 1.0 allows, so without `published_s`."""
    return {name: value for name, value in event.items() if name != "published_s"}


def encode(told: Any) -> bytes:
    """Compact JSON."""
    return json.dumps(told, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
