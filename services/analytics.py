"""What one model knows of one stream: the verbs that recognition and detection share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from torch import Tensor

from services.schemas import ModelStatus
from services.served import Output, Served
from services.snapshots import ModelState
from services.stream_models import StreamModel
from tsm_core.arena import Slot, WindowArena
from tsm_core.frame import Frame
from tsm_core.types import Scores, Track

BACKWARD_S = 0.5  # a clock may be set back so far without a new beginning

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class View:
    """What goes through a model for one result: a picture uint8 (3, H, W) and the slot with its past.

    subject is the tracked object that the picture shows; empty: the frame itself, or a region of it.
    """

    image: Tensor
    slot: Slot
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """Records ready for the wire; `found` is what they were made of, the scores or the tracks with a box.

    warmup (k, L): frames that the state has seen, of those that matter.
    """

    scores: Sequence[Record] = ()
    events: Sequence[Record] = ()
    found: Scores | Sequence[Track] = ()
    warmup: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Look:
    """What of one frame goes through a model, and the events of what this frame, or a gap before it, ended."""

    views: Sequence[View] = ()
    events: Sequence[Record] = ()


class Analytics(ABC, Generic[Output]):
    """What one model knows of one stream; its verbs belong to whoever holds the engine's step lock.

    A frame's road: `follow`, then one `update` for each view that it gave.
    """

    def __init__(self, served: Served[Output], stream_id: str, options: StreamModel, max_gap_s: float) -> None:
        self.served = served
        self.stream_id = stream_id
        self.options = options
        self.max_gap_s = max_gap_s
        self.results = 0
        self.skipped = 0
        self.last_time_s: float | None = None

    def passed_gap(self, frame: Frame) -> bool:
        """True when the frame's time is too far from the last one's for the state to go on."""
        before_s = self.last_time_s
        return before_s is not None and not -BACKWARD_S <= frame.time_s - before_s <= self.max_gap_s

    @abstractmethod
    def restart(self) -> list[Record]:
        """Begin anew with the next frame: fresh state, nothing open; the events of what was open."""

    @abstractmethod
    def follow(self, frame: Frame) -> Look:
        """Make ready for a frame: after a gap in time the state begins anew, and what was open ends where it was."""

    @abstractmethod
    def update(self, view: View, output: Output, frame: Frame, warmup: tuple[int, int] | None = None) -> Result:
        """What the model's output for one view tells. warmup: what the slot said when the result became due."""

    @abstractmethod
    def holds(self, view: View) -> bool:
        """True while a late result of this view is still of use."""

    @abstractmethod
    def export(self) -> Sequence[ModelState]:
        """All of it, for a snapshot."""

    @abstractmethod
    def restore(self, saved: Sequence[ModelState], time_s: float) -> None:
        """Go on from a snapshot. Raises SnapshotError when it belongs to other weights or another layout."""

    @abstractmethod
    def close(self) -> list[Record]:
        """End what is open; its events."""

    @abstractmethod
    def free(self) -> None:
        """Give the slots back."""

    def status(self) -> ModelStatus:
        """What the model does on this stream, and what a result costs."""
        arena = self.served.arena
        window = stride = None
        if isinstance(arena, WindowArena):
            window, stride = self.options.window_s or arena.window_s, self.options.stride_s or arena.stride_s
        return ModelStatus(
            name=self.served.name,
            task=self.served.task,
            mode=self.served.model.mode,
            frames_per_result=self.served.frames_per_result,
            window_s=window,
            stride_s=stride,
            results=self.results,
            skipped=self.skipped,
            result_cost_ms=self.served.result_cost_ms,
        )
