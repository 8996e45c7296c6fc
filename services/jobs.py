"""Uploaded videos down the road of `tsm infer`, one after another, in a process of their own.

What is known of a job stands in the store, where any gateway reads it; the video and what came of it lie on the disk of
the runner. A job is changed by compare-and-set alone: who cancels or forgets one writes so, and the runner notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipelines.media_limits import MediaLimits, checked_video
from services.schemas import cloud_event, object_event
from services.settings import Settings
from services.store import StateStore
from services.wire import Size, Wire
from tsm_core.errors import CallerError, TSMError, WorldError
from tsm_core.types import ObjectEvent
from tsm_core.zoo import find_model

if TYPE_CHECKING:  # torch is slow to import: the first job waits for it, the start of the service does not
    from pipelines.infer import FrameResult
    from tsm_core.checkpoints import AnyModel

log = logging.getLogger(__name__)

KIND, RUNNERS = "jobs", "job_runners"
RUNNER_TTL_S = 15.0  # a runner silent for so long is gone
BEAT_S = 2.0
TELL_S = 0.5  # how often a job says how far it is, and looks whether it is still wanted
UPLOAD_IDLE_S = 120.0  # an upload that does not go on for so long is forgotten
PIECE_BYTES = 1 << 20
UPLOAD, EVENTS, ANNOTATED = "upload", "events.jsonl", "annotated.mp4"

JobState = Literal["QUEUED", "RUNNING", "DONE", "FAILED", "CANCELLED"]
ACTIVE = ("QUEUED", "RUNNING")


class JobNotFound(CallerError):
    """No job of this id is kept."""

    reason = "job_not_found"


class NoResult(CallerError):
    """The job has not, or not yet, what was asked for."""

    reason = "no_result"


class UploadLost(CallerError):
    """The upload was given up."""

    reason = "upload_lost"


class UploadTooLarge(CallerError):
    """The video is larger than the service takes."""

    reason = "upload_too_large"


class UnsupportedBody(CallerError):
    """The request carries no video in a way that is understood."""

    reason = "unsupported_body"


class JobsFull(WorldError):
    """As many jobs wait as may."""

    reason = "jobs_full"


class JobsDown(WorldError):
    """The process that runs jobs does not answer."""

    reason = "jobs_unavailable"


class JobRequest(Wire):
    """What to do with a video."""

    model: str = Field("", max_length=200, description="a served model; empty: the first one")
    threshold: float | None = Field(None, gt=0, lt=1, description="score that makes an action or object worth telling")
    annotate: bool = Field(False, description="also make a video that shows what was found")
    name: str = Field("", max_length=200, description="to show; empty: the name of the file, if it came with one")


class Job(Wire):
    """One job as the doors show it. Times are Unix seconds."""

    id: str
    name: str
    model: str
    threshold: float | None = None
    annotate: bool = False
    owner: str = Field("", description="name of the token that sent it")
    state: JobState
    progress: float = Field(0.0, description="share of the video that is done")
    frames: int = 0
    fps: float = Field(0.0, description="frames a second so far")
    events: int = 0
    size: Size | None = Field(None, description="width, height in pixels")
    duration_s: float | None = None
    upload_bytes: int = 0
    annotated_bytes: int | None = Field(None, description="size of annotated.mp4, once it is there")
    reason: str | None = Field(None, description="why it failed, a stable name", examples=["bad_file"])
    error: str | None = None
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    runner: str = ""

    @property
    def active(self) -> bool:
        """True while it waits or runs."""
        return self.state in ACTIVE


Call = Callable[..., Awaitable[Any]]


class JobsDoor:
    """The verbs of a JobRunner as a gateway has them, wherever the runner is. Any may raise JobsDown."""

    def __init__(self, call: Call) -> None:
        """call: carries out a verb of the runner, given its name and arguments."""
        self._call = call

    async def open(self) -> str:
        """Make room for an upload; its id becomes the job's. Raises JobsFull."""
        return str(await self._call("open"))

    async def append(self, job_id: str, piece: bytes) -> None:
        """The next piece of the video. Raises UploadTooLarge, UploadLost."""
        await self._call("append", job_id, piece)

    async def submit(self, job_id: str, request: JobRequest, owner: str) -> Job:
        """The video is complete: look at it and queue it. Raises BadMedia, MediaTooLarge, UploadLost."""
        job: Job = await self._call("submit", job_id, request, owner)
        return job

    async def abandon(self, job_id: str) -> None:
        """Forget an upload that was not submitted."""
        await self._call("abandon", job_id)

    async def events(self, job_id: str, after: int, limit: int) -> list[dict[str, Any]]:
        """Events behind the first `after`. Raises NoResult."""
        found: list[dict[str, Any]] = await self._call("events", job_id, after, limit)
        return found

    async def annotated(self, job_id: str, offset: int) -> bytes:
        """A piece of the annotated video; empty at its end. Raises NoResult."""
        piece: bytes = await self._call("annotated", job_id, offset)
        return piece


