"""Videos -> class probabilities, as the two original code bases do: cut into views, and the views averaged.

A video is cut into clips x crops views, each goes through the model as one clip, and their probabilities (mmaction2)
or logits (mit) are averaged. Videos go through the model in groups that depend on the list alone, so that every way
to run a test gives the same figures: in one process, in many, or in several goes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.datasets import TEMPLATE, VideoRecord
from pipelines.journal import Prediction
from pipelines.metrics import ranking
from pipelines.video_dataset import VideoDataset, VideoSample
from tsm_core.errors import CallerError, WorldError
from tsm_core.model import TSM, WindowTSM
from tsm_core.preprocess import crop_views, normalise, resize
from tsm_core.recipes import CLIPS, CROPS, Recipe, Views

RANKS = 5  # classes kept of each video

Group = tuple[int, ...]  # indices of videos that go through the model together
Groups = list[Group]
Loader = Callable[[str], TSM | WindowTSM]  # device -> model


class CropDoesNotFit(CallerError):
    """The pictures are smaller than the crops asked for, or the rule for three crops does not allow them."""

    reason = "crop_does_not_fit"


class NotFinite(CallerError):
    """The model gives scores that are no numbers."""

    reason = "not_finite_scores"


class DecoderDied(WorldError):
    """A process that decodes videos ended."""

    reason = "decoder_died"


class OutOfMemory(WorldError):
    """The device cannot hold so many views at a time."""

    reason = "out_of_memory"


@dataclass(frozen=True, slots=True)
class Videos:
    """Listed videos, and the folder that their paths start from. template, start: names and first number of JPEGs."""

    records: tuple[VideoRecord, ...]
    root: Path
    template: str = TEMPLATE
    start: int = 1


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tested and how, in values alone: it travels to other processes. batch: views at a time."""

    recipe: Recipe
    videos: Videos
    views: Views
    batch: int
    device: str
    loaders: int = 0

    @property
    def groups(self) -> Groups:
        """All videos, in the order of the list."""
        count = max(1, self.batch // self.views.total)
        total = len(self.videos.records)
        return [tuple(range(first, min(first + count, total))) for first in range(0, total, count)]


def check_fit(views: Views, recipe: Recipe) -> None:
    """Raises CropDoesNotFit where `views` cannot be cut from the recipe's pictures."""
    spec = recipe.preprocess
    side = spec.resize_px if spec.resize == "short" else spec.input_px
    if views.crop_px > side:
        raise CropDoesNotFit(
            f"crops of {views.crop_px} px do not fit pictures whose short side is {side} px ({recipe.name}); "
            f"use --crop-px {side} or less"
        )
    if views.crop == "three" and spec.convention == "mmaction2" and views.crop_px != side:
        raise CropDoesNotFit(
            f"three crops of {views.crop_px} px: by mmaction2's rule they are as high as the picture, whose short side "
            f"is {side} px ({recipe.name}); use --crop-px {side}, or another crop"
        )


def score(trial: Trial, model: TSM | WindowTSM, groups: Sequence[Group]) -> Generator[list[Prediction]]:
    """The Predictions of one group after the other, decoding ahead of the model."""
    network = model.model if isinstance(model, WindowTSM) else model
    network.for_inference().to(trial.device)
    samples = _decoded(trial, list(chain.from_iterable(groups)))
    for group in groups:
        taken = list(islice(samples, len(group)))
        images = [sample.images for sample in taken if sample.images is not None]
        shares: Iterator[NDArray[np.float64]] = iter(probabilities(network, images, trial) if images else ())
        predictions = []
        for sample in taken:
            record = trial.videos.records[sample.index]
            if sample.images is None:
                predictions.append(Prediction(sample.index, record.path, record.label, error=sample.error))
                continue
            row = next(shares)
            if not np.isfinite(row).all():
                raise NotFinite(f"{record.path}: the model's scores are no numbers; its weights have diverged")
            top = tuple((int(index), float(row[index])) for index in ranking(row[None], RANKS)[0])
            predictions.append(Prediction(sample.index, record.path, record.label, top))
        yield predictions


def probabilities(model: TSM, videos: Sequence[Tensor], trial: Trial) -> NDArray[np.float64]:
    """(V, K) class probabilities of V videos, each uint8 (clips x T, 3, H, W): averages over their views."""
    views, recipe = trial.views, trial.recipe
    waiting = chain.from_iterable(_views(images, trial) for images in videos)
    logits: list[Tensor] = []
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with torch.inference_mode(), exact:
            while taken := list(islice(waiting, trial.batch)):
                clips = torch.stack(taken).to(model.device, non_blocking=True)  # (views, T, 3, px, px)
                logits.append(model(normalise(clips, recipe.preprocess)).double().cpu())
    except torch.OutOfMemoryError:
        fact = f"{trial.batch} views of {recipe.frames} frames of {views.crop_px} px do not fit {model.device}"
        raise OutOfMemory(f"{fact}; give a smaller --batch, and --resume") from None
    # the originals put crops before clips
    table = torch.cat(logits).view(len(videos), CLIPS[views.clips], CROPS[views.crop], -1).transpose(1, 2).flatten(1, 2)
    shares = table.mean(1).softmax(1) if recipe.convention == "mit" else table.softmax(2).mean(1)
    return shares.numpy()


def _views(images: Tensor, trial: Trial) -> Iterator[Tensor]:
    """Views uint8 (T, 3, px, px), clip by clip; only those of one clip are in memory at a time."""
    for clip in torch.split(images, trial.recipe.frames):
        yield from crop_views(clip, trial.recipe.preprocess, trial.views.crop, trial.views.crop_px)


class _Resized(Dataset[VideoSample]):
    """Videos as the crops need them, so that no more than that travels from the process that decodes."""

    def __init__(self, trial: Trial) -> None:
        videos, recipe = trial.videos, trial.recipe
        self._spec = recipe.preprocess
        self._videos = VideoDataset(
            videos.records,
            videos.root,
            frames=recipe.frames,
            clips=trial.views.clips,
            convention=recipe.convention,
            template=videos.template,
            start=videos.start,
        )

    def __getitem__(self, index: int) -> VideoSample:
        sample = self._videos[index]
        return sample if sample.images is None else replace(sample, images=resize(sample.images, self._spec))


def _decoded(trial: Trial, indices: list[int]) -> Iterator[VideoSample]:
    dataset = _Resized(trial)
    if not trial.loaders:
        yield from map(dataset.__getitem__, indices)
        return
    loader = DataLoader(dataset, batch_size=None, sampler=indices, num_workers=min(trial.loaders, len(indices)))
    try:
        yield from loader
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if "Caught" in str(error):
            raise  # from the process; these come from its end
        with contextlib.suppress(RuntimeError):
            time.sleep(1.0)  # torch's own word of it is under way, and is not to come amid something else
        raise DecoderDied(_DIED.format("it left no more than half a video")) from None


@contextlib.contextmanager
def decoders() -> Iterator[None]:
    """Around all that `score` is used in: torch tells by a signal, anywhere, that a process that decodes has died."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DecoderDied(_DIED.format(str(error).splitlines()[0])) from None


_DIED = "a process that decodes videos ended ({}); --resume goes on, and fewer --loaders need less memory"
