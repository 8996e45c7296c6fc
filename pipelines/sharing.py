"""Groups of videos shared out among Ray actors: who is quick gets more; who dies is replaced, its work done again."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from pipelines.journal import Prediction
from pipelines.ray_local import ray_session
from pipelines.scoring import Group, Groups, Loader, Trial, decoders, score
from tsm_core.errors import CallerError, TSMError, WorldError
from tsm_core.model import TSM, WindowTSM

CHUNK_VIDEOS = 128  # most that a worker is given at once
MOST_DEATHS = 3  # of workers on the same group
START_S = 180.0  # longest until the first worker is there


class NotEnoughGPUs(CallerError):
    """The machine or cluster has fewer GPUs than a worker is to have."""

    reason = "not_enough_gpus"


class WorkersDied(WorldError):
    """Workers die again and again, or none can be started."""

    reason = "workers_died"


class _Worker:
    """One model in one process; scores the groups it is given."""

    def __init__(self, trial: Trial, load: Loader, threads: int) -> None:
        self._trial, self._load, self._threads = trial, load, threads
        self._model: TSM | WindowTSM | None = None

    def start(self) -> TSMError | None:
        """Load the model. Errors meant for people come back as they are; others are Ray's to tell."""
        torch.set_num_threads(self._threads)
        try:
            self._model = self._load(self._trial.device)
        except TSMError as error:
            return error
        return None

    def work(self, groups: Groups) -> Iterator[list[Prediction] | TSMError]:
        """The Predictions of each group, one after the other."""
        assert self._model is not None
        try:
            with decoders():
                yield from score(self._trial, self._model, groups)
        except TSMError as error:
            yield error


class Crew:
    """So many workers, of Ray on this machine or of a cluster."""

    def __init__(self, ray: Any, workers: int, gpus: float | None) -> None:
        self._ray, self._workers = ray, workers
        there = ray.cluster_resources()
        all_gpus = there.get("GPU", 0)
        self._gpus: float = _share(all_gpus, workers) if gpus is None else gpus
        if self._gpus > all_gpus:
            raise NotEnoughGPUs(f"{self._gpus:g} GPUs for each worker, and there are {all_gpus:g}; give fewer --gpus")
        self._cpus = _share(there.get("CPU", 1), workers)
        self.device = "cuda" if self._gpus else "cpu"

    @classmethod
    @contextlib.contextmanager
    def of(cls, workers: int, gpus: float | None, address: str | None) -> Iterator[Crew]:
        """A crew; its Ray is left behind it. gpus None: what there is, shared. Raises RayNotStarted, NotEnoughGPUs."""
        # Ray prints to stdout what becomes of its processes, amid whatever the program has to say there
        with ray_session(address, cpus=workers) as ray, contextlib.redirect_stdout(sys.stderr):
            yield cls(ray, workers, gpus)

    def share(self, trial: Trial, load: Loader, groups: Sequence[Group]) -> Generator[list[Prediction]]:
        """The Predictions of all groups, in any order. Raises WorkersDied, and what the workers meet."""
        threads = max(1, (os.cpu_count() or 1) // self._workers)
        kind = self._ray.remote(_Worker).options(num_cpus=self._cpus, num_gpus=self._gpus)
        told = self._ray.put(trial)  # once, not with every worker
        work = _Work(self._ray, partial(kind.remote, told, load, threads), trial, groups, self._workers)
        try:
            yield from work.done()
        finally:
            work.end()


class _Work:
    """Who does what, and what is still to be done."""

    def __init__(self, ray: Any, hire: Callable[[], Any], trial: Trial, groups: Sequence[Group], workers: int) -> None:
        self._ray, self._new, self._trial, self._workers = ray, hire, trial, workers
        self._waiting = deque(groups)
        self._most = max(1, CHUNK_VIDEOS // len(groups[0]))
        self._starting: dict[Any, Any] = {}  # what will say that it is ready -> worker
        self._running: dict[Any, tuple[Any, deque[Group]]] = {}  # its stream of results -> worker, groups to come
        self._deaths = Counter[Group]()
        self._death = (
            ray.exceptions.RayActorError,
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.OutOfMemoryError,
        )
        for _ in range(min(workers, len(groups))):
            self._hire()

    def done(self) -> Iterator[list[Prediction]]:
        """The Predictions of a group whenever a worker has them."""
        while self._waiting or self._running:
            patience = None if self._running else START_S
            ready, _ = self._ray.wait([*self._starting, *self._running], num_returns=1, timeout=patience)
            if not ready:
                raise WorkersDied(f"no worker is there after {START_S:g} s; free on the cluster: {self._free()}")
            result = self._started(ready[0]) if ready[0] in self._starting else self._told(ready[0])
            if isinstance(result, TSMError):
                raise result
            if result is not None:
                yield result

    def end(self) -> None:
        """Let all workers go."""
        for worker in (*self._starting.values(), *(worker for worker, _ in self._running.values())):
            self._ray.kill(worker)

    def _started(self, ready: Any) -> TSMError | None:
        worker = self._starting.pop(ready)
        try:
            trouble: TSMError | None = self._ray.get(ready)
        except self._death as error:
            self._lose((), error)
            return None
        if trouble is None:
            self._deaths[()] = 0
            self._give(worker)
        else:
            self._ray.kill(worker)
        return trouble

    def _told(self, stream: Any) -> list[Prediction] | TSMError | None:
        worker, chunk = self._running[stream]
        try:
            result: list[Prediction] | TSMError = self._ray.get(next(stream))
        except StopIteration:
            del self._running[stream]
            self._give(worker)
            return None
        except self._death as error:
            del self._running[stream]
            self._lose(chunk, error)
            return None
        chunk.popleft()
        return result

    def _hire(self) -> None:
        worker = self._new()
        self._starting[worker.start.remote()] = worker

    def _give(self, worker: Any) -> None:
        """The next groups; the fewer are left the fewer at once, so that all end together."""
        count = max(1, min(self._most, len(self._waiting) // (2 * self._workers)))
        chunk = deque(self._waiting.popleft() for _ in range(min(count, len(self._waiting))))
        if chunk:
            stream = worker.work.options(num_returns="streaming").remote(list(chunk))
            self._running[stream] = worker, chunk
        else:
            self._ray.kill(worker)

    def _lose(self, chunk: Sequence[Group], error: Exception) -> None:
        """A worker died over the first of these groups: they wait again, and another worker comes."""
        culprit = chunk[0] if chunk else ()
        self._deaths[culprit] += 1
        if self._deaths[culprit] >= MOST_DEATHS:
            paths = ", ".join(self._trial.videos.records[index].path for index in culprit)
            when = f"on {paths}" if paths else "before they had anything to do"
            raise WorkersDied(f"{MOST_DEATHS} workers died {when}: {str(error).strip()[:400]}") from None
        self._waiting.extendleft(reversed(chunk))
        self._hire()

    def _free(self) -> str:
        free = self._ray.available_resources()
        return ", ".join(f"{name} {free.get(name, 0):g}" for name in ("CPU", "GPU"))


def _share(there: float, workers: int) -> float:
    """What one worker can have of so many, no more than one, such that all find a place."""
    return 1 / math.ceil(max(1.0, workers / there)) if there else 0.0
