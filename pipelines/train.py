"""Train any recipe: `fit` is the loop, in one process or in each of many; `run_training` puts it there.

What a step does depends on the seed and its number alone, so that a training which was killed goes on from its last
checkpoint as if nothing had happened.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from pipelines.curves import save_curves
from pipelines.learners import new_study
from pipelines.memory import keep_freed_memory
from pipelines.ray_local import ray_session
from pipelines.rehearsal import dry_run, profile
from pipelines.scoring import DecoderDied, OutOfMemory
from pipelines.study import Team
from pipelines.training_data import ClipOptions, NothingReadable
from pipelines.training_job import AMP, AnyRecipe, BadOptions, Job, Options, TrainResult, new_job
from pipelines.work_dir import LAST, WorkDir, is_uri
from tsm_core.checkpoints import save_model
from tsm_core.detector_recipes import find_any_recipe
from tsm_core.errors import CallerError, TSMError, WorldError

FORMAT = 1  # of checkpoints
PROG = "python -m pipelines.train"
HALVINGS = 16  # of the scale of fp16, 65536 at first, until it is 1
LISTEN_S = 0.3
ENDING_S = 30.0  # workers that died may take so long to be gone
LOOK_S = 0.5  # between two looks of Ray Train at its workers; a report waits for the next one
POINTS = 20  # of the loss curve in an epoch
TOLD = 5  # unreadable videos that are named; the others are counted
METRICS, CURVES, EVENTS, BEST, MODEL = (
    "metrics.csv",
    "curves.png",
    "tensorboard",
    "best.safetensors",
    "last.safetensors",
)
RAY = "ray"  # Ray Train's folder


class Diverged(CallerError):
    """The loss is no number any more."""

    reason = "diverged"


class Interrupted(WorldError):
    """Somebody stopped the training; it can go on."""

    reason = "interrupted"


class TrainingFailed(WorldError):
    """Workers failed more often than they may."""

    reason = "training_failed"


@dataclass
class Progress:
    """Where a training is: the next step to do, and all that was seen so far."""

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 3)  # of the epoch: loss, right, clips
    point: list[float] = field(default_factory=lambda: [0.0] * 2)  # since the last point of the curve: loss, clips
    points: list[list[float]] = field(default_factory=list)  # step, lr, loss
    history: list[dict[str, float]] = field(default_factory=list)  # a row per epoch
    best: dict[str, float] = field(default_factory=dict)
    replaced: int = 0  # of the epoch
    replaced_before: int = 0
    bad_steps: int = 0
    seconds: float = 0.0


def fit(job: Job, team: Team | None = None) -> TrainResult:
    """Train, or go on training, to the end; every process of a team calls it and gets the same result.

    In the work dir it leaves last.pt (to go on from), best.safetensors and last.safetensors (model files with their
    card), metrics.csv, curves.png and TensorBoard's events. Raises what opening data, initial weights and the work dir
    raise, Diverged, NothingReadable, OutOfMemory, Interrupted, CannotWrite.
    """
    team = team or Team()
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(team.together(lambda: WorkDir(job.work_dir)))
        team.together(lambda: None if team.rank else folder.lock(ENDING_S if team.workers > 1 else 0.0))
        stack.enter_context(_numbers(job.options.deterministic, team.device))
        run = _Run(job, team, folder)
        stack.callback(run.close)
        try:
            return run.train()
        except torch.OutOfMemoryError:
            raise OutOfMemory(
                f"a step of {job.batch} clips does not fit {team.device}; give a smaller --batch, with --accumulate "
                "for the same total, or --amp"
            ) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DecoderDied(
                f"a process that reads videos ended ({str(error).splitlines()[0]}); the same command goes on from the "
                "last checkpoint, and fewer --loaders need less memory"
            ) from None


@contextlib.contextmanager
def _numbers(deterministic: bool, device: str) -> Iterator[None]:
    """How torch computes, for a while."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic and device.startswith("cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


