"""A recogniser on a stream: smoothed scores of the picture, and the action that goes on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from services.analytics import Analytics, Look, Record, Result, View
from services.schemas import StreamModel, cloud_event, score_record
from services.served import ServedRecogniser
from services.snapshots import ModelState, SnapshotError
from tsm_core.arena import Slot
from tsm_core.errors import ShapeError
from tsm_core.events import ActionDetector
from tsm_core.postprocess import new_smoother
from tsm_core.types import Frame, Scores


class Recognition(Analytics[list[float]]):
    """One recogniser on one picture of each frame: its slot, the smoothed scores, the open action."""

    def __init__(self, served: ServedRecogniser, stream_id: str, options: StreamModel, max_gap_s: float) -> None:
        """Allocate the slot. Raises ArenaFull."""
        super().__init__(served, stream_id, options, max_gap_s)
        self.smoother = new_smoother(served.recipe, options.smoother)
        self.detector = ActionDetector(
            stream_id,
            served.name,
            served.recipe,
            threshold=options.threshold,
            off_threshold=options.off_threshold,
        )
        self.slot = self._allocate()

    @override
    def follow(self, frame: Frame) -> Look:
        ended: list[Record] = []
        if self.passed_gap(frame):
            self.free()
            self.slot = self._allocate()
            self.smoother.reset()
            ended = self.close()
        return Look([View(self.picture(frame), self.slot)], ended)

    def picture(self, frame: Frame) -> Tensor:
        """What the recogniser looks at."""
        return frame.image

    @override
    def update(self, view: View, output: list[float], frame: Frame, warmup: tuple[int, int] | None = None) -> Result:
        self.results += 1
        values = self.smoother.update(output, frame.time_s)
        scores = Scores(self.served.recipe.labels, values, *(warmup or self.served.warmup(self.slot)))
        record = score_record(self.stream_id, self.served.name, frame.number, frame.pts_s, frame.time_s, scores)
        events = self.detector.update(scores, frame.number, frame.pts_s, frame.time_s)
        return Result([record], [cloud_event(event) for event in events])

    @override
    def holds(self, view: View) -> bool:
        return view.slot == self.slot

    @override
    def export(self) -> Sequence[ModelState]:
        arena = self.served.arena
        memory = {"smoother": self.smoother.state(), "actions": self.detector.state()}
        state = ModelState(
            self.served.name, self.served.schema, arena.steps(self.slot), arena.export(self.slot), memory
        )
        return [state]

    @override
    def restore(self, saved: Sequence[ModelState], time_s: float) -> None:
        (state,) = saved
        if state.schema != self.served.schema:
            raise SnapshotError(f"saved state is of {state.schema}, this replica serves {self.served.schema}")
        try:
            self.smoother.restore(dict(state.memory["smoother"]))
        except ShapeError as error:  # the stream's smoother was changed
            raise SnapshotError(str(error)) from None
        self.served.arena.restore(self.slot, state.state, state.steps)
        self.detector.restore(dict(state.memory["actions"]))
        self.last_time_s = time_s

    @override
    def close(self) -> list[Record]:
        return [cloud_event(event) for event in self.detector.close()]

    @override
    def free(self) -> None:
        self.served.free(self.slot)

    def _allocate(self) -> Slot:
        return self.served.allocate(self.options.window_s, self.options.stride_s)
