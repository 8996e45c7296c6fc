"""What both doors of the Open Inference Protocol v2 mean: parameters, outputs asked for, metadata, statistics."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from services.inference import (
    VERSION,
    BadInput,
    Duration,
    Inference,
    InferReply,
    InferRequest,
    ModelDescription,
    ModelNotReady,
    ModelStatistics,
    Parameter,
    SequenceCall,
    UnknownModel,
)
from services.locks.callers import Caller, Forbidden
from services.tensors import Array
from services.tracing import current_traceparent

SERVER = "tsm-live"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "sequence",
    "sequence(string_id)",
    "statistics",
)
MAX_SEQUENCE_ID = 2**64 - 1
MAX_SEQUENCE_ID_BYTES = 128
MAX_TIMEOUT_S = 3600.0
SMALL_BYTES = 64 << 10  # reading and writing so much takes less than going to a thread and back, or hardly more

Result = TypeVar("Result")


class ModelNotFound(UnknownModel):
    """The model or the version that an address names does not exist."""


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output that is asked for; classes: how many of the best classes are told instead of the tensor."""

    name: str
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """An inference request as a door read it. outputs: empty for all; id: given back as it came."""

    model: str
    version: str
    id: str
    inputs: dict[str, Array]
    parameters: Mapping[str, Parameter]
    outputs: Sequence[WantedOutput] = field(default_factory=tuple)


async def off_loop(nbytes: int, work: Callable[..., Result], *args: Any) -> Result:
    """What the work gives; so many bytes of it that others would wait are worked on in a thread."""
    return work(*args) if nbytes <= SMALL_BYTES else await asyncio.to_thread(work, *args)


@contextlib.contextmanager
def model_in_address() -> Iterator[None]:
    """Where the address names the model, an unknown one is an address that leads nowhere."""
    try:
        yield
    except UnknownModel as error:
        raise ModelNotFound(str(error)) from None


async def describe(inference: Inference, model: str, version: str = "") -> ModelDescription:
    """The model's description. Raises ModelNotFound."""
    check_version(model, version)
    models = await inference.models()
    for one in models:
        if one.name == model:
            return one
    raise ModelNotFound(f"there is no model {model!r}; there are {', '.join(one.name for one in models) or 'none'}")


async def infer(inference: Inference, call: Call, caller: Caller | None = None, trace: str | None = None) -> InferReply:
    """The reply with the outputs that are asked for, in that order.

    Raises what Inference.infer does, ModelNotFound, and Forbidden for a sequence that the caller may not see.
    """
    sequence, timestamp_s, timeout_s, frame_number = read_parameters(call.parameters)
    if sequence is not None and caller is not None and not caller.sees(sequence.id):
        raise Forbidden(f"{caller.name!r} may push to {', '.join(caller.streams or ())} only, not to {sequence.id!r}")
    wanted = tuple(dict.fromkeys(one.name for one in call.outputs))
    if len(wanted) < len(call.outputs):
        raise BadInput("an output is asked for twice")
    labels: tuple[str, ...] = ()
    if any(one.classes for one in call.outputs):
        labels = await _labels(inference, call)
    request = InferRequest(
        model=call.model,
        version=call.version,
        inputs=call.inputs,
        sequence=sequence,
        timestamp_s=timestamp_s,
        frame_number=frame_number,
        outputs=wanted or None,
        trace=current_traceparent() or trace,
        **({} if timeout_s is None else {"timeout_s": timeout_s}),
    )
    with model_in_address():
        reply = await inference.infer(request)
    if not call.outputs:
        return reply
    if missing := [name for name in wanted if name not in reply.outputs]:
        raise BadInput(f"{call.model} gives no {', '.join(missing)} here; it gives {', '.join(reply.outputs)}")
    outputs = {
        one.name: best_classes(reply.outputs[one.name], one.classes, labels) if one.classes else reply.outputs[one.name]
        for one in call.outputs
    }
    return InferReply(reply.model, reply.version, outputs, reply.parameters)


async def _labels(inference: Inference, call: Call) -> tuple[str, ...]:
    about = await describe(inference, call.model, call.version)
    recognises = about.task == "recognition"
    classified = [spec.name for spec in about.outputs if recognises and spec.shape[1:] == (len(about.labels),)]
    for one in call.outputs:
        if one.classes and one.name not in classified:
            raise BadInput(f"output {one.name!r} has no classes; those that have are {', '.join(classified) or 'none'}")
    return about.labels


def best_classes(rows: Array, count: int, labels: Sequence[str]) -> Array:
    """The `count` best classes of every row (N, K), as BYTES (N, min(count, K)) of `value:index:label`."""
    best = np.argsort(-rows, axis=1, kind="stable")[:, :count]
    texts = np.empty(best.shape, np.object_)
    for at, index in np.ndenumerate(best):
        texts[at] = f"{rows[at[0], index]:f}:{index}:{labels[int(index)]}".encode()
    return texts


def size_of(reply: InferReply) -> int:
    """Bytes of the reply's tensors, without what BYTES hold."""
    return sum(array.nbytes for array in reply.outputs.values())


# ---- parameters


def read_sequence_id(parameters: Mapping[str, Parameter]) -> str:
    """The sequence's name; a number is its decimal text, 0 and "" are no sequence. Raises BadInput."""
    given = parameters.get("sequence_id", "")
    if isinstance(given, str):
        if not given.isprintable() or len(given.encode()) > MAX_SEQUENCE_ID_BYTES:
            raise BadInput(f"sequence_id must be printable text of at most {MAX_SEQUENCE_ID_BYTES} bytes")
        return given
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= MAX_SEQUENCE_ID:
        raise BadInput(f"sequence_id must be text or an integer from 0 to {MAX_SEQUENCE_ID}")
    return str(given) if given else ""


