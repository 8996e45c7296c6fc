"""Slots on the device: the shift state, or the window ring, of every live stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsm_core.errors import CallerError, ShapeError, WorldError
from tsm_core.shift import Start

FP16_MAX = 65504.0


class ArenaFull(WorldError):
    """Every slot is taken; a stream must leave first."""

    reason = "arena_full"


class SlotError(CallerError):
    """A slot that is no longer, or never was, the caller's."""

    reason = "stale_slot"


@dataclass(frozen=True, slots=True)
class Slot:
    """A stream's row in an arena. The generation tells it from later owners of the same row."""

    index: int
    generation: int


@dataclass(frozen=True, slots=True)
class Held:
    """Shift states of some slots: `layers`, one (N, fold, H, W) per shifted layer.

    fresh (N,) bool on the device marks slots whose first frame reads its own channels; None: there are none.
    """

    layers: tuple[Tensor, ...]
    fresh: Tensor | None = None


class Slots:
    """Who owns which row: allocation, generations and frame counts. Holds no tensors; safe to share between threads."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise ShapeError(f"an arena needs at least 1 slot, got {total}")
        self.slots_total = total
        self._generations = [0] * total
        self._steps = [0] * total
        self._taken = [False] * total
        self._free = list(range(total - 1, -1, -1))
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Slots in use."""
        return self.slots_total - len(self._free)

    def take(self) -> Slot:
        """A free row with a new generation. Raises ArenaFull."""
        with self._lock:
            if not self._free:
                raise ArenaFull(
                    f"all {self.slots_total} slots of the arena are taken; remove a stream or add a replica"
                )
            index = self._free.pop()
            self._generations[index] += 1
            self._steps[index] = 0
            self._taken[index] = True
            return Slot(index, self._generations[index])

    def give_back(self, slot: Slot) -> None:
        """Make the row free. Raises SlotError."""
        with self._lock:
            self.check((slot,))
            self._taken[slot.index] = False
            self._free.append(slot.index)

    def check(self, slots: Sequence[Slot]) -> tuple[int, ...]:
        """The rows of `slots`. Raises SlotError when one is stale or named twice."""
        for slot in slots:
            known = 0 <= slot.index < self.slots_total
            if not known or not self._taken[slot.index] or self._generations[slot.index] != slot.generation:
                raise SlotError(f"{slot} is not in use: it was freed, or belongs to another arena; allocate a new one")
        rows = tuple(slot.index for slot in slots)
        if len(set(rows)) != len(rows):
            raise SlotError(f"slots {rows} name a row twice; a batch takes one frame per stream", reason="slot_twice")
        return rows

    def steps(self, slot: Slot) -> int:
        """Frames the slot has seen since it was fresh. Raises SlotError."""
        self.check((slot,))
        return self._steps[slot.index]

    def set_steps(self, slot: Slot, steps: int) -> None:
        """Say how many frames the slot has seen."""
        self.check((slot,))
        self._steps[slot.index] = steps

    def fresh(self, rows: Sequence[int]) -> list[bool]:
        """For each row, whether it has seen no frame yet."""
        return [self._steps[row] == 0 for row in rows]

    def count(self, rows: Sequence[int]) -> None:
        """Add one frame to each row."""
        for row in rows:
            self._steps[row] += 1


class _Slotted:
    """What both arenas say of their slots."""

    _slots: Slots

    @property
    def slots_total(self) -> int:
        """Streams the arena can hold."""
        return self._slots.slots_total

    @property
    def used(self) -> int:
        """Slots in use."""
        return self._slots.used

    def free(self, slot: Slot) -> None:
        """Give the slot back; using it again raises SlotError."""
        self._slots.give_back(slot)


