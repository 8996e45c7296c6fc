"""Everything that is not one stream: events of all, counters, models, metrics, health, the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response, WebSocket
from fastapi.responses import FileResponse
from pydantic import BeforeValidator, Field, WithJsonSchema
from starlette.concurrency import run_in_threadpool

from services import telemetry
from services.couriers.office import sink_figures
from services.event_query import EventFilter, EventNotFound, Page, Place, instant, stream_of
from services.feed import Hub
from services.http.cursors import Cursor, decode_cursor, encode_cursor
from services.http.feeds import all_events, follow, sse
from services.http.guard import ROLE_KEY, Calls, caller_of
from services.locks.callers import Forbidden
from services.manager import ServedModel, ServiceStats, StreamManager
from services.schemas import ReplicaInfo
from services.settings import Settings
from services.wire import Wire
from tsm_core.errors import WorldError

WEB = Path(__file__).parents[1] / "web"
Instant = Annotated[
    float,
    BeforeValidator(instant),
    WithJsonSchema({"type": "string", "examples": ["2026-01-31T12:00:00Z", "1769860800.5"]}),
]
PAGE_POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"


class NotReady(WorldError):
    """The service cannot serve streams yet."""

    reason = "not_ready"


class EventList(Wire):
    """Events as CloudEvents 1.0, with `sequence` and `published_s`."""

    events: list[dict[str, Any]]
    next_cursor: str | None = Field(None, description="where the next page begins; null: this was the last one")


class ModelList(Wire):
    """The models that streams can name."""

    models: list[ServedModel]


class ReplicaList(Wire):
    """The engine replicas that are alive."""

    replicas: list[ReplicaInfo]


class Health(Wire):
    """The service can serve."""

    status: str = "ok"
    replicas: int


def service_router(manager: StreamManager, hub: Hub, settings: Settings, door: telemetry.DoorTelemetry) -> APIRouter:
    """The routes of the service as a whole."""
    router = APIRouter()

    @router.get(
        "/v1/events",
        tags=["events"],
        summary="Newest events first; with Accept: text/event-stream, events as they come",
        responses={200: {"model": EventList, "content": {"text/event-stream": {}}}},
        response_model=None,
    )
    async def events(
        request: Request,
        caller: Calls,
        stream: Annotated[str | None, Query(description="only this stream's")] = None,
        label: Annotated[str | None, Query(description="only of this label")] = None,
        kind: Annotated[
            str | None, Query(alias="type", description="`action`, `action.new`, a whole type, ...")
        ] = None,
        zone: Annotated[str | None, Query(description="only in this zone or region")] = None,
        min_score: Annotated[float | None, Query(ge=0, le=1)] = None,
        after: Annotated[Instant | None, Query(description="published then or later")] = None,
        before: Annotated[Instant | None, Query(description="published earlier")] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        cursor: Cursor = None,
    ) -> Response | EventList:
        if stream is not None:
            request.app.state.locks.allow(caller, "viewer", stream)
            await run_in_threadpool(manager.store.get_stream, stream)
        wanted = EventFilter(
            label,
            kind,
            zone,
            min_score,
            -math.inf if after is None else after,
            math.inf if before is None else before,
        )
        if "text/event-stream" in request.headers.get("accept", ""):
            return sse(
                all_events(
                    hub,
                    lambda event: (
                        stream in (None, event["partitionkey"])
                        and caller.sees(event["partitionkey"])
                        and wanted.wants(event)
                    ),
                )
            )
        behind = None if cursor is None else Place(*decode_cursor("events", cursor, float, str, int))

        def find() -> Page:
            ids = [stream] if stream else [spec.id for spec in manager.store.list_streams() if caller.sees(spec.id)]
            return manager.find_events(wanted, limit, streams=ids, behind=behind)

        page = await run_in_threadpool(find)
        return EventList(events=page.events, next_cursor=encode_cursor("events", *page.last) if page.last else None)

    @router.get("/v1/events/{event_id}", tags=["events"], summary="One event that is still kept")
    def event(caller: Calls, event_id: str) -> dict[str, Any]:
        if not caller.sees(stream_of(event_id)):
            raise EventNotFound(f"no event {event_id[:100]!r} is among those of your streams")
        return manager.event(event_id)

    @router.get("/v1/stats", tags=["service"], summary="The counters of all streams that the caller reaches")
    def stats(caller: Calls) -> ServiceStats:
        return manager.service_stats(caller.sees)

    @router.get("/v1/models", tags=["service"], summary="The models that streams can name")
    def models() -> ModelList:
        return ModelList(models=list(manager.models()))

    @router.get("/v1/replicas", tags=["service"], summary="The engine replicas that are alive")
    def replicas() -> ReplicaList:
        return ReplicaList(replicas=manager.replicas())

    @router.get("/v1/config/schema.json", tags=["service"], summary="JSON schema of tsm.yaml")
    def config_schema() -> dict[str, Any]:
        return Settings.model_json_schema()

    @router.get("/metrics", tags=["service"], summary="Prometheus metrics of all replicas", response_class=Response)
    def metrics(caller: Calls) -> Response:
        if caller.streams is not None:
            raise Forbidden(f"the metrics tell of all streams, and {caller.name!r} reaches only some")
        stats, own = manager.service_stats(), door.text()
        registered = telemetry.Registered(stats.by_state, stats.waiting)
        told = telemetry.Told(sink_figures(manager.store, manager.settings))
        text = telemetry.merge({**manager.store.metrics(), door.id: own}, [registered, told])
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/healthz", tags=["service"], summary="Ready to serve streams", openapi_extra={ROLE_KEY: "public"})
    def healthz() -> Health:
        manager.store.ping()
        alive = [replica for replica in manager.replicas() if not replica.draining]
        if not alive:
            raise NotReady("no engine replica is alive yet; it takes a few seconds after the start")
        return Health(replicas=len(alive))

    @router.get("/", include_in_schema=False, openapi_extra={ROLE_KEY: "public"})
    def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})

    @router.websocket("/v1/ws")
    async def page_feed(socket: WebSocket) -> None:
        caller = caller_of(socket)
        with socket.app.state.locks.feed(caller):
            await socket.accept()
            await follow(socket, manager, hub, caller)

    return router
