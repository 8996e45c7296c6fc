"""A detector run over whole videos, frame by frame as it is served, for what it finds to be judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pipelines.box_data import BoxVideo, BoxVideos
from pipelines.box_metrics import Found
from pipelines.box_scoring import Judged
from pipelines.box_training import clear_pads, fit_frames
from pipelines.decoding import UnreadableVideo
from pipelines.scoring import NotFinite
from tsm_core.boxes import Boxes, Letterbox, cleaned, letterbox_of
from tsm_core.detector import TSMDetector

READ_FRAMES = 16  # of each video at a time
BATCH = {"cuda": 8, "cpu": 1}  # videos side by side; a CPU gains nothing from more


@dataclass(frozen=True, slots=True, eq=False)
class Watched:
    """What came of the video `index`: what was found there, or why it could not be read."""

    index: int
    judged: Judged | None
    error: str | None = None


def watch(
    model: TSMDetector,
    videos: BoxVideos,
    indices: Sequence[int],
    *,
    batch: int | None = None,
    readers: int = 1,
) -> Iterator[Watched]:
    """Step the model through the videos, `batch` side by side, each with its own state; what was found, in any order.

    The model must be in eval mode. readers: threads that read frames ahead. Raises NotFinite.
    """
    size = batch or BATCH[model.device.type]
    rest = iter(indices)
    with ThreadPoolExecutor(max(1, readers)) as pool:
        while group := list(islice(rest, size)):
            yield from _Group(model, videos, group, pool).run()


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Frames of one video, as they lie in the input."""

    pixels: Tensor
    pads: tuple[int, int, int, int]
    size: tuple[int, int]


class _Group:
    """Videos that are stepped side by side."""

    def __init__(self, model: TSMDetector, videos: BoxVideos, group: Sequence[int], pool: ThreadPoolExecutor) -> None:
        self._model, self._videos, self._group, self._pool = model, videos, group, pool
        self._errors: dict[int, str] = {}

    def run(self) -> Iterator[Watched]:
        opened = dict(zip(self._group, self._pool.map(self._open, self._group), strict=True))
        there = {index: video for index, video in opened.items() if video is not None}
        found: dict[int, list[Found]] = {index: [] for index in there}
        arena = self._model.new_arena(max(1, len(there)))
        slots = {index: arena.allocate() for index in there}
        begin, ahead = 0, self._read(there, 0)
        while ahead:
            pieces = {index: piece for index, waits in ahead.items() if (piece := waits.result()) is not None}
            begin += READ_FRAMES
            left = {index: there[index] for index in pieces if len(there[index]) > begin}
            ahead = self._read(left, begin)
            for number in range(max((len(piece.pixels) for piece in pieces.values()), default=0)):
                now = [index for index, piece in pieces.items() if number < len(piece.pixels)]
                pixels = self._model.preprocess(torch.stack([pieces[index].pixels[number] for index in now]))
                clear_pads(pixels, [pieces[index].pads for index in now])
                dense = self._model.step(pixels, arena, [slots[index] for index in now])
                _check(dense.outputs, self._model.recipe.name)
                for index, boxes in zip(now, self._model.detect(dense), strict=True):
                    found[index].append(found_of(boxes, self._model.input_size, pieces[index].size))
        for index in self._group:
            if index in self._errors:
                yield Watched(index, None, self._errors[index])
            else:
                yield Watched(index, Judged(there[index].name, there[index].objects, found[index]))

    def _open(self, index: int) -> BoxVideo | None:
        try:
            return self._videos.video(index)
        except UnreadableVideo as error:
            self._errors[index] = str(error)
            return None

    def _read(self, there: dict[int, BoxVideo], begin: int) -> dict[int, Future[_Piece | None]]:
        return {index: self._pool.submit(self._piece, index, video, begin) for index, video in there.items()}

    def _piece(self, index: int, video: BoxVideo, begin: int) -> _Piece | None:
        try:
            frames = video.read(range(begin, min(begin + READ_FRAMES, len(video))))
        except UnreadableVideo as error:
            self._errors[index] = str(error)
            return None
        return _Piece(*fit_frames(frames, self._model.input_size), (frames.shape[3], frames.shape[2]))


def _check(outputs: Mapping[str, Tensor], name: str) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in outputs.values()):
        raise NotFinite(
            f"the network's outputs on validation videos are no numbers ({name}); the weights have diverged"
        )


def found_of(boxes: Boxes, input_size: tuple[int, int], source_size: tuple[int, int]) -> Found:
    """Boxes in pixels of the input -> what was found in pixels of the picture of (width, height), cut at its edges."""
    box: Letterbox = letterbox_of(source_size, input_size)
    xyxy, fine = cleaned(box.to_source(boxes.xyxy.float()), source_size)
    return Found(
        xyxy[fine].cpu().numpy().astype(np.float32),
        boxes.scores[fine].float().cpu().numpy(),
        boxes.labels[fine].cpu().numpy().astype(np.int64),
    )
