"""One stream on one replica: its source, waiting frames, shift state, smoothing and actions."""

from __future__ import annotations

import hashlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines.sources import SourceConfig, SourceCounters, SourceState
from services.frame_queue import FrameQueue, Waiting
from services.schemas import (
    Latency,
    Lease,
    ModelStatus,
    Restored,
    StreamModel,
    StreamSpec,
    StreamState,
    StreamStatus,
    cloud_event,
    score_record,
    state_event,
)
from services.settings import Settings
from services.snapshots import ModelState, Snapshot, SnapshotError, decode_snapshot, sha256
from services.telemetry import StreamFigures
from tsm_core.arena import Arena, Slot, WindowArena
from tsm_core.errors import CallerError, ShapeError
from tsm_core.events import ActionDetector
from tsm_core.model import TSM, WindowTSM
from tsm_core.postprocess import new_smoother
from tsm_core.types import ActionEvent, Frame, Scores

BACKWARD_S = 0.5  # a clock may be set back so far without a new beginning
LATENCY_S = 60.0
COSTS_KEPT = 32
RATE_S = 3.0


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


class Served:
    """A model that this replica holds, with the slots of its streams.

    schema names weights and layout: a state that was saved under another one is never loaded.
    """

    def __init__(self, name: str, model: TSM | WindowTSM, slots: int) -> None:
        self.name = name
        self.model = model
        self.recipe = model.recipe
        self.arena: Arena | WindowArena = model.new_arena(slots)
        self.schema = f"{name}@{model_version(model)}:{model.mode}:{self.arena.elements}"
        self._costs_ms: deque[float] = deque(maxlen=COSTS_KEPT)

    @property
    def frames_per_result(self) -> int:
        """Frames that go through the network for one result."""
        return self.recipe.frames if self.model.mode == "window" else 1

    @property
    def result_cost_ms(self) -> float | None:
        """Compute time of one result, the median of the last ones; None before the first."""
        costs_ms = list(self._costs_ms)
        return round(statistics.median(costs_ms), 3) if costs_ms else None

    def warm_up(self) -> None:
        """Run one frame through, so that the first camera does not wait for lazy set-up."""
        side_px = self.model.input_px
        pixels = self.model.preprocess([torch.zeros(3, side_px, side_px, dtype=torch.uint8)])
        if isinstance(self.arena, WindowArena):
            self.infer(pixels.expand(self.recipe.frames, -1, -1, -1)[None])
            return
        slot = self.arena.allocate()
        self.step(pixels, [slot], [0.0])
        self.arena.free(slot)

    def step(self, pixels: Tensor, slots: Sequence[Slot], times_s: Sequence[float]) -> list[list[float]]:
        """One row of logits per slot, from one frame each."""
        return self._timed(lambda: self.model.step(pixels, self.arena, slots, times_s))  # type: ignore[arg-type]

    def infer(self, clips: Tensor) -> list[list[float]]:
        """One row of logits per clip (N, T, C, H, W), in window mode."""
        with torch.no_grad():
            return self._timed(lambda: self.model(clips))

    def _timed(self, work: Callable[[], Tensor]) -> list[list[float]]:
        # other streams' threads are not this model's cost; several threads of its own can only be timed by the wall
        alone = self.arena.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        began_s = clock()
        rows: list[list[float]] = work().float().tolist()
        self._costs_ms.append(1000 * (clock() - began_s) / len(rows))
        return rows


