"""Metric names, and one exposition out of many replicas'."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter as Sum
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from services.schemas import StreamState

STAGE_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
LATENCY_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
OTHER = "other"  # the label of all streams beyond the settings' number, and of whatever else is not known by name
STAGES = ("connect", "queue", "preprocess", "infer", "track", "publish")
DROPPED = ("queue", "age", "fps", "closed", "failed", "lost")
RECONNECTS = ("STREAM_DISCONNECTED", "STREAM_STALLED")  # the usual ones are there from the beginning
FAILURES = ("step_failed", "analytics_failed")
RESTORES = ("checkpoint", "cold")
SAVES = ("saved", "refused", "unavailable")
STORE_VERBS = ("announce", "heartbeat", "put_metrics", "reconcile", "save")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WEBSOCKET")
STATES: tuple[str, ...] = get_args(StreamState)


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
    stalls: int = 0
    corrupt: int = 0
    packets_lost: int = 0
    jitter_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What one replica counts."""

    streams: tuple[StreamFigures, ...] = ()
    slots_used: int = 0
    slots_total: int = 0
    queued: int = 0
    requests: Mapping[str, int] = field(default_factory=dict)
    publish_queue: int = 0
    events_lost: int = 0
    scores_lost: int = 0
    store_errors: Mapping[str, int] = field(default_factory=dict)
    models: tuple[str, ...] = ()


class StreamLabels:
    """Which streams have a label of their own: the first `most` of those that are here; the others share one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._own: set[str] = set()

    def keep(self, alive: Collection[str]) -> None:
        """Forget the streams that are gone, and give their places away."""
        self._own.intersection_update(alive)
        for stream_id in alive:
            self.of(stream_id)

    def of(self, stream_id: str) -> str:
        """The label of a stream."""
        if stream_id not in self._own and len(self._own) < self._most:
            self._own.add(stream_id)
        return stream_id if stream_id in self._own else OTHER

    def forget(self, stream_id: str) -> None:
        """Give a stream's place away."""
        self._own.discard(stream_id)


