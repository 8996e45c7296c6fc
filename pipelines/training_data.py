"""What training sees: clips of listed or of drawn videos, augmented, in an order that the seed alone decides.

Whatever is drawn for a clip depends on the seed, the epoch and the clip, not on who draws it or when: the same training
comes out of any number of workers and loaders, and of one that was interrupted.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.datasets import TEMPLATE, Kind, VideoRecord, find_dataset, open_list
from pipelines.decoding import UnreadableVideo
from pipelines.motion8 import Motion8
from pipelines.sampling import test_indices, train_indices
from pipelines.video_dataset import read_frames
from tsm_core.errors import CallerError, TSMError
from tsm_core.preprocess import crop_views
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import CLIPS, Recipe, Views

REPLACEMENTS = 20  # videos tried in place of one that cannot be read
AUGMENTERS = 32  # some draws are made once per augmenter, as the originals make them once per loading process
STOPS = (signal.SIGINT, signal.SIGTERM)

Read = TypeVar("Read")

Augment = Callable[[Tensor, int, np.random.Generator], tuple[Tensor, int]]  # frames, label -> pixels, label


class NoData(CallerError):
    """There is nothing to train on where the data should be."""

    reason = "no_data"


class WrongClasses(CallerError):
    """The data and the recipe differ in their classes."""

    reason = "wrong_classes"


class NothingReadable(CallerError):
    """One video after the other cannot be read."""

    reason = "no_readable_videos"


class ClipSource(Protocol):
    """Videos to train on, or to be judged by.

    classes: number of classes. identity: a word that is the same for the same videos and labels only.
    """

    classes: int
    identity: str

    def __len__(self) -> int:
        """Number of videos."""
        ...

    def clip(self, index: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Frames uint8 (F, 3, H, W), RGB, and the label of video `index`. Raises UnreadableVideo.

        To train on: a clip, its frames drawn with `rng`. To be judged by: all frames of the views, clip after clip,
        the same ones every time.
        """
        ...


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """How training clips are cut from a video.

    frames: of a clip (None: the recipe's T). max_stride: consecutive frames, 1 to so many apart, in place of the
    recipe's sampling (None). kind, split: of listed data (None: the recipe's kind).
    """

    frames: int | None = None
    max_stride: int | None = None
    kind: Kind | None = None
    split: int = 1


class TrainingData(NamedTuple):
    """Videos to train on, and those to be judged by (None: there are none)."""

    train: ClipSource
    val: ClipSource | None


Opener = Callable[[Recipe, Path | str | None, ClipOptions], TrainingData]
OPENERS: dict[str, Opener] = {  # by Recipe.dataset; any other is a list of videos
    "motion8": lambda recipe, _, options: TrainingData(
        Motion8("train", options.frames or recipe.frames), Motion8("val", recipe.frames)
    ),
}


def open_training_data(
    recipe: Recipe, root: Path | str | None, options: ClipOptions | None = None, *, validate: bool = True
) -> TrainingData:
    """The recipe's data set. root: folder that holds its folder. validate: there must be a val part.

    Raises NoData, WrongClasses, and what reading lists raises.
    """
    options = options or ClipOptions()
    if recipe.dataset in OPENERS:
        data = OPENERS[recipe.dataset](recipe, root, options)
    else:
        data = _open_lists(recipe, root, options, validate)
    for source in (data.train, data.val):
        if source is not None and source.classes != len(recipe.labels):
            raise WrongClasses(
                f"{recipe.dataset} has {source.classes} classes, {recipe.name} has {len(recipe.labels)}; "
                "use a recipe of this data set"
            )
    return data


def _open_lists(recipe: Recipe, root: Path | str | None, options: ClipOptions, validate: bool) -> TrainingData:
    row = find_dataset(recipe.dataset)
    if root is None:
        raise NoData(f"{recipe.name} is trained on {row.title}; name the folder that holds {row.name}/ with --data")
    if not row.home(root).is_dir():
        raise NoData(f"{row.home(root)} is no folder; {row.title} should be there. Get it: {row.source}")
    kind = options.kind or recipe.data
    frames = options.frames or recipe.frames
    training = recipe.training
    dense = training is not None and training.clips == "dense"

    def pick(total: int, rng: np.random.Generator) -> list[int]:
        if options.max_stride:
            return strided_indices(total, frames, rng, options.max_stride)
        return train_indices(total, frames, rng, dense=dense, convention=recipe.convention)

    def middle(total: int, _: np.random.Generator) -> list[int]:
        return test_indices(total, recipe.frames, clips=recipe.efficient.clips, convention=recipe.convention)

    def listed(part: str, choose: Pick) -> ClipSource:
        records, folder = open_list(
            recipe.dataset,
            root,
            kind=kind,
            part="train" if part == "train" else "val",
            split=options.split,
            order=recipe.convention,
        )
        return ListedVideos(records, folder, choose, len(row.labels), row.template, row.start)

    return TrainingData(listed("train", pick), listed("val", middle) if validate else None)


