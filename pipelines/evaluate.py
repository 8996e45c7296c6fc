"""Test a model on listed videos: top-1, top-5, mean class accuracy, and all that makes the figures comparable."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch

from pipelines.choice import BadEvaluation, choose_views, find_checkpoint, find_row, find_videos, open_model
from pipelines.datasets import Kind, Part
from pipelines.decoding import UnreadableVideo
from pipelines.journal import Journal, Prediction
from pipelines.metrics import confusion_matrix
from pipelines.model_card import save_card
from pipelines.results import METRICS, Outputs, machine, metric_values, published, setting_of, skipped, versions
from pipelines.scoring import Groups, Loader, Trial, Videos, check_fit, decoders, score
from tsm_core.errors import CallerError
from tsm_core.labels import Convention
from tsm_core.model import TSM, WindowTSM
from tsm_core.preprocess_spec import Crop
from tsm_core.recipes import Clips, Recipe, Views

if TYPE_CHECKING:
    from pipelines.sharing import Crew

AVERAGES: dict[Convention, str] = {"mmaction2": "probabilities", "mit": "logits"}
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


class How(TypedDict, total=False):
    """How a test is run, as `evaluate` takes it."""

    batch: int | None
    loaders: int | None
    device: str | None
    workers: int
    gpus: float | None
    address: str | None
    on_error: Literal["skip", "raise"]
    max_skipped: float
    on_progress: Progress | None


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
    with decoders(), contextlib.ExitStack() as stack:
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


def run_evaluation(
    recipe: Recipe | str,
    checkpoint: Path | str,
    *,
    data_root: Path | str | None = None,
    part: Part = "val",
    split: int = 1,
    kind: Kind | None = None,
    list_file: Path | str | None = None,
    prefix: Path | str | None = None,
    list_order: Convention | None = None,
    template: str | None = None,
    limit: int | None = None,
    views: Literal["efficient", "accurate"] = "efficient",
    clips: Clips | None = None,
    crop: Crop | None = None,
    crop_px: int | None = None,
    metrics: Sequence[str] = METRICS,
    out: Path | str | None = None,
    predictions: Path | str | None = None,
    confusion: Path | str | None = None,
    per_class: Path | str | None = None,
    resume: bool = False,
    model_dirs: Sequence[Path | str] = (),
    command: str = "",
    **how: Unpack[How],
) -> dict[str, Any]:
    """Test a checkpoint by a recipe and return the result, which is also written to `out` (JSON).

    Beside `out`, a model that was trained here gets its card: see `model_card`.
    checkpoint: a model file, another project's weights, or the name of a model at hand (also in model_dirs).
    data_root: folder of the recipe's data set; part, split and kind (None: the recipe's) choose its list. Instead,
    list_file: any list, `path label` or `path frames label`, its paths below `prefix` (None: beside it), labels by
    name or by number, counted as the recipe counts them or in list_order. limit: only so many videos, the first.
    views: the recipe's of that name; clips, crop and crop_px change them.
    predictions: JSON lines, one per video. confusion: a PNG. per_class: a table, .csv or .md. resume: go on with what
    a run with the same `out` left in its journal. how: see `evaluate`.

    Raises BadEvaluation, NoData, NoList, BadList, ModelFileError, UnknownRecipe, UnknownModel, OtherJournal, and what
    `evaluate` raises. What can be known before the test is raised before it.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise BadEvaluation(f"metrics {', '.join(unknown) or 'none'}: there are {', '.join(METRICS)}")
    file = find_checkpoint(checkpoint, model_dirs)
    row = find_row(recipe, file)
    seen = choose_views(row, views, clips, crop, crop_px)
    check_fit(seen, row)
    videos, told = find_videos(
        row,
        data_root=data_root,
        part=part,
        split=split,
        kind=kind,
        list_file=list_file,
        prefix=prefix,
        list_order=list_order,
        template=template,
        limit=limit,
    )
    files = Outputs(out, predictions, confusion, per_class)
    files.check(resume)
    load = partial(open_model, file, row)
    model = load("cpu")  # a checkpoint that does not fit is told now
    digest = _sha256(file)
    identity = {
        "recipe": row.name,
        "checkpoint": digest,
        "views": f"{seen} of {row.frames} frames",
        "convention": row.convention,
        "list": _list_digest(videos),
        "videos": len(videos.records),
        "folder": str(videos.root.absolute()),
    }
    began_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(Journal(files.journal, identity, resume=resume)) if files.journal else None
        resumed = len(journal.found) if journal else 0
        found = evaluate(load if how.get("workers") else model, row, videos, seen, journal=journal, **how)
    seconds = time.monotonic() - began_s
    judged = [each for each in found if each.error is None]
    matrix = confusion_matrix([each.top[0][0] for each in judged], [each.label for each in judged], len(row.labels))
    values = metric_values(judged, matrix, row.convention, metrics)
    result = {
        "recipe": row.name,
        "checkpoint": {"name": file.name, "sha256": digest, "source": model.source or None},
        **told,
        "list_sha256": identity["list"],
        "views": {
            "setting": setting_of(row, seen, views),
            **asdict(seen),
            "frames": row.frames,
            "per_video": seen.total,
        },
        "convention": {"name": row.convention, "averages": AVERAGES[row.convention]},
        "metrics": values,
        "percent": {name: round(100 * value, 2) for name, value in values.items()},
        "published": published(row, seen, views, digest, model.source),
        "counts": {
            "listed": len(found),
            "tested": len(judged),
            "skipped": len(found) - len(judged),
            "views": len(judged) * seen.total,
            "classes": len(row.labels),
            "classes_with_videos": len({each.label for each in judged}),
        },
        "skipped": skipped(found, videos.root),
        "run": {
            "seconds": round(seconds, 3),
            "videos_per_s": round((len(found) - resumed) / seconds, 3),
            "taken_from_journal": resumed,
            "workers": how.get("workers", 0),
            "device": None if how.get("workers") else str(model.device),
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
        },
    }
    top1 = f"top-1 {100 * sum(map(_hit, judged)) / len(judged):.2f} % of {len(judged)} videos"
    title = f"{row.name} on {told['dataset'] or told['list']}, {seen}: {top1}"
    if out is not None and (card := save_card(Path(out), row, file, result)):
        result["card"] = str(card)
    files.write(result, found, matrix, row.labels, title)
    return result


def _list_digest(videos: Videos) -> str:
    lines = "".join(f"{each.path}\0{each.label}\0{each.frames}\0{each.offset}\n" for each in videos.records)
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
