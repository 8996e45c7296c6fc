"""Many sequences at once, through `tsm serve` and the public tritonclient: `python -m tests.benchmark.sequences`.

Every sequence has pictures of its own. Each answer is compared with what stepping that sequence alone gives, so a
state that crossed over from another would show. Afterwards the same once more, while one of the two replicas is killed:
who pushes counts the frames, and sends those again that were lost. Writes results/sequences.json; exits with 1 where a
frame failed, was counted twice or not at all, or had scores that are not its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from pipelines.scenes import Scene
from tests.benchmark.run import RESULTS, machine
from tsm_core.checkpoints import load_recogniser
from tsm_core.postprocess import new_smoother
from tsm_core.zoo import find_model

MODEL = "motion9"
SIZE_PX, FPS = 64, 15
FILMS, FILM_FRAMES = 20, 60
START_S = 600.0
TOLERANCE = 5e-3  # of a score: a sequence that moves to another replica takes its state along as float16
ENGINE = "ServeReplica:tsm:Engine"
COMMAND = "python -m tests.benchmark.sequences"


@dataclass
class Told:
    """What one sequence was told."""

    scores: dict[int, np.ndarray] = field(default_factory=dict)
    miscounted: int = 0
    again: int = 0  # frames that were sent once more
    epochs: set[int] = field(default_factory=set)
    latencies_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def rows(self) -> np.ndarray:
        """Scores (frames, K)."""
        return np.asarray([self.scores[number] for number in range(len(self.scores))])


def films() -> np.ndarray:
    """uint8 (films, frames, H, W, 3)."""
    scenes = [Scene(90_000 + number, size_px=SIZE_PX, fps=FPS) for number in range(FILMS)]
    return np.stack([[scene.frame(number) for number in range(FILM_FRAMES)] for scene in scenes])


def picture(pictures: np.ndarray, sequence: int, number: int) -> np.ndarray:
    """Frame `number` of a sequence (H, W, 3): no two sequences have the same."""
    film, offset = sequence % FILMS, 3 * (sequence // FILMS)
    return np.roll(pictures[film, (number + offset) % FILM_FRAMES], sequence // FILMS, axis=1)


async def push(client: Any, pictures: np.ndarray, name: int, sequence: int, until_s: float, told: Told) -> None:
    """One frame after the other until the time is up; the last one ends the sequence.

    name: the sequence's id; sequence: which pictures it has.
    """
    number, over = 0, False
    while not over:
        over = time.monotonic() >= until_s
        tensor = triton.InferInput("frame", [1, SIZE_PX, SIZE_PX, 3], "UINT8")
        tensor.set_data_from_numpy(picture(pictures, sequence, number)[None])
        began_s = time.monotonic()
        try:
            reply = await client.infer(
                MODEL,
                [tensor],
                outputs=[triton.InferRequestedOutput("scores")],
                sequence_id=name,
                sequence_start=number == 0,
                sequence_end=over,
                parameters={"timestamp": number / FPS, "frame_number": number},
            )
        except InferenceServerException as error:
            if behind := re.search(r"goes on with frame (\d+)", str(error)):
                told.again += number - int(behind[1])
                number, over = int(behind[1]), False
                continue
            told.errors.append(str(error)[:200])
            return
        said = reply.get_response().parameters
        told.latencies_s.append(time.monotonic() - began_s)
        told.scores[number] = reply.as_numpy("scores")[0]
        told.miscounted += said["frame_number"].int64_param != number
        told.epochs.add(said["epoch"].int64_param)
        number += 1


async def load(
    address: str, pictures: np.ndarray, sequences: int, seconds: float, kill: Callable[[], None] | None = None
) -> list[Told]:
    """What all sequences were told; kill is called after a third of the time."""
    told = [Told() for _ in range(sequences)]
    until_s = time.monotonic() + seconds
    first = 1 if kill is None else 100_001
    async with triton.InferenceServerClient(address) as client:
        pushing = [push(client, pictures, first + index, index, until_s, one) for index, one in enumerate(told)]
        running = asyncio.gather(*pushing)
        if kill is not None:
            await asyncio.sleep(seconds / 3)
            kill()
        await running
    return told


def kill_a_replica(service: subprocess.Popen[bytes]) -> None:
    """SIGKILL to one of the processes that hold a model."""
    processes = psutil.Process(service.pid).children(recursive=True)
    next(one for one in processes if ENGINE in " ".join(one.cmdline())).kill()


def alone(pictures: np.ndarray, sequence: int, frames: int, model: Any) -> np.ndarray:
    """Scores (frames, K) of a sequence that is stepped alone."""
    arena, smoother = model.new_arena(1), new_smoother(model.recipe)
    slot, rows = arena.allocate(), []
    for number in range(frames):
        image = torch.from_numpy(picture(pictures, sequence, number).copy()).permute(2, 0, 1)
        logits = model.step(model.preprocess([image]), arena, [slot])[0]
        rows.append(smoother.update(logits, number / FPS))
    return np.asarray(rows)


def judge(pictures: np.ndarray, told: Sequence[Told], seconds: float) -> dict[str, Any]:
    """The figures of a run."""
    torch.set_num_threads(1)
    model = load_recogniser(find_model(MODEL)).for_inference()
    worst, others = 0.0, []
    for sequence, one in enumerate(told):
        own, neighbour = one.rows(), told[(sequence + 1) % len(told)].rows()
        expected = alone(pictures, sequence, len(own), model)
        shared = min(len(own), len(neighbour))
        if shared:
            worst = max(worst, float(np.abs(own - expected).max()))
            others.append(float(np.abs(neighbour[:shared] - expected[:shared]).max()))
    latencies_ms = np.sort([1000 * each for one in told for each in one.latencies_s])
    frames = len(latencies_ms)
    return {
        "sequences": len(told),
        "seconds": seconds,
        "frames": frames,
        "frames_per_s": round(frames / seconds, 1),
        "latency_ms": {name: round(float(np.quantile(latencies_ms, share)), 1) for name, share in QUANTILES.items()},
        "errors": sum(len(one.errors) for one in told),
        "first_error": next((one.errors[0] for one in told if one.errors), None),
        "miscounted": sum(one.miscounted for one in told),
        "moved": sum(len(one.epochs) > 1 for one in told),
        "sent_again": sum(one.again for one in told),
        "largest_difference_to_stepping_alone": worst,
        "median_difference_to_the_next_sequence": round(float(np.median(others)), 3),
    }


HEADER = ["run", "frames/s", "p50, p95, p99 ms", "errors", "miscounted", "moved", "sent again", "largest difference"]
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def row(figures: dict[str, Any]) -> list[Any]:
    """The figures of a run as HEADER has them."""
    latencies = ", ".join(f"{value:.0f}" for value in figures["latency_ms"].values())
    counts = [figures[name] for name in ("errors", "miscounted", "moved", "sent_again")]
    return [figures["frames_per_s"], latencies, *counts, f"{figures['largest_difference_to_stepping_alone']:.1e}"]


def sound(figures: dict[str, Any]) -> bool:
    """Whether no frame failed, was lost or saw another sequence's state."""
    different = figures["median_difference_to_the_next_sequence"] > 10 * TOLERANCE  # else the test could not fail
    own = figures["largest_difference_to_stepping_alone"] < TOLERANCE
    return own and different and not figures["errors"] and not figures["miscounted"] and figures["frames"] > 0


