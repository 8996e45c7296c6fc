"""Where objects are: zones they enter and stay in, lines they go over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import shapely

from tsm_core.errors import CallerError
from tsm_core.types import Box, Crossing

Point = tuple[float, float]
ZoneKind = Literal["include", "exclude"]


class ZoneError(CallerError):
    """A zone or line that is none."""

    reason = "invalid_zone"


def _points_of(what: str, points: Sequence[Sequence[float]]) -> tuple[Point, ...]:
    for point in points:
        if len(point) != 2 or not all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in point):
            raise ZoneError(
                f"{what} has the point {tuple(point)}; points are (x, y) as shares of the picture's width and height, "
                "0..1, with (0, 0) at the top left"
            )
    return tuple((float(x), float(y)) for x, y in points)


def _check_name_and_inertia(what: str, name: str, inertia: int) -> None:
    if not name:
        raise ZoneError(f"{what} has no name; give it one, events tell it")
    if inertia < 1:
        raise ZoneError(f"{what} has inertia {inertia}; at least 1 frame is needed")


@dataclass(frozen=True, slots=True)
class Zone:
    """A polygon in the picture; points are shares of its width and height.

    An object is where the bottom centre of its box is. `include`: tracks tell when they are in it, once they have been
    for `inertia` frames on end, and leave likewise; with loitering_s also when they have stayed that long. `exclude`:
    boxes in it are not looked at. objects: the labels it is for, all when empty. Raises ZoneError.
    """

    name: str
    points: tuple[Point, ...]
    kind: ZoneKind = "include"
    objects: tuple[str, ...] = ()
    inertia: int = 3
    loitering_s: float | None = None
    _polygon: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        what = f"zone {self.name!r}"
        _check_name_and_inertia(what, self.name, self.inertia)
        if self.kind not in ("include", "exclude"):
            raise ZoneError(f"{what} is of kind {self.kind!r}; there are include and exclude")
        if self.loitering_s is not None and not self.loitering_s > 0:
            raise ZoneError(f"{what} has loitering_s {self.loitering_s}; give seconds above 0, or none")
        points = _points_of(what, self.points)
        if len(set(points)) < 3:
            raise ZoneError(f"{what} has {len(set(points))} different points; a polygon needs at least 3")
        polygon = shapely.Polygon(points)
        if not polygon.is_valid:
            raise ZoneError(
                f"{what} crosses or touches itself ({shapely.is_valid_reason(polygon)}); "
                "give its corners in order, once round"
            )
        shapely.prepare(polygon)
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "_polygon", polygon)

    def holds(self, label: str, point: Point) -> bool:
        """Whether an object of this label at this point is in it; its edge belongs to it."""
        return (not self.objects or label in self.objects) and bool(shapely.intersects_xy(self._polygon, *point))


@dataclass(frozen=True, slots=True)
class Line:
    """A line from a to b, shares of the picture's width and height, that objects go over with their bottom centre.

    Who walks from a to b has `in` at the right hand. A crossing counts once the object has been on the other side for
    `inertia` frames on end. objects: the labels it is for, all when empty. Raises ZoneError.
    """

    name: str
    a: Point
    b: Point
    objects: tuple[str, ...] = ()
    inertia: int = 2

    def __post_init__(self) -> None:
        what = f"line {self.name!r}"
        _check_name_and_inertia(what, self.name, self.inertia)
        a, b = _points_of(what, (self.a, self.b))
        if a == b:
            raise ZoneError(f"{what} begins and ends at {a}; give two different points")
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", b)
        object.__setattr__(self, "objects", tuple(self.objects))

    def side(self, point: Point) -> int:
        """1 at the right hand of who walks from a to b, -1 at the left, 0 on the endless line."""
        (ax, ay), (bx, by), (x, y) = self.a, self.b, point
        turn = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        return (turn > 0) - (turn < 0)

    def meets(self, before: Point, now: Point) -> bool:
        """Whether the straight way between two points touches it."""
        return bool(shapely.LineString((self.a, self.b)).intersects(shapely.LineString((before, now))))


def check_names(zones: Sequence[Zone], lines: Sequence[Line]) -> None:
    """Raise ZoneError when two have the same name."""
    names = [zone.name for zone in zones] + [line.name for line in lines]
    for name in names:
        if names.count(name) > 1:
            raise ZoneError(f"{names.count(name)} zones and lines are called {name!r}; give each its own name")


def bottom_centre(xyxy: Box, source_size: tuple[int, int]) -> Point:
    """Where a box stands, as shares of the picture; at its edge when the box reaches over it."""
    x, y = (xyxy[0] + xyxy[2]) / 2 / source_size[0], xyxy[3] / source_size[1]
    return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Presence:
    """Where one object is, was and stays too long, and the lines it has just gone over."""

    zones: tuple[str, ...] = ()
    entered_zones: tuple[str, ...] = ()
    loitering: tuple[str, ...] = ()
    crossings: tuple[Crossing, ...] = ()


@dataclass(slots=True)
class _InZone:
    """Whether an object is in a zone; `run` frames on end say otherwise, the first of them at run_s."""

    inside: bool = False
    since_s: float = 0.0
    run: int = 0
    run_s: float = 0.0

    def update(self, held: bool, inertia: int, clock_s: float) -> None:
        if held == self.inside:
            self.run = 0
            return
        if self.run == 0:
            self.run_s = clock_s
        self.run += 1
        if self.run >= inertia:
            self.inside, self.since_s, self.run = held, self.run_s, 0


@dataclass(slots=True)
class _AtLine:
    """The side of a line that an object is on; `run` frames on end it was on the other, `met` if it came over it."""

    side: int = 0
    run: int = 0
    met: bool = False

    def update(self, line: Line, before: Point, now: Point) -> Crossing | None:
        side = line.side(now)
        if self.side == 0 or side in (0, self.side):
            self.run = 0 if side else self.run
            self.side = self.side or side
            return None
        if self.run == 0:
            self.met = line.meets(before, now)
        self.run += 1
        if self.run < line.inertia:
            return None
        self.side, self.run = side, 0
        return Crossing(line.name, "in" if side > 0 else "out") if self.met else None


@dataclass(slots=True)
class _Places:
    """What is remembered of one object."""

    point: Point
    entered: list[str] = field(default_factory=list)
    zones: dict[str, _InZone] = field(default_factory=dict)
    lines: dict[str, _AtLine] = field(default_factory=dict)


class ZoneWatch:
    """Follows objects through the zones and over the lines of one stream.

    clock_s is any clock in seconds that never goes back. Raises ZoneError when two places have the same name.
    """

    def __init__(self, zones: Sequence[Zone] = (), lines: Sequence[Line] = ()) -> None:
        check_names(zones, lines)
        self.zones = tuple(zone for zone in zones if zone.kind == "include")
        self.lines = tuple(lines)
        self._places: dict[str, _Places] = {}

    def update(self, track_id: str, label: str, point: Point, clock_s: float) -> Presence:
        """Where the object is, now that it stands at `point`."""
        places = self._places.setdefault(track_id, _Places(point))
        zones, loitering = [], []
        for zone in self.zones:
            seen = places.zones.setdefault(zone.name, _InZone())
            seen.update(zone.holds(label, point), zone.inertia, clock_s)
            if not seen.inside:
                continue
            zones.append(zone.name)
            if zone.name not in places.entered:
                places.entered.append(zone.name)
            # clocks are sums of frame intervals: a microsecond short is not short
            if zone.loitering_s is not None and clock_s - seen.since_s >= zone.loitering_s - 1e-6:
                loitering.append(zone.name)
        crossings = []
        for line in self.lines:
            crossing = places.lines.setdefault(line.name, _AtLine()).update(line, places.point, point)
            if crossing is not None and (not line.objects or label in line.objects):
                crossings.append(crossing)
        places.point = point
        return Presence(tuple(zones), tuple(places.entered), tuple(loitering), tuple(crossings))

    def forget(self, track_id: str) -> None:
        """Drop what is remembered of an object that is gone."""
        self._places.pop(track_id, None)

    def state(self) -> dict[str, Any]:
        """All it remembers, as JSON values."""
        return {track_id: asdict(places) for track_id, places in self._places.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`; what it says of zones and lines that are no more is dropped."""
        zones, lines = {zone.name for zone in self.zones}, {line.name for line in self.lines}
        self._places = {
            track_id: _Places(
                point=(float(places["point"][0]), float(places["point"][1])),
                entered=[name for name in places["entered"] if name in zones],
                zones={name: _InZone(**held) for name, held in places["zones"].items() if name in zones},
                lines={name: _AtLine(**held) for name, held in places["lines"].items() if name in lines},
            )
            for track_id, places in state.items()
        }
