"""A tiny recipe, a model of it that tells videos apart, and videos made of noise."""

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from pipelines.datasets import VideoRecord
from pipelines.scoring import Videos
from tsm_core.model import TSM, build
from tsm_core.preprocess import normalise
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import Recipe

LABELS = tuple("abcdefghi")
SPECS = {
    "mmaction2": PreprocessSpec(input_px=36, resize_px=40),
    "mit": PreprocessSpec(input_px=36, resize_px=40, antialias=True, convention="mit"),
}


def recipe_of(convention: str = "mmaction2", **changes: object) -> Recipe:
    base = Recipe("tiny", "resnet_small", "bi", LABELS, frames=4, shift_div=4)
    return replace(base, **{"preprocess": SPECS[convention], "convention": convention, **changes})  # type: ignore[arg-type]


def model_of(recipe: Recipe, seed: int = 0) -> TSM:
    """Weights that tell one video from another: its logits are spread evenly over the classes."""
    torch.manual_seed(seed)
    model = build(recipe).eval()
    clips = [np.stack(pictures(number, recipe.frames, 36, 36)) for number in range(20, 40)]
    seen = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3)
    head = model.net.fc
    torch.nn.init.normal_(head.weight)
    with torch.no_grad():
        logits = model(normalise(seen, recipe.preprocess))
        head.weight.div_(logits.std(0)[:, None] / 2)
        head.bias.copy_(-logits.mean(0) / logits.std(0) * 2)
    return model


def pictures(number: int, count: int, width: int, height: int) -> list[np.ndarray]:
    """Coarse coloured noise that moves."""
    dice = np.random.default_rng(number)
    wide = Image.fromarray(dice.integers(0, 256, (6, 14, 3), dtype=np.uint8)).resize((width * 2, height))
    strip = np.asarray(wide)
    return [np.ascontiguousarray(strip[:, shift : shift + width]) for shift in np.arange(count) * 5 % width]


def write_folder(folder: Path, frames: list[np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(folder / f"img_{number:05}.jpg", quality=95)


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"crf": "1", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


LENGTHS = (40, 90, 3, 70, 1, 12)  # short ones too


def make_videos(root: Path) -> Videos:
    """Six folders, wide, tall and square."""
    sizes = ((100, 76), (40, 71), (40, 40), (71, 40), (131, 100), (57, 75))
    records = []
    for number, (count, size) in enumerate(zip(LENGTHS, sizes, strict=True)):
        write_folder(root / f"video_{number}", pictures(number, count, *size))
        records.append(VideoRecord(f"video_{number}", number % 3, count))
    return Videos(tuple(records), root)
