"""A network while it learns: one process's part of each step, and how good the network is by now."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pipelines.augment import Blend, ClipAugment, soft_cross_entropy
from pipelines.metrics import confusion_matrix, mean_class_accuracy, ranking, top_k_accuracy
from pipelines.optim import freeze_norms, scaled_lr, set_rate, sgd
from pipelines.scoring import NotFinite
from pipelines.training_data import (
    AugmentedClips,
    Batch,
    Judged,
    NothingReadable,
    Order,
    TrainingData,
    ValidationViews,
    load_batches,
    load_views,
    open_training_data,
    taken,
)
from pipelines.training_job import AMP, Job
from tsm_core.backbones import run as run_network
from tsm_core.errors import TSMError
from tsm_core.model import TSM, build
from tsm_core.preprocess import normalise
from tsm_core.shift import ClipPass, Start, shift_clip

T = TypeVar("T")

MOST_LOADERS = 8
VIEWS = {"cuda": 32, "cpu": 4}  # at a time


@dataclass
class Team:
    """One process among those that train together.

    say: a line for people. report: figures of an epoch. stopping: whether somebody wants it to end. agreed: whether the
    error that was raised is known to all.
    """

    rank: int = 0
    workers: int = 1
    device: str = "cpu"
    say: Callable[[str], None] = print
    report: Callable[[dict[str, float]], None] = lambda _: None
    stopping: Callable[[], bool] = lambda: False
    agreed: bool = False

    def together(self, action: Callable[[], T]) -> T:
        """`action()` in every process; if one of them fails, all raise its error rather than wait for it."""
        result, error = None, None
        try:
            result = action()
        except TSMError as raised:
            error = raised
        errors = self.gather(error)
        first = next((each for each in errors if each is not None), None)
        if first is not None:
            self.agreed = True
            raise first
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The values of all processes."""
        if self.workers == 1:
            return [value]
        values: list[Any] = [None] * self.workers
        distributed.all_gather_object(values, value)
        return values

    def total(self, values: Tensor) -> list[float]:
        """Sums over all processes."""
        if self.workers > 1:
            distributed.all_reduce(values)
        found: list[float] = values.tolist()
        return found


# --- the network while it learns


class CarriedPass(ClipPass):
    """A call over clips of T frames that go on where others ended: reads `held`, collects `next_held`.

    held: of each shifted layer the first channels (N, fold, H, W) of the frame before the first; None: there is none.
    What is held takes no gradient.
    """

    def __init__(self, frames: int, held: dict[int, Tensor] | None, start: Start) -> None:
        super().__init__(frames, "uni", start)
        self.held, self.next_held = held, dict[int, Tensor]()

    def shift(self, layer: int, x: Tensor, fold_div: int) -> Tensor:
        """Frames (N * T, C, H, W) -> same shape."""
        clip = x.view(-1, self.frames, *x.shape[1:])
        shifted = shift_clip(clip, fold_div, "uni", self.start)
        fold = x.shape[1] // fold_div
        self.next_held[layer] = clip[:, -1, :fold].detach()
        if self.held is not None:
            shifted[:, 0, :fold] = self.held[layer]
        return shifted.flatten(0, 1)


class Learner(nn.Module):
    """The model, as one call that DDP can wrap: logits of frames, and the shift state behind them if it is carried."""

    def __init__(self, model: TSM, carry: bool) -> None:
        super().__init__()
        self.model, self.carry = model, carry

    def forward(self, clip: Tensor, held: dict[int, Tensor] | None = None) -> tuple[Tensor, dict[int, Tensor] | None]:
        """Logits (N, T, K) of clip (N, T, 3, H, W), and what the next piece of it is held."""
        if not self.carry:
            return self.model.forward_frames(clip), None
        how = CarriedPass(clip.shape[1], held, self.model.recipe.start)
        logits = run_network(self.model.net, clip.flatten(0, 1), how)
        return logits.view(*clip.shape[:2], -1), how.next_held


class StepFacts(NamedTuple):
    """One step, summed over all workers: loss x clips, clips that were right, clips, replaced videos.

    bad: it was left out. overflow: only because fp16 ends so early.
    """

    loss: float
    right: float
    clips: float
    replaced: float
    stopping: bool
    bad: bool
    overflow: bool


