"""Zones and lines, by little films of where an object stands."""

import json

import pytest

from pipelines.zones import Line, Zone, ZoneError, ZoneWatch, bottom_centre
from tsm_core.types import Crossing

LEFT_HALF = ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))
NAN = float("nan")


def play(watch: ZoneWatch, film, fps=1.0, label="person", begin=0):
    return [watch.update("door:1", label, point, n / fps) for n, point in enumerate(film, begin)]


def walk(*xs, y=0.5):
    return [(x, y) for x in xs]


@pytest.mark.parametrize(
    ("points", "match"),
    [
        (((0, 0), (1, 1), (1, 0), (0, 1)), r"zone 'z' crosses or touches itself \(Self-intersection\[0\.5 0\.5\]\)"),
        (((0, 0), (0.5, 0.5), (1, 1)), "crosses or touches itself"),  # no area
        (((0, 0), (1, 0), (1, 1), (0.5, 0.5), (0, 1), (1, 0)), "crosses or touches itself"),
        (((0, 0), (1, 1)), "has 2 different points; a polygon needs at least 3"),
        (((0, 0), (1, 1), (0, 0), (1, 1)), "has 2 different points"),
        ((), "has 0 different points"),
        (((0, 0), (1.2, 0), (1, 1)), r"has the point \(1\.2, 0\); points are \(x, y\) as shares"),
        (((0, 0), (-0.1, 0), (1, 1)), r"has the point \(-0\.1, 0\)"),
        (((0, 0), (NAN, 0), (1, 1)), r"has the point \(nan, 0\)"),
        (((0, 0), (1, 0, 0), (1, 1)), r"has the point \(1, 0, 0\)"),
        (((100, 200), (300, 200), (300, 400)), r"has the point \(100, 200\)"),  # pixels
    ],
)
def test_a_polygon_that_is_none_is_refused(points, match):
    with pytest.raises(ZoneError, match=match) as caught:
        Zone("z", points)
    assert caught.value.reason == "invalid_zone"


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Zone("", LEFT_HALF), "zone '' has no name"),
        (lambda: Zone("z", LEFT_HALF, inertia=0), "inertia 0; at least 1"),
        (lambda: Zone("z", LEFT_HALF, loitering_s=0), "loitering_s 0; give seconds above 0"),
        (lambda: Zone("z", LEFT_HALF, loitering_s=NAN), "loitering_s nan"),
        (lambda: Zone("z", LEFT_HALF, kind="mask"), "kind 'mask'; there are include and exclude"),
        (lambda: Line("l", (0.5, 0.5), (0.5, 0.5)), r"begins and ends at \(0\.5, 0\.5\)"),
        (lambda: Line("l", (0, 0), (2, 0)), r"line 'l' has the point \(2, 0\)"),
        (lambda: Line("", (0, 0), (1, 0)), "line '' has no name"),
        (lambda: Line("l", (0, 0), (1, 0), inertia=0), "inertia 0"),
        (lambda: ZoneWatch([Zone("x", LEFT_HALF)], [Line("x", (0, 0), (1, 0))]), "2 zones and lines are called 'x'"),
    ],
)
def test_what_else_is_refused(make, match):
    with pytest.raises(ZoneError, match=match):
        make()


def test_lists_as_json_brings_them_make_the_same_zone():
    assert Zone("z", [[0, 0], [0.5, 0], [0.5, 1], [0, 1]], objects=["cat"]) == Zone("z", LEFT_HALF, objects=("cat",))


@pytest.mark.parametrize(
    ("point", "inside"),
    [((0.1, 0.5), True), ((0.5, 0.5), True), ((0.0, 0.0), True), ((0.51, 0.5), False), ((1.0, 1.0), False)],
)
def test_the_edge_belongs_to_the_zone(point, inside):
    assert Zone("z", LEFT_HALF).holds("cat", point) is inside


def test_a_zone_may_have_a_bay():
    bay = Zone("u", ((0, 0), (1, 0), (1, 1), (0.7, 1), (0.7, 0.3), (0.3, 0.3), (0.3, 1), (0, 1)))
    assert [bay.holds("cat", point) for point in ((0.1, 0.9), (0.5, 0.9), (0.9, 0.9))] == [True, False, True]


