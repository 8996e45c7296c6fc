"""TSM: forward(clip) and step(frames, arena, slots) with the same weights; WindowTSM: the same verbs over a ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tsm_core.arena import Arena, Slot, WindowArena
from tsm_core.backbones import build_backbone, fold_batch_norm, run, shifted_layers, state_spec
from tsm_core.errors import CallerError, ShapeError
from tsm_core.preprocess import preprocess
from tsm_core.recipes import Recipe
from tsm_core.shift import ClipPass, ShiftMode, StepPass


class NotSteppable(CallerError):
    """A model that needs the future was asked to go frame by frame."""

    reason = "not_steppable"


class TSM(nn.Module):
    """A recogniser: a torchvision network (`net`) whose shifted layers see neighbouring frames."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.source: dict[str, Any] = {}  # of imported weights: file, sha256, layout
        self.net = build_backbone(
            recipe.backbone,
            len(recipe.labels),
            shifted=recipe.shift != "none",
            fold_div=recipe.shift_div,
            dropout=recipe.dropout,
            non_local=recipe.non_local,
            temporal_pool=recipe.temporal_pool,
        )
        self.memory_frames = shifted_layers(self.net)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return self.recipe.labels

    @property
    def input_px(self) -> int:
        """Side of the square input."""
        return self.recipe.preprocess.input_px

    @property
    def mode(self) -> Literal["step", "window"]:
        """How the model is served live."""
        return "step" if self.recipe.steppable else "window"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def for_inference(self) -> Self:
        """The model itself, made fast for serving: eval mode, batch norm folded, channels last; no longer trainable."""
        self.eval().requires_grad_(requires_grad=False)
        fold_batch_norm(self.net)
        return self.to(memory_format=torch.channels_last)

    def preprocess(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Model input (N, 3, h, w) from uint8 pictures (3, H, W) of any sizes, on the model's device."""
        return preprocess(images, self.recipe.preprocess, self.device)

    def forward(self, clip: Tensor) -> Tensor:
        """Logits (N, K) of clips (N, T, 3, H, W), normalised: the mean over the frames that are left at the end."""
        return self.forward_frames(clip).mean(dim=1)

    def forward_frames(self, clip: Tensor) -> Tensor:
        """Logits (N, T, K) of every frame, before consensus; of T / 2 frames behind a temporal pool.

        clip (N, T, 3, H, W), normalised. Raises ShapeError.
        """
        if clip.ndim != 5 or clip.shape[2] != 3:
            raise ShapeError(f"clip must be (N, T, 3, H, W), got {tuple(clip.shape)}")
        mode: ShiftMode = "bi" if self.recipe.shift == "bi" else "uni"
        how = ClipPass(clip.shape[1], mode, self.recipe.start)
        logits = run(self.net, clip.flatten(0, 1), how)
        return logits.view(clip.shape[0], how.frames, logits.shape[-1])

    @torch.no_grad()
    def step(
        self, frames: Tensor, arena: Arena, slots: Sequence[Slot], times_s: Sequence[float] | None = None
    ) -> Tensor:
        """Logits (N, K) of one frame of each of N streams; reads and writes their shift state in `slots`.

        frames (N, 3, H, W), normalised, H = W = input_px. times_s is not needed. Raises NotSteppable, ShapeError,
        SlotError. Needs eval mode: in training, batch norm would mix the streams.
        """
        self.check_steppable()
        if self.training:
            raise RuntimeError("step() needs eval mode: in training, batch norm mixes the streams; call model.eval()")
        if frames.ndim != 4 or frames.shape[0] != len(slots) or tuple(frames.shape[1:]) != self._frame_shape:
            expected = (len(slots), *self._frame_shape)
            raise ShapeError(f"frames must be {expected} for {len(slots)} slots, got {tuple(frames.shape)}")
        held = arena.gather(slots)
        how = StepPass(held.layers, held.fresh, in_place=True)
        logits = run(self.net, frames, how)
        arena.scatter(slots, how.next_held)
        return logits

    def new_arena(
        self, slots: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Arena:
        """Room for the shift states of so many streams, on the model's device unless told otherwise."""
        self.check_steppable()
        spec = state_spec(self.net, self.input_px)
        return Arena(spec, slots, dtype, self.device if device is None else device, self.recipe.start)

    def warmup(self, arena: Arena, slot: Slot) -> tuple[int, int]:
        """(k, L) of the slot's latest result: earlier frames behind it, up to the L that can matter."""
        return min(max(arena.steps(slot) - 1, 0), self.memory_frames), self.memory_frames

    def check_steppable(self) -> None:
        """Raises NotSteppable, with the reason, when a frame needs more than its past."""
        recipe = self.recipe
        if recipe.steppable:
            return
        facts = {
            "shifts both ways": recipe.shift == "bi",
            "has non-local blocks, which look at all frames of a clip,": recipe.non_local is not None,
            "pools over time": recipe.temporal_pool,
        }
        why = [text for text, holds in facts.items() if holds]
        way_out = "its _uni twin or mode=window" if why == ["shifts both ways"] else "mode=window"
        raise NotSteppable(f"{recipe.name} {' and '.join(why)} and cannot be stepped; use {way_out}")

    @property
    def _frame_shape(self) -> tuple[int, int, int]:
        return 3, self.input_px, self.input_px


class WindowTSM(nn.Module):
    """A recogniser that needs whole clips, behind the verbs of one that is stepped.

    Every stream keeps a ring of T frames that spans window_s seconds; every stride_s (default: a quarter of the
    window) the ring goes through the model as one clip. Until the ring is full its oldest frame stands in for the
    missing ones.
    """

    mode: Literal["window"] = "window"

    def __init__(self, model: TSM, window_s: float | None = None, stride_s: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.recipe = model.recipe
        self.window_s = window_s or model.recipe.window_s
        self.stride_s = stride_s or model.recipe.stride_s or self.window_s / 4
        self.memory_frames = model.recipe.frames

    def for_inference(self) -> Self:
        """The model itself, made fast for serving and no longer trainable."""
        self.model.for_inference()
        return self.eval()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return self.model.labels

    @property
    def input_px(self) -> int:
        """Side of the square input."""
        return self.model.input_px

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def preprocess(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Model input (N, 3, h, w) from uint8 pictures (3, H, W) of any sizes, on the model's device."""
        return self.model.preprocess(images)

    def forward(self, clip: Tensor) -> Tensor:
        """Logits (N, K) of clips (N, T, 3, H, W), normalised."""
        logits: Tensor = self.model(clip)
        return logits

    @torch.no_grad()
    def step(
        self, frames: Tensor, arena: WindowArena, slots: Sequence[Slot], times_s: Sequence[float] | None = None
    ) -> Tensor:
        """Logits (N, K) of the streams whose result is due; rows of NaN for the others.

        frames (N, 3, H, W), normalised, one per stream, taken at times_s (N seconds, needed). Raises ShapeError,
        SlotError.
        """
        if times_s is None:
            raise ShapeError(f"{self.recipe.name} runs in window mode and needs times_s, one time per frame")
        if self.training:
            raise RuntimeError("step() needs eval mode: in training, batch norm mixes the streams; call model.eval()")
        due = arena.push(slots, frames, times_s)
        logits = frames.new_full((len(slots), len(self.labels)), float("nan"))
        if due:
            clips = arena.clips([slots[position] for position in due]).to(frames.dtype)
            rows = torch.tensor(due, dtype=torch.int64).to(frames.device, non_blocking=True)
            logits.index_copy_(0, rows, self.model(clips))
        return logits

    def new_arena(
        self, slots: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> WindowArena:
        """Rings for so many streams, on the model's device unless told otherwise."""
        shape = (3, self.input_px, self.input_px)
        where = self.device if device is None else device
        return WindowArena(self.recipe.frames, shape, slots, self.window_s, self.stride_s, dtype, where)

    def warmup(self, arena: WindowArena, slot: Slot) -> tuple[int, int]:
        """(k, T) of the slot's latest result: frames in the ring, of the T it holds."""
        return min(arena.steps(slot), self.memory_frames), self.memory_frames


def build(recipe: Recipe) -> TSM:
    """A model with random weights, in training mode."""
    return TSM(recipe)
