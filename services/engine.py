"""One replica: streams in, one batch at a time through the models, events out. Knows nothing of Ray."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch

from pipelines.media_limits import MediaLimits
from pipelines.sources import Source
from services.batcher import Batcher, Row
from services.frame_queue import FrameQueue
from services.inference import InferReply, InferRequest, ModelNotReady, NotMine
from services.lanes import Clip, ClipLane, Sight
from services.previews import Previews
from services.pushed import PushedSession
from services.request_form import check_request, description_of
from services.requests import Requests
from services.schemas import SEQUENCES, Lease, ReplicaInfo, StreamSpec
from services.served import Model, Served, ServedRecogniser, serve
from services.session import ModelNotLoaded, OpenSource, Session
from services.settings import ModelSettings, Settings
from services.sinks import Outlet, Passage, Publisher
from services.snapshots import Snapshot, encode_snapshot
from services.store import StaleLease, StateStore, StreamNotFound
from services.telemetry import EngineFigures, Telemetry
from services.wanted import FAULT_KEPT_S, FAULTS, wanted_models
from tsm_core.arena import ArenaFull, WindowArena
from tsm_core.checkpoints import load_model
from tsm_core.errors import TSMError, WorldError
from tsm_core.zoo import find_model

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
METRICS_S = 2.0
STUCK_S = 5.0
CLIP_STUCK_S = 60.0
SEQUENCE_NOTE_S = 600.0
TAKE_S = 0.2  # how often an idle loop shows that it lives


class EngineUnhealthy(WorldError):
    """The replica does not do its work any more and must be replaced."""

    reason = "engine_unhealthy"


class StepLock:
    """A lock between the batching loop and everybody who touches its slots: the loop lets the others go first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._quiet = threading.Condition()
        self._guests = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """For the batching loop."""
        with self._quiet:
            self._quiet.wait_for(lambda: not self._guests, 0.05)
        with self._lock:
            yield

    @contextmanager
    def between(self) -> Iterator[None]:
        """For everybody else: between two steps."""
        with self._quiet:
            self._guests += 1
        try:
            with self._lock:
                yield
        finally:
            with self._quiet:
                self._guests -= 1
                self._quiet.notify_all()


T = TypeVar("T")


