"""Models for other runtimes: ONNX files and torch.export programs, over clips or frame by frame."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from tsm_core.backbones import fold_batch_norm, run, state_spec
from tsm_core.errors import CallerError
from tsm_core.model import TSM, WindowTSM
from tsm_core.shift import OFFSETS, ClipPass, ShiftMode, Start, StepPass

Format = Literal["onnx", "torch"]
Form = Literal["clip", "step"]

FORMAT = "tsm-live-export/1"
METADATA_FILE = "tsm_live.json"  # among the extra files of a torch.export program
ONNX_PACKAGES = ("onnx", "onnxscript")
EXAMPLES = 2  # a batch of one would be taken for a constant


class ExportError(CallerError):
    """A model cannot be written this way."""

    reason = "cannot_export"


def export_model(model: TSM | WindowTSM, path: Path | str, format: Format = "onnx", what: Form = "clip") -> None:
    """Write the network in eval mode, norms folded into convolutions, to `path`, all or nothing.

    clip: `clip` (N, T, 3, H, W) -> `logits` (N, K). step: `frames` (N, 3, H, W), `state_0` ... (N, fold, H', W') ->
    `logits` (N, K), `next_state_0` ...; states are zeros for a new stream. Where a stream starts from its own
    channels there is a last input `fresh` (N,) bool, true for its first frame. N may vary, all else is the recipe's.
    Pixels come normalised; the recipe (labels, preprocessing) is in the file: as `recipe` in ONNX metadata, in
    `tsm_live.json` of the extra files of a torch program (.pt2).
    Raises NotSteppable, ExportError.
    """
    network = model.model if isinstance(model, WindowTSM) else model
    if format not in ("onnx", "torch") or what not in ("clip", "step"):
        raise ExportError(f"format {format!r} must be 'onnx' or 'torch', and what {what!r} 'clip' or 'step'")
    if what == "step":
        network.check_steppable()
    metadata = {"format": FORMAT, "form": what, "recipe": network.recipe.to_json()}
    program, inputs, outputs = _program(network, what)
    content = _onnx(program, inputs, outputs, metadata) if format == "onnx" else _torch(program, metadata)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


class _JoinedClips(ClipPass):
    """The clip's shift as slices put together: runtimes have no writing into slices, and do not need it."""

    def shift(self, layer: int, x: Tensor, fold_div: int) -> Tensor:
        clip = x.view(-1, self.frames, *x.shape[1:])  # (N, T, C, H, W)
        fold = clip.shape[2] // fold_div
        offsets = OFFSETS[self.mode]
        groups = [_moved(clip[:, :, n * fold : (n + 1) * fold], offset, self.start) for n, offset in enumerate(offsets)]
        return torch.cat([*groups, clip[:, :, len(offsets) * fold :]], dim=2).flatten(0, 1)


def _moved(group: Tensor, offset: int, start: Start) -> Tensor:
    kept, border = (group[:, 1:], group[:, -1:]) if offset > 0 else (group[:, :-1], group[:, :1])
    if start == "own":
        return torch.cat([kept, border] if offset > 0 else [border, kept], dim=1)
    return functional.pad(kept, (0, 0) * 3 + ((0, 1) if offset > 0 else (1, 0)))


class _JoinedSteps(StepPass):
    """One frame's shift, likewise."""

    def shift(self, layer: int, x: Tensor, fold_div: int) -> Tensor:
        held = self.held[layer]
        own = x[:, : held.shape[1]]
        if self._fresh is not None:
            held = torch.where(self._fresh, own, held)
        self.next_held[layer] = own
        return torch.cat([held, x[:, held.shape[1] :]], dim=1)


class _ClipForm(nn.Module):
    def __init__(self, net: nn.Module, mode: ShiftMode, start: Start) -> None:
        super().__init__()
        self.net, self.mode, self.start = net, mode, start

    def forward(self, clip: Tensor) -> Tensor:
        how = _JoinedClips(clip.shape[1], self.mode, self.start)
        logits = run(self.net, clip.flatten(0, 1), how)
        return logits.view(-1, how.frames, logits.shape[1]).mean(dim=1)


class _StepForm(nn.Module):
    def __init__(self, net: nn.Module, start: Start) -> None:
        super().__init__()
        self.net, self.start = net, start

    def forward(self, frames: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        held, fresh = (past[:-1], past[-1]) if self.start == "own" else (past, None)
        how = _JoinedSteps(held, fresh)
        return run(self.net, frames, how), *how.next_held


def _program(model: TSM, what: Form) -> tuple[ExportedProgram, list[str], list[str]]:
    """The traced network, and the names of its inputs and outputs."""
    recipe, px = model.recipe, model.input_px
    # plain strides: a trace keeps those it met
    net = copy.deepcopy(model.net).to("cpu", torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    net.eval().requires_grad_(requires_grad=False)
    fold_batch_norm(net)
    batch = {0: Dim("N", min=1)}
    if what == "clip":
        form: nn.Module = _ClipForm(net, "bi" if recipe.shift == "bi" else "uni", recipe.start)
        example: tuple[Tensor, ...] = (torch.zeros(EXAMPLES, recipe.frames, 3, px, px),)
        shapes: dict[str, Any] = {"clip": batch}
        inputs, outputs = ["clip"], ["logits"]
    else:
        form = _StepForm(net, recipe.start)
        states = [torch.zeros(EXAMPLES, *shape) for shape in state_spec(net, px)]
        fresh = [torch.zeros(EXAMPLES, dtype=torch.bool)] if recipe.start == "own" else []
        example = (torch.zeros(EXAMPLES, 3, px, px), *states, *fresh)
        shapes = {"frames": batch, "past": (batch,) * (len(example) - 1)}
        names = [f"state_{layer}" for layer in range(len(states))]
        inputs = ["frames", *names, *(["fresh"] if fresh else [])]
        outputs = ["logits", *(f"next_{name}" for name in names)]
    return torch.export.export(form, example, dynamic_shapes=shapes), inputs, outputs


def _torch(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    return buffer.getvalue()


def _onnx(program: ExportedProgram, inputs: list[str], outputs: list[str], metadata: dict[str, str]) -> bytes:
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"ONNX needs {' and '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}, or export format 'torch'",
            reason="missing_package",
        )
    exported = torch.onnx.export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    assert exported is not None
    exported.model.metadata_props.update(metadata)
    content: bytes = exported.model_proto.SerializeToString()
    return content
