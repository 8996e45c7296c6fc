"""Test a model on listed videos: top-1, top-5, mean class accuracy, and all that makes the figures comparable."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from pipelines.decoding import UnreadableVideo
from pipelines.journal import Journal, Prediction
from pipelines.scoring import Groups, Loader, Trial, Videos, check_fit, score
from tsm_core.errors import CallerError
from tsm_core.model import TSM, WindowTSM
from tsm_core.recipes import Recipe, Views

if TYPE_CHECKING:
    from pipelines.sharing import Crew

MOST_LOADERS = 8
GPU_BATCH = 32  # views; a CPU gains nothing from more than one


class TooManyUnreadable(CallerError):
    """So many videos could not be read that a figure of the others would mean little."""

    reason = "too_many_unreadable"


@dataclass(frozen=True, slots=True)
class Facts:
    """How a test goes: videos skipped, share of hits so far, videos per second of this run, and seconds left."""

    skipped: int
    top1: float | None
    videos_per_s: float
    eta_s: float | None


Progress = Callable[[int, int, Facts], None]  # videos done, videos in all


def evaluate(
    model: TSM | WindowTSM | Loader,
    recipe: Recipe,
    videos: Videos,
    views: Views,
    *,
    batch: int | None = None,
    loaders: int | None = None,
    device: str | None = None,
    workers: int = 0,
    gpus: float | None = None,
    address: str | None = None,
    on_error: Literal["skip", "raise"] = "skip",
    max_skipped: float = 0.5,
    journal: Journal | None = None,
    on_progress: Progress | None = None,
) -> list[Prediction]:
    """A Prediction per video, in the order of the list; the model is made ready for inference and not trainable.

    recipe: whose frames, sampling, preprocessing and averaging. batch: views at a time (None: 1 on a CPU, 32 on a
    GPU). loaders: processes that decode ahead. device None: a GPU if there is one.
    workers: share the list among so many Ray actors, each with so many gpus (None: what there is), of the cluster at
    `address`, or of this machine; model must then be a function that loads it. An actor that dies is replaced.
    on_error: what to do about a video that cannot be read; with `skip`, more than this share of them ends it.
    journal: takes what is found, and what it has is not done again.

    Raises CropDoesNotFit, UnreadableVideo, TooManyUnreadable, NotFinite, DecoderDied, OutOfMemory, and what `Crew` and
    the model's loading raise.
    """
    check_fit(views, recipe)
    found = {} if journal is None else dict(journal.found)
    watch = _Watch(found, len(videos.records), max_skipped, on_progress)
    with contextlib.ExitStack() as stack:
        results: Iterable[list[Prediction]] = ()
        if len(found) < len(videos.records):
            crew: Crew | None = None
            if workers:
                from pipelines.sharing import Crew  # ray is slow to import, and not everyone's

                crew = stack.enter_context(Crew.of(workers, gpus, address))
            where = device or (crew.device if crew else "cuda" if torch.cuda.is_available() else "cpu")
            trial = Trial(recipe, videos, views, batch or (GPU_BATCH if where.startswith("cuda") else 1), where)
            trial = replace(trial, loaders=_loaders(where, workers) if loaders is None else loaders)
            todo = [group for group in trial.groups if any(index not in found for index in group)]
            results = stack.enter_context(contextlib.closing(_results(trial, model, todo, crew)))
        for predictions in results:
            failed = [each for each in predictions if each.error is not None]
            if failed and on_error == "raise":
                raise UnreadableVideo(failed[0].error or "")
            if journal is not None:
                journal.append(predictions)
            watch.add(predictions)
    watch.finish()
    return [found[index] for index in range(len(videos.records))]


def _results(
    trial: Trial, model: TSM | WindowTSM | Loader, groups: Groups, crew: Crew | None
) -> Generator[list[Prediction]]:
    if isinstance(model, TSM | WindowTSM):
        if crew is not None:
            raise TypeError("workers load the model themselves: give a function of the device that returns it")
        return score(trial, model, groups)
    return crew.share(trial, model, groups) if crew is not None else score(trial, model(trial.device), groups)


class _Watch:
    """Adds up what is found, tells how it goes, and ends what leads nowhere."""

    def __init__(
        self, found: dict[int, Prediction], total: int, max_skipped: float, on_progress: Progress | None
    ) -> None:
        self._found, self._total, self._most, self._tell = found, total, max_skipped * total, on_progress
        self._before, self._began_s = len(found), time.monotonic()
        self._skipped = [each for each in found.values() if each.error is not None]
        self._hits = sum(map(_hit, found.values()))
        self._report()

    def add(self, predictions: Sequence[Prediction]) -> None:
        for each in predictions:
            if each.index in self._found:
                continue
            self._found[each.index] = each
            self._hits += _hit(each)
            if each.error is not None:
                self._skipped.append(each)
        self._report()
        self._check()

    def finish(self) -> None:
        self._check()
        if len(self._skipped) == self._total:
            self._give_up()

    def _check(self) -> None:
        if len(self._skipped) > self._most:
            self._give_up()

    def _give_up(self) -> None:
        lost, first = len(self._skipped), self._skipped[0].error
        if lost == len(self._found):
            raise TooManyUnreadable(
                f"none of {lost} videos can be read, of {self._total} listed; the first: {first}",
                reason="no_readable_videos",
            )
        raise TooManyUnreadable(
            f"{lost} of {len(self._found)} videos cannot be read, and {self._most:g} of {self._total} is the most; the "
            f"first: {first}. `tsm data check` lists them; with a larger --max-skipped the others are tested"
        )

    def _report(self) -> None:
        if self._tell is None:
            return
        done, seconds = len(self._found), time.monotonic() - self._began_s
        pace = (done - self._before) / seconds if seconds > 0 else 0.0
        judged = done - len(self._skipped)
        top1 = self._hits / judged if judged else None
        eta_s = (self._total - done) / pace if pace > 0 else None
        self._tell(done, self._total, Facts(len(self._skipped), top1, pace, eta_s))


def _hit(prediction: Prediction) -> bool:
    return bool(prediction.top) and prediction.top[0][0] == prediction.label


def _loaders(device: str, workers: int) -> int:
    cpus = os.cpu_count() or 1
    if device == "cpu":
        return 0 if workers else min(1, cpus - 1)  # the model needs the others
    return max(1, min(MOST_LOADERS, cpus // max(1, workers) - 1))
