"""What the gRPC door counts and traces: calls by method and code, each below its caller's span."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc

from services.telemetry import DoorTelemetry
from services.tracing import request_span

Behaviour = Callable[[Any, Any], Any]


def observed(behaviour: Behaviour, name: str, telemetry: DoorTelemetry, *, streams: bool) -> Behaviour:
    """The behaviour of a method with this full name, counted and spanned; streams: its answer is a stream."""

    def parent(context: Any) -> str | None:
        given = dict(context.invocation_metadata()).get("traceparent")
        return given if isinstance(given, str) else None

    async def unary(request: Any, context: Any) -> Any:
        with request_span(name, parent(context)) as span:
            began_s, ended = time.monotonic(), False
            try:
                answer = await behaviour(request, context)
                ended = True
                return answer
            finally:
                code = code_of(context, ended)
                telemetry.grpc(name, code, time.monotonic() - began_s)
                span.set_attribute("rpc.grpc.status_code", code)

    async def stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        with request_span(name, parent(context)) as span:
            began_s, ended = time.monotonic(), False
            try:
                async for answer in behaviour(request, context):
                    yield answer
                ended = True
            finally:
                code = code_of(context, ended)
                telemetry.grpc(name, code, time.monotonic() - began_s)
                span.set_attribute("rpc.grpc.status_code", code)

    return stream if streams else unary


def code_of(context: Any, ended: bool) -> str:
    """The name of the code that a call ended with; without a code, one that did not end was left by its caller."""
    code = context.code()
    if not isinstance(code, grpc.StatusCode):
        known = {status.value[0]: status for status in grpc.StatusCode}
        code = known.get(code or 0, grpc.StatusCode.UNKNOWN)
    return "CANCELLED" if code is grpc.StatusCode.OK and not ended else str(code.name)
