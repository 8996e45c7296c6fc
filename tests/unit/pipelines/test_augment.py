import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional

from pipelines.augment import (
    AugmentError,
    ClipAugment,
    multi_scale_offsets,
    multi_scale_sizes,
    random_resized_box,
)
from tsm_core.errors import ShapeError
from tsm_core.preprocess import PreprocessSpec, resize
from tsm_core.recipes import MIT_ROWS, PAGE_ROWS, PIL_SPEC, Training

SMALL = {"input_px": 64, "resize_px": 73}
PLAIN = Training(flip=False)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(seed=0):
    return np.random.default_rng(seed)


def noise(frames, height, width, seed=0):
    """A clip as decoders give it, colours side by side."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def picture_of(clip):
    return clip[0].permute(1, 2, 0).numpy()


class Told:
    """A random generator whose answers are known beforehand."""

    def __init__(self, **answers):
        self.answers = {name: list(values) for name, values in answers.items()}

    def __getattr__(self, name):
        return lambda *_, **__: self.answers[name].pop(0)


# ---- order

CROP = ("resize_short_side", "multi_scale_crop", "resize_fixed")
KINETICS = (*range(1, 19), 20)
ORDERS = {
    **dict.fromkeys(range(1, 37), CROP),
    **dict.fromkeys(KINETICS, (*CROP, "flip")),
    21: (*CROP, "imgaug_randaugment"),
    22: (*CROP, "ptv_randaugment"),
    23: (*CROP, "ptv_augmix"),
    24: (*CROP, "flip", "imgaug_randaugment"),
    32: ("random_resized_crop", "resize_fixed", "flip"),
}
TABLES = Path(__file__).parents[4] / "shared" / "reference" / "recipes.yaml"


@pytest.mark.parametrize(("number", "row"), list(enumerate(PAGE_ROWS, 1)), ids=[row.name for row in PAGE_ROWS])
def test_each_row_takes_its_steps_in_order_and_gives_bytes(number, row):
    augmented = ClipAugment(row.training, replace(row.preprocess, **SMALL))
    assert augmented.steps == ORDERS[number][: len(augmented.steps)]  # colours are to come
    frames = noise(3, 50, 70)
    before = frames.clone()
    for seed in range(3):
        pixels, label = augmented(frames, 5, draw(seed))
        assert (pixels.dtype, tuple(pixels.shape), label) == (torch.uint8, (3, 3, 64, 64), 5)
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        again, _ = augmented(frames, 5, draw(seed))
        assert torch.equal(pixels, again)
        for at in range(3):  # each frame alone, with the same draw, is what it is in the clip
            alone, _ = augmented(frames[at : at + 1], 5, draw(seed))
            assert torch.equal(alone[0], pixels[at])
    assert torch.equal(frames, before)


def test_orders_are_those_of_the_recipe_tables():
    if not TABLES.is_file():
        pytest.skip(f"no recipe tables at {TABLES}")
    rows = yaml.load(TABLES.read_text(), Loader=yaml.CSafeLoader)["recipes"]
    assert len(rows) == 36
    ours = {row.name: row for row in PAGE_ROWS}
    for number, (name, listed) in enumerate(rows.items(), 1):
        ops = [op for op in listed["train_pipeline"] if not op["op"].startswith(("sample", "decode", "norm", "format"))]
        assert tuple(op["op"] for op in ops) == ORDERS[number], name
        told = {op["op"]: op for op in ops}
        training = ours[name].training
        mirrored = {one: other for a, b in training.flip_pairs for one, other in ((a, b), (b, a))}
        assert told.get("flip", {}).get("flip_label_map", {}) == mirrored, name


def test_a_spec_without_a_short_side_is_resized_twice():
    spec = PreprocessSpec(64, "exact", antialias=True)
    augmented = ClipAugment(Training(), spec)
    assert augmented.steps == ("resize_fixed", "multi_scale_crop", "resize_fixed", "flip")
    assert tuple(augmented(noise(2, 50, 70), 0, draw())[0].shape) == (2, 3, 64, 64)


@pytest.mark.parametrize("row", MIT_ROWS, ids=[row.name for row in MIT_ROWS])
def test_mit_rows_crop_the_stored_frame(row):
    augmented = ClipAugment(row.training, replace(row.preprocess, **SMALL))
    assert augmented.steps == ("multi_scale_crop", "resize_fixed", *(("flip",) if row.training.flip else ()))
    assert tuple(augmented(noise(2, 50, 70), 0, draw())[0].shape) == (2, 3, 64, 64)


# ---- crops


@pytest.mark.parametrize(
    ("base", "sides"), [(256, [256, 224, 192, 168]), (240, [240, 210, 180, 158]), (224, [224, 196, 168, 147])]
)
def test_crops_have_ten_sizes(base, sides):
    a, b, c, d = sides
    wanted = [(a, a), (a, b), (b, a), (b, b), (b, c), (c, b), (c, c), (c, d), (d, c), (d, d)]
    assert sorted(multi_scale_sizes(base, 224)) == sorted(wanted)


def test_a_side_near_the_networks_becomes_it():
    assert [w for w, h in multi_scale_sizes(258, 224) if w == h] == [258, 224, 193, 170]  # 225.75
    assert [w for w, h in multi_scale_sizes(260, 224) if w == h] == [260, 227, 195, 171]  # 3 away stays
    assert [w for w, h in multi_scale_sizes(226, 224) if w == h] == [224, 197, 169, 149]
    assert max(multi_scale_sizes(222, 224)) == (222, 222)  # there is no more
    assert [w for w, h in multi_scale_sizes(73, 64) if w == h] == [73, 64, 54, 48]


@pytest.mark.parametrize(
    ("size", "offsets"),
    [
        ((224, 224), [(0, 0), (116, 0), (0, 32), (116, 32), (58, 16), (0, 16), (116, 16), (58, 32), (58, 0), (29, 8),
                      (87, 8), (29, 24), (87, 24)]),
        ((192, 168), [(0, 0), (148, 0), (0, 88), (148, 88), (74, 44), (0, 44), (148, 44), (74, 88), (74, 0), (37, 22),
                      (111, 22), (37, 66), (111, 66)]),
        ((256, 256), [(x, 0) for x in (0, 84, 0, 84, 42, 0, 84, 42, 42, 21, 63, 21, 63)]),
    ],
)  # fmt: skip
def test_crops_lie_in_thirteen_places(size, offsets):
    assert multi_scale_offsets(340, 256, *size) == offsets


def candidates(pictures, spec):
    """What each size and place would give: whole pictures resized, then cut, then resized; by their bytes."""
    height, width = pictures.shape[2:]
    found = {}
    for w, h in multi_scale_sizes(min(width, height), spec.input_px):
        for left, top in multi_scale_offsets(width, height, w, h):
            crop = pictures[:, :, top : top + h, left : left + w].contiguous()
            side = (spec.input_px, spec.input_px)
            out = functional.interpolate(crop, side, mode="bilinear", antialias=spec.antialias)
            found.setdefault(out.numpy().tobytes(), []).append((w, h, left, top))
    return found


@pytest.mark.parametrize(("spec", "size"), [(PreprocessSpec(), (20, 27)), (PIL_SPEC, (24, 33))])
def test_every_size_and_place_is_as_likely(spec, size):
    spec = replace(spec, input_px=21, resize_px=24)
    frames = noise(1, *size)
    pictures = resize(frames, spec) if spec.convention == "mmaction2" else frames
    wanted, augmented, rng = candidates(pictures, spec), ClipAugment(PLAIN, spec), draw(1)
    counts = Counter(augmented(frames, 0, rng)[0].contiguous().numpy().tobytes() for _ in range(6500))
    assert set(counts) == set(wanted)  # nothing else, and nothing left out
    for key, places in wanted.items():
        expected = 50 * len(places)
        assert abs(counts[key] - expected) < 5 * math.sqrt(expected)


def test_the_mit_crop_is_resized_as_pillow_does():
    frames = noise(1, 90, 120)
    pixels, _ = ClipAugment(PLAIN, replace(PIL_SPEC, **SMALL))(frames, 0, Told(integers=[9, 12]))
    box = (3 * ((120 - 59) // 4), 3 * ((90 - 59) // 4))
    crop = Image.fromarray(picture_of(frames)).crop((*box, box[0] + 59, box[1] + 59))
    wanted = np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(picture_of(pixels) - wanted).max() <= 1


def test_memory_order_of_a_clip_does_not_matter():
    frames = noise(2, 60, 80)
    augmented = ClipAugment(Training(), PreprocessSpec(**SMALL))
    for seed in range(4):
        assert torch.equal(augmented(frames, 0, draw(seed))[0], augmented(frames.contiguous(), 0, draw(seed))[0])


def test_nothing_to_do_changes_nothing():
    frames = noise(2, 64, 64)
    augmented = ClipAugment(Training(flip_pairs=((3, 4),)), PreprocessSpec(64, resize_px=64))
    pixels, label = augmented(frames, 3, Told(integers=[0, 0], random=[0.5]))
    assert torch.equal(pixels, frames)
    assert label == 3
    mirrored, label = augmented(frames, 3, Told(integers=[0, 0], random=[0.49]))
    assert torch.equal(mirrored, frames.flip(3))
    assert label == 4


def test_a_random_resized_crop_is_the_first_draw_that_fits():
    uniform = [np.log([4 / 3, 0.75] + [1.0] * 8), np.array([1.0, 0.5] + [1.0] * 8)]
    # 1: 100 x 100 at 4:3 is 115 x 87, too wide. 2: half of it at 3:4 is 61 x 82
    assert random_resized_box(100, 100, Told(uniform=uniform, integers=[39, 18])) == (39, 18, 61, 82)


def test_random_resized_crops_stay_within_their_limits():
    rng, places, shares, aspects = draw(3), set(), [], []
    for _ in range(3000):
        left, top, w, h = random_resized_box(176, 100, rng)
        assert left >= 0
        assert top >= 0
        assert left + w <= 176
        assert top + h <= 100
        places.add((left == 0, left + w == 176, top == 0, top + h == 100))
        shares.append(w * h / 17600)
        aspects.append(w / h)
    assert 0.075 < min(shares) < 0.1
    assert 0.73 < min(aspects) < 0.78
    assert 1.28 < max(aspects) < 1.36
    assert {(True, False, False, False), (False, True, False, False), (False, False, True, False)} <= places
    assert (False, False, False, True) in places  # the last place counts
    small = [math.log(aspect) for aspect, share in zip(aspects, shares, strict=True) if share < 0.3]  # all of them fit
    assert abs(np.mean(small)) < 0.03  # 3:4 is as likely as 4:3
    assert random_resized_box(10, 1000, draw()) == (0, 495, 10, 10)  # nothing fits: the central square
    assert random_resized_box(1, 1, draw()) == (0, 0, 1, 1)


def test_random_resized_pixels_are_those_of_the_box():
    frames = noise(2, 40, 60)
    training = Training(crop="random_resized", flip=False)
    pixels, _ = ClipAugment(training, PreprocessSpec(**SMALL))(frames, 0, draw(5))
    left, top, w, h = random_resized_box(60, 40, draw(5))
    crop = frames[:, :, top : top + h, left : left + w].contiguous()
    assert torch.equal(pixels, functional.interpolate(crop, (64, 64), mode="bilinear"))


# ---- mirror images


@pytest.mark.parametrize("crop", ["multi_scale", "random_resized"])
def test_half_of_the_clips_are_mirrored_and_only_their_labels_exchanged(crop):
    frames = torch.zeros(1, 3, 20, 30, dtype=torch.uint8)
    frames += torch.arange(30, dtype=torch.uint8) * 8  # brighter to the right
    augmented = ClipAugment(Training(crop=crop, flip_pairs=((0, 1), (6, 7))), PreprocessSpec(16, resize_px=20))
    rng, seen = draw(2), Counter()
    for at in range(2000):
        before = (0, 1, 6, 7, 2)[at % 5]
        pixels, after = augmented(frames, before, rng)
        mirrored = bool(pixels[0, 0, 0, 0] > pixels[0, 0, 0, -1])
        assert after == ({0: 1, 1: 0, 6: 7, 7: 6}.get(before, before) if mirrored else before)
        seen[mirrored] += 1
    assert abs(seen[True] - 1000) < 100


# ---- and the rest


def test_wrong_input_is_named():
    for wrong, said in (
        ({"crop": "centre"}, "crop 'centre' must be 'multi_scale'"),
        ({"flip_pairs": ((0, 1), (1, 2))}, "name each class once"),
    ):
        with pytest.raises(AugmentError, match=said) as caught:
            ClipAugment(Training(**wrong), PreprocessSpec())
        assert caught.value.reason == "invalid_augment"
    augmented = ClipAugment(Training(), PreprocessSpec())
    for wrong in (torch.zeros(2, 3, 8, 8), noise(1, 8, 8)[0], noise(1, 8, 8)[:, :2], noise(1, 8, 8)[:0]):
        with pytest.raises(ShapeError, match=r"frames must be uint8 \(T, 3, H, W\)"):
            augmented(wrong, 0, draw())


def test_a_clip_costs_little():
    """8 frames of 340x256 to 224 px, cut and mirrored, in well under 6 ms of CPU (0.6 on an idle core)."""
    augmented, frames = ClipAugment(Training(), PreprocessSpec()), noise(8, 256, 340)
    costs = []
    for seed in range(20):
        begin = time.thread_time()
        augmented(frames, 0, draw(seed))
        costs.append(time.thread_time() - begin)
    assert sum(costs) / len(costs) < 6e-3
