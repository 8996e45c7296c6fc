"""A model small enough to check by hand, behind the interface that the doors speak to."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np
from PIL import Image

from services.inference import (
    BadInput,
    Duration,
    InferReply,
    InferRequest,
    ModelDescription,
    ModelIndex,
    ModelInUse,
    ModelStatistics,
    TensorSpec,
    UnknownModel,
    UnknownSequence,
)

NAME = "colours"
LABELS = ("red", "green", "blue")
ABOUT = ModelDescription(
    name=NAME,
    version="1",
    platform="numpy",
    ready=True,
    inputs=(
        TensorSpec("frame", "FP32", (-1, 3, 2, 2)),
        TensorSpec("frame", "UINT8", (-1, -1, -1, 3)),
        TensorSpec("image", "BYTES", (-1,)),
    ),
    outputs=(
        TensorSpec("logits", "FP32", (-1, 3)),
        TensorSpec("label", "BYTES", (-1,)),
        TensorSpec("frame_index", "INT64", (-1,)),
    ),
    labels=LABELS,
    task="recognition",
    mode="step",
    sequences=True,
    max_frames=64,
)


class ColourInference:
    """How red, green and blue a frame is; in a sequence, halfway between that and what was before.

    gates: sequences whose frames wait until theirs is set. seen: requests in the order in which they were answered.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As when it was new."""
        self.gates: dict[str, threading.Event] = {}
        self.held: dict[str, np.ndarray] = {}
        self.ended: set[str] = set()
        self.loaded = {NAME}
        self.seen: list[InferRequest] = []
        self.at_once = 0

    async def infer(self, request: InferRequest) -> InferReply:
        self._known(request.model)
        self.at_once += 1
        try:
            if request.sequence and request.sequence.id in self.gates:
                with anyio.fail_after(20):
                    while not self.gates[request.sequence.id].is_set():
                        await anyio.sleep(0.005)
            colours = _colours(request.inputs)
        finally:
            self.at_once -= 1
        rows = np.stack([self._step(request, row) for row in colours])
        self.seen.append(request)
        labels = np.empty(len(rows), object)
        labels[:] = [LABELS[row.argmax()].encode() for row in rows]
        outputs = {"logits": rows, "label": labels, "frame_index": np.arange(len(rows))}
        wanted = request.outputs or tuple(outputs)
        return InferReply(NAME, "1", {name: outputs[name] for name in wanted if name in outputs}, {"warmup": "1/1"})

    def _step(self, request: InferRequest, row: np.ndarray) -> np.ndarray:
        call = request.sequence
        if call is None:
            return row
        if call.id in self.ended and not call.start:
            raise UnknownSequence(f"sequence {call.id!r} is over; begin anew with sequence_start")
        self.ended.discard(call.id)
        now = row if call.start or call.id not in self.held else (self.held[call.id] + row) / 2
        self.held[call.id] = now.astype("f4")
        if call.end:
            self.ended.add(call.id)
            del self.held[call.id]
        return now

    async def models(self) -> Sequence[ModelDescription]:
        return [ABOUT] if self.loaded else []

    async def ready(self, name: str) -> bool:
        self._known(name)
        return True

    async def statistics(self, name: str | None = None) -> Sequence[ModelStatistics]:
        if name:
            self._known(name)
        took = Duration(len(self.seen), 0.001 * len(self.seen))
        return [ModelStatistics(NAME, "1", took.count, took.count, took, Duration(0, 0), took, took, took, took)]

    async def index(self) -> Sequence[ModelIndex]:
        return [
            ModelIndex(NAME, "1", "READY" if self.loaded else "UNAVAILABLE"),
            ModelIndex("shapes", "1", "UNAVAILABLE", "not loaded"),
        ]

    async def load(self, name: str) -> None:
        if name != NAME:
            raise UnknownModel(f"model {name!r} does not exist here")
        self.loaded.add(name)

    async def unload(self, name: str) -> None:
        self._known(name)
        if self.held:
            raise ModelInUse(f"model {name!r} is in use")
        self.loaded.discard(name)

    def _known(self, name: str) -> None:
        if name not in self.loaded:
            raise UnknownModel(f"there is no model {name!r}; there are {', '.join(self.loaded) or 'none'}")


def _colours(inputs: dict[str, Any]) -> np.ndarray:
    if len(inputs) != 1:
        raise BadInput(f"one input is needed, got {len(inputs)}")
    ((name, array),) = inputs.items()
    if name == "image" and array.dtype == object and array.ndim == 1 and array.size:
        try:
            array = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in array])
        except OSError:
            raise BadInput(f"input {name!r} is no picture") from None
    if array.size and array.ndim == 4:
        if array.dtype == np.uint8 and array.shape[3] == 3:
            return (array.mean((1, 2)) / 255).astype("f4")
        if array.dtype == np.float32 and array.shape[1] == 3:
            return array.mean((2, 3), dtype="f8").astype("f4")
    raise BadInput(f"input {name!r} is {array.dtype} {list(array.shape)}")
