from __future__ import annotations

import itertools
import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipelines.datasets import BadList, NoList
from pipelines.prepare import prepare
from pipelines.training_data import (
    AugmentedClips,
    ClipOptions,
    NoData,
    Order,
    Place,
    ValidationViews,
    WrongClasses,
    load_batches,
    load_views,
    open_training_data,
    strided_indices,
    taken,
)
from tests.assets.make import make_miniature, shown
from tests.unit.pipelines.training_kit import RECIPE, Moving
from tsm_core.labels import labels_of
from tsm_core.recipes import RECIPES, Views

STHV1 = "tsm_r50_1x1x8_50e_sthv1_rgb"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_miniature("sthv1", root, classes=2)
    prepare("sthv1", root)
    return root


# --- order


@pytest.mark.parametrize(("size", "batch"), [(23, 3), (24, 3), (5, 4), (1, 4)])
@pytest.mark.parametrize(("workers", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 3), (4, 1)])
def test_every_epoch_has_every_video(size, batch, workers, accumulate):
    order = Order(size, batch, workers, accumulate, seed=5)
    ranks = [list(order.micro_batches(2, rank)) for rank in range(workers)]
    assert len({tuple(map(len, rank)) for rank in ranks}) == 1, "all workers have as much to do"
    places = [place for rank in ranks for micro in rank for place in micro]
    for epoch in (0, 1):
        videos = [place.video for place in places if place.epoch == epoch]
        assert set(videos) == set(range(size))
        assert len(videos) == size + -size % workers
    count = sum(order.pieces(number) for number in range(order.steps))
    assert len(ranks[0]) == 2 * count


def test_two_workers_see_what_one_sees_that_accumulates():
    one, two = Order(24, 3, 1, 2, seed=1), Order(24, 3, 2, 1, seed=1)
    assert one.steps == two.steps == 4
    for number in range(4):
        first, second = one.step(0, number)
        assert two.step(0, number, rank=0) == [first]
        assert two.step(0, number, rank=1) == [second]


def test_order_goes_on_from_any_step():
    order = Order(23, 3, 2, 1, seed=1)
    whole = list(order.micro_batches(3, 1))
    assert list(order.micro_batches(3, 1, first=(1, 2))) == whole[order.steps + 2 :]


def test_order_depends_on_seed_and_epoch():
    orders = {
        tuple(place.video for micro in Order(50, 50, seed=seed).step(epoch, 0) for place in micro)
        for seed, epoch in itertools.product((0, 1), (0, 1))
    }
    assert len(orders) == 4


# --- frames


def test_strides_reach_every_pace_and_stay_inside():
    rng = np.random.default_rng(0)
    found = [strided_indices(40, 8, rng, 4) for _ in range(200)]
    assert {indices[1] - indices[0] for indices in found} == {1, 2, 3, 4}
    for indices in found:
        assert len(indices) == 8
        assert len({after - before for before, after in itertools.pairwise(indices)}) == 1
        assert indices[0] >= 0
        assert indices[-1] < 40
    short = [strided_indices(9, 8, rng, 4) for _ in range(20)]
    assert {tuple(indices) for indices in short} == {tuple(range(8)), tuple(range(1, 9))}
    assert len(strided_indices(3, 8, rng, 4)) == 8


def test_listed_videos_give_clips_of_the_recipe(root):
    recipe = RECIPES[STHV1]
    data = open_training_data(recipe, root)
    assert (len(data.train), len(data.val)) == (4, 4)
    assert data.train.classes == 174
    for index in range(4):
        clip, label = data.train.clip(index, np.random.default_rng(index))
        assert clip.shape == (8, 3, 100, 176)
        assert {shown(frame)[0] for frame in clip} == {label & 255}
    longer = open_training_data(recipe, root, ClipOptions(frames=12, max_stride=2)).train
    clips = [longer.clip(index, np.random.default_rng(0))[0] for index in range(4)]
    numbers = [[shown(frame)[1] for frame in clip] for clip in clips]
    assert all(len(each) == 12 for each in numbers)
    even = [each for each in numbers if len(set(each)) == 12]
    assert even, "long enough to be cut evenly"
    assert all(len({after - before for before, after in itertools.pairwise(each)}) == 1 for each in even)


def test_same_list_same_identity(root, tmp_path):
    recipe = RECIPES[STHV1]
    first, again = open_training_data(recipe, root), open_training_data(recipe, root)
    assert first.train.identity == again.train.identity != first.val.identity


def test_missing_data_says_what_and_where_to_get_it(tmp_path, root):
    recipe = RECIPES[STHV1]
    with pytest.raises(NoData, match="--data"):
        open_training_data(recipe, None)
    with pytest.raises(NoData, match=r"sthv1 is no folder.*Get it"):
        open_training_data(recipe, tmp_path)
    (tmp_path / "sthv1").mkdir()
    with pytest.raises(NoList, match="tsm data prepare"):
        open_training_data(recipe, tmp_path)


