"""Which objects count: rules for one stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.zones import Line, Zone, ZoneError, bottom_centre, check_names
from tsm_core.errors import CallerError
from tsm_core.types import Detection

WEAK_SCORE = 0.1  # a box below is noise; one between here and min_score only goes on with a track


class ObjectRulesError(CallerError):
    """Rules that no object could fulfil, or that name what is not there."""

    reason = "invalid_object_rules"


def _check_shares(what: str, low: float, high: float, top: float) -> None:
    if not 0.0 <= low <= high <= top:
        raise ObjectRulesError(f"{what} is {low}..{high}; give 0 <= lower <= upper <= {top:g}")


@dataclass(frozen=True, slots=True)
class ObjectFilter:
    """What a box must be to count.

    A track begins with boxes of at least min_score and is told once the median of its last scores is at least
    `threshold`. Areas are shares of the picture, of the part of the box that is in it; a ratio is width / height.
    Raises ObjectRulesError.
    """

    min_score: float = 0.5
    threshold: float = 0.6
    min_area: float = 0.0
    max_area: float = 1.0
    min_ratio: float = 0.0
    max_ratio: float = math.inf

    def __post_init__(self) -> None:
        for name, score in (("min_score", self.min_score), ("threshold", self.threshold)):
            if not WEAK_SCORE <= score <= 1.0:
                raise ObjectRulesError(f"{name} is {score}; give {WEAK_SCORE} to 1")
        _check_shares("min_area..max_area", self.min_area, self.max_area, 1.0)
        _check_shares("min_ratio..max_ratio", self.min_ratio, self.max_ratio, math.inf)

    def fits(self, detection: Detection, source_size: tuple[int, int]) -> bool:
        """Whether the box has the size and shape asked for."""
        x1, y1, x2, y2 = detection.xyxy
        width, height = source_size
        seen_width, seen_height = min(x2, width) - max(x1, 0.0), min(y2, height) - max(y1, 0.0)
        if seen_width <= 0 or seen_height <= 0:
            return False
        area = seen_width * seen_height / (width * height)
        return self.min_area <= area <= self.max_area and self.min_ratio <= (x2 - x1) / (y2 - y1) <= self.max_ratio


@dataclass(frozen=True)
class ObjectRules:
    """What is followed and told on one stream.

    labels: those that are told, all when empty. filters: per label, in place of `filter`. required_zones: an object is
    told once it has entered one of them. A track ends when it has had no box for max_disappeared_s, or none of at
    least min_score for max_weak_s. It is stationary when its box has kept its place for stationary_s. Updates of one
    object that say nothing but where it is come at most every update_s. Raises ObjectRulesError, ZoneError.
    """

    labels: tuple[str, ...] = ()
    filter: ObjectFilter = ObjectFilter()
    filters: Mapping[str, ObjectFilter] = field(default_factory=dict)
    zones: tuple[Zone, ...] = ()
    lines: tuple[Line, ...] = ()
    required_zones: tuple[str, ...] = ()
    max_disappeared_s: float = 2.0
    max_weak_s: float = 4.0
    stationary_s: float = 10.0
    update_s: float = 1.0

    def __post_init__(self) -> None:
        check_names(self.zones, self.lines)
        included = [zone.name for zone in self.zones if zone.kind == "include"]
        for name in self.required_zones:
            if name not in included:
                raise ZoneError(
                    f"required zone {name!r} is none that objects can enter; there are: {', '.join(included) or 'none'}"
                )
        for name in ("max_disappeared_s", "max_weak_s", "stationary_s"):
            if not getattr(self, name) > 0:
                raise ObjectRulesError(f"{name} is {getattr(self, name)}; give seconds above 0")
        if not self.update_s >= 0:
            raise ObjectRulesError(f"update_s is {self.update_s}; give seconds, 0 for every frame")

    def filter_of(self, label: str) -> ObjectFilter:
        """The filter for objects of this label."""
        return self.filters.get(label, self.filter)

    def admits(self, detection: Detection, source_size: tuple[int, int]) -> bool:
        """Whether the box is looked at: no noise, of the right size, in no excluded zone."""
        if detection.score < WEAK_SCORE or not self.filter_of(detection.label).fits(detection, source_size):
            return False
        point = bottom_centre(detection.xyxy, source_size)
        return not any(zone.kind == "exclude" and zone.holds(detection.label, point) for zone in self.zones)

    def tells(self, label: str) -> bool:
        """Whether objects of this label are told."""
        return not self.labels or label in self.labels
