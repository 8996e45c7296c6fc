"""Before a long training: what it would do, see, need and take; and whether its data or its arithmetic is slower."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pipelines.init_weights import NoInitialWeights
from pipelines.learners import new_study
from pipelines.study import Seen, Study, Team
from pipelines.training_data import Order
from pipelines.training_job import Job
from pipelines.work_dir import WorkDir

PICTURE = "first_batch.png"
MEASURED = 2  # steps
WARM_UP = 1
READ_AHEAD = 2  # batches of each loader, torch's default
LEFT_OUT = ("labels", "background", "published", "checkpoint")  # of a recipe, when it is shown
CLOSE = 0.9  # rates that differ by less are called even

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a training would be like. *_bytes: of one worker; peak_bytes: measured, on a GPU alone."""

    recipe: dict[str, Any]
    learning_rate: float
    total_batch: int
    steps_per_epoch: int
    picture: str
    labels: list[str]
    parameters_bytes: int
    gradients_bytes: int
    momentum_bytes: int
    activations_bytes: int
    peak_bytes: int | None
    step_s: float
    clips_per_s: float
    epoch_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Clips per second of one worker: of its data alone, of its network alone, of both; and which is the slower."""

    data: float
    compute: float
    together: float
    bottleneck: str
    advice: str


def dry_run(job: Job, *, workers: int = 1, device: str = "cpu", say: Say = print) -> DryRun:
    """The resolved recipe, the first batch as a picture in the work dir, memory, and time from two measured steps.

    Nothing else is written. workers: of the training that is planned; one of them is tried here.
    """
    learning = _prepared(job, device, say)
    order = learning.order
    planned = Order(order.size, order.batch, workers, order.accumulate, order.seed)
    for name, value in (shown := _shown(job)).items():
        say(f"{name}: {json.dumps(value)}")
    batches = learning.batches()
    steps = [list(islice(batches, order.pieces(number))) for number in range(min(order.steps, WARM_UP + MEASURED))]
    first = steps[0][0]
    if first.error is not None:
        raise first.error
    sheet, captions = learning.picture(first)
    with WorkDir(job.work_dir) as folder:
        folder.write(PICTURE, lambda path: sheet.save(path, "PNG"))
        picture = f"{folder.place.rstrip('/')}/{PICTURE}"
    say(f"first batch: {picture} ({len(captions)} clips: {', '.join(captions[:4])}{', ...' * (len(captions) > 4)})")
    kept = _Kept(learning)
    with kept.counting():
        _step(learning, steps[0], 0)
    began_s = time.monotonic()
    for number in range(MEASURED):
        _step(learning, steps[(number + 1) % len(steps)], number + 1)
    step_s = (time.monotonic() - began_s) / MEASURED
    parameters = sum(each.numel() * each.element_size() for each in learning.model.parameters())
    trained = sum(each.numel() * each.element_size() for each in learning.parameters)
    momentum = sum(
        each.numel() * each.element_size()
        for state in learning.optimiser.state.values()
        for each in state.values()
        if isinstance(each, Tensor)
    )
    peak = torch.cuda.max_memory_allocated() if learning.device.type == "cuda" else None
    epoch_s = planned.steps * step_s
    found = DryRun(
        recipe=shown,
        learning_rate=_planned_rate(learning, planned),
        total_batch=planned.total_batch,
        steps_per_epoch=planned.steps,
        picture=picture,
        labels=captions,
        parameters_bytes=parameters,
        gradients_bytes=trained,
        momentum_bytes=momentum,
        activations_bytes=kept.total,
        peak_bytes=peak,
        step_s=step_s,
        clips_per_s=planned.total_batch / step_s,
        epoch_s=epoch_s,
        total_s=epoch_s * job.training.epochs,
    )
    say(
        f"memory of a worker: parameters {_mib(parameters)}, gradients {_mib(trained)}, momentum {_mib(momentum)}, "
        f"activations {_mib(kept.total)}" + ("" if peak is None else f"; peak on the GPU {_mib(peak)}")
    )
    say(
        f"time: {step_s:.2f} s a step of {planned.total_batch} clips, without waiting for data (--profile measures it "
        f"too); {planned.steps} steps an epoch; {job.training.epochs} epochs take {found.total_s / 3600:.1f} h without "
        "validation"
    )
    return found


def _planned_rate(learning: Study, planned: Order) -> float:
    """The learning rate with the planned number of workers."""
    return learning.lr if learning.options.lr else learning.lr * planned.total_batch / learning.order.total_batch


def profile(job: Job, *, device: str = "cpu", steps: int = 10, say: Say = print) -> Profile:
    """Measure one worker's data alone, its network alone, and both, over so many steps each."""
    learning = _prepared(job, device, say)
    order = learning.order

    def read() -> Iterator[list[Seen]]:
        endless = replace(job.training, epochs=10**6)
        learning.training = endless
        batches = learning.batches()
        number = 0
        while True:
            yield list(islice(batches, order.pieces(number % order.steps)))
            number += 1

    source = read()
    held = next(source)
    if held[0].error is not None:
        raise held[0].error
    for _ in range(READ_AHEAD * learning.loaders):  # they were read before the clock starts
        next(source)
    data = _rate(steps, lambda _: _clips(next(source)), learning)
    _step(learning, held, 0)

    def compute(number: int) -> int:
        _step(learning, held, number)
        return _clips(held)

    def both(number: int) -> int:
        batches = next(source)
        _step(learning, batches, number)
        return _clips(batches)

    network = _rate(steps, compute, learning)
    for _ in range(READ_AHEAD * learning.loaders):
        next(source)
    together = _rate(steps, both, learning)
    if min(data, network) > CLOSE * max(data, network):
        bottleneck, advice = "neither", "data and network are about as fast as each other"
    elif data < network:
        bottleneck = "data"
        advice = f"the network waits for its data: more --loaders ({learning.loaders} now), or smaller stored frames"
    else:
        bottleneck = "compute"
        advice = "the data waits for the network: --amp bf16, a larger --batch, or more --workers"
    say(f"data only {data:.1f} clips/s, compute only {network:.1f} clips/s, together {together:.1f} clips/s")
    say(f"bottleneck: {bottleneck}; {advice}")
    return Profile(data, network, together, bottleneck, advice)


