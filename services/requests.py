"""Requests that stand alone, on one replica: how an input becomes pixels, and the answer's tensors."""

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
    InferReply,
    InferRequest,
    ModelBusy,
    ModelNotReady,
    Parameter,
    RequestTimeout,
)
from services.request_form import Array, check_aspect, check_request, description_of
from services.served import Model, Served, model_input
from services.telemetry import Telemetry
from tsm_core.boxes import detections_on
from tsm_core.detector import TSMDetector
from tsm_core.frame import Frame
from tsm_core.model import TSM, WindowTSM
from tsm_core.postprocess import new_smoother
from tsm_core.types import Detection, Track

MAX_WAITING = 64  # requests per lane


# ---- inputs


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


def pictures_of(name: str, array: Array, limits: MediaLimits) -> list[Open]:
    """The pictures of a `frame` or `image` input, in order; each is decoded when it is opened.

    Opening raises BadInput, BadMedia, MediaTooLarge.
    """
    if name == "image":
        return [partial(_decoded, bytes(data), limits) for data in array]
    return [partial(_given, one) for one in array]


def _decoded(data: bytes, limits: MediaLimits) -> Picture:
    picture = Picture(decode_image(data, limits))
    check_aspect(*picture.size)
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
            check_aspect(facts.width, facts.height)
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
