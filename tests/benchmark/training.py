"""Training speed beside the usual way (`plain_training.py`): input alone, network alone, both; results/training.json.

Each side has a process of its own with one thread, and they take turns, in the other order every round, so that both
see the same machine. What is compared is the process's CPU time; the frames are in the page cache. ResNet-50, 8 frames
at 224 px of 340x256 JPEGs as large as those of Kinetics, fp32. Input ends with normalised floats on both sides.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from pipelines.datasets import DATASETS
from tests.benchmark.run import write

RECIPE = "tsm_r50_1x1x8_50e_kinetics400_rgb__340x256"
VIDEOS, FRAMES, WIDTH, HEIGHT = 16, 16, 340, 256
BATCH, LOADERS, ROUNDS = 4, 1, 3
PARTS = {"data": 15, "compute": 1, "together": 1}  # batches at a time
TITLE = (
    f"Training a ResNet-50, {BATCH} clips of 8 frames at 224 px of 340x256 JPEGs a step, fp32: clips per second of CPU "
    "time, beside a plain torch loop of MMAction2's arithmetic (MMAction2 needs mmcv, which cannot be installed beside "
    "a current torch)"
)
ROW = DATASETS["kinetics400"]
LIST = ROW.list_name("rawframes", "train", 1)


def write_frames(root: Path) -> float:
    """A data set whose frames have the spectrum, and so the size, of filmed ones; kilobytes of one."""
    home, rng, sizes = ROW.home(root), np.random.default_rng(0), []
    paces = np.hypot(np.fft.fftfreq(HEIGHT)[:, None] * HEIGHT, np.fft.fftfreq(WIDTH)[None] * WIDTH)
    falling = np.maximum(paces, 1) ** -1.8

    def plane() -> np.ndarray:
        found = np.fft.ifft2(np.fft.fft2(rng.standard_normal((HEIGHT, WIDTH))) * falling).real
        return found / found.std()

    for video in range(VIDEOS):
        folder = home / ROW.folder("rawframes", "train") / str(video)
        folder.mkdir(parents=True)
        still = np.stack([128 + 50 * plane(), 128 + 15 * plane(), 128 + 15 * plane()], axis=2).clip(0, 255)
        for frame in range(FRAMES):
            path = folder / ROW.template.format(frame + ROW.start)
            moved = Image.fromarray(np.roll(still, 3 * frame, axis=1).astype(np.uint8), "YCbCr")
            moved.convert("RGB").save(path, quality=95)  # OpenCV's own quality, by which MMAction2 extracts frames
            sizes.append(path.stat().st_size)
    (home / LIST).write_text("".join(f"{video} {FRAMES} {video}\n" for video in range(VIDEOS)))
    return statistics.mean(sizes) / 1000


Side = dict[str, Callable[[], object]]


def ours(root: Path) -> Side:
    """What `tsm train` does."""
    from pipelines.learner import Learning, Team
    from pipelines.memory import keep_freed_memory
    from pipelines.train import find_job
    from pipelines.training_job import Options
    from tsm_core.preprocess import normalise

    keep_freed_memory()  # as `fit` does
    job = find_job(RECIPE, root, root / "run", Options(batch=BATCH, epochs=10**5, loaders=LOADERS, validate=0))
    learning = Learning(job, Team())
    learning.prepare()
    batches, spec = learning.batches(), job.recipe.preprocess
    held = next(batches)
    return {
        "data": lambda: normalise(next(batches).pixels, spec),
        "compute": lambda: learning.step([held], 0, 0, 1e-3),
        "together": lambda: learning.step([next(batches)], 0, 0, 1e-3),
    }


def plain(root: Path) -> Side:
    """The usual way."""
    from tests.benchmark.plain_training import PlainTraining, plain_batches

    home = ROW.home(root)
    batches = iter(plain_batches(home / LIST, home / ROW.folder("rawframes", "train"), BATCH, LOADERS))
    training, held = PlainTraining(), next(batches)
    return {
        "data": lambda: next(batches),
        "compute": lambda: training.step(*held),
        "together": lambda: training.step(*next(batches)),
    }


def serve(side: str, root: Path) -> None:
    """Do what each line of the input asks for, and say how many CPU seconds it took."""
    torch.set_num_threads(1)
    actions = {"ours": ours, "plain": plain}[side](root)
    for line in sys.stdin:
        began_s = cpu_s()
        for _ in range(int(line.split()[1])):
            actions[line.split()[0]]()
        print(cpu_s() - began_s, flush=True)


def cpu_s() -> float:
    """CPU seconds of this process and of those that read for it."""
    here = psutil.Process()
    times = [each.cpu_times() for each in (here, *here.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure(root: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each part, the clips per second of CPU time of both sides."""
    sides = {}
    for side in ("plain", "ours"):
        command = [sys.executable, "-m", "tests.benchmark.training", side, str(root)]
        sides[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask(side: str, part: str) -> float:
        process = sides[side]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{part} {PARTS[part]}\n")
        return float(process.stdout.readline())

    try:
        for part, count in PARTS.items():
            times: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(-1, ROUNDS):  # the first round warms up
                for side in sides if number % 2 else reversed(sides):
                    seconds = ask(side, part)
                    if number >= 0:
                        times[side].append(seconds)
            yield part, {side: count * BATCH / statistics.median(found) for side, found in times.items()}
    finally:
        for process in sides.values():
            process.kill()
            process.wait()


def main() -> None:
    """Measure, and write the result."""
    with tempfile.TemporaryDirectory(prefix="tsm-") as folder:
        kilobytes = write_frames(Path(folder))
        names = {
            "data": f"input: 8 JPEGs of {kilobytes:.0f} kB to normalised floats",
            "compute": "network: forward, backward, step",
            "together": "both",
        }
        rows = [
            [names[part], f"{found['plain']:.2f}", f"{found['ours']:.2f}", f"{found['ours'] / found['plain']:.2f}"]
            for part, found in measure(Path(folder))
        ]
    write("training", TITLE, [["what", "the usual way", "tsm train", "times as fast"], *rows])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        serve(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
