"""Objects are followed over frames, in seconds, at any frame rate, over gaps and jumps of the clock."""

import builtins
import itertools
import json
import random

import pytest

from pipelines.object_rules import ObjectFilter, ObjectRules
from pipelines.tracker import ObjectTracker, TrackerMissing
from tests.unit.pipelines.object_kit import follow, found
from tsm_core.types import Detection


def new_tracker(**rules) -> ObjectTracker:
    return ObjectTracker("door", ObjectRules(**rules))


def ids(seen):
    return [[track.track_id for track in tracks] for tracks in seen]


@pytest.mark.parametrize("fps", [3.0, 5.0, 15.0, 30.0, 60.0])
def test_one_object_has_one_id_at_any_frame_rate(fps):
    film = [[found(100 + 60 * n / fps)] for n in range(int(5 * fps))]  # one width per second
    seen = follow(new_tracker(), film, fps)
    assert ids(seen) == [[], *[["door:1"]] * (len(film) - 1)]
    assert (seen[-1][0].start_time_s, seen[-1][0].start_pts_s) == (1000, 0)  # of the first frame, that had no id yet
    assert seen[-1][0].time_s == 1000 + (len(film) - 1) / fps
    assert seen[-1][0].xyxy == film[-1][0].xyxy


def test_frames_that_come_unevenly_are_one_object():
    times = [0.0]
    for n in range(60):
        times.append(times[-1] + (0.03, 0.2, 0.5, 0.0004)[n % 4])
    tracker = new_tracker()
    seen = [tracker.update([found(100 + 80 * time_s)], time_s, time_s) for time_s in times]
    assert {track.track_id for tracks in seen for track in tracks} == {"door:1"}
    assert all(len(tracks) == 1 for tracks in seen[1:])


@pytest.mark.parametrize("jump_s", [0.0, -0.3, -3600.0])
@pytest.mark.parametrize("at", [1, 2, 10])
def test_a_clock_that_stands_or_goes_back_loses_nobody(jump_s, at):
    tracker = new_tracker()
    seen, last_s, clocks = [], 0.0, []
    for n in range(20):
        last_s = last_s + jump_s if n == at else last_s + 0.1
        seen.append(tracker.update([found(100 + 5 * n), found(700 - 5 * n)], n / 10, last_s))
        clocks.append(tracker.clock_s)
    assert ids(seen)[1:] == [["door:1", "door:2"]] * 19
    assert clocks == pytest.approx([clocks[0] + n / 10 for n in range(20)], abs=0.1)
    assert all(later > earlier for earlier, later in itertools.pairwise(clocks))


@pytest.mark.parametrize(
    ("unseen_s", "lost"),
    [(0.5, False), (1.9, False), (2.3, True)],
)
@pytest.mark.parametrize("fps", [5.0, 20.0])
def test_lost_and_found(unseen_s, lost, fps):
    tracker = new_tracker(max_disappeared_s=2.0)
    there, away = [[found(300)]] * int(2 * fps), [[]] * int(unseen_s * fps)
    follow(tracker, there, fps)
    gone = []
    for n, boxes in enumerate(away, len(there)):
        assert tracker.update(boxes, n / fps, 1000 + n / fps) == []
        gone += tracker.lost()
    seen = follow(tracker, there, fps, begin=len(there) + len(away))
    assert gone == (["door:1"] if lost else [])
    assert seen[-1][0].track_id == ("door:2" if lost else "door:1")


@pytest.mark.parametrize("gap_s", [1.0, 5.0])
def test_a_gap_between_frames_is_no_disappearance(gap_s):
    tracker = new_tracker(max_disappeared_s=2.0)
    follow(tracker, [[found(300)]] * 20)
    (track,) = tracker.update([found(302)], 2 + gap_s, 1002 + gap_s)
    assert track.track_id == "door:1"
    assert tracker.lost() == []
    for n in range(1, 40):  # but then it counts
        tracker.update([], 2 + gap_s + n / 10, 1002 + gap_s + n / 10)
        if tracker.lost():
            break
    assert tracker.lost() == ["door:1"]
    assert n == pytest.approx(21, abs=1)


@pytest.mark.parametrize("fps", [10.0, 15.0, 30.0])
@pytest.mark.parametrize("scale", [0.2, 1.0, 8.0])
def test_one_box_astray_throws_nobody_off(fps, scale):
    tracker = new_tracker()
    film = [[found(300 * scale, 200 * scale, width=60 * scale, height=100 * scale)]] * 40
    film[20] = [found(300 * scale, 200 * scale, width=60 * scale, height=45 * scale)]
    assert ids(follow(tracker, film, fps))[1:] == [["door:1"]] * 39


