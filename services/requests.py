"""Requests that stand alone, on one replica: what an input may be, how it becomes pixels, and the answer's tensors."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.infer import FrameResult, infer_file
from pipelines.media_limits import MediaLimits, checked_video, decode_image
from services.inference import (
    VERSION,
    BadInput,
    InferReply,
    InferRequest,
    ModelBusy,
    ModelDescription,
    ModelNotReady,
    Parameter,
    RequestTimeout,
    TensorSpec,
    UnknownModel,
)
from services.served import Model, Served, model_input
from services.telemetry import Telemetry
from tsm_core.boxes import detections_on
from tsm_core.detector import TSMDetector
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.model import TSM, WindowTSM
from tsm_core.postprocess import new_smoother
from tsm_core.recipes import Recipe
from tsm_core.types import Detection, Frame, Track

MAX_FRAMES = 64  # of one request that is no video
MAX_WAITING = 64  # requests per lane
MAX_SEQUENCE_FRAMES = 16  # of one request in a sequence
MAX_ASPECT = 32  # long side over short side of a picture
MAX_ID = 128  # characters of a sequence's id
MAX_TIMESTAMP_S = 1e10
PLATFORM = "tsm_torch"

Array = np.ndarray[Any, Any]


# ---- what a model takes and gives


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


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a request: uint8 (3, H, W), or float32 (3, h, w) that is model input already."""

    pixels: Tensor

    @property
    def image(self) -> Tensor:
        """uint8 (3, H, W) of the picture's size; black where there is model input alone."""
        if self.pixels.dtype == torch.uint8:
            return self.pixels
        return torch.zeros((), dtype=torch.uint8).expand(self.pixels.shape)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.pixels.shape[-1], self.pixels.shape[-2]


Open = Callable[[], Picture]  # decodes when it is called: a request waits as small as it came


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
        _check_aspect(array.shape[-2], array.shape[-3])
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise BadInput(f"input {name!r} has values that are not finite")
    return name, array


def _check_aspect(width: int, height: int) -> None:
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


def pictures_of(name: str, array: Array, limits: MediaLimits) -> list[Open]:
    """The pictures of a `frame` or `image` input, in order; each is decoded when it is opened.

    Opening raises BadInput, BadMedia, MediaTooLarge.
    """
    if name == "image":
        return [partial(_decoded, bytes(data), limits) for data in array]
    return [partial(_given, one) for one in array]


def _decoded(data: bytes, limits: MediaLimits) -> Picture:
    picture = Picture(decode_image(data, limits))
    _check_aspect(*picture.size)
    return picture


def _given(array: Array) -> Picture:
    return Picture(_to_tensor(array))


def _to_tensor(array: Array) -> Tensor:
    """A frame (3, H, W) float32, or (H, W, 3) uint8 -> (3, H, W)."""
    tensor = torch.from_numpy(np.array(array))  # what came over the wire may be read-only
    return tensor.permute(2, 0, 1).contiguous() if tensor.dtype == torch.uint8 else tensor


# ---- answers


def as_bytes(texts: Sequence[str]) -> Array:
    """A BYTES tensor of texts."""
    array = np.empty(len(texts), dtype=np.object_)
    array[:] = [text.encode() for text in texts]
    return array


def score_tensors(
    logits: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], labels: Sequence[str]
) -> dict[str, Array]:
    """Outputs of a recogniser from N rows."""
    rows = np.asarray(scores, dtype=np.float64).reshape(len(scores), len(labels))
    return {
        "logits": np.asarray(logits, dtype=np.float32).reshape(len(logits), len(labels)),
        "scores": rows.astype(np.float32),
        "label": as_bytes([labels[int(index)] for index in rows.argmax(axis=1)]),
    }


def box_tensors(frames: Sequence[Sequence[Detection] | Sequence[Track]], *, tracked: bool) -> dict[str, Array]:
    """Outputs of a detector from what is on each of N frames."""
    flat = [(index, found) for index, frame in enumerate(frames) for found in frame]
    outputs = {
        "boxes": np.asarray([found.xyxy for _, found in flat], dtype=np.float32).reshape(len(flat), 4),
        "box_scores": np.asarray([found.score for _, found in flat], dtype=np.float32),
        "box_labels": as_bytes([found.label for _, found in flat]),
        "frame_index": np.asarray([index for index, _ in flat], dtype=np.int64),
    }
    if tracked:
        outputs["track_ids"] = as_bytes([found.track_id for _, found in flat if isinstance(found, Track)])
    return outputs


