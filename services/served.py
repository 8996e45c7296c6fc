"""A model that a replica holds: its arena with the slots of the streams, and what a result costs."""

from __future__ import annotations

import hashlib
import statistics
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from pipelines.object_rules import ObjectRules
from pipelines.objects import ObjectAnalytics
from tsm_core.arena import Arena, ArenaFull, Slot, WindowArena
from tsm_core.boxes import Boxes
from tsm_core.cost import multiply_adds
from tsm_core.detector import TSMDetector
from tsm_core.model import TSM, WindowTSM

COSTS_KEPT = 32

Task = Literal["recognition", "detection"]
Output = TypeVar("Output")
Model = TSM | WindowTSM | TSMDetector


class Served(ABC, Generic[Output]):
    """A model with an arena: one slot for each stream, and `object_slots` more for tracked objects.

    schema names weights and layout: a state that was saved under another one is never loaded. gmac_per_result: thousand
    million multiply-adds of one result. Whoever allocates, frees or steps holds the engine's step lock.
    """

    task: ClassVar[Task]

    def __init__(self, name: str, model: Any, slots: int, object_slots: int = 0) -> None:
        self.name = name
        self.model = model
        self.recipe = model.recipe
        self.arena: Arena | WindowArena = model.new_arena(slots + object_slots)
        self.object_slots = object_slots
        self.schema = f"{name}@{model_version(model)}:{model.mode}:{self.arena.elements}"
        self.gmac_per_result = round(multiply_adds(self.recipe) / 1e9, 3)
        self._objects: set[Slot] = set()
        self._costs_ms: deque[float] = deque(maxlen=COSTS_KEPT)

    # ---- what it is

    @property
    @abstractmethod
    def needed_px(self) -> int:
        """Short side in pixels below which a picture would have to be enlarged."""

    @property
    def frames_per_result(self) -> int:
        """Frames that go through the network for one result."""
        return self.recipe.frames if self.model.mode == "window" else 1

    @property
    def result_cost_ms(self) -> float | None:
        """Compute time of one result, the median of the last ones; None before the first."""
        costs_ms = list(self._costs_ms)
        return round(statistics.median(costs_ms), 3) if costs_ms else None

    # ---- slots

    def allocate(
        self, window_s: float | None = None, stride_s: float | None = None, *, of_object: bool = False
    ) -> Slot:
        """A fresh slot, of a stream or of a tracked object: objects never take a stream's. Raises ArenaFull."""
        if of_object and len(self._objects) >= self.object_slots:
            raise ArenaFull(
                f"all {self.object_slots} slots of {self.name} for tracked objects are taken (engine.object_slots)"
            )
        slot = self.arena.allocate(window_s, stride_s) if isinstance(self.arena, WindowArena) else self.arena.allocate()
        if of_object:
            self._objects.add(slot)
        return slot

    def free(self, slot: Slot) -> None:
        """Give the slot back."""
        self.arena.free(slot)
        self._objects.discard(slot)

    def warmup(self, slot: Slot) -> tuple[int, int]:
        """(k, L): frames that the slot's state has seen, of those that matter."""
        seen: tuple[int, int] = self.model.warmup(self.arena, slot)
        return seen

    # ---- work

    def preprocess(self, images: Sequence[Tensor]) -> Tensor:
        """Model input (N, 3, h, w) on the device, from pictures as `model_input` takes them."""
        return model_input(self.model, images)

    @abstractmethod
    def warm_up(self) -> None:
        """Run one picture through, so that the first camera does not wait for lazy set-up."""

    @abstractmethod
    def step(self, pixels: Tensor, slots: Sequence[Slot], times_s: Sequence[float]) -> list[Output]:
        """One output per slot, from one picture each."""

    def _timed(self, work: Callable[[], list[Output]]) -> list[Output]:
        # other streams' threads are not this model's cost; several threads of its own can only be timed by the wall
        alone = self.arena.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        began_s = clock()
        outputs = work()
        self._costs_ms.append(1000 * (clock() - began_s) / len(outputs))
        return outputs


