"""moving-shapes: procedural films that tell detectors with a sense of time from those without.

A grey still camera watches one to three shapes (disc, square, triangle, plus) that rest, drift or fly, before clutter
and behind bars. The open shutter blurs what moves, the sensor is noisy, and every few clean frames the whole picture is
out of focus, or dark and amplified, for 2 to 5 frames. What a shape is can then hardly be read; a few frames ago it
could. A film follows from (seed, number) alone; nothing but its pixels tells a network anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.box_data import BoxVideo, Objects
from pipelines.datasets import Part

SHAPES: tuple[str, ...] = ("disc", "square", "triangle", "plus")
CONDITIONS: tuple[str, ...] = ("clean", "defocus", "low light")
SIDE_PX, FRAMES = 96, 24
SERIES: dict[Part, tuple[int, int]] = {"train": (1, 900), "val": (7, 200)}  # seed and number of films
PHOTOS = 4  # clean frames of a film that are photos
SHUTTER = np.array([-0.4, -0.2, 0.0, 0.2, 0.4])  # times of the exposure, in frames: 0.8 of a frame open
RADIUS_PX = (7.5, 13.0)
SPEEDS_PX = ((0.0, 0.04), (0.12, 0.4), (1.0, 4.5))  # a frame: slow, medium, fast
SPEED_SHARES = (0.25, 0.25, 0.5)
CONTRAST = (0.15, 0.40)  # of a shape against its surroundings, either sign
NOISE = (0.02, 0.05)  # of the sensor in clean frames, standard deviation
GRAIN_PX = 3  # half of the noise's power has this grain, as colour filters and compression leave it
DEFOCUS_PX = (11, 19)  # side of the box that blurs, odd
GAIN, READ_NOISE = (0.10, 0.22), 0.045  # light left, and the sensor's noise before the camera amplifies
CLEAN_FRAMES, DEGRADED_FRAMES = (3, 7), (2, 5)
IGNORE_BELOW = 0.15  # share of a shape that must be visible for it to count

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Film:
    """A film and its truth: M shapes over T frames."""

    frames: NDArray[np.uint8]  # (T, side, side)
    labels: NDArray[np.int64]  # (M,) index into SHAPES
    boxes: Floats  # (T, M, 4) xyxy at mid-exposure, whole shape, also where it is hidden
    visible: Floats  # (T, M) share of the shape that nothing covers
    condition: NDArray[np.int64]  # (T,) index into CONDITIONS


class MovingShapes:
    """The films to train on, or to be judged by: BoxVideos. A film once drawn is kept."""

    labels = SHAPES

    def __init__(self, part: Part) -> None:
        self.part = part
        self._seed, self._films = SERIES[part]
        self.identity = f"moving-shapes {part}"

    def __len__(self) -> int:
        return self._films

    def video(self, index: int) -> BoxVideo:
        """Film `index`, its grey as RGB; a shape that hardly shows is to be ignored."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        film = _kept_film(self._seed, index)
        tracks = np.arange(len(film.labels))
        objects = tuple(
            Objects.of(boxes, film.labels, tracks, visible < IGNORE_BELOW, visible, CONDITIONS[condition])
            for boxes, visible, condition in zip(film.boxes, film.visible, film.condition, strict=True)
        )
        grey = torch.from_numpy(film.frames)[:, None]
        return BoxVideo(
            f"moving-shapes/{self.part}/{index}", objects, lambda numbers: grey[list(numbers)].expand(-1, 3, -1, -1)
        )