@pytest.mark.parametrize(
    ("xyxy", "point"),
    [
        ((10, 20, 30, 60), (0.2, 0.6)),
        ((10, 20, 30, 160), (0.2, 1.0)),  # cut off by the picture's lower edge
        ((-40, -20, -10, -1), (0.0, 0.0)),
    ],
)
def test_a_box_stands_at_its_bottom_centre(xyxy, point):
    assert bottom_centre(xyxy, (100, 100)) == point


@pytest.mark.parametrize(
    ("inertia", "xs", "frames_in"),
    [
        (1, (0.9, 0.4, 0.4, 0.9), [1, 2]),
        (3, (0.9, 0.4, 0.4, 0.9, 0.9), []),  # too short
        (3, (0.4, 0.4, 0.4, 0.4, 0.9, 0.9, 0.9, 0.9), [2, 3, 4, 5]),  # in and out after three frames each
        (2, (0.4, 0.9, 0.4, 0.9, 0.4, 0.9), []),  # at the edge it is never two frames inside
        (2, (0.4, 0.4, 0.9, 0.4, 0.9, 0.4), [1, 2, 3, 4, 5]),  # nor two frames outside
        (1, (0.5,), [0]),
        (1, (0.9, 0.9), []),
    ],
)
def test_in_and_out_of_a_zone(inertia, xs, frames_in):
    seen = play(ZoneWatch([Zone("z", LEFT_HALF, inertia=inertia)]), walk(*xs))
    assert [n for n, presence in enumerate(seen) if presence.zones == ("z",)] == frames_in
    assert seen[-1].entered_zones == (("z",) if frames_in else ())


def test_zones_are_kept_in_the_order_they_were_entered():
    right = Zone("right", ((0.5, 0), (1, 0), (1, 1), (0.5, 1)), inertia=1)
    seen = play(ZoneWatch([Zone("left", LEFT_HALF, inertia=1), right]), walk(0.9, 0.5, 0.1))
    assert [presence.zones for presence in seen] == [("right",), ("left", "right"), ("left",)]
    assert seen[-1].entered_zones == ("right", "left")


def test_a_zone_counts_its_objects_alone():
    watch = ZoneWatch([Zone("z", LEFT_HALF, objects=("cat",), inertia=1)])
    assert watch.update("a:1", "dog", (0.1, 0.1), 0.0).zones == ()
    assert watch.update("a:2", "cat", (0.1, 0.1), 0.0).zones == ("z",)


def test_an_excluded_place_is_entered_by_nobody():
    assert play(ZoneWatch([Zone("z", LEFT_HALF, kind="exclude", inertia=1)]), walk(0.1))[0].zones == ()


@pytest.mark.parametrize("fps", [1.0, 5.0, 30.0])
@pytest.mark.parametrize("inertia", [1, 4])
def test_loitering_counts_seconds_from_the_first_frame_inside(fps, inertia):
    watch = ZoneWatch([Zone("z", LEFT_HALF, inertia=inertia, loitering_s=4.0)])
    film = walk(*[0.9] * 3, *[0.1] * int(6 * fps), *[0.9] * 8)
    seen = play(watch, film, fps)
    loitering = [n for n, presence in enumerate(seen) if presence.loitering]
    assert loitering[0] == 3 + 4 * fps
    assert loitering[-1] == 3 + 6 * fps + inertia - 2  # until it has left


def test_a_short_way_out_begins_anew_when_it_is_longer_than_the_inertia():
    film = walk(0.1, 0.1, 0.1, 0.9, 0.1, 0.1)
    patient, strict = (ZoneWatch([Zone("z", LEFT_HALF, inertia=n, loitering_s=4.0)]) for n in (2, 1))
    assert [bool(presence.loitering) for presence in play(patient, film)][-1] is True
    assert [bool(presence.loitering) for presence in play(strict, film)][-1] is False