def _prepared(job: Job, device: str, say: Say) -> Study:
    learning = new_study(job, Team(device=device, say=say))
    try:
        say(f"{job.recipe.name} {learning.begin()}")
    except NoInitialWeights as error:  # the rest is worth knowing all the same
        say(f"the training would not begin: {error}")
    learning.prepare()
    return learning


def _shown(job: Job) -> dict[str, Any]:
    recipe = asdict(job.recipe)
    training = recipe.pop("training")
    training.pop("groups", None)
    shown = {name: value for name, value in recipe.items() if name not in LEFT_OUT}
    return {**shown, "classes": len(job.recipe.labels), "training": training}


def _step(learning: Study, batches: Sequence[Seen], number: int) -> None:
    learning.step(batches, 0, number, 0.0)  # it waits for the device, and learns nothing


def _clips(batches: Sequence[Seen]) -> int:
    return sum(len(batch.pixels) for batch in batches)


def _rate(steps: int, action: Callable[[int], int], learning: Study) -> float:
    began_s = time.monotonic()
    clips = sum(action(number) for number in range(steps))
    if learning.device.type == "cuda":
        torch.cuda.synchronize()
    return clips / (time.monotonic() - began_s)


class _Kept:
    """Bytes of what autograd keeps for the way back, without the parameters."""

    def __init__(self, learning: Study) -> None:
        self.total = 0
        self._seen = {each.untyped_storage().data_ptr() for each in learning.model.parameters()}

    def counting(self) -> AbstractContextManager[None]:
        """Count for a while."""
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda kept: kept)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
