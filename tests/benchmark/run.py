"""Speed, side by side in one process: `make bench` writes results/step.json, from which the README's table is made.

Every row alternates the two sides for several rounds, reversing the order each round, after one discarded call; what is
compared is the median of the process's CPU time on one thread. The baseline is the usual way to step an online TSM:
`plain.py`, a plain torch network of the same arithmetic.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from tests.benchmark.plain import plain_online
from tsm_core.detector import Dense, build_detector
from tsm_core.detector_recipes import DETECTOR_RECIPES
from tsm_core.model import TSM, build
from tsm_core.recipes import Recipe, find_recipe, generic

STREAMS = 8
RESULTS = Path(__file__).parent / "results"
COMMAND = "make bench"


def machine() -> str:
    """Processor, cores used and the library's version."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


def alternate(sides: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    """Median CPU milliseconds of one call of each side, order reversed every round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for round_ in range(rounds):
        for name in names if round_ % 2 == 0 else reversed(names):
            sides[name]()
            start = time.process_time()
            for _ in range(calls):
                sides[name]()
            times[name].append((time.process_time() - start) * 1000 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def recipe_of(backbone: str) -> Recipe:
    """The uni-directional recipe of a backbone, 1,000 classes."""
    if backbone == "resnet_small":
        return find_recipe("motion9")
    return generic(backbone, "uni", [str(label) for label in range(1000)])


def stepper(model: TSM, streams: int, pixels: torch.Tensor) -> Callable[[], object]:
    """One step of `streams` streams on the same pixels."""
    arena = model.new_arena(streams)
    slots = [arena.allocate() for _ in range(streams)]
    batch = pixels.expand(streams, -1, -1, -1).contiguous()
    return lambda: model.step(batch, arena, slots)


def bench_step(rounds: int = 7) -> list[list[object]]:
    """Online step against the usual way, with and without shift, one stream and eight."""
    rows: list[list[object]] = []
    for backbone, calls in (("mobilenet_v2", 12), ("resnet50", 4)):
        model = build(recipe_of(backbone)).for_inference()
        pixels = torch.randn(1, 3, model.input_px, model.input_px)
        plain, flat = plain_online(backbone), plain_online(backbone, shifted=False)
        with torch.inference_mode():
            ms = alternate(
                {
                    "plain": partial(plain, pixels),
                    "plain without shift": partial(flat, pixels),
                    "ours": stepper(model, 1, pixels),
                    "ours, 8 streams": stepper(model, 8, pixels),
                },
                rounds,
                calls,
            )
        ms["ours, 8 streams"] /= 8
        rows += [[backbone, name, round(value, 2), f"{ms['plain'] / value:.2f}"] for name, value in ms.items()]
    return rows


def bench_state(rounds: int = 7) -> list[list[object]]:
    """What gathering and scattering the shift state costs beside the step."""
    rows: list[list[object]] = []
    for backbone in ("mobilenet_v2", "resnet50", "resnet_small"):
        model = build(recipe_of(backbone)).for_inference()
        arena = model.new_arena(8)
        slots = [arena.allocate() for _ in range(8)]
        batch = torch.randn(8, 3, model.input_px, model.input_px)
        with torch.inference_mode():
            ms = alternate(
                {
                    "step": lambda model=model, batch=batch, arena=arena, slots=slots: model.step(batch, arena, slots),
                    "state": lambda arena=arena, slots=slots: arena.scatter(slots, arena.gather(slots)),
                },
                rounds,
                3,
            )
        rows.append(
            [
                backbone,
                arena.elements,
                round(ms["step"] / 8, 3),
                round(ms["state"] / 8, 4),
                f"{ms['state'] / ms['step']:.1%}",
            ]
        )
    return rows


def crowded(dense: Dense) -> Dense:
    """Dense outputs of a detector that finds something nearly everywhere: the most that boxes can cost."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(dense.outputs["cls_logits"].shape, generator=generator) * 4
    return Dense(dense.features, {**dense.outputs, "cls_logits": logits})


def bench_detector_step() -> list[list[object]]:
    """One step of eight streams with shift and without, and the boxes of those frames, noise all of them."""
    rows: list[list[object]] = []
    for name, size, rounds in (
        ("moving_shapes_tsm", (96, 96), 61),
        ("ssdlite320_mobilenet_v3_large_uni", (320, 320), 21),
        ("fcos_resnet50_fpn_uni", (192, 320), 5),
    ):
        recipe = replace(DETECTOR_RECIPES[name], input_size=size)
        model = build_detector(recipe)
        still = build_detector(replace(recipe, shift="none"))
        still.load_state_dict(model.state_dict())
        model.for_inference()
        still.for_inference()
        frames = model.preprocess(torch.randint(0, 256, (STREAMS, 3, *size), dtype=torch.uint8))
        arenas = {each: each.new_arena(STREAMS) for each in (model, still)}
        slots = {each: [arena.allocate() for _ in range(STREAMS)] for each, arena in arenas.items()}
        with torch.inference_mode():
            dense = model.step(frames, arenas[model], slots[model])
            full = crowded(dense)
            found = sum(map(len, model.detect(full))) / STREAMS
            steps = {
                "still": partial(still.step, frames, arenas[still], slots[still]),
                "shifted": partial(model.step, frames, arenas[model], slots[model]),
            }
            boxes = {"boxes": partial(model.detect, dense), "crowded": partial(model.detect, full)}
            ms = {**alternate(steps, rounds, 1), **alternate(boxes, rounds, 1)}
        each = {side: value / STREAMS for side, value in ms.items()}
        rows.append(
            [
                f"{recipe.architecture} {size[1]}x{size[0]}",
                f"{each['still']:.2f}",
                f"{each['shifted']:.2f}",
                f"{each['shifted'] / each['still']:.3f}",
                f"{each['boxes']:.2f} ({each['boxes'] / each['shifted']:.1%})",
                f"{each['crowded']:.2f} ({each['crowded'] / each['shifted']:.1%}, {found:.0f} told)",
            ]
        )
    return rows


def bench_demo() -> list[list[object]]:
    """The demo's own score: four cameras, two replicas, sixty seconds."""
    command = [sys.executable, "-m", "services.cli", "demo", "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    score = json.loads(done.stdout.strip().splitlines()[-1])
    latency = " / ".join(str(score["latency_ms"][name]) for name in ("p50", "p95", "p99"))
    dropped = ", ".join(f"{reason} {count}" for reason, count in score["dropped"].items()) or "none"
    return [
        ["cameras, replicas", f"{score['streams']}, {score['replicas']}"],
        ["frames sent, recognised", f"{score['sent']}, {score['frames']}"],
        ["dropped by reason; not accounted for", f"{dropped}; {score['unaccounted']}"],
        ["intervals judged; label right", f"{score['intervals']}; {score['label_accuracy']:.1%}"],
        ["actions reported; false", f"{score['actions']}; {score['false_events']}"],
        ["AP50 of the followed objects' boxes", f"{score['detection_ap50']:.3f}"],
        ["ms from the camera's send to the published result, p50 / p95 / p99", latency],
    ]


def write(name: str, title: str, table: list[list[object]], command: str = COMMAND) -> None:
    """One result file, with its command and machine."""
    RESULTS.mkdir(exist_ok=True)
    result = {
        "title": title,
        "command": command,
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "table": table,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in table:
        print("  ".join(f"{cell!s:>24}" for cell in row), flush=True)


def detectors() -> None:
    """What a sense of time costs a detector, and what boxes do."""
    print("detector step ...", flush=True)
    write(
        "detector_step",
        "Detectors: one step of 8 streams, noise frames, one thread, fp32, random weights",
        [
            [
                "detector",
                "no shift, CPU ms a frame",
                "shifted, CPU ms a frame",
                "shifted / no shift",
                "boxes, CPU ms a frame (of the step)",
                "boxes at their most",
            ],
            *bench_detector_step(),
        ],
        "python -m tests.benchmark.run detectors",
    )


PARTS = {"detectors": detectors}


def main() -> None:
    """Run every benchmark, one after another, or the parts that are named."""
    torch.set_num_threads(1)
    if sys.argv[1:]:
        for part in sys.argv[1:]:
            PARTS[part]()
        return
    print("the demo, a minute ...", flush=True)
    write("demo", "The demo: simulated cameras through the whole service", [["what", "result"], *bench_demo()])
    print("online step ...", flush=True)
    write(
        "step",
        "Online step of one 224 px frame, one thread, fp32, random weights",
        [["network", "way", "CPU ms a frame", "times the plain way's speed"], *bench_step()],
    )
    detectors()
    print("state handling ...", flush=True)
    write(
        "state",
        "Shift state: one gather and one scatter for 8 streams, beside the step",
        [["network", "numbers a stream", "step, CPU ms a frame", "state, CPU ms a frame", "share"], *bench_state()],
    )


if __name__ == "__main__":
    main()