class ServedRecogniser(Served[list[float]]):
    """A recogniser: an output is a row of logits."""

    task = "recognition"
    model: TSM | WindowTSM

    @property
    def needed_px(self) -> int:
        """Short side in pixels below which a picture would have to be enlarged."""
        spec = self.recipe.preprocess
        return int(spec.resize_px if spec.resize == "short" else spec.input_px)

    def warm_up(self) -> None:
        """Run one picture through, so that the first camera does not wait for lazy set-up."""
        side_px = self.model.input_px
        pixels = self.preprocess([torch.zeros(3, side_px, side_px, dtype=torch.uint8)])
        if isinstance(self.arena, WindowArena):
            self.infer(pixels.expand(self.recipe.frames, -1, -1, -1)[None])
            return
        slot = self.arena.allocate()
        self.step(pixels, [slot], [0.0])
        self.arena.free(slot)

    def step(self, pixels: Tensor, slots: Sequence[Slot], times_s: Sequence[float]) -> list[list[float]]:
        """One row of logits per slot, from one picture each."""
        return self._timed(lambda: _rows(self.model.step(pixels, self.arena, slots, times_s)))  # type: ignore[arg-type]

    def infer(self, clips: Tensor) -> list[list[float]]:
        """One row of logits per clip (N, T, C, H, W), in window mode."""
        with torch.no_grad():
            return self._timed(lambda: _rows(self.model(clips)))


class ServedDetector(Served[Boxes]):
    """A detector: an output is what it found on a picture, in pixels of its input."""

    task = "detection"
    model: TSMDetector

    @property
    def needed_px(self) -> int:
        """Short side in pixels below which a picture would have to be enlarged."""
        height, width = self.model.input_size
        return min(height, width)

    def warm_up(self) -> None:
        """Run one picture through, so that the first camera does not wait for lazy set-up."""
        slot = self.arena.allocate()
        pixels = self.preprocess([torch.zeros(3, *self.model.input_size, dtype=torch.uint8)])
        self.step(pixels, [slot], [0.0])
        self.arena.free(slot)
        # the tracker's libraries take seconds to import, which no camera should wait for
        ObjectAnalytics("warm-up", self.name, ObjectRules()).update((), 0, 0.0, 0.0, (1, 1))

    def step(self, pixels: Tensor, slots: Sequence[Slot], times_s: Sequence[float]) -> list[Boxes]:
        """What was found on one picture for each slot."""
        return self._timed(
            lambda: self.model.detect(self.model.step(pixels, self.arena, slots, times_s))  # type: ignore[arg-type]
        )


def model_input(model: Model, pictures: Sequence[Tensor]) -> Tensor:
    """Model input (N, 3, h, w) on the model's device.

    Each picture is uint8 (3, H, W) of any size, or float32 (3, h, w) that is model input already.
    """
    raw = [index for index, picture in enumerate(pictures) if picture.dtype == torch.uint8]
    done = model.preprocess([pictures[index] for index in raw]) if raw else None
    if done is not None and len(raw) == len(pictures):
        return done
    rows = dict(zip(raw, done, strict=True)) if done is not None else {}
    return torch.stack([rows[i] if i in rows else picture.to(model.device) for i, picture in enumerate(pictures)])


def serve(name: str, model: Model, slots: int, object_slots: int) -> ServedRecogniser | ServedDetector:
    """The model, with room for so many streams and, if it is a recogniser, tracked objects."""
    if isinstance(model, TSMDetector):
        return ServedDetector(name, model, slots)
    return ServedRecogniser(name, model, slots, object_slots)


def _rows(logits: Tensor) -> list[list[float]]:
    rows: list[list[float]] = logits.float().tolist()
    return rows


def model_version(model: nn.Module) -> str:
    """First 12 hex digits of the digest of a model's recipe and weights."""
    digest = hashlib.sha256(str(getattr(model, "recipe", "")).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
