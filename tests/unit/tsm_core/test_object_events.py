"""Tracks in, events out."""

import json
from dataclasses import replace

import pytest

from tsm_core.object_events import ObjectReporter
from tsm_core.types import Crossing, Track

CAT = Track("door:1", "cat", 0.8, 0.9, (0.0, 0.0, 10.0, 20.0), 0.7, 1000.0, 0.0, 1000.0)
IN = Crossing("gate", "in")


def play(reporter: ObjectReporter, film, fps=1.0, begin=0):
    """Events of a film of (changes of the cat, crossings); None is a frame without it, "lost" where it is given up."""
    events = []
    for n, scene in enumerate(film, begin):
        time_s = 1000 + n / fps
        tracks, crossings, lost = [], {}, []
        if scene == "lost":
            lost = ["door:1", "door:9"]
        elif scene is not None:
            changes, crossed = scene
            tracks = [replace(CAT, time_s=time_s, **changes)]
            crossings = {"door:1": crossed, "door:9": [IN]}
        events += reporter.update(tracks, crossings, lost, n, n / fps, time_s, (100, 50))
    return events


def seen(*crossings, **changes):
    return changes, crossings


def told(events):
    return [(event.phase, event.frame_number) for event in events]


@pytest.mark.parametrize(
    ("film", "wanted"),
    [
        ([seen(), seen(), seen()], [("new", 0)]),  # at most every 10 s
        ([seen()] * 22, [("new", 0), ("update", 10), ("update", 20)]),
        ([None, seen(), None, None, "lost"], [("new", 1), ("end", 4)]),
        (["lost"], []),
        ([seen(), seen(zones=("yard",)), seen(zones=("yard",)), seen()], [("new", 0), ("update", 1), ("update", 3)]),
        ([seen(), seen(loitering=("yard",))], [("new", 0), ("update", 1)]),
        ([seen(), seen(label="dog"), seen(label="dog")], [("new", 0), ("update", 1)]),
        ([seen(), seen(IN), seen()], [("new", 0), ("update", 1)]),
        ([seen(IN), seen()], [("new", 0)]),
        ([seen(), *[seen(stationary=True)] * 30, seen()], [("new", 0), ("update", 1), ("update", 31)]),
        ([seen(), "lost", seen(), "lost"], [("new", 0), ("end", 1), ("new", 2), ("end", 3)]),
    ],
)
def test_little_films(film, wanted):
    assert told(play(ObjectReporter("door", "ssd", update_s=10.0), film)) == wanted


@pytest.mark.parametrize("fps", [1.0, 7.0, 30.0])
def test_updates_come_at_most_every_second_at_any_rate(fps):
    events = play(ObjectReporter("door", "ssd", update_s=1.0), [seen()] * int(5 * fps), fps)
    assert len(events) == 5
    assert [event.phase for event in events] == ["new", *["update"] * 4]


def test_before_after_and_times():
    events = play(ObjectReporter("door", "ssd", update_s=2.0), [seen(), seen(), seen(IN, score=0.5), None, "lost"])
    new, update, end = events
    assert (new.before, new.after) == (None, CAT)
    assert (update.before, update.after.score, update.crossings) == (CAT, 0.5, (IN,))
    assert (end.before, end.after, end.crossings) == (update.after, update.after, ())
    assert (end.frame_number, end.pts_s, end.frame_time_s, end.end_time_s) == (4, 4.0, 1004.0, 1002.0)
    assert {(event.stream_id, event.model, event.source_size) for event in events} == {("door", "ssd", (100, 50))}


def test_a_clock_that_is_set_back_silences_nobody_and_ends_nothing_before_its_start():
    reporter = ObjectReporter("door", "ssd")
    play(reporter, [seen()], begin=0)
    (update,) = reporter.update([replace(CAT, time_s=400.0)], {}, [], 1, 1.0, 400.0, (100, 50))
    assert update.phase == "update"
    (end,) = reporter.update([], {}, ["door:1"], 2, 2.0, 401.0, (100, 50))
    assert end.end_time_s == CAT.start_time_s


def test_close_ends_what_is_open_once_and_reset_tells_nobody():
    reporter = ObjectReporter("door", "ssd")
    play(reporter, [seen(), None])
    (end,) = reporter.close()
    assert (end.phase, end.frame_number, end.end_time_s) == ("end", 1, 1000.0)
    assert reporter.close() == []
    play(reporter, [seen()])
    reporter.reset()
    assert reporter.close() == []


@pytest.mark.parametrize("cut", range(7))
def test_it_goes_on_elsewhere(cut):
    film = [seen(), seen(zones=("yard",)), seen(IN, zones=("yard",)), seen(), None, "lost"]
    one, two = ObjectReporter("door", "ssd"), ObjectReporter("door", "ssd")
    before = play(one, film[:cut], fps=3.0)
    two.restore(json.loads(json.dumps(one.state())))
    assert before + play(two, film[cut:], fps=3.0, begin=cut) == play(ObjectReporter("door", "ssd"), film, fps=3.0)
