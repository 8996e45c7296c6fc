"""Inference as the doors ask for it: tensors in, tensors out, alone or as one of a sequence of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from services.manager import NoCapacity
from tsm_core.errors import CallerError, WorldError
from tsm_core.zoo import UnknownModel

__all__ = [
    "BadInput",
    "InferReply",
    "InferRequest",
    "Inference",
    "ModelBusy",
    "ModelDescription",
    "ModelInUse",
    "ModelIndex",
    "ModelNotReady",
    "ModelStatistics",
    "NoCapacity",
    "OutOfStep",
    "RequestTimeout",
    "SequenceBusy",
    "SequenceCall",
    "TensorSpec",
    "UnknownModel",
    "UnknownSequence",
]

Datatype = Literal["BYTES", "UINT8", "INT64", "FP32", "FP64"]
Parameter = str | int | float | bool
VERSION = "1"  # every model has this one
MAX_IN_FLIGHT = 16  # requests of one sequence


class ModelNotReady(WorldError):
    """The model exists and no replica holds it at the moment."""

    reason = "model_not_ready"


class NotMine(WorldError):
    """The replica does not own the sequence; its frame was not counted, another replica goes on."""

    reason = "not_mine"


class BadInput(CallerError):
    """An input that the model does not take, or that cannot be read."""

    reason = "bad_input"


class UnknownSequence(CallerError):
    """A frame of a sequence that is over: it was ended, or evicted because it stood still too long."""

    reason = "unknown_sequence"


class OutOfStep(CallerError):
    """A frame that says which one it is, and is not the next of its sequence; it has no effect."""

    reason = "out_of_step"


class SequenceBusy(WorldError):
    """So many frames of this sequence are on their way that another is not taken."""

    reason = "sequence_busy"


class ModelBusy(WorldError):
    """So many requests wait that another is not taken."""

    reason = "model_busy"


class RequestTimeout(WorldError):
    """The answer did not come in time; whether a frame of a sequence was counted is not known."""

    reason = "timeout"


class ModelInUse(CallerError):
    """The model cannot be unloaded, as a stream names it."""

    reason = "model_in_use"


@dataclass(frozen=True, slots=True)
class SequenceCall:
    """Which sequence a request belongs to, whether it begins there, and whether it ends with it."""

    id: str
    start: bool = False
    end: bool = False


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request. Exactly one input is given; BYTES inputs are object arrays of bytes.

    version: empty for any. timestamp_s: the frame's own time, in a sequence; None: when it came. frame_number: which
    frame of the sequence its first one is, from 0; None: the next. outputs: names of those that are wanted; None: all.
    trace: a W3C traceparent.
    """

    model: str
    inputs: dict[str, np.ndarray]
    version: str = ""
    sequence: SequenceCall | None = None
    timestamp_s: float | None = None
    frame_number: int | None = None
    timeout_s: float = 30.0
    outputs: tuple[str, ...] | None = None
    trace: str | None = None


@dataclass(frozen=True, slots=True)
class InferReply:
    """What came of it. BYTES outputs are object arrays of bytes.

    parameters: `warmup` k/L, frames that the state has seen of those that matter; in a sequence also `epoch`,
    `frame_number` and `restored` (cold or checkpoint).
    """

    model: str
    version: str
    outputs: dict[str, np.ndarray]
    parameters: dict[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: a name, a datatype of the protocol, and a shape with -1 for what is free."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model as its metadata and configuration tell it.

    An input that comes in two forms (FP32 as the model wants it, UINT8 as a picture is) is listed twice, FP32 first.
    sequences: whether frames can be pushed one by one. max_frames: most frames, clips or pictures in one request.
    """

    name: str
    version: str
    platform: str
    ready: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    task: Literal["recognition", "detection"]
    mode: Literal["step", "window"]
    sequences: bool
    max_frames: int


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """A model that is loaded, or could be: `READY`, `LOADING`, `UNAVAILABLE` (not loaded), and why."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened, and how long it took in all, in seconds."""

    count: int
    total_s: float


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """One model's counters, summed over all replicas.

    inference_count: frames or clips that went through it, live streams' included; execution_count: steps they took.
    """

    name: str
    version: str
    inference_count: int
    execution_count: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class Inference(Protocol):
    """What the doors may ask for. Raises CallerError and WorldError families only."""

    async def infer(self, request: InferRequest) -> InferReply:
        """The outputs of one request.

        Raises UnknownModel, ModelNotReady, BadInput, ModelBusy, RequestTimeout, and for sequences UnknownSequence,
        OutOfStep, SequenceBusy and NoCapacity.
        """

    async def models(self) -> Sequence[ModelDescription]:
        """The models that are wanted, ordered by name; `ready` when a replica holds it."""

    async def ready(self, name: str) -> bool:
        """Whether a replica holds the model. Raises UnknownModel."""

    async def statistics(self, name: str | None = None) -> Sequence[ModelStatistics]:
        """Counters of one model or of all. Raises UnknownModel."""

    async def index(self) -> Sequence[ModelIndex]:
        """Every model that is loaded or could be, ordered by name."""

    async def load(self, name: str) -> None:
        """Have every replica load a model, and return when one holds it. Raises UnknownModel, RequestTimeout."""

    async def unload(self, name: str) -> None:
        """Have every replica let go of a model. Raises UnknownModel, ModelInUse."""
