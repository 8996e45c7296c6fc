import json
from dataclasses import replace

import pytest

from tsm_core.events import ActionDetector
from tsm_core.recipes import MOTION9
from tsm_core.types import Scores

LABELS = ("wave", "jump", "still")
RECIPE = replace(
    MOTION9, labels=LABELS, background=("still",), threshold=0.6, off_threshold=0.4, min_action_s=1.0, window_s=1.0
)


def scores_of(wave, jump):
    return Scores(LABELS, (wave, jump, 1 - wave - jump), 7, 7)


def play(detector, film, fps=1.0, begin=0):
    """Events of a film of (wave, jump) scores."""
    return [
        event
        for n, pair in enumerate(film, begin)
        for event in detector.update(scores_of(*pair), n, pts_s=100 + n / fps, time_s=n / fps)
    ]


def spans(events):
    """(label, start, end) of every action; end None while it is open."""
    found = {}
    for event in events:
        found[event.action_id] = (event.label, event.start_time_s, event.end_time_s)
    return list(found.values())


def waves(*scores):
    return [(score, 0.0) for score in scores]


@pytest.mark.parametrize(
    ("film", "wanted"),
    [
        (waves(0.1, 0.9, 0.9, 0.1), [("wave", 1, 3)]),  # one bump, one event
        (waves(0.9, 0.1, 0.9, 0.1), []),  # too short to count
        (waves(0.1, 0.9, 0.9, 0.5, 0.5, 0.9, 0.1), [("wave", 1, 6)]),  # between the thresholds it goes on
        (waves(0.1, 0.5, 0.5, 0.5), []),  # never above the threshold
        (waves(0.9, 0.9, 0.1, 0.9, 0.9, 0.1), [("wave", 0, 2), ("wave", 3, 5)]),  # two bumps, two events
        (waves(0.9, 0.9, 0.9), [("wave", 0, None)]),  # still open
        (waves(0.0, 0.0, 0.0, 0.0), []),  # background is no action
        ([(0.9, 0), (0.9, 0), (0, 0.9), (0, 0.9), (0, 0.1)], [("wave", 0, 2), ("jump", 2, 4)]),  # one after the other
        ([(0.9, 0), (0.9, 0), (0.45, 0.55), (0.9, 0), (0.1, 0)], [("wave", 0, 4)]),  # another on top, too weak
        ([(0.9, 0), (0, 0.9), (0.9, 0), (0, 0.9)], []),  # flicker is nothing
        ([(0.9, 0), (0, 0.9), (0, 0.9), (0, 0.1)], [("jump", 1, 3)]),  # a run counts for its own label alone
    ],
)
def test_little_films(film, wanted):
    assert spans(play(ActionDetector("door", "m", RECIPE), film)) == wanted


def test_background_takes_over_where_it_began():
    recipe = replace(RECIPE, off_threshold=0.0)  # nothing but another label ends an action
    film = waves(0.9, 0.9, 0.3, 0.3, 0.3, 0.3)
    events = play(ActionDetector("door", "m", recipe), film)
    assert [(event.phase, event.frame_number) for event in events] == [("new", 1), ("update", 2), ("end", 3)]
    assert spans(events) == [("wave", 0, 2)]


def test_another_label_must_hold_before_it_takes_over():
    recipe = replace(RECIPE, off_threshold=0.0)
    film = [(0.9, 0), (0.9, 0), (0.1, 0.9), (0.9, 0), (0.1, 0.9), (0.1, 0.9), (0.1, 0.9)]
    events = play(ActionDetector("door", "m", recipe), film)
    assert spans(events) == [("wave", 0, 4), ("jump", 4, None)]
    assert [(event.phase, event.label) for event in events if event.frame_number == 5] == [
        ("end", "wave"),
        ("new", "jump"),
    ]


def test_phases_times_and_scores_of_one_action():
    film = waves(0.1, 0.7, 0.8, 0.9, 0.8, 0.2)
    events = play(ActionDetector("door", "motion", RECIPE, update_s=2.0), film)
    assert [(e.phase, e.frame_number, e.score, e.top_score) for e in events] == [
        ("new", 2, 0.8, 0.8),
        ("update", 4, 0.8, 0.9),
        ("end", 5, 0.2, 0.9),
    ]
    assert len({e.action_id for e in events}) == 1
    assert {(e.stream_id, e.model, e.start_time_s, e.start_pts_s) for e in events} == {("door", "motion", 1, 101)}
    assert [(e.pts_s, e.frame_time_s, e.end_time_s) for e in events] == [(102, 2, None), (104, 4, None), (105, 5, 5)]
    assert events[0].top_k[0] == ("wave", 0.8)
    assert len(events[0].top_k) == 3


def test_updates_come_at_most_every_second_at_any_rate():
    events = play(ActionDetector("door", "m", RECIPE), waves(*[0.9] * 100), fps=20.0)
    assert [(e.phase, e.frame_time_s) for e in events] == [
        ("new", 1.0), ("update", 2.0), ("update", 3.0), ("update", 4.0),
    ]  # fmt: skip


def test_thresholds_of_a_stream_go_before_the_models():
    film = [(0.5, 0.1), (0.5, 0.1), (0.3, 0.35), (0.1, 0.4)]
    assert spans(play(ActionDetector("door", "m", RECIPE), film)) == []
    eager = ActionDetector("door", "m", RECIPE, threshold=0.45, off_threshold=0.2)
    assert spans(play(eager, film)) == [("wave", 0, 3)]
    lower = ActionDetector("door", "m", RECIPE, threshold=0.3)  # the model's off threshold comes down with it
    assert lower.off_threshold == 0.3


def test_close_ends_what_is_open_once():
    detector = ActionDetector("door", "m", RECIPE)
    opened = play(detector, waves(0.9, 0.9, 0.9))
    (end,) = detector.close(7.5)
    assert (end.phase, end.end_time_s, end.action_id, end.frame_number) == ("end", 7.5, opened[0].action_id, 2)
    assert detector.close() == []
    play(detector, waves(0.9, 0.9))
    assert detector.close()[0].end_time_s == 1  # the last frame it saw
    play(detector, waves(0.9))
    assert detector.close() == []
    assert play(detector, waves(0.9), begin=50) == []  # the run before the close does not count


@pytest.mark.parametrize("cut", range(8))
def test_an_action_goes_on_elsewhere_under_its_id(cut):
    film = waves(0.1, 0.9, 0.9, 0.5, 0.9, 0.1, 0.9, 0.9)
    wanted = play(ActionDetector("door", "m", RECIPE), film)
    one, two = ActionDetector("door", "m", RECIPE), ActionDetector("door", "m", RECIPE)
    before = play(one, film[:cut])
    two.restore(json.loads(json.dumps(one.state())))
    events = before + play(two, film[cut:], begin=cut)
    ids = {event.action_id: n for n, event in enumerate(events)}
    again = {event.action_id: n for n, event in enumerate(wanted)}
    assert [replace(e, action_id=str(ids[e.action_id])) for e in events] == [
        replace(e, action_id=str(again[e.action_id])) for e in wanted
    ]