class _Run:
    """One process of one training."""

    def __init__(self, job: Job, team: Team, folder: WorkDir) -> None:
        self.job, self.team, self.folder, self.options = job, team, folder, job.options
        self.learning = new_study(job, team)
        self.progress, self.began = Progress(), ""
        state = team.together(self._take_up)
        team.together(lambda: self._claim(anew=state is None))  # nobody reads any more
        self.learning.prepare()
        if state is not None:
            self._restore(state)
        self._told = _Voice(team, self.options.say_every_s)
        self._saved_s = time.monotonic()
        self._events: Any = None
        self._bad_in_a_row = 0

    # --- begin, or go on

    def _take_up(self) -> dict[str, Any] | None:
        """The state to go on from; or initial weights, and None."""
        state = None
        if self.options.resume:
            self.folder.check_run(self.learning.facts)
            state = self.folder.load_checkpoint()
        if state is None:
            self.began = self.learning.begin()
        else:
            self.began = state["began"]
            self.learning.network.load_state_dict(state["model"])
        return state

    def _claim(self, *, anew: bool) -> None:
        if self.team.rank:
            return
        for name in (LAST, BEST, MODEL, METRICS, CURVES, EVENTS) if anew else ():
            self.folder.remove(name)
        self.folder.save_run(self.learning.facts)

    def _restore(self, state: dict[str, Any]) -> None:
        self.learning.optimiser.load_state_dict(state["optimiser"])
        self.learning.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        places = self.team.gather((self.progress.epoch, self.progress.step))
        if len(set(places)) > 1:
            raise TrainingFailed(f"workers found different checkpoints in {self.folder.place}: it must be shared")

    def _save(self) -> None:
        if self.team.rank:
            return
        learning = self.learning
        self.folder.save_checkpoint(
            {
                "format": FORMAT,
                "began": self.began,
                "model": learning.network.state_dict(),
                "optimiser": learning.optimiser.state_dict(),
                "scaler": learning.scaler.state_dict(),
                "progress": asdict(self.progress),
            }
        )
        self._saved_s = time.monotonic()

    # --- the loop

    def train(self) -> TrainResult:
        """From the next step to the last."""
        progress, order, epochs = self.progress, self.learning.order, self.job.training.epochs
        self._tell_plan()
        batches = self.learning.batches((progress.epoch, progress.step))
        while progress.epoch < epochs:
            while progress.step < order.steps:
                if self.options.steps and self.steps_done >= self.options.steps:
                    self._save()
                    return self._finish()
                self._step(list(islice(batches, order.pieces(progress.step))))
            self._end_epoch()
        return self._finish()

    @property
    def steps_done(self) -> int:
        """Steps since the beginning."""
        return self.progress.epoch * self.learning.order.steps + self.progress.step

    def _step(self, batches: list[Any]) -> None:
        began_s = time.monotonic()
        progress, learning, steps = self.progress, self.learning, self.learning.order.steps
        lr = learning.rate(progress.epoch, progress.step)
        facts = learning.step(batches, progress.epoch, progress.step, lr)
        for why in (each for batch in batches for each in batch.replaced):
            self._told.replaced(why)
        progress.replaced += round(facts.replaced)
        if facts.bad:
            self._count_bad(lr, facts.loss / facts.clips, facts.overflow)
        else:
            self._bad_in_a_row = 0
        if math.isfinite(facts.loss):
            for place, value in enumerate((facts.loss, facts.right, facts.clips)):
                progress.sums[place] += value
            progress.point[0] += facts.loss
            progress.point[1] += facts.clips
        progress.step += 1
        progress.seconds += time.monotonic() - began_s
        if progress.step % max(1, steps // POINTS) == 0 or progress.step == steps:
            self._point(lr)
        self._check_replaced()
        self._told.step(self, lr, facts.clips)
        if facts.stopping:
            self._save()
            raise self._agreed(
                Interrupted(
                    f"stopped in epoch {progress.epoch + 1} after step {progress.step} of {steps}; the same command "
                    "goes on from there"
                )
            )
        late = time.monotonic() - self._saved_s > 60 * self.options.checkpoint_minutes
        if late and progress.step < steps:
            self._save()

    def _agreed(self, error: TSMError) -> TSMError:
        """An error that all workers have met."""
        self.team.agreed = True
        return error

    def _count_bad(self, lr: float, loss: float, overflow: bool) -> None:
        progress = self.progress
        progress.bad_steps += 1
        self._bad_in_a_row += 1
        most = self.options.max_bad_steps + (HALVINGS if self.options.amp == "fp16" else 0)
        where = f"epoch {progress.epoch + 1} step {progress.step + 1} (learning rate {lr:g})"
        if not overflow:
            self._told.line(f"{where}: left out, as its loss ({loss:g}) or its gradient is no number")
        if self._bad_in_a_row >= most:
            raise self._agreed(
                Diverged(
                    f"{where}: the loss ({loss:g}) or its gradient is no number, {self._bad_in_a_row} steps in a row. "
                    f"The last good weights are in {self.folder.place}; begin anew with a smaller --lr or another --amp"
                )
            )

    def _check_replaced(self) -> None:
        replaced, size = self.progress.replaced, self.learning.order.size
        if replaced > self.options.max_skipped * size:
            raise self._agreed(
                NothingReadable(
                    f"{replaced} videos of this epoch could not be read, and {self.options.max_skipped:g} of {size} is "
                    f"the most (--max-skipped); the first: {self._told.first_replaced}. `tsm data check` lists them",
                    reason="too_many_unreadable",
                )
            )

    def _point(self, lr: float) -> None:
        progress = self.progress
        loss, clips = progress.point
        progress.point = [0.0, 0.0]
        if clips:
            progress.points.append([float(self.steps_done), lr, loss / clips])
            self._event({"train/loss": loss / clips, "train/lr": lr})

    def _end_epoch(self) -> None:
        progress, learning = self.progress, self.learning
        loss, right, clips = progress.sums
        row = {
            "epoch": float(progress.epoch + 1),
            "step": float(self.steps_done),
            "lr": learning.rate(progress.epoch, learning.order.steps - 1),
            "loss": loss / clips if clips else math.nan,
            **learning.figures(right, clips),
            "clips_per_s": self._told.pace,
        }
        last = progress.epoch + 1 == self.job.training.epochs
        if learning.validate and ((progress.epoch + 1) % learning.validate == 0 or last):
            row |= learning.judge()
            self._event({f"val/{name}": row[name] for name in learning.judged if name in row})
        progress.history.append(row)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, [0.0] * 3
        progress.replaced_before, progress.replaced = progress.replaced_before + progress.replaced, 0
        if row.get(learning.goal, -1.0) > progress.best.get(learning.goal, -1.0):
            progress.best = dict(row)
            self._save_model(BEST)
        self._write_metrics()
        self._save()
        self._told.epoch(self, row)
        self.team.report(row)

    def _finish(self) -> TrainResult:
        progress = self.progress
        self._save_model(MODEL)
        self._write_metrics()
        validated = [row for row in progress.history if self.learning.goal in row]
        losses = [row["loss"] for row in progress.history] or [progress.sums[0] / max(1.0, progress.sums[2])]
        return TrainResult(
            self.job.recipe.name,
            self.folder.place,
            f"{self.folder.place.rstrip('/')}/{BEST if progress.best else MODEL}",
            progress.epoch,
            self.steps_done,
            losses[-1],
            validated[-1] if validated else {},
            progress.best,
            progress.replaced_before + progress.replaced,
            progress.bad_steps,
            progress.seconds,
        )

    # --- what is left behind

    def _save_model(self, name: str) -> None:
        if self.team.rank == 0:
            self.folder.write(name, lambda path: save_model(path, self.learning.model, self.card()))

    def card(self) -> dict[str, Any]:
        """How the model was trained, and how it scores by now."""
        progress, order = self.progress, self.learning.order
        return {
            "command": self.job.command,
            "date": datetime.now(UTC).date().isoformat(),
            "began": self.began,
            "data": {"dataset": self.job.recipe.dataset, "videos": order.size, **self.learning.facts["data"]},
            "seed": self.options.seed,
            "lr": self.learning.lr,
            "total_batch": order.total_batch,
            "amp": self.options.amp,
            "options": {
                name: value
                for name, value in self.learning.facts.items()
                if name in ("clips", "carry_state", "per_frame_loss")
            },
            "epochs": progress.epoch,
            "steps": self.steps_done,
            "training_s": round(progress.seconds),
            "machine": f"{self.team.workers} x {_device_name(self.team.device)}, {os.cpu_count()} cores",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
            },
            "scores": {"best": progress.best, "last": progress.history[-1] if progress.history else {}},
            "curves": progress.history,
            "bad_steps": progress.bad_steps,
            "replaced_videos": progress.replaced_before + progress.replaced,
        }

    def _write_metrics(self) -> None:
        if self.team.rank:
            return
        progress, steps = self.progress, self.learning.order.steps
        rows = {
            step: {"epoch": step / steps, "step": step, "lr": lr, "loss": loss} for step, lr, loss in progress.points
        }
        for row in progress.history:
            rows[row["step"]] = {**row, "epoch_loss": row["loss"], **rows.get(row["step"], {})}

        columns = ("epoch", "step", "lr", "loss", "epoch_loss", *self.learning.columns, "clips_per_s")

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
                table.writeheader()
                table.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows.values())

        self.folder.write(METRICS, write)
        title = f"{self.job.recipe.name}, {self.steps_done} steps"
        self.folder.write(CURVES, lambda path: save_curves(path, progress.points, progress.history, title))
        if self._events is not None:
            self._events.flush()
            self.folder.publish(EVENTS)

    def _event(self, scalars: dict[str, float]) -> None:
        """For TensorBoard."""
        if self.team.rank:
            return
        if self._events is None:
            writer = importlib.import_module("tensorboardX").SummaryWriter
            self._events = writer(str(self.folder.folder / EVENTS), purge_step=self.steps_done)
        for name, value in scalars.items():
            self._events.add_scalar(name, value, self.steps_done)

    def _tell_plan(self) -> None:
        learning, order, training = self.learning, self.learning.order, self.job.training
        at = f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1}"
        self._told.line(
            f"{self.job.recipe.name} goes on at {at}" if self.steps_done else f"{self.job.recipe.name} {self.began}"
        )
        parts = f"{order.batch} videos x {order.workers} workers x {order.accumulate} accumulated"
        if self.options.lr:
            rule = f"as asked for, for {order.total_batch} videos a step ({parts})"
        else:
            rule = (
                f"= {training.lr:g} x {order.total_batch} / {training.lr_batch}: {order.total_batch} videos a step "
                f"({parts}), the recipe's {training.lr:g} is for {training.lr_batch}"
            )
        self._told.line(f"learning rate {learning.lr:g} {rule}")
        val = len(learning.data.val) if learning.data.val is not None else 0
        self._told.line(
            f"{order.size} videos, {order.steps} steps an epoch, {training.epochs} epochs; "
            + (f"judged by {val} others every {learning.validate} epochs" if learning.validate else "not validated")
        )

    def close(self) -> None:
        """Close what is open."""
        if self._events is not None:
            self._events.close()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