def local_jobs(runner: JobRunner) -> JobsDoor:
    """A door to a runner in this process."""
    return JobsDoor(lambda verb, *args: asyncio.to_thread(getattr(runner, verb), *args))


def find_job(store: StateStore, job_id: str) -> Job:
    """One job. Raises JobNotFound."""
    text = store.document(KIND, job_id)
    if text is None:
        raise JobNotFound(f"no job {job_id[:80]!r} is kept; jobs.kept and jobs.kept_s say which are")
    return _seen(Job.model_validate_json(text), store.documents(RUNNERS))


def list_jobs(store: StateStore) -> list[Job]:
    """All jobs, the newest first."""
    alive = store.documents(RUNNERS)
    jobs = [_seen(Job.model_validate_json(text), alive) for text in store.documents(KIND).values()]
    return sorted(jobs, key=lambda job: (job.created_at, job.id), reverse=True)


def cancel_job(store: StateStore, job_id: str, kept_s: float) -> None:
    """Cancel a job that waits or runs; forget one that is over. Raises JobNotFound."""
    while True:
        text = store.document(KIND, job_id)
        job = find_job(store, job_id)
        over = job.model_copy(update={"state": "CANCELLED", "ended_at": time.time()})
        if store.swap_document(KIND, job_id, text, over.model_dump_json() if job.active else None, kept_s):
            return


def _seen(job: Job, alive: dict[str, str]) -> Job:
    """The job as last written, corrected for a runner that is no longer there to write."""
    return job if not job.active or job.runner in alive else _lost(job)


def _lost(job: Job) -> Job:
    said = "the process that ran it is gone; send the video again"
    return job.model_copy(update={"state": "FAILED", "reason": "runner_lost", "error": said, "ended_at": time.time()})


def jobs_dir(settings: Settings) -> Path:
    """Where uploads and results are kept."""
    return settings.jobs.dir or settings.store.data_dir / "jobs"


class _NotWanted(Exception):
    """The job was cancelled or forgotten; internal to the runner."""


