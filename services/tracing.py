"""Traces: spans of requests and of sampled frames, sent to an OpenTelemetry collector when one is configured.

Without a collector no span is made. A request still has a trace id, its caller's or a new one: answers and log lines
carry it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.settings import TelemetrySettings

EXPORT_S = 2.0  # longest that an ended span waits for company
EXPORT_LIMIT_S = 5.0  # longest that a collector may take, all attempts together
_FORMAT = TraceContextTextMapPropagator()


class _Tracing:
    """What this process does with spans."""

    tracer: trace.Tracer | None = None
    provider: Any = None
    request_share = 1.0
    frame_share = 0.0


def configure(settings: TelemetrySettings, replica: str) -> None:
    """Send this process's spans to the collector that the settings name; without one change nothing.

    What else an exporter needs, such as headers or a certificate, it takes from OpenTelemetry's own variables
    (`OTEL_EXPORTER_OTLP_HEADERS`).
    """
    if settings.otlp_endpoint is None:
        return
    # imported here: half of a second that nobody else needs to wait
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    shut_down()
    address = settings.otlp_endpoint.rstrip("/")
    if not urlsplit(address).path:
        address += "/v1/traces"
    provider = TracerProvider(
        resource=Resource.create({"service.name": "tsm-live", "service.instance.id": replica}), shutdown_on_exit=True
    )
    exporter = OTLPSpanExporter(endpoint=address, timeout=EXPORT_LIMIT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_S * 1000))
    _Tracing.provider, _Tracing.tracer = provider, provider.get_tracer("tsm-live")
    _Tracing.request_share, _Tracing.frame_share = settings.request_sample, settings.frame_sample


def shut_down() -> None:
    """Send what is left and make no more spans."""
    provider, _Tracing.provider, _Tracing.tracer = _Tracing.provider, None, None
    if provider is not None:
        provider.shutdown()


def span(name: str, **attributes: Any) -> AbstractContextManager[Span]:
    """A span around a piece of work, below the current one; nothing where none is current that is recorded."""
    if _Tracing.tracer is None or not trace.get_current_span().is_recording():
        return nullcontext(INVALID_SPAN)
    return _Tracing.tracer.start_as_current_span(name, attributes=_known(attributes))


@contextmanager
def request_span(name: str, traceparent: str | None, **attributes: Any) -> Iterator[Span]:
    """The span of a request that came from outside, below the caller's when it sent a W3C `traceparent`.

    The caller's decision to sample holds; without one the settings' share of all requests is recorded. The request
    has a trace id either way.
    """
    parent = _read(traceparent)
    wanted = parent.trace_flags.sampled if parent.is_valid else random.random() < _Tracing.request_share
    if _Tracing.tracer is None or not wanted:
        with trace.use_span(NonRecordingSpan(parent if parent.is_valid else _fresh())):
            yield INVALID_SPAN
        return
    context = trace.set_span_in_context(NonRecordingSpan(parent)) if parent.is_valid else None
    with _Tracing.tracer.start_as_current_span(
        name, context, kind=SpanKind.SERVER, attributes=_known(attributes)
    ) as made:
        yield made


def current_traceparent() -> str | None:
    """The current request's W3C `traceparent`; None outside of a request."""
    return _written(trace.get_current_span().get_span_context())


def current_ids() -> tuple[str, str] | None:
    """(trace id, span id) of the current request in hexadecimal digits; None outside of a request."""
    context = trace.get_current_span().get_span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None


class FrameTrace:
    """The trace of one sampled frame; its spans are told when they are over.

    Times are those of `time.monotonic`. The frame's own span ends when it left the models; that of its publication
    is later.
    """

    def __init__(self, tracer: trace.Tracer, attributes: dict[str, Any], began_s: float) -> None:
        self._tracer = tracer
        self._offset_s = time.time() - time.monotonic()
        self._root = tracer.start_span("frame", Context(), attributes=attributes, start_time=self._ns(began_s))
        self._inside = trace.set_span_in_context(self._root)
        self.traceparent = _written(self._root.get_span_context())

    def add(self, name: str, began_s: float, ended_s: float, **attributes: Any) -> None:
        """One stage of the frame."""
        made = self._tracer.start_span(name, self._inside, attributes=_known(attributes), start_time=self._ns(began_s))
        made.end(self._ns(ended_s))

    def end(self, dropped: str | None = None) -> None:
        """The frame went through the models; dropped: why it did not."""
        if dropped is not None:
            self._root.set_attribute("dropped", dropped)
        self._root.end()

    def _ns(self, monotonic_s: float) -> int:
        return int((monotonic_s + self._offset_s) * 1e9)


def frame_trace(stream_id: str, number: int, arrival_s: float | None) -> FrameTrace | None:
    """A trace for a frame that is handed over now, if it is one of the settings' share, else None.

    arrival_s: Unix time when all of the picture was here; None: now.
    """
    tracer = _Tracing.tracer
    if tracer is None or random.random() >= _Tracing.frame_share:
        return None
    now_s = time.monotonic()
    began_s = now_s if arrival_s is None else now_s - max(0.0, time.time() - arrival_s)
    made = FrameTrace(tracer, {"stream": stream_id, "frame_number": number}, began_s)
    made.add("receive", began_s, now_s)
    return made


def _read(traceparent: str | None) -> SpanContext:
    """The caller's span; an invalid one for what is no traceparent."""
    if traceparent is None:
        return INVALID_SPAN.get_span_context()
    return trace.get_current_span(_FORMAT.extract({"traceparent": traceparent})).get_span_context()


def _written(context: SpanContext) -> str | None:
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _fresh() -> SpanContext:
    """A trace that nobody records."""
    return SpanContext(
        random.getrandbits(128) or 1, random.getrandbits(64) or 1, is_remote=False, trace_flags=TraceFlags.get_default()
    )


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    """OpenTelemetry has no word for None."""
    return {name: value for name, value in attributes.items() if value is not None}