class _Voice:
    """Tells people how it goes."""

    def __init__(self, team: Team, every_s: float) -> None:
        self._team, self._every_s = team, every_s
        self._told_s = self._from_s = time.monotonic()
        self._clips = 0.0
        self.pace = 0.0
        self.first_replaced = "in another worker"
        self._replaced = 0

    def line(self, text: str) -> None:
        """From the first process alone."""
        if self._team.rank == 0:
            self._team.say(text)

    def replaced(self, why: str) -> None:
        """A video that another took the place of, from any process."""
        if not self._replaced:
            self.first_replaced = why
        self._replaced += 1
        if self._replaced <= TOLD:
            more = "; later ones are only counted" if self._replaced == TOLD else ""
            self._team.say(f"unreadable, replaced by another video: {why}{more}")

    def step(self, run: _Run, lr: float, clips: float) -> None:
        """After each step: a line, if the last one is some time ago."""
        now_s = time.monotonic()
        self._clips += clips
        seconds = now_s - self._from_s
        if seconds > 0:
            self.pace = self._clips / seconds
        if now_s - self._told_s < self._every_s:
            return
        progress, order = run.progress, run.learning.order
        self._told_s = now_s
        left = (run.job.training.epochs - progress.epoch) * order.size - progress.step * order.total_batch
        loss = progress.sums[0] / progress.sums[2] if progress.sums[2] else math.nan
        self.line(
            f"epoch {progress.epoch + 1}/{run.job.training.epochs} step {progress.step}/{order.steps}  "
            f"loss {loss:.3f}  lr {lr:g}  {self.pace:.1f} clips/s  {_clock(left / self.pace)} to go"
        )
        if seconds > 12 * self._every_s:  # the pace is that of the last while
            self._from_s, self._clips = now_s - self._every_s, self.pace * self._every_s

    def epoch(self, run: _Run, row: dict[str, float]) -> None:
        """After each epoch."""
        best = "  (best so far)" if run.progress.best.get("epoch") == row["epoch"] else ""
        self.line(
            f"epoch {row['epoch']:.0f}/{run.job.training.epochs} done: loss {row['loss']:.4f}  "
            f"{run.learning.words(row)}{best}"
        )
        self._from_s, self._clips, self._told_s = time.monotonic(), 0.0, time.monotonic()


