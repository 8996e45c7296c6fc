"""Films of scenes with boxes: the same for ever, true in every pixel, and none that the demo shows."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from pipelines.box_sets import open_boxes
from pipelines.datasets import Part
from pipelines.scene_boxes import (
    DRAWN_PX,
    FILMS,
    FIRST_SEED,
    LEAST_VISIBLE,
    SENT_PX,
    SceneBoxes,
    objects_of,
)
from pipelines.scenes import KINDS, LABELS, Scene
from tsm_core.detector_recipes import DETECTOR_RECIPES


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_film_follows_from_its_number(part: Part):
    here, there = SceneBoxes(part), pickle.loads(pickle.dumps(SceneBoxes(part)))
    first, again = here.video(5), there.video(5)
    assert (first.name, len(first)) == (again.name, len(again))
    assert torch.equal(first.read([30, 3, 4]), again.frames[[30, 3, 4]])
    for one, other in zip(first.objects, again.objects, strict=True):
        assert np.array_equal(one.boxes, other.boxes)
        assert np.array_equal(one.tracks, other.tracks)
        assert one.condition == other.condition
        assert one.condition in LABELS
    assert here.video(6).name != first.name
    with pytest.raises(IndexError):
        here.video(len(here))


def test_no_film_is_both_learnt_and_judged_or_shown():
    seeds = {part: range(first, first + FILMS[part]) for part, first in FIRST_SEED.items()}
    assert not set(seeds["train"]) & set(seeds["val"])
    assert min(map(min, seeds.values())) > 1 << 32  # seeds of cameras are small


@pytest.mark.parametrize(("part", "side"), [("train", DRAWN_PX), ("val", SENT_PX)])
def test_boxes_bound_what_differs_from_the_empty_scene(part: Part, side: int):
    for index in range(3 if part == "train" else 1):
        video = SceneBoxes(part).video(index)
        scene = Scene(FIRST_SEED[part] + index, DRAWN_PX if part == "train" else 320)
        empty = scene.look.background.resize((side, side), Image.Resampling.BILINEAR)
        frames = video.read(range(0, len(video), 6))
        assert frames.shape[1:] == (3, side, side)
        seen = 0
        for frame, objects in zip(frames, video.objects[::6], strict=True):
            assert set(objects.labels.tolist()) == {0}
            assert np.array_equal(objects.ignore, objects.visible < LEAST_VISIBLE)
            differs = np.abs(frame.permute(1, 2, 0).numpy().astype(int) - np.asarray(empty)).max(axis=2) > 80
            differs[-round(side / 20) :] = False  # the camera writes its number there
            inside = np.zeros_like(differs)
            for x1, y1, x2, y2 in objects.boxes:
                assert min(x1, y1) >= 0
                assert max(x2, y2) <= side
                inside[max(0, int(y1) - 1) : int(y2) + 2, max(0, int(x1) - 1) : int(x2) + 2] = True
            assert (differs & inside).sum() >= 0.99 * differs.sum()
            seen += int(differs.sum())
        assert seen > 0.01 * differs.size * len(frames)


@pytest.mark.parametrize("seed", [1, 3])
def test_a_track_is_what_the_eye_follows(seed: int):
    objects = objects_of(Scene(seed, 64), 240)
    lost, met = 0, 0
    for before, after in pairwise(objects):
        for this in (before, after):
            assert len(set(this.tracks.tolist())) == len(this)
        alike = box_iou(torch.from_numpy(before.boxes), torch.from_numpy(after.boxes)).numpy()
        same = before.tracks[:, None] == after.tracks[None]
        big = (before.visible > 0.5)[:, None] & (after.visible > 0.5)[None]
        assert (alike[same & big] > 0.35).all()  # the fastest goes a tenth of the picture in a frame
        met += int((same & big).sum())
        lost += int(((alike > 0.8) & big & ~same).sum())
    assert met > 100
    assert not lost
    assert len({track for each in objects for track in each.tracks.tolist()}) > 2


def test_what_comes_in_is_not_what_went_out():
    scene = Scene(3, 64)
    number = next(n for n in range(2000) if scene.label_at(n) == "right" and scene.label_at(n + 29) == "right")
    tracks = [set(each.tracks[each.visible > 0.9].tolist()) for each in objects_of(scene, number + 30)[number:]]
    places = [scene.timeline.pose_at(number + n).x for n in range(30)]
    assert max(np.diff(places)) < 0.5
    rounds = sum(after < before for before, after in pairwise(places))
    assert rounds >= 1
    assert len(set.union(*tracks)) >= rounds


def test_the_demos_detector_is_of_this_data_set():
    recipe = DETECTOR_RECIPES["scenes_detector"]
    assert recipe.labels == KINDS
    assert recipe.input_size == (SENT_PX, SENT_PX)
    videos = open_boxes(recipe.dataset, recipe.labels, None, "val")
    assert videos.identity == SceneBoxes("val").identity
    assert videos.video(0).objects[0].labels.tolist() == SceneBoxes("val").video(0).objects[0].labels.tolist()
