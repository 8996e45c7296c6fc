"""The HTTP door: thin over StreamManager; errors are RFC 9457 problems with a stable `reason`."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Body, FastAPI, Header, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.faults import ProbeReport
from services import telemetry
from services.feed import Hub
from services.manager import NoCapacity, NoPicture, ServedModel, ServiceStats, StreamManager, StreamStats, StreamView
from services.schemas import ReplicaInfo, SourceSpec, StreamSpec, StreamStatus
from services.settings import Settings
from services.store import StreamExists, StreamNotFound
from services.stream_models import StreamModels
from services.wire import StreamId, Wire
from tsm_core.errors import TSMError, WorldError

WEB = Path(__file__).parent / "web"
HEARTBEAT_S = 10.0
SCORE_PAUSE_S = 0.2
RETRY_AFTER_S = 2
BOUNDARY = "frame"
PAGE_POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"

# errors that are not 422 (CallerError) or 503 (WorldError)
STATUS: dict[type[TSMError], int] = {
    StreamNotFound: 404,
    NoPicture: 404,
    StreamExists: 409,
    NoCapacity: 429,
}


class NotReady(WorldError):
    """The service cannot serve streams yet."""

    reason = "not_ready"


class FieldError(BaseModel):
    """What is wrong with one field of the request."""

    field: str = Field(examples=["source.uri"])
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(examples=["urn:tsm:problem:stream_not_found"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["stream 'door-9' is not registered"])
    reason: str = Field(description="stable name of the error", examples=["stream_not_found"])
    errors: list[FieldError] | None = None


class NewStream(Wire):
    """A stream to register."""

    id: StreamId = Field(default_factory=lambda: f"stream-{secrets.token_hex(3)}", description="empty: one is made up")
    name: str = Field("", max_length=200)
    enabled: bool = Field(True, description="false: registered but stopped")
    source: SourceSpec
    models: StreamModels = ()
    max_fps: float | None = Field(None, gt=0, le=240, description="recognise at most this many frames a second")
    tags: dict[str, str] = Field(default_factory=dict, max_length=32)


class StreamChanges(Wire):
    """What to change of a stream; what is left out stays. A source is replaced whole, password included."""

    name: str = Field("", max_length=200)
    enabled: bool = True
    source: SourceSpec | None = None
    models: StreamModels = ()
    max_fps: float | None = Field(None, gt=0, le=240)
    tags: dict[str, str] = Field(default_factory=dict, max_length=32)

    @model_validator(mode="after")
    def check_source(self) -> StreamChanges:
        """A stream has a source: it can be replaced, not taken away."""
        if "source" in self.model_fields_set and self.source is None:
            raise ValueError("source cannot be null: leave it out, or give the new one")
        return self

    def given(self) -> dict[str, Any]:
        """The fields that were sent."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class ProbeRequest(Wire):
    """A source to try."""

    source: SourceSpec


class ProbeStage(Wire):
    """One step of opening a source."""

    name: str
    ok: bool
    ms: float
    detail: str


class ProbeResult(Wire):
    """What happened when a source was opened."""

    ok: bool
    stages: list[ProbeStage]
    error_code: str | None = Field(None, examples=["STREAM_AUTH_FAILED"])
    message: str | None = None
    hint: str | None = None
    width: int | None = None
    height: int | None = None
    codec: str | None = None
    fps: float | None = None
    snapshot: str | None = Field(None, description="JPEG, base64")


class StreamList(Wire):
    """All streams, ordered by id."""

    streams: list[StreamView]


class EventList(Wire):
    """Events as CloudEvents 1.0, with `sequence` and `published_s`."""

    events: list[dict[str, Any]]


class ScoreList(Wire):
    """Score records, oldest first."""

    scores: list[dict[str, Any]]


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