def reply_of(
    request: InferRequest, outputs: dict[str, Array], warmup: tuple[int, int], **parameters: Parameter
) -> InferReply:
    """The answer with those outputs that are wanted."""
    if request.outputs is not None:
        outputs = {name: array for name, array in outputs.items() if name in request.outputs}
    said: dict[str, Parameter] = {"warmup": f"{warmup[0]}/{warmup[1]}", **parameters}
    return InferReply(request.model, VERSION, outputs, said)


# ---- work


@dataclass(frozen=True, slots=True)
class _Job:
    request: InferRequest
    model: Model
    arrived_s: float
    answer: Future[InferReply]

    @property
    def deadline_s(self) -> float:
        return self.arrived_s + self.request.timeout_s

    def check_time(self) -> None:
        """Raises RequestTimeout."""
        if time.monotonic() > self.deadline_s:
            raise RequestTimeout(
                f"{self.request.model} had no answer within {self.request.timeout_s:g} s; send less, or give it longer"
            )


class _Lane:
    """One thread that answers requests in their order, of which a bounded number wait."""

    def __init__(self, name: str, answer: Callable[[_Job], InferReply]) -> None:
        self._answer = answer
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: _Job) -> None:
        """Queue a job. Raises ModelBusy."""
        with self._changed:
            if self._closed:
                raise ModelNotReady("the replica is stopping; try again")
            if len(self._jobs) >= MAX_WAITING:
                raise ModelBusy(
                    f"{len(self._jobs)} requests wait already; try again in a moment, or send fewer at once"
                )
            self._jobs.append(job)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        """End the thread after the job at work; those that wait are told to try again."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(5.0)
        while self._jobs:
            self._jobs.popleft().answer.set_exception(ModelNotReady("the replica is stopping; try again"))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job = self._jobs.popleft()
            if not job.answer.set_running_or_notify_cancel():
                continue
            try:
                job.answer.set_result(self._answer(job))
            except Exception as error:  # noqa: BLE001  one request must not hurt the others
                job.answer.set_exception(error)


class Requests:
    """Answers requests that stand alone, beside the live streams: one lane for tensors and pictures, one for videos."""

    def __init__(self, served: Mapping[str, Served[Any]], limits: MediaLimits, most: int, telemetry: Telemetry) -> None:
        """served: the replica's models, which may come and go. most: frames of one forward pass."""
        self._served = served
        self._limits = limits
        self._most = most
        self._telemetry = telemetry
        self._tensors = _Lane("requests", self._tensor_answer)
        self._videos = _Lane("videos", self._video_answer)

    @property
    def waiting(self) -> int:
        """Requests that nobody works on yet."""
        return self._tensors.waiting + self._videos.waiting

    def submit(self, request: InferRequest) -> Future[InferReply]:
        """The answer to come. Raises UnknownModel, ModelNotReady, BadInput, ModelBusy."""
        served = self._served.get(request.model)
        if served is None:
            raise ModelNotReady(f"this replica does not hold model {request.model!r} at the moment; try again")
        name, _ = check_request(request, description_of(served))
        job = _Job(request, served.model, time.monotonic(), Future())
        (self._videos if name == "video" else self._tensors).submit(job)
        return job.answer

    def close(self) -> None:
        """End the lanes."""
        self._tensors.close()
        self._videos.close()

    # ---- tensors and pictures

    def _tensor_answer(self, job: _Job) -> InferReply:
        job.check_time()
        ((name, array),) = job.request.inputs.items()
        if name == "clip":
            return self._of_clips(job, array)
        outputs: list[Any] = []
        spent = _Spent(job.arrived_s)
        opens = pictures_of(name, array, self._limits)
        for begin in range(0, len(opens), self._most):
            job.check_time()
            some = [each() for each in opens[begin : begin + self._most]]
            pixels = model_input(job.model, [one.pixels for one in some])
            spent.lap("input")
            outputs += _each_alone(job.model, pixels, some)
            spent.lap("infer")
            self._telemetry.step(job.request.model, len(some))
        if isinstance(job.model, TSMDetector):
            reply = reply_of(job.request, box_tensors(outputs, tracked=False), (0, job.model.memory_frames))
        else:
            seen = (1, job.model.memory_frames) if isinstance(job.model, WindowTSM) else (0, job.model.memory_frames)
            reply = reply_of(job.request, _scored(job.model, outputs), seen)
        spent.lap("output")
        self._telemetry.compute(job.request.model, spent.times)
        return reply

    def _of_clips(self, job: _Job, array: Array) -> InferReply:
        model = job.model
        assert not isinstance(model, TSMDetector)
        rows: list[list[float]] = []
        spent = _Spent(job.arrived_s)
        for clip in array:
            job.check_time()
            pixels = model_input(model, [_to_tensor(frame) for frame in clip])[None]
            spent.lap("input")
            with torch.inference_mode():
                rows += model(pixels).float().tolist()
            spent.lap("infer")
            self._telemetry.step(job.request.model, 1)
        reply = reply_of(job.request, _scored(model, rows), (model.memory_frames, model.memory_frames))
        spent.lap("output")
        self._telemetry.compute(job.request.model, spent.times)
        return reply

    # ---- videos

    def _video_answer(self, job: _Job) -> InferReply:
        job.check_time()
        (data,) = job.request.inputs["video"]
        spent = _Spent(job.arrived_s)
        with tempfile.TemporaryDirectory(prefix="tsm-video-") as folder:
            path = Path(folder) / "video"
            path.write_bytes(data)
            facts = checked_video(path, self._limits)
            _check_aspect(facts.width, facts.height)
            spent.lap("input")
            results = []
            for result in infer_file(path, job.model, name=job.request.model):
                job.check_time()
                results.append(result)
                self._telemetry.step(job.request.model, 1)
        spent.lap("infer")
        reply = _video_reply(job, results)
        spent.lap("output")
        self._telemetry.compute(job.request.model, spent.times)
        return reply