Pick = Callable[[int, np.random.Generator], list[int]]  # number of frames -> indices of those wanted


class ListedVideos:
    """Videos of a list, in folders of JPEGs or as files; `pick` chooses the frames. A ClipSource."""

    def __init__(
        self,
        records: Sequence[VideoRecord],
        root: Path,
        pick: Pick,
        classes: int,
        template: str = TEMPLATE,
        start: int = 1,
    ) -> None:
        self._records, self._root, self._pick = records, root, pick
        self._template, self._start = template, start
        self.classes = classes
        lines = "\n".join(f"{each.path} {each.frames} {each.offset} {each.label}" for each in records)
        self.identity = hashlib.sha256(lines.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._records)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        """See ClipSource."""
        record = self._records[index]
        frames = read_frames(self._root, record, lambda total: self._pick(total, rng), self._template, self._start)
        return frames, record.label


def strided_indices(total: int, frames: int, rng: np.random.Generator, max_stride: int) -> list[int]:
    """`frames` indices the same number of frames apart, 1 to max_stride as far as the video reaches, from anywhere.

    A video with fewer frames than that is spread over the clip.
    """
    longest = (total - 1) // (frames - 1) if frames > 1 else 1
    if total < 1 or longest < 1:
        return train_indices(total, frames, rng)
    stride = int(rng.integers(1, min(max_stride, longest) + 1))
    start = int(rng.integers(total - stride * (frames - 1)))
    return list(range(start, start + stride * (frames - 1) + 1, stride))


# --- order


class Place(NamedTuple):
    """One video of one epoch."""

    epoch: int
    video: int


