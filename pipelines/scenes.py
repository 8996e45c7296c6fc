"""Procedural films with their truth: an object that moves, turns, grows, shrinks or rests, for ever.

A film is a pure function of (seed, frame number). Its object lives on a torus: position, angle and logarithm of size
each run round a circle and are uniform on it whatever happens, so a single frame does not tell what is going on; only
the order of frames does. Speeds and sizes are given for a picture of 64 px and scale with the picture.
"""

from __future__ import annotations

import colorsys
import math
from bisect import bisect_right
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LABELS: tuple[str, ...] = (
    "left",
    "right",
    "up",
    "down",
    "clockwise",
    "counter-clockwise",
    "grow",
    "shrink",
    "still",
)

KINDS: tuple[str, ...] = ("badge",)  # what there is in a scene, to a detector

MOVE_PX_S = (25.0, 75.0)
TURN_DEG_S = (100.0, 300.0)
ZOOM_LOG_S = (0.7, 1.4)
RADIUS_PX = (9.0, 27.0)
HOLD_S = (2.0, 5.0)
_SIDE_PX = 64.0  # the picture that the four ranges above speak of
_ZOOM_LOG = math.log(RADIUS_PX[1] / RADIUS_PX[0])  # once round the circle of sizes
_FADE = 0.3  # last part of that circle, in which a small copy appears inside and the large one dissolves
_MARGIN = 1.2  # sprite half side / object radius: room for the soft dark halo

# What one unit of speed changes: (x, y, angle, size), each in turns of its circle.
_AXES: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (1, -1),
    "down": (1, 1),
    "clockwise": (2, 1),
    "counter-clockwise": (2, -1),
    "grow": (3, 1),
    "shrink": (3, -1),
}
_RANGES: tuple[tuple[float, float], ...] = (  # turns per second
    (MOVE_PX_S[0] / _SIDE_PX, MOVE_PX_S[1] / _SIDE_PX),
    (MOVE_PX_S[0] / _SIDE_PX, MOVE_PX_S[1] / _SIDE_PX),
    (TURN_DEG_S[0] / 360, TURN_DEG_S[1] / 360),
    (ZOOM_LOG_S[0] / _ZOOM_LOG, ZOOM_LOG_S[1] / _ZOOM_LOG),
)

Floats = NDArray[np.float32]
Corners = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]


class Piece(NamedTuple):
    """A part of the picture in which the object shows.

    box: the tight bound (x0, y0, x1, y1) in pixels of what lies in the picture. visible: its opacity times the share of
    the object's area that it is. copy: which one it is of the object's repetitions, by whole sides in x and y and by
    turns round the circle of sizes.
    """

    box: Box
    visible: float
    copy: tuple[int, int, int]


class Interval(TypedDict):
    """One label for the frames [start_frame, end_frame)."""

    label: str
    start_frame: int
    end_frame: int


class Pose(NamedTuple):
    """Where the object is: four numbers in [0, 1), each a place on a circle.

    x, y: centre, as a part of the picture's side. angle: turns, clockwise. size: 0 smallest, towards 1 largest.
    """

    x: float
    y: float
    angle: float
    size: float


@dataclass(frozen=True, slots=True)
class _Leg:
    label: str
    start: int
    end: int
    before: Pose  # at frame start - 1
    velocity: tuple[float, float, float, float]  # turns per second