class _Live(Collector):
    """Reads the figures when asked: a stream's labels live exactly as long as its session."""

    def __init__(self, figures: Callable[[], EngineFigures], labels: StreamLabels) -> None:
        self._figures = figures
        self._labels = labels

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._figures()
        self._labels.keep([stream.stream_id for stream in now.streams])
        together: dict[str, list[StreamFigures]] = {}
        for stream in now.streams:
            together.setdefault(self._labels.of(stream.stream_id), []).append(stream)
        frames = CounterMetricFamily("stream_frame_counter", "Frames that went through the model", labels=["stream"])
        received = CounterMetricFamily("stream_frames_received", "Frames decoded", labels=["stream"])
        dropped = CounterMetricFamily("stream_frames_dropped", "Frames not processed", labels=["stream", "reason"])
        reconnects = CounterMetricFamily(
            "stream_reconnects", "Attempts to connect anew", labels=["stream", "error_code"]
        )
        stalls = CounterMetricFamily("stream_stalls", "Times that a camera went silent", labels=["stream"])
        corrupt = CounterMetricFamily(
            "inbound_frames_in_error", "Frames that came damaged and were mended by the decoder", labels=["stream"]
        )
        packets = CounterMetricFamily(
            "rtsp_inbound_rtp_packets_lost", "RTP packets that the decoder missed", labels=["stream"]
        )
        jitter = GaugeMetricFamily(
            "rtsp_inbound_jitter_seconds", "RFC 3550's jitter of arrival, over pictures", labels=["stream"]
        )
        fps = GaugeMetricFamily("stream_fps", "Frames a second that arrive", labels=["stream"])
        state = GaugeMetricFamily("stream_state", "1 for the state the stream is in", labels=["stream", "state"])
        age = GaugeMetricFamily("state_checkpoint_age_seconds", "Since the shift state was saved", labels=["stream"])
        for label, streams in together.items():
            frames.add_metric([label], sum(stream.processed for stream in streams))
            received.add_metric([label], sum(stream.received for stream in streams))
            stalls.add_metric([label], sum(stream.stalls for stream in streams))
            corrupt.add_metric([label], sum(stream.corrupt for stream in streams))
            packets.add_metric([label], sum(stream.packets_lost for stream in streams))
            jitter.add_metric([label], max(stream.jitter_s for stream in streams))
            fps.add_metric([label], sum(stream.fps for stream in streams))
            for reason, count in _summed(DROPPED, (stream.dropped for stream in streams)):
                dropped.add_metric([label, reason], count)
            for code, count in _summed(RECONNECTS, (stream.reconnects for stream in streams)):
                reconnects.add_metric([label, code], count)
            for name in STATES:
                state.add_metric([label, name], sum(name == stream.state for stream in streams))
            ages = [stream.checkpoint_age_s for stream in streams if stream.checkpoint_age_s is not None]
            if ages:
                age.add_metric([label], max(ages))
        pending = GaugeMetricFamily("inference_pending_request_count", "Requests without an answer", labels=["model"])
        for model, count in _summed(now.models, [now.requests]):
            pending.add_metric([model], count)
        running = sum(stream.state == "RUNNING" for stream in now.streams)
        lost = CounterMetricFamily("publish_lost", "Records that did not fit while the store was down", labels=["kind"])
        lost.add_metric(["event"], now.events_lost)
        lost.add_metric(["score"], now.scores_lost)
        length = GaugeMetricFamily("stage_queue_length", "Items that wait before a stage", labels=["stage"])
        length.add_metric(["infer"], now.queued)
        length.add_metric(["publish"], now.publish_queue)
        errors = CounterMetricFamily("store_errors", "Calls of the store that failed", labels=["verb"])
        for verb, count in _summed(STORE_VERBS, [now.store_errors]):
            errors.add_metric([verb], count)
        loaded = GaugeMetricFamily("model_loaded", "1 for a model that the replica holds", labels=["model"])
        for model in now.models:
            loaded.add_metric([model], 1)
        yield from (frames, received, dropped, reconnects, stalls, corrupt, packets, jitter, fps, state, age)
        yield from (pending, lost, length, errors, loaded)
        yield GaugeMetricFamily("num_streams_running", "Streams in state RUNNING", value=running)
        yield GaugeMetricFamily("state_slots_used", "Arena slots in use", value=now.slots_used)
        yield GaugeMetricFamily("state_slots_total", "Arena slots", value=now.slots_total)


def _summed(known: Iterable[str], counts: Iterable[Mapping[str, int]]) -> Iterable[tuple[str, int]]:
    """Counts added up by name; a known name that nobody counted is 0."""
    total = Sum(dict.fromkeys(known, 0))
    for each in counts:
        total.update(each)
    return total.items()


