"""Does time help a detector? `make moving-shapes` trains with temporal shift and without, and judges both online.

The same network, films, order, steps and budget; only the shift differs. Three seeds each, the two side by side on a
core each. Judged frame by frame over whole test films, the state carried on, by ImageNet VID's rule and by COCO's; and
beside them what a tracker makes of the single frames: ByteTrack, with the classes' scores averaged over each track so
far. Results, README rows, a plot and an annotated film are written; the first seed's models are kept.

`python -m tests.benchmark.moving_shapes FOLDER` keeps trainings in FOLDER and goes on with those it finds there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import supervision
import torch
from PIL import Image, ImageDraw, ImageFont
from trackers.core.bytetrack.tracker import ByteTrackTracker

from pipelines.box_data import BoxVideo, Objects
from pipelines.box_judging import watch
from pipelines.box_metrics import Bools, Found, Reals, overlaps
from pipelines.box_scoring import SPEEDS, Choose, Judged, VideoPrecision, compare, score
from pipelines.moving_shapes import IGNORE_BELOW, SHAPES, MovingShapes
from pipelines.results import versions
from tests.benchmark.run import RESULTS, machine
from tsm_core.checkpoints import load_model, save_model
from tsm_core.detector import TSMDetector
from tsm_core.model_file import read_card
from tsm_core.zoo import WEIGHTS

SINGLE, TSM, PHOTOS = "moving_shapes_still", "moving_shapes_tsm", "moving_photos"
ARMS, SEEDS = (SINGLE, TSM), (0, 1, 2)
TRACKED = "moving_shapes_still + ByteTrack"
COMMAND = "make moving-shapes"
DOCS = Path(__file__).resolve().parents[2] / "docs"
PLOT, FILM = DOCS / "moving_shapes.png", DOCS / "moving_shapes.gif"
COLOURS = {SINGLE: (217, 119, 6), TRACKED: (120, 113, 108), TSM: (29, 78, 216)}
HIDDEN_BELOW = 0.6
STREAMS = 50  # films that are stepped at once
SAMPLES = 300  # of the bootstrap


def in_condition(name: str) -> Choose:
    """Every object of frames of a condition."""

    def choose(objects: Objects, _: Reals) -> Bools | None:
        return np.ones(len(objects), np.bool_) if objects.condition == name else None

    return choose


def occluded(objects: Objects, _: Reals) -> Bools | None:
    """Objects of clean frames that something covers in part."""
    if objects.condition != "clean":
        return None
    found: Bools = (objects.visible >= IGNORE_BELOW) & (objects.visible <= HIDDEN_BELOW)
    return found


DEGRADED = ("defocus", "low light")
CHOSEN: Mapping[str, Choose] = {
    **SPEEDS,
    **{name: in_condition(name) for name in ("clean", *DEGRADED)},
    "occluded": occluded,
}


def found_by(model: TSMDetector) -> list[Judged]:
    """What the detector finds on the test films, frame by frame, all their frames."""
    films = MovingShapes("val")
    seen = watch(model.eval(), films, range(len(films)), batch=STREAMS)
    return [each.judged for each in sorted(seen, key=lambda each: each.index) if each.judged is not None]


def places(found: Found) -> tuple[Reals, Reals]:
    """Boxes (K, 4) of things, best first, and each class's scores (K, classes): boxes of a place are one thing."""
    boxes: list[Any] = []
    scores: list[Any] = []
    for at in np.argsort(-found.scores, kind="stable"):
        box = found.boxes[at]
        fits = overlaps(box[None], np.array(boxes), 0.0)[0] if boxes else np.zeros(0)
        if not len(fits) or fits.max() < 0.5:
            boxes.append(box)
            scores.append(np.zeros(len(SHAPES)))
            fits = np.array([*np.zeros(len(boxes) - 1), 1.0])
        mine = scores[int(fits.argmax())]
        mine[found.labels[at]] = max(mine[found.labels[at]], found.scores[at])
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(scores).reshape(-1, len(SHAPES))


