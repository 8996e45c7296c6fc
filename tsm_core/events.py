"""Scores -> actions with a beginning and an end, by an on and an off threshold."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from typing import Any

from tsm_core.recipes import Recipe
from tsm_core.types import ActionEvent, EventPhase, Scores

TOP_K = 5


@dataclass
class _Candidate:
    """A label that is on top and above the threshold, but not yet for long enough."""

    label: str
    start_time_s: float
    start_pts_s: float
    top_score: float


@dataclass
class _Open:
    """The action that goes on."""

    action_id: str
    label: str
    start_time_s: float
    start_pts_s: float
    top_score: float
    told_s: float
    # of the last frame seen
    score: float
    top_k: tuple[tuple[str, float], ...]
    frame_number: int
    pts_s: float
    time_s: float


class ActionDetector:
    """Turns one stream's scores into actions; at most one at a time, for its model says one label per frame.

    An action begins once its label has been on top with at least `threshold` for min_action_s; its start is the frame
    where that run began. It ends when its score falls below off_threshold, or when another label, background
    included, has been on top for as long: then it ends where that run began. Background labels are no actions.
    `update` events follow at most every update_s.
    """

    def __init__(
        self,
        stream_id: str,
        model_name: str,
        recipe: Recipe,
        *,
        threshold: float | None = None,
        off_threshold: float | None = None,
        update_s: float = 1.0,
    ) -> None:
        self.stream_id = stream_id
        self.model_name = model_name
        self.background = recipe.background
        self.min_action_s = recipe.min_action_s
        self.threshold = recipe.threshold if threshold is None else threshold
        # a caller who lowers one threshold alone keeps off <= on
        self.off_threshold = min(recipe.off_threshold if off_threshold is None else off_threshold, self.threshold)
        self.update_s = update_s
        self._candidate: _Candidate | None = None
        self._open: _Open | None = None

    def update(self, scores: Scores, frame_number: int, pts_s: float, time_s: float) -> list[ActionEvent]:
        """What begins, goes on or ends with this frame: no, one or two events."""
        events: list[ActionEvent] = []
        top_k = scores.top(TOP_K)
        if self._open is not None:
            score = scores.values[scores.labels.index(self._open.label)]
            self._open.score, self._open.top_k = score, top_k
            self._open.frame_number, self._open.pts_s, self._open.time_s = frame_number, pts_s, time_s
            self._open.top_score = max(self._open.top_score, score)
        found = self._watch(top_k[0], pts_s, time_s)
        if self._open is not None:
            if found is not None:
                events.append(self._end(max(found.start_time_s, self._open.start_time_s)))
            elif self._open.score < self.off_threshold:
                # where another label already rises, that is where this one gave way
                end_s = time_s if self._candidate is None else self._candidate.start_time_s
                events.append(self._end(max(end_s, self._open.start_time_s)))
            elif time_s - self._open.told_s >= self.update_s:
                self._open.told_s = time_s
                events.append(self._event(self._open, "update"))
        if found is not None:
            self._candidate = None
            if found.label not in self.background:
                self._open = _Open(
                    action_id=uuid.uuid4().hex,
                    label=found.label,
                    start_time_s=found.start_time_s,
                    start_pts_s=found.start_pts_s,
                    top_score=found.top_score,
                    told_s=time_s,
                    score=top_k[0][1],
                    top_k=top_k,
                    frame_number=frame_number,
                    pts_s=pts_s,
                    time_s=time_s,
                )
                events.append(self._event(self._open, "new"))
        return events

    def close(self, time_s: float | None = None) -> list[ActionEvent]:
        """End what is open, at time_s or at the last frame seen; forget everything. No or one event."""
        self._candidate = None
        if self._open is None:
            return []
        return [self._end(self._open.time_s if time_s is None else time_s)]

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {
            "open": None if self._open is None else asdict(self._open),
            "candidate": None if self._candidate is None else asdict(self._candidate),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`: an open action keeps its action_id."""
        opened, candidate = state["open"], state["candidate"]
        self._candidate = None if candidate is None else _Candidate(**candidate)
        self._open = None
        if opened is not None:
            top_k = tuple((str(label), float(score)) for label, score in opened["top_k"])
            self._open = _Open(**{**opened, "top_k": top_k})

    def _watch(self, top: tuple[str, float], pts_s: float, time_s: float) -> _Candidate | None:
        """The candidate, if it has been on top for long enough."""
        label, score = top
        if score < self.threshold or (self._open is not None and label == self._open.label):
            self._candidate = None
            return None
        if self._candidate is None or self._candidate.label != label:
            self._candidate = _Candidate(label, time_s, pts_s, score)
        self._candidate.top_score = max(self._candidate.top_score, score)
        # times are sums of frame intervals: a microsecond short is not short
        return self._candidate if time_s - self._candidate.start_time_s >= self.min_action_s - 1e-6 else None

    def _end(self, end_time_s: float) -> ActionEvent:
        assert self._open is not None
        event = self._event(self._open, "end", end_time_s)
        self._open = None
        return event

    def _event(self, action: _Open, phase: EventPhase, end_time_s: float | None = None) -> ActionEvent:
        return ActionEvent(
            stream_id=self.stream_id,
            action_id=action.action_id,
            phase=phase,
            label=action.label,
            score=action.score,
            top_score=action.top_score,
            top_k=action.top_k,
            model=self.model_name,
            frame_number=action.frame_number,
            pts_s=action.pts_s,
            frame_time_s=action.time_s,
            start_time_s=action.start_time_s,
            start_pts_s=action.start_pts_s,
            end_time_s=end_time_s,
        )
