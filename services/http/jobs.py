"""Jobs: send a video, look how far it is, fetch what was found."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from anyio import from_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from services.http.guard import Calls
from services.http.idempotency import REPLAYED, IdempotencyKey, Once
from services.jobs import (
    PIECE_BYTES,
    Job,
    JobNotFound,
    JobRequest,
    JobsDoor,
    JobState,
    NoResult,
    UnsupportedBody,
    cancel_job,
    find_job,
    list_jobs,
)
from services.locks.callers import Caller
from services.manager import StreamManager
from services.wire import Wire
from tsm_core.zoo import UnknownModel

JOBS_PATH = "/v1/jobs"
FORM_BYTES = 64 << 10  # what a form may have beside its file
VIDEO: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
FORM: dict[str, Any] = {
    "schema": {
        "type": "object",
        "required": ["file"],
        "properties": {"file": VIDEO["schema"], **JobRequest.model_json_schema()["properties"]},
    }
}
BODY: dict[str, Any] = {
    "required": True,
    "content": {"video/*": VIDEO, "application/octet-stream": VIDEO, "multipart/form-data": FORM},
}


class JobList(Wire):
    """Jobs, the newest first."""

    jobs: list[Job]


class JobEvents(Wire):
    """Events of a job in the order of the video, as CloudEvents; their times are seconds in the file."""

    events: list[dict[str, Any]]
    next_after: int | None = Field(None, description="`after` of the next page; null: no more so far")


def jobs_router(manager: StreamManager, jobs: JobsDoor) -> APIRouter:
    """The routes below /v1/jobs."""
    router = APIRouter(prefix=JOBS_PATH, tags=["jobs"])
    store = manager.store
    once = Once(store)

    def job_of(caller: Caller, job_id: str) -> Job:
        job = find_job(store, job_id)
        if not _sees(caller, job):
            raise JobNotFound(f"no job {job_id[:80]!r} is among yours")
        return job

    def checked(given: dict[str, Any]) -> JobRequest:
        try:
            request = JobRequest.model_validate(given)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_input=False, include_url=False)) from None
        served = [model.name for model in manager.models()]
        name = request.model or next((model.name for model in manager.models() if model.default), served[0])
        if name not in served:
            raise UnknownModel(f"model {name!r} is not served; served: {', '.join(sorted(served))}")
        return request.model_copy(update={"model": name})

    @router.post(
        "",
        status_code=202,
        summary="Send a video: the body itself, or a form with `file`",
        response_model=Job,
        responses={202: {"headers": REPLAYED}},
        openapi_extra={"requestBody": BODY},
    )
    async def submit_job(
        request: Request,
        caller: Calls,
        model: Annotated[str | None, Query(max_length=200, description="default: the first served model")] = None,
        threshold: Annotated[float | None, Query(gt=0, lt=1)] = None,
        annotate: Annotated[bool, Query(description="also make a video that shows what was found")] = False,
        name: Annotated[str | None, Query(max_length=200, description="to show")] = None,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        given = {"model": model or "", "threshold": threshold, "annotate": annotate, "name": name or ""}
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=8) as form:
                fields = {key: value for key, value in form.items() if key != "file"}
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise UnsupportedBody("the form has no file `file`: curl -F file=@video.mp4 does it")
                asked = checked({**given, "name": given["name"] or (file.filename or "")[:200], **fields})
                return await receive(request, caller, asked, _pieces_of(file), idempotency_key)
        if not kind.startswith("video/") and kind != "application/octet-stream":
            raise UnsupportedBody(
                f"a body of type {kind[:60]!r} is no video: send video/mp4 (or another video/*), "
                "application/octet-stream, or a form with `file`"
            )
        return await receive(request, caller, checked(given), _joined(request.stream()), idempotency_key)

    async def receive(
        request: Request, caller: Caller, asked: JobRequest, pieces: AsyncIterator[bytes], key: str | None
    ) -> Response:
        job_id = await jobs.open()
        kept = False
        try:
            digest = hashlib.sha256()
            async for piece in pieces:
                digest.update(piece)
                await jobs.append(job_id, piece)

            def submit() -> Response:
                nonlocal kept
                job = from_thread.run(jobs.submit, job_id, asked, caller.name)
                kept = True
                return JSONResponse(job.model_dump(mode="json"), 202, {"Location": f"{JOBS_PATH}/{job.id}"})

            told = [asked.model_dump(mode="json"), digest.hexdigest()]
            return await run_in_threadpool(once.answer, request, key, told, submit)
        finally:
            if not kept:
                await jobs.abandon(job_id)

    @router.get("", summary="All jobs, the newest first")
    def all_jobs(
        caller: Calls, state: Annotated[list[JobState] | None, Query(description="only in one of these states")] = None
    ) -> JobList:
        return JobList(
            jobs=[job for job in list_jobs(store) if _sees(caller, job) and (not state or job.state in state)]
        )

    @router.get("/{job_id}", summary="One job: how far it is, or how it ended")
    def get_job(caller: Calls, job_id: str) -> Job:
        return job_of(caller, job_id)

    @router.delete("/{job_id}", status_code=204, summary="Cancel a job; forget one that is over")
    def delete_job(caller: Calls, job_id: str) -> None:
        job_of(caller, job_id)
        cancel_job(store, job_id, manager.settings.jobs.kept_s)

    @router.get("/{job_id}/events", summary="What was found, while the job runs and after")
    async def job_events(
        caller: Calls,
        job_id: str,
        after: Annotated[int, Query(ge=0, le=1 << 31, description="leave out the first ones")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    ) -> JobEvents:
        job = await run_in_threadpool(job_of, caller, job_id)
        found = await jobs.events(job.id, after, limit)
        return JobEvents(events=found, next_after=after + limit if len(found) == limit else None)

    @router.get(
        "/{job_id}/annotated.mp4",
        summary="The video with what was found drawn on it",
        response_class=Response,
        responses={200: {"content": {"video/mp4": VIDEO}}},
    )
    async def annotated(caller: Calls, job_id: str) -> StreamingResponse:
        job = await run_in_threadpool(job_of, caller, job_id)
        if job.annotated_bytes is None:
            raise NoResult(
                f"job {job.id} has no annotated video: it is {job.state}, annotate={str(job.annotate).lower()}"
            )
        first = await jobs.annotated(job.id, 0)

        async def pieces() -> AsyncIterator[bytes]:
            piece, offset = first, 0
            while piece:
                yield piece
                offset += len(piece)
                piece = await jobs.annotated(job.id, offset)

        headers = {"Content-Length": str(job.annotated_bytes), "Cache-Control": "private"}
        return StreamingResponse(pieces(), media_type="video/mp4", headers=headers)

    return router


def _sees(caller: Caller, job: Job) -> bool:
    """Jobs belong to no stream: who reaches only some streams reaches only the jobs that he sent."""
    return caller.streams is None or job.owner == caller.name


async def _pieces_of(file: UploadFile) -> AsyncIterator[bytes]:
    while piece := await file.read(PIECE_BYTES):
        yield piece


async def _joined(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body in pieces of a megabyte or so: the network's own are small, and each would be a call."""
    held = bytearray()
    async for chunk in chunks:
        held += chunk
        if len(held) >= PIECE_BYTES:
            yield bytes(held)
            held.clear()
    if held:
        yield bytes(held)