def test_two_that_cross_keep_their_ids():
    left_to_right = [found(100 + 20 * n, 200, label="person") for n in range(40)]
    right_to_left = [found(880 - 20 * n, 215, label="person") for n in range(40)]
    seen = follow(new_tracker(), [list(pair) for pair in zip(left_to_right, right_to_left, strict=True)])
    first, last = ({track.track_id: track.xyxy[0] for track in tracks} for tracks in (seen[1], seen[-1]))
    assert first["door:1"] < first["door:2"]
    assert last["door:1"] > last["door:2"]
    assert len({track.track_id for tracks in seen for track in tracks}) == 2


@pytest.mark.parametrize(
    ("labels", "told", "label"),
    [
        (["car", "truck", "car", "car", "truck", "car"], (), "car"),
        (["car", "truck", "truck"], (), "truck"),
        (["dog", "person", "dog", "dog", "person", "person"], ("person",), "dog"),  # the label is honest
    ],
)
def test_a_label_that_flickers_is_voted(labels, told, label):
    tracker = new_tracker(labels=told)
    seen = follow(tracker, [[found(300, label=name)] for name in labels])
    assert ids(seen)[1:] == [["door:1"]] * (len(labels) - 1)
    assert seen[-2 if told else -1][0].label == label


def test_a_strong_label_has_more_votes():
    film = [[found(300, label="cat", score=0.95)], *[[found(300, label="dog", score=0.3)]] * 3]
    assert follow(new_tracker(), film)[-1][0].label == "cat"


def test_who_was_told_keeps_a_label_that_is_told():
    tracker = new_tracker(labels=("person",))
    seen = follow(tracker, [[found(300)]] * 5 + [[found(300, label="dog")]] * 20)
    assert tracker.is_sure("door:1")
    assert seen[-1][0].label == "person"


@pytest.mark.parametrize(
    ("scores", "sure"),
    [
        ((0.9, 0.9), False),  # two are no three
        ((0.9, 0.9, 0.9), True),
        ((0.55, 0.9, 0.65), True),  # the median
        ((0.55, 0.9, 0.55), False),
        ((0.9, 0.3, 0.9), True),  # a weak one goes on with it
        ((0.9, 0.9, 0.9, 0.3, 0.3, 0.3, 0.3), True),  # once sure, it stays so
        ((0.52,) * 8, False),
        ((0.52,) * 8 + (0.7,) * 4, False),
        ((0.52,) * 8 + (0.7,) * 5, True),  # the last ten alone count
    ],
)
def test_the_median_of_the_last_scores_must_reach_the_threshold(scores, sure):
    tracker = new_tracker()
    follow(tracker, [[found(300, score=score)] for score in scores])
    assert tracker.is_sure("door:1") is sure


def test_scores_of_a_track():
    seen = follow(new_tracker(), [[found(300, score=score)] for score in (0.6, 0.9, 0.7)])
    track = seen[-1][0]
    assert (track.score, track.top_score, track.detection_score) == (0.7, 0.9, 0.7)


def test_thresholds_of_a_label():
    tracker = new_tracker(filters={"cat": ObjectFilter(min_score=0.2, threshold=0.25)})
    follow(tracker, [[found(300, score=0.3, label="cat"), found(700, score=0.3, label="dog")]] * 5)
    assert tracker.is_sure("door:1")
    assert not tracker.is_sure("door:2")


@pytest.mark.parametrize("score", [0.1, 0.49])
def test_weak_boxes_begin_no_track(score):
    tracker = new_tracker()
    assert ids(follow(tracker, [[found(300, score=score)]] * 10)) == [[]] * 10


def test_weak_boxes_keep_a_track_for_a_bounded_time():
    tracker = new_tracker(max_weak_s=4.0, max_disappeared_s=1.0)
    seen = follow(tracker, [[found(300)]] * 10 + [[found(300, score=0.2)]] * 80)
    assert [len(tracks) for tracks in seen].count(1) == 9 + 40
    assert seen[-1] == []
    again = follow(new_tracker(max_weak_s=4.0), [[found(300)], *[[found(300, score=0.2)]] * 30] * 3)
    assert ids(again)[1:] == [["door:1"]] * 92  # a strong one in between is enough


def test_one_object_under_two_labels_is_one_track():
    film = [[found(300, score=0.9, label="car"), found(302, score=0.8, label="truck")]] * 5
    assert ids(follow(new_tracker(), film))[-1] == ["door:1"]


