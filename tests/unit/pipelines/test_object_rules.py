"""Which boxes count."""

import pytest

from pipelines.object_rules import ObjectFilter, ObjectRules, ObjectRulesError
from pipelines.zones import Zone, ZoneError
from tests.unit.pipelines.object_kit import SIZE, found
from tsm_core.types import Detection

LEFT = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))


@pytest.mark.parametrize(
    ("rules", "box", "admitted"),
    [
        ({}, found(300), True),
        ({}, found(300, score=0.1), True),  # weak, but it may go on with a track
        ({}, found(300, score=0.09), False),
        ({"filter": ObjectFilter(min_area=0.012)}, found(300), True),  # 60 x 100 of 1000 x 500
        ({"filter": ObjectFilter(min_area=0.0121)}, found(300), False),
        ({"filter": ObjectFilter(max_area=0.0119)}, found(300), False),
        ({"filter": ObjectFilter(min_area=0.012)}, found(0), False),  # half of it is outside
        ({"filter": ObjectFilter(min_ratio=0.61)}, found(300), False),
        ({"filter": ObjectFilter(min_ratio=0.59, max_ratio=0.61)}, found(300), True),
        ({"filter": ObjectFilter(max_ratio=0.59)}, found(300), False),
        ({"filters": {"cat": ObjectFilter(min_area=0.5)}}, found(300, label="cat"), False),
        ({"filters": {"cat": ObjectFilter(min_area=0.5)}}, found(300, label="dog"), True),
        ({"zones": (Zone("mask", LEFT, kind="exclude"),)}, found(300), False),
        ({"zones": (Zone("mask", LEFT, kind="exclude"),)}, found(501), True),
        ({"zones": (Zone("mask", LEFT, kind="exclude", objects=("cat",)),)}, found(300), True),
        ({"zones": (Zone("hall", LEFT),)}, found(300), True),
        ({"labels": ("cat",)}, found(300), True),  # the label is voted on first
        ({}, Detection("person", 0.9, (-90.0, 10.0, -10.0, 50.0)), False),  # outside
        ({}, Detection("person", 0.9, (10.0, 501.0, 90.0, 550.0)), False),
        ({}, Detection("person", 0.9, (-90.0, -10.0, 1e7, 1e7)), True),  # all over it
    ],
)
def test_what_is_looked_at(rules, box, admitted):
    assert ObjectRules(**rules).admits(box, SIZE) is admitted


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ObjectFilter(min_score=0.05), r"min_score is 0\.05; give 0\.1 to 1"),
        (lambda: ObjectFilter(threshold=1.5), r"threshold is 1\.5"),
        (lambda: ObjectFilter(threshold=float("nan")), "threshold is nan"),
        (lambda: ObjectFilter(min_area=0.5, max_area=0.1), r"min_area\.\.max_area is 0\.5\.\.0\.1"),
        (lambda: ObjectFilter(max_area=4000), r"min_area\.\.max_area is 0\.0\.\.4000; .* <= 1"),
        (lambda: ObjectFilter(min_ratio=-1), r"min_ratio\.\.max_ratio is -1\.\.inf"),
        (lambda: ObjectRules(max_disappeared_s=0), "max_disappeared_s is 0; give seconds above 0"),
        (lambda: ObjectRules(max_weak_s=-1), "max_weak_s is -1"),
        (lambda: ObjectRules(stationary_s=float("nan")), "stationary_s is nan"),
        (lambda: ObjectRules(update_s=-1), "update_s is -1"),
    ],
)
def test_rules_that_cannot_be_met_are_refused(make, match):
    with pytest.raises(ObjectRulesError, match=match) as caught:
        make()
    assert caught.value.reason == "invalid_object_rules"


def test_places_are_named_once_and_required_ones_exist():
    hall = Zone("hall", LEFT)
    with pytest.raises(ZoneError, match="2 zones and lines are called 'hall'"):
        ObjectRules(zones=(hall, hall))
    with pytest.raises(ZoneError, match="required zone 'yard' is none that objects can enter; there are: hall"):
        ObjectRules(zones=(hall,), required_zones=("yard",))
    with pytest.raises(ZoneError, match="there are: none"):
        ObjectRules(zones=(Zone("mask", LEFT, kind="exclude"),), required_zones=("mask",))
