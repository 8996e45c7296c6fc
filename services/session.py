"""One stream on one replica: its source, its waiting frames, and what each model knows of it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipelines.sources import SourceConfig, SourceCounters, SourceState
from services.analytics import Analytics, Look, Record, Result, View
from services.detection import ObjectDetection
from services.frame_queue import FrameQueue, Waiting
from services.recognition import ObjectRecognition, Recognition
from services.schemas import Latency, Lease, Restored, StreamSpec, StreamState, StreamStatus, state_event
from services.served import Served, ServedDetector
from services.settings import Settings
from services.snapshots import Snapshot, SnapshotError, decode_snapshot, sha256
from services.stream_models import StreamModel
from services.telemetry import StreamFigures
from services.tracing import frame_trace
from tsm_core.errors import CallerError
from tsm_core.frame import Frame

LATENCY_S = 60.0
BLIND_S = 2.0
RATE_S = 3.0
TRACKS_PER_EPOCH = 1_000_000  # an object a second for eleven days


class ModelNotLoaded(CallerError):
    """The stream names a model that this replica does not hold."""

    reason = "model_not_loaded"


class SourceLike(Protocol):
    """What a session needs of a source of frames."""

    counters: SourceCounters

    def start(self) -> None:
        """Begin; returns at once."""

    def stop(self, timeout_s: float = 3.0) -> bool:
        """End; True when all of it is gone within timeout_s."""


OpenSource = Callable[[SourceConfig, Callable[[Frame], None], Callable[[SourceState], None], int], SourceLike]


class Session:
    """One stream, for as long as this replica owns it.

    Frames and states come from the source's threads through `on_frame` and `on_state`; `follow`, `update`, `export`
    and `free` belong to whoever holds the engine's step lock; the rest may be called from anywhere.
    """

    def __init__(
        self,
        spec: StreamSpec,
        lease: Lease,
        served: Mapping[str, Served[Any]],
        settings: Settings,
        *,
        on_ready: Callable[[FrameQueue], None],
        on_change: Callable[[Session, dict[str, Any]], None],
        first_track: int = 0,
    ) -> None:
        """Allocate the slots; first_track: next_track of the session before. Raises ModelNotLoaded, ArenaFull."""
        models = spec.models or (StreamModel(name=settings.engine.models[0].name),)
        self.spec = spec
        self.lease = lease
        self.settings = settings
        self.queue = FrameQueue(max_age_s=settings.engine.max_frame_age_s, max_fps=spec.max_fps)
        self.latest: Frame | None = None
        self.frozen = False
        self.paused = False
        self.in_flight = 0  # clips whose result is awaited
        self.saved_s = time.monotonic()  # when the state was saved last, or the session began
        self.saved_number = -1
        self.first_number = 0
        # a session that died may have given ids that nobody saved: each epoch has numbers of its own
        self._first_track = max(first_track, (lease.epoch - 1) * TRACKS_PER_EPOCH)
        self.restored = Restored(mode="cold")
        self.note = ""
        self.source: SourceLike | None = None
        self._on_ready = on_ready
        self._on_change = on_change
        self._lock = threading.Lock()
        self._state: StreamState | None = None
        self._before: StreamState | None = None
        self._source_state = SourceState("STARTING")
        self._since_s = time.time()
        self._reconnects_before = 0
        self._lost_before = 0
        self._last: Frame | None = None  # newest frame that went through the models
        self._detects = any(served[options.name].task == "detection" for options in models if options.name in served)
        self._waiting_s: float | None = None  # since when a frame waits that none has gone through after
        self._found: list[Record] = []  # on the frame that goes through the models now
        self._looked: tuple[Frame, Sequence[Record]] | None = None  # the newest one that went through, and its finds
        self._top: tuple[str, float] | None = None
        self._warmup: str | None = None
        self._checkpoint_s: float | None = None
        self._latencies: deque[tuple[float, float]] = deque(maxlen=4096)
        self._counts: deque[tuple[float, int, int]] = deque()
        self.analytics: dict[str, Analytics[Any]] = {}
        try:
            self._open_analytics(models, served)
        except Exception:
            self.free()
            raise

    def _open_analytics(self, models: Sequence[StreamModel], served: Mapping[str, Served[Any]]) -> None:
        """What each model will know of the stream; detectors first, for others look at what they find."""
        for options in models:
            if options.name not in served:
                raise ModelNotLoaded(f"model {options.name!r} is not loaded here; loaded: {', '.join(sorted(served))}")
        max_gap_s = self.settings.engine.state_max_gap_s
        for options in sorted(models, key=lambda options: served[options.name].task != "detection"):
            model = served[options.name]
            analytics: Analytics[Any]
            if isinstance(model, ServedDetector):
                others = any(isinstance(each, ObjectDetection) for each in self.analytics.values())
                ids = f"{self.id}/{options.name}" if others else self.id
                analytics = ObjectDetection(model, self.id, options, max_gap_s, ids, self._first_track)
            elif options.of_objects is None:
                analytics = Recognition(model, self.id, options, max_gap_s)
            else:
                analytics = ObjectRecognition(
                    model, self.id, options, max_gap_s, self._detection(options.of_objects.objects_of)
                )
            self.analytics[options.name] = analytics

    def _detection(self, name: str) -> ObjectDetection:
        found = self.analytics.get(name)
        if not isinstance(found, ObjectDetection):
            raise ModelNotLoaded(f"{name!r} is no detector of this stream, so it has no objects to look at")
        return found

    @property
    def id(self) -> str:
        """The stream's id."""
        return self.spec.id

    @property
    def next_track(self) -> int:
        """The number below which this session and those before it gave ids to tracks; ask before `free`."""
        detections = (each for each in self.analytics.values() if isinstance(each, ObjectDetection))
        return max((each.objects.next_number for each in detections), default=self._first_track)

    # ---- beginning

    def resume(self, blob: bytes | None, before: StreamStatus | None, now_s: float | None = None) -> None:
        """Go on where an earlier owner stopped: state from the blob if it fits, counters from blob or status."""
        if before is not None:
            self._before = before.state
            self._reconnects_before = before.reconnects
            self._lost_before = before.dropped.get("lost", 0)
        snapshot = None
        try:
            snapshot = decode_snapshot(blob) if blob else None
            if snapshot is not None and blob is not None:
                self._restore(snapshot, blob, time.time() if now_s is None else now_s)
        except SnapshotError as error:
            self.note = f"cold start: {error}"
        received, processed, dropped = 0, 0, dict[str, int]()
        if snapshot is not None:
            received, processed, dropped = snapshot.received, snapshot.processed, dict(snapshot.dropped)
            self.first_number = snapshot.frame_number + 1
        if before is not None and before.received >= received:
            received, processed, dropped = before.received, before.processed, before.dropped
        self.queue.resume(received, processed, dropped)
        self.first_number = max(self.first_number, received)

    def _restore(self, snapshot: Snapshot, blob: bytes, now_s: float) -> None:
        gap_s = self._age_s(snapshot, now_s)
        if self.spec.source.is_file:
            raise SnapshotError("a file begins at its beginning")
        if snapshot.source != source_digest(self.spec):
            raise SnapshotError("saved state is of another source")
        if gap_s > self.settings.engine.state_max_gap_s:
            raise SnapshotError(
                f"saved state is {gap_s:.1f} s old, engine.state_max_gap_s is {self.settings.engine.state_max_gap_s:g}"
            )
        saved = {name: [state for state in snapshot.models if state.name == name] for name in self.analytics}
        found = [name for name, states in saved.items() if states]
        if not found:
            names = dict.fromkeys(state.name for state in snapshot.models)
            raise SnapshotError(f"saved state is of {', '.join(names) or 'no model'}")
        refused: list[SnapshotError] = []
        for name in found:  # a model that has changed begins anew, the others go on
            try:
                self.analytics[name].restore(saved[name], snapshot.time_s)
            except SnapshotError as error:
                refused.append(error)
        if len(refused) == len(found):
            raise refused[0]
        self.saved_number = snapshot.frame_number
        self.restored = Restored(
            mode="checkpoint", frame_number=snapshot.frame_number, blob_bytes=len(blob), blob_sha256=sha256(blob)
        )

    def _age_s(self, snapshot: Snapshot, now_s: float) -> float:
        return now_s - snapshot.time_s

    def start(self, open_source: OpenSource) -> None:
        """Open the source."""
        self._change("STARTING", self.note)
        self.source = open_source(self._source_config(), self.on_frame, self.on_state, self.first_number)
        self.source.start()

    def pause(self) -> None:
        """Take no more frames; what the models know stays. `rest` closes the source."""
        self.paused = True
        before = self._source_state
        self._source_state = SourceState("STARTING", source_size=before.source_size)
        self._change("PAUSED", "")

    def rest(self) -> None:
        """The slow part of pausing: close the source and keep what it counted."""
        source = self.source
        if source is None:
            return
        source.stop(3.0)
        self._reconnects_before += sum(source.counters.reconnects.values())
        if self.spec.source.rtsp_transport == "udp":
            self._lost_before += source.counters.lost
        self.source = None

    def go_on(self, open_source: OpenSource) -> None:
        """Open the source of a paused stream again; frame numbers go on."""
        self.paused = False
        if self.latest is not None:
            self.first_number = self.latest.number + 1
        self.start(open_source)

    def _source_config(self) -> SourceConfig:
        source, limits = self.spec.source, self.settings.source
        needed_px = [analytics.served.needed_px for analytics in self.analytics.values()]
        return SourceConfig(
            stream_id=self.id,
            uri=source.uri,
            username=source.username,
            password=source.password.get_secret_value() if source.password else None,
            rtsp_transport=source.rtsp_transport,
            decoder=source.decoder,
            min_side_px=max(limits.min_side_px, *needed_px),
            loop=source.loop,
            realtime=True,
            stall_s=limits.stall_s,
            open_deadline_s=limits.open_deadline_s,
            retry_first_s=limits.retry_first_s,
            retry_cap_s=limits.retry_cap_s,
            retry_config_s=limits.retry_config_s,
            healthy_s=limits.healthy_s,
            networks=limits.networks,
            max_pixels=self.settings.limits.pixels,
            memory_bytes=self.settings.limits.memory_bytes,
        )

    # ---- from the source

    def on_frame(self, frame: Frame) -> None:
        """A frame has arrived; never blocks."""
        if self.paused:
            return
        self.latest = frame
        if self._waiting_s is None:
            self._waiting_s = time.monotonic()
        if self.queue.put(
            frame, frame_trace(self.id, frame.number, None if self.spec.source.is_file else frame.time_s)
        ):
            self._on_ready(self.queue)

    def on_state(self, state: SourceState) -> None:
        """The source's state has changed. A file that is over ends once its last frame went through."""
        if self.frozen or self.paused:
            return
        self._source_state = state
        if state.state != "ENDED":
            self._change(state.state, state.message)

    # ---- from the batching loop

    def follow(self, name: str, frame: Frame) -> Look:
        """What of this frame goes through one model, and the events of what ended before it."""
        return self.analytics[name].follow(frame)

    def update(self, name: str, view: View, output: Any, frame: Frame, warmup: tuple[int, int] | None = None) -> Result:
        """What one model's output for one view of a frame tells."""
        result = self.analytics[name].update(view, output, frame, warmup)
        for record in result.scores:
            if "objects" in record or "track_id" in record:
                self._found.append(record)
            else:
                self._top = (record["label"], record["score"])
                self._warmup = record["warmup"]
        return result

    def clip_skipped(self, name: str) -> None:
        """A clip that was due gave way to a newer one."""
        self.in_flight -= 1
        if name in self.analytics:
            self.analytics[name].skipped += 1

    def done(self, waiting: Waiting) -> None:
        """The frame went through all models."""
        self._last = waiting.frame
        self._looked = (waiting.frame, tuple(self._found))
        self._found = []
        self._waiting_s = None
        self.queue.done()

    def fail(self, code: str, message: str) -> None:
        """Give the stream up: drop what waits, say why."""
        with self._lock:
            if self._state == "FAILED" and self.frozen:
                return
            self.frozen = True
        self.queue.close()
        self._source_state = SourceState("FAILED", code, message)
        self._change("FAILED", message, final=True)

    @property
    def failed(self) -> bool:
        """True when the session itself failed (a source that fails tries again)."""
        return self.frozen and self._state == "FAILED"

    def picture(self) -> tuple[Frame, Sequence[Record]] | None:
        """The newest frame to show, and what was found on it; None when there is none.

        Where objects are looked for, it is the newest whose objects are known. When no frame goes through the models
        for a while the picture goes on without.
        """
        latest, waiting_s = self.latest, self._waiting_s
        blind = waiting_s is not None and time.monotonic() - waiting_s > BLIND_S
        if latest is None or blind or not self._detects:
            return None if latest is None else (latest, ())
        return self._looked

    # ---- state that travels

    def export(self) -> Snapshot | None:
        """A snapshot of the newest processed frame; None when nothing happened since the last one."""
        frame = self._last
        if frame is None or frame.number == self.saved_number or self.failed:
            return None
        received, processed, dropped, _ = self.queue.counts()
        return Snapshot(
            stream_id=self.id,
            epoch=self.lease.epoch,
            source=source_digest(self.spec),
            frame_number=frame.number,
            time_s=frame.time_s,
            pts_s=frame.pts_s,
            received=received,
            processed=processed,
            dropped=dropped,
            models=tuple(state for analytics in self.analytics.values() for state in analytics.export()),
            memory=self._memory(),
        )

    def _memory(self) -> dict[str, Any]:
        """What a snapshot keeps beside the models' states, JSON values."""
        return {}

    def saved(self, frame_number: int) -> None:
        """The snapshot at this frame is in the store."""
        self.saved_number = frame_number
        self.saved_s = time.monotonic()
        self._checkpoint_s = self.saved_s

    def finish(self) -> list[dict[str, Any]]:
        """End what is open; its events."""
        return [event for analytics in self.analytics.values() for event in analytics.close()]

    def free(self) -> None:
        """Give the slots back."""
        self.frozen = True
        for analytics in self.analytics.values():
            analytics.free()
        self.analytics = {}

    def let_go(self) -> None:
        """Tell those who wait for a result that the stream goes on elsewhere."""

    def stop_source(self, timeout_s: float = 3.0) -> bool:
        """Close the camera; True when its child and threads are gone."""
        return self.source is None or self.source.stop(timeout_s)

    # ---- what is

    def settle(self, state: StreamState, message: str = "") -> dict[str, Any] | None:
        """Take on a state that is the session's last; its event, to be published by the caller."""
        return self._move(state, message, final=True)

    def published(self, seconds: float) -> None:
        """A result was published so long after its frame arrived."""
        with self._lock:
            self._latencies.append((time.monotonic(), seconds))

    @property
    def ended(self) -> bool:
        """True when a file is over, its last frame was processed and nobody was told yet."""
        over = self._source_state.state == "ENDED" and self._state != "ENDED"
        return over and not self.queue.waiting and not self.in_flight

    @property
    def connect_s(self) -> float | None:
        """How long the source took to its first picture; None while it has none."""
        return self._source_state.connect_s

    @property
    def state(self) -> StreamState:
        """The stream's state."""
        return self._state or "STARTING"

    @property
    def checkpoint_age_s(self) -> float | None:
        """Seconds since the shift state was saved; None before the first time."""
        return None if self._checkpoint_s is None else time.monotonic() - self._checkpoint_s

    def status(self) -> StreamStatus:
        """What is, for the store."""
        received, processed, dropped, _ = self.queue.counts()
        counters = self.source.counters if self.source is not None else SourceCounters()
        # over TCP nothing gets lost on the way: a gap in the pts is a camera that sent less
        lost = self._lost_before + (counters.lost if self.spec.source.rtsp_transport == "udp" else 0)
        if lost:
            dropped["lost"] = lost
        fps, processed_fps = self._rates(received, processed)
        source, top, latest, age_s = self._source_state, self._top, self.latest, self.checkpoint_age_s
        cold = self._looked is None or self._warmup is not None
        return StreamStatus(
            state=self.state,
            status_message="; ".join(filter(None, (source.message, self.note if cold else ""))),
            error_code=source.error_code,
            since=self._since_s,
            worker=self.lease.owner,
            epoch=self.lease.epoch,
            fps=fps,
            processed_fps=processed_fps,
            received=received,
            processed=processed,
            dropped=dropped,
            latency_ms=self._latency(),
            reconnects=self._reconnects_before + sum(counters.reconnects.values()),
            retry_at=source.retry_at,
            last_frame_time=latest.time_s if latest else None,
            clock="file" if self.spec.source.is_file else "local",
            source_size=source.source_size,
            label=top[0] if top else None,
            score=top[1] if top else None,
            warmup=self._warmup,
            checkpoint_age_s=round(age_s, 2) if age_s is not None else None,
            restored=self.restored,
            models=tuple(analytics.status() for analytics in list(self.analytics.values())),
            updated_at=time.time(),
        )

    def figures(self) -> StreamFigures:
        """What is, for the metrics."""
        status = self.status()
        counters = self.source.counters if self.source is not None else SourceCounters()
        return StreamFigures(
            stream_id=self.id,
            state=status.state,
            fps=status.fps,
            received=status.received,
            processed=status.processed,
            dropped=status.dropped,
            reconnects=dict(counters.reconnects),
            checkpoint_age_s=status.checkpoint_age_s,
            stalls=counters.stalls,
            corrupt=counters.corrupt,
            packets_lost=counters.packets_lost,
            jitter_s=counters.jitter_s,
        )

    def _change(self, state: StreamState, message: str, final: bool = False) -> None:
        event = self._move(state, message, final)
        if event is not None:
            self._on_change(self, event)

    def _move(self, state: StreamState, message: str, final: bool) -> dict[str, Any] | None:
        now_s = time.time()
        with self._lock:
            if self.frozen and not final:
                return None
            before = self._state if self._state is not None else self._before
            if state == self._state:
                return None
            self._state = state
            self._since_s = now_s
        return state_event(self.id, before, state, message, now_s)

    def _rates(self, received: int, processed: int) -> tuple[float, float]:
        now_s = time.monotonic()
        with self._lock:
            self._counts.append((now_s, received, processed))
            while now_s - self._counts[0][0] > RATE_S:
                self._counts.popleft()
            then_s, received_then, processed_then = self._counts[0]
        span_s = now_s - then_s
        if span_s < 0.2:
            return 0.0, 0.0
        return round((received - received_then) / span_s, 2), round((processed - processed_then) / span_s, 2)

    def _latency(self) -> Latency | None:
        old_s = time.monotonic() - LATENCY_S
        with self._lock:
            while self._latencies and self._latencies[0][0] < old_s:
                self._latencies.popleft()
            values = sorted(seconds for _, seconds in self._latencies)
        if not values:
            return None
        p50, p95, p99 = (round(1000 * values[int(share * (len(values) - 1))], 2) for share in (0.5, 0.95, 0.99))
        return Latency(p50=p50, p95=p95, p99=p99)


def source_digest(spec: StreamSpec) -> str:
    """Tells one source from another without its address: a state that one camera left does not fit another."""
    return hashlib.sha256(spec.source.uri.encode()).hexdigest()[:12]