def follow(judged: Judged) -> Judged:
    """The same film with a tracker behind the detector: each class's score is its mean over the track so far."""
    tracker = ByteTrackTracker(
        track_activation_threshold=0.25, high_conf_det_threshold=0.25, minimum_consecutive_frames=1
    )
    sums: dict[int, Any] = {}
    told = []
    for frame in judged.found:
        boxes, scores = places(frame)
        strong = scores.max(axis=1, initial=0) >= 0.1
        seen = tracker.update(
            supervision.Detections(
                xyxy=boxes[strong], confidence=scores[strong].max(axis=1, initial=0), data={"at": np.nonzero(strong)[0]}
            )
        )
        mean = scores.copy()
        if len(seen) and seen.tracker_id is not None:
            for at, track in zip(seen.data["at"], seen.tracker_id.tolist(), strict=True):
                if track >= 0:
                    total, frames = sums.get(track, (0.0, 0))
                    sums[track] = total, frames = total + scores[at], frames + 1
                    mean[at] = total / frames
        at, label = np.nonzero(mean > 0)
        told.append(Found(boxes[at], mean[at, label].astype(np.float32), label))
    return Judged(judged.name, judged.objects, told)


def judge(films: Sequence[Judged]) -> tuple[dict[str, float], dict[str, VideoPrecision]]:
    """AP50 by ImageNet VID's rule of everything in CHOSEN, COCO's AP and AP50, and what gaps are made of."""
    figures, precisions = score(films, SHAPES, CHOSEN)
    kept = {name.removeprefix("vid_"): value for name, value in figures.items() if name.startswith("vid_")}
    return {**kept, "coco_ap": figures["coco_ap"], "coco_ap50": figures["coco_ap50"]}, precisions


def train(folder: Path, *wanted: tuple[str, int]) -> None:
    """Train recipes with their seeds at once, each on one core, or go on with them."""
    running = {}
    for recipe, seed in wanted:
        work = folder / f"{recipe}-{seed}"
        command = [sys.executable, "-m", "pipelines.train", recipe, "--work-dir", str(work), "--seed", str(seed)]
        command += ["--loaders", "0", "--amp", "bf16", "--validate", "0"]
        if recipe in ARMS:
            command += ["--init-from", str(trained(folder, PHOTOS, seed))]
        log = work.with_suffix(".log")
        one_core = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("w") as file:
            running[log] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=one_core)
    for log, process in running.items():
        if process.wait():
            raise SystemExit(log.read_text()[-2000:])


def trained(folder: Path, recipe: str, seed: int) -> Path:
    """The file of a training that has ended."""
    return folder / f"{recipe}-{seed}" / "last.safetensors"


def detector(path: Path) -> TSMDetector:
    """The detector of a file, on the CPU."""
    model = load_model(path)
    assert isinstance(model, TSMDetector)
    return model