class Telemetry:
    """One replica's metrics, names as the documentation lists them."""

    def __init__(self, figures: Callable[[], EngineFigures], stream_labels: int = 200) -> None:
        """figures: asked at each exposition. stream_labels: most streams with a label of their own."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._streams = StreamLabels(stream_labels)
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
        self._successes = Counter("inference_request_success", "Requests answered", ["model"], registry=registry)
        self._failures = Counter(
            "inference_request_failure",
            "Requests refused or failed, and frames of streams that no result came of",
            ["model", "reason"],
            registry=registry,
        )
        self._requests = Histogram(
            "inference_request_duration_seconds",
            "From a request's arrival at a replica to its answer",
            ["model", "result"],
            registry=registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self._computes = {
            part: Histogram(
                f"inference_{name}_duration_seconds", about, ["model"], registry=registry, buckets=STAGE_BUCKETS_S
            )
            for part, name, about in (
                ("queue", "queue", "A request's wait for its turn"),
                ("input", "compute_input", "A request's decoding and preprocessing"),
                ("infer", "compute_infer", "A request's time in the network"),
                ("output", "compute_output", "A request's smoothing or tracking, and its answer's making"),
            )
        }
        self._saves = Counter("state_checkpoint", "Saves of a shift state", ["result"], registry=registry)
        self._saved = Counter("state_checkpoint_bytes", "Bytes of shift state saved", registry=registry)
        self._restores = Counter("state_restores", "Sessions opened, by first state", ["mode"], registry=registry)
        self._migrations = Counter(
            "stream_migrations", "Streams that came here from another replica", registry=registry
        )
        self._preemptions = Counter(
            "num_preemptions",
            "Sessions that ended here because another replica was given the stream",
            registry=registry,
        )
        for metric, names in (
            (self._stages, STAGES),
            (self._saves, SAVES),
            (self._restores, RESTORES),
        ):
            for name in names:
                metric.labels(name)
        registry.register(_Live(figures, self._streams))
        _describe_process(registry)

    def stage(self, name: str, seconds: float) -> None:
        """Count time spent in a stage."""
        self._stages.labels(name).observe(seconds)

    def step(self, model: str, rows: int) -> None:
        """Count one step of a model."""
        self._batches.observe(rows)
        self._frames.labels(model).inc(rows)
        self._steps.labels(model).inc()

    def failure(self, model: str, reason: str) -> None:
        """Count a frame or a request that no result came of."""
        self._failures.labels(model, reason).inc()

    def request(self, model: str, seconds: float, reason: str | None = None) -> None:
        """Count a request that took so long; reason: why it failed."""
        if reason is None:
            self._successes.labels(model).inc()
        else:
            self.failure(model, reason)
        self._requests.labels(model, "success" if reason is None else "failure").observe(seconds)

    def compute(self, model: str, seconds: Mapping[str, float]) -> None:
        """Count where a request's time went: `queue`, `input`, `infer`, `output`."""
        for part, spent_s in seconds.items():
            self._computes[part].labels(model).observe(spent_s)

    def published(self, stream_id: str, seconds: float) -> None:
        """Count a frame's latency."""
        self._latency.labels(self._streams.of(stream_id)).observe(seconds)

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

    def moved_in(self) -> None:
        """Count a stream that another replica had before."""
        self._migrations.inc()

    def moved_out(self) -> None:
        """Count a session that gave way to another replica's."""
        self._preemptions.inc()

    def models(self, names: Iterable[str]) -> None:
        """Let the counters of these models be there from the beginning."""
        for name in names:
            self._frames.labels(name)
            self._steps.labels(name)
            self._successes.labels(name)
            for reason in FAILURES:
                self._failures.labels(name, reason)
            for result in ("success", "failure"):
                self._requests.labels(name, result)
            for histogram in self._computes.values():
                histogram.labels(name)

    def forget(self, stream_id: str) -> None:
        """Drop the labels of a stream whose session is over."""
        self._streams.forget(stream_id)
        self._latency.remove_by_labels({"stream": stream_id})

    def text(self) -> str:
        """Prometheus text exposition."""
        return generate_latest(self._registry).decode()


