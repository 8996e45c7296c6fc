"""Films are functions of (seed, frame number), and their truth is true."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pipelines.scenes import LABELS, RADIUS_PX, ClipMaker, Look, Pose, Scene, Script

FRAMES = 900  # a minute


def test_same_seed_same_pictures_in_any_order():
    first, second = Scene(5, size_px=96), Scene(5, size_px=96)
    in_order = [first.frame(number) for number in range(40)]
    for number in (39, 3, 17, 0, 3):
        assert np.array_equal(second.frame(number), in_order[number])
    assert second.frame(5000).shape == (96, 96, 3)
    assert second.frame(5000).dtype == np.uint8
    assert np.array_equal(second.frame(5000), first.frame(5000))


def test_other_seed_other_film():
    assert not np.array_equal(Scene(5, size_px=64).frame(0), Scene(6, size_px=64).frame(0))
    assert Scene(5, size_px=64).script(FRAMES) != Scene(6, size_px=64).script(FRAMES)


def test_frame_number_below_zero_is_refused():
    with pytest.raises(IndexError, match="-1"):
        Scene(0, size_px=64).frame(-1)


@pytest.mark.parametrize("fps", [15.0, 25.0])
def test_script_covers_time_without_gaps(fps):
    scene = Scene(7, size_px=32, fps=fps)
    script = scene.script(FRAMES)
    assert script[0]["start_frame"] == 0
    assert script[-1]["end_frame"] == FRAMES
    for before, after in pairwise(script):
        assert before["end_frame"] == after["start_frame"]
        assert before["label"] != after["label"]
        assert 2 * fps <= before["end_frame"] - before["start_frame"] <= 5 * fps
    for interval in script:
        assert scene.label_at(interval["start_frame"]) == interval["label"]
        assert scene.label_at(interval["end_frame"] - 1) == interval["label"]


def test_a_longer_script_begins_like_a_shorter_one():
    assert Scene(7, size_px=32).script(3000)[:8] == Scene(7, size_px=32).script(FRAMES)[:8]


def test_every_label_comes_up():
    assert {interval["label"] for seed in range(4) for interval in Script(seed).intervals(FRAMES)} == set(LABELS)


def _turned(before: Pose, after: Pose) -> np.ndarray:
    """How far each of the four places went, the short way round, in turns."""
    return (np.array(after) - np.array(before) + 0.5) % 1.0 - 0.5


def test_poses_move_as_the_labels_say_and_never_jump():
    script = Script(11)
    limits = {0: (25 / 64 / 15, 75 / 64 / 15), 1: (25 / 64 / 15, 75 / 64 / 15), 2: (100 / 360 / 15, 300 / 360 / 15)}
    limits[3] = (0.7 / np.log(3) / 15, 1.4 / np.log(3) / 15)
    axis_of = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1), "clockwise": (2, 1)}
    axis_of |= {"counter-clockwise": (2, -1), "grow": (3, 1), "shrink": (3, -1)}
    for number in range(1, 1500):
        steps = _turned(script.pose_at(number - 1), script.pose_at(number))
        if script.label_at(number) == "still":
            assert np.abs(steps).max() < 1e-9
            continue
        axis, sign = axis_of[script.label_at(number)]
        low, high = limits[axis]
        assert low - 1e-9 <= sign * steps[axis] <= high + 1e-9
        assert np.abs(np.delete(steps, axis)).max() < 1e-9


def test_a_single_frame_carries_no_class():
    """Whatever the label, every part of the pose is uniform: the largest gap to the uniform distribution is small."""
    poses: dict[str, list[Pose]] = {label: [] for label in LABELS}
    for seed in range(2000):
        script = Script(seed)
        number = 30 + seed % 90
        poses[script.label_at(number)].append(script.pose_at(number))
    for label, some in poses.items():
        for places in np.sort(np.array(some), axis=0).T:
            gap = np.abs(places - (np.arange(len(places)) + 0.5) / len(places)).max()
            assert gap < 1.95 / np.sqrt(len(places)), (label, gap)  # Kolmogorov-Smirnov, p = 0.001


def test_sizes_close_the_circle():
    look = Look(3, 128)
    before, after = look.render(Pose(0.5, 0.5, 0.2, 1 - 1e-6)), look.render(Pose(0.5, 0.5, 0.2, 0.0))
    assert np.abs(before.astype(int) - after.astype(int)).max() <= 2
    assert look.radius_px(0.0) == pytest.approx(RADIUS_PX[0] * 2)
    assert look.radius_px(1.0) == pytest.approx(RADIUS_PX[1] * 2)


def test_leaving_on_one_side_is_coming_in_on_the_other():
    look = Look(3, 128)
    assert np.abs(look.render(Pose(0.0, 0.3, 0, 0)).astype(int) - look.render(Pose(1 - 1e-9, 0.3, 0, 0))).max() <= 2
    assert len(look.boxes(Pose(0.5, 0.5, 0, 0))) == 1
    assert len(look.boxes(Pose(0.01, 0.5, 0, 0))) == 2
    assert len(look.boxes(Pose(0.01, 0.99, 0, 0))) == 4


@pytest.mark.parametrize("seed", range(5))
def test_boxes_hold_the_object(seed):
    """What differs from the empty background lies in the boxes, but for the soft halo."""
    scene = Scene(seed, size_px=128)
    empty = np.asarray(scene.look.background).astype(int)
    for number in (0, 100, 200, 300):
        pose = scene.timeline.pose_at(number)
        if pose.size > 0.65:
            continue  # two copies at once
        objects = np.abs(scene.frame(number) - empty).max(axis=2) > 60
        inside = np.zeros_like(objects)
        boxes = scene.boxes_at(number)
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= 128
            assert 0 <= y0 < y1 <= 128
            inside[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
        assert (objects & inside).sum() >= 0.97 * objects.sum()
        assert objects[inside].mean() > 0.4
        assert scene.box_at(number) == boxes[0]


def test_films_look_alike_at_every_size():
    large, small = Scene(9, size_px=256).frame(50), Scene(9, size_px=128).frame(50)
    shrunk = large.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 6


def test_clips_carry_their_truth():
    batch = ClipMaker(0, size_px=32, looks=4, renew=1).batch(clips=24, frames=8, skip_share=0.0)
    assert batch.images.shape == (24, 8, 32, 32, 3)
    assert batch.labels.shape == batch.age.shape == (24, 8)
    changed = batch.labels[:, 1:] != batch.labels[:, :-1]
    assert 0.3 < changed.any(axis=1).mean() < 0.9
    assert (batch.age[:, 1:][changed] == 0).all()
    assert (batch.age <= np.arange(8)).all()
    still = batch.labels == LABELS.index("still")
    assert (np.abs(batch.velocity).sum(axis=2) > 0).tolist() == (~still).tolist()
    again = ClipMaker(0, size_px=32, looks=4, renew=1).batch(clips=24, frames=8, skip_share=0.0)
    assert np.array_equal(batch.images, again.images)
