"""Films are functions of (seed, frame number), and their truth is true."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

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
    assert len(look.pieces(Pose(0.5, 0.5, 0, 0))) == 1
    assert len(look.pieces(Pose(0.01, 0.5, 0, 0))) == 2
    assert len(look.pieces(Pose(0.01, 0.99, 0, 0))) == 4


def _opacity(look: Look, pose: Pose) -> np.ndarray:
    """How much of each pixel the object covers: what remains of the difference between a white and a black ground."""
    drawn = []
    for level in (0, 255):
        look.background = Image.new("RGB", (look.size_px, look.size_px), (level, level, level))
        drawn.append(look.render(pose).astype(np.float32))
    return 1 - (drawn[1] - drawn[0]).mean(axis=2) / 255


@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_the_tight_bounds_of_what_is_drawn(seed):
    look, random = Look(seed, size_px=256), np.random.default_rng(seed)
    for size in random.uniform(0, 0.69, 12):  # one copy at a time
        pose = Pose(*random.random(3), size)
        solid = _opacity(look, pose) > 0.7  # the halo has 0.4 at most
        near = np.zeros_like(solid)
        pieces = look.pieces(pose)
        assert [piece.visible for piece in pieces] == sorted((piece.visible for piece in pieces), reverse=True)
        assert sum(piece.visible for piece in pieces) == pytest.approx(1, abs=1e-3)
        for (x0, y0, x1, y1), visible, _ in pieces:
            assert 0 <= x0 < x1 <= 256
            assert 0 <= y0 < y1 <= 256
            part = (slice(max(0, int(y0) - 2), int(y1) + 3), slice(max(0, int(x0) - 2), int(x1) + 3))
            near[part] = True
            if visible > 0.15:  # of a sliver the threshold takes more
                rows, columns = np.nonzero(solid[part])
                drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)
                drawn += [part[1].start, part[0].start] * 2
                assert np.abs(drawn - [x0, y0, x1, y1]).max() < 1.5, (pose, visible)
        assert not (solid & ~near).any()


def test_while_a_copy_replaces_another_both_are_told_with_their_opacity():
    look = Look(2, size_px=128)
    for size, outer, inner in ((0.71, 1, 0), (0.85, 1, 1), (0.99, 0, 1)):
        first, second = sorted(look.pieces(Pose(0.5, 0.5, 0, size)), key=lambda piece: piece.box[0])
        assert (first.copy, second.copy) == ((0, 0, 0), (0, 0, -1))
        assert first.visible == pytest.approx(outer, abs=0.02)
        assert second.visible == pytest.approx(inner, abs=0.02)
        assert first.box[2] - first.box[0] == pytest.approx(3 * (second.box[2] - second.box[0]), rel=0.01)


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
