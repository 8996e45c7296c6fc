"""What a detector's training sees: clips of videos with boxes, cut, mirrored and coloured alike on all their frames.

Whatever is drawn for a clip depends on the seed, the epoch and the clip alone, as for recognisers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from pipelines.box_data import BoxVideo, BoxVideos
from pipelines.decoding import UnreadableVideo
from pipelines.training_data import REPLACEMENTS, NothingReadable, Place, read_ahead, side_by_side
from tsm_core.boxes import letterbox_of, letterboxed
from tsm_core.detector_recipes import BoxTraining
from tsm_core.errors import TSMError

Pads = tuple[int, int, int, int]  # left, right, top, bottom


class BoxBatch(NamedTuple):
    """A micro-batch of N clips of T frames, letterboxed: pixels uint8 (N, T, 3, h, w), and why videos were replaced.

    pads: of each clip, the pixels around the picture, which show nothing. boxes (M, 4) in pixels of the input and
    labels (M,) of all frames, `counts` (N * T,) of each. error: why there is no batch.
    """

    pixels: Tensor
    pads: list[Pads]
    boxes: Tensor
    labels: Tensor
    counts: Tensor
    replaced: list[str]
    error: TSMError | None = None

    def targets(self) -> list[dict[str, Tensor]]:
        """Of each of the N * T frames, its boxes and labels."""
        counts = self.counts.tolist()
        pairs = zip(torch.split(self.boxes, counts), torch.split(self.labels, counts), strict=True)
        return [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]


class BoxClip(NamedTuple):
    """A clip uint8 (T, 3, h, w), letterboxed, and the boxes (M, 4) and labels (M,) of each frame."""

    pixels: Tensor
    pads: Pads
    boxes: list[Tensor]
    labels: list[Tensor]
    replaced: list[str]


def fit_frames(frames: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, Pads]:
    """Frames uint8 (T, 3, H, W) as they lie in an input of (height, width), and how much of it they do not cover."""
    scaled, pads = letterboxed(frames, input_size)
    return functional.pad(scaled, pads) if any(pads) else scaled, pads


def clear_pads(pixels: Tensor, pads: Sequence[Pads]) -> Tensor:
    """Input (N, ..., h, w) with nothing (0) around each picture, as at inference; changes it."""
    for picture, (left, right, top, bottom) in zip(pixels, pads, strict=True):
        height, width = picture.shape[-2:]
        picture[..., :top, :] = 0
        picture[..., height - bottom :, :] = 0
        picture[..., :left] = 0
        picture[..., width - right :] = 0
    return pixels


def clip_indices(total: int, frames: int, strides: tuple[int, ...], rng: np.random.Generator) -> list[int]:
    """`frames` numbers the same distance apart, strides[0] to strides[1] as far as the video reaches, from anywhere.

    A video that is shorter stands still at its end, and so a still image at its only frame.
    """
    longest = (total - 1) // (frames - 1) if frames > 1 else 1
    stride = int(rng.integers(min(strides), max(strides) + 1))
    stride = max(1, min(stride, longest))
    start = int(rng.integers(max(1, total - stride * (frames - 1))))
    return [min(start + stride * number, total - 1) for number in range(frames)]


def draw_clip(
    video: BoxVideo, frames: int, input_size: tuple[int, int], training: BoxTraining, rng: np.random.Generator
) -> BoxClip:
    """A clip of the video as the training says. What is ignored is neither learnt nor kept from being background."""
    numbers = clip_indices(len(video), frames, training.strides, rng)
    mirror, back = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    light = rng.uniform(-training.colour, training.colour, 3)
    there = sorted(set(numbers))
    pictures = video.read(there)
    if training.colour:
        pictures = coloured(pictures, light)
    width, height = pictures.shape[3], pictures.shape[2]
    if training.flip and mirror:
        pictures = pictures.flip(3)
    if training.reverse and back:
        numbers = numbers[::-1]
    pixels, pads = fit_frames(pictures, input_size)
    box = letterbox_of((width, height), input_size)
    boxes, labels = [], []
    for number in numbers:
        objects = video.objects[number]
        objects = objects.only(~objects.ignore)
        corners = torch.from_numpy(objects.boxes.copy())
        if training.flip and mirror:
            corners = torch.stack([width - corners[:, 2], corners[:, 1], width - corners[:, 0], corners[:, 3]], dim=1)
        boxes.append(box.to_input(corners))
        labels.append(torch.from_numpy(objects.labels.copy()))
    return BoxClip(pixels[[there.index(number) for number in numbers]], pads, boxes, labels, [])


def coloured(pictures: Tensor, light: np.ndarray) -> Tensor:
    """Pictures uint8 (T, 3, H, W), all with the same other brightness, contrast and saturation: shares around 0."""
    brighter, steeper, stronger = (1 + float(share) for share in light)
    floats = pictures.float() * brighter
    grey = floats.mean(dim=(0, 1, 2, 3))
    floats = grey + (floats - grey) * steeper
    mean = floats.mean(dim=1, keepdim=True)
    floats = mean + (floats - mean) * stronger
    return floats.round_().clamp_(0, 255).to(torch.uint8)


class BoxClips(Dataset[BoxClip | TSMError]):
    """Clips of a data set, by their places; a video that cannot be read is replaced by another.

    on_error `raise`: an unreadable video is an error.
    """

    def __init__(
        self,
        videos: BoxVideos,
        frames: int,
        input_size: tuple[int, int],
        training: BoxTraining,
        seed: int,
        on_error: str,
    ) -> None:
        self._videos, self._frames, self._size, self._training = videos, frames, input_size, training
        self._seed, self._on_error = seed, on_error

    def __getitem__(self, place: Place) -> BoxClip | TSMError:
        """The clip of one place, or what is wrong: an error that is raised does not leave a process whole."""
        try:
            return self._clip(place)
        except TSMError as error:
            return error

    def _clip(self, place: Place) -> BoxClip:
        rng = np.random.default_rng((self._seed, place.epoch, place.video))
        index, replaced = place.video, list[str]()
        while True:
            try:
                clip = draw_clip(self._videos.video(index), self._frames, self._size, self._training, rng)
            except UnreadableVideo as error:
                if self._on_error == "raise":
                    raise
                replaced.append(str(error))
                if len(replaced) > REPLACEMENTS:
                    raise NothingReadable(
                        f"{len(replaced)} videos in a row cannot be read; the first: {replaced[0]}"
                    ) from None
                index = int(rng.integers(len(self._videos)))
            else:
                return clip._replace(replaced=replaced)


def collate(found: Sequence[BoxClip | TSMError]) -> BoxBatch:
    """A BoxBatch whose colours lie side by side in memory, as convolutions like it."""
    clips = [each for each in found if isinstance(each, BoxClip)]
    if len(clips) < len(found):
        error = next(each for each in found if isinstance(each, TSMError))
        return BoxBatch(torch.empty(0), [], torch.empty(0), torch.empty(0), torch.empty(0), [], error)
    pixels = side_by_side([clip.pixels for clip in clips])
    boxes = [each for clip in clips for each in clip.boxes]
    return BoxBatch(
        pixels,
        [clip.pads for clip in clips],
        torch.cat(boxes),
        torch.cat([each for clip in clips for each in clip.labels]),
        torch.tensor([len(each) for each in boxes]),
        [why for clip in clips for why in clip.replaced],
    )


def load_boxes(clips: BoxClips, places: Iterator[list[Place]], loaders: int, *, pin: bool) -> Iterator[BoxBatch]:
    """A BoxBatch for each list of places, read ahead by so many processes."""
    return read_ahead(clips, places, loaders, collate, pin=pin)