class DoorTelemetry:
    """One gateway's metrics: requests by route template, never by path."""

    def __init__(self, gateway_id: str) -> None:
        """gateway_id: the `replica` label of these metrics."""
        self.id = gateway_id
        self._registry = CollectorRegistry(auto_describe=False)
        registry = self._registry
        self._http = Counter(
            "http_requests", "HTTP requests answered", ["method", "route", "status"], registry=registry
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "Until the head of the answer",
            ["route"],
            registry=registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self._grpc = Counter("grpc_requests", "gRPC calls answered", ["method", "code"], registry=registry)
        self._grpc_seconds = Histogram(
            "grpc_request_duration_seconds",
            "Until a call's end",
            ["method"],
            registry=registry,
            buckets=LATENCY_BUCKETS_S,
        )
        _describe_process(registry)

    def http(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count a request; route: the template that it matched, such as `/v1/streams/{stream_id}`; None: none."""
        route = route or OTHER
        self._http.labels(method if method in METHODS else OTHER, route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def grpc(self, method: str | None, code: str, seconds: float) -> None:
        """Count a call; method: full name of one that there is, such as `/tsm.v1.StreamService/GetStream`."""
        method = method or OTHER
        self._grpc.labels(method, code).inc()
        self._grpc_seconds.labels(method).observe(seconds)

    def routes(self, known: Iterable[tuple[str, str]]) -> None:
        """Let the counters of (method, route) be there from the beginning."""
        for method, route in known:
            for status in ("500", "503"):
                self._http.labels(method, route, status)

    def calls(self, known: Iterable[str]) -> None:
        """Let the counters of these gRPC methods be there from the beginning."""
        for method in known:
            for code in ("OK", "INTERNAL", "UNAVAILABLE"):
                self._grpc.labels(method, code)
            self._grpc_seconds.labels(method)

    def text(self) -> str:
        """Prometheus text exposition."""
        return generate_latest(self._registry).decode()


class Registered(Collector):
    """What the registry says, for a scrape: streams by state, and those that no replica serves."""

    def __init__(self, by_state: Mapping[str, int], waiting: int) -> None:
        self._by_state = by_state
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client wants it."""
        streams = GaugeMetricFamily("num_streams", "Streams in the registry", labels=["state"])
        for state in STATES:
            streams.add_metric([state], self._by_state.get(state, 0))
        yield streams
        yield GaugeMetricFamily("num_streams_waiting", "Streams that should be served and are not", value=self._waiting)


@dataclass(frozen=True, slots=True)
class SinkFigures:
    """How far a webhook or a broker is; failing: it does not take what it is told."""

    name: str
    delivered: int = 0
    waiting: int = 0
    lost: int = 0
    dead: int = 0
    failing: bool = False


class Told(Collector):
    """How far the sinks are, for a scrape."""

    def __init__(self, sinks: Sequence[SinkFigures]) -> None:
        self._sinks = sinks

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client wants it."""
        labels = ["sink"]
        delivered = CounterMetricFamily("sink_delivered", "Events that a sink has taken", labels=labels)
        lost = CounterMetricFamily("sink_lost", "Events that were gone before a sink could be told", labels=labels)
        waiting = GaugeMetricFamily("sink_waiting_events", "Events that wait for a sink", labels=labels)
        dead = GaugeMetricFamily("sink_dead_letters", "Events that a sink would not take", labels=labels)
        failing = GaugeMetricFamily("sink_failing", "1 while a sink does not take what it is told", labels=labels)
        for sink in self._sinks:
            delivered.add_metric([sink.name], sink.delivered)
            lost.add_metric([sink.name], sink.lost)
            waiting.add_metric([sink.name], sink.waiting)
            dead.add_metric([sink.name], sink.dead)
            failing.add_metric([sink.name], sink.failing)
        yield from (delivered, lost, waiting, dead, failing)


def _describe_process(registry: CollectorRegistry) -> None:
    """The process's memory and CPU, and what it runs."""
    ProcessCollector(registry=registry)
    about = Gauge("tsm_build_info", "1; its labels say what runs", ["version", "python", "torch"], registry=registry)
    about.labels(_version("tsm-live"), platform.python_version(), _version("torch")).set(1)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge(texts: Mapping[str, str], more: Sequence[Collector] = ()) -> str:
    """One valid exposition out of {replica: exposition}: each family once, every sample labelled with its replica.

    more: collectors of what belongs to no replica.
    """
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
    rest = (family for collector in more for family in collector.collect())
    return generate_latest(_Merged([*families.values(), *rest])).decode()
