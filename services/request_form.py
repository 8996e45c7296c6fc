"""What a model takes and gives over the doors, and whether a request fits: judged without torch, at a gateway too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from services.inference import VERSION, BadInput, InferRequest, ModelDescription, TensorSpec, UnknownModel
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.recipes import Recipe

if TYPE_CHECKING:
    from services.served import Served

MAX_FRAMES = 64  # of one request that is no video
MAX_SEQUENCE_FRAMES = 16  # of one request in a sequence
MAX_ASPECT = 32  # long side over short side of a picture
MAX_ID = 128  # characters of a sequence's id
MAX_TIMESTAMP_S = 1e10
PLATFORM = "tsm_torch"

Array = np.ndarray[Any, Any]


def describe_model(name: str, recipe: Recipe | DetectorRecipe, *, window: bool, ready: bool = True) -> ModelDescription:
    """The model's inputs and outputs. window: it is served in window mode."""
    detects = isinstance(recipe, DetectorRecipe)
    if isinstance(recipe, DetectorRecipe):
        height, width = recipe.input_size
    else:
        height = width = recipe.preprocess.input_px
    length = recipe.frames if isinstance(recipe, Recipe) and window else -1
    inputs = [TensorSpec("frame", "FP32", (-1, 3, height, width)), TensorSpec("frame", "UINT8", (-1, -1, -1, 3))]
    if not detects:
        inputs += [
            TensorSpec("clip", "FP32", (-1, length, 3, height, width)),
            TensorSpec("clip", "UINT8", (-1, length, -1, -1, 3)),
        ]
    inputs += [TensorSpec("image", "BYTES", (-1,)), TensorSpec("video", "BYTES", (1,))]
    return ModelDescription(
        name=name,
        version=VERSION,
        platform=PLATFORM,
        ready=ready,
        inputs=tuple(inputs),
        outputs=_detector_outputs() if detects else _recogniser_outputs(len(recipe.labels)),
        labels=tuple(recipe.labels),
        task="detection" if detects else "recognition",
        mode="window" if window else "step",
        sequences=not window,
        max_frames=MAX_FRAMES,
    )


def description_of(served: Served[Any]) -> ModelDescription:
    """A model that a replica holds."""
    return describe_model(served.name, served.recipe, window=served.model.mode == "window")


def _recogniser_outputs(classes: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("logits", "FP32", (-1, classes)),
        TensorSpec("scores", "FP32", (-1, classes)),
        TensorSpec("label", "BYTES", (-1,)),
        TensorSpec("time_s", "FP64", (-1,)),
    )


def _detector_outputs() -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("boxes", "FP32", (-1, 4)),
        TensorSpec("box_scores", "FP32", (-1,)),
        TensorSpec("box_labels", "BYTES", (-1,)),
        TensorSpec("frame_index", "INT64", (-1,)),
        TensorSpec("track_ids", "BYTES", (-1,)),
    )


def check_request(request: InferRequest, about: ModelDescription) -> tuple[str, Array]:
    """The name and the array of the request's input. Raises BadInput, UnknownModel."""
    if request.version not in ("", VERSION):
        raise UnknownModel(
            f"model {request.model!r} has no version {request.version!r}; its version is {VERSION}, or leave it out"
        )
    if request.sequence:
        _check_sequence(request, about)
    names = list(dict.fromkeys(spec.name for spec in about.inputs))
    if len(request.inputs) != 1:
        raise BadInput(f"one input is needed, got {len(request.inputs)}; {request.model} takes {', '.join(names)}")
    ((name, array),) = request.inputs.items()
    if name not in names:
        raise BadInput(f"{request.model} has no input {name!r}; it takes {', '.join(names)}")
    told = [spec.name for spec in about.outputs]
    if unknown := sorted(set(request.outputs or ()) - set(told)):
        raise BadInput(f"{request.model} has no output {', '.join(unknown)}; it gives {', '.join(told)}")
    forms = [spec for spec in about.inputs if spec.name == name]
    for spec in forms:
        if _datatype(array) == spec.datatype and _fits(array.shape, spec.shape):
            break
    else:
        wanted = " or ".join(f"{spec.datatype} {list(spec.shape)}" for spec in forms)
        raise BadInput(
            f"input {name!r} of {request.model} is {_datatype(array)} {list(array.shape)}, needed is {wanted}"
        )
    if not array.size:
        raise BadInput(f"input {name!r} is empty: its shape is {list(array.shape)}")
    frames = array.shape[0] * array.shape[1] if name == "clip" else array.shape[0]
    most = MAX_SEQUENCE_FRAMES if request.sequence else MAX_FRAMES
    if frames > most:
        raise BadInput(f"input {name!r} has {frames} frames, a request may have {most}; send several")
    if array.dtype == np.uint8:
        check_aspect(array.shape[-2], array.shape[-3])
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise BadInput(f"input {name!r} has values that are not finite")
    return name, array


def check_aspect(width: int, height: int) -> None:
    """Raises BadInput for a picture so long that a small one becomes a huge one when its short side is enlarged."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadInput(
            f"a picture of {width}x{height} is too long: one side may be {MAX_ASPECT} times the other; cut it"
        )


def _check_sequence(request: InferRequest, about: ModelDescription) -> None:
    """Raises BadInput when the request cannot be one of a sequence."""
    if not about.sequences:
        raise BadInput(
            f"{about.name} sees whole clips and has no sequences; send `clip` or `video`, or use its _uni twin"
        )
    if request.sequence and not 0 < len(request.sequence.id) <= MAX_ID:
        raise BadInput(f"sequence_id has {len(request.sequence.id)} characters, it must have 1 to {MAX_ID}")
    if name := next((name for name in request.inputs if name not in ("frame", "image")), None):
        raise BadInput(f"a sequence is made of `frame` or `image`, not of {name!r}; leave sequence_id out")
    at_s = request.timestamp_s
    if at_s is not None and not 0 <= at_s < MAX_TIMESTAMP_S:
        raise BadInput(
            f"timestamp {at_s} s must be 0 or more, and below {MAX_TIMESTAMP_S:g}: seconds, Unix time or not"
        )


def _datatype(array: Array) -> str:
    kind = str(array.dtype)
    return {"float32": "FP32", "uint8": "UINT8", "object": "BYTES"}.get(kind, kind)


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(side in (-1, own) for own, side in zip(shape, wanted, strict=True))
