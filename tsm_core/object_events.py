"""Tracks -> events: what appears, changes and is gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tsm_core.types import Crossing, EventPhase, ObjectEvent, Track


@dataclass(slots=True)
class _Open:
    """An object that goes on: as last told and as last seen."""

    told: Track
    seen: Track
    told_s: float


@dataclass(frozen=True, slots=True)
class _Moment:
    frame_number: int
    pts_s: float
    time_s: float
    source_size: tuple[int, int]


def _facts(track: Track) -> tuple[object, ...]:
    """What is told at once when it changes."""
    return track.label, track.zones, track.loitering, track.stationary


def _track_of(state: Mapping[str, Any]) -> Track:
    values: dict[str, Any] = {name: tuple(held) if isinstance(held, list) else held for name, held in state.items()}
    return Track(**values)


class ObjectReporter:
    """Turns one stream's tracks into events.

    An object is new with the first frame it is given. Crossings, a new label, another zone, loitering and standing
    still are told at once; of an object that merely moves, an update follows at most every update_s, of one that is
    stationary none. It ends when it is given as lost; its end is then the last frame it was seen on.
    """

    def __init__(self, stream_id: str, model_name: str, *, update_s: float = 1.0) -> None:
        self.stream_id = stream_id
        self.model_name = model_name
        self.update_s = update_s
        self._open: dict[str, _Open] = {}
        self._moment: _Moment | None = None

    def update(
        self,
        tracks: Sequence[Track],
        crossings: Mapping[str, Sequence[Crossing]],
        lost: Iterable[str],
        frame_number: int,
        pts_s: float,
        time_s: float,
        source_size: tuple[int, int],
    ) -> list[ObjectEvent]:
        """What the frame changes: tracks have a box on it, crossings are by track_id, lost are track_ids."""
        self._moment = _Moment(frame_number, pts_s, time_s, source_size)
        events = [self._end(track_id) for track_id in lost if track_id in self._open]
        for track in tracks:
            crossed = tuple(crossings.get(track.track_id, ()))
            held = self._open.get(track.track_id)
            if held is None:
                self._open[track.track_id] = _Open(track, track, time_s)
                events.append(self._event("new", None, track, crossed))
                continue
            held.seen = track
            # also due when the clock was set back
            due = not track.stationary and not 0.0 <= time_s - held.told_s < self.update_s - 1e-6
            if crossed or due or _facts(track) != _facts(held.told):
                events.append(self._event("update", held.told, track, crossed))
                held.told, held.told_s = track, time_s
        return events

    def close(self) -> list[ObjectEvent]:
        """End all that is open."""
        return [self._end(track_id) for track_id in list(self._open)]

    def reset(self) -> None:
        """Forget what is open, and tell nobody."""
        self._open = {}

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {
            "open": [asdict(held) for held in self._open.values()],
            "moment": None if self._moment is None else asdict(self._moment),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`: open objects are not new again."""
        held = [_Open(_track_of(one["told"]), _track_of(one["seen"]), one["told_s"]) for one in state["open"]]
        self._open = {one.seen.track_id: one for one in held}
        moment = state["moment"]
        self._moment = None if moment is None else _Moment(**{**moment, "source_size": tuple(moment["source_size"])})

    def _end(self, track_id: str) -> ObjectEvent:
        held = self._open.pop(track_id)
        end_time_s = max(held.seen.time_s, held.seen.start_time_s)
        return self._event("end", held.told, held.seen, (), end_time_s)

    def _event(
        self,
        phase: EventPhase,
        before: Track | None,
        after: Track,
        crossings: tuple[Crossing, ...],
        end_time_s: float | None = None,
    ) -> ObjectEvent:
        assert self._moment is not None
        return ObjectEvent(
            stream_id=self.stream_id,
            phase=phase,
            before=before,
            after=after,
            model=self.model_name,
            frame_number=self._moment.frame_number,
            pts_s=self._moment.pts_s,
            frame_time_s=self._moment.time_s,
            source_size=self._moment.source_size,
            crossings=crossings,
            end_time_s=end_time_s,
        )