@dataclass(frozen=True, slots=True)
class Order:
    """Who sees which videos when: `size` videos in steps of workers x accumulate x batch.

    A step is cut into micro-batches, of which every worker has `accumulate`, one after the other. So two workers see
    what one worker sees that accumulates two. The last step of an epoch has what is left, as many for each worker:
    where that does not come out even, the first videos of the epoch come again.
    """

    size: int
    batch: int
    workers: int = 1
    accumulate: int = 1
    seed: int = 0

    @property
    def total_batch(self) -> int:
        """Videos of one step."""
        return self.batch * self.workers * self.accumulate

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.size // self.total_batch)

    def pieces(self, number: int) -> int:
        """Micro-batches of each worker in step `number` of an epoch."""
        left = min(self.total_batch, self.size + -self.size % self.workers - number * self.total_batch)
        return -(-left // (self.workers * self.batch))

    def step(self, epoch: int, number: int, rank: int = 0) -> list[list[Place]]:
        """The micro-batches of one worker in step `number` of an epoch."""
        return self._step(self._shuffled(epoch), epoch, number, rank)

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng((self.seed, epoch)).permutation(self.size).tolist()
        return order + [order[place % self.size] for place in range(-self.size % self.workers)]

    def _step(self, shuffled: list[int], epoch: int, number: int, rank: int) -> list[list[Place]]:
        videos = shuffled[number * self.total_batch : (number + 1) * self.total_batch]
        found, begin, left = [], 0, len(videos) // self.workers
        while left:
            count = min(self.batch, left)
            mine = videos[begin + rank * count : begin + (rank + 1) * count]
            found.append([Place(epoch, video) for video in mine])
            begin, left = begin + self.workers * count, left - count
        return found

    def micro_batches(self, epochs: int, rank: int = 0, *, first: tuple[int, int] = (0, 0)) -> Iterator[list[Place]]:
        """All micro-batches of a worker, from step `first` (epoch, step) to the end of the last epoch."""
        for epoch in range(first[0], epochs):
            shuffled = self._shuffled(epoch)
            for number in range(first[1] if epoch == first[0] else 0, self.steps):
                yield from self._step(shuffled, epoch, number, rank)


# --- loading


class Batch(NamedTuple):
    """A micro-batch: pixels uint8 (N, T, 3, px, px), labels (N,), and why videos were replaced by others.

    error: why there is no batch.
    """

    pixels: Tensor
    labels: Tensor
    replaced: list[str]
    error: TSMError | None = None


class _Item(NamedTuple):
    pixels: Tensor
    label: int
    replaced: list[str]


class AugmentedClips(Dataset[_Item | TSMError]):
    """Clips of a source, augmented; a video that cannot be read is replaced by another.

    new_augment: from a number, an augmenter. on_error `raise`: an unreadable video is an error.
    """

    def __init__(self, source: ClipSource, new_augment: Callable[[int], Augment], seed: int, on_error: str) -> None:
        self._source, self._new_augment, self._seed, self._on_error = source, new_augment, seed, on_error
        self._augmenters: dict[int, Augment] = {}

    def __getitem__(self, place: Place) -> _Item | TSMError:
        """The clip of one place, or what is wrong: an error that is raised does not leave a process whole."""
        try:
            return self._clip(place)
        except TSMError as error:
            return error

    def _clip(self, place: Place) -> _Item:
        rng = np.random.default_rng((self._seed, place.epoch, place.video))
        index, replaced = place.video, list[str]()
        while True:
            try:
                frames, label = self._source.clip(index, rng)
            except UnreadableVideo as error:
                if self._on_error == "raise":
                    raise
                replaced.append(str(error))
                if len(replaced) > REPLACEMENTS:
                    raise NothingReadable(
                        f"{len(replaced)} videos in a row cannot be read; the first: {replaced[0]}"
                    ) from None
                index = int(rng.integers(len(self._source)))
            else:
                break
        if not 0 <= label < self._source.classes:
            raise WrongClasses(f"video {index} has label {label}; there are {self._source.classes} classes")
        number = int(rng.integers(AUGMENTERS))
        if number not in self._augmenters:
            self._augmenters[number] = self._new_augment(number)
        pixels, label = self._augmenters[number](frames, label, rng)
        return _Item(pixels, label, replaced)


def collate(found: Sequence[_Item | TSMError]) -> Batch:
    """A Batch whose colours lie side by side in memory, as convolutions like it."""
    items = [each for each in found if isinstance(each, _Item)]
    if len(items) < len(found):
        error = next(each for each in found if isinstance(each, TSMError))
        return Batch(torch.empty(0), torch.empty(0), [], error)
    pixels = side_by_side([item.pixels for item in items])
    return Batch(pixels, torch.tensor([item.label for item in items]), [why for item in items for why in item.replaced])


def side_by_side(clips: Sequence[Tensor]) -> Tensor:
    """Clips uint8 (T, 3, H, W) of one shape as (N, T, 3, H, W) whose colours lie side by side in memory."""
    frames, _, height, width = clips[0].shape
    pixels = torch.empty(len(clips), frames, height, width, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    for place, clip in enumerate(clips):
        pixels[place] = clip
    return pixels


def let_pass(_: int) -> None:
    """In a process that reads ahead: the first SIGTERM or SIGINT that is not its parent's changes nothing.

    A terminal, a container and `ray job stop` send them to all processes at once, and a training that is to end in
    order still needs what is read for it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def wait() -> None:
        passed = False
        while True:
            told = signal.sigwaitinfo(STOPS)
            if passed or told.si_pid == os.getppid():
                os._exit(0)
            passed = True

    threading.Thread(target=wait, daemon=True).start()


def read_ahead(
    clips: Dataset[Any], places: Iterator[list[Place]], loaders: int, merge: Callable[[list[Any]], Read], *, pin: bool
) -> Iterator[Read]:
    """What `merge` makes of the clips of each list of places, read ahead by so many processes."""
    if not loaders:
        return (merge([clips[place] for place in batch]) for batch in places)
    loader: DataLoader[Any] = DataLoader(
        clips, batch_sampler=places, num_workers=loaders, collate_fn=merge, pin_memory=pin, worker_init_fn=let_pass
    )
    return iter(loader)


def load_batches(clips: AugmentedClips, places: Iterator[list[Place]], loaders: int, *, pin: bool) -> Iterator[Batch]:
    """A Batch for each list of places, read ahead by so many processes."""
    return read_ahead(clips, places, loaders, collate, pin=pin)


class Judged(NamedTuple):
    """A video to be judged by: views uint8 (V, T, 3, px, px), clip by clip, or the error that says why not."""

    video: int
    label: int
    views: Tensor | None
    error: str | None


class ValidationViews(Dataset[Judged]):
    """The views of a source's videos."""

    def __init__(self, source: ClipSource, views: Views, spec: PreprocessSpec) -> None:
        self._source, self._views, self._spec = source, views, spec

    def __getitem__(self, index: int) -> Judged:
        try:
            frames, label = self._source.clip(index, np.random.default_rng(0))
        except UnreadableVideo as error:
            return Judged(index, -1, None, str(error))
        clips = frames.chunk(CLIPS[self._views.clips])
        cut = [crop_views(clip, self._spec, self._views.crop, self._views.crop_px) for clip in clips]
        return Judged(index, label, torch.cat(cut), None)


def load_views(views: ValidationViews, indices: Sequence[int], loaders: int) -> Iterator[Judged]:
    """The Judged of each index, in their order."""
    if not loaders:
        return map(views.__getitem__, indices)
    loader: DataLoader[Judged] = DataLoader(
        views, batch_size=None, sampler=indices, num_workers=loaders, worker_init_fn=let_pass
    )
    return iter(loader)


def taken(judged: Iterator[Judged], views: int) -> Iterator[list[Judged]]:
    """Videos in groups of about so many views."""
    for first in judged:
        count = 1 if first.views is None else max(1, views // len(first.views))
        yield [first, *islice(judged, count - 1)]