def _clock(seconds: float) -> str:
    whole = round(seconds) if math.isfinite(seconds) else 0
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


# --- where it runs


def run_training(
    recipe: AnyRecipe | str,
    *,
    data: Path | str | None,
    work_dir: Path | str,
    options: Options | None = None,
    workers: int = 1,
    gpus: int | None = None,
    use_ray: bool = False,
    address: str | None = None,
    max_failures: int = 3,
    say: Callable[[str], None] = print,
    command: str = "",
) -> TrainResult:
    """Train a recipe, given by its name or whole; resumes what the work dir holds, unless the options say not to.

    data: folder that holds the data set's folder (None: the data set needs none). work_dir: a folder, or a URI.
    workers: processes that train together; a single one is this process, unless use_ray is said. gpus: of each worker,
    0 or 1 (None: 1 where there are enough). address: of a Ray cluster (None: RAY_ADDRESS, else this machine alone).
    max_failures: how often workers may die; each time all go on from the last checkpoint.

    Raises BadOptions, what `fit` raises, TrainingFailed, RayNotStarted.
    """
    job = find_job(recipe, data, work_dir, options, command)
    if workers < 1:
        raise BadOptions(f"workers {workers} must be at least 1")
    if workers > 1 or use_ray or address:
        return _train_with_ray(job, workers, gpus, address, max_failures, say)
    cuda = torch.cuda.is_available()
    if gpus and not cuda:
        raise BadOptions("there is no GPU that torch can use; leave out --gpus")
    with _stopped_by_signal() as stopping:
        device = "cuda" if cuda and gpus != 0 else "cpu"
        return fit(job, Team(device=device, say=say, stopping=stopping))


