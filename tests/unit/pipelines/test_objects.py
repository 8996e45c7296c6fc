"""Boxes in, tracks and events out: whole little films."""

import json
import time

import pytest

from pipelines.objects import ObjectAnalytics, ObjectFilter, ObjectRules
from pipelines.zones import Line, Zone
from tests.unit.pipelines.object_kit import SIZE, found, told, values, watch
from tsm_core.types import Crossing

RIGHT = ((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0))
GATE = Line("gate", (0.5, 1.0), (0.5, 0.0))  # walked upwards: the right hand is the right of the picture


def analytics_of(**rules) -> ObjectAnalytics:
    return ObjectAnalytics("door", "ssd", ObjectRules(**rules))


def test_one_object_comes_walks_and_goes():
    film = [[]] * 3 + [[found(100 + 10 * n)] for n in range(30)] + [[]] * 30
    shown, events = watch(analytics_of(), film)
    assert told(events) == [
        ("new", "door:1", 5),  # three boxes
        ("update", "door:1", 15),
        ("update", "door:1", 25),
        ("end", "door:1", 53),
    ]
    assert [len(tracks) for tracks in shown] == [0] * 5 + [1] * 28 + [0] * 30
    new, update, _, end = events
    assert new.before is None
    assert update.before == new.after
    assert end.after == shown[32][0]
    assert (end.frame_time_s, end.end_time_s, end.after.start_time_s) == (1005.3, 1003.2, 1000.3)
    assert {(event.stream_id, event.model, event.source_size) for event in events} == {("door", "ssd", SIZE)}


@pytest.mark.parametrize("fps", [3.0, 15.0, 40.0])
@pytest.mark.parametrize(("to_right", "direction"), [(True, "in"), (False, "out")])
def test_over_a_line_both_ways_at_any_frame_rate(fps, to_right, direction):
    way = [300 + 100 * n / fps for n in range(int(4 * fps))]
    film = [[found(x)] for x in (way if to_right else reversed(way))]
    _, events = watch(analytics_of(lines=(GATE,)), film, fps)
    crossed = [event for event in events if event.crossings]
    assert [event.crossings for event in crossed] == [(Crossing("gate", direction),)]
    assert crossed[0].phase == "update"
    assert abs(crossed[0].after.xyxy[0] + 30 - 500) <= 100 * 3 / fps


def test_a_line_crossed_before_it_is_sure_is_told_with_new():
    film = [[found(460 + 20 * n, score=0.55)] for n in range(6)] + [[found(560, score=0.95)]] * 6
    _, events = watch(analytics_of(lines=(GATE,)), film)
    assert (events[0].phase, events[0].crossings) == ("new", (Crossing("gate", "in"),))
    assert [event for event in events[1:] if event.crossings] == []


def test_into_a_zone_loitering_and_out():
    rules = {"zones": (Zone("yard", RIGHT, loitering_s=2.0),), "update_s": 1000.0}
    way = [*[400] * 5, 450, 475, 500, 525, *[540] * 30, 515, 490, 465, 440, 440]
    film = [[found(x)] for x in way]
    shown, events = watch(analytics_of(**rules), film)
    facts = [(event.phase, event.frame_number, event.after.zones, event.after.loitering) for event in events]
    assert facts == [
        ("new", 2, (), ()),
        ("update", 9, ("yard",), ()),  # in it since frame 7, three frames make it sure
        ("update", 27, ("yard",), ("yard",)),
        ("update", 42, (), ()),
    ]
    assert shown[-1][0].entered_zones == ("yard",)


def test_required_zones():
    rules = {"zones": (Zone("yard", RIGHT),), "required_zones": ("yard",)}
    film = [[found(300)]] * 10 + [[found(300 + 25 * n)] for n in range(12)] + [[found(575 - 25 * n)] for n in range(8)]
    shown, events = watch(analytics_of(**rules), film)
    assert told(events)[0] == ("new", "door:1", 20)
    assert shown[19] == []
    assert len(shown[-1]) == 1  # outside again


def test_who_is_not_told_is_not_drawn():
    film = [[found(300, label="cat"), found(700, score=0.55)]] * 10
    assert watch(analytics_of(labels=("person",)), film) == ([[]] * 10, [])


