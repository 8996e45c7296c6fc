from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.box_data import Objects
from pipelines.box_metrics import Found
from pipelines.box_scoring import BadComparison, CocoPrecision, Judged, VideoPrecision, compare, every, score

LABELS = ("disc", "square")


def found(*rows: tuple[float, ...]) -> Found:
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Found(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def by_hand() -> Judged:
    """A disc that rests, found in both frames; a disc that flies, found once; a wrong square; an empty frame."""
    rests = (0, 0, 99, 99)
    objects = [
        Objects.of([rests, (200, 0, 209, 9)], [0, 0], [1, 2]),
        Objects.of([rests, (205, 0, 214, 9)], [0, 0], [1, 2]),
        Objects.of(),
    ]
    told = [
        found((*rests, 0.9, 0), (204, 0, 213, 9, 0.7, 0)),  # IoU with the small one 60/140, its threshold 1/4
        found((300, 0, 309, 9, 0.8, 0), (*rests, 0.6, 0)),
        found((0, 0, 9, 9, 0.95, 1)),
    ]
    return Judged("by hand", objects, told)


def test_vid_average_precision_by_hand():
    # discs: right .9, wrong .8, right .7, right .6: precision 1, 1/2, 2/3, 3/4 -> envelope 1, 3/4, 3/4 over 4 objects
    # slow: .7 is free, two objects: 1, 1/2, 2/3 -> (1 + 2/3) / 2; fast: .9 and .6 are free: 0, 1/2 over two objects
    # squares are on no frame, so that only discs are averaged
    figures, precisions = score([by_hand()], LABELS)
    assert figures["vid_all"] == pytest.approx((1 + 3 / 4 + 3 / 4) / 4)
    assert figures["vid_slow"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures["vid_fast"] == pytest.approx(1 / 2 / 2)
    assert math.isnan(figures["vid_medium"])
    assert {name: each.objects for name, each in precisions.items()} == {"all": 4, "slow": 2, "medium": 0, "fast": 2}
    assert [math.isnan(each) for each in precisions["all"].per_class()] == [False, True]


def test_coco_average_precision_by_hand():
    # at IoU 0.5 without the tolerance the small disc is missed: right, wrong, wrong, right of 4 objects
    # precision 1 up to recall 1/4 (26 of 101 points), 2/4 up to 2/4 (25 points)
    figures, _ = score([by_hand()], LABELS)
    assert figures["coco_ap50"] == pytest.approx((26 + 25 / 2) / 101)
    assert figures["coco_ap"] == pytest.approx((26 + 25 / 2) / 101)
    assert figures["coco_ap_large"] > figures["coco_ap_small"] == 0


def random_videos(count: int, quality: float, seed: int = 0) -> list[Judged]:
    """Films of three objects, of which detections find some, beside others that are wrong."""
    videos = []
    for number in range(count):
        world, eye = np.random.default_rng(number), np.random.default_rng((seed, number))
        objects, told = [], []
        for _ in range(4):
            corners = world.uniform(0, 80, (3, 2))
            boxes, labels = np.hstack([corners, corners + world.uniform(10, 20, (3, 2))]), world.integers(0, 2, 3)
            objects.append(Objects.of(boxes, labels, [0, 1, 2]))
            seen = eye.random(3) < quality
            rows = np.hstack([boxes, eye.uniform(0.3, 1, (3, 1)), labels[:, None]])[seen]
            noise = np.hstack([corners[:1] + 40, corners[:1] + 55, eye.uniform(0, 0.7, (1, 1)), [[0]]])
            told.append(found(*rows, *noise))
        videos.append(Judged(f"v{number}", objects, told))
    return videos


def precision(videos: list[Judged]) -> VideoPrecision:
    made = VideoPrecision(2, every)
    for video in videos:
        made.add(video)
    return made


def test_what_is_found_exactly_scores_one_by_both_rules():
    videos = [
        Judged(
            video.name,
            video.objects,
            [
                Found(each.boxes, np.linspace(0.9, 0.1, len(each), dtype=np.float32), each.labels)
                for each in video.objects
            ],
        )
        for video in random_videos(5, 1.0)
    ]
    figures, _ = score(videos, LABELS)
    assert figures["vid_all"] == figures["coco_ap"] == figures["coco_ar100"] == pytest.approx(1.0)


def test_ignored_objects_are_no_fault_by_either_rule():
    box = (10, 10, 59, 59)
    objects = Objects.of([box, (100, 100, 150, 150)], [0, -1], ignore=[False, True])
    told = found((*box, 0.5, 0), (100, 100, 150, 150, 0.9, 1), (100, 100, 150, 150, 0.8, 0))
    figures, _ = score([Judged("v", [objects], [told])], LABELS)
    assert figures["vid_all"] == figures["coco_ap50"] == pytest.approx(1.0)


def test_frames_can_be_left_out():
    made = VideoPrecision(2, lambda objects, _: every(objects, _) if objects.condition == "clean" else None)
    box = (0, 0, 49, 49)
    made.add(
        Judged(
            "v",
            [Objects.of([box], [0], condition="clean"), Objects.of([box], [0], condition="dark")],
            [found((*box, 0.5, 0)), found((100, 0, 149, 49, 0.9, 0))],
        )
    )
    assert (made.objects, made.mean()) == (1, 1.0)


def test_nothing_to_find_is_no_figure():
    figures, _ = score([Judged("v", [Objects.of()], [found((0, 0, 9, 9, 0.5, 0))])], LABELS)
    assert all(math.isnan(value) for value in figures.values())
    figures, _ = score([], LABELS)
    assert all(math.isnan(value) for value in figures.values())


def test_nothing_found_scores_nothing():
    figures, _ = score([Judged("v", [Objects.of([(0, 0, 9, 9)], [1])], [found()])], LABELS)
    assert figures["vid_all"] == figures["coco_ap"] == 0


def test_a_video_for_each_frame():
    with pytest.raises(BadComparison, match="1 frames were judged of 2"):
        Judged("v", [Objects.of(), Objects.of()], [found()])


def test_resampling_each_video_once_changes_nothing():
    made = precision(random_videos(20, 0.7))
    order = np.random.default_rng(0).permutation(20)
    assert made.resampled(np.stack([order, np.arange(20)])).tolist() == pytest.approx([made.mean()] * 2)


def test_a_detector_is_as_good_as_itself():
    made = precision(random_videos(20, 0.7))
    gap = compare(made, made, samples=50)
    assert (gap.gap, gap.low, gap.high) == (0, 0, 0)


def test_interval_holds_the_gap_and_narrows_with_more_videos():
    few, many = (
        compare(precision(random_videos(count, 0.8)), precision(random_videos(count, 0.5, seed=1)), samples=200)
        for count in (10, 80)
    )
    for gap in (few, many):
        assert 0 < gap.low < gap.gap < gap.high
        assert gap.gap == pytest.approx(gap.one - gap.other)
    assert many.high - many.low < few.high - few.low


def test_only_the_same_videos_are_compared():
    with pytest.raises(BadComparison, match="10 videos of 120 objects against 11 of 132"):
        compare(precision(random_videos(10, 0.8)), precision(random_videos(11, 0.8)))


def test_three_hundred_objects_on_a_frame():
    corners = np.stack(np.meshgrid(np.arange(20) * 30.0, np.arange(15) * 30.0), -1).reshape(-1, 2)
    boxes = np.hstack([corners, corners + 20])
    objects = Objects.of(boxes, np.arange(300) % 2)
    told = Found(objects.boxes, np.linspace(0.9, 0.1, 300, dtype=np.float32), objects.labels)
    figures, _ = score([Judged("v", [objects], [told])], LABELS)
    assert figures["vid_all"] == pytest.approx(1.0)
    assert figures["coco_ap50"] < 1.0  # it looks at 100 detections of a class


def test_coco_labels_with_gaps_in_what_is_there():
    coco = CocoPrecision(("a", "b", "c"))
    box = (0, 0, 49, 49)
    coco.add(Judged("v", [Objects.of([box], [2])], [found((*box, 0.5, 2), (*box, 0.9, 0))]))
    assert coco.figures()["ap50"] == pytest.approx(1.0)  # a is on no frame
