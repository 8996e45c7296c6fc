"""Does time matter? motion8 with temporal shift and without: `make motion8` writes results/motion8.json and a picture.

The same network, data and budget; only the shift differs. Three seeds each, the two side by side on a core each. Judged
on clips that come in both directions: how often the class is right, the pair of classes, and the direction of those
clips whose pair is right. A network that does not see the order of frames must be right in exactly half of those.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pipelines.motion8 import Motion8
from tests.benchmark.run import RESULTS, machine
from tsm_core.checkpoints import load_model, save_model
from tsm_core.model import TSM
from tsm_core.model_file import read_card
from tsm_core.preprocess import normalise
from tsm_core.zoo import WEIGHTS

ARMS, SEEDS = ("motion8_tsm", "motion8_tsn"), (0, 1, 2)
COMMAND = "make motion8"
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "motion8.png"
COLOURS = {"motion8_tsm": (29, 78, 216), "motion8_tsn": (217, 119, 6)}


def judge(model: TSM) -> dict[str, float]:
    """Shares of the test clips: class right, pair right, and direction right among those whose pair is."""
    val = Motion8("val")
    clips, labels = zip(*(val.clip(number) for number in range(len(val))), strict=True)
    said = []
    with torch.no_grad():
        for first in range(0, len(clips), 40):
            batch = torch.stack(clips[first : first + 40])
            said.append(model(normalise(batch, model.recipe.preprocess)).argmax(dim=1))
    found, wanted = torch.cat(said).numpy(), np.asarray(labels)
    pair = found // 2 == wanted // 2
    return {
        "top1": float((found == wanted).mean()),
        "pair": float(pair.mean()),
        "direction_given_pair": float((found == wanted)[pair].mean()),
    }


def train(seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Both arms at once; what came of each."""
    began_s, running = time.monotonic(), {}
    for arm in ARMS:
        command = [sys.executable, "-m", "pipelines.train", arm, "--work-dir", str(folder / f"{arm}-{seed}")]
        command += ["--seed", str(seed), "--loaders", "0"]
        log = (folder / f"{arm}-{seed}.log").open("w")
        one_core = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        running[arm] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=one_core)
    for arm, process in running.items():
        if process.wait():
            raise SystemExit((folder / f"{arm}-{seed}.log").read_text()[-2000:])
        seconds = time.monotonic() - began_s
        work = folder / f"{arm}-{seed}"
        model = load_model(work / "last.safetensors")
        assert isinstance(model, TSM)
        with (work / "metrics.csv").open() as file:
            curve = [
                {"step": int(row["step"]), "top1": float(row["top1"])} for row in csv.DictReader(file) if row["top1"]
            ]
        yield {"recipe": arm, "seed": seed, "seconds": round(seconds), **judge(model), "curve": curve}


def draw(runs: list[dict[str, Any]]) -> None:
    """Top-1 over steps: a line for each run."""
    width, height, left, bottom = 640, 320, 56, 40
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    last = max(point["step"] for run in runs for point in run["curve"])

    def at(step: float, share: float) -> tuple[float, float]:
        return left + (width - left - 20) * step / last, height - bottom - (height - bottom - 20) * share

    for share in (0, 0.25, 0.5, 0.75, 1):
        pen.line((at(0, share), at(last, share)), fill=(225, 225, 225))
        pen.text((8, at(0, share)[1] - 8), f"{share:.0%}", fill="black", font=font)
    pen.text((left, height - 24), f"top-1 on unseen clips over {last} training steps", fill="black", font=font)
    for run in runs:
        points = [at(0, 1 / 8), *(at(point["step"], point["top1"]) for point in run["curve"])]
        pen.line(points, fill=COLOURS[run["recipe"]], width=2)
    for place, arm in enumerate(ARMS):
        pen.text((width - 130, height - 110 + 18 * place), arm, fill=COLOURS[arm], font=font)
    picture.save(PICTURE)


def main() -> None:
    """Train, judge, write; the first seed's models are kept."""
    folder = Path(tempfile.mkdtemp(prefix="motion8-"))
    runs: list[dict[str, Any]] = []
    try:
        for seed in SEEDS:
            for run in train(seed, folder):
                runs.append(run)
                print({key: value for key, value in run.items() if key != "curve"}, flush=True)
        for arm in ARMS:
            source = folder / f"{arm}-{SEEDS[0]}" / "last.safetensors"
            model = load_model(source)
            assert isinstance(model, TSM)
            scores = {key: run[key] for run in runs if (run["recipe"], run["seed"]) == (arm, SEEDS[0]) for key in run}
            del scores["curve"]
            card = {**read_card(source)[1], "command": COMMAND, "motion8": scores, "stored_as": "float16"}
            save_model(WEIGHTS / f"{arm}.safetensors", model.half(), card)
    finally:
        shutil.rmtree(folder)
    header = ["recipe", "seed", "class right", "pair right", "direction right, given the pair", "seconds on one core"]
    shares = ("top1", "pair", "direction_given_pair")
    rows = [[run["recipe"], run["seed"], *(f"{run[key]:.2%}" for key in shares), run["seconds"]] for run in runs]
    result = {
        "title": "motion8: eight directions of motion, with temporal shift and without, same network and budget",
        "command": COMMAND,
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "table": [header, *rows],
        "runs": runs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "motion8.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(runs)


if __name__ == "__main__":
    main()