EXAMPLES: dict[str, Any] = {
    "camera": {
        "summary": "An RTSP camera with a password",
        "value": {
            "id": "door-1",
            "source": {"uri": "rtsp://192.168.1.20:554/stream1", "username": "viewer", "password": "of the camera"},
            "models": [{"name": "motion9", "threshold": 0.6}],
            "max_fps": 15,
        },
    },
    "objects": {
        "summary": "Objects in a zone and over a line, and what each of them does",
        "value": {
            "id": "yard",
            "source": {"uri": "rtsp://192.168.1.20:554/stream1"},
            "models": [
                {
                    "name": "ssdlite320_mobilenet_v3_large",
                    "labels": ["person"],
                    "zones": [{"name": "drive", "points": [[0, 0.5], [1, 0.5], [1, 1], [0, 1]], "loitering_s": 60}],
                    "lines": [{"name": "gate", "a": [0.3, 1], "b": [0.3, 0.4]}],
                },
                {"name": "motion9", "where": {"objects_of": "ssdlite320_mobilenet_v3_large"}},
            ],
        },
    },
    "file": {
        "summary": "A film again and again, as if it were a camera",
        "value": {"id": "film", "source": {"uri": "file:///srv/films/street.mp4", "loop": True}},
    },
}
CHANGES: dict[str, Any] = {"rate": {"summary": "Recognise fewer frames", "value": {"name": "Door", "max_fps": 5}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "The request cannot be served; `reason` says why"},
    "5XX": {"model": Problem, "description": "A camera, the store or a device failed; try again"},
}


def http_app(manager: StreamManager, settings: Settings | None = None) -> FastAPI:
    """The application with every route of the contract, the page at `/` and problem+json for every error."""
    settings = settings or manager.settings
    hub = Hub(manager)
    app = FastAPI(
        title="tsm-live",
        version="1",
        summary="Live video analytics around the Temporal Shift Module.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.hub = hub
    app.add_middleware(BodyLimit, limit=settings.server.max_body_bytes)
    _problems(app)
    app.include_router(_streams(manager, hub))
    app.include_router(_service(manager, hub, settings))
    app.mount("/static", StaticFiles(directory=WEB), name="static")
    return app


def _streams(manager: StreamManager, hub: Hub) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["streams"])

    @router.post("/streams", status_code=201, summary="Register a stream")
    def create_stream(
        stream: Annotated[NewStream, Body(openapi_examples=EXAMPLES)],
        probe: Annotated[bool, Query(description="false: register it even if its source does not answer")] = True,
    ) -> StreamView:
        spec = StreamSpec(**{name: getattr(stream, name) for name in NewStream.model_fields})
        view = manager.create(spec, check=probe)
        hub.look()
        return view

    @router.get("/streams", summary="All streams")
    def list_streams() -> StreamList:
        return StreamList(streams=manager.streams())

    @router.post("/streams:probe", summary="Try a source without registering it")
    def probe_source(request: ProbeRequest) -> ProbeResult:
        return _probe_result(manager.probe(request.source))

    @router.get("/streams/{stream_id}", summary="One stream")
    def get_stream(stream_id: str) -> StreamView:
        return manager.get(stream_id)

    @router.patch("/streams/{stream_id}", summary="Change a stream")
    def update_stream(
        stream_id: str,
        changes: Annotated[StreamChanges, Body(openapi_examples=CHANGES)],
        probe: Annotated[bool, Query(description="false: take a new source even if it does not answer")] = True,
    ) -> StreamView:
        view = manager.update(stream_id, changes.given(), check=probe)
        hub.look()
        return view

    @router.delete("/streams/{stream_id}", status_code=204, summary="Remove a stream")
    def delete_stream(stream_id: str) -> None:
        manager.delete(stream_id)
        hub.look()

    @router.post("/streams/{stream_id}/start", summary="Serve a stream")
    def start_stream(stream_id: str) -> StreamView:
        view = manager.start(stream_id)
        hub.look()
        return view

    @router.post("/streams/{stream_id}/stop", summary="Stop serving a stream, keep it registered")
    def stop_stream(stream_id: str) -> StreamView:
        view = manager.stop(stream_id)
        hub.look()
        return view

    @router.get("/streams/{stream_id}/status", summary="What the stream does now")
    def stream_status(stream_id: str) -> StreamStatus:
        return manager.status(stream_id)

    @router.get("/streams/{stream_id}/stats", summary="The stream's counters")
    def stream_stats(stream_id: str) -> StreamStats:
        return manager.stats(stream_id)

    @router.get("/streams/{stream_id}/scores", summary="The newest score records")
    def stream_scores(stream_id: str, limit: Annotated[int, Query(ge=1, le=10_000)] = 600) -> ScoreList:
        return ScoreList(scores=manager.scores(stream_id, limit))

    @router.get(
        "/streams/{stream_id}/latest.jpg",
        summary="The newest picture",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}, "description": "X-Frame-Number is its frame's number"}},
    )
    def latest_picture(stream_id: str) -> Response:
        number, jpeg = manager.preview(stream_id)
        headers = {"X-Frame-Number": str(number), "Cache-Control": "no-store"}
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    @router.get(
        "/streams/{stream_id}/mjpeg",
        summary="Pictures as they come, until the stream is removed",
        response_class=Response,
        responses={200: {"content": {f"multipart/x-mixed-replace; boundary={BOUNDARY}": {}}}},
    )
    async def pictures(stream_id: str) -> StreamingResponse:
        await run_in_threadpool(manager.store.get_stream, stream_id)
        return StreamingResponse(
            _mjpeg(hub, stream_id),
            media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}",
            headers={"Cache-Control": "no-store"},
        )

    @router.get(
        "/streams/{stream_id}/events",
        summary="The stream's events as server-sent events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def stream_events(
        stream_id: str,
        after: Annotated[int | None, Query(ge=0, description="begin behind this sequence; default: from now")] = None,
        last_event_id: Annotated[str | None, Header(description="as `after`; sent by browsers")] = None,
    ) -> StreamingResponse:
        begin = int(last_event_id) if last_event_id and last_event_id.isdecimal() else after
        if begin is None:
            begin = (await run_in_threadpool(manager.stats, stream_id)).events
        else:
            await run_in_threadpool(manager.store.get_stream, stream_id)
        return _sse(_stream_events(manager, hub, stream_id, begin))

    return router