class JobRunner:
    """Takes uploads, runs one job at a time, keeps what came of them. Thread-safe."""

    def __init__(self, store: StateStore, settings: Settings, runner_id: str) -> None:
        self.id = runner_id
        self._store = store
        self._settings = settings
        self._limits = MediaLimits(**settings.limits.model_dump())
        self._dir = jobs_dir(settings)
        self._texts: dict[str, str] = {}  # of jobs that wait or run, as we wrote them last
        self._uploads: dict[str, tuple[int, float]] = {}  # bytes so far, when
        self._queue: deque[Job] = deque()
        self._news = threading.Condition()
        self._stopping = threading.Event()
        self._model: tuple[str, AnyModel] | None = None
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to work."""
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(WorldError):
            self._beat()
        for name, work in (("jobs", self._work), ("jobs-keeper", self._keep)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End; jobs that are not done fail and say so."""
        with self._news:
            self._stopping.set()
            self._news.notify_all()
        for thread in self._threads:
            thread.join(5.0)
        for job_id in list(self._texts):
            with contextlib.suppress(WorldError, _NotWanted):
                job = Job.model_validate_json(self._texts[job_id])
                self._tell(_lost(job).model_copy(update={"error": "the service was stopped; send the video again"}))
        with contextlib.suppress(WorldError):
            held = self._store.document(RUNNERS, self.id)
            self._store.swap_document(RUNNERS, self.id, held, None)

    @property
    def alive(self) -> bool:
        """False when a thread ended by a bug."""
        return self._stopping.is_set() or all(thread.is_alive() for thread in self._threads)

    # ---- uploads

    def open(self) -> str:
        """As JobsDoor."""
        with self._news:
            waiting = len(self._queue) + len(self._uploads)
            if waiting >= self._settings.jobs.queue:
                raise JobsFull(f"{waiting} jobs wait or are being sent, as many as jobs.queue allows; try again later")
            job_id = f"job-{secrets.token_hex(8)}"
            self._uploads[job_id] = (0, time.monotonic())
        (self._dir / job_id).mkdir(mode=0o700)
        return job_id

    def append(self, job_id: str, piece: bytes) -> None:
        """As JobsDoor."""
        with self._news:
            size = self._known(job_id) + len(piece)
            self._uploads[job_id] = (size, time.monotonic())
        if size > self._limits.video_bytes:
            self.abandon(job_id)
            raise UploadTooLarge(f"the video has more than {self._limits.video_bytes} bytes (limits.video_bytes)")
        try:
            with (self._dir / job_id / UPLOAD).open("ab") as file:
                file.write(piece)
        except OSError as error:
            self.abandon(job_id)
            raise JobsDown(f"the disk of the jobs takes no more: {error.strerror}") from None

    def submit(self, job_id: str, request: JobRequest, owner: str) -> Job:
        """As JobsDoor. Blocks while the video is looked at."""
        with self._news:
            size = self._known(job_id)
        try:
            facts = checked_video(self._dir / job_id / UPLOAD, self._limits)
        except TSMError:
            self.abandon(job_id)
            raise
        job = Job(
            id=job_id,
            owner=owner,
            state="QUEUED",
            size=(facts.width, facts.height),
            duration_s=facts.duration_s,
            upload_bytes=size,
            created_at=time.time(),
            runner=self.id,
            **request.model_dump(),
        )
        text = job.model_dump_json()
        self._store.put_document(KIND, job_id, text)
        with self._news:
            self._uploads.pop(job_id, None)
            self._texts[job_id] = text
            self._queue.append(job)
            self._news.notify_all()
        return job

    def abandon(self, job_id: str) -> None:
        """As JobsDoor."""
        with self._news:
            known = self._uploads.pop(job_id, None)
        if known is not None:
            shutil.rmtree(self._dir / job_id, ignore_errors=True)

    def _known(self, job_id: str) -> int:
        if job_id not in self._uploads:
            raise UploadLost(f"upload {job_id[:80]!r} was given up after {UPLOAD_IDLE_S:g} s of silence; send it again")
        return self._uploads[job_id][0]

    # ---- results

    def events(self, job_id: str, after: int, limit: int) -> list[dict[str, Any]]:
        """As JobsDoor."""
        found = []
        try:
            with (self._folder(job_id) / EVENTS).open() as file:
                for number, line in enumerate(file, 1):
                    if number > after + limit:
                        break
                    if number > after and line.endswith("\n"):
                        found.append({**json.loads(line), "sequence": number})
        except FileNotFoundError:
            return []  # nothing yet
        return found

    def annotated(self, job_id: str, offset: int) -> bytes:
        """As JobsDoor."""
        try:
            with (self._folder(job_id) / ANNOTATED).open("rb") as file:
                file.seek(offset)
                return file.read(PIECE_BYTES)
        except FileNotFoundError:
            raise NoResult(
                f"job {job_id} has no annotated video; it must be sent with annotate=true, and done"
            ) from None

    def _folder(self, job_id: str) -> Path:
        folder = self._dir / job_id
        if folder.parent != self._dir or not job_id.startswith("job-") or not folder.is_dir():
            raise NoResult(f"what came of job {job_id[:80]!r} is not kept here any more")
        return folder

    # ---- the work

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._queue or self._stopping.is_set())
                if self._stopping.is_set():
                    return
                job = self._queue.popleft()
            with contextlib.suppress(_NotWanted):
                self._run(job)
            if self._stopping.is_set():
                return  # `stop` says what became of it
            self._texts.pop(job.id, None)
            (self._dir / job.id / UPLOAD).unlink(missing_ok=True)

    def _run(self, job: Job) -> None:
        job = self._insist(job.model_copy(update={"state": "RUNNING", "started_at": time.time()}))
        try:
            job = self._infer(job)
            done: dict[str, Any] = {"state": "DONE", "progress": 1.0}
            if job.annotate:
                done["annotated_bytes"] = (self._dir / job.id / ANNOTATED).stat().st_size
        except _NotWanted:
            raise
        except TSMError as error:
            said = str(error).replace(str(self._dir / job.id / UPLOAD), "the video")
            done = {"state": "FAILED", "reason": error.reason, "error": said}
        except Exception:  # one bad video must not hurt the next
            log.exception("job %s failed", job.id)
            done = {
                "state": "FAILED",
                "reason": "internal_error",
                "error": "an error of the service; its log says more",
            }
        if done["state"] == "FAILED":
            job = Job.model_validate_json(self._texts[job.id])  # as far as it was told
        self._insist(job.model_copy(update={**done, "ended_at": time.time()}))

    def _infer(self, job: Job) -> Job:
        """The job once all of its video went through; tells on the way how far it is."""
        from pipelines.infer import infer_file

        folder, began_s = self._dir / job.id, time.monotonic()
        told_s, frames, count, done_s = began_s, 0, 0, 0.0

        def now() -> Job:
            share = min(1.0, done_s / job.duration_s) if job.duration_s else 0.0
            fps = round(frames / max(1e-6, time.monotonic() - began_s), 1)
            return job.model_copy(update={"progress": round(share, 4), "frames": frames, "fps": fps, "events": count})

        results: Any = infer_file(
            folder / UPLOAD,
            self._loaded(job.model),
            name=job.model,
            stream_id=job.id,
            threshold=job.threshold,
            annotate=folder / ANNOTATED if job.annotate else None,
        )
        with contextlib.closing(results), (folder / EVENTS).open("w") as out:
            for result in results:
                frames, done_s = frames + 1, result.pts_s
                for told in events_of(result):
                    out.write(json.dumps(told) + "\n")
                    count += 1
                if self._stopping.is_set():
                    raise _NotWanted
                if time.monotonic() - told_s >= TELL_S:
                    out.flush()
                    with contextlib.suppress(WorldError):  # told next time
                        self._tell(now())
                    told_s = time.monotonic()
        return now()

    def _loaded(self, name: str) -> AnyModel:
        import torch

        from services.engine import pick_device
        from tsm_core.checkpoints import load_model

        torch.set_num_threads(self._settings.engine.threads)
        if self._model is None or self._model[0] != name:
            self._model = None  # never two at once
            path = next((model.path for model in self._settings.engine.models if model.name == name), None)
            device = pick_device(self._settings.engine.device) if self._settings.jobs.num_gpus else "cpu"
            found = find_model(name, path, [self._settings.models.folder])
            self._model = (name, load_model(found, device).for_inference())
        return self._model[1]

    def _tell(self, job: Job) -> Job:
        """Write how a job is, unless it was cancelled or forgotten. Raises _NotWanted, StoreDown."""
        text = job.model_dump_json()
        kept_s = None if job.active else self._settings.jobs.kept_s
        if not self._store.swap_document(KIND, job.id, self._texts[job.id], text, kept_s):
            raise _NotWanted
        self._texts[job.id] = text
        return job

    def _insist(self, job: Job) -> Job:
        """As _tell, again and again while the store is down."""
        while True:
            try:
                return self._tell(job)
            except WorldError:
                if self._stopping.is_set():
                    raise _NotWanted from None
                time.sleep(TELL_S)

    # ---- keeping house

    def _keep(self) -> None:
        while True:
            try:
                self._beat()
                self._tidy()
            except WorldError as error:
                log.debug("jobs wait for the store: %s", error)
            with self._news:
                if self._news.wait_for(self._stopping.is_set, BEAT_S):
                    return

    def _beat(self) -> None:
        self._store.put_document(RUNNERS, self.id, str(os.getpid()), RUNNER_TTL_S)

    def _tidy(self) -> None:
        """Let jobs of lost runners fail, forget the oldest beyond `jobs.kept`, remove folders that nobody needs."""
        texts, alive = self._store.documents(KIND), self._store.documents(RUNNERS)
        jobs = {job_id: Job.model_validate_json(text) for job_id, text in texts.items()}
        for job_id, job in jobs.items():
            if job.active and job.runner not in alive:
                lost = _lost(job).model_dump_json()
                self._store.swap_document(KIND, job_id, texts[job_id], lost, self._settings.jobs.kept_s)
        over = sorted((job for job in jobs.values() if not job.active), key=lambda job: job.ended_at or 0.0)
        for job in over[: max(0, len(over) - self._settings.jobs.kept)]:
            self._store.swap_document(KIND, job.id, texts[job.id], None)
            del jobs[job.id]
        with self._news:
            idle_s = time.monotonic() - UPLOAD_IDLE_S
            silent = [upload for upload, (_, at_s) in self._uploads.items() if at_s < idle_s]
            needed = {*jobs, *self._uploads, *self._texts}
        for upload in silent:
            self.abandon(upload)
        for folder in self._dir.glob("job-*"):
            if folder.name not in needed and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def events_of(result: FrameResult) -> list[dict[str, Any]]:
    """What a frame's result tells, as CloudEvents; their times are those in the file."""
    return [object_event(event) if isinstance(event, ObjectEvent) else cloud_event(event) for event in result.events]
