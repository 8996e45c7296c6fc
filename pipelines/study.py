"""What learns while a training goes on: one process's part of each step, whatever it is that is learnt."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.optim import scaled_lr, set_rate
from pipelines.training_data import Order
from pipelines.training_job import AMP, Job
from tsm_core.errors import TSMError

T = TypeVar("T")

MOST_LOADERS = 8


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


class Seen(Protocol):
    """A micro-batch: pixels uint8 (N, T, 3, h, w) of clips, and why videos were replaced by others.

    error: why there is no batch.
    """

    @property
    def pixels(self) -> Tensor:
        """Of N clips."""
        ...

    @property
    def replaced(self) -> list[str]:
        """A sentence for each."""
        ...

    @property
    def error(self) -> TSMError | None:
        """None: there is a batch."""
        ...


class Study(ABC):
    """One process's part of one training.

    columns: figures of an epoch beside its loss, in the order of metrics.csv. judged: those of a validation. goal: the
    one by which an epoch is the best. Its children say what is learnt from what, and how it is judged.
    """

    columns: ClassVar[tuple[str, ...]]
    judged: ClassVar[tuple[str, ...]]
    goal: ClassVar[str]

    model: Any  # TSM or TSMDetector
    data: Any  # train and val, None where nothing is validated
    device: torch.device

    def __init__(self, job: Job, team: Team) -> None:
        self.job, self.team, self.options = job, team, job.options
        self.training = job.training
        self.device = torch.device(team.device)
        self.validate = self.training.validate_epochs if job.options.validate is None else job.options.validate
        self.data = team.together(self._open_data)
        self.order = Order(len(self.data.train), job.batch, team.workers, self.options.accumulate, self.options.seed)
        self.lr = self.options.lr or scaled_lr(self.training, self.order.total_batch)
        torch.manual_seed(self.options.seed)
        self.model = self._build()

    @abstractmethod
    def _open_data(self) -> Any:
        """Videos to train on, and those to be judged by."""

    @abstractmethod
    def _build(self) -> Any:
        """The model of the recipe, with random weights."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """Whose weights a checkpoint has."""

    @property
    def facts(self) -> dict[str, Any]:
        """What makes this training another than others."""
        told: dict[str, Any] = json.loads(self.job.recipe.to_json())
        for name in ("published", "checkpoint"):
            told.pop(name, None)
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
            "init": options.init_from or options.init,
        }

    # --- begin

    @abstractmethod
    def begin(self) -> str:
        """Give the model its initial weights; a sentence that says which. Raises NoInitialWeights, ModelFileError."""

    def prepare(self) -> None:
        """Bring the network to the device, with its optimiser."""
        self._to_training()
        self.model.to(self.device, memory_format=torch.channels_last)
        self.optimiser = self._optimiser()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.amp == "fp16")
        self.parameters = [each for each in self.network.parameters() if each.requires_grad]
        self.buffers = list(self.network.buffers())
        self._kept = [buffer.clone() for buffer in self.buffers]
        self.learner: nn.Module = self._learner()
        if self.team.workers > 1:
            on = [self.device] if self.device.type == "cuda" else None
            self.learner = DistributedDataParallel(
                self.learner, device_ids=on, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    @abstractmethod
    def _to_training(self) -> None:
        """Bring the network into the state in which it learns, from whatever state."""

    @abstractmethod
    def _optimiser(self) -> torch.optim.Optimizer:
        """Of the network's parameters, in groups that have an `lr_factor`."""

    @abstractmethod
    def _learner(self) -> nn.Module:
        """The model as one call that DDP can wrap."""

    # --- one step

    @abstractmethod
    def rate(self, epoch: int, step: int) -> float:
        """The learning rate of a step; both count from 0."""

    @abstractmethod
    def batches(self, first: tuple[int, int] = (0, 0)) -> Iterator[Any]:
        """The worker's micro-batches from step `first` to the end."""

    @property
    def loaders(self) -> int:
        """Processes that read ahead."""
        if self.options.loaders is not None:
            return self.options.loaders
        cpus = os.cpu_count() or 1
        if self.device.type == "cpu":
            return 0 if self.team.workers > 1 else min(1, cpus - 1)  # the network needs the others
        return max(1, min(MOST_LOADERS, cpus // self.team.workers - 1))

    def step(self, batches: Sequence[Seen], epoch: int, number: int, lr: float) -> StepFacts:
        """Learn from the micro-batches of one step, or leave it out where its loss or gradient is no number."""
        for batch in batches:
            if batch.error is not None:
                raise batch.error
        torch._foreach_copy_(self._kept, self.buffers)
        set_rate(self.optimiser, lr)
        clips = sum(len(batch.pixels) for batch in batches)
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

    @abstractmethod
    def _learn(self, batch: Any, draw: tuple[int, int, int], clips: int, last: bool) -> Tensor:
        """Add the gradients of one micro-batch, of a step of so many clips; its (loss x clips, clips that were right).

        draw: numbers that are this micro-batch's alone, whoever has it. last: of the step.
        """

    def _seed(self, draw: tuple[int, int, int]) -> int:
        """Seed torch for a micro-batch."""
        seed = int(np.random.SeedSequence((self.options.seed, *draw)).generate_state(1, np.uint64)[0] >> 1)
        torch.manual_seed(seed)
        return seed

    def _sync(self, now: bool) -> AbstractContextManager[None]:
        if now or not isinstance(self.learner, DistributedDataParallel):
            return nullcontext()
        waiting: AbstractContextManager[None] = self.learner.no_sync()
        return waiting

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, where it is asked for."""
        dtype = AMP[self.options.amp]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    # --- how good it is

    @abstractmethod
    def judge(self) -> dict[str, float]:
        """Figures of the validation videos; the same in all workers."""

    def _share_buffers(self) -> None:
        """Give all workers the buffers of the first: each has seen other clips."""
        if self.team.workers > 1:
            for buffer in self.buffers:
                distributed.broadcast(buffer, 0)

    @abstractmethod
    def figures(self, right: float, clips: float) -> dict[str, float]:
        """Of an epoch's training clips, beside their loss."""

    @abstractmethod
    def words(self, row: Mapping[str, float]) -> str:
        """An epoch's figures for people."""

    # --- for people

    @abstractmethod
    def picture(self, batch: Any) -> tuple[Image.Image, list[str]]:
        """The clips of a micro-batch, and a caption of each."""
