"""The demo: simulated cameras, the real service, live events, and a score against the cameras' own script and boxes."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

from pipelines.box_data import Objects
from pipelines.box_metrics import Found
from pipelines.box_scoring import CocoPrecision, Judged
from pipelines.camera import SessionInfo, frame_number
from pipelines.scene_boxes import objects_of
from pipelines.scenes import KINDS, Scene
from pipelines.simulator import SimulatorClient, start_simulator
from services.remote import read_token
from services.settings import ModelSettings, Settings, StoreSettings
from services.store import StateStore, open_store
from tsm_core.errors import WorldError
from tsm_core.zoo import available_models

CAMERAS = 4
FPS = 15.0
DETECTOR = "scenes_detector"  # runs beside the default model where its weights are at hand
READY_S = 60.0  # longest wait for all cameras to run
QUIET_S = 1.5  # counters that stand still for so long have counted everything

LEAST_INTERVAL_S = 2.0  # shorter intervals of the script are not judged
SETTLE_S = 1.0  # nor is the first second after a change


@dataclass(frozen=True, slots=True)
class CameraTruth:
    """What one simulated camera says it showed.

    script: intervals {label, start_frame, end_frame} with end exclusive. sent: frame number → Unix time at which it was
    sent; frames_sent counts every transmission to the service, repeats in a second session included. boxes: what is on
    each frame, labels counting in KINDS.
    """

    stream_id: str
    fps: float
    script: Sequence[Mapping[str, Any]]
    sent: Mapping[int, float]
    frames_sent: int
    boxes: Sequence[Objects] = ()


@dataclass(frozen=True, slots=True)
class CameraResult:
    """What the service said of it: score records and events as published (with `camera_frame`), and its counters."""

    scores: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    processed: int
    dropped: Mapping[str, int]


def percentiles(values: Sequence[float], points: Iterable[int] = (50, 95, 99)) -> dict[str, float | None]:
    """Nearest-rank percentiles, {"p50": ...}; None where there are no values."""
    ordered = sorted(values)
    return {
        f"p{point}": round(ordered[min(len(ordered) - 1, int(len(ordered) * point / 100))], 1) if ordered else None
        for point in points
    }


def judged_intervals(truth: CameraTruth, result: CameraResult) -> list[tuple[str, str | None]]:
    """(true label, most frequent reported label) of every interval that the service saw to its end.

    Counted from one second after the interval's start; None where nothing was reported in it.
    """
    scores = [record for record in result.scores if "label" in record and "track_id" not in record]
    seen = [record["camera_frame"] for record in scores]
    if not seen:
        return []
    first, last = min(seen), max(seen)
    votes: dict[int, Counter[str]] = defaultdict(Counter)
    settle = round(SETTLE_S * truth.fps)
    spans = [
        (index, span)
        for index, span in enumerate(truth.script)
        if span["end_frame"] - span["start_frame"] >= LEAST_INTERVAL_S * truth.fps
        and span["start_frame"] >= first
        and span["end_frame"] - 1 <= last
    ]
    for record in scores:
        for index, span in spans:
            if span["start_frame"] + settle <= record["camera_frame"] < span["end_frame"]:
                votes[index][record["label"]] += 1
    return [(span["label"], votes[index].most_common(1)[0][0] if votes[index] else None) for index, span in spans]


def false_actions(truth: CameraTruth, result: CameraResult) -> tuple[int, int]:
    """(actions reported, actions that overlap no interval of their label)."""
    spans: dict[str, tuple[str, int, int]] = {}
    for event in result.events:
        if ".action." not in event["type"]:
            continue
        data = event["data"]
        start = round(event["camera_frame"] - (data["pts_s"] - data["start_pts_s"]) * truth.fps)
        spans[event["subject"]] = (data["label"], start, event["camera_frame"])
    wrong = sum(
        not any(
            span["label"] == label and start < span["end_frame"] and end >= span["start_frame"] for span in truth.script
        )
        for label, start, end in spans.values()
    )
    return len(spans), wrong


def judged_boxes(truth: CameraTruth, result: CameraResult) -> Judged:
    """What was on every frame that the detector told of, and what it told."""
    frames = {
        record["camera_frame"]: record["objects"]
        for record in result.scores
        if "objects" in record and record["camera_frame"] < len(truth.boxes)
    }
    found = [
        Found(
            np.array([one["box"] for one in objects], np.float32).reshape(-1, 4),
            np.array([one["score"] for one in objects], np.float32),
            np.array([KINDS.index(one["label"]) for one in objects], np.int64),
        )
        for objects in frames.values()
    ]
    return Judged(truth.stream_id, [truth.boxes[number] for number in frames], found)


def demo_score(pairs: Sequence[tuple[CameraTruth, CameraResult]], replicas: int) -> dict[str, Any]:
    """The demo's last line: counts, accuracy, latency from the camera's send to the publication of the result."""
    judged = [pair for truth, result in pairs for pair in judged_intervals(truth, result)]
    actions = [false_actions(truth, result) for truth, result in pairs]
    latencies = [
        (record["published_s"] - truth.sent[record["camera_frame"]]) * 1000
        for truth, result in pairs
        for record in (*result.scores, *result.events)
        if record["camera_frame"] in truth.sent
    ]
    dropped: Counter[str] = Counter()
    for _, result in pairs:
        dropped.update(result.dropped)
    boxes = CocoPrecision(KINDS)
    for truth, result in pairs:
        boxes.add(judged_boxes(truth, result))
    ap50 = boxes.figures()["ap50"]
    sent = sum(truth.frames_sent for truth, _ in pairs)
    processed = sum(result.processed for _, result in pairs)
    return {
        "streams": len(pairs),
        "replicas": replicas,
        "sent": sent,
        "frames": processed,
        "dropped": dict(sorted(dropped.items())),
        "unaccounted": sent - processed - sum(dropped.values()),
        "events": sum(len(result.events) for _, result in pairs),
        "actions": sum(count for count, _ in actions),
        "false_events": sum(wrong for _, wrong in actions),
        "intervals": len(judged),
        "label_accuracy": round(sum(a == b for a, b in judged) / len(judged), 4) if judged else None,
        "detection_ap50": None if math.isnan(ap50) else round(ap50, 4),
        "latency_ms": percentiles(latencies),
    }


class Collector:
    """Reads every score and event of some streams as they are published, from a thread of its own."""

    def __init__(self, store: StateStore, streams: Sequence[str], on_event: Callable[[dict[str, Any]], None]) -> None:
        self.scores: dict[str, list[dict[str, Any]]] = {stream: [] for stream in streams}
        self.events: dict[str, list[dict[str, Any]]] = {stream: [] for stream in streams}
        self._store = store
        self._on_event = on_event
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="demo-collector", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read what is there and end."""
        self._over.set()
        self._thread.join(5)

    def _follow(self) -> None:
        cursors: dict[Any, str | int] = {(kind, stream): 0 for stream in self.scores for kind in ("event", "score")}
        while True:
            last = self._over.is_set()
            for kind, stream, position, record in self._store.tail(cursors, 0.2):
                cursors[kind, stream] = position
                if kind == "score":
                    self.scores[stream].append(record)
                else:
                    self.events[stream].append(record)
                    self._on_event(record)
            if last:
                return