class Script:
    """What happens when: label, pose and velocity of every frame, from a seed.

    pace multiplies all speeds. A frame's label is the motion that led to it from the frame before. Poses are
    continuous over label changes. Safe to read from several threads.
    """

    def __init__(self, seed: int, fps: float = 15.0, pace: float = 1.0) -> None:
        self.seed, self.fps, self.pace = seed, fps, pace
        self._random = np.random.default_rng([seed, 1])
        self._start = Pose(*self._random.random(4).tolist())
        self._legs: list[_Leg] = []
        self._starts: list[int] = []
        self._lock = Lock()

    def _leg(self, number: int) -> _Leg:
        if number < 0:
            raise IndexError(f"frame number must be 0 or more, got {number}")
        with self._lock:
            while not self._legs or self._legs[-1].end <= number:
                self._append()
            return self._legs[bisect_right(self._starts, number) - 1]

    def _append(self) -> None:
        last = self._legs[-1] if self._legs else None
        choices = [label for label in LABELS if last is None or label != last.label]
        label = choices[int(self._random.integers(len(choices)))]
        velocity = [0.0] * 4
        part = float(self._random.random())
        if label in _AXES:
            axis, sign = _AXES[label]
            low, high = _RANGES[axis]
            velocity[axis] = sign * self.pace * (low + (high - low) * part)
        frames = max(1, round(float(self._random.uniform(*HOLD_S)) * self.fps))
        start = last.end if last else 0
        before = self._at(last, last.end - 1) if last else self._start
        vx, vy, va, vs = velocity
        self._legs.append(_Leg(label, start, start + frames, before, (vx, vy, va, vs)))
        self._starts.append(start)

    def _at(self, leg: _Leg, number: int) -> Pose:
        elapsed_s = (number - leg.start + 1) / self.fps
        return Pose(*((place + speed * elapsed_s) % 1.0 for place, speed in zip(leg.before, leg.velocity, strict=True)))

    def label_at(self, number: int) -> str:
        """The label of frame `number`."""
        return self._leg(number).label

    def pose_at(self, number: int) -> Pose:
        """The object's pose in frame `number`."""
        return self._at(self._leg(number), number)

    def velocity_at(self, number: int) -> tuple[float, float, float, float]:
        """The speeds of x, y, angle and size that led to frame `number`, in turns per second."""
        return self._leg(number).velocity

    def since_change(self, number: int) -> int:
        """How many frames ago the label changed: 0 on the first frame of an interval."""
        return number - self._leg(number).start

    def intervals(self, until_frame: int) -> list[Interval]:
        """All intervals that begin before `until_frame`, in order and without gaps; the last is cut there."""
        intervals: list[Interval] = []
        number = 0
        while number < until_frame:
            leg = self._leg(number)
            intervals.append({"label": leg.label, "start_frame": leg.start, "end_frame": min(leg.end, until_frame)})
            number = leg.end
        return intervals


