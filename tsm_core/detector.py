"""TSMDetector: torchvision's detectors with a sense of time; the verbs, arena and errors are those of TSM.

`forward` and `step` end at the dense outputs, which are the same however frames are batched; `detect` makes boxes of
them, frame by frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsm_core.arena import Arena, Slot
from tsm_core.backbones import fold_batch_norm, passing, shifted_layers
from tsm_core.boxes import Boxes, cleaned, letterboxed
from tsm_core.detector_heads import FAMILIES, Dense, Features, chosen
from tsm_core.detector_nets import build_network
from tsm_core.detector_recipes import ARCHITECTURES, DetectorRecipe
from tsm_core.errors import ShapeError
from tsm_core.preprocess import by_size, normalise
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.shift import ClipPass, MeasurePass, StepPass

LEAST_TRUTH_PX = 1.0  # side of a box to be learnt, in pixels of the input


class TSMDetector(nn.Module):
    """A detector: a torchvision network (`net`) whose backbone's shifted layers see the frame before."""

    mode: Literal["step"] = "step"
    _output_of: Tensor  # (labels,)
    _label_of: Tensor  # (outputs,), -1 for those of no label

    def __init__(self, recipe: DetectorRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.source: dict[str, Any] = {}  # of imported weights: file, sha256, layout
        self.net: Any = build_network(recipe)
        self.memory_frames = shifted_layers(self.net)
        self._family = FAMILIES[ARCHITECTURES[recipe.architecture].family](recipe)
        self._anchors: Tensor | None = None
        label_of = torch.full((recipe.outputs,), -1)
        label_of[list(recipe.label_ids)] = torch.arange(len(recipe.labels))
        self.register_buffer("_output_of", torch.tensor(recipe.label_ids), persistent=False)
        self.register_buffer("_label_of", label_of, persistent=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of what it finds."""
        return self.recipe.labels

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the input."""
        height, width = self.recipe.input_size
        return height, width

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
        """Model input (N, 3, h, w) from uint8 pictures (3, H, W) of any sizes, letterboxed, on the model's device.

        Around a picture lies the mean colour, which is 0 to the network.
        """
        spec = _normalisation(self.recipe)

        def to_input(batch: Tensor) -> Tensor:
            scaled, pads = letterboxed(batch, self.input_size)
            pixels = normalise(scaled, spec)
            return functional.pad(pixels, pads) if any(pads) else pixels

        return by_size(images, to_input, self.device)

    def forward(self, clip: Tensor) -> Dense:
        """Dense outputs of clips (N, T, 3, h, w), preprocessed: N * T rows, a clip's frames one after the other.

        Raises ShapeError.
        """
        self._check_clip(clip)
        with passing(ClipPass(clip.shape[1], "uni", self.recipe.start)):
            return self._dense(clip.flatten(0, 1))

    @torch.no_grad()
    def step(
        self, frames: Tensor, arena: Arena, slots: Sequence[Slot], times_s: Sequence[float] | None = None
    ) -> Dense:
        """Dense outputs of one frame of each of N streams; reads and writes their shift state in `slots`.

        frames (N, 3, h, w), preprocessed. times_s is not needed. Raises ShapeError, SlotError. Needs eval mode: in
        training, batch norm would mix the streams.
        """
        if self.training:
            raise RuntimeError("step() needs eval mode: in training, batch norm mixes the streams; call model.eval()")
        expected = (len(slots), 3, *self.input_size)
        if tuple(frames.shape) != expected:
            raise ShapeError(f"frames must be {expected} for {len(slots)} slots, got {tuple(frames.shape)}")
        held = arena.gather(slots)
        how = StepPass(held.layers, held.fresh, in_place=True)
        with passing(how):
            dense = self._dense(frames)
        arena.scatter(slots, how.next_held)
        return dense

    @torch.no_grad()
    def detect(self, dense: Dense, score_thresh: float | None = None) -> list[Boxes]:
        """The boxes on each frame, best first, in pixels of the input; no more than the recipe's max_detections.

        score_thresh: the recipe's unless given. A box overlaps none of its label that is better by more than nms_iou.
        """
        thresh = self.recipe.score_thresh if score_thresh is None else score_thresh
        scored = self._family.scored(self.net, dense, self._anchors_of(dense.features))
        return [chosen(scores, boxes_at, self._label_of, self.recipe, thresh) for scores, boxes_at in scored]

    def losses(self, clip: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The terms of the training loss, of all frames of clips (N, T, 3, h, w); their sum is what to minimise.

        targets: N * T of them, in forward's order: boxes (M, 4) xyxy in pixels of the input, labels (M,) int64 index
        into the labels; M may be 0. Boxes are clipped to the input; what is then no box (a value that is not finite, a
        side of less than a pixel) is left out. Needs training mode. Raises ShapeError.
        """
        if not self.training:
            raise RuntimeError("losses() needs training mode: its targets are sampled there; call model.train()")
        self._check_clip(clip)
        frames = clip.flatten(0, 1)
        if len(targets) != len(frames):
            raise ShapeError(f"{len(targets)} targets do not fit {len(frames)} frames of clips {tuple(clip.shape)}")
        truth = [self._truth(target) for target in targets]
        with passing(ClipPass(clip.shape[1], "uni", self.recipe.start)):
            features = self._features(frames)
        return self._family.losses(self.net, frames, features, self._anchors_of(features), truth)

    def new_arena(
        self, slots: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Arena:
        """Room for the shift states of so many streams, on the model's device unless told otherwise."""
        where = self.device if device is None else device
        return Arena(_state_spec(self.recipe), slots, dtype, where, self.recipe.start)

    def warmup(self, arena: Arena, slot: Slot) -> tuple[int, int]:
        """(k, L) of the slot's latest result: earlier frames behind it, up to the L that can matter."""
        return min(max(arena.steps(slot) - 1, 0), self.memory_frames), self.memory_frames

    def check_steppable(self) -> None:
        """Every detector can be stepped."""

    def _check_clip(self, clip: Tensor) -> None:
        if clip.ndim != 5 or tuple(clip.shape[2:]) != (3, *self.input_size):
            raise ShapeError(f"clip must be (N, T, 3, {', '.join(map(str, self.input_size))}), got {tuple(clip.shape)}")

    def _features(self, frames: Tensor) -> Features:
        features: Tensor | Features = self.net.backbone(frames)
        return {"0": features} if isinstance(features, Tensor) else features

    def _dense(self, frames: Tensor) -> Dense:
        features = self._features(frames)
        return Dense(features, self._family.outputs(self.net, features))

    def _anchors_of(self, features: Features) -> Tensor:
        device = next(iter(features.values())).device
        if self._anchors is None or self._anchors.device != device:
            self._anchors = self._family.anchors(self.net, features)
        return self._anchors

    def _truth(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        boxes, labels = target["boxes"].to(self.device).float(), target["labels"].to(self.device)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or tuple(labels.shape) != (len(boxes),):
            raise ShapeError(
                f"a target has boxes (M, 4) and labels (M,), got {tuple(boxes.shape)}, {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.labels):
            raise ShapeError(f"labels {sorted(set(labels.tolist()))} of a target must be in 0..{len(self.labels) - 1}")
        height, width = self.input_size
        xyxy, fine = cleaned(boxes, (width, height), LEAST_TRUTH_PX)
        return {"boxes": xyxy[fine], "labels": self._output_of[labels[fine]]}


def build_detector(recipe: DetectorRecipe) -> TSMDetector:
    """A detector with random weights, in training mode."""
    return TSMDetector(recipe)


@lru_cache(maxsize=64)
def _normalisation(recipe: DetectorRecipe) -> PreprocessSpec:
    (red, green, blue), (red_std, green_std, blue_std) = recipe.mean, recipe.std
    return PreprocessSpec(mean=(red, green, blue), std=(red_std, green_std, blue_std))


@lru_cache(maxsize=64)
def _state_spec(recipe: DetectorRecipe) -> tuple[tuple[int, int, int], ...]:
    """Shape (fold, H, W) of each shifted layer's state, measured on a device that computes nothing."""
    measure = MeasurePass()
    with torch.device("meta"), torch.no_grad(), passing(measure):
        net: Any = build_network(recipe).eval()
        net.backbone(torch.empty(1, 3, *recipe.input_size))
    return tuple(measure.spec)
