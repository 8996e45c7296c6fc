"""A detector on a stream: the objects it finds, followed over time, in zones and over lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from typing_extensions import override

from pipelines.objects import ObjectAnalytics
from services.analytics import Analytics, Look, Record, Result, View
from services.schemas import ModelStatus, object_event, objects_record
from services.served import ServedDetector
from services.snapshots import ModelState, SnapshotError
from services.stream_models import StreamModel
from tsm_core.boxes import Boxes, detections_on
from tsm_core.frame import Frame
from tsm_core.types import ObjectEvent, Track


class ObjectDetection(Analytics[Boxes]):
    """One detector on one stream: its slot, and the objects that it follows.

    ids begins the ids of its tracks, which must differ between the detectors of a stream; first_track is the number
    below which its earlier sessions gave theirs.
    """

    def __init__(
        self,
        served: ServedDetector,
        stream_id: str,
        options: StreamModel,
        max_gap_s: float,
        ids: str,
        first_track: int,
    ) -> None:
        """Allocate the slot. Raises ArenaFull."""
        super().__init__(served, stream_id, options, max_gap_s)
        self.objects = ObjectAnalytics(ids, served.name, options.object_rules(), first_track)
        self.shown: Sequence[Track] = ()  # those with a box on the newest frame
        self._alive: dict[str, Track] = {}
        self.slot = served.allocate()

    @property
    def tracks(self) -> Sequence[Track]:
        """Objects that were told and are not gone, seen on the newest frame or not."""
        return tuple(self._alive.values())

    @override
    def restart(self) -> list[Record]:
        self.last_time_s = None
        self.free()
        self.slot = self.served.allocate()
        return self.close()

    @override
    def follow(self, frame: Frame) -> Look:
        ended = self.restart() if self.passed_gap(frame) else []
        self.last_time_s = frame.time_s
        return Look([View(frame.image, self.slot)], ended)

    @override
    def update(self, view: View, output: Boxes, frame: Frame, warmup: tuple[int, int] | None = None) -> Result:
        self.results += 1
        at = frame.number, frame.pts_s, frame.time_s, frame.source_size
        found = detections_on(frame, output, self.served.recipe.labels, self.served.model.input_size)
        self.shown, events = self.objects.update(found, *at)
        self._alive.update((track.track_id, track) for track in self.shown)
        seen = warmup or self.served.warmup(self.slot)
        record = objects_record(self.stream_id, self.served.name, *at, self.shown, seen)
        return Result([record], self._told(events), tuple(self.shown), seen)

    @override
    def holds(self, view: View) -> bool:
        return view.slot == self.slot

    @override
    def export(self) -> Sequence[ModelState]:
        arena = self.served.arena
        memory = {"objects": self.objects.state(), "alive": [asdict(track) for track in self.tracks]}
        state = ModelState(
            self.served.name, self.served.schema, arena.steps(self.slot), arena.export(self.slot), memory
        )
        return [state]

    @override
    def restore(self, saved: Sequence[ModelState], time_s: float) -> None:
        (state,) = saved
        if state.schema != self.served.schema:
            raise SnapshotError(f"saved state is of {state.schema}, this replica serves {self.served.schema}")
        self.served.arena.restore(self.slot, state.state, state.steps)
        self.objects.restore(state.memory["objects"])
        self._alive = {track.track_id: track for track in map(_track_of, state.memory["alive"])}
        self.last_time_s = time_s

    @override
    def close(self) -> list[Record]:
        self.shown = ()
        return self._told(self.objects.close())

    @override
    def free(self) -> None:
        self.served.free(self.slot)

    @override
    def status(self) -> ModelStatus:
        objects = Counter(track.label for track in self.shown)
        return super().status().model_copy(update={"objects": dict(objects)})

    def _told(self, events: Sequence[ObjectEvent]) -> list[Record]:
        for event in events:
            if event.phase == "end":
                self._alive.pop(event.track_id, None)
        return [object_event(replace(event, stream_id=self.stream_id)) for event in events]


def _track_of(values: dict[str, Any]) -> Track:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Track(**fields)
