"""Train motion9, the demo's recogniser, on procedural films: `python -m pipelines.train_motion`.

It lives on endless streams, so it is trained as it is used: clips are cut from films with label changes inside, and
every frame that is some frames past a change counts. The scores on its card come from films it has never seen,
stepped frame by frame through an arena, as served.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipelines.camera import viewed_pictures
from pipelines.scenes import LABELS, ClipMaker, Pixels, Scene
from tsm_core.checkpoints import save_model
from tsm_core.model import TSM, build
from tsm_core.preprocess import preprocess
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import find_recipe
from tsm_core.zoo import WEIGHTS

CLIPS, FRAMES = 16, 16  # one step
FILM_PX = 96  # training films are drawn at this size and shrunk as served
PAST_CHANGE = 4  # frames after a change, or after a clip's beginning, that do not count
SETTLED_S = 1.0
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 2e-3, 0.02, 5.0
VELOCITY_WEIGHT = 0.5  # of the auxiliary loss; its head is not shipped
PACES = ((0.15, (1.2, 1.5)), (0.4, (0.95, 1.4)), (1.0, (0.7, 1.25)))  # until this part of training: factor on speeds
UNSEEN = range(10_000, 10_016)  # seeds of the films on the card

FilmPictures = Callable[[Scene, int], Iterator[Pixels]]


# --- what training sees -------------------------------------------------------------------------------------------


class Disturber:
    """Makes model input look as bad cameras would send it: number strip, blur, light, colour, noise."""

    def __init__(self, clips: int, frames: int, spec: PreprocessSpec, seed: int) -> None:
        self.clips, self.frames, self.side = clips, frames, spec.input_px
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
        self._random = torch.Generator().manual_seed(seed)
        self._size = clips * frames * 3 * self.side**2
        self._noise = torch.randn(2 * self._size, generator=self._random)  # drawing it anew each time would cost most

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._random) * (high - low) + low

    def _draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self._random))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Clips (N, T, 3, h, w), disturbed, from pixels (N * T, 3, h, w), which are written over."""
        ink, cover = self._strips()
        bottom = pixels[:, :, -ink.shape[2] :]
        bottom.mul_(1 - cover).add_((ink - cover * self._mean) / self._std)
        clips, side = self.clips, self.side
        x = pixels.view(clips, self.frames, 3, side, side)
        for clip in (self._uniform(0, 1, clips) < 0.4).nonzero()[:, 0].tolist():
            soft = functional.avg_pool2d(x[clip], 3, 1, 1, count_include_pad=False)
            x[clip].lerp_(soft, float(self._uniform(0, 0.6)))
        x.mul_(self._uniform(0.7, 1.25, clips, 1, 1, 1, 1) * self._uniform(0.92, 1.08, clips, 1, 3, 1, 1))
        x.add_(self._uniform(-0.5, 0.5, clips, 1, 1, 1, 1) + self._uniform(-0.08, 0.08, clips, 1, 3, 1, 1))
        begin = self._draw(0, self._size)
        x.addcmul_(self._noise[begin : begin + self._size].view_as(x), self._uniform(0, 0.12, clips, 1, 1, 1, 1))
        blocks = torch.randn(clips * self.frames, 3, side // 4, side // 4, generator=self._random)
        blocking = functional.interpolate(blocks, (side, side)).view_as(x)
        return x.addcmul_(blocking, self._uniform(0, 0.08, clips, 1, 1, 1, 1))

    def _strips(self) -> tuple[Tensor, Tensor]:
        """Counting black and white blocks for the bottom rows: (ink, cover), each (N * T, 1, rows, side)."""
        frames = self.frames
        fine = torch.zeros(self.clips * frames, 2, 20, 5 * self.side)  # blocks of 8 px at 5 times the size
        places = 5 * self.side // 8
        for clip in range(self.clips):
            if self._draw(0, 10) < 3:
                continue
            bits = self._draw(12, places + 1)
            left, height, start = 8 * self._draw(0, places + 1 - bits), 8 * self._draw(1, 3), self._draw(0, 1 << 20)
            counter = torch.arange(start, start + frames)[:, None] >> torch.arange(bits - 1, -1, -1) & 1
            counter[:, -4:] = torch.randint(0, 2, (frames, 4), generator=self._random)  # a checksum looks random
            part = fine[clip * frames : (clip + 1) * frames, :, 20 - height :, left : left + 8 * bits]
            part[:, 0], part[:, 1] = counter.float().repeat_interleave(8, dim=1)[:, None], 1.0
        strip = functional.interpolate(fine, (4, self.side), mode="bilinear", antialias=True)
        return strip[:, :1], strip[:, 1:]


@dataclass(frozen=True, slots=True)
class _Lesson:
    clips: Tensor  # (N, T, 3, h, w)
    labels: Tensor  # (N, T)
    counts: Tensor  # (N, T) bool
    velocity: Tensor  # (N, T, 4)


def _lessons(spec: PreprocessSpec, steps: int, seed: int) -> Iterator[_Lesson]:
    maker = ClipMaker(seed, FILM_PX)
    disturb = Disturber(CLIPS, FRAMES, spec, seed)
    for step in range(steps):
        pace = next(pace for until, pace in PACES if step < until * steps)
        batch = maker.batch(CLIPS, FRAMES, pace)
        images = torch.from_numpy(batch.images).flatten(0, 1).permute(0, 3, 1, 2)
        yield _Lesson(
            disturb(preprocess(images, spec)),
            torch.from_numpy(batch.labels),
            torch.from_numpy(batch.age >= PAST_CHANGE),
            torch.from_numpy(batch.velocity),
        )


def _ahead(lessons: Iterator[_Lesson]) -> Iterator[_Lesson]:
    """The same lessons, each made while the one before is learnt."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, lessons, None)
        while (lesson := coming.result()) is not None:
            coming = pool.submit(next, lessons, None)
            yield lesson


# --- training -----------------------------------------------------------------------------------------------------


def start_with_differences(model: TSM) -> None:
    """Let the first shifted convolution begin as past minus present: motion is in reach from the first step on.

    The stem's second group of channels becomes a copy of the first, the group that the shift takes from the frame
    before, and the convolution weighs the two against each other.
    """
    net: Any = model.net
    conv = net.layer1[0].conv1
    fold = conv.in_channels // model.recipe.shift_div
    with torch.no_grad():
        net.conv1.weight[fold : 2 * fold] = net.conv1.weight[:fold]
        conv.weight[:, :fold] = -conv.weight[:, fold : 2 * fold]


def fit(
    recipe_name: str,
    steps: int,
    seed: int,
    *,
    bfloat16: bool = False,
    device: str = "cpu",
    report: Callable[[str], None] = print,
    every: int = 20,
) -> TSM:
    """A model trained for `steps` steps of 16 clips of 16 frames; deterministic but for the machine's rounding.

    report gets a line every `every` steps: loss, share of right frames among those that count, time to go.
    """
    torch.manual_seed(seed)
    model = build(find_recipe(recipe_name))
    if model.recipe.shift == "uni":
        start_with_differences(model)
    model.to(device).train()
    features: list[Tensor] = []
    classifier: Any = model.net.fc
    hook = classifier.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    velocity_head = nn.Linear(classifier.in_features, 4).to(device)
    parameters = [*model.parameters(), *velocity_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    mean_loss, mean_right, weight = 0.0, 0.0, 0.0
    began_s = time.monotonic()
    for step, lesson in enumerate(_ahead(_lessons(model.recipe.preprocess, steps, seed)), start=1):
        counts, labels = lesson.counts.to(device), lesson.labels.to(device)
        features.clear()
        with torch.autocast(device, torch.bfloat16) if bfloat16 else nullcontext():
            logits = model.forward_frames(lesson.clips.to(device))
        logits = logits.float()[counts]
        speeds = velocity_head(features[0].float()).view(*counts.shape, 4)[counts]
        loss = functional.cross_entropy(logits, labels[counts])
        velocity_loss = functional.smooth_l1_loss(speeds, lesson.velocity.to(device)[counts])
        optimizer.zero_grad()
        torch.autograd.backward(loss + VELOCITY_WEIGHT * velocity_loss)
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        schedule.step()
        right = (logits.argmax(1) == labels[counts]).float().mean()
        weight = 0.95 * weight + 0.05
        mean_loss = 0.95 * mean_loss + 0.05 * loss.item()
        mean_right = 0.95 * mean_right + 0.05 * right.item()
        if step % every == 0 or step == steps:
            pace_s = (time.monotonic() - began_s) / step
            report(
                f"step {step}/{steps}  loss {mean_loss / weight:.3f}  settled {mean_right / weight:.1%}"
                f"  {pace_s:.2f} s/step  {pace_s * (steps - step):.0f} s to go"
            )
    hook.remove()
    return model.eval()


# --- evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamScore:
    """How right a model is on streams; shares in 0..1, of settled frames: those from one second after a change.

    by_label: share per label, NaN where none came up. intervals: share of the script's intervals of at least 2 s
    whose most frequent settled label is right. flicker_per_min: label changes among settled frames.
    """

    settled: float
    by_label: dict[str, float]
    intervals: float
    flicker_per_min: float
    frames: int


def drawn_pictures(scene: Scene, frames: int) -> Iterator[Pixels]:
    """The film's pictures as they are drawn, uint8 (H, W, 3)."""
    return (scene.frame(number) for number in range(frames))


def step_films(model: TSM, scenes: Sequence[Scene], frames: int, pictures: FilmPictures = drawn_pictures) -> Tensor:
    """Logits (streams, frames, K) of films stepped side by side through an arena, as served, from cold starts."""
    arena = model.new_arena(len(scenes))
    slots = [arena.allocate() for _ in scenes]
    rows = [
        model.step(model.preprocess([torch.from_numpy(image).permute(2, 0, 1) for image in images]), arena, slots)
        for images in zip(*(pictures(scene, frames) for scene in scenes), strict=True)
    ]
    return torch.stack(rows, dim=1)


def evaluate_streams(
    model: TSM,
    seeds: Sequence[int] = UNSEEN,
    seconds: float = 60.0,
    size_px: int = 320,
    pictures: FilmPictures = drawn_pictures,
) -> StreamScore:
    """How right `model` is on the films of `seeds`, stepped frame by frame as served."""
    scenes = [Scene(seed, size_px) for seed in seeds]
    frames = round(seconds * scenes[0].fps)
    said = step_films(model, scenes, frames, pictures).argmax(dim=2).cpu().numpy()
    return score_streams(said, scenes)


def score_streams(said: NDArray[np.int64], scenes: Sequence[Scene]) -> StreamScore:
    """The score of labels `said` (streams, frames), indices into LABELS."""
    frames = said.shape[1]
    fps = scenes[0].fps
    past = round(SETTLED_S * fps)
    right: dict[str, list[NDArray[np.bool_]]] = {label: [] for label in LABELS}
    changes, hits, intervals = 0, 0, 0
    for row, scene in zip(said, scenes, strict=True):
        for interval in scene.script(frames):
            settled = row[interval["start_frame"] + past : interval["end_frame"]]
            if not len(settled):
                continue
            truth = LABELS.index(interval["label"])
            right[interval["label"]].append(settled == truth)
            changes += int(np.count_nonzero(settled[1:] != settled[:-1]))
            if interval["end_frame"] - interval["start_frame"] >= 2 * fps:
                intervals += 1
                hits += int(np.bincount(settled).argmax() == truth)
    every = np.concatenate([part for parts in right.values() for part in parts])
    return StreamScore(
        float(every.mean()),
        {label: float(np.concatenate(parts).mean()) if parts else float("nan") for label, parts in right.items()},
        hits / max(1, intervals),
        changes / (len(every) / fps / 60),
        len(every),
    )


# --- the card -----------------------------------------------------------------------------------------------------


def _score_rows(score: StreamScore) -> dict[str, Any]:
    return {
        "settled_frames": round(score.settled, 4),
        "by_label": {label: round(share, 4) for label, share in score.by_label.items()},
        "intervals_of_2_s": round(score.intervals, 4),
        "flicker_per_min": round(score.flicker_per_min, 2),
        "frames_counted": score.frames,
    }


def card_text(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    drawn, camera = card["scores"]["drawn"], card["scores"]["camera"]
    lines = [
        f"# {card['name']}",
        "",
        card["what"],
        "",
        f"- Trained by `{card['command']}` on {card['date']}: {card['steps']} steps of {CLIPS} clips of {FRAMES} frames"
        f" in {card['training_s']} s ({card['machine']}).",
        f"- Data: {card['data']}",
        f"- Loss: {card['loss']}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in card['versions'].items())}.",
        f"- {card['parameters']} parameters, stored as {card['stored_as']}; input {card['input']}.",
        "",
        f"Scores: {card['scores']['films']} Chance is 11 %.",
        "",
        "| | as drawn | as a camera sends it |",
        "|---|---|---|",
        f"| settled frames | {drawn['settled_frames']:.1%} | {camera['settled_frames']:.1%} |",
        f"| intervals of 2 s or more | {drawn['intervals_of_2_s']:.1%} | {camera['intervals_of_2_s']:.1%} |",
        f"| label flicker per minute | {drawn['flicker_per_min']:.1f} | {camera['flicker_per_min']:.1f} |",
        *(f"| {label} | {drawn['by_label'][label]:.1%} | {camera['by_label'][label]:.1%} |" for label in LABELS),
        "",
        card["limits"],
        "",
    ]
    return "\n".join(lines)


def make_card(model: TSM, command: str, steps: int, seed: int, training_s: float, stored_as: str) -> dict[str, Any]:
    """How `model` was trained and how it scores on unseen films (takes a minute or two)."""
    recipe = model.recipe
    side = recipe.preprocess.input_px
    what = "Nine motions of one object before a still camera, recognised frame by frame at 15 fps."
    if recipe.shift == "none":
        what += " Without the temporal shift: it sees single frames and stays at chance, which is what it is for."
    half = UNSEEN[: len(UNSEEN) // 2]
    return {
        "name": recipe.name,
        "what": what,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "steps": steps,
        "seed": seed,
        "training_s": round(training_s),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "data": "procedural films (pipelines/scenes.py), none seen twice, with number strip, blur, light and noise;"
        f" speeds times {PACES[0][1]} at first, {PACES[-1][1]} in the end.",
        "loss": f"cross-entropy on every frame at least {PAST_CHANGE} frames past a change, and {VELOCITY_WEIGHT} times"
        f" a velocity loss; AdamW {LEARNING_RATE}, weight decay {WEIGHT_DECAY}, one cycle, clip {CLIP_NORM}.",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stored_as": stored_as,
        "input": f"{side}x{side} px, shift {recipe.shift} 1/{recipe.shift_div}",
        "scores": {
            "films": f"{len(UNSEEN)} unseen films of 60 s as drawn, {len(half)} of them through the simulated camera's"
            f" H.264 at 1 Mbit/s; 320 px, stepped frame by frame; settled is from {SETTLED_S:.0f} s after a change.",
            "drawn": _score_rows(evaluate_streams(model)),
            "camera": _score_rows(evaluate_streams(model, half, pictures=viewed_pictures)),
        },
        "limits": "Knows these films only: it is a demonstration, not a recogniser of real motion. Motion slower than"
        " 25 px/s, 100 degrees/s or 0.7 log/s (in a picture of 64 px) was hardly trained and may read as still.",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score, and write the model file and its card."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.train_motion", description=__doc__)
    parser.add_argument("--out", type=Path, help="model file (default: where shipped models lie)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-shift", action="store_true", help="the same network without time")
    parser.add_argument("--half", action="store_true", help="store the weights as float16")
    parser.add_argument("--bfloat16", action="store_true", help="train in mixed precision")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe_name = "motion9_none" if options.no_shift else "motion9"
    out = options.out or WEIGHTS / f"{recipe_name}.safetensors"
    began_s = time.monotonic()
    model = fit(
        recipe_name,
        options.steps,
        options.seed,
        bfloat16=options.bfloat16,
        device=options.device,
        report=lambda line: print(line, flush=True),
    ).cpu()
    training_s = time.monotonic() - began_s
    stored = torch.float16 if options.half else torch.float32
    model.to(stored).to(torch.float32)  # score what is stored
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", "-m", "pipelines.train_motion", *given])
    card = make_card(model, command, options.steps, options.seed, training_s, str(stored).removeprefix("torch."))
    save_model(out, model.to(stored), card)
    text = card_text(card)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{out}: {out.stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