class Learning:
    """One process's part of one training."""

    def __init__(self, job: Job, team: Team) -> None:
        self.job, self.team, self.options = job, team, job.options
        self.recipe, self.training = job.recipe, job.training
        self.device = torch.device(team.device)
        self.validate = self.training.validate_epochs if job.options.validate is None else job.options.validate
        self.data = team.together(self._open_data)
        self.order = Order(len(self.data.train), job.batch, team.workers, self.options.accumulate, self.options.seed)
        self.lr = self.options.lr or scaled_lr(self.training, self.order.total_batch)
        torch.manual_seed(self.options.seed)
        self.model = build(self.recipe)
        self.blend = Blend(self.training.blend, len(self.recipe.labels))

    def _open_data(self) -> TrainingData:
        return open_training_data(self.recipe, self.job.data, self.options.clips, validate=self.validate > 0)

    @property
    def facts(self) -> dict[str, Any]:
        """What makes this training another than others."""
        told: dict[str, Any] = json.loads(self.recipe.to_json())
        for name in ("published", "checkpoint"):
            told.pop(name)
        options = self.options
        return {
            "recipe": told,
            "data": {
                "train": self.data.train.identity,
                **({"val": self.data.val.identity} if self.data.val is not None else {}),
            },
            "batch": self.order.batch,
            "total_batch": self.order.total_batch,
            "lr": self.lr,
            "amp": options.amp,
            "seed": options.seed,
            "clips": asdict(options.clips),
            "carry_state": options.carry_state,
            "per_frame_loss": options.per_frame_loss,
            "init": options.init_from or options.init,
        }

    def prepare(self) -> None:
        """Bring the network to the device, with its optimiser."""
        net = self.model.net
        net.train()
        if self.training.partial_bn:
            freeze_norms(net)
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = sgd(net, self.training)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.amp == "fp16")
        self.parameters = [each for each in net.parameters() if each.requires_grad]
        self.buffers = list(net.buffers())
        self._kept = [buffer.clone() for buffer in self.buffers]
        learner = Learner(self.model, self.options.carry_state)
        self.learner: nn.Module = learner
        if self.team.workers > 1:
            on = [self.device] if self.device.type == "cuda" else None
            self.learner = DistributedDataParallel(
                learner, device_ids=on, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    # --- one step

    def batches(self, first: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """The worker's micro-batches from step `first` to the end."""
        spec, seed = self.recipe.preprocess, self.options.seed

        def new_augment(number: int) -> ClipAugment:
            return ClipAugment(self.training, spec, worker_seed=seed * 1000 + number)

        clips = AugmentedClips(self.data.train, new_augment, seed, self.options.on_error)
        places = self.order.micro_batches(self.training.epochs, self.team.rank, first=first)
        return load_batches(clips, places, self.loaders, pin=self.device.type == "cuda")

    @property
    def loaders(self) -> int:
        """Processes that read ahead."""
        if self.options.loaders is not None:
            return self.options.loaders
        cpus = os.cpu_count() or 1
        if self.device.type == "cpu":
            return 0 if self.team.workers > 1 else min(1, cpus - 1)  # the network needs the others
        return max(1, min(MOST_LOADERS, cpus // self.team.workers - 1))

    def step(self, batches: Sequence[Batch], epoch: int, number: int, lr: float) -> StepFacts:
        """Learn from the micro-batches of one step, or leave it out where its loss or gradient is no number."""
        for batch in batches:
            if batch.error is not None:
                raise batch.error
        torch._foreach_copy_(self._kept, self.buffers)
        set_rate(self.optimiser, lr)
        clips = sum(len(batch.labels) for batch in batches)
        sums = torch.zeros(2, device=self.device)
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            sums += self._learn(batch, (epoch, number, place * self.team.workers + self.team.rank), clips, last)
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.training.clip_norm)
        replaced = sum(len(batch.replaced) for batch in batches)
        others = [clips, replaced, float(self.team.stopping())]
        loss, right, clips_of_all, replaced_of_all, stopping = self.team.total(
            torch.cat([sums.double(), torch.tensor(others, dtype=torch.float64, device=self.device)])
        )
        bad = not math.isfinite(norm.item())  # the same in all workers, as their gradients are
        if bad:
            torch._foreach_copy_(self.buffers, self._kept)
        else:
            self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        overflow = bad and math.isfinite(loss) and self.options.amp == "fp16"
        return StepFacts(loss, right, clips_of_all, replaced_of_all, stopping > 0, bad, overflow)

    def _learn(self, batch: Batch, draw: tuple[int, int, int], clips: int, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; its (loss x clips, clips that were right)."""
        seed = int(np.random.SeedSequence((self.options.seed, *draw)).generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)
        pixels = batch.pixels.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        clip = normalise(pixels, self.recipe.preprocess)
        clip, soft = self.blend(clip, labels, torch.Generator().manual_seed(seed))
        pieces = torch.split(clip, self.recipe.frames, dim=1) if self.options.carry_state else (clip,)
        share = len(labels) / clips / len(pieces)
        held: dict[int, Tensor] | None = None
        sums = torch.zeros(2, device=self.device)
        for number, piece in enumerate(pieces):
            with self._sync(last and number == len(pieces) - 1):
                with self.autocast():
                    logits, held = self.learner(piece, held)
                loss = self._loss(logits.float(), labels, soft)
                torch.autograd.backward(self.scaler.scale(loss * share))
            right = (logits.detach().mean(1).argmax(1) == labels).sum()
            sums += torch.stack([loss.detach() * len(labels), right]) / len(pieces)
        return sums

    def _loss(self, logits: Tensor, labels: Tensor, soft: Tensor) -> Tensor:
        frames = logits.shape[1]
        if self.options.per_frame_loss:
            flat, labels, soft = (
                logits.flatten(0, 1),
                labels.repeat_interleave(frames),
                soft.repeat_interleave(frames, 0),
            )
        else:
            flat = logits.mean(1)
        return (
            functional.cross_entropy(flat, labels) if self.training.blend == "none" else soft_cross_entropy(flat, soft)
        )

    def _sync(self, now: bool) -> AbstractContextManager[None]:
        if now or not isinstance(self.learner, DistributedDataParallel):
            return nullcontext()
        waiting: AbstractContextManager[None] = self.learner.no_sync()
        return waiting

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where it is asked for."""
        dtype = AMP[self.options.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    # --- validation

    def judge(self) -> dict[str, float]:
        """Figures of the validation videos, by the recipe's efficient views; the same in all workers."""
        source = self.data.val
        assert source is not None
        recipe, rank, workers = self.recipe, self.team.rank, self.team.workers
        if workers > 1:
            for buffer in self.buffers:
                distributed.broadcast(buffer, 0)
        videos = ValidationViews(source, recipe.efficient, recipe.preprocess)
        mine = range(rank, len(source), workers)
        rows: list[tuple[int, int, float, list[int]]] = []  # video, label, loss, first classes
        unreadable: list[str] = []
        self.model.net.eval()
        for group in taken(load_views(videos, mine, self.loaders), VIEWS[self.device.type]):
            unreadable += [each.error for each in group if each.error is not None]
            there = [each for each in group if each.views is not None]
            if there:
                rows += self._judged(there)
        self.model.net.train()
        if self.training.partial_bn:
            freeze_norms(self.model.net)
        found = sorted(row for rows in self.team.gather(rows) for row in rows)
        lost = [error for errors in self.team.gather(unreadable) for error in errors]
        if len(lost) > self.options.max_skipped * len(source):
            raise NothingReadable(
                f"{len(lost)} of {len(source)} validation videos cannot be read, and "
                f"{self.options.max_skipped:g} is the most (--max-skipped); the first: {lost[0]}",
                reason="too_many_unreadable",
            )
        ranks, labels = np.array([row[3] for row in found]), np.array([row[1] for row in found])
        confusion = confusion_matrix(ranks[:, 0], labels, len(recipe.labels))
        return {
            "val_loss": float(np.mean([row[2] for row in found])),
            "top1": top_k_accuracy(ranks, labels, 1),
            "top5": top_k_accuracy(ranks, labels, 5),
            "mean_class": mean_class_accuracy(confusion, recipe.convention),
            "val_unreadable": float(len(lost)),
        }

    def _judged(self, group: Sequence[Judged]) -> list[tuple[int, int, float, list[int]]]:
        recipe = self.recipe
        counts = [len(each.views) for each in group if each.views is not None]
        views = torch.cat([each.views for each in group if each.views is not None])
        with torch.inference_mode(), self.autocast():
            logits = torch.cat(
                [
                    self.model(normalise(part.to(self.device, non_blocking=True), recipe.preprocess)).float()
                    for part in torch.split(views, VIEWS[self.device.type])
                ]
            )
        if not logits.isfinite().all():
            raise NotFinite(
                f"the network's scores of validation videos are no numbers ({recipe.name}); the weights have diverged"
            )
        rows = []
        for each, scores in zip(group, torch.split(logits.double().cpu(), counts), strict=True):
            shares = scores.mean(0).softmax(0) if recipe.convention == "mit" else scores.softmax(1).mean(0)
            loss = -float(shares[each.label].clamp(min=1e-12).log())
            rows.append((each.video, each.label, loss, ranking(shares[None].numpy())[0].tolist()))
        return rows
