"""Little films of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from pipelines.objects import ObjectAnalytics
from pipelines.tracker import ObjectTracker
from tsm_core.types import Detection, ObjectEvent, Track

SIZE = (1000, 500)


def box(x: float, y: float = 200.0, width: float = 60.0, height: float = 100.0):
    """A box by its bottom centre."""
    return (x - width / 2, y - height, x + width / 2, y)


def found(x: float, y: float = 200.0, score: float = 0.9, label: str = "person", **sides: float) -> Detection:
    return Detection(label, score, box(x, y, **sides))


def follow(tracker: ObjectTracker, film: Sequence[Sequence[Detection]], fps=10.0, begin=0) -> list[list[Track]]:
    return [tracker.update(boxes, n / fps, 1000 + n / fps) for n, boxes in enumerate(film, begin)]


def watch(
    analytics: ObjectAnalytics, film: Sequence[Sequence[Detection]], fps=10.0, begin=0
) -> tuple[list[list[Track]], list[ObjectEvent]]:
    shown, events = [], []
    for n, boxes in enumerate(film, begin):
        tracks, told = analytics.update(boxes, n, n / fps, 1000 + n / fps, SIZE)
        shown.append(tracks)
        events += told
    return shown, events


def told(events: Sequence[ObjectEvent]) -> list[tuple[str, str, int]]:
    return [(event.phase, event.track_id, event.frame_number) for event in events]


def values(records) -> list:
    return [asdict(record) for record in records]