def batches(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """The items in their order, at most `most` at a time."""
    for begin in range(0, len(items), most):
        yield items[begin : begin + most]


def pick_device(wanted: str) -> str:
    """`auto` becomes cuda where there is one, else cpu."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


class Engine:
    """Serves the streams whose leases name this replica.

    Its threads: the batching loop; a lane for each model in window mode; control (leases to sessions); heartbeat;
    publisher; keeper (snapshots, metrics); previews. The store may be down at any time: frames go on through the
    models, writes wait or are counted.
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        replica_id: str,
        models: Mapping[str, Model] | None = None,
        *,
        open_source: OpenSource = Source,
    ) -> None:
        self.settings = settings
        self.store = store
        self.id = replica_id
        self.device = pick_device(settings.engine.device)
        self.sessions: dict[str, Session] = {}
        self.batcher = Batcher(settings.engine.max_batch, settings.engine.max_wait_ms / 1000)
        self.publisher = Publisher(store)
        self.telemetry = Telemetry(self.figures, settings.telemetry.stream_labels)
        self.served: dict[str, Served[Any]] = {}
        self._lanes: dict[str, ClipLane] = {}
        self._limits = MediaLimits(**settings.limits.model_dump())
        self._requests = Requests(self.served, self._limits, settings.engine.max_batch, self.telemetry)
        self._pending: Counter[str] = Counter()  # requests by model
        self._counting = threading.Lock()
        self._models = models
        self._loading: threading.Thread | None = None
        self._open_source = open_source
        self._previews = Previews(store, lambda: list(self.sessions.values()), settings.preview)
        self._by_queue: dict[FrameQueue, Session] = {}
        self._outlets: dict[Session, Outlet] = {}
        self._refused: set[Session] = set()
        self._next_tracks: dict[str, int] = {}  # of streams that were closed here: an epoch may have several sessions
        self._lock = StepLock()
        self._changing = threading.Lock()  # one change of `sessions` at a time
        self._stopping = threading.Event()
        self._look = threading.Event()  # somebody cannot wait for the next look at the leases
        self._over: dict[str, str] = {}  # sequences that were let go and are not forgotten by the store yet, and why
        self._forgetting = threading.Lock()
        self._silent = threading.Event()  # no heartbeats any more
        self._draining = False
        self._started_s = 0.0
        self._progress_s = time.monotonic()
        self._save_after_s = 0.0
        self._store_errors: Counter[str] = Counter()
        self._died: tuple[str, BaseException] | None = None
        self._threads: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(min(64, settings.engine.slots + 1), f"{replica_id}-close")

    # ---- life

    def start(self) -> None:
        """Load the models and begin to work. Raises UnknownModel, ModelFileError."""
        torch.set_num_threads(self.settings.engine.threads)
        self._started_s = time.time()
        given = self._models
        for model in self.settings.engine.models if given is None else ():
            self._hold(model.name, self._load(model))
        for name, held in (given or {}).items():
            self._hold(name, held)
        self.publisher.start()
        for name, work in (
            ("batching", self._batch_loop),
            ("heartbeat", self._heartbeat_loop),
            ("control", self._control_loop),
            ("keeper", self._keeper_loop),
            ("previews", lambda: self._previews.run(self._stopping)),
        ):
            self._threads.append(self._thread(name, work))

    def _thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guard, args=(name, work), name=f"{self.id}-{name}", daemon=True)
        thread.start()
        return thread

    def drain(self) -> None:
        """Hand everything over: no new streams, cameras closed, states saved, the rest published, replica retired."""
        with self._changing:
            if self._draining:
                return
            self._draining = True
            sessions = list(self.sessions.values())
        self._heartbeat()
        list(self._pool.map(lambda session: session.stop_source(0.5), sessions))
        until_s = time.monotonic() + 0.1
        while any(session.queue.waiting for session in sessions) and time.monotonic() < until_s:
            time.sleep(0.005)
        list(self._pool.map(self._hand_over, sessions))
        self._silent.set()
        try:
            self.store.retire(self.id)
        except WorldError as error:
            log.warning("%s could not retire, its heartbeat runs out instead: %s", self.id, error)

    def stop(self) -> None:
        """Drain, then end every thread and child."""
        if self._started_s:
            self.drain()
        self._stopping.set()
        self._silent.set()
        self._look.set()
        self._requests.close()
        self.batcher.close()
        for lane in self._lanes.values():
            lane.close()
        for session in list(self.sessions.values()):
            self._close(session, "moved")
        for thread in self._threads:
            thread.join(5.0)
        self._pool.shutdown(wait=True)
        self.publisher.stop()

    def healthy(self) -> None:
        """Return while the replica works. Raises EngineUnhealthy."""
        if self._died is not None:
            name, error = self._died
            raise EngineUnhealthy(f"thread {name} of {self.id} ended: {type(error).__name__}: {error}")
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        if dead and not self._stopping.is_set():
            raise EngineUnhealthy(f"threads {', '.join(dead)} of {self.id} ended")
        if self._threads and not self.publisher.alive and not self._stopping.is_set():
            raise EngineUnhealthy(f"the publisher of {self.id} ended")
        since_s = self.batcher.waiting_since_s
        idle_s = time.monotonic() - max(self._progress_s, since_s if since_s is not None else math.inf)
        if idle_s > STUCK_S:
            raise EngineUnhealthy(f"the batching loop of {self.id} made no progress for {idle_s:.1f} s")
        for name, lane in self._lanes.items():
            if lane.busy_s > CLIP_STUCK_S:
                raise EngineUnhealthy(f"a clip of {name} on {self.id} takes more than {CLIP_STUCK_S:g} s")

    # ---- the road of a frame

    def run_once(self, timeout_s: float = TAKE_S) -> int:
        """One batch from the queues to the outlets; how many frames."""
        rows = self.batcher.take(timeout_s)  # one frame per stream keeps time in order
        self._progress_s = time.monotonic()
        if not rows:
            return 0
        with self._lock.step():
            live = [(session, row) for row in rows if (session := self._session_of(row)) is not None]
            # detectors first: others look at what they found on the same frame
            for served in sorted(self.served.values(), key=lambda one: one.task != "detection"):
                sights = [sight for session, row in live for sight in self._follow(served, session, row)]
                for batch in batches(sights, self.settings.engine.max_batch):
                    self._step(served, batch)  # reads and writes shift state in its slots
            for session, row in live:
                lost = None if not session.frozen else "failed" if session.failed else "closed"
                if lost is None:
                    session.done(row.waiting)
                else:
                    row.queue.done(lost)
                if row.waiting.trace is not None:
                    row.waiting.trace.end(dropped=lost)
        self._progress_s = time.monotonic()
        return len(rows)

    def _session_of(self, row: Row) -> Session | None:
        session = self._by_queue.get(row.queue)
        if session is None or session.frozen:
            row.queue.done("closed")
            return None
        now_s, waiting = time.monotonic(), row.waiting
        self.telemetry.stage("queue", now_s - waiting.arrived_s)
        if waiting.trace is not None:
            waiting.trace.add("queue", waiting.arrived_s, now_s)
        return session

    def _follow(self, served: Served[Any], session: Session, row: Row) -> list[Sight]:
        """What of this frame goes through the model; what a gap before it ended is told."""
        if session.frozen or served.name not in session.analytics:
            return []
        try:
            look = session.follow(served.name, row.frame)
        except Exception as error:  # noqa: BLE001  one stream's analytics must not hurt the others
            self._fail(session, served.name, "ANALYTICS_FAILED", error)
            return []
        self._outlets[session].emit(look.events)
        return [Sight(session, row, view) for view in look.views]

    def _step(self, served: Served[Any], batch: Sequence[Sight]) -> None:
        """Step one model over a batch and hand on what it tells. A picture that throws fails its own stream alone."""
        if isinstance(served.arena, WindowArena):
            self._enter(served, served.arena, batch)
            return
        try:
            outputs = self._infer(served, batch)
        except Exception as error:  # noqa: BLE001  whose fault it is, is found out below
            outputs = self._one_by_one(served, batch, error)
        began_s = time.monotonic()
        for sight, output in zip(batch, outputs, strict=True):
            if output is not None and not sight.session.frozen:
                self._tell(served, sight, output)
        self.telemetry.stage("track", (time.monotonic() - began_s) / len(batch))

    def _tell(self, served: Served[Any], sight: Sight, output: Any, warmup: tuple[int, int] | None = None) -> None:
        """An output becomes records and events, both go out."""
        session, row, trace, began_s = sight.session, sight.row, sight.row.waiting.trace, time.monotonic()
        try:
            result = session.update(served.name, sight.view, output, row.frame, warmup)
        except Exception as error:  # noqa: BLE001  one stream's analytics must not hurt the others
            self._fail(session, served.name, "ANALYTICS_FAILED", error)
        else:
            if trace is not None:
                trace.add("track", began_s, time.monotonic(), model=served.name)
                for event in result.events:
                    event["traceparent"] = trace.traceparent
            self._outlets[session].emit(result.events, result.scores, row.waiting.arrived_s, trace)

    def _infer(self, served: Served[Any], batch: Sequence[Sight]) -> list[Any]:
        began_s = time.monotonic()
        pixels = served.preprocess([sight.view.image for sight in batch])  # (N, 3, h, w), on the device
        ready_s = time.monotonic()
        times_s = [sight.row.frame.time_s for sight in batch]
        outputs = served.step(pixels, [sight.view.slot for sight in batch], times_s)
        done_s = time.monotonic()
        self.telemetry.stage("preprocess", ready_s - began_s)
        self.telemetry.stage("infer", done_s - ready_s)
        self.telemetry.step(served.name, len(batch))
        for sight in batch:
            if (trace := sight.row.waiting.trace) is not None:
                trace.add("preprocess", began_s, ready_s, model=served.name)
                trace.add("infer", ready_s, done_s, model=served.name, batch_size=len(batch))
            if isinstance(sight.session, PushedSession):
                waited_s = began_s - sight.row.waiting.arrived_s
                self.telemetry.compute(
                    served.name, {"queue": waited_s, "input": ready_s - began_s, "infer": done_s - ready_s}
                )
        return outputs

    # ---- window mode: frames enter rings here, clips go through the model in a lane of their own

    def _lane(self, served: ServedRecogniser) -> ClipLane:
        most = max(1, self.settings.engine.max_batch // served.frames_per_result) if self.device != "cpu" else 1
        return ClipLane(
            served,
            most,
            lambda clips, rows: self._deliver(served, clips, rows),
            lambda clip, error: self._clip_failed(served, clip, error),
        )

    def _enter(self, served: Served[Any], arena: WindowArena, batch: Sequence[Sight]) -> None:
        """Let the frames that are due enter their rings, and send the clips that are due on their way."""
        slots = [sight.view.slot for sight in batch]
        entering, due = arena.plan(slots, [sight.row.frame.time_s for sight in batch])
        if entering:
            self._put(served, arena, [batch[position] for position in entering])
        for position in due:
            sight, slot = batch[position], slots[position]
            if sight.session.frozen:
                continue
            sight.session.in_flight += 1
            self._lanes[served.name].submit(Clip(sight, arena.clips([slot]), served.warmup(slot)))

    def _put(self, served: Served[Any], arena: WindowArena, entering: Sequence[Sight]) -> None:
        began_s = time.monotonic()
        try:
            arena.put([sight.view.slot for sight in entering], served.preprocess([s.view.image for s in entering]))
        except Exception as error:  # noqa: BLE001  whose fault it is, is found out one by one
            if len(entering) == 1:
                self._fail(entering[0].session, served.name, "STEP_FAILED", error)
            else:
                for one in entering:
                    self._put(served, arena, [one])
            return
        self.telemetry.stage("preprocess", time.monotonic() - began_s)

    def _deliver(self, served: ServedRecogniser, clips: Sequence[Clip], rows: Sequence[list[float]]) -> None:
        self.telemetry.step(served.name, len(clips))
        if (lane := self._lanes.get(served.name)) is not None:
            self.telemetry.stage("infer", lane.busy_s)
        with self._lock.between():
            for clip, values in zip(clips, rows, strict=True):
                session = clip.sight.session
                session.in_flight -= 1
                # a stream that is closed, or whose ring began anew meanwhile, has no use for it
                if not session.frozen and session.analytics[served.name].holds(clip.sight.view):
                    self._tell(served, clip.sight, values, clip.warmup)

    def _clip_failed(self, served: Served[Any], clip: Clip, error: Exception) -> None:
        session = clip.sight.session
        with self._lock.between():
            session.in_flight -= 1
            if not session.frozen:
                self._fail(session, served.name, "STEP_FAILED", error)

    def _one_by_one(self, served: Served[Any], batch: Sequence[Sight], error: Exception) -> list[Any]:
        """The outputs of a batch that threw, each alone: the guilty ones give None and fail their streams."""
        log.warning("a step of %s with %d rows failed: %s", served.name, len(batch), error)
        outputs: list[Any] = []
        for sight in batch:
            try:
                outputs += self._infer(served, [sight])
            except Exception as own:  # noqa: BLE001
                self._fail(sight.session, served.name, "STEP_FAILED", own)
                outputs.append(None)
        if len({sight.session for sight in batch}) > 1 and all(output is None for output in outputs):
            raise EngineUnhealthy(f"every row of a step of {served.name} failed: {error}") from error
        return outputs

    def _fail(self, session: Session, model: str, code: str, error: Exception) -> None:
        log.error("%s: %s", session.id, code, exc_info=error, extra={"stream": session.id})
        self.telemetry.failure(model, code.lower())
        self.batcher.leave(session.queue)
        reason = error.reason if isinstance(error, TSMError) else type(error).__name__
        session.fail(code, f"{reason}: {error}")
        self._submit(session.stop_source, 3.0)

    # ---- requests

    def infer(self, request: InferRequest) -> Future[InferReply]:
        """The answer to come for a request that stands alone.

        Raises UnknownModel, ModelNotReady, BadInput, ModelBusy; the answer may be an error, too.
        """
        return self._counted(request, lambda: self._requests.submit(request))

    def push(self, stream_id: str, epoch: int, token: str, request: InferRequest) -> Future[InferReply]:
        """The answer to come for the next frames of a sequence that this replica owns under that epoch.

        token tells one request from another: sent again, it is not counted again. Raises NotMine, UnknownModel,
        ModelNotReady, BadInput, SequenceBusy; the answer may be an error, too.
        """
        session = self.sessions.get(stream_id)
        if not isinstance(session, PushedSession) or session.lease.epoch != epoch or stream_id in self._over:
            self._look.set()
            raise NotMine(f"{self.id} does not serve {stream_id} under epoch {epoch}")

        def submit() -> Future[InferReply]:
            served = self.served.get(request.model)
            if served is None:
                raise ModelNotReady(f"this replica does not hold model {request.model!r} at the moment; try again")
            name, array = check_request(request, description_of(served))
            return session.push(request, token, name, array)

        return self._counted(request, submit)

    def expects(self, lease: Lease) -> bool:
        """Whether a sequence of this lease may still be opened here."""
        session = self.sessions.get(lease.stream_id)
        over = lease.stream_id in self._over or self._draining or self._stopping.is_set()
        return not over and (session is None or session.lease.epoch < lease.epoch)

    def _counted(self, request: InferRequest, submit: Callable[[], Future[InferReply]]) -> Future[InferReply]:
        began_s = time.monotonic()
        try:
            answer = submit()
        except NotMine:
            raise
        except TSMError as error:
            self.telemetry.request(request.model, time.monotonic() - began_s, error.reason)
            raise
        with self._counting:
            self._pending[request.model] += 1

        def over(answer: Future[InferReply]) -> None:
            with self._counting:
                self._pending[request.model] -= 1
            error = None if answer.cancelled() else answer.exception()
            if isinstance(error, NotMine) or answer.cancelled():
                return
            reason = None if error is None else error.reason if isinstance(error, TSMError) else "internal_error"
            self.telemetry.request(request.model, time.monotonic() - began_s, reason)

        answer.add_done_callback(over)
        return answer

    # ---- sessions

    def reconcile(self) -> None:
        """Make the sessions what the leases say. Raises StoreDown."""
        refused = set(self._refused)  # before the leases are read: they explain it
        leases = self.store.leases()
        mine = {stream_id: lease for stream_id, lease in leases.items() if lease.owner == self.id}
        specs = {spec.id: spec for spec in self.store.list_streams()} if mine or self.sessions else {}
        with self._changing:
            if self._draining:
                return
            for session in list(self.sessions.values()):
                lease, spec = mine.get(session.id), specs.get(session.id)
                if lease is None or spec is None:
                    if session.id in leases:
                        self.telemetry.moved_out()
                    self._close(session, "moved" if session.id in leases else "stopped")
                elif lease.epoch != session.lease.epoch or session in refused:
                    self.telemetry.moved_out()
                    self._close(session, "moved")
                elif not spec.enabled:
                    continue  # the controller takes it away in a moment
                elif spec.revision != session.spec.revision:
                    self._save(session)
                    self._close(session, "changed")
                elif session.ended:
                    self._finish(session)
                elif spec.paused != session.paused:
                    self._pause(session, spec.paused)
            for stream_id, lease in mine.items():
                spec = specs.get(stream_id)
                if stream_id in self.sessions or stream_id in self._over:
                    continue
                if spec is not None and spec.enabled:
                    self._open(spec, lease)

    def _open(self, spec: StreamSpec, lease: Lease) -> None:
        blob, before = self.store.load(spec.id), self.store.status(spec.id)
        try:
            with self._lock.between():
                session = self._session(spec, lease)
                session.resume(blob, before)
        except ArenaFull as error:
            # a session that is closing gives its slot back: next time
            log.warning("%s: %s", spec.id, error, extra={"stream": spec.id})
            return
        except ModelNotLoaded as error:
            missing = {model.name for model in spec.models} - self.served.keys()
            if missing <= wanted_models(self.settings, self.store).keys() - self.store.documents(FAULTS).keys():
                return  # they are being loaded: next time
            log.error("%s: %s", spec.id, error, extra={"stream": spec.id})
            self._refuse_open(spec, lease, error)
            return
        outlet = self.publisher.open(
            lease,
            session.status,
            on_published=lambda passage, now_s: self._published(session, passage, now_s),
            on_refused=lambda: self._refused.add(session),
        )
        self._outlets[session] = outlet
        self._by_queue[session.queue] = session
        self.sessions[spec.id] = session
        self.batcher.open(session.queue)
        self.telemetry.restored(session.restored.mode)
        if before is not None and before.worker not in (None, self.id):
            self.telemetry.moved_in()
        log.info(
            "%s: epoch %d, %s start at frame %d %s",
            spec.id,
            lease.epoch,
            session.restored.mode,
            session.first_number,
            session.note,
            extra={"stream": spec.id},
        )
        if spec.paused:
            session.pause()
        else:
            session.start(self._open_source)

    def _pause(self, session: Session, pause: bool) -> None:
        """Close the source of a stream and keep all else of it; or open it again, once it is closed."""
        if pause:
            session.pause()
            self._submit(self._rest, session)
        elif session.source is None:
            session.go_on(self._open_source)

    def _rest(self, session: Session) -> None:
        session.rest()
        self._save(session)

    def _session(self, spec: StreamSpec, lease: Lease) -> Session:
        first_track = self._next_tracks.get(spec.id, 0)
        if not spec.source.is_pushed:
            return Session(
                spec,
                lease,
                self.served,
                self.settings,
                on_ready=self.batcher.ready,
                on_change=self._announce,
                first_track=first_track,
            )
        return PushedSession(
            spec,
            lease,
            self.served,
            self.settings,
            on_ready=self.batcher.ready,
            on_change=self._announce,
            first_track=first_track,
            limits=self._limits,
            submit=self._submit,
            on_over=lambda session: self._submit(self._dismiss, session, "ended"),
        )

    def _refuse_open(self, spec: StreamSpec, lease: Lease, error: ModelNotLoaded) -> None:
        """A session that has failed from the start, so that its status says why."""
        bare = spec.model_copy(update={"models": ()})
        try:
            with self._lock.between():
                session = Session(
                    bare, lease, self.served, self.settings, on_ready=self.batcher.ready, on_change=self._announce
                )
        except (ArenaFull, ModelNotLoaded):
            return
        session.spec = spec
        outlet = self.publisher.open(lease, session.status, lambda *_: None, lambda: self._refused.add(session))
        self._outlets[session] = outlet
        self.sessions[spec.id] = session
        session.fail("MODEL_NOT_LOADED", str(error))

    def _close(self, session: Session, why: str) -> None:
        """Let go of a stream: `moved` to another replica or lease, `stopped` by a person, `changed` and opened anew."""
        session.queue.close()
        self.batcher.leave(session.queue)
        with self._lock.between():
            ends = session.finish() if why == "stopped" else []
            self._next_tracks[session.id] = max(session.next_track, self._next_tracks.get(session.id, 0))
            session.free()
        self.sessions.pop(session.id, None)
        self._by_queue.pop(session.queue, None)
        self._refused.discard(session)
        self._submit(self._end, session, why, ends)

    def _end(self, session: Session, why: str, ends: list[dict[str, Any]]) -> None:
        """The slow part of closing."""
        session.stop_source()
        self._outlets.pop(session).close()
        self.telemetry.forget(session.id)
        if why != "stopped":
            return
        event = session.settle("STOPPED") if session.state != "ENDED" else None
        try:
            # nobody owns it any more: fenced writes are over, and a stream that was deleted refuses this one
            known = self.store.status(session.id)
            if event is not None and (known is None or known.state != "STOPPED"):
                ends = [*ends, event]
            self.store.announce(session.id, session.status(), events=ends)
        except StaleLease:
            log.debug("%s: has a new owner or is gone", session.id, extra={"stream": session.id})
        except WorldError as error:
            self._store_errors["announce"] += 1
            log.warning("%s: the end could not be announced: %s", session.id, error, extra={"stream": session.id})

    def _finish(self, session: Session) -> None:
        """A file is over: what is open ends, and both are told in one write, after which the lease may go."""
        with self._lock.between():
            events = session.finish()
        event = session.settle("ENDED", "the file is over")
        self._outlets[session].announce([*events, event] if event else events)

    # ---- sequences that are over

    def _tidy(self) -> None:
        """Let go of sequences that nobody pushes, or that failed, and have the store forget those that are over."""
        for session in list(self.sessions.values()):
            if isinstance(session, PushedSession):
                if session.failed:
                    self._dismiss(session, "failed")
                elif session.idle_s > self.settings.engine.sequence_idle_s:
                    self._dismiss(session, "evicted")
        for stream_id in list(self._over):
            self._forget(stream_id)

    def _dismiss(self, session: PushedSession, why: str) -> None:
        """End a sequence: its slot is free at once, its events are told, the store keeps a note of it alone."""
        with self._changing:
            if self.sessions.get(session.id) is not session:
                return
            self._over[session.id] = why
            with self._lock.between():
                events = session.finish()
            event = session.settle("ENDED", f"the sequence was {why}")
            self._outlets[session].announce([*events, event] if event else events)
            self._close(session, "moved")
        self.publisher.flush(0.3)
        try:
            self._forget(session.id)
        except WorldError as error:  # the control loop tries again
            log.warning("%s: the store cannot forget it yet: %s", session.id, error, extra={"stream": session.id})

    def _forget(self, stream_id: str) -> None:
        with self._forgetting:  # once: a sequence of the same id may begin right behind
            why = self._over.get(stream_id)
            if why is None:
                return
            self.store.put_document(SEQUENCES, stream_id, why, SEQUENCE_NOTE_S)
            with suppress(StreamNotFound):
                self.store.delete_stream(stream_id)
            self._over.pop(stream_id, None)

    def _hand_over(self, session: Session) -> None:
        """Save, publish what is left, give the lease back: the next owner goes on where this one stopped."""
        session.queue.close()
        self.batcher.leave(session.queue)
        with self._lock.between():
            failed, session.frozen = session.failed, True
            snapshot = session.export()
        self._store_snapshot(session, snapshot)
        outlet = self._outlets.get(session)
        if outlet is None:
            return
        if not failed:
            event = session.settle("RESTARTING", "moving to another replica")
            outlet.announce([event] if event else [])
        self.publisher.flush(0.3)
        try:
            self.store.release(session.lease)
        except WorldError as error:
            log.warning("%s: could not give the lease back: %s", session.id, error, extra={"stream": session.id})
        session.let_go()

    def _announce(self, session: Session, event: dict[str, Any]) -> None:
        if session.state == "RUNNING" and session.connect_s is not None:
            self.telemetry.stage("connect", session.connect_s)
        outlet = self._outlets.get(session)
        if outlet is not None:
            outlet.announce([event])

    def _published(self, session: Session, passage: Passage, now_s: float) -> None:
        seconds = now_s - passage.arrived_s
        session.published(seconds)
        if passage.trace is not None:
            passage.trace.add("publish", passage.handed_s, now_s)
        if isinstance(session, PushedSession):
            return  # counted by model: there are too many of them for names of their own
        if self.sessions.get(session.id) is session:  # else its labels would come back after they were dropped
            self.telemetry.published(session.id, seconds)
        self.telemetry.stage("publish", now_s - passage.handed_s)

    def _submit(self, work: Callable[..., Any], *args: Any) -> None:
        try:
            self._pool.submit(work, *args)
        except RuntimeError:  # the pool is closed: the engine is stopping
            work(*args)

    # ---- models

    def follow_wanted(self) -> None:
        """Begin to load what is wanted and not held, one at a time, and let go of what is not wanted any more.

        Raises StoreDown.
        """
        wanted = wanted_models(self.settings, self.store)
        for name in self.served.keys() - wanted.keys():
            self._release(name)
        if self._loading is not None and self._loading.is_alive():
            return
        faults = self.store.documents(FAULTS)
        for name, model in wanted.items():
            if name not in self.served and name not in faults and self._models is None:
                self._loading = self._thread(f"load-{name}", partial(self._load_wanted, model))
                return

    def _load_wanted(self, model: ModelSettings) -> None:
        try:
            self._hold(model.name, self._load(model))
        except Exception as error:  # noqa: BLE001  one model must not hurt the others
            log.error("model %s cannot be loaded: %s", model.name, error)
            with suppress(WorldError):
                self.store.put_document(FAULTS, model.name, str(error), FAULT_KEPT_S)
        else:
            log.info("%s holds model %s", self.id, model.name)

    def _load(self, model: ModelSettings) -> Model:
        path = find_model(model.name, model.path, [self.settings.models.folder])
        return load_model(path, self.device).for_inference()

    def _hold(self, name: str, model: Model) -> None:
        served = serve(name, model, self.settings.engine.slots, self.settings.engine.object_slots)
        served.warm_up()
        if isinstance(served, ServedRecogniser) and served.model.mode == "window":
            self._lanes[name] = self._lane(served)
            self._threads.append(self._thread(f"clips-{name}", self._lanes[name].run))
        with self._lock.between():
            self.served[name] = served
            self.telemetry.models(self.served)

    def _release(self, name: str) -> None:
        """Let go of a model, unless a stream here still has it."""
        with self._lock.between():
            if any(name in session.analytics for session in list(self.sessions.values())):
                return
            self.served.pop(name, None)
            self.telemetry.models(self.served)
        lane = self._lanes.pop(name, None)
        if lane is not None:
            self._threads = [thread for thread in self._threads if thread.name != f"{self.id}-clips-{name}"]
            lane.close()

    # ---- snapshots

    def save_due(self) -> bool:
        """Save the state that waited longest, if it is due and the byte budget allows; True when one was saved."""
        now_s = time.monotonic()
        if now_s < self._save_after_s:
            return False
        due = [
            session
            for session in list(self.sessions.values())
            if not session.frozen and now_s - session.saved_s >= self.settings.engine.checkpoint_interval_s
        ]
        if not due:
            return False
        return self._save(min(due, key=lambda session: session.saved_s))

    def _save(self, session: Session) -> bool:
        with self._lock.between():
            snapshot = None if session.frozen else session.export()
        return self._store_snapshot(session, snapshot)

    def _store_snapshot(self, session: Session, snapshot: Snapshot | None) -> bool:
        if snapshot is None:
            session.saved_s = time.monotonic()  # nothing new: look again after an interval
            return False
        blob = encode_snapshot(snapshot)
        self._save_after_s = time.monotonic() + len(blob) / self.settings.engine.checkpoint_bytes_per_s
        try:
            self.store.save(session.lease, blob)
        except StaleLease:
            self.telemetry.not_saved("refused")
            self._refused.add(session)
        except WorldError as error:
            self.telemetry.not_saved("unavailable")
            self._store_errors["save"] += 1
            session.saved_s = time.monotonic()
            log.debug("%s: state not saved: %s", session.id, error, extra={"stream": session.id})
        else:
            session.saved(snapshot.frame_number)
            self.telemetry.saved(len(blob))
            return True
        return False

    # ---- threads

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            log.exception("thread %s of %s ended", name, self.id)
            self._died = (name, error)

    def _batch_loop(self) -> None:
        while not self._stopping.is_set():
            self.run_once()

    def _heartbeat_loop(self) -> None:
        every_s = min(HEARTBEAT_S, self.settings.engine.heartbeat_ttl_ms / 4000)
        while not self._silent.is_set():
            self._heartbeat()
            self._silent.wait(every_s)

    def _heartbeat(self) -> None:
        info = ReplicaInfo(
            id=self.id,
            pid=os.getpid(),
            node=socket.gethostname(),
            device=self.device,
            slots_total=self.settings.engine.slots,
            slots_used=len(self.sessions),
            draining=self._draining,
            started_at=self._started_s,
            models=tuple(self.served),
            gmac_per_result={name: served.gmac_per_result for name, served in list(self.served.items())},
        )
        try:
            self.store.heartbeat(info, self.settings.engine.heartbeat_ttl_ms)
        except WorldError:
            self._store_errors["heartbeat"] += 1

    def _control_loop(self) -> None:
        while not self._stopping.is_set():
            self._look.clear()
            try:
                self.follow_wanted()
                self.reconcile()
                self._tidy()
            except WorldError as error:  # streams go on as they are until the store is back
                self._store_errors["reconcile"] += 1
                log.debug("%s cannot read the leases: %s", self.id, error)
            self._look.wait(self.settings.engine.reconcile_s)

    def _keeper_loop(self) -> None:
        told_s = 0.0
        while not self._stopping.wait(0.05):
            while not self._stopping.is_set() and self.save_due():
                pass
            if time.monotonic() - told_s >= METRICS_S:
                told_s = time.monotonic()
                try:
                    self.store.put_metrics(self.id, self.telemetry.text(), 3 * METRICS_S)
                except WorldError:
                    self._store_errors["put_metrics"] += 1

    # ---- what is

    def figures(self) -> EngineFigures:
        """What the replica counts."""
        sessions = list(self.sessions.values())
        return EngineFigures(
            streams=tuple(session.figures() for session in sessions if not isinstance(session, PushedSession)),
            slots_used=len(sessions),
            slots_total=self.settings.engine.slots,
            queued=sum(session.queue.queued for session in sessions),
            requests=dict(self._pending),
            publish_queue=self.publisher.queue_length,
            events_lost=self.publisher.events_lost,
            scores_lost=self.publisher.scores_lost,
            store_errors=dict(self._store_errors),
            models=tuple(self.served),
        )