def table(runs: Sequence[Mapping[str, Any]], gaps: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """The README's rows: AP50 in points, and what the online network is ahead, with its interval."""
    rows: list[list[object]] = [["detector", "seed", *CHOSEN, "COCO AP, AP50"]]
    for run in runs:
        shown = {name: f"{100 * value:.1f}" for name, value in run["figures"].items()}
        cells = [shown[name] for name in CHOSEN]
        rows.append([run["arm"], run["seed"], *cells, f"{shown['coco_ap']}, {shown['coco_ap50']}"])
    for against in (SINGLE, TRACKED):
        for seed in SEEDS:
            mine = {gap["of"]: gap for gap in gaps if (gap["seed"], gap["against"]) == (seed, against)}
            cells = ["{:+.1f} [{:.1f}, {:.1f}]".format(*_points(mine[name])) for name in CHOSEN]
            rows.append([f"{TSM} ahead of {against}", seed, *cells, ""])
    return rows


def _points(gap: Mapping[str, Any]) -> list[float]:
    return [100 * gap[name] for name in ("gap", "low", "high")]


def plot(runs: Sequence[Mapping[str, Any]]) -> None:
    """AP50 by condition: a bar for the mean of each arm, a dot for each seed."""
    width, height, left, bottom, top = 860, 340, 44, 56, 30
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    tallest = max(run["figures"][name] for run in runs for name in CHOSEN) * 1.1
    each = (width - left - 10) / len(CHOSEN)
    bar = each / (len(COLOURS) + 1)

    def up(share: float) -> float:
        return height - bottom - (height - bottom - top) * share / tallest

    for points in range(0, int(100 * tallest) + 1, 10):
        pen.line((left, up(points / 100), width - 10, up(points / 100)), fill=(225, 225, 225))
        pen.text((left - 8, up(points / 100)), str(points), fill="black", font=font, anchor="rm")
    for number, name in enumerate(CHOSEN):
        for place, (arm, colour) in enumerate(COLOURS.items()):
            values = [run["figures"][name] for run in runs if run["arm"] == arm]
            x = left + each * number + bar * (place + 0.5)
            pen.rectangle((x, up(float(np.mean(values))), x + bar - 3, up(0)), fill=colour)
            for value in values:
                middle = x + (bar - 3) / 2
                pen.ellipse((middle - 3, up(value) - 3, middle + 3, up(value) + 3), fill="white", outline="black")
        pen.text((left + each * (number + 0.5), height - bottom + 6), name, fill="black", font=font, anchor="mt")
    for place, (arm, colour) in enumerate(COLOURS.items()):
        pen.text((left + 240 * place, height - 22), arm, fill=colour, font=font)
    pen.text((left, 6), "AP50 (ImageNet VID's rule), mean of three seeds; dots: each seed", fill="black", font=font)
    picture.save(PLOT)


def animate(single: Judged, tsm: Judged, film: BoxVideo, least_score: float = 0.4) -> None:
    """One film twice, side by side: what a single frame finds, and what the online network finds."""
    zoom, head, greys = 2, 14, 12
    right, wrong, white, black = range(greys, greys + 4)
    shades = [round(255 * shade / (greys - 1)) for shade in range(greys)]
    colours = [*((shade,) * 3 for shade in shades), (74, 222, 128), (248, 113, 113), (255, 255, 255), (0, 0, 0)]
    font = ImageFont.load_default(11)
    pictures = []
    for number, frame in enumerate(film.frames):
        side = zoom * frame.shape[-1]
        sheet = Image.new("P", (2 * side + 6, side + head), white)
        sheet.putpalette([level for colour in colours for level in colour])
        pen = ImageDraw.Draw(sheet)
        truth = film.objects[number]
        for left, arm, judged in ((0, "single frame", single), (side + 6, "online TSM", tsm)):
            levels = (frame[0].numpy().astype(np.float32) * greys / 256).astype(np.uint8)
            sheet.paste(Image.fromarray(levels).resize((side, side), Image.Resampling.NEAREST), (left, head))
            pen.text((left + 2, 0), f"{arm}: {truth.condition}", fill=black, font=font)
            for box, scores in zip(*places(judged.found[number]), strict=True):
                label = int(scores.argmax())
                if scores[label] < least_score:
                    continue
                fits = overlaps(box[None], truth.boxes, 0.0)[0] * (truth.labels == label)
                x1, y1, x2, y2 = (zoom * box).tolist()
                colour = right if fits.max(initial=0) >= 0.5 else wrong
                pen.rectangle((left + x1, head + y1, left + x2, head + y2), outline=colour)
                pen.text((left + x1 + 3, head + y1), SHAPES[label], fill=colour, font=font)
        pictures.append(sheet)
    pictures[0].save(FILM, save_all=True, append_images=pictures[1:], duration=350, loop=0)


def telling(single: Sequence[Judged], tsm: Sequence[Judged]) -> int:
    """Of the films, one on which the gap is what it usually is when it is seen: the 90th percentile."""
    gaps = []
    for one, other in zip(single, tsm, strict=True):
        (a, _), (b, _) = (score([each], SHAPES, {"all": CHOSEN["all"]}) for each in (one, other))
        gaps.append(b["vid_all"] - a["vid_all"])
    return int(np.argsort(gaps, kind="stable")[int(0.9 * len(gaps))])


def main() -> None:
    """Train, judge, write."""
    with tempfile.TemporaryDirectory(prefix="moving-shapes-") as spare:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else spare)
        folder.mkdir(parents=True, exist_ok=True)
        train(folder, *((PHOTOS, seed) for seed in SEEDS))
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            waits = []
            for seed in SEEDS:
                train(folder, *((arm, seed) for arm in ARMS))
                waits.append(pool.submit(measure, folder, seed))  # while the next ones train
            measured = [wait.result() for wait in waits]
        runs = [run for each, _ in measured for run in each]
        gaps = [gap for _, each in measured for gap in each]
        write(runs, gaps)
        plot(runs)
        keep(folder, runs)