class Look:
    """How a film looks: background, and the object at several resolutions. Drawn once from a seed."""

    def __init__(self, seed: int, size_px: int) -> None:
        if size_px < 16:
            raise ValueError(f"size_px must be at least 16, got {size_px}")
        self.size_px = size_px
        random = np.random.default_rng([seed, 2])
        hue = float(random.random())
        self.background = Image.fromarray(_draw_background(random, hue, size_px))
        outline_angles = np.linspace(0, 2 * np.pi, 180, endpoint=False, dtype=np.float32)
        style = _outline_style(random)
        radii = _outline(style, outline_angles)
        self._outline = np.stack([radii * np.cos(outline_angles), radii * np.sin(outline_angles)])  # of radius 1
        half_px = 2 * math.ceil(_MARGIN * RADIUS_PX[1] / _SIDE_PX * size_px)
        pixels = _draw_object(random, hue, style, half_px)
        sprite = Image.fromarray(pixels, "RGBA")
        self._levels: list[tuple[Image.Image, Image.Image]] = []
        for reduction in (2, 3, 4, 6, 9):  # of a sprite drawn at twice the largest size
            small = sprite.reduce(reduction)
            self._levels.append((small.convert("RGB"), small.getchannel("A")))

    def radius_px(self, size: float) -> float:
        """The object's radius in pixels at `size`, a place on the circle of sizes."""
        return RADIUS_PX[0] * math.exp(_ZOOM_LOG * size) * self.size_px / _SIDE_PX

    def render(self, pose: Pose) -> Pixels:
        """The picture with the object in `pose`, uint8 (H, W, 3)."""
        picture = self.background.copy()
        for size, opacity, _ in _copies(pose.size):
            self._paste(picture, pose, self.radius_px(size), opacity)
        return np.array(picture)

    def _paste(self, picture: Image.Image, pose: Pose, radius: float, opacity: float) -> None:
        reach = radius * _MARGIN
        center_x, center_y = pose.x * self.size_px, pose.y * self.size_px
        left, top = math.floor(center_x - reach), math.floor(center_y - reach)
        width, height = math.ceil(center_x + reach) - left, math.ceil(center_y + reach) - top
        color, alpha = min(self._levels, key=lambda level: abs(math.log(level[0].width / (2 * reach))))
        scale = color.width / (2 * reach)
        turn = 2 * math.pi * pose.angle
        cos, sin = scale * math.cos(turn), scale * math.sin(turn)
        offset_x, offset_y = left - center_x, top - center_y
        middle = color.width / 2
        affine = (
            cos, sin, cos * offset_x + sin * offset_y + middle,
            -sin, cos, -sin * offset_x + cos * offset_y + middle,
        )  # fmt: skip
        bilinear = Image.Resampling.BILINEAR
        colors = color.transform((width, height), Image.Transform.AFFINE, affine, bilinear)
        mask = alpha.transform((width, height), Image.Transform.AFFINE, affine, bilinear)
        if opacity < 1:
            mask = mask.point([round(opacity * value) for value in range(256)])
        for shift_x, shift_y in self._visible(left, top, left + width, top + height):
            picture.paste(colors, (left + shift_x, top + shift_y), mask)

    def _visible(self, left: float, top: float, right: float, bottom: float) -> list[tuple[int, int]]:
        """Shifts by whole sides that bring some of a box into the picture."""
        side = self.size_px
        return [
            (x, y)
            for y in (-side, 0, side)
            for x in (-side, 0, side)
            if right + x > 0 and left + x < side and bottom + y > 0 and top + y < side
        ]

    def pieces(self, pose: Pose) -> list[Piece]:
        """Where the object shows, most visible first.

        What leaves on one side comes in on the other, and a small copy replaces one that has grown too large: so there
        are one to four pieces, for a while twice as many.
        """
        turn, side = 2 * math.pi * pose.angle, float(self.size_px)
        cos, sin = math.cos(turn), math.sin(turn)
        outline = np.array([[cos, -sin], [sin, cos]]) @ self._outline
        pieces: list[Piece] = []
        for size, opacity, level in _copies(pose.size):
            corners = self.radius_px(size) * outline + [[pose.x * side], [pose.y * side]]
            whole = _area(corners)
            for shift in self._visible(*corners.min(axis=1), *corners.max(axis=1)):
                inside = _within(corners + np.reshape(shift, (2, 1)), side)
                if share := _area(inside) / whole:
                    (x0, y0), (x1, y1) = inside.min(axis=1).tolist(), inside.max(axis=1).tolist()
                    copy = (shift[0] // self.size_px, shift[1] // self.size_px, level)
                    pieces.append(Piece((x0, y0, x1, y1), opacity * min(share, 1.0), copy))
        return sorted(pieces, key=lambda piece: -piece.visible)


class Scene:
    """An endless film and its truth, a pure function of (seed, frame number).

    frame(n) may be asked in any order and costs a few milliseconds at most. The picture is square, size_px a side.
    """

    def __init__(self, seed: int, size_px: int = 320, fps: float = 15.0) -> None:
        self.seed, self.size_px, self.fps = seed, size_px, fps
        self.timeline = Script(seed, fps)
        self.look = Look(seed, size_px)

    def frame(self, number: int) -> Pixels:
        """Picture `number`, uint8 (H, W, 3), RGB."""
        return self.look.render(self.timeline.pose_at(number))

    def label_at(self, number: int) -> str:
        """What the object does in frame `number`, one of LABELS."""
        return self.timeline.label_at(number)

    def script(self, until_frame: int) -> list[Interval]:
        """Intervals {label, start_frame, end_frame} of the frames [0, until_frame), end exclusive, without gaps."""
        return self.timeline.intervals(until_frame)


@dataclass(frozen=True, slots=True)
class ClipBatch:
    """Clips with the truth of every frame.

    images uint8 (N, T, H, W, 3). labels int64 (N, T), indices into LABELS. age int64 (N, T), frames seen of the
    present motion (0 on the first one; counts from the clip's start at most). velocity float32 (N, T, 4), speeds of
    x, y, angle and size in units of the middle of their range.
    """

    images: Pixels
    labels: NDArray[np.int64]
    age: NDArray[np.int64]
    velocity: Floats


class ClipMaker:
    """Fresh clips without end, for training: cut from films, most with a change of label inside.

    A pool of looks is renewed a little with every batch, because drawing a look costs more than rendering it.
    """

    def __init__(self, seed: int, size_px: int = 128, fps: float = 15.0, looks: int = 160, renew: int = 4) -> None:
        self.size_px, self.fps, self.renew = size_px, fps, renew
        self._random = np.random.default_rng([seed, 3])
        self._looks = [self._new_look() for _ in range(looks)]
        self._oldest = 0

    def _new_seed(self) -> int:
        return int(self._random.integers(2**40, 2**62))  # far from the seeds that people give to films

    def _new_look(self) -> Look:
        return Look(self._new_seed(), self.size_px)

    def batch(
        self,
        clips: int = 16,
        frames: int = 16,
        pace: tuple[float, float] = (1.0, 1.0),
        change_share: float = 0.6,
        skip_share: float = 0.1,
    ) -> ClipBatch:
        """`clips` clips of `frames` frames.

        pace: range of a factor on all speeds. change_share: part of the clips that have a label change inside.
        skip_share: part of the clips in which one frame is missing, as when a server drops one.
        """
        for _ in range(self.renew):
            self._looks[self._oldest] = self._new_look()
            self._oldest = (self._oldest + 1) % len(self._looks)
        images = np.empty((clips, frames, self.size_px, self.size_px, 3), np.uint8)
        labels = np.empty((clips, frames), np.int64)
        age = np.empty((clips, frames), np.int64)
        velocity = np.empty((clips, frames, 4), np.float32)
        middle = np.array([sum(bounds) / 2 for bounds in _RANGES], np.float32)
        for clip in range(clips):
            look = self._looks[int(self._random.integers(len(self._looks)))]
            script = Script(self._new_seed(), self.fps, float(self._random.uniform(*pace)))
            change = script.intervals(1_000)[0]["end_frame"]
            inside = self._random.random() < change_share
            first = change - int(self._random.integers(1, frames)) if inside else change
            numbers = list(range(max(0, first), max(0, first) + frames))
            if self._random.random() < skip_share:
                hole = int(self._random.integers(1, frames))
                numbers = numbers[:hole] + [number + 1 for number in numbers[hole:]]
            for t, number in enumerate(numbers):
                images[clip, t] = look.render(script.pose_at(number))
                labels[clip, t] = LABELS.index(script.label_at(number))
                age[clip, t] = min(t, script.since_change(number))
                velocity[clip, t] = np.array(script.velocity_at(number), np.float32) / middle
        return ClipBatch(images, labels, age, velocity)


def _copies(size: float) -> list[tuple[float, float, int]]:
    """(size, opacity, turns round the circle) of the object's copies, to be drawn in this order.

    Near the end of the circle a copy one turn smaller appears inside the object, then the object dissolves round it.
    """
    progress = (size - (1 - _FADE)) / _FADE
    if progress <= 0:
        return [(size, 1.0, 0)]
    return [(size, 1 - _ease(2 * progress - 1), 0), (size - 1, _ease(2 * progress), -1)]


def _ease(part: float) -> float:
    part = min(1.0, max(0.0, part))
    return part * part * (3 - 2 * part)


def _area(corners: Corners) -> float:
    """Of a polygon, by its corners (2, N)."""
    xs, ys = corners
    twice = xs[:-1] @ ys[1:] - xs[1:] @ ys[:-1] + xs[-1] * ys[0] - xs[0] * ys[-1]
    return abs(float(twice)) / 2


def _within(corners: Corners, side: float) -> Corners:
    """The part of a polygon that lies in the square from 0 to `side`: its corners (2, N), by Sutherland and Hodgman."""
    for axis, limit, sign in ((0, 0.0, 1), (0, side, -1), (1, 0.0, 1), (1, side, -1)):
        depth = sign * (corners[axis] - limit)
        if depth.min() >= 0:
            continue
        after = np.concatenate([corners[:, 1:], corners[:, :1]], axis=1)
        next_depth = np.append(depth[1:], depth[0])
        crosses = (depth > 0) != (next_depth > 0)
        part = depth / np.where(crosses, depth - next_depth, 1)
        met = corners + part * (after - corners)
        met[axis] = limit
        both = np.stack([corners, met], axis=2).reshape(2, -1)  # each corner, then where its edge meets the limit
        corners = both[:, np.stack([depth > 0, crosses], axis=1).ravel()]
        if not corners.size:
            return np.zeros((2, 1))
    return corners


def _color(hue: float, saturation: float, value: float) -> Floats:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32) * 255