GATE = ((0.5, 0.25), (0.5, 0.75))  # walked downwards: the right hand is the left of the picture


@pytest.mark.parametrize(
    ("inertia", "film", "crossings"),
    [
        (1, walk(0.3, 0.4, 0.6, 0.7), [(2, "out")]),
        (1, walk(0.7, 0.6, 0.4, 0.3), [(2, "in")]),
        (1, walk(0.3, 0.7, 0.3), [(1, "out"), (2, "in")]),
        (2, walk(0.3, 0.4, 0.6, 0.7), [(3, "out")]),
        (2, walk(0.4, 0.6, 0.4, 0.6, 0.4), []),  # who stands on it does not cross it
        (1, walk(0.3, 0.7, y=0.9), []),  # past its end
        (1, walk(0.3, 0.5, 0.7), [(2, "out")]),  # a stop on it
        (1, walk(0.3, 0.5, 0.3), []),  # touched only
        (1, walk(0.5, 0.7), []),  # began on it
        (1, walk(0.3, 0.7, y=0.25), [(1, "out")]),  # over its end point
        (1, [(0.3, 0.5), (0.3, 0.9), (0.7, 0.9), (0.7, 0.5)], []),  # round its end
        (1, [(0.3, 0.5), (0.3, 0.9), (0.7, 0.9), (0.7, 0.5), (0.3, 0.5)], [(4, "in")]),  # and back through it
        (1, walk(0.5, 0.5, 0.5), []),
        (1, walk(0.1, 0.9), [(1, "out")]),  # lost before it, found behind it
        (2, walk(0.3, 0.6, 0.5, 0.7), [(3, "out")]),  # back onto it, not over it
    ],
)
def test_over_a_line(inertia, film, crossings):
    seen = play(ZoneWatch(lines=[Line("gate", *GATE, inertia=inertia)]), film)
    assert [(n, c.direction) for n, presence in enumerate(seen) for c in presence.crossings] == crossings


def test_a_line_turned_round_swaps_in_and_out():
    there, back = (ZoneWatch(lines=[Line("l", *ends, inertia=1)]) for ends in (GATE, GATE[::-1]))
    film = walk(0.3, 0.7)
    assert play(there, film)[1].crossings == (Crossing("l", "out"),)
    assert play(back, film)[1].crossings == (Crossing("l", "in"),)


def test_a_line_counts_its_objects_alone():
    watch = ZoneWatch(lines=[Line("l", *GATE, objects=("cat",), inertia=1)])
    assert play(watch, walk(0.3, 0.7), label="dog")[1].crossings == ()
    assert play(watch, walk(0.7, 0.3), label="cat")[1].crossings == (Crossing("l", "in"),)


@pytest.mark.parametrize("cut", range(10))
def test_it_goes_on_elsewhere(cut):
    def new() -> ZoneWatch:
        return ZoneWatch([Zone("z", LEFT_HALF, inertia=2, loitering_s=2.0)], [Line("gate", *GATE, inertia=2)])

    film = walk(0.7, 0.6, 0.4, 0.3, 0.3, 0.3, 0.6, 0.4, 0.6, 0.7)
    one, two = new(), new()
    before = play(one, film[:cut])
    two.restore(json.loads(json.dumps(one.state())))
    assert before + play(two, film[cut:], begin=cut) == play(new(), film)


def test_places_that_are_no_more_are_dropped_and_new_ones_begin():
    old = ZoneWatch([Zone("old", LEFT_HALF, inertia=1)], [Line("gone", *GATE)])
    play(old, walk(0.1))
    new = ZoneWatch([Zone("new", LEFT_HALF, inertia=1)])
    new.restore(old.state())
    assert new.update("door:1", "person", (0.1, 0.5), 1.0).entered_zones == ("new",)


def test_who_is_forgotten_begins_anew():
    watch = ZoneWatch([Zone("z", LEFT_HALF, inertia=1)])
    play(watch, walk(0.1))
    watch.forget("door:1")
    watch.forget("nobody")
    assert watch.state() == {}
    assert play(watch, walk(0.9))[0].entered_zones == ()