class MovingPhotos:
    """Clean frames of the films, each a video of its own, to learn the shapes from before their films: BoxVideos."""

    labels = SHAPES

    def __init__(self, part: Part) -> None:
        self._films = MovingShapes(part)
        self.identity = f"moving-shapes {part} photos"

    def __len__(self) -> int:
        return PHOTOS * len(self._films)

    def video(self, index: int) -> BoxVideo:
        """One of PHOTOS frames of film index // PHOTOS, as far from one another as its clean frames are."""
        film = self._films.video(index // PHOTOS)
        clean = [number for number, objects in enumerate(film.objects) if objects.condition == CONDITIONS[0]]
        number = clean[index % PHOTOS * len(clean) // PHOTOS]
        return BoxVideo.of(f"{film.name}/{number}", film.read([number]), [film.objects[number]])


@lru_cache(maxsize=2048)
def _kept_film(seed: int, number: int) -> Film:
    return draw_film(seed, number)


def draw_film(seed: int, number: int, frames: int = FRAMES, side: int = SIDE_PX) -> Film:
    """Film `number` of the series `seed`, always the same."""
    rng = np.random.default_rng((seed, number))
    times = (np.arange(frames)[:, None] + SHUTTER).ravel()  # (T * S,)
    middle = slice(len(SHUTTER) // 2, None, len(SHUTTER))
    ground = _ground(rng, side)
    light = np.repeat(ground[None], len(times), axis=0)
    shapes = int(rng.integers(1, 4))
    labels = rng.integers(len(SHAPES), size=shapes)
    boxes = np.empty((frames, shapes, 4), dtype=np.float32)
    covers = []  # of each shape at mid-exposure
    for place, label in enumerate(labels):
        radius, angle = rng.uniform(*RADIUS_PX), rng.uniform(0, 2 * np.pi)
        outline = _outline(int(label), radius, angle)
        low, high = outline.min(axis=0), outline.max(axis=0)
        at = _path(rng, times, -low, side - high)
        boxes[:, place] = np.hstack([at[middle] + low, at[middle] + high])
        # seen against what lies around its place in the middle of the film
        row, column = at[len(at) // 2, ::-1].astype(int).clip(0, side - 1)
        level = ground[row, column] + rng.choice((-1.0, 1.0)) * rng.uniform(*CONTRAST)
        covers.append(_paint(light, int(label), radius, angle, at, float(np.clip(level, 0.02, 0.98)))[middle])
    hidden = np.zeros((frames, side, side), dtype=np.float32)
    for _ in range(int(rng.integers(1, 3))):
        hidden = np.maximum(hidden, _bar(rng, light, times)[middle])
    visible = np.empty((frames, shapes), dtype=np.float32)
    for place in reversed(range(shapes)):
        whole = covers[place].sum(axis=(1, 2))
        visible[:, place] = (covers[place] * (1 - hidden)).sum(axis=(1, 2)) / whole
        hidden = np.maximum(hidden, covers[place])
    exposed: Floats = light.reshape(frames, len(SHUTTER), side, side).mean(axis=1)
    condition, levels = _camera(rng, exposed)
    return Film(levels, labels, boxes, visible, condition)


def _ground(rng: np.random.Generator, side: int) -> Floats:
    """Smooth random grey with clutter: ellipses, never as round as a disc."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    spectrum = np.fft.rfft2(rng.normal(size=(side, side))) * np.exp(-((frequency / 0.03) ** 2))
    smooth = np.fft.irfft2(spectrum, s=(side, side))
    ground = rng.uniform(0.35, 0.65) + rng.uniform(0.03, 0.08) * smooth / smooth.std()
    grid = np.arange(side) + 0.5
    for _ in range(int(rng.integers(4, 11))):
        x, y = rng.uniform(0, side, 2)
        long, turn = rng.uniform(5, 16), rng.uniform(0, np.pi)
        short = long * rng.uniform(0.25, 0.65)
        dx, dy = grid[None] - x, grid[:, None] - y
        u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        inside = np.clip((1 - np.hypot(u / long, v / short)) * short + 0.5, 0, 1)
        ground += inside * rng.choice((-1.0, 1.0)) * rng.uniform(0.05, 0.22)
    clipped: Floats = np.clip(ground, 0.05, 0.95).astype(np.float32)
    return clipped


def _path(rng: np.random.Generator, times: Any, low: Any, high: Any) -> Any:
    """Centres (N, 2), x and y: constant velocity between walls, which reflect."""
    start, heading = rng.uniform(low, high), rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(*SPEEDS_PX[rng.choice(3, p=SPEED_SHARES)])
    free = start + speed * times[:, None] * np.array([np.cos(heading), np.sin(heading)])
    room = high - low
    return low + room - np.abs((free - low) % (2 * room) - room)


def _outline(label: int, radius: float, angle: float) -> Any:
    """Points (K, 2) whose box is the shape's."""
    if label == 0:
        return radius * np.array([[-1.0, -1.0], [1.0, 1.0]])
    if label == 1:
        points = 0.9 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    elif label == 2:
        around = np.radians([90, 210, 330])
        points = 1.5 * np.stack([np.cos(around), np.sin(around)], axis=1)
    else:
        long, thin = 1.25, 0.33
        points = np.array([[s * a, t * b] for a, b in ((long, thin), (thin, long)) for s in (-1, 1) for t in (-1, 1)])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return radius * points @ turn


def _distance(label: int, radius: float, u: Any, v: Any) -> Any:
    """How far outside a shape's edge a point (u, v) of its own axes lies, in px; negative inside."""
    if label == 0:
        return np.hypot(u, v) - radius
    if label == 1:
        return np.maximum(np.abs(u), np.abs(v)) - 0.9 * radius
    if label == 2:
        slanted = np.sqrt(0.75) * np.abs(u) + 0.5 * v
        return np.maximum(slanted, -v) - 0.75 * radius
    u, v = np.abs(u), np.abs(v)
    across = np.maximum(u - 1.25 * radius, v - 0.33 * radius)
    upright = np.maximum(u - 0.33 * radius, v - 1.25 * radius)
    return np.minimum(across, upright)


def _paint(light: Floats, label: int, radius: float, angle: float, at: Any, level: float) -> Floats:
    """Lay a shape over the picture (N, side, side) at its N places; how much of every pixel it covers, same shape."""
    side = light.shape[-1]
    reach = np.arange(-(int(1.55 * radius) + 2), int(1.55 * radius) + 3)
    first = np.floor(at).astype(np.int32)
    columns, rows = first[:, :1] + reach, first[:, 1:] + reach  # (N, K)
    dx = ((columns + 0.5) - at[:, :1])[:, None, :].astype(np.float32)
    dy = ((rows + 0.5) - at[:, 1:])[:, :, None].astype(np.float32)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    part = np.clip(0.5 - _distance(label, float(radius), dx * c + dy * s, dy * c - dx * s), 0, 1)  # (N, K, K)
    frame, row, column = np.nonzero(part)
    share = part[frame, row, column]
    row, column = rows[frame, row], columns[frame, column]
    seen = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    place = (frame[seen], row[seen], column[seen])
    cover = np.zeros_like(light)
    cover[place] = share[seen]
    light[place] += share[seen] * (np.float32(level) - light[place])
    return cover


def _bar(rng: np.random.Generator, light: Floats, times: Any) -> Floats:
    """Lay an upright or level bar over the picture (N, side, side), resting or gliding; what it covers."""
    side = light.shape[-1]
    width, start = rng.uniform(5, 12), rng.uniform(0, side)
    speed = rng.uniform(0.3, 1.5) * rng.choice((-1, 0, 1), p=(0.25, 0.5, 0.25))
    middle = (start + speed * times) % (side + width) - width / 2
    away = np.abs(np.arange(side) + 0.5 - middle[:, None])
    line = np.clip(width / 2 - away + 0.5, 0, 1).astype(np.float32)  # (N, side)
    cover = line[:, None, :] if rng.random() < 0.5 else line[:, :, None]
    light += cover * (np.float32(rng.uniform(0.2, 0.8)) - light)
    return np.broadcast_to(cover, light.shape)


def _camera(rng: np.random.Generator, exposed: Floats) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """What the camera makes of the light (T, side, side): the condition of each frame, and its levels."""
    frames = len(exposed)
    condition = np.zeros(frames, dtype=np.int64)
    picture = exposed.copy()
    sensor = rng.uniform(*NOISE)
    fine, coarse = rng.standard_normal((2, *exposed.shape), dtype=np.float32)
    noise = np.float32(sensor * np.sqrt(0.5)) * (fine + GRAIN_PX * _box_blur(coarse, GRAIN_PX))
    at = int(rng.integers(CLEAN_FRAMES[1] + 1))
    while at < frames:
        spell = slice(at, at + int(rng.integers(DEGRADED_FRAMES[0], DEGRADED_FRAMES[1] + 1)))
        if rng.random() < 0.5:
            condition[spell] = 1
            picture[spell] = _box_blur(picture[spell], int(rng.choice(np.arange(DEFOCUS_PX[0], DEFOCUS_PX[1] + 1, 2))))
        else:
            condition[spell] = 2
            noise[spell] *= np.float32(READ_NOISE / rng.uniform(*GAIN) / sensor)
        at = spell.stop + int(rng.integers(CLEAN_FRAMES[0], CLEAN_FRAMES[1] + 1))
    return condition, (255 * np.clip(picture + noise, 0, 1)).round().astype(np.uint8)


def _box_blur(picture: Floats, width: int) -> Floats:
    """Mean over squares of `width` px (odd); the border is mirrored."""
    for axis in (1, 2):
        edges = [(0, 0)] * 3
        edges[axis] = (width // 2 + 1, width // 2)
        total = np.pad(picture, edges, mode="reflect").cumsum(axis=axis, dtype=np.float32)
        size = picture.shape[axis]
        upper = np.take(total, range(width, width + size), axis=axis)
        picture = (upper - np.take(total, range(size), axis=axis)) / width
    return picture
