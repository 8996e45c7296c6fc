"""Streams: register, change, start, stop, look at, listen to."""

from __future__ import annotations

import base64
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool

from pipelines.faults import ProbeReport
from services.feed import Hub
from services.http.cursors import Cursor, decode_cursor, encode_cursor
from services.http.feeds import BOUNDARY, Feed, mjpeg, sse, stream_events
from services.http.guard import Calls
from services.http.idempotency import REPLAYED, IdempotencyKey, Once
from services.manager import ChangedStream, StreamManager, StreamStats, StreamView
from services.schemas import SourceSpec, StreamSpec, StreamState, StreamStatus
from services.stream_models import StreamModels
from services.wire import StreamId, Wire


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
    """Streams, ordered by id."""

    streams: list[StreamView]
    next_cursor: str | None = Field(None, description="where the next page begins; null: this was the last one")


class ScoreList(Wire):
    """Score records, oldest first."""

    scores: list[dict[str, Any]]


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
ETAG: dict[str, Any] = {
    "headers": {
        "ETag": {"description": "of the specification; the status does not change it", "schema": {"type": "string"}}
    }
}
IfMatch = Annotated[
    str | None,
    Header(max_length=1000, description="only if the stream still has this ETag; otherwise 412, and nothing changes"),
]
Tag = Annotated[str, Field(pattern=r"^[^:]+:.*$")]
CHANGES: dict[str, Any] = {"rate": {"summary": "Recognise fewer frames", "value": {"name": "Door", "max_fps": 5}}}


def streams_router(manager: StreamManager, hub: Hub) -> APIRouter:
    """The routes below /v1/streams."""
    router = APIRouter(prefix="/v1", tags=["streams"])

    def looked(view: StreamView) -> StreamView:
        hub.look()
        return view

    once = Once(manager.store)

    @router.post(
        "/streams",
        status_code=201,
        summary="Register a stream",
        response_model=StreamView,
        responses={201: {"headers": {**ETAG["headers"], **REPLAYED}}},
    )
    def create_stream(
        request: Request,
        caller: Calls,
        stream: Annotated[NewStream, Body(openapi_examples=EXAMPLES)],
        probe: Annotated[bool, Query(description="false: register it even if its source does not answer")] = True,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        request.app.state.locks.allow(caller, "operator", stream.id)

        def create() -> Response:
            spec = StreamSpec(**{name: getattr(stream, name) for name in NewStream.model_fields})
            view = manager.create(spec, check=probe)
            hub.look()
            return JSONResponse(view.model_dump(mode="json"), 201, {"ETag": view.etag})

        password = stream.source.password.get_secret_value() if stream.source.password else None
        asked = [stream.model_dump(mode="json", exclude_unset=True), password, probe]
        return once.answer(request, idempotency_key, asked, create)

    @router.get("/streams", summary="All streams, ordered by id")
    def list_streams(
        caller: Calls,
        state: Annotated[list[StreamState] | None, Query(description="only in one of these states")] = None,
        tag: Annotated[list[Tag] | None, Query(description="key:value; only with all of these tags")] = None,
        sequences: Annotated[bool, Query(description="also those whose frames are pushed")] = False,
        limit: Annotated[int | None, Query(ge=1, le=1000, description="default: all at once")] = None,
        cursor: Cursor = None,
    ) -> StreamList:
        behind = "" if cursor is None else decode_cursor("streams", cursor, str)[0]
        tags = [(key, value) for key, _, value in (one.partition(":") for one in tag or ())]
        found = [
            view
            for view in manager.streams(sequences=sequences)
            if view.id > behind
            and caller.sees(view.id)
            and (not state or view.status.state in state)
            and all(view.tags.get(key) == value for key, value in tags)
        ]
        page = found if limit is None else found[:limit]
        return StreamList(
            streams=page, next_cursor=encode_cursor("streams", page[-1].id) if found[len(page) :] else None
        )

    @router.post("/streams:probe", summary="Try a source without registering it")
    def probe_source(request: ProbeRequest) -> ProbeResult:
        return _probe_result(manager.probe(request.source))

    @router.get("/streams/{stream_id}", summary="One stream", responses={200: ETAG})
    def get_stream(response: Response, stream_id: str) -> StreamView:
        view = manager.get(stream_id)
        response.headers["ETag"] = view.etag
        return view

    @router.patch("/streams/{stream_id}", summary="Change a stream", responses={200: ETAG})
    def update_stream(
        response: Response,
        stream_id: str,
        changes: Annotated[StreamChanges, Body(openapi_examples=CHANGES)],
        probe: Annotated[bool, Query(description="false: take a new source even if it does not answer")] = True,
        if_match: IfMatch = None,
    ) -> ChangedStream:
        view = manager.update(stream_id, changes.given(), check=probe, if_match=if_match)
        hub.look()
        response.headers["ETag"] = view.etag
        return view

    @router.delete("/streams/{stream_id}", status_code=204, summary="Remove a stream")
    def delete_stream(stream_id: str, if_match: IfMatch = None) -> None:
        manager.delete(stream_id, if_match=if_match)
        hub.look()

    @router.post("/streams/{stream_id}/start", summary="Serve a stream")
    def start_stream(stream_id: str) -> StreamView:
        return looked(manager.start(stream_id))

    @router.post("/streams/{stream_id}/stop", summary="Stop serving a stream, keep it registered")
    def stop_stream(stream_id: str) -> StreamView:
        return looked(manager.stop(stream_id))

    @router.post("/streams/{stream_id}/pause", summary="Close a stream's source, keep its place and its state")
    def pause_stream(stream_id: str) -> StreamView:
        return looked(manager.pause(stream_id))

    @router.post("/streams/{stream_id}/resume", summary="Open a paused stream's source again")
    def resume_stream(stream_id: str) -> StreamView:
        return looked(manager.resume(stream_id))

    @router.post("/streams/{stream_id}/restart", summary="Close a stream's source and open it anew")
    def restart_stream(stream_id: str) -> StreamView:
        return looked(manager.restart(stream_id))

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
    async def pictures(stream_id: str) -> Feed:
        await run_in_threadpool(manager.store.get_stream, stream_id)
        return Feed(
            mjpeg(hub, stream_id),
            media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}",
            headers={"Cache-Control": "no-store"},
        )

    @router.get(
        "/streams/{stream_id}/events",
        summary="The stream's events as server-sent events",
        response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def events(
        stream_id: str,
        after: Annotated[int | None, Query(ge=0, description="begin behind this sequence; default: from now")] = None,
        last_event_id: Annotated[str | None, Header(description="as `after`; sent by browsers")] = None,
    ) -> Feed:
        begin = int(last_event_id) if last_event_id and last_event_id.isdecimal() else after
        if begin is None:
            begin = (await run_in_threadpool(manager.stats, stream_id)).events
        else:
            await run_in_threadpool(manager.store.get_stream, stream_id)
        return sse(stream_events(manager, hub, stream_id, begin))

    return router


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