class Arena(_Slotted):
    """Shift states of all live streams in one flat tensor [slots, elements]: one gather and one scatter a step.

    spec: (fold, H, W) of each shifted layer. start: what a fresh slot reads as its past, `zeros` or the frame's `own`
    first channels. One thread steps; allocate and free may come from others.
    """

    def __init__(
        self,
        spec: Sequence[tuple[int, int, int]],
        slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        start: Start = "zeros",
    ) -> None:
        self.spec = tuple(spec)
        self.start = start
        self._sizes = [fold * height * width for fold, height, width in self.spec]
        self._flat = torch.zeros(slots, sum(self._sizes), dtype=dtype, device=device)
        self._slots = Slots(slots)
        self._memo: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0, dtype=torch.int64, device=device))

    def __repr__(self) -> str:
        return f"Arena({self.used}/{self.slots_total} slots, {self.elements} x {self._flat.dtype}, {self.nbytes} bytes)"

    @property
    def elements(self) -> int:
        """Numbers in one slot."""
        return sum(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._flat.nbytes

    @property
    def device(self) -> torch.device:
        """Where the states lie."""
        return self._flat.device

    @property
    def dtype(self) -> torch.dtype:
        """How the states are stored."""
        return self._flat.dtype

    def allocate(self) -> Slot:
        """A zeroed, fresh slot. Raises ArenaFull."""
        slot = self._slots.take()
        self._flat[slot.index].zero_()
        return slot

    def steps(self, slot: Slot) -> int:
        """Frames the slot's state has seen since it was fresh. Raises SlotError."""
        return self._slots.steps(slot)

    def gather(self, slots: Sequence[Slot]) -> Held:
        """States of any subset of slots, in that order. Raises SlotError."""
        rows = self._slots.check(slots)
        index = self._index(rows)
        fresh: Tensor | None = None
        if self.start == "own" and any(flags := self._slots.fresh(rows)):
            fresh = torch.tensor(flags, device=self.device)
        flat = self._flat.index_select(0, index)  # (N, elements)
        layers, begin = [], 0
        for size, shape in zip(self._sizes, self.spec, strict=True):
            layers.append(flat[:, begin : begin + size].view(-1, *shape))
            begin += size
        return Held(tuple(layers), fresh)

    def scatter(self, slots: Sequence[Slot], held: Held | Sequence[Tensor]) -> None:
        """Write the states after one more frame; each slot's `steps` grows by one. Raises SlotError, ShapeError."""
        layers = held.layers if isinstance(held, Held) else held
        rows = self._slots.check(slots)
        shapes = [tuple(layer.shape) for layer in layers]
        if shapes != [(len(rows), *shape) for shape in self.spec]:
            raise ShapeError(f"states {shapes} do not fit {len(rows)} slots of {self.spec}")
        if layers:
            flat = torch.cat([layer.flatten(1) for layer in layers], dim=1)
            self._flat.index_copy_(0, self._index(rows), flat.to(self._flat.dtype))
        self._slots.count(rows)

    def export(self, slot: Slot) -> Tensor:
        """A copy of the slot's state: float16 (elements,) on the CPU, clamped to what float16 can hold."""
        (row,) = self._slots.check((slot,))
        return self._flat[row].clamp(-FP16_MAX, FP16_MAX).to("cpu", torch.float16, copy=True)

    def restore(self, slot: Slot, state: Tensor, steps: int) -> None:
        """Put an exported state into the slot, which had seen `steps` frames. Raises SlotError, ShapeError."""
        (row,) = self._slots.check((slot,))
        if tuple(state.shape) != (self.elements,):
            raise ShapeError(f"state must be ({self.elements},), got {tuple(state.shape)}: another model's?")
        self._flat[row].copy_(state)
        self._slots.set_steps(slot, steps)

    def _index(self, rows: tuple[int, ...]) -> Tensor:
        # one transfer per change of the batch's members: gather and scatter of a step share it
        if self._memo[0] != rows:
            self._memo = (rows, torch.tensor(rows, dtype=torch.int64).to(self.device, non_blocking=True))
        return self._memo[1]


class WindowArena(_Slotted):
    """A ring of the last T preprocessed frames per live stream, for models that see whole clips.

    A frame enters a slot's ring when window_s / T has passed since the last that did; a result is due every stride_s.
    Window and stride are the model's unless `allocate` says otherwise.
    """

    def __init__(
        self,
        frames: int,
        shape: tuple[int, int, int],
        slots: int,
        window_s: float,
        stride_s: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.frames, self.shape = frames, shape
        self.window_s, self.stride_s = window_s, stride_s
        self._ring = torch.zeros(slots * frames, *shape, dtype=dtype, device=device)
        self._slots = Slots(slots)
        self._intervals = [(window_s / frames, stride_s)] * slots
        self._next_entry: list[float | None] = [None] * slots
        self._next_result: list[float | None] = [None] * slots

    def __repr__(self) -> str:
        return f"WindowArena({self.used}/{self.slots_total} slots, {self.frames} frames of {self.shape})"

    @property
    def elements(self) -> int:
        """Numbers in one slot."""
        return self._ring[0].numel() * self.frames

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._ring.nbytes

    @property
    def device(self) -> torch.device:
        """Where the rings lie."""
        return self._ring.device

    @property
    def dtype(self) -> torch.dtype:
        """How the frames are stored."""
        return self._ring.dtype

    def allocate(self, window_s: float | None = None, stride_s: float | None = None) -> Slot:
        """An empty ring, with a window and stride of its own if given. Raises ArenaFull, ShapeError."""
        window, stride = window_s or self.window_s, stride_s or self.stride_s
        if window <= 0 or stride <= 0:
            raise ShapeError(f"window_s {window} and stride_s {stride} must be above 0")
        slot = self._slots.take()
        self._intervals[slot.index] = (window / self.frames, stride)
        self._next_entry[slot.index] = self._next_result[slot.index] = None
        return slot

    def steps(self, slot: Slot) -> int:
        """Frames that entered the slot's ring since it was fresh. Raises SlotError."""
        return self._slots.steps(slot)

    def push(self, slots: Sequence[Slot], frames: Tensor, times_s: Sequence[float]) -> list[int]:
        """Let the frames that are due enter their rings; the positions in the batch whose result is due.

        frames (N, C, H, W), one per slot; times_s, N times. A step back in time, or a gap longer than the window,
        begins a new rhythm but keeps the ring. Raises SlotError, ShapeError.
        """
        if tuple(frames.shape) != (len(slots), *self.shape):
            raise ShapeError(f"frames {tuple(frames.shape)} do not fit {len(slots)} rings of {self.shape}")
        entering, due = self.plan(slots, times_s)
        if entering:
            chosen = frames if len(entering) == len(slots) else frames.index_select(0, self._to_device(entering))
            self.put([slots[position] for position in entering], chosen)
        return due

    def plan(self, slots: Sequence[Slot], times_s: Sequence[float]) -> tuple[list[int], list[int]]:
        """Positions in the batch whose frame enters its ring now (`put` them), and those whose result is due then.

        For frames that need work before they can enter. Raises SlotError, ShapeError.
        """
        rows = self._slots.check(slots)
        if len(times_s) != len(rows):
            raise ShapeError(f"{len(times_s)} times do not fit {len(rows)} rings")
        entering, due = [], []
        for position, (row, time_s) in enumerate(zip(rows, times_s, strict=True)):
            interval_s, stride_s = self._intervals[row]
            enters, self._next_entry[row] = _due(self._next_entry[row], time_s, interval_s)
            if enters:
                entering.append(position)
            is_due, self._next_result[row] = _due(self._next_result[row], time_s, stride_s)
            if is_due:
                due.append(position)
        return entering, due

    def put(self, slots: Sequence[Slot], frames: Tensor) -> None:
        """Let frames (N, C, H, W) enter the rings, one per slot. Raises SlotError, ShapeError."""
        rows = self._slots.check(slots)
        if tuple(frames.shape) != (len(rows), *self.shape):
            raise ShapeError(f"frames {tuple(frames.shape)} do not fit {len(rows)} rings of {self.shape}")
        into = [
            row * self.frames + self._slots.steps(slot) % self.frames for row, slot in zip(rows, slots, strict=True)
        ]
        self._ring.index_copy_(0, self._to_device(into), frames.to(self._ring.dtype))
        self._slots.count(rows)

    def clips(self, slots: Sequence[Slot]) -> Tensor:
        """Ring contents, oldest frame first: (N, T, C, H, W). A ring not yet full repeats its oldest frame in front."""
        rows = self._slots.check(slots)
        index: list[int] = []
        for row, slot in zip(rows, slots, strict=True):
            index.extend(row * self.frames + position for position in self._order(self._slots.steps(slot)))
        return self._ring.index_select(0, self._to_device(index)).view(-1, self.frames, *self.shape)

    def export(self, slot: Slot) -> Tensor:
        """A copy of the slot's ring, oldest frame first: float16 (elements,) on the CPU."""
        return self.clips((slot,)).flatten().clamp(-FP16_MAX, FP16_MAX).to("cpu", torch.float16)

    def restore(self, slot: Slot, state: Tensor, steps: int) -> None:
        """Put an exported ring into the slot. The next frame enters and has a result. Raises SlotError, ShapeError."""
        (row,) = self._slots.check((slot,))
        if tuple(state.shape) != (self.elements,):
            raise ShapeError(f"ring must be ({self.elements},), got {tuple(state.shape)}: another model's?")
        clip = state.to(self.device, self.dtype).view(self.frames, *self.shape)
        # export read the positions in this order; repeats of the oldest frame fall on one position, all alike
        order = self._order(steps)
        self._ring.index_copy_(0, self._to_device([row * self.frames + position for position in order]), clip)
        self._next_entry[row] = self._next_result[row] = None
        self._slots.set_steps(slot, steps)

    def _order(self, steps: int) -> list[int]:
        # ring positions of the last T entries, oldest first; missing ones are the very first entry
        return [max(entry, 0) % self.frames for entry in range(steps - self.frames, steps)]

    def _to_device(self, index: list[int]) -> Tensor:
        return torch.tensor(index, dtype=torch.int64).to(self.device, non_blocking=True)


def _due(next_s: float | None, time_s: float, interval_s: float) -> tuple[bool, float | None]:
    # a steady rhythm: the next time counts from the planned one, so that frames which come late do not slow it down
    slack_s = 1e-6
    if next_s is None or time_s > next_s + interval_s or time_s < next_s - interval_s - slack_s:
        return True, time_s + interval_s
    if time_s < next_s - slack_s:
        return False, next_s
    return True, next_s + interval_s