def _video_reply(job: _Job, results: Sequence[FrameResult]) -> InferReply:
    if isinstance(job.model, TSMDetector):
        seen = next((one.objects.warmup for one in reversed(results) if one.objects), (0, job.model.memory_frames))
        frames = [one.objects.tracks if one.objects else () for one in results]
        return reply_of(job.request, box_tensors(frames, tracked=True), seen)
    told = [one for one in results if one.scores is not None and one.logits is not None]
    logits = [one.logits for one in told if one.logits]
    scores = [one.scores for one in told if one.scores]
    outputs = score_tensors(logits, [row.values for row in scores], job.model.labels)
    outputs["time_s"] = np.asarray([one.time_s for one in told], dtype=np.float64)
    seen = (scores[-1].warmup_frames, scores[-1].warmup_total) if scores else (0, job.model.memory_frames)
    return reply_of(job.request, outputs, seen)


def _each_alone(model: Model, pixels: Tensor, pictures: Sequence[Picture]) -> list[Any]:
    """What each frame (N, 3, h, w) gives by itself: rows of logits, or what was found."""
    with torch.inference_mode():
        if isinstance(model, TSMDetector):
            found = model.detect(model(pixels[:, None]))
            frames = [Frame("", 0, one.image, 0.0, 0.0, one.size) for one in pictures]
            return [
                detections_on(frame, boxes, model.labels, model.input_size)
                for frame, boxes in zip(frames, found, strict=True)
            ]
        if isinstance(model, WindowTSM):  # as in a ring that holds one frame
            rows: list[list[float]] = [
                model(frame[None, None].expand(-1, model.recipe.frames, -1, -1, -1)).float()[0].tolist()
                for frame in pixels
            ]
            return rows
        logits: list[list[float]] = model(pixels[:, None]).float().tolist()
        return logits


def _scored(model: TSM | WindowTSM, rows: Sequence[Sequence[float]]) -> dict[str, Array]:
    """Outputs of rows of which each stands alone."""
    return score_tensors(rows, [new_smoother(model.recipe).update(row, 0.0) for row in rows], model.labels)


class _Spent:
    """Where a request's time went, in seconds."""

    def __init__(self, arrived_s: float) -> None:
        self._at_s = time.monotonic()
        self.times = {"queue": self._at_s - arrived_s, "input": 0.0, "infer": 0.0, "output": 0.0}

    def lap(self, name: str) -> None:
        """What passed since the last lap belongs to `name`."""
        now_s = time.monotonic()
        self.times[name] += now_s - self._at_s
        self._at_s = now_s
