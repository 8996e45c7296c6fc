"""The demo: simulated cameras, the real service, live events, and a score against the cameras' own script."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_INTERVAL_S = 2.0  # shorter intervals of the script are not judged
SETTLE_S = 1.0  # nor is the first second after a change


@dataclass(frozen=True, slots=True)
class CameraTruth:
    """What one simulated camera says it showed.

    script: intervals {label, start_frame, end_frame} with end exclusive. sent: frame number → Unix time at which it was
    sent; frames_sent counts every transmission to the service, repeats in a second session included.
    """

    stream_id: str
    fps: float
    script: Sequence[Mapping[str, Any]]
    sent: Mapping[int, float]
    frames_sent: int


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
    seen = [record["camera_frame"] for record in result.scores]
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
    for record in result.scores:
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
        "latency_ms": percentiles(latencies),
    }