def test_what_was_masked_and_what_is_too_small():
    rules = {"zones": (Zone("mask", RIGHT, kind="exclude"),), "filters": {"cat": ObjectFilter(min_area=0.1)}}
    shown, _ = watch(analytics_of(**rules), [[found(300), found(700), found(100, label="cat")]] * 4)
    assert [track.label for track in shown[-1]] == ["person"]
    assert shown[-1][0].xyxy == found(300).xyxy


def test_who_stands_still_is_told_once():
    _, events = watch(analytics_of(stationary_s=2.0), [[found(300)]] * 100)
    assert told(events) == [("new", "door:1", 2), ("update", "door:1", 12), ("update", "door:1", 20)]
    assert events[-1].after.stationary


def test_two_that_cross_are_told_as_two():
    film = [[found(100 + 20 * n), found(880 - 20 * n, 215)] for n in range(40)]
    _, events = watch(analytics_of(lines=(GATE,)), film)
    assert {event.track_id for event in events} == {"door:1", "door:2"}
    assert {event.track_id: event.crossings[0].direction for event in events if event.crossings} == {
        "door:1": "in",
        "door:2": "out",
    }


def test_closed_it_ends_all_and_ids_go_on():
    analytics = analytics_of()
    watch(analytics, [[found(300), found(700)]] * 5)
    ends = analytics.close()
    assert [(event.phase, event.track_id, event.end_time_s) for event in ends] == [
        ("end", "door:1", 1000.4),
        ("end", "door:2", 1000.4),
    ]
    assert analytics.close() == []
    _, events = watch(analytics, [[found(300)]] * 5, begin=5)
    assert told(events) == [("new", "door:3", 7)]
    analytics.reset()
    assert watch(analytics, [[]] * 50, begin=10)[1] == []


FILM = (
    [[found(440 + 12 * n), found(900 - 10 * n, 400, label="dog" if n % 3 else "cat")] for n in range(25)]
    + [[found(740)]] * 12
    + [[]] * 25
)
RULES = {"zones": (Zone("yard", RIGHT, loitering_s=1.0),), "lines": (GATE,), "stationary_s": 1.0}


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 6, 8, 20, 30, 45, 60])
def test_saved_and_restored_in_mid_film_changes_nothing(cut):
    one, two, whole = (analytics_of(**RULES) for _ in range(3))
    before = watch(one, FILM[:cut])
    two.restore(json.loads(json.dumps(one.state())))
    after = watch(two, FILM[cut:], begin=cut)
    shown, events = watch(whole, FILM)
    assert before[0] + after[0] == shown
    assert values(before[1] + after[1]) == values(events)
    assert two.state() == whole.state()


def test_restored_after_a_failover_of_five_seconds_ids_are_kept():
    one, two = analytics_of(), analytics_of()
    watch(one, [[found(300), found(700)]] * 20)
    two.restore(one.state())
    shown, events = watch(two, [[found(305), found(700)]] * 5, begin=70)
    assert [track.track_id for track in shown[0]] == ["door:1", "door:2"]
    assert "new" not in [event.phase for event in events]


def test_restored_under_other_rules():
    one = analytics_of(**RULES)
    watch(one, FILM[:20])
    two = analytics_of(labels=("person",), zones=(Zone("all", ((0, 0), (1, 0), (1, 1), (0, 1)), inertia=1),))
    two.restore(one.state())
    shown, _ = watch(two, FILM[20:21], begin=20)
    assert [(track.track_id, track.entered_zones) for track in shown[0]] == [("door:1", ("all",))]


def test_three_hundred_objects_in_zones_and_over_lines():
    crowd = [[found(20 + 66 * (n % 15) + shift, 30 + 24 * (n // 15), width=30, height=20) for n in range(300)]
             for shift in range(5)]  # fmt: skip
    began_s = time.thread_time()
    shown, events = watch(analytics_of(**RULES), crowd)
    assert time.thread_time() - began_s < 60
    assert len(shown[-1]) == 300
    assert len([event for event in events if event.phase == "new"]) == 300
