"""Boxes of one stream -> tracks to draw and events to tell, by the stream's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.object_rules import ObjectFilter, ObjectRules, ObjectRulesError
from pipelines.tracker import ObjectTracker
from pipelines.zones import ZoneWatch, bottom_centre
from tsm_core.object_events import ObjectReporter
from tsm_core.types import Crossing, Detection, ObjectEvent, Track

__all__ = ["ObjectAnalytics", "ObjectFilter", "ObjectRules", "ObjectRulesError"]


class ObjectAnalytics:
    """Filter, tracker, zones and events of one stream, whose ids end in numbers above first_number.

    Raises TrackerMissing when ByteTrack is not installed.
    """

    def __init__(self, stream_id: str, model_name: str, rules: ObjectRules, first_number: int = 0) -> None:
        self.rules = rules
        self._tracker = ObjectTracker(stream_id, rules, first_number)
        self._watch = ZoneWatch(rules.zones, rules.lines)
        self._reporter = ObjectReporter(stream_id, model_name, update_s=rules.update_s)
        self._crossings: dict[str, list[Crossing]] = {}  # not told yet: of objects that are not sure yet, too

    def update(
        self,
        detections: Sequence[Detection],
        frame_number: int,
        pts_s: float,
        time_s: float,
        source_size: tuple[int, int],
    ) -> tuple[list[Track], list[ObjectEvent]]:
        """Objects that are told and have a box on this frame, and what there is to tell. source_size (width, height).

        Call it for every frame that was looked at, also when nothing was found.
        """
        admitted = [found for found in detections if self.rules.admits(found, source_size)]
        shown: list[Track] = []
        for track in self._tracker.update(admitted, pts_s, time_s):
            point = bottom_centre(track.xyxy, source_size)
            presence = self._watch.update(track.track_id, track.label, point, self._tracker.clock_s)
            if presence.crossings:
                self._crossings.setdefault(track.track_id, []).extend(presence.crossings)
            required = self.rules.required_zones
            if self._tracker.is_sure(track.track_id) and (
                not required or not set(required).isdisjoint(presence.entered_zones)
            ):
                shown.append(
                    replace(
                        track,
                        zones=presence.zones,
                        entered_zones=presence.entered_zones,
                        loitering=presence.loitering,
                    )
                )
        lost = self._tracker.lost()
        events = self._reporter.update(shown, self._crossings, lost, frame_number, pts_s, time_s, source_size)
        for track_id in (*lost, *(track.track_id for track in shown)):
            self._crossings.pop(track_id, None)
        for track_id in lost:
            self._watch.forget(track_id)
        return shown, events

    @property
    def next_number(self) -> int:
        """A first_number for one that shall give none of the ids given here."""
        return self._tracker.next_number

    def close(self) -> list[ObjectEvent]:
        """End all that is open, and forget it; ids go on."""
        events = self._reporter.close()
        self.reset()
        return events

    def reset(self) -> None:
        """Forget all objects, and tell nobody; ids go on."""
        self._tracker.reset()
        self._watch.restore({})
        self._reporter.reset()
        self._crossings = {}

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {
            "tracker": self._tracker.state(),
            "watch": self._watch.state(),
            "reporter": self._reporter.state(),
            "crossings": {
                track_id: [[crossing.line, crossing.direction] for crossing in crossings]
                for track_id, crossings in self._crossings.items()
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, perhaps under other rules: objects keep ids, motion and places that still are."""
        self._tracker.restore(state["tracker"])
        self._watch.restore(state["watch"])
        self._reporter.restore(state["reporter"])
        self._crossings = {
            track_id: [Crossing(line, direction) for line, direction in crossings]
            for track_id, crossings in state["crossings"].items()
        }
