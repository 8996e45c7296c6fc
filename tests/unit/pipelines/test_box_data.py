from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from pipelines.box_data import BadBoxes, BoxVideo, Mixed, Objects, Renamed, clean
from pipelines.box_sets import BOX_SETS
from tsm_core.detector_recipes import DETECTOR_RECIPES

NAN = float("nan")


class Drawn:
    """Two frames of noise with a box each."""

    def __init__(self, count: int, labels: tuple[str, ...] = ("disc", "square")) -> None:
        self.labels, self.identity, self._count = labels, f"drawn {count}", count

    def __len__(self) -> int:
        return self._count

    def video(self, index: int) -> BoxVideo:
        frames = torch.full((2, 3, 8, 8), index, dtype=torch.uint8)
        return BoxVideo.of(f"v{index}", frames, [Objects.of([[1, 1, 5, 5]], [index % 2]), Objects.of()])


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((-5, -5, 4, 4), None),  # reaches out
        ((8, 2, 30, 6), None),
        ((-9, 0, -1, 4), "outside"),
        ((9.5, 0, 20, 5), "outside"),  # half a pixel is left
        ((3, 3, 3, 8), "degenerate"),
        ((6, 3, 4, 8), "degenerate"),
        ((NAN, 0, 4, 4), "not_a_number"),
        ((0, 0, float("inf"), 4), "not_a_number"),
    ],
)
def test_boxes_of_a_file_are_cut_or_left_out_and_counted(box, reason):
    found, dropped = clean((10, 8), [box, (1, 1, 3, 3)], [1, 0], tracks=[7, 8])
    assert dropped == ({reason: 1} if reason else {})
    assert found.labels.tolist() == ([0] if reason else [1, 0])
    assert found.tracks.tolist() == ([8] if reason else [7, 8])
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [10, 8, 10, 8]).all()


def test_a_frame_may_be_empty_or_full():
    assert len(clean((10, 8), [], [])[0]) == 0
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 90, (300, 2))
    found, dropped = clean((100, 100), np.concatenate([corners, corners + 5], 1), rng.integers(0, 4, 300))
    assert (len(found), dropped) == (300, {})


@pytest.mark.parametrize(
    ("boxes", "labels", "more"),
    [
        ([[0, 0, 4, 4]], [0, 1], {}),
        ([[0, 0, 4, 4]], [-1], {}),
        ([[0, 0, 0, 4]], [0], {}),
        ([[0, NAN, 4, 4]], [0], {}),
        ([[0, 0, 4, 4]], [0], {"tracks": [1, 2]}),
    ],
)
def test_objects_check_themselves(boxes, labels, more):
    with pytest.raises(BadBoxes):
        Objects.of(boxes, labels, **more)


def test_what_is_ignored_may_be_of_any_class():
    found = Objects.of([[0, 0, 4, 4], [1, 1, 2, 2]], [-1, 3], ignore=[True, False])
    assert found.only(~found.ignore).labels.tolist() == [3]


def test_video_of_frames_needs_objects_for_each():
    with pytest.raises(BadBoxes, match="for objects of 1 frames"):
        BoxVideo.of("v", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [Objects.of()])
    video = Drawn(3).video(2)
    assert (len(video), video.frames.shape, int(video.read([1])[0, 0, 0, 0])) == (2, (2, 3, 8, 8), 2)


def test_labels_are_counted_as_the_recipe_counts_them():
    renamed = Renamed(Drawn(2), ("square", "car", "disc"))
    assert [renamed.video(index).objects[0].labels.tolist() for index in range(2)] == [[2], [0]]
    with pytest.raises(BadBoxes, match=r"among the 1 of the recipe: square; use a recipe") as caught:
        Renamed(Drawn(2), ("disc",))
    assert caught.value.reason == "wrong_classes"


def test_mixed_sets_are_one_after_the_other():
    mixed = Mixed((Drawn(2), 3), (Drawn(1), 1))
    assert [mixed.video(index).name for index in range(len(mixed))] == ["v0", "v1"] * 3 + ["v0"]
    assert mixed.identity != Mixed((Drawn(2), 1), (Drawn(1), 1)).identity
    with pytest.raises(BadBoxes):
        Mixed((Drawn(2), 1), (Drawn(2, ("a", "b")), 1))
    with pytest.raises(IndexError):
        mixed.video(7)


def test_sets_travel_to_other_processes():
    mixed = pickle.loads(pickle.dumps(Mixed((Renamed(Drawn(2), ("square", "disc")), 1))))
    assert mixed.video(1).objects[0].labels.tolist() == [0]


def test_every_detector_recipe_has_its_data_set():
    trained = [row for row in DETECTOR_RECIPES.values() if row.training is not None]
    assert {row.dataset for row in trained} <= set(BOX_SETS) | {"coco", "imagenet_vid"}
