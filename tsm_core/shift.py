"""Temporal shift in three verbs that share one definition: both ways over a clip, one way over a clip, one frame.

A shifted layer reads some of its channels from a neighbouring frame. `fold = C // fold_div` channels make one group;
group g takes channels [g * fold, (g + 1) * fold) from frame t + OFFSETS[mode][g]; every other channel is its own.
Source: Lin et al., arXiv:1811.08383; channel order as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tsm_core.errors import ShapeError

ShiftMode = Literal["bi", "uni"]
Start = Literal["zeros", "own"]

OFFSETS: dict[ShiftMode, tuple[int, ...]] = {"bi": (1, -1), "uni": (-1,)}


def _move(x: Tensor, fold: int, offsets: Sequence[int], start: Start) -> Tensor:
    # slices into one fresh tensor keep channels_last; cat and roll on five axes do not
    out = torch.empty_like(x)
    for group, offset in enumerate(offsets):
        channels = slice(group * fold, (group + 1) * fold)
        # a frame with no neighbour reads zeros, or itself
        if offset > 0:
            out[:, :-1, channels] = x[:, 1:, channels]
            border = -1
        else:
            out[:, 1:, channels] = x[:, :-1, channels]
            border = 0
        out[:, border, channels] = x[:, border, channels] if start == "own" else 0
    out[:, :, len(offsets) * fold :] = x[:, :, len(offsets) * fold :]
    return out


class _Move(torch.autograd.Function):
    """The shift is linear; its gradient is the shift the other way. One pass, where autograd would take one a slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fold: int, offsets: tuple[int, ...], start: Start) -> Tensor:
        ctx.fold, ctx.offsets, ctx.start = fold, offsets, start
        return _move(x, fold, offsets, start)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0]
        back = _move(grad, ctx.fold, [-offset for offset in ctx.offsets], "zeros")
        if ctx.start == "own":
            for group, offset in enumerate(ctx.offsets):
                channels, border = slice(group * ctx.fold, (group + 1) * ctx.fold), -1 if offset > 0 else 0
                back[:, border, channels] += grad[:, border, channels]
        return back, None, None, None


def shift_clip(x: Tensor, fold_div: int = 8, mode: ShiftMode = "bi", start: Start = "zeros") -> Tensor:
    """Shift a clip along time: `bi` reads the next and the previous frame, `uni` the previous one alone.

    x (N, T, C, H, W) -> same shape, strides kept. Where there is no neighbour the group is zero, or with start `own`
    the frame's own. Raises ShapeError when x has other axes or too few channels for one group each way.
    """
    offsets = OFFSETS[mode]
    fold = x.shape[2] // fold_div if x.ndim == 5 else 0
    if fold == 0 or len(offsets) * fold > x.shape[2]:
        raise ShapeError(f"clip must be (N, T, C, H, W) with C >= fold_div {fold_div}, got {tuple(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        return _Move.apply(x, fold, offsets, start)  # type: ignore[no-any-return]
    return _move(x, fold, offsets, start)


def shift_step(x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Shift one frame one way, taking the past from `held`: (shifted (N, C, H, W), next held).

    x (N, C, H, W), this frame. held (N, fold, H, W), first channels of the previous one, zeros for the first frame.
    The next held is a view of x. Raises ShapeError when N, H or W differ or fold is more than C.
    """
    fold = held.shape[1]
    if held.ndim != 4 or held.shape[0] != x.shape[0] or held.shape[2:] != x.shape[2:] or fold > x.shape[1]:
        raise ShapeError(f"held {tuple(held.shape)} does not fit a frame of {tuple(x.shape)}")
    shifted = torch.empty_like(x)
    shifted[:, :fold] = held
    shifted[:, fold:] = x[:, fold:]
    return shifted, x[:, :fold]


class Pass(Protocol):
    """What one call of a network does at its layers that look at other frames."""

    frames: int  # of one clip, at this depth of the network; 1 in a call over single frames

    def shift(self, layer: int, x: Tensor, fold_div: int) -> Tensor:
        """The input of shifted layer `layer` after the shift; x (frames, C, H, W)."""

    def unshift(self, layer: int, x: Tensor) -> None:
        """Make x what it was before `shift`, once the layer has read it."""


# The call in progress, for the layers inside. Set for one call of one network in one thread (see `backbones.run`).
running: ContextVar[Pass] = ContextVar("tsm_pass")


class ClipPass:
    """A call over clips of T frames; frames are the fastest part of the batch axis. A temporal pool halves `frames`."""

    def __init__(self, frames: int, mode: ShiftMode, start: Start = "zeros") -> None:
        self.frames, self.mode, self.start = frames, mode, start

    def shift(self, layer: int, x: Tensor, fold_div: int) -> Tensor:
        """Frames (N * T, C, H, W) -> same shape."""
        clip = x.view(-1, self.frames, *x.shape[1:])  # (N, T, C, H, W)
        return shift_clip(clip, fold_div, self.mode, self.start).flatten(0, 1)

    def unshift(self, layer: int, x: Tensor) -> None:
        """Nothing: x is as it was."""


class StepPass:
    """A call over single frames: reads `held`, one tensor per shifted layer, and collects `next_held`.

    fresh (N,) bool marks frames that have no past and read their own channels instead; None: `held` has it all.
    in_place: the past lies in the frame's channels while the layer reads them, where a copy of the frame would cost
    more than the shift itself; not for gradients.
    """

    frames = 1

    def __init__(self, held: Sequence[Tensor], fresh: Tensor | None = None, in_place: bool = False) -> None:
        self.held = held
        self._in_place = in_place
        self.next_held: list[Tensor] = list(held)
        self._fresh = None if fresh is None else fresh.view(-1, 1, 1, 1)

    def shift(self, layer: int, x: Tensor, fold_div: int) -> Tensor:
        """Frames (N, C, H, W) -> same shape."""
        held = self.held[layer]
        if self._fresh is not None:
            held = torch.where(self._fresh, x[:, : held.shape[1]], held.to(x.dtype))
        if self._in_place:
            now = x[:, : held.shape[1]]
            self.next_held[layer] = now.clone()
            now.copy_(held)
            return x
        shifted, self.next_held[layer] = shift_step(x, held)
        return shifted

    def unshift(self, layer: int, x: Tensor) -> None:
        """Put the frame's own channels back."""
        if self._in_place:
            own = self.next_held[layer]
            x[:, : own.shape[1]] = own


class MeasurePass:
    """A call that shifts nothing and notes the shape (fold, H, W) of each layer's shift state in `spec`."""

    frames = 1

    def __init__(self) -> None:
        self.spec: list[tuple[int, int, int]] = []

    def shift(self, layer: int, x: Tensor, fold_div: int) -> Tensor:
        """The input as it is."""
        self.spec.append((x.shape[1] // fold_div, x.shape[2], x.shape[3]))
        return x

    def unshift(self, layer: int, x: Tensor) -> None:
        """Nothing: x is as it was."""
