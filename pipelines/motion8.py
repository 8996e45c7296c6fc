"""motion8: procedural clips whose class is a direction of time alone, to tell networks that see time from others.

Eight classes in four pairs; a clip of the second class of a pair is a clip of the first with its frames reversed. A
network that does not know the order of frames gives both the same logits: with both directions of every clip in the
test set it is right about the direction in exactly half of them, whatever it learns. No single frame, and no frame with
its number, tells a class: positions, angles and sizes are uniform on circles.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.datasets import Part
from tsm_core.labels import labels_of

SIDE_PX, FRAMES = 64, 8
TRAIN_CLIPS, TEST_PAIRS = 2400, 200  # TEST_PAIRS clips, each in both directions
TEXTURE = 32  # cells of a texture around and across
OUTWARDS = 0.4  # textures that an object shows while its radius grows by a factor e

Floats = NDArray[np.floating[Any]]


class Motion8:
    """Clips to train on (`part` train), or to be judged by (`val`): a ClipSource; any clip follows from its number.

    Items 2k and 2k + 1 of `val` are one clip in both directions, none of which training sees.
    """

    def __init__(self, part: Part, frames: int = FRAMES) -> None:
        self.part, self.frames = part, frames
        self.classes = len(labels_of("motion8"))
        self.identity = f"motion8 {part} {frames}"

    def __len__(self) -> int:
        return TRAIN_CLIPS if self.part == "train" else 2 * TEST_PAIRS

    def clip(self, index: int, rng: np.random.Generator | None = None) -> tuple[Tensor, int]:
        """Frames uint8 (T, 3, 64, 64) and the label of clip `index`; nothing is drawn with rng."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        pairs = self.classes // 2
        if self.part == "train":
            generator = np.random.default_rng((0, index))
            label = int(generator.integers(self.classes))
        else:
            generator = np.random.default_rng((1, index // 2))
            label = 2 * int(generator.integers(pairs)) + index % 2
        frames = draw_clip(generator, label // 2, self.frames)
        return (frames.flip(0) if label % 2 else frames), label


def draw_clip(generator: np.random.Generator, pair: int, frames: int = FRAMES) -> Tensor:
    """uint8 (T, 3, 64, 64) of the first class of a pair: 0 right, 1 down, 2 clockwise, 3 growing."""
    steps = np.arange(frames)
    speed = generator.uniform(1.5, 4.0)  # pixels a frame
    turn = generator.uniform(np.radians(8), np.radians(20))  # a frame
    zoom = generator.uniform(0.06, 0.16)  # of the logarithm of the size, a frame
    x, y = generator.uniform(0, SIDE_PX, 2)
    angle, size = generator.uniform(0, 2 * np.pi), generator.uniform(0, 1)
    xs = x + speed * steps * (pair == 0)
    ys = y + speed * steps * (pair == 1)
    angles = angle + turn * steps * (pair == 2)
    sizes = size + zoom * steps * (pair == 3)
    radius = generator.uniform(13, 24)
    object_, back = _texture(generator), _texture(generator)

    # distances on a torus: what leaves on one side comes in on the other
    grid = np.arange(SIDE_PX, dtype=np.float32) + 0.5
    dx = (grid[None, None, :] - xs[:, None, None] + SIDE_PX / 2) % SIDE_PX - SIDE_PX / 2  # (T, 1, W)
    dy = (grid[None, :, None] - ys[:, None, None] + SIDE_PX / 2) % SIDE_PX - SIDE_PX / 2  # (T, H, 1)
    distance = np.sqrt(dx * dx + dy * dy)
    frame, row, column = np.nonzero(distance < radius + 0.5)
    dx, dy, distance = dx[frame, 0, column], dy[frame, row, 0], distance[frame, row, column]
    # around and, by the logarithm of the distance, outwards: turning and growing only shift the texture
    around = (np.arctan2(dy, dx) - angles[frame]) / (2 * np.pi)
    outwards = OUTWARDS * (np.log(distance + 0.5) - sizes[frame])
    inside = np.clip(radius - distance + 0.5, 0, 1)[:, None]
    ground = 0.35 * _sample(back, *np.meshgrid(grid / SIDE_PX, grid / SIDE_PX)) + 0.3
    picture = np.repeat(ground[None], frames, axis=0)  # (T, H, W, 3)
    under = picture[frame, row, column]
    picture[frame, row, column] = inside * _sample(object_, around, outwards) + (1 - inside) * under
    picture += 0.02 * generator.standard_normal(picture.shape, dtype=np.float32)
    levels = (255 * np.clip(picture, 0, 1)).round().astype(np.uint8)
    return torch.from_numpy(levels).permute(0, 3, 1, 2)


def _texture(generator: np.random.Generator) -> Floats:
    """Smooth colours (cells, cells, 3) in 0..1 that go on over their edges."""
    spectrum = np.fft.rfft2(generator.normal(size=(TEXTURE, TEXTURE, 3)), axes=(0, 1))
    smooth: Floats = np.fft.irfft2(spectrum * _pass()[..., None], s=(TEXTURE, TEXTURE), axes=(0, 1))
    low, high = smooth.min(axis=(0, 1)), smooth.max(axis=(0, 1))
    scaled: Floats = (smooth - low) / (high - low)
    return scaled.astype(np.float32)


@lru_cache
def _pass() -> Any:
    rows, columns = np.fft.fftfreq(TEXTURE)[:, None], np.fft.rfftfreq(TEXTURE)[None, :]
    return np.exp(-((np.hypot(rows, columns) / 0.12) ** 2))


def _sample(texture: Floats, u: Floats, v: Floats) -> Floats:
    """Colours (..., 3) at places counted in whole textures, bilinear, periodic."""
    a, b = (u * TEXTURE).astype(np.float32), (v * TEXTURE).astype(np.float32)
    i, j = np.floor(a).astype(np.int32), np.floor(b).astype(np.int32)
    s, t = (a - i)[..., None], (b - j)[..., None]
    i0, i1, j0, j1 = i % TEXTURE, (i + 1) % TEXTURE, j % TEXTURE, (j + 1) % TEXTURE
    upper = (1 - s) * texture[i0, j0] + s * texture[i1, j0]
    lower = (1 - s) * texture[i0, j1] + s * texture[i1, j1]
    mixed: Floats = (1 - t) * upper + t * lower
    return mixed