def _service(manager: StreamManager, hub: Hub, settings: Settings) -> APIRouter:
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
            return _sse(_all_events(hub, stream))
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
    async def follow(socket: WebSocket) -> None:
        origin = socket.headers.get("origin")
        if origin and urlsplit(origin).netloc != socket.headers.get("host"):
            await socket.close(1008, "cross-origin")  # another site's page must not read this service
            return
        await socket.accept()
        await _follow(socket, manager, hub)

    return router


async def _mjpeg(hub: Hub, stream_id: str) -> AsyncIterator[bytes]:
    async with hub.pictures(stream_id) as viewer:
        while True:
            for message in await viewer.get(HEARTBEAT_S):
                if message["type"] == "gone":
                    return
                jpeg: bytes = message["jpeg"]
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n"
                yield f"{head}X-Frame-Number: {message['number']}\r\n\r\n".encode() + jpeg + b"\r\n"


async def _stream_events(manager: StreamManager, hub: Hub, stream_id: str, after: int) -> AsyncIterator[str]:
    """Every event behind `after` once: the hub only says when to read on from the store."""

    def wakes(message: dict[str, Any]) -> bool:
        return message["type"] == "open" or (message.get("stream_id") == stream_id and message["type"] != "score")

    async with hub.subscribe(wakes, limit=8) as subscription:
        yield ": open\n\n"
        gone = False
        while True:
            try:
                found = await run_in_threadpool(manager.store.events, stream_id, after, 500)
            except WorldError as error:
                yield f": {error.reason}\n\n"
                found = []
            for event in found:
                after = event["sequence"]
                yield _sse_event(str(after), event)
            if gone:
                return
            if len(found) < 500:
                messages = await subscription.get(HEARTBEAT_S)
                gone = any(message["type"] == "gone" for message in messages)
                if not messages:
                    yield ": still here\n\n"


async def _all_events(hub: Hub, stream_id: str | None) -> AsyncIterator[str]:
    def wanted(message: dict[str, Any]) -> bool:
        return message["type"] == "event" and stream_id in (None, message["stream_id"])

    async with hub.subscribe(wanted) as subscription:
        yield ": open\n\n"
        while True:
            messages = await subscription.get(HEARTBEAT_S)
            for message in messages:
                event = message["event"]
                yield _sse_event(f"{message['stream_id']}:{event['sequence']}", event)
            if not messages:
                yield ": still here\n\n"


def _sse_event(event_id: str, event: dict[str, Any]) -> str:
    return f"id: {event_id}\nevent: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"


def _sse(lines: AsyncIterator[str]) -> StreamingResponse:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


