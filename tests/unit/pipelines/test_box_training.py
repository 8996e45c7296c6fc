from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from pipelines.box_data import BoxVideo, Objects
from pipelines.box_training import (
    BoxClips,
    clear_pads,
    clip_indices,
    collate,
    coloured,
    draw_clip,
    fit_frames,
    load_boxes,
)
from pipelines.decoding import UnreadableVideo
from pipelines.training_data import NothingReadable, Order, Place
from tests.unit.pipelines.box_kit import TRAINING, Blocks
from tsm_core.detector_recipes import BoxTraining

SIZE = (64, 64)
PLAIN = BoxTraining(strides=(1, 1), flip=False, reverse=False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numbered(total: int = 12) -> BoxVideo:
    """Frame number n is of level n and has a box at x = n; the second one is ignored."""
    frames = torch.arange(total, dtype=torch.uint8)[:, None, None, None].expand(total, 3, 32, 64)
    return BoxVideo.of(
        "numbered",
        frames,
        [Objects.of([[n, 2, n + 10, 12], [0, 0, 5, 5]], [n % 3, 0], ignore=[False, True]) for n in range(total)],
    )


# --- frames


@pytest.mark.parametrize("seed", range(20))
def test_frames_of_a_clip_are_the_same_distance_apart(seed):
    found = clip_indices(30, 8, (1, 6), rng(seed))
    steps = set(np.diff(found).tolist())
    assert len(steps) == 1
    assert 1 <= steps.pop() <= 4  # 29 / 7 is as far as the video reaches
    assert 0 <= found[0] < found[-1] < 30


def test_every_stride_and_every_start_is_drawn():
    drawn = [clip_indices(10, 4, (1, 3), rng(seed)) for seed in range(300)]
    assert {int(np.diff(each)[0]) for each in drawn} == {1, 2, 3}
    assert {each[0] for each in drawn} == set(range(7))


@pytest.mark.parametrize(("total", "wanted"), [(1, [0, 0, 0, 0]), (3, [0, 1, 2, 2]), (4, [0, 1, 2, 3])])
def test_short_videos_stand_still_at_their_end(total, wanted):
    assert clip_indices(total, 4, (1, 3), rng()) == wanted


# --- a clip


def test_boxes_stay_on_their_objects():
    for seed in range(10):
        clip = draw_clip(Blocks(1).video(0), 4, SIZE, replace(TRAINING, colour=0.0), rng(seed))
        for frame, boxes, labels in zip(clip.pixels, clip.boxes, clip.labels, strict=True):
            x1, y1, x2, y2 = boxes[0].int().tolist()
            level = 20 if int(labels[0]) else 230
            assert (frame[:, y1:y2, x1:x2] == level).all()
            assert int((frame == level).sum()) == 3 * (x2 - x1) * (y2 - y1)


def test_frames_and_boxes_go_together_forwards_and_backwards():
    seen = set()
    for seed in range(20):
        clip = draw_clip(numbered(), 4, (32, 64), replace(PLAIN, reverse=True, strides=(2, 2)), rng(seed))
        levels = clip.pixels[:, 0, 0, 0].tolist()
        assert [int(boxes[0, 0]) for boxes in clip.boxes] == levels
        assert [labels.tolist() for labels in clip.labels] == [[level % 3] for level in levels]
        seen.add(levels[1] - levels[0])
    assert seen == {2, -2}


def test_all_frames_are_mirrored_alike():
    seen = set()
    for seed in range(20):
        clip = draw_clip(numbered(), 4, (32, 64), replace(PLAIN, flip=True), rng(seed))
        levels = clip.pixels[:, 0, 0, 0].tolist()
        left = [int(boxes[0, 0]) for boxes in clip.boxes]
        mirrored = left == [64 - level - 10 for level in levels]
        assert mirrored or left == levels
        seen.add(mirrored)
    assert seen == {True, False}


def test_all_frames_are_coloured_alike():
    frames = torch.randint(60, 180, (1, 3, 8, 8), dtype=torch.uint8).repeat(4, 1, 1, 1)
    changed = coloured(frames, np.array([0.2, -0.3, 0.4]))
    assert not torch.equal(changed, frames)
    assert all(torch.equal(frame, changed[0]) for frame in changed)
    assert torch.equal(coloured(frames, np.zeros(3)), frames)
    grey = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    assert (coloured(grey, np.array([0.1, 0.5, 0.5])) == 110).all()


def test_still_images_are_static_clips():
    clip = draw_clip(Blocks(5).video(4), 4, SIZE, TRAINING, rng())
    assert all(torch.equal(frame, clip.pixels[0]) for frame in clip.pixels)
    assert all(torch.equal(boxes, clip.boxes[0]) for boxes in clip.boxes)


def test_letterboxed_clip_shows_nothing_beside_the_picture():
    frames = torch.full((2, 3, 30, 60), 200, dtype=torch.uint8)
    pixels, pads = fit_frames(frames, SIZE)
    assert (pixels.shape, pads) == ((2, 3, 64, 64), (0, 0, 16, 16))
    cleared = clear_pads(pixels.float()[None] - 7, [pads])[0]
    assert (cleared[:, :, :16] == 0).all()
    assert (cleared[:, :, 48:] == 0).all()
    assert (cleared[:, :, 16:48] == 193).all()


def test_a_frame_may_be_empty_or_full():
    corners = np.stack(np.meshgrid(np.arange(20) * 3.0, np.arange(15) * 2.0), -1).reshape(-1, 2)
    video = BoxVideo.of(
        "v",
        torch.zeros(2, 3, 32, 64, dtype=torch.uint8),
        [Objects.of(), Objects.of(np.hstack([corners, corners + 2]), np.arange(300) % 3)],
    )
    batch = collate([draw_clip(video, 2, (32, 64), PLAIN, rng())])
    assert batch.counts.tolist() == [0, 300]
    assert [len(target["boxes"]) for target in batch.targets()] == [0, 300]


# --- loading


def clips(videos: Blocks, on_error: str = "skip") -> BoxClips:
    return BoxClips(videos, 4, SIZE, TRAINING, 3, on_error)


def test_what_is_drawn_depends_on_the_place_alone():
    one, other = clips(Blocks(10)), clips(Blocks(10))
    other[Place(0, 1)]
    first, second, later = one[Place(2, 7)], other[Place(2, 7)], one[Place(3, 7)]
    assert torch.equal(first.pixels, second.pixels)
    assert not torch.equal(first.pixels, later.pixels)


def test_loading_processes_give_the_same_batches():
    order = Order(10, 3, seed=1)
    batches = [list(islice(load_boxes(clips(Blocks(10)), order.micro_batches(1), n, pin=False), 4)) for n in (0, 1)]
    assert [len(batch.pixels) for batch in batches[0]] == [3, 3, 3, 1]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.boxes, other.boxes)
        assert one.pads == other.pads


def test_unreadable_videos_are_replaced_and_told():
    batch = collate([clips(Blocks(10, bad=(1,)))[Place(0, 1)]])
    assert batch.replaced == ["film 1 is damaged"]
    assert len(batch.pixels) == 1
    assert isinstance(clips(Blocks(10, bad=(1,)), "raise")[Place(0, 1)], UnreadableVideo)
    nothing = collate([clips(Blocks(3, bad=(0, 1, 2)))[Place(0, 1)]])
    assert isinstance(nothing.error, NothingReadable)