def test_standing_still_and_going_on():
    film = [[found(300 + 3 * (n % 2))] for n in range(50)] + [[found(300 + 10 * n)] for n in range(30)]
    film[45] = [found(300, 200, height=40)]  # one box astray
    tracker = new_tracker(stationary_s=3.0)
    stationary = [tracks[0].stationary for tracks in follow(tracker, film)[1:]]
    first, last = stationary.index(True), len(stationary) - 1 - stationary[::-1].index(True)
    assert first + 1 == 30
    assert 50 < last + 1 < 60
    assert all(stationary[first : last + 1])


def test_nothing_and_three_hundred():
    tracker = new_tracker()
    assert follow(tracker, [[]] * 5) == [[]] * 5
    crowd = [found(20 + 66 * (n % 15), 30 + 24 * (n // 15), width=30, height=20) for n in range(300)]
    seen = follow(tracker, [crowd] * 4, begin=5)
    assert [len(tracks) for tracks in seen] == [0, 300, 300, 300]
    assert len({track.track_id for track in seen[-1]}) == 300
    follow(tracker, [[]] * 40, begin=9)
    assert tracker.state()["followed"] == {}
    assert tracker.state()["tracklets"] == []


def test_noise_is_followed_by_nobody_and_remembered_by_nobody():
    draw = random.Random(3)
    tracker = new_tracker()
    film = [[found(draw.uniform(0, 1e5), draw.uniform(0, 1e5)) for _ in range(100)] for _ in range(30)]
    assert sum(len(tracks) for tracks in follow(tracker, film)) <= 3
    assert len(tracker.state()["tracklets"]) <= 103


def test_boxes_over_the_edge_and_tiny_ones():
    film = [[Detection("a", 0.9, (-50.0, -20.0, 10.0, 5.0)), Detection("b", 0.9, (500.0, 100.0, 500.001, 100.001))]]
    seen = follow(new_tracker(), film * 5)
    assert [track.label for track in seen[-1]] == ["a", "b"]


def walk_about(seed: int) -> list[list[Detection]]:
    """Objects that come, go, flicker and hide."""
    draw = random.Random(seed)
    film: list[list[Detection]] = []
    places = [(draw.uniform(0, 1000), draw.uniform(100, 500), draw.uniform(-9, 9)) for _ in range(5)]
    for n in range(40):
        film.append(
            [
                found(x + speed * n, y, draw.choice((0.2, 0.6, 0.9)), draw.choice(("cat", "cat", "dog")))
                for x, y, speed in places
                if draw.random() < 0.8
            ]
        )
    return film


@pytest.mark.parametrize("cut", [0, 1, 2, 7, 20, 33])
@pytest.mark.parametrize("seed", [1, 2])
def test_saved_and_restored_in_mid_film_changes_nothing(cut, seed):
    film = walk_about(seed)
    one, two, whole = new_tracker(), new_tracker(), new_tracker()
    before = follow(one, film[:cut])
    two.restore(json.loads(json.dumps(one.state())))
    assert before + follow(two, film[cut:], begin=cut) == follow(whole, film)
    assert two.state() == whole.state()


def test_restored_after_ids_that_nobody_saved_it_gives_none_of_them_again():
    one, two = new_tracker(), ObjectTracker("door", ObjectRules(), first_number=100)
    follow(one, [[found(300)]] * 5)
    saved = json.loads(json.dumps(one.state()))
    assert ids(follow(one, [[found(300), found(700)]] * 5, begin=5))[-1] == ["door:1", "door:2"]
    two.restore(saved)
    assert ids(follow(two, [[found(300), found(500)]] * 5, begin=10))[-1] == ["door:1", "door:101"]


@pytest.mark.parametrize("first_number", [0, 3, 100])
def test_ids_begin_above_the_first_number_and_go_on_where_they_were(first_number):
    one, two = (ObjectTracker("door", ObjectRules(), first_number) for _ in range(2))
    assert ids(follow(one, [[found(300)]] * 3))[-1] == [f"door:{first_number + 1}"]
    two.restore(one.state())
    assert two.state() == one.state()
    assert two.next_number == first_number + 1


def test_after_a_reset_ids_go_on():
    tracker = new_tracker()
    follow(tracker, [[found(300)]] * 3)
    tracker.reset()
    assert ids(follow(tracker, [[found(300)]] * 3, begin=3)) == [[], ["door:2"], ["door:2"]]
    assert not tracker.is_sure("door:1")


def test_without_bytetrack_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("trackers"):
            raise ModuleNotFoundError("No module named 'trackers'", name="trackers")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TrackerMissing, match="trackers is missing; run `make setup`") as caught:
        new_tracker()
    assert caught.value.reason == "tracker_missing"