async def _follow(socket: WebSocket, manager: StreamManager, hub: Hub) -> None:
    """Tell the page everything until it goes away; of scores the newest, at most five a second."""

    async def talk() -> None:
        async with hub.subscribe(lambda message: message["type"] not in ("gone", "open")) as subscription:
            views = await run_in_threadpool(manager.streams)
            await socket.send_json({"type": "streams", "streams": [view.model_dump(mode="json") for view in views]})
            newest: dict[tuple[str, str], dict[str, Any]] = {}
            next_scores = 0.0
            clock = asyncio.get_running_loop().time
            while True:
                for message in await subscription.get(SCORE_PAUSE_S if newest else HEARTBEAT_S):
                    if message["type"] == "score":
                        newest[message["stream_id"], message["score"]["model"]] = message["score"]
                    else:
                        await socket.send_json({key: message[key] for key in message if key != "stream_id"})
                if newest and clock() >= next_scores:
                    for score in newest.values():
                        await socket.send_json({"type": "score", "score": score})
                    newest.clear()
                    next_scores = clock() + SCORE_PAUSE_S

    async def listen() -> None:
        while True:
            await socket.receive_text()  # the page has nothing to say; this notices when it leaves

    tasks = [asyncio.create_task(talk()), asyncio.create_task(listen())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not isinstance(task.exception(), WebSocketDisconnect | RuntimeError | WorldError | None):
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _probe_result(report: ProbeReport) -> ProbeResult:
    fault = report.fault
    return ProbeResult(
        ok=report.ok,
        stages=[ProbeStage(name=s.name, ok=s.ok, ms=round(s.ms, 1), detail=s.detail) for s in report.stages],
        error_code=fault.code if fault else None,
        message=fault.message if fault else None,
        hint=fault.hint if fault else None,
        width=report.width,
        height=report.height,
        codec=report.codec,
        fps=report.fps,
        snapshot=base64.b64encode(report.snapshot_jpeg).decode() if report.snapshot_jpeg else None,
    )


# errors


def status_of(error: TSMError) -> int:
    """The HTTP status of an error: 4xx for callers, 503 for the world."""
    for family, status in STATUS.items():
        if isinstance(error, family):
            return status
    return 503 if isinstance(error, WorldError) else 422


def problem(
    status: int, reason: str, detail: str, errors: list[FieldError] | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An RFC 9457 answer."""
    body = Problem(
        type=f"urn:tsm:problem:{reason}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        reason=reason,
        errors=errors,
    )
    return JSONResponse(
        body.model_dump(exclude_none=True), status, media_type="application/problem+json", headers=headers
    )


def _problems(app: FastAPI) -> None:
    @app.exception_handler(TSMError)
    async def ours(_: Request, error: TSMError) -> Response:
        status = status_of(error)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
        return problem(status, error.reason, str(error), headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # pydantic's own text repeats the input, which may hold a password: only place and fact are passed on
        found = [
            FieldError(field=".".join(str(part) for part in e["loc"] if part != "body") or "body", message=_fact(e))
            for e in error.errors()
        ]
        if any(e["type"] == "json_invalid" for e in error.errors()):
            return problem(400, "invalid_json", "the body is not JSON", found)
        detail = "; ".join(f"{one.field}: {one.message}" for one in found[:3])
        return problem(422, "invalid_request", detail, found)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        reasons = {400: "invalid_request", 404: "unknown_route", 405: "method_not_allowed", 413: "body_too_large"}
        details = {
            404: f"there is nothing at {request.url.path}; /openapi.json lists what there is",
            405: f"{request.method} is not possible at {request.url.path}",
        }
        reason = reasons.get(error.status_code, "http_error")
        detail = details.get(error.status_code, str(error.detail))
        return problem(error.status_code, reason, detail, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return problem(500, "internal_error", "an error of the service; its log says more")


def _fact(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


class BodyLimit:
    """Refuses bodies above `limit` bytes: at once by their announced length, else while they come in."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        text = f"the body is larger than {self._limit} bytes (server.max_body_bytes)"
        if not said.isdigit() or int(said) > self._limit:
            await problem(413, "body_too_large", text, headers={"Connection": "close"})(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self._limit:
                raise HTTPException(413, text, {"Connection": "close"})
            return message

        await self._app(scope, counted, send)