def _noise(random: np.random.Generator, cells: int, size_px: int) -> Floats:
    """Smooth noise in about [0, 1], float32 (size_px, size_px)."""
    grid = Image.fromarray(random.random((cells, cells), np.float32))
    return np.asarray(grid.resize((size_px, size_px), Image.Resampling.BICUBIC))


def _draw_background(random: np.random.Generator, hue: float, size_px: int) -> Pixels:
    place = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
    x, y = place[None, :], place[:, None]
    direction = float(random.uniform(0, 2 * np.pi))
    slope = 0.5 + (x - 0.5) * math.cos(direction) * 0.9 + (y - 0.5) * math.sin(direction) * 0.9
    value = float(random.uniform(0.35, 0.75))
    first = _color(hue, float(random.uniform(0.35, 0.7)), value)
    second = _color(hue + float(random.uniform(-0.15, 0.15)), float(random.uniform(0.3, 0.7)), min(1.0, value + 0.2))
    third = _color(hue + float(random.uniform(0.1, 0.25)), float(random.uniform(0.25, 0.6)), value)
    mix = np.clip(slope + 0.5 * (_noise(random, 5, size_px) - 0.5), 0, 1)[..., None]
    picture = first * (1 - mix) + second * mix
    clouds = np.clip(1.8 * (_noise(random, int(random.integers(5, 12)), size_px) - 0.5), 0, 0.8)[..., None]
    picture = picture * (1 - clouds) + third * clouds
    angle, count = float(random.uniform(0, np.pi)), float(random.uniform(4, 11))
    along = 2 * np.pi * count * (x * math.cos(angle) + y * math.sin(angle))
    across = 2 * np.pi * count * (y * math.cos(angle) - x * math.sin(angle))
    kind = int(random.integers(4))
    if kind == 0:  # stripes
        pattern = np.sin(along)
    elif kind == 1:  # dots
        pattern = np.clip(4 * np.cos(along) * np.cos(across) - 2, -0.5, 1)
    elif kind == 2:  # waves
        pattern = np.sin(along + 1.5 * np.sin(across * 0.4))
    else:  # weave
        pattern = np.sin(along) * np.sin(across)
    pattern = pattern + 0.8 * (_noise(random, max(8, min(40, size_px // 3)), size_px) - 0.5)
    picture = picture * (1 + float(random.uniform(0.05, 0.14)) * pattern[..., None])
    pixels: Pixels = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    return pixels


def _outline_style(random: np.random.Generator) -> tuple[int, float]:
    """(petals, depth): a disc has depth 0, a flower or star more."""
    if random.random() < 0.35:
        return 0, 0.0
    return int(random.integers(3, 8)), float(random.uniform(0.08, 0.22))


def _outline(style: tuple[int, float], angle: Floats) -> Floats:
    petals, depth = style
    return (1 - depth * (0.5 - 0.5 * np.cos(petals * angle))).astype(np.float32)


def _draw_object(random: np.random.Generator, hue: float, style: tuple[int, float], half_px: int) -> Pixels:
    """A badge with a bright rim on a soft dark halo, uint8 (2 half_px, 2 half_px, 4), RGBA."""
    place = ((np.arange(2 * half_px, dtype=np.float32) + 0.5) / half_px - 1) * _MARGIN
    x, y = np.broadcast_to(place[None, :], (2 * half_px,) * 2), np.broadcast_to(place[:, None], (2 * half_px,) * 2)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    bound = _outline(style, angle)
    main = hue + 0.5 + float(random.uniform(-0.12, 0.12))
    colors = [
        _color(main, 0.8, 0.95),
        _color(main + float(random.choice([-1, 1])) * float(random.uniform(0.1, 0.2)), 0.75, 0.9),
        _color(main, 0.25, 1.0),
        _color(main + 0.08, 0.85, 0.45),
    ]
    order = random.permutation(4)
    kind = int(random.integers(3))
    if kind == 0:  # beach ball: sectors of unequal width
        count = int(random.integers(3, 6))
        widths = random.uniform(0.6, 1.4, count)
        edges = np.cumsum(widths / widths.sum()) * 2 * np.pi - np.pi
        index = np.minimum(np.searchsorted(edges, angle), count - 1)
        paint = [order[i % 3] if i < count - 1 or count % 3 != 1 else order[3] for i in range(count)]
        picture = np.stack([colors[i] for i in paint])[index]
    elif kind == 1:  # two halves, one of them striped
        turn, period = float(random.uniform(0, 2 * np.pi)), float(random.uniform(0.5, 0.8))
        along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        index = np.where(along > 0.1, 0, np.where(np.mod(across, period) < period / 2, 1, 2))
        picture = np.stack([colors[order[i]] for i in range(3)])[index]
    else:  # a marbled planet
        marble = _noise(random, 5, 2 * half_px) + 0.5 * x * float(random.choice([-1, 1]))
        index = np.digitize(marble, np.quantile(marble[::4, ::4], [0.4, 0.65])).astype(np.int64)
        picture = np.stack([colors[order[i]] for i in range(3)])[index]
    for spot in range(int(random.integers(1, 4))):  # spots off the middle make every turn visible
        turn, far = float(random.uniform(0, 2 * np.pi)), float(random.uniform(0.42, 0.58))
        inside = np.hypot(x - far * math.cos(turn), y - far * math.sin(turn)) < float(random.uniform(0.16, 0.27))
        picture[inside] = colors[order[3]] if spot % 2 == 0 else colors[2]
    rim = float(random.uniform(0.07, 0.12))
    picture[radius > bound - rim] = _color(main, 0.06, 1.0)
    outside = radius > bound
    picture[outside] = _color(hue, 0.6, 0.12)
    halo = 0.4 * np.clip(1 - (radius - bound) / (_MARGIN - 1), 0, 1) ** 2
    alpha = np.where(outside, halo, 1.0)[..., None] * 255
    pixels: Pixels = np.clip(np.concatenate([picture, alpha], axis=2) + 0.5, 0, 255).astype(np.uint8)
    return pixels