@contextmanager
def serving(slots: int, heartbeat_ttl_ms: int = 15_000) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service of two replicas, and HOST:PORT of its gRPC door; ended afterwards.

    heartbeat_ttl_ms: long, as a busy machine is no reason to call a replica dead, which loses frames.
    """
    with tempfile.TemporaryDirectory(prefix="tsmseq", dir="/tmp") as folder:  # short: Ray's sockets are below
        process, address = _serve(Path(folder), slots, heartbeat_ttl_ms)
        try:
            yield process, address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _serve(folder: Path, slots: int, heartbeat_ttl_ms: int) -> tuple[subprocess.Popen[bytes], str]:
    config = {
        "server": {"port": 0, "grpc_port": 0},
        "store": {"data_dir": str(folder / "data")},
        "engine": {"replicas": 2, "slots": slots, "heartbeat_ttl_ms": heartbeat_ttl_ms},
    }
    (folder / "tsm.yaml").write_text(json.dumps(config))
    log = folder / "service.log"
    command = [sys.executable, "-m", "services.cli", "serve", "--config", str(folder / "tsm.yaml")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(folder)}
        )
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        if found := re.search(r"serves .* gRPC on (\S+?);", log.read_text()):
            return process, found[1]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    raise SystemExit(f"the service does not start: {log.read_text()[-2000:]}")


def main() -> None:
    """Run, and write the result."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--sequences", type=int, default=200)
    arguments.add_argument("--seconds", type=float, default=60.0)
    given = arguments.parse_args()
    pictures = films()
    with serving(slots=max(8, given.sequences)) as (service, address):
        told = asyncio.run(load(address, pictures, given.sequences, given.seconds))
        kill = partial(kill_a_replica, service)
        told_while_killed = asyncio.run(load(address, pictures, given.sequences, given.seconds, kill))
    figures = judge(pictures, told, given.seconds)
    killed = judge(pictures, told_while_killed, given.seconds)
    about = {
        "command": COMMAND,
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "model": MODEL,
        "picture": f"{SIZE_PX}x{SIZE_PX} UINT8",
        "replicas": 2,
    }
    runs = {"undisturbed": figures, "one of two replicas killed": killed}
    result = {
        **about,
        "title": f"{given.sequences} interleaved sequences, every answer compared with stepping that sequence alone",
        "runs": runs,
        "table": [HEADER, *([name, *(row(each))] for name, each in runs.items())],
    }
    print(json.dumps(result, indent=2))
    if not (sound(figures) and sound(killed) and killed["moved"]):
        raise SystemExit(1)
    (RESULTS / "sequences.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
