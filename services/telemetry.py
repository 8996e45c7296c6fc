"""Metric names, and one exposition out of many replicas'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

STAGE_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LATENCY_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
STATES = ("STARTING", "RUNNING", "RESTARTING", "STOPPING", "STOPPED", "FAILED", "ENDED")


@dataclass(frozen=True, slots=True)
class StreamFigures:
    """What one session counts."""

    stream_id: str
    state: str
    fps: float
    received: int
    processed: int
    dropped: Mapping[str, int]
    reconnects: Mapping[str, int]
    checkpoint_age_s: float | None


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What one replica counts."""

    streams: tuple[StreamFigures, ...] = ()
    slots_used: int = 0
    slots_total: int = 0
    queued: int = 0
    publish_queue: int = 0
    events_lost: int = 0
    scores_lost: int = 0
    store_errors: Mapping[str, int] = field(default_factory=dict)


class _Live(Collector):
    """Reads the figures when asked: a stream's labels live exactly as long as its session."""

    def __init__(self, figures: Callable[[], EngineFigures]) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._figures()
        frames = CounterMetricFamily("stream_frame_counter", "Frames that went through the model", labels=["stream"])
        received = CounterMetricFamily("stream_frames_received", "Frames decoded", labels=["stream"])
        dropped = CounterMetricFamily("stream_frames_dropped", "Frames not processed", labels=["stream", "reason"])
        reconnects = CounterMetricFamily(
            "stream_reconnects", "Attempts to connect anew", labels=["stream", "error_code"]
        )
        fps = GaugeMetricFamily("stream_fps", "Frames a second that arrive", labels=["stream"])
        state = GaugeMetricFamily("stream_state", "1 for the state the stream is in", labels=["stream", "state"])
        age = GaugeMetricFamily("state_checkpoint_age_seconds", "Since the shift state was saved", labels=["stream"])
        for stream in now.streams:
            frames.add_metric([stream.stream_id], stream.processed)
            received.add_metric([stream.stream_id], stream.received)
            fps.add_metric([stream.stream_id], stream.fps)
            for reason, count in stream.dropped.items():
                dropped.add_metric([stream.stream_id, reason], count)
            for code, count in stream.reconnects.items():
                reconnects.add_metric([stream.stream_id, code], count)
            for name in STATES:
                state.add_metric([stream.stream_id, name], float(name == stream.state))
            if stream.checkpoint_age_s is not None:
                age.add_metric([stream.stream_id], stream.checkpoint_age_s)
        running = sum(stream.state == "RUNNING" for stream in now.streams)
        lost = CounterMetricFamily("publish_lost", "Records that did not fit while the store was down", labels=["kind"])
        lost.add_metric(["event"], now.events_lost)
        lost.add_metric(["score"], now.scores_lost)
        length = GaugeMetricFamily("stage_queue_length", "Items that wait before a stage", labels=["stage"])
        length.add_metric(["infer"], now.queued)
        length.add_metric(["publish"], now.publish_queue)
        errors = CounterMetricFamily("store_errors", "Calls of the store that failed", labels=["verb"])
        for verb, count in now.store_errors.items():
            errors.add_metric([verb], count)
        yield from (frames, received, dropped, reconnects, fps, state, age, lost, length, errors)
        yield GaugeMetricFamily("num_streams_running", "Streams in state RUNNING", value=running)
        yield GaugeMetricFamily("state_slots_used", "Arena slots in use", value=now.slots_used)
        yield GaugeMetricFamily("state_slots_total", "Arena slots", value=now.slots_total)


class Telemetry:
    """One replica's metrics, names as the documentation lists them."""

    def __init__(self, figures: Callable[[], EngineFigures]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        registry = self._registry
        self._stages = Histogram(
            "stage_duration_seconds", "Time in one stage", ["stage"], registry=registry, buckets=STAGE_BUCKETS_S
        )
        self._latency = Histogram(
            "stream_latency_seconds",
            "From a frame's arrival to the publication of its result",
            ["stream"],
            registry=registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self._batches = Histogram("batch_size", "Frames in one step", registry=registry, buckets=BATCH_BUCKETS)
        self._frames = Counter("inference_count", "Frames stepped", ["model"], registry=registry)
        self._steps = Counter("inference_exec_count", "Steps run", ["model"], registry=registry)
        self._failures = Counter("inference_request_failure", "Frames failed", ["reason"], registry=registry)
        self._saves = Counter("state_checkpoint", "Saves of a shift state", ["result"], registry=registry)
        self._saved = Counter("state_checkpoint_bytes", "Bytes of shift state saved", registry=registry)
        self._restores = Counter("state_restores", "Sessions opened, by first state", ["mode"], registry=registry)
        registry.register(_Live(figures))

    def stage(self, name: str, seconds: float) -> None:
        """Count time spent in a stage."""
        self._stages.labels(name).observe(seconds)

    def step(self, model: str, rows: int) -> None:
        """Count one step of a model."""
        self._batches.observe(rows)
        self._frames.labels(model).inc(rows)
        self._steps.labels(model).inc()

    def failure(self, reason: str) -> None:
        """Count a frame that no result came of."""
        self._failures.labels(reason).inc()

    def published(self, stream_id: str, seconds: float) -> None:
        """Count a frame's latency."""
        self._latency.labels(stream_id).observe(seconds)

    def saved(self, nbytes: int) -> None:
        """Count a save of a shift state."""
        self._saves.labels("saved").inc()
        self._saved.inc(nbytes)

    def not_saved(self, why: str) -> None:
        """Count a save that failed: `refused` (stale lease) or `unavailable`."""
        self._saves.labels(why).inc()

    def restored(self, mode: str) -> None:
        """Count a session's beginning: `checkpoint` or `cold`."""
        self._restores.labels(mode).inc()

    def forget(self, stream_id: str) -> None:
        """Drop the labels of a stream whose session is over."""
        self._latency.remove_by_labels({"stream": stream_id})

    def text(self) -> str:
        """Prometheus text exposition."""
        return generate_latest(self._registry).decode()


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge(texts: Mapping[str, str]) -> str:
    """One valid exposition out of {replica: exposition}: each family once, every sample labelled with its replica."""
    families: dict[tuple[str, str], Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue
            merged = families.setdefault(
                (family.name, family.type), Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                merged.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    return generate_latest(_Merged(families.values())).decode()
