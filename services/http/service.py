"""Everything that is not one stream: events of all, counters, models, metrics, health, the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request, Response, WebSocket
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from services import telemetry
from services.feed import Hub
from services.http.feeds import all_events, follow, sse
from services.manager import ServedModel, ServiceStats, StreamManager
from services.schemas import ReplicaInfo
from services.settings import Settings
from services.wire import Wire
from tsm_core.errors import WorldError

WEB = Path(__file__).parents[1] / "web"
PAGE_POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"


class NotReady(WorldError):
    """The service cannot serve streams yet."""

    reason = "not_ready"


class EventList(Wire):
    """Events as CloudEvents 1.0, with `sequence` and `published_s`."""

    events: list[dict[str, Any]]


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


def service_router(manager: StreamManager, hub: Hub, settings: Settings) -> APIRouter:
    """The routes of the service as a whole."""
    router = APIRouter()

    @router.get(
        "/v1/events",
        tags=["events"],
        summary="Newest events first; with Accept: text/event-stream, all events as they come",
        responses={200: {"model": EventList, "content": {"text/event-stream": {}}}},
        response_model=None,
    )
    async def events(
        request: Request,
        stream: Annotated[str | None, Query(description="only this stream's")] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Response | EventList:
        if "text/event-stream" in request.headers.get("accept", ""):
            if stream is not None:
                await run_in_threadpool(manager.store.get_stream, stream)
            return sse(all_events(hub, stream))
        return EventList(events=await run_in_threadpool(manager.recent_events, stream, limit))

    @router.get("/v1/stats", tags=["service"], summary="The whole service's counters")
    def stats() -> ServiceStats:
        return manager.service_stats()

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
    def metrics() -> Response:
        text = telemetry.merge(manager.store.metrics())
        for state, count in sorted(manager.service_stats().by_state.items()):
            if "# TYPE num_streams gauge" not in text:
                text += "# HELP num_streams Streams in the registry\n# TYPE num_streams gauge\n"
            text += f'num_streams{{state="{state}"}} {count}\n'
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/healthz", tags=["service"], summary="Ready to serve streams")
    def healthz() -> Health:
        manager.store.ping()
        alive = [replica for replica in manager.replicas() if not replica.draining]
        if not alive:
            raise NotReady("no engine replica is alive yet; it takes a few seconds after the start")
        return Health(replicas=len(alive))

    @router.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(WEB / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})

    @router.websocket("/v1/ws")
    async def page_feed(socket: WebSocket) -> None:
        origin = socket.headers.get("origin")
        if origin and urlsplit(origin).netloc != socket.headers.get("host"):
            await socket.close(1008, "cross-origin")  # another site's page must not read this service
            return
        await socket.accept()
        await follow(socket, manager, hub)

    return router
