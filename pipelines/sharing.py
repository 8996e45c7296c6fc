"""Groups of videos shared out among Ray actors: who is quick gets more; who dies is replaced, its work done again."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from pipelines.journal import Prediction
from pipelines.ray_local import ray_session
from pipelines.scoring import Groups, Loader, Trial, score
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

    def share(self, trial: Trial, load: Loader, groups: Sequence[tuple[int, ...]]) -> Generator[list[Prediction]]:
        """The Predictions of all groups, in any order. Raises WorkersDied, and what the workers meet."""
        ray = self._ray
        kind = ray.remote(_Worker).options(num_cpus=self._cpus, num_gpus=self._gpus)
        threads = max(1, (os.cpu_count() or 1) // self._workers)
        told = ray.put(trial)  # once, not with every worker
        waiting, deaths = deque(groups), Counter[tuple[int, ...]]()
        starting: dict[Any, Any] = {}  # what will say that it is ready -> worker
        running: dict[Any, tuple[Any, deque[tuple[int, ...]]]] = {}  # its stream of results -> worker, groups to come

        def hire() -> None:
            worker = kind.remote(told, load, threads)
            starting[worker.start.remote()] = worker

        def give(worker: Any) -> None:
            fair = len(waiting) // (2 * self._workers)
            count = max(1, min(fair, CHUNK_VIDEOS // len(groups[0])))
            chunk = deque(waiting.popleft() for _ in range(min(count, len(waiting))))
            if chunk:
                stream = worker.work.options(num_returns="streaming").remote(list(chunk))
                running[stream] = worker, chunk
            else:
                ray.kill(worker)

        def lose(chunk: Sequence[tuple[int, ...]], error: Exception) -> None:
            culprit = chunk[0] if chunk else ()
            deaths[culprit] += 1
            if deaths[culprit] >= MOST_DEATHS:
                paths = ", ".join(trial.videos.records[index].path for index in culprit)
                when = f"on {paths}" if paths else "before they had anything to do"
                raise WorkersDied(f"{MOST_DEATHS} workers died {when}: {str(error).strip()[:400]}") from None
            waiting.extendleft(reversed(chunk))
            hire()

        for _ in range(min(self._workers, len(groups))):
            hire()
        died = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError)
        try:
            while waiting or running:
                ready, _ = ray.wait([*starting, *running], num_returns=1, timeout=START_S if not running else None)
                if not ready:
                    raise WorkersDied(f"no worker is there after {START_S:g} s; free on the cluster: {_free(ray)}")
                (one,) = ready
                if one in starting:
                    worker = starting.pop(one)
                    try:
                        trouble = ray.get(one)
                    except died as error:
                        lose((), error)
                        continue
                    if trouble is not None:
                        raise trouble
                    deaths[()] = 0
                    give(worker)
                    continue
                worker, chunk = running[one]
                try:
                    result = ray.get(next(one))
                except StopIteration:
                    del running[one]
                    give(worker)
                except died as error:
                    del running[one]
                    lose(chunk, error)
                else:
                    if isinstance(result, TSMError):
                        raise result
                    chunk.popleft()
                    yield result
        finally:
            for worker in (*starting.values(), *(worker for worker, _ in running.values())):
                ray.kill(worker)


def _share(there: float, workers: int) -> float:
    """What one worker can have of so many, no more than one, such that all find a place."""
    return 1 / math.ceil(max(1.0, workers / there)) if there else 0.0


def _free(ray: Any) -> str:
    return ", ".join(f"{name} {ray.available_resources().get(name, 0):g}" for name in ("CPU", "GPU"))
