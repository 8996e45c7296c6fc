"""The demo's score, on little films of ten frames a second."""

import pytest

from pipelines.box_data import Objects
from pipelines.scenes import KINDS
from services.demo import CameraResult, CameraTruth, demo_score

SCRIPT = [
    {"label": "left", "start_frame": 0, "end_frame": 30},
    {"label": "still", "start_frame": 30, "end_frame": 40},  # too short to judge
    {"label": "grow", "start_frame": 40, "end_frame": 70},
]


def film(labels: dict[range, str], events: list[dict[str, object]] | None = None, **counts: int) -> dict[str, object]:
    frames = {n: label for span, label in labels.items() for n in span}
    truth = CameraTruth("cam", 10.0, SCRIPT, {n: 100 + n / 10 for n in range(70)}, 70)
    scores = [
        {"camera_frame": n, "label": label, "published_s": 100 + n / 10 + 0.02} for n, label in sorted(frames.items())
    ]
    processed = counts.pop("processed", len(scores))
    return demo_score([(truth, CameraResult(scores, events or [], processed, counts))], replicas=2)


def action(label: str, start: int, frame: int) -> dict[str, object]:
    return {
        "type": "tsm.v1.action.end",
        "subject": f"{label}{start}",
        "camera_frame": frame,
        "published_s": 100 + frame / 10 + 0.05,
        "data": {"label": label, "pts_s": frame / 10, "start_pts_s": start / 10},
    }


def test_the_first_second_after_a_change_is_not_judged():
    score = film({range(10): "grow", range(10, 30): "left", range(30, 50): "left", range(50, 70): "grow"})
    assert (score["label_accuracy"], score["intervals"]) == (1.0, 2)


def test_a_wrong_majority_is_wrong():
    score = film({range(22): "left", range(22, 70): "shrink"})
    assert (score["label_accuracy"], score["intervals"]) == (0.5, 2)


def test_an_interval_that_was_not_seen_whole_is_not_judged():
    score = film({range(5, 60): "left"})
    assert (score["label_accuracy"], score["intervals"]) == (None, 0)


def test_an_interval_without_reports_is_wrong():
    score = film({range(8): "left", range(60, 70): "grow"})
    assert score["intervals"] == 2
    assert score["label_accuracy"] == 0.5


def test_an_event_outside_its_label_is_false():
    events = [action("left", 5, 33), action("grow", 5, 20), action("grow", 45, 60)]
    score = film({range(70): "left"}, events)
    assert (score["actions"], score["false_events"]) == (3, 1)


def test_every_frame_sent_is_accounted_for():
    assert film({range(60): "left"}, queue=10)["unaccounted"] == 0
    assert film({range(60): "left"}, queue=7)["unaccounted"] == 3


def test_latency_counts_from_the_send():
    assert film({range(70): "left"})["latency_ms"] == {"p50": 20.0, "p95": 20.0, "p99": 20.0}


def boxes_score(found: dict[int, list[tuple[str, float, tuple[float, ...]]]]) -> float | None:
    """detection_ap50 of a film with one object, which goes 2 px to the right with every frame."""
    boxes = [Objects.of([[2 * n, 10, 2 * n + 40, 50]], [0]) for n in range(30)]
    truth = CameraTruth("cam", 10.0, SCRIPT, {}, 70, boxes)
    scores = [
        {"camera_frame": n, "objects": [{"label": label, "score": score, "box": box} for label, score, box in objects]}
        for n, objects in found.items()
    ]
    scores += [{"camera_frame": n, "label": "left", "track_id": "cam:1"} for n in found]  # of an object: not the film's
    score = demo_score([(truth, CameraResult([{**one, "published_s": 0.0} for one in scores], [], 0, {}))], replicas=2)
    assert score["intervals"] == 0
    return score["detection_ap50"]


def right(n: int) -> tuple[str, float, tuple[float, ...]]:
    return KINDS[0], 0.9, (2 * n + 1, 11, 2 * n + 40, 51)


def test_boxes_are_judged_on_the_frames_that_were_looked_at():
    assert boxes_score({n: [right(n)] for n in range(5, 25)}) == 1.0
    assert boxes_score({n: [right(n)] if n % 2 else [] for n in range(20)}) == pytest.approx(0.5, abs=0.02)


def test_a_box_of_another_place_is_wrong():
    assert boxes_score({n: [(KINDS[0], 0.9, (100, 100, 140, 140))] for n in range(20)}) == 0.0
    worse = boxes_score({n: [right(n), (KINDS[0], 0.95, (100, 100, 140, 140))] for n in range(20)})
    assert worse == pytest.approx(0.5, abs=0.02)


def test_without_a_detector_nothing_is_judged():
    assert film({range(70): "left"})["detection_ap50"] is None