def test_label_out_of_range_is_found_before_training(root, tmp_path):
    home = tmp_path / "sthv1"
    home.mkdir()
    lists = (root / "sthv1").glob("*.txt")
    for path in lists:
        (home / path.name).write_text(path.read_text().replace(" 0\n", " 174\n"))
    with pytest.raises(BadList, match=r"label 174 is not in 0\.\.173") as caught:
        open_training_data(RECIPES[STHV1], tmp_path)
    assert caught.value.reason == "bad_label"


def test_recipe_with_other_classes_is_refused(root):
    recipe = replace(RECIPES[STHV1], labels=labels_of("jester"))
    with pytest.raises(WrongClasses, match=r"sthv1 has 174 classes, .* has 27"):
        open_training_data(recipe, root)


# --- clips


def plain(frames: torch.Tensor, label: int, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
    return frames, label


def clips_of(source: Any, on_error: str = "skip") -> AugmentedClips:
    return AugmentedClips(source, lambda number: plain, 7, on_error)


@pytest.mark.parametrize("loaders", [0, 2])
def test_batches_are_the_same_from_any_number_of_loaders(loaders):
    clips = clips_of(Moving(10, 4, bad=(3,)))
    batches = list(load_batches(clips, Order(10, 4).micro_batches(2), loaders, pin=False))
    assert [len(batch.labels) for batch in batches] == [4, 4, 2] * 2
    assert sum(len(batch.replaced) for batch in batches) == 2
    first = batches[0].pixels
    assert first.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    alone = [clips[place] for place in Order(10, 4).step(0, 0)[0]]
    assert torch.equal(first, torch.stack([item.pixels for item in alone]))


def test_a_reader_lets_a_signal_to_all_pass_and_heeds_its_parent():
    others = {each.pid for each in psutil.Process().children()}
    batches = load_batches(clips_of(Moving(10, 4)), Order(10, 4).micro_batches(1000), 1, pin=False)
    next(batches)
    (reader,) = [each for each in psutil.Process().children() if each.pid not in others]
    subprocess.run(["kill", "-INT", str(reader.pid)], check=True)
    for _ in range(10):
        assert len(next(batches).labels)
    reader.terminate()
    assert not psutil.wait_procs([reader], timeout=20)[1]


def test_draws_belong_to_the_clip_not_to_their_order():
    first, second = clips_of(Moving(10, 4)), clips_of(Moving(10, 4))
    places = [Place(epoch, video) for epoch in (0, 1) for video in range(10)]
    there = {place: first[place].pixels for place in places}
    assert all(torch.equal(second[place].pixels, there[place]) for place in reversed(places))
    assert not torch.equal(there[Place(0, 0)], there[Place(1, 0)])


def test_unreadable_videos_are_replaced_or_told():
    item = clips_of(Moving(10, 4, bad=(3,)))[Place(0, 3)]
    assert item.replaced == ["video 3 is damaged"]
    assert item.pixels.shape == (4, 3, 32, 32)
    error = clips_of(Moving(10, 4, bad=(3,)), "raise")[Place(0, 3)]
    assert error.reason == "unreadable_video"
    error = clips_of(Moving(4, 4, bad=(0, 1, 2, 3)))[Place(0, 3)]
    assert error.reason == "no_readable_videos"
    (batch,) = load_batches(clips_of(Moving(4, 4, bad=(0, 1, 2, 3))), iter([[Place(0, 3)]]), 0, pin=False)
    assert batch.error is not None


def test_label_beyond_the_classes_is_told():
    error = clips_of(Moving(10, 4, labels=(0, 2)))[Place(0, 1)]
    assert error.reason == "wrong_classes"


@pytest.mark.parametrize("loaders", [0, 1])
def test_views_to_be_judged_by(root, loaders):
    recipe = RECIPES[STHV1]
    val = open_training_data(recipe, root).val
    views = Views("twice", "three", 256)
    videos = open_training_data(replace(recipe, efficient=views), root).val
    found = list(load_views(ValidationViews(videos, views, recipe.preprocess), range(len(val)), loaders))
    assert [each.video for each in found] == [0, 1, 2, 3]
    assert all(each.views.shape == (6, 8, 3, 256, 256) for each in found)
    assert [len(group) for group in taken(iter(found), 12)] == [2, 2]
    bad = list(load_views(ValidationViews(Moving(2, 4, bad=(1,)), RECIPE.efficient, RECIPE.preprocess), [0, 1], 0))
    assert [each.error for each in bad] == [None, "video 1 is damaged"]