def measure(folder: Path, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The detectors of one seed: what they score, and how far they are apart. The first seed's film is drawn."""
    torch.set_num_threads(1)
    seen = {arm: found_by(detector(trained(folder, arm, seed))) for arm in ARMS}
    if seed == SEEDS[0]:
        chosen = telling(seen[SINGLE], seen[TSM])
        animate(seen[SINGLE][chosen], seen[TSM][chosen], MovingShapes("val").video(chosen))
    seen[TRACKED] = [follow(film) for film in seen[SINGLE]]
    runs, precisions = [], {}
    for arm in COLOURS:
        figures, precisions[arm] = judge(seen[arm])
        seconds = read_card(trained(folder, arm, seed))[1]["training_s"] if arm in ARMS else None
        runs.append({"arm": arm, "seed": seed, "training_s": seconds, "figures": figures})
        print(arm, seed, {name: round(100 * value, 1) for name, value in figures.items()}, flush=True)
    gaps = []
    for against in (SINGLE, TRACKED):
        for name in CHOSEN:
            gap = compare(precisions[TSM][name], precisions[against][name], samples=SAMPLES)
            gaps.append(
                {"seed": seed, "against": against, "of": name, "gap": gap.gap, "low": gap.low, "high": gap.high}
            )
    return runs, gaps


def keep(folder: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Ship the first seed's detectors, their figures in their cards."""
    for run in runs:
        if run["arm"] in ARMS and run["seed"] == SEEDS[0]:
            source = trained(folder, run["arm"], run["seed"])
            told = read_card(source)[1]
            card = {name: told[name] for name in ("date", "data", "steps", "training_s", "machine", "versions")}
            began = f"begins with {PHOTOS}, seed {run['seed']}"
            card |= {"command": COMMAND, "began": began, "seed": run["seed"], "moving_shapes": run["figures"]}
            save_model(WEIGHTS / f"{run['arm']}.safetensors", detector(source), card)
            (WEIGHTS / f"{run['arm']}.md").write_text(words(run, card))


def words(run: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """The card of a shipped detector, for people."""
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    sense = "the frame before in every residual branch" if run["arm"] == TSM else "single frames"
    rows = [f"| {name} | {100 * run['figures'][name]:.1f} |" for name in CHOSEN]
    return "\n".join(
        [
            f"# {run['arm']}",
            "",
            f"Finds discs, squares, triangles and pluses on drawn grey films; sees {sense}.",
            "",
            f"- Trained by `{COMMAND}` on {card['date']}, seed {run['seed']}: {card['steps']} steps of 6 clips of 8 "
            f"frames in {card['training_s']} s, beginning with {PHOTOS} ({card['machine']}).",
            "- Data: procedural films (pipelines/moving_shapes.py), 900 to train on, 200 others to be judged by.",
            f"- Versions: {versions}.",
            "",
            "AP50 by ImageNet VID's rule, stepped frame by frame over all 24 frames of the 200 films:",
            "",
            "| | AP50 |",
            "|---|---|",
            *rows,
            "",
            f"COCO AP {100 * run['figures']['coco_ap']:.1f}. Knows these films only: it shows what time is worth, and "
            "is no detector of real things.",
            "",
        ]
    )


def write(runs: Sequence[Mapping[str, Any]], gaps: Sequence[Mapping[str, Any]]) -> None:
    """The result file."""
    result = {
        "title": "moving-shapes: AP50 of a detector with temporal shift and without, same network and budget",
        "command": COMMAND,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "table": table(runs, gaps),
        "runs": runs,
        "gaps": gaps,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "moving_shapes.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