def model_version(model: nn.Module) -> str:
    """First 12 hex digits of the digest of a model's recipe and weights."""
    digest = hashlib.sha256(str(getattr(model, "recipe", "")).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


class Analytics:
    """What one model knows of one stream: its slot, the smoothed scores, the open action."""

    def __init__(self, served: Served, stream_id: str, options: StreamModel, max_gap_s: float) -> None:
        self.served = served
        self.options = options
        self.max_gap_s = max_gap_s
        self.smoother = new_smoother(served.recipe, options.smoother)
        self.detector = ActionDetector(
            stream_id,
            served.name,
            served.recipe,
            threshold=options.threshold,
            off_threshold=options.off_threshold,
        )
        self.results = 0
        self.skipped = 0
        self.slot = self._allocate()
        self.last_time_s: float | None = None

    def follow(self, frame: Frame) -> list[ActionEvent]:
        """Make ready for a frame: after a gap in time the state begins anew and an open action ends where it was."""
        before_s, self.last_time_s = self.last_time_s, frame.time_s
        if before_s is None or -BACKWARD_S <= frame.time_s - before_s <= self.max_gap_s:
            return []
        self.free()
        self.slot = self._allocate()
        self.smoother.reset()
        return self.detector.close()

    def update(
        self, row: list[float], frame: Frame, warmup: tuple[int, int] | None = None
    ) -> tuple[Scores, list[ActionEvent]]:
        """Smoothed scores and what they tell. warmup: what the slot said when the result became due."""
        self.results += 1
        values = self.smoother.update(row, frame.time_s)
        seen, total = warmup or self.warmup()
        scores = Scores(self.served.recipe.labels, values, seen, total)
        return scores, self.detector.update(scores, frame.number, frame.pts_s, frame.time_s)

    def status(self) -> ModelStatus:
        """What the model does on this stream, and what a result costs."""
        arena = self.served.arena
        window = stride = None
        if isinstance(arena, WindowArena):
            window, stride = self.options.window_s or arena.window_s, self.options.stride_s or arena.stride_s
        return ModelStatus(
            name=self.served.name,
            mode=self.served.model.mode,
            frames_per_result=self.served.frames_per_result,
            window_s=window,
            stride_s=stride,
            results=self.results,
            skipped=self.skipped,
            result_cost_ms=self.served.result_cost_ms,
        )

    def warmup(self) -> tuple[int, int]:
        """(k, L): frames that the shift state has seen, of those that matter."""
        return self.served.model.warmup(self.served.arena, self.slot)  # type: ignore[arg-type]

    def export(self) -> ModelState:
        """All of it, for a snapshot."""
        arena = self.served.arena
        return ModelState(
            name=self.served.name,
            schema=self.served.schema,
            steps=arena.steps(self.slot),
            state=arena.export(self.slot),
            smoother=self.smoother.state(),
            detector=self.detector.state(),
        )

    def restore(self, saved: ModelState, time_s: float) -> None:
        """Go on from a snapshot. Raises SnapshotError when it belongs to other weights or another layout."""
        if saved.schema != self.served.schema:
            raise SnapshotError(f"saved state is of {saved.schema}, this replica serves {self.served.schema}")
        self.served.arena.restore(self.slot, saved.state, saved.steps)
        try:
            self.smoother.restore(dict(saved.smoother))
        except ShapeError as error:  # the stream's smoother was changed
            raise SnapshotError(str(error)) from None
        self.detector.restore(dict(saved.detector))
        self.last_time_s = time_s

    def free(self) -> None:
        """Give the slot back."""
        self.served.arena.free(self.slot)

    def _allocate(self) -> Slot:
        arena = self.served.arena
        if isinstance(arena, WindowArena):
            return arena.allocate(self.options.window_s, self.options.stride_s)
        return arena.allocate()


@dataclass(frozen=True, slots=True)
class Result:
    """What one frame gave: records ready for the wire."""

    scores: list[dict[str, Any]]
    events: list[dict[str, Any]]


class Session:
    """One stream, for as long as this replica owns it.

    Frames and states come from the source's threads through `on_frame` and `on_state`; `follow`, `update`, `export`
    and `free` belong to whoever holds the engine's step lock; the rest may be called from anywhere.
    """

    def __init__(
        self,
        spec: StreamSpec,
        lease: Lease,
        served: Mapping[str, Served],
        settings: Settings,
        *,
        on_ready: Callable[[FrameQueue], None],
        on_change: Callable[[Session, dict[str, Any]], None],
    ) -> None:
        """Allocate the slots. Raises ModelNotLoaded, ArenaFull."""
        self.spec = spec
        self.lease = lease
        self.settings = settings
        self.queue = FrameQueue(max_age_s=settings.engine.max_frame_age_s, max_fps=spec.max_fps)
        self.latest: Frame | None = None
        self.frozen = False
        self.in_flight = 0  # clips whose result is awaited
        self.saved_s = time.monotonic()  # when the state was saved last, or the session began
        self.saved_number = -1
        self.first_number = 0
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
        self._resumed: Snapshot | None = None
        self._top: tuple[str, float] | None = None
        self._warmup: str | None = None
        self._checkpoint_s: float | None = None
        self._latencies: deque[tuple[float, float]] = deque(maxlen=4096)
        self._counts: deque[tuple[float, int, int]] = deque()
        self.analytics: dict[str, Analytics] = {}
        try:
            for options in spec.models or (StreamModel(name=settings.engine.models[0].name),):
                if options.name not in served:
                    raise ModelNotLoaded(
                        f"model {options.name!r} is not loaded here; loaded: {', '.join(sorted(served))}"
                    )
                self.analytics[options.name] = Analytics(
                    served[options.name], spec.id, options, settings.engine.state_max_gap_s
                )
        except Exception:
            self.free()
            raise

    @property
    def id(self) -> str:
        """The stream's id."""
        return self.spec.id

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
        gap_s = now_s - snapshot.time_s
        if self.spec.source.is_file:
            raise SnapshotError("a file begins at its beginning")
        if snapshot.source != source_digest(self.spec):
            raise SnapshotError("saved state is of another source")
        if gap_s > self.settings.engine.state_max_gap_s:
            raise SnapshotError(
                f"saved state is {gap_s:.1f} s old, engine.state_max_gap_s is {self.settings.engine.state_max_gap_s:g}"
            )
        saved = {model.name: model for model in snapshot.models}
        found = [name for name in self.analytics if name in saved]
        if not found:
            raise SnapshotError(f"saved state is of {', '.join(saved) or 'no model'}")
        for name in found:
            self.analytics[name].restore(saved[name], snapshot.time_s)
        self._resumed = snapshot
        self.saved_number = snapshot.frame_number
        self.restored = Restored(
            mode="checkpoint", frame_number=snapshot.frame_number, blob_bytes=len(blob), blob_sha256=sha256(blob)
        )

    def start(self, open_source: OpenSource) -> None:
        """Open the source."""
        self._change("STARTING", self.note)
        self.source = open_source(self._source_config(), self.on_frame, self.on_state, self.first_number)
        self.source.start()

    def _source_config(self) -> SourceConfig:
        source, limits = self.spec.source, self.settings.source
        specs = [analytics.served.recipe.preprocess for analytics in self.analytics.values()]
        needed_px = [spec.resize_px if spec.resize == "short" else spec.input_px for spec in specs]
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
        )

    # ---- from the source

    def on_frame(self, frame: Frame) -> None:
        """A frame has arrived; never blocks."""
        self.latest = frame
        if self.queue.put(frame):
            self._on_ready(self.queue)

    def on_state(self, state: SourceState) -> None:
        """The source's state has changed. A file that is over ends once its last frame went through."""
        if self.frozen:
            return
        self._source_state = state
        if state.state != "ENDED":
            self._change(state.state, state.message)

    # ---- from the batching loop

    def follow(self, name: str, frame: Frame) -> list[dict[str, Any]]:
        """Events of actions that a gap before this frame ended."""
        return [cloud_event(event) for event in self.analytics[name].follow(frame)]

    def update(self, name: str, row: list[float], frame: Frame, warmup: tuple[int, int] | None = None) -> Result:
        """What one model's logits of one frame tell."""
        scores, events = self.analytics[name].update(row, frame, warmup)
        record = score_record(self.id, name, frame.number, frame.pts_s, frame.time_s, scores)
        self._top = (record["label"], record["score"])
        self._warmup = record["warmup"]
        return Result([record], [cloud_event(event) for event in events])

    def clip_skipped(self, name: str) -> None:
        """A clip that was due gave way to a newer one."""
        self.in_flight -= 1
        if name in self.analytics:
            self.analytics[name].skipped += 1

    def done(self, waiting: Waiting) -> None:
        """The frame went through all models."""
        self._last = waiting.frame
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
            models=tuple(analytics.export() for analytics in self.analytics.values()),
        )

    def saved(self, frame_number: int) -> None:
        """The snapshot at this frame is in the store."""
        self.saved_number = frame_number
        self.saved_s = time.monotonic()
        self._checkpoint_s = self.saved_s

    def finish(self) -> list[dict[str, Any]]:
        """End the actions that are open; their events."""
        return [cloud_event(event) for each in self.analytics.values() for event in each.detector.close()]

    def free(self) -> None:
        """Give the slots back."""
        self.frozen = True
        for analytics in self.analytics.values():
            analytics.free()
        self.analytics = {}

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
        cold = top is None or self._warmup is not None
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
