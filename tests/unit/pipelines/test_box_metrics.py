from __future__ import annotations

import numpy as np
import pytest

from pipelines.box_data import BadBoxes, Objects
from pipelines.box_metrics import RIGHT, WRONG, Found, area, match, motion, overlaps, thresholds


def found(*rows: tuple[float, ...]) -> Found:
    """(x1, y1, x2, y2, score, label) each."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Found(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def all_of(objects: Objects) -> np.ndarray:
    return np.ones(len(objects), np.bool_)


def test_overlap_counts_the_last_pixel():
    box = np.array([[0, 0, 9, 9]], np.float32)  # 10 x 10 pixels
    five = np.array([[5, 0, 14, 9]], np.float32)
    assert overlaps(box, five) == pytest.approx(50 / 150)
    assert overlaps(box, five, pixel=0.0) == pytest.approx(36 / 126)
    assert overlaps(box, np.array([[10, 0, 19, 9]], np.float32)) == 0


def test_small_objects_may_be_missed_by_ten_pixels():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 19, 9], [0, 0, 99, 99]], np.float32)
    assert thresholds(boxes).tolist() == pytest.approx([100 / 400, 200 / 600, 0.5])


@pytest.mark.parametrize(("step", "iou"), [(0, 1.0), (1, 9 / 11), (5, 5 / 15), (50, 0.0)])
def test_motion_is_the_overlap_with_the_neighbours(step, iou):
    frames = [Objects.of([[at * step, 0, at * step + 9, 9], [50, 50, 60, 60]], [0, 1], [4, 9]) for at in range(2)]
    for first, second in motion(frames):
        assert first == pytest.approx(iou)
        assert second == 1.0


def test_motion_looks_ten_frames_far_and_over_gaps():
    def at(place: int) -> Objects:
        return Objects.of([[5.0 * place, 0, 5.0 * place + 9, 9]], [0], [1])

    frames = [at(0), *[Objects.of()] * 9, at(1), at(1)]
    first, *_, tenth, eleventh = motion(frames)
    assert first.tolist() == pytest.approx([1 / 3])  # the eleventh is too far
    assert tenth.tolist() == pytest.approx([(1 / 3 + 1) / 2])
    assert eleventh.tolist() == [1.0]


def test_motion_of_what_nobody_followed_is_unknown():
    alone = Objects.of([[0, 0, 9, 9]], [0], [3])
    unnumbered = Objects.of([[0, 0, 9, 9]], [0])
    assert np.isnan(np.concatenate(motion([alone, unnumbered, unnumbered, Objects.of()]))).all()


def test_each_object_is_found_once_by_the_best_score():
    objects = Objects.of([[0, 0, 49, 49]], [0])
    hits = match(
        objects, all_of(objects), found((0, 0, 45, 49, 0.5, 0), (0, 0, 49, 49, 0.4, 0), (0, 0, 30, 49, 0.9, 0))
    )
    assert hits.tolist() == [0, 0, 1]


def test_a_detection_takes_the_object_that_it_fits_best():
    objects = Objects.of([[0, 0, 49, 49], [10, 0, 59, 49]], [0, 0])
    hits = match(objects, all_of(objects), found((9, 0, 58, 49, 0.9, 0), (0, 0, 49, 49, 0.8, 0)))
    assert hits.tolist() == [1, 1]


def test_another_class_is_wrong():
    objects = Objects.of([[0, 0, 49, 49]], [0])
    assert match(objects, all_of(objects), found((0, 0, 49, 49, 0.9, 1))).tolist() == [0]


def test_what_is_not_counted_is_ignored_plainly():
    objects = Objects.of(
        [[0, 0, 49, 49], [100, 0, 149, 49], [200, 0, 249, 49]], [0, 0, -1], ignore=[False, False, True]
    )
    told = found(
        (100, 0, 149, 49, 0.9, 0),  # on the one that is not counted
        (100, 0, 149, 45, 0.8, 0),  # twice: still free
        (100, 0, 149, 49, 0.7, 1),  # of another class
        (200, 0, 249, 49, 0.6, 1),  # what may be any class
        (60, 0, 109, 49, 0.5, 0),  # overlaps it by less than its threshold
        (0, 0, 49, 49, 0.4, 0),
    )
    assert match(objects, np.array([True, False, True]), told).tolist() == [-1, -1, 0, -1, 0, 1]


def test_counted_objects_come_before_ignored_ones():
    objects = Objects.of([[0, 0, 49, 49], [0, 0, 44, 49]], [0, 0], ignore=[True, False])
    assert match(objects, all_of(objects), found((0, 0, 49, 49, 0.9, 0))).tolist() == [1]


def test_average_precision_by_hand():
    # precision 1, 1/2, 2/3, 2/4, 3/5 at recall 1/4, 1/4, 2/4, 2/4, 3/4; one object is never found
    right, wrong = np.array([1.0, 0, 1, 0, 0, 1]), np.array([0.0, 1, 0, 1, 0, 0])  # the fifth is free
    assert area(right, wrong, 4) == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    # a later, higher precision counts for the recall before it
    assert area(np.array([0.0, 1, 1]), np.array([1.0, 0, 0]), 2) == pytest.approx(2 / 3)
    assert area(np.empty(0), np.empty(0), 3) == 0


def test_weights_count_as_repetition():
    rng = np.random.default_rng(1)
    hits, weights = rng.integers(-1, 2, 20), rng.integers(0, 3, 20)
    right, wrong = (hits == RIGHT).astype(float), (hits == WRONG).astype(float)
    # of each repeated detection the right ones come first, as one that counts twice
    again = np.repeat(np.arange(20), weights)
    found_twice = area(right[again], wrong[again], 30)
    assert area(right * weights, wrong * weights, 30) == pytest.approx(found_twice, abs=0.02)
    assert area(right, wrong, 15) == area(2 * right, 2 * wrong, 30)


def test_detections_that_are_no_numbers_are_told():
    with pytest.raises(BadBoxes, match="no number"):
        found((0, 0, float("nan"), 4, 0.5, 0))
    with pytest.raises(BadBoxes, match="need M of each"):
        Found(np.zeros((2, 4), np.float32), np.zeros(1, np.float32), np.zeros(2, np.int64))
