"""What the HTTP door counts and traces: requests by route template, and the `traceparent` of every answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from opentelemetry.trace import Span
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.http.problems import BUG, PRIVATE, problem
from services.store import StateStore
from services.telemetry import DoorTelemetry
from services.tracing import current_traceparent, request_span
from tsm_core.errors import WorldError

log = logging.getLogger(__name__)
REPORT_S = 2.0


def route_template(api: FastAPI, scope: Scope) -> str | None:
    """The path of the route that a request is for, with its parameters' names; None for a path that there is not."""
    partial: str | None = None
    for route in iter_route_contexts(api.routes):
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return route.path
        if match is Match.PARTIAL:
            partial = partial or route.path
    return partial


def known_routes(api: FastAPI) -> Iterator[tuple[str, str]]:
    """(method, template) of every route."""
    for route in iter_route_contexts(api.routes):
        for method in getattr(route, "methods", None) or ():
            if route.path:
                yield method, route.path


class Observed:
    """ASGI middleware, the outermost: counts every request, spans it, and says the trace in the answer."""

    def __init__(self, app: ASGIApp, *, api: FastAPI, telemetry: DoorTelemetry) -> None:
        self._app = app
        self._api = api
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began_s = time.monotonic()
        method = "WEBSOCKET" if scope["type"] == "websocket" else scope["method"]
        route = route_template(self._api, scope)
        name = f"{method} {route or 'other'}"
        begun = False
        with request_span(name, Headers(scope=scope).get("traceparent"), **{"http.route": route}) as span:

            async def answer(message: Message) -> None:
                nonlocal begun
                status = _status(message)
                if status is not None:
                    begun = True
                    self._telemetry.http(method, route, status, time.monotonic() - began_s)
                    _tell(span, status)
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)["traceparent"] = current_traceparent() or ""
                await send(message)

            try:
                await self._app(scope, receive, answer)
            except Exception:
                if not begun and scope["type"] == "http":  # a bug: raised on, for the log
                    headers = {**PRIVATE, "Connection": "close"}  # what is raised makes uvicorn close it
                    await problem(500, "internal_error", BUG, headers=headers)(scope, receive, answer)
                raise


def _status(message: Message) -> int | None:
    """The status that this message begins an answer with."""
    if message["type"] in ("http.response.start", "websocket.http.response.start"):
        return int(message["status"])
    return {"websocket.accept": 101}.get(message["type"])


def _tell(span: Span, status: int) -> None:
    if span.is_recording():
        span.set_attribute("http.response.status_code", status)


class Reporter:
    """A thread that leaves a gateway's metrics in the store, so that any gateway answers for all."""

    def __init__(self, store: StateStore, telemetry: DoorTelemetry) -> None:
        self._store = store
        self._telemetry = telemetry
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stopping.wait(REPORT_S):
            try:
                self._store.put_metrics(self._telemetry.id, self._telemetry.text(), 3 * REPORT_S)
            except WorldError as error:
                log.debug("metrics wait for the store: %s", error)