def camera_frame(pts_s: float, time_s: float, sessions: Sequence[SessionInfo]) -> int:
    """The camera's number of a frame that arrived at `time_s`.

    libavformat gives the first picture of a session no time of its own: it counts as the session's first frame.
    """
    if pts_s > 0:
        return frame_number(pts_s, FPS)
    begun = [session for session in sessions if session.started_unix_s <= time_s and session.first_frame is not None]
    return begun[-1].first_frame or 0 if begun else 0


def describe(event: Mapping[str, Any]) -> str:
    """One line of an event for people."""
    data = event["data"]
    clock = time.strftime("%H:%M:%S", time.localtime(event["published_s"]))
    if event["type"].endswith("stream.state"):
        message = f"  {data['status_message']}" if data["status_message"] else ""
        return f"{clock}  {data['stream_id']:<10} {data['before'] or '-'} -> {data['after']}{message}"
    length = (data["end_time"] or data["frame_time"]) - data["start_time"]
    what = f"{data['label']} #{data['track_id'].rpartition(':')[2]}" if "track_id" in data else data["label"]
    return f"{clock}  {data['stream_id']:<10} {data['type']:<7}{what:<18} {data['score']:.2f}  {length:5.1f} s"


def run(settings: Settings, seconds: float | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Play simulated cameras to the real service and score it; until Ctrl-C when `seconds` is None.

    Prints the page's address and every event as it arrives; returns the score. Raises WorldError when a camera's
    stream does not come up.
    """
    from services.app import run_service  # ray is slow to import, and scoring needs none of it

    streams = [f"camera-{number}" for number in range(1, CAMERAS + 1)]
    with ExitStack() as stack:
        say(f"starting {CAMERAS} simulated RTSP cameras ...")
        mounts = {stream: f"scene:{seed}" for seed, stream in enumerate(streams, start=1)}
        simulator = stack.enter_context(start_simulator(mounts, fps=FPS))
        clients = {stream: SimulatorClient(url) for stream, url in zip(streams, simulator.urls, strict=True)}
        if settings.store.url is None:
            data_dir = stack.enter_context(TemporaryDirectory(prefix="tsm-demo-", ignore_cleanup_errors=True))
            store_settings = settings.store.model_copy(update={"data_dir": Path(data_dir)})
            settings = settings.model_copy(update={"store": store_settings})
        names = [settings.engine.models[0].name]
        if DETECTOR in available_models([settings.models.folder]):
            names = list(dict.fromkeys([*names, DETECTOR]))
            settings = with_model(settings, DETECTOR)
        if "level" not in settings.logger.model_fields_set:  # its terminal is for events
            settings = settings.model_copy(update={"logger": settings.logger.model_copy(update={"level": "WARNING"})})
        say("starting the service: store, controller, engine replicas, page (some 20 s) ...")
        service = run_service(settings)
        stack.callback(service.stop)
        store = open_store(StoreSettings(url=service.store_url, prefix=settings.store.prefix))
        stack.callback(store.close)
        collector = Collector(store, streams, lambda event: say(describe(event)))
        stack.callback(collector.stop)
        headers = {}
        if service.admin_token_file is not None:
            headers["Authorization"] = f"Bearer {read_token(service.admin_token_file)}"
            say(f"the page wants a token: {service.admin_token_file} holds one")
        with httpx.Client(base_url=service.url, timeout=30, headers=headers) as http:
            for stream, url in zip(streams, simulator.urls, strict=True):
                body = {"id": stream, "source": {"uri": url}, "models": [{"name": name} for name in names]}
                http.post("/v1/streams", json=body).raise_for_status()
        say(f"page: {service.url}/")
        if service.grpc:
            say(f"gRPC: {service.grpc}")
        wait_running(store, streams)
        say(f"cameras: {', '.join(simulator.urls)}")
        say("Ctrl-C ends the demo" if seconds is None else f"running for {seconds:.0f} s ...")
        try:
            threading.Event().wait(seconds)
        except KeyboardInterrupt:
            say("ending ...")
        replicas = len(store.replicas())
        for client in clients.values():
            client.set(dark=True)
        time.sleep(0.3)  # the last frames are on their way
        for client in clients.values():
            client.disconnect()  # the decoders give up the frame they hold
        wait_quiet(store, streams)
        collector.stop()
        pairs = []
        for seed, (stream, client) in enumerate(clients.items(), start=1):
            status = store.status(stream)
            log = client.log()
            last = max(entry.frame_number for entry in log)
            sessions = client.sessions()
            truth = CameraTruth(
                stream,
                FPS,
                client.script(last + 1),
                {e.frame_number: e.sent_unix_s for e in log},
                len(log),
                objects_of(Scene(seed), last + 1) if DETECTOR in names else (),
            )
            result = CameraResult(
                [
                    {**record, "camera_frame": camera_frame(record["pts_s"], record["time_s"], sessions)}
                    for record in collector.scores[stream]
                ],
                [
                    {
                        **event,
                        "camera_frame": camera_frame(event["data"]["pts_s"], event["data"]["frame_time"], sessions),
                    }
                    for event in collector.events[stream]
                    if ".action." in event["type"]
                ],
                status.processed if status else 0,
                status.dropped if status else {},
            )
            pairs.append((truth, result))
    return demo_score(pairs, replicas)


def with_model(settings: Settings, name: str) -> Settings:
    """The settings with one more model to load."""
    models = settings.engine.models
    if name not in {model.name for model in models}:
        models = (*models, ModelSettings(name=name))
    return settings.model_copy(update={"engine": settings.engine.model_copy(update={"models": models})})


def wait_running(store: StateStore, streams: Sequence[str]) -> None:
    """Return when every stream runs. Raises WorldError that says which one does not, and why."""
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        statuses = store.statuses()
        waiting = [stream for stream in streams if stream not in statuses or statuses[stream].state != "RUNNING"]
        if not waiting:
            return
        time.sleep(0.1)
    first = store.status(waiting[0])
    why = f"{first.state}: {first.status_message}" if first else "no replica has taken it"
    raise WorldError(f"{waiting[0]} does not run after {READY_S:.0f} s ({why})", reason="demo_failed")


def wait_quiet(store: StateStore, streams: Sequence[str], limit_s: float = 10.0) -> None:
    """Return when no counter of any stream has moved for a while."""
    until = time.monotonic() + limit_s
    before: Any = None
    since = time.monotonic()
    while time.monotonic() < until and time.monotonic() - since < QUIET_S:
        statuses = store.statuses()
        counters = [(statuses[s].processed, statuses[s].dropped) for s in streams if s in statuses]
        if counters != before:
            before, since = counters, time.monotonic()
        time.sleep(0.1)


def last_line(score: Mapping[str, Any]) -> str:
    """The score as one line of JSON."""
    return json.dumps(score, separators=(",", ":"))