def find_job(
    recipe: AnyRecipe | str,
    data: Path | str | None,
    work_dir: Path | str,
    options: Options | None = None,
    command: str = "",
) -> Job:
    """The job of a recipe, given by its name or whole. Raises UnknownRecipe, BadOptions."""
    row = find_any_recipe(recipe) if isinstance(recipe, str) else recipe
    return new_job(row, _absolute(data), _absolute(work_dir) or "", options, command)


def _absolute(place: Path | str | None) -> str | None:
    # workers start in folders of their own
    if place is None:
        return None
    return str(place) if is_uri(place) else str(Path(place).expanduser().absolute())


@contextlib.contextmanager
def _stopped_by_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came: the first asks for an orderly end, the second has its usual effect."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(*_: object) -> None:
        asked.set()
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()


class _Desk:
    """Where the workers of a training and the program that started it leave word for each other."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._error: TSMError | None = None
        self._stop = False

    def say(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def fail(self, error: TSMError) -> None:
        self._error = self._error or error

    def error(self) -> TSMError | None:
        return self._error

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        return self._stop


def _in_worker(told: dict[str, Any]) -> TrainResult | None:
    """What each worker of Ray Train does; errors meant for people go to the desk, others are Ray's to deal with."""
    ray, train = importlib.import_module("ray"), importlib.import_module("ray.train")
    desk, context = told["desk"], train.get_context()
    if ray.get(desk.error.remote()) is not None:
        return None  # Ray starts workers again whatever ended them
    torch.set_num_threads(told["threads"])
    asked: list[Any] = []

    def stopping() -> bool:
        """What the desk said, without waiting for it to say so again."""
        if context.get_world_rank():
            return False
        if not asked:
            asked.append(desk.stopping.remote())
        if not ray.wait(asked, timeout=0)[0]:
            return False
        return bool(ray.get(asked.pop()))

    team = Team(
        context.get_world_rank(),
        context.get_world_size(),
        str(importlib.import_module("ray.train.torch").get_device()) if told["gpus"] else "cpu",
        say=lambda line: ray.get(desk.say.remote(line)),
        report=train.report,
        stopping=stopping,
    )
    try:
        return fit(told["job"], team)
    except TSMError as error:
        ray.get(desk.fail.remote(error))
        if team.agreed:
            return None
        raise  # the others wait for this one, until Ray ends them