def read_parameters(
    parameters: Mapping[str, Parameter],
) -> tuple[SequenceCall | None, float | None, float | None, int | None]:
    """(sequence, timestamp in seconds, timeout in seconds, frame number); parameters not known say nothing.

    Raises BadInput for one that is known and has a value that it cannot have.
    """
    sequence_id = read_sequence_id(parameters)
    start, end = flag(parameters, "sequence_start"), flag(parameters, "sequence_end")
    if (start or end) and not sequence_id:
        raise BadInput("sequence_start and sequence_end need a sequence_id that is not 0 or empty")
    timeout_us = _whole(parameters, "timeout")
    _whole(parameters, "priority")  # every request has the same here
    return (
        SequenceCall(sequence_id, start, end) if sequence_id else None,
        _seconds(parameters, "timestamp"),
        min(timeout_us / 1e6, MAX_TIMEOUT_S) if timeout_us else None,
        _whole(parameters, "frame_number") if "frame_number" in parameters else None,
    )


def flag(parameters: Mapping[str, Parameter], name: str, default: bool = False) -> bool:
    """A parameter that is true or false. Raises BadInput."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadInput(f"parameter {name} must be true or false")
    return value


def _whole(parameters: Mapping[str, Parameter], name: str) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadInput(f"parameter {name} must be an integer, 0 or more")
    return value


def _seconds(parameters: Mapping[str, Parameter], name: str) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    try:
        seconds = math.nan if isinstance(value, bool | str) else float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise BadInput(f"parameter {name} must be a finite number of seconds")
    return seconds


def classes_asked_for(name: str, value: Parameter) -> int:
    """How many classes an output's parameter `classification` asks for. Raises BadInput."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInput(f"classification of output {name!r} must be an integer, 1 or more")
    return value


# ---- what is told of models, as JSON and as messages of the same names


def server_metadata() -> dict[str, Any]:
    """Who answers, and which extensions of the protocol are there."""
    return {"name": SERVER, "version": _version(), "extensions": list(EXTENSIONS)}


def _version() -> str:
    try:
        return importlib.metadata.version("tsm-live")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def model_metadata(about: ModelDescription) -> dict[str, Any]:
    """A model's inputs and outputs."""

    def tensors(kind: str) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in getattr(about, kind)]

    return {
        "name": about.name,
        "versions": [about.version],
        "platform": about.platform,
        "inputs": tensors("inputs"),
        "outputs": tensors("outputs"),
    }


def model_config(about: ModelDescription) -> dict[str, Any]:
    """A model's configuration: every dimension is listed, so `max_batch_size` is 0; any one of the inputs is enough."""

    def tensors(kind: str, **more: bool) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "data_type": "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}",
                "dims": list(spec.shape),
                **more,
            }
            for spec in getattr(about, kind)
        ]

    parameters = {
        "task": about.task,
        "mode": about.mode,
        "max_frames": str(about.max_frames),
        "labels": json.dumps(about.labels),
    }
    return {
        "name": about.name,
        "platform": about.platform,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": tensors("inputs", optional=True),
        "output": tensors("outputs"),
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
        **({"sequence_batching": {}} if about.sequences else {}),
    }


def statistics(counted: Sequence[ModelStatistics]) -> dict[str, Any]:
    """Counters of models, durations in nanoseconds."""
    return {"model_stats": [_statistics(one) for one in counted]}


def _statistics(one: ModelStatistics) -> dict[str, Any]:
    durations = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "name": one.name,
        "version": one.version,
        "inference_count": one.inference_count,
        "execution_count": one.execution_count,
        "inference_stats": {name: _duration(getattr(one, name)) for name in durations},
        "batch_stats": [],
    }


def _duration(took: Duration) -> dict[str, int]:
    return {"count": took.count, "ns": round(took.total_s * 1e9)}


# ---- what is asked of models by their address


async def check_ready(inference: Inference) -> None:
    """Return when a model can be asked. Raises ModelNotReady."""
    if not any(one.ready for one in await inference.models()):
        raise ModelNotReady("no model is ready; it takes a few seconds after the start")


async def model_ready(inference: Inference, model: str, version: str) -> bool:
    """Whether a replica holds the model. Raises ModelNotFound."""
    check_version(model, version)
    with model_in_address():
        return await inference.ready(model)


async def statistics_of(inference: Inference, model: str, version: str) -> dict[str, Any]:
    """Counters of one model, or of all where `model` is empty. Raises ModelNotFound."""
    check_version(model, version)
    with model_in_address():
        return statistics(await inference.statistics(model or None))


async def load(inference: Inference, model: str, parameters: Iterable[str]) -> None:
    """Load a model as it is stored. Raises BadInput, ModelNotFound and what Inference.load does."""
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise BadInput(f"parameter {name!r} is not taken: a model is loaded as it is stored, in models.dir")
    with model_in_address():
        await inference.load(model)


async def unload(inference: Inference, model: str) -> None:
    """Let go of a model. Raises ModelNotFound and what Inference.unload does."""
    with model_in_address():
        await inference.unload(model)


def check_version(model: str, version: str) -> None:
    """Raise ModelNotFound unless the version is any or the one there is."""
    if version not in ("", VERSION):
        raise ModelNotFound(f"model {model!r} has no version {version!r}; it has {VERSION}")