def _train_with_ray(
    job: Job, workers: int, gpus: int | None, address: str | None, max_failures: int, say: Callable[[str], None]
) -> TrainResult:
    """Ray Train around `fit`."""
    if (address or os.environ.get("RAY_ADDRESS") or "local") == "local":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # as all of a single machine's Ray
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(LOOK_S))
    with contextlib.ExitStack() as stack:
        ray = stack.enter_context(ray_session(address, cpus=workers + 1))
        train, train_torch = importlib.import_module("ray.train"), importlib.import_module("ray.train.torch")
        there = ray.cluster_resources()
        if gpus and there.get("GPU", 0) < workers:
            raise BadOptions(f"{workers} workers with a GPU each, and there are {there.get('GPU', 0):g}")
        on_gpu = there.get("GPU", 0) >= workers if gpus is None else gpus > 0
        cpus = max(0.1, min(1.0, (there.get("CPU", 1) - 1) / workers))
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        if not is_uri(job.work_dir):  # Ray Train's own folder holds nothing that is needed later
            stack.callback(shutil.rmtree, Path(job.work_dir) / RAY, ignore_errors=True)
        desk = ray.remote(_Desk).options(num_cpus=0, scheduling_strategy=here).remote()
        stack.callback(ray.kill, desk)
        threads = max(1, (os.cpu_count() or 1) // workers)
        name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        trainer = train_torch.TorchTrainer(
            _in_worker,
            train_loop_config={"job": job, "desk": desk, "gpus": on_gpu, "threads": threads},
            torch_config=train_torch.TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=workers,
                use_gpu=on_gpu,
                resources_per_worker={"CPU": cpus, **({"GPU": 1} if on_gpu else {})},
            ),
            run_config=train.RunConfig(
                name=name,
                storage_path=f"{job.work_dir.rstrip('/')}/{RAY}",
                failure_config=train.FailureConfig(max_failures=max_failures),
            ),
        )
        asked = stack.enter_context(_stopped_by_signal())
        stack.enter_context(_listening(ray, desk, asked, say))
        try:
            result = trainer.fit()
        except train.TrainingFailedError as error:
            raise _meant(ray, desk) or TrainingFailed(
                f"workers failed more than {max_failures} times (--max-failures): {str(error).strip()[-1000:]}"
            ) from None
        if (meant := _meant(ray, desk)) is not None:
            raise meant
        found: TrainResult = result.return_value
        return found


def _meant(ray: Any, desk: Any) -> TSMError | None:
    error: TSMError | None = ray.get(desk.error.remote())
    return error


@contextlib.contextmanager
def _listening(ray: Any, desk: Any, asked: Callable[[], bool], say: Callable[[str], None]) -> Iterator[None]:
    """Says what workers say, and tells them to stop, for as long as this lasts."""
    over = threading.Event()

    def listen() -> None:
        told = False
        while True:
            ended = over.wait(LISTEN_S)
            if asked() and not told:
                told = True
                desk.stop.remote()
            for line in ray.get(desk.take.remote()):
                say(line)
            if ended:
                return

    thread = threading.Thread(target=listen, name="listening", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)


def parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(prog=prog, description="Train a recipe, or go on with a training.")
    found.add_argument("recipe", help="name of a recipe")
    found.add_argument("--data", help="folder that holds the data set's folder")
    found.add_argument("--work-dir", required=True, help="folder or URI (s3://, gs://) of this training")
    found.add_argument("--epochs", type=int, help="epochs (default: the recipe's); milestones keep their place")
    found.add_argument("--batch", type=int, help="videos of a micro-batch of one worker (default: the recipe's)")
    found.add_argument("--accumulate", type=int, default=1, help="micro-batches of one step")
    found.add_argument("--lr", type=float, help="learning rate (default: the recipe's, scaled to the total batch)")
    found.add_argument("--amp", choices=list(AMP), default="fp32", help="precision of the network's arithmetic")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--deterministic", action="store_true", help="the same bits every time, on the same machine")
    found.add_argument("--validate", type=int, help="epochs between validations, 0 for none (default: the recipe's)")
    found.add_argument("--loaders", type=int, help="processes of each worker that read ahead")
    found.add_argument("--init", help="none, a backbone, or a recipe whose weights to begin with")
    found.add_argument("--init-from", help="file of weights to begin with: ours or another project's")
    found.add_argument("--new-head", action="store_true", help="a new classifier even where the file's would fit")
    found.add_argument("--models", default="~/.cache/tsm-live", help="folder of pulled models and checkpoints")
    found.add_argument("--clip-frames", type=int, help="frames of a training clip, T or more")
    found.add_argument("--carry-state", action="store_true", help="train on pieces of T frames, their state carried on")
    found.add_argument("--per-frame-loss", action="store_true", help="every frame is to know the class")
    found.add_argument("--max-stride", type=int, help="draw frames 1 to so many apart, in place of segments")
    found.add_argument("--partial-bn", action="store_true", help="all norms but the first keep still")
    found.add_argument("--px", type=int, help="side of the input")
    found.add_argument("--kind", choices=["rawframes", "videos"], help="of the data (default: the recipe's)")
    found.add_argument("--split", type=int, default=1)
    found.add_argument("--steps", type=int, help="stop after so many steps")
    found.add_argument("--checkpoint-minutes", type=float, default=10.0, help="longest between two checkpoints")
    found.add_argument("--no-resume", action="store_true", help="begin anew in a work dir that holds a training")
    found.add_argument("--on-error", choices=["skip", "raise"], default="skip", help="what to do about bad videos")
    found.add_argument("--max-skipped", type=float, default=0.1, help="largest share of bad videos")
    found.add_argument("--workers", type=int, default=1, help="processes that train together")
    found.add_argument("--gpus", type=int, choices=[0, 1], help="of each worker (default: 1 if there are enough)")
    found.add_argument("--ray", action="store_true", help="run in Ray even with one worker")
    found.add_argument("--address", help="Ray cluster to join (default: RAY_ADDRESS, else this machine)")
    found.add_argument("--max-failures", type=int, default=3, help="how often workers may die")
    trial = found.add_mutually_exclusive_group()
    trial.add_argument("--dry-run", action="store_true", help="recipe, first batch, memory and time; no training")
    trial.add_argument("--profile", action="store_true", help="whether data or network is slower; no training")
    return found


def main(arguments: Sequence[str] | None = None, prog: str = PROG, models_dir: str | None = None) -> int:
    """The command; its exit status: 2 for what the caller must change, 3 for what may work later.

    models_dir: where pulled models lie unless `--models` says so; the cards that are written do not name it.
    """
    options_of = parser(prog)
    if models_dir:
        options_of.set_defaults(models=models_dir)
    given = options_of.parse_args(arguments)
    options = Options(
        epochs=given.epochs,
        batch=given.batch,
        accumulate=given.accumulate,
        lr=given.lr,
        amp=given.amp,
        seed=given.seed,
        deterministic=given.deterministic,
        validate=given.validate,
        loaders=given.loaders,
        init=given.init,
        init_from=given.init_from,
        new_head=given.new_head,
        models_dir=given.models,
        clips=ClipOptions(given.clip_frames, given.max_stride, given.kind, given.split),
        carry_state=given.carry_state,
        per_frame_loss=given.per_frame_loss,
        partial_bn=given.partial_bn or None,
        px=given.px,
        steps=given.steps,
        checkpoint_minutes=given.checkpoint_minutes,
        resume=not given.no_resume,
        on_error=given.on_error,
        max_skipped=given.max_skipped,
    )
    said = sys.argv[1:] if arguments is None else list(arguments)

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        if given.dry_run or given.profile:
            job = find_job(given.recipe, given.data, given.work_dir, options)
            device = "cuda" if torch.cuda.is_available() and given.gpus != 0 else "cpu"
            if given.dry_run:
                dry_run(job, workers=given.workers, device=device, say=say)
            else:
                profile(job, device=device, say=say)
            return 0
        result = run_training(
            given.recipe,
            data=given.data,
            work_dir=given.work_dir,
            options=options,
            workers=given.workers,
            gpus=given.gpus,
            use_ray=given.ray,
            address=given.address,
            max_failures=given.max_failures,
            say=say,
            command=f"{prog} {shlex.join(said)}",
        )
    except TSMError as error:
        print(f"error: {error} (reason: {error.reason})", file=sys.stderr)
        return 2 if isinstance(error, CallerError) else 3
    print(f"{result.model}: {result.steps} steps in {result.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    # by its name, so that other processes find there what is sent to them
    sys.exit(importlib.import_module("pipelines.train").main())
