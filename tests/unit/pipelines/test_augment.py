import math
import pickle
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional
from torchvision.transforms.v2 import functional as images

from pipelines import augment
from pipelines.augment import (
    AUGMIX,
    IMGAUG,
    OPERATIONS,
    RANDAUGMENT,
    AugmentError,
    Blend,
    ClipAugment,
    ImgaugRandAugment,
    cutmix_box,
    cutout,
    multi_scale_offsets,
    multi_scale_sizes,
    ptv_augmix,
    ptv_randaugment,
    random_resized_box,
    rotation,
    soft_cross_entropy,
    strength,
    warp,
)
from tsm_core.errors import ShapeError
from tsm_core.preprocess import resize
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import MIT_ROWS, PAGE_ROWS, PIL_SPEC, Training

SMALL = {"input_px": 64, "resize_px": 73}
PLAIN = Training(flip=False)
POLICIES = ("imgaug_randaugment", "ptv_randaugment", "ptv_augmix")


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


def scenery(height=48, width=60):
    """A soft picture with a hard edge in it, (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 90 * np.sin(x / 7 + c) * np.cos(y / (9 + c)) for c in range(3)], axis=2)
    waves[height // 3 : height // 2, width // 4 : width // 2] += 60
    return waves.clip(0, 255).astype(np.uint8)


def clip_of(picture):
    return torch.from_numpy(picture).permute(2, 0, 1)[None]


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
    assert augmented.steps == ORDERS[number]
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
        assert (listed["batch_blending"] or {"type": "none"})["type"] == training.blend, name
        if "imgaug_randaugment" in told:
            assert len(told["imgaug_randaugment"]["children"]) == len(IMGAUG)


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


# ---- operations

PICTURE = scenery()
NOISE = picture_of(noise(1, 40, 50))


@pytest.mark.parametrize("picture", [PICTURE, NOISE], ids=["scenery", "noise"])
@pytest.mark.parametrize(
    ("name", "value", "pillow", "levels"),
    [
        ("posterize", 3, lambda image: ImageOps.posterize(image, 3), 0),
        ("posterize", 1, lambda image: ImageOps.posterize(image, 1), 0),
        ("solarize", 230, lambda image: ImageOps.solarize(image, 230), 0),
        ("solarize", 25, lambda image: ImageOps.solarize(image, 25), 0),
        ("equalize", 0, ImageOps.equalize, 0),
        ("invert", 0, ImageOps.invert, 0),
        ("autocontrast", 0, ImageOps.autocontrast, 1),
        ("brightness", 1.72, lambda image: ImageEnhance.Brightness(image).enhance(1.72), 0),
        ("brightness", 0.19, lambda image: ImageEnhance.Brightness(image).enhance(0.19), 0),
        ("saturation", 1.72, lambda image: ImageEnhance.Color(image).enhance(1.72), 1),
        ("contrast", 1.72, lambda image: ImageEnhance.Contrast(image).enhance(1.72), 1),
        ("sharpness", 1.72, lambda image: ImageEnhance.Sharpness(image).enhance(1.72), 1),
    ],
)
def test_colours_are_pillows(name, value, pillow, levels, picture):
    wanted = np.asarray(pillow(Image.fromarray(picture))).astype(int)
    dull = clip_of(picture // 3 + 40)  # another frame beside it, to be worked on by itself
    got = OPERATIONS[name](torch.cat([clip_of(picture), dull]), value)
    assert got.dtype == torch.uint8
    assert np.abs(picture_of(got) - wanted).max() <= levels
    assert torch.equal(got[1:], OPERATIONS[name](dull, value))


def test_operations_that_leave_a_picture_alone():
    clip = noise(2, 20, 20)
    for name, value in [("posterize", 8), ("solarize", 255), ("brightness", 1), ("contrast", 1), ("saturation", 1),
                        ("sharpness", 1), ("turn", 0), ("rotate", 0), ("move_x", 0), ("translate_y", 0),
                        ("slant_x", 0), ("shear_y", 0)]:  # fmt: skip
        same = clip.where(clip < 255, 0) if name == "solarize" else clip
        assert torch.equal(OPERATIONS[name](clip, value), same), name
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    for name in ("equalize", "autocontrast"):
        assert torch.equal(OPERATIONS[name](flat, 0), flat)


def looked_up(picture, matrix):
    """The formula, pixel by pixel, in double precision."""
    a, b, c, d, e, f = matrix
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width].astype(float)
    u, v = x - (width - 1) / 2, y - (height - 1) / 2
    sx, sy = a * u + b * v + c + (width - 1) / 2, d * u + e * v + f + (height - 1) / 2
    out = np.zeros(picture.shape)
    for dx in (0, 1):
        for dy in (0, 1):
            px, py = np.floor(sx).astype(int) + dx, np.floor(sy).astype(int) + dy
            weight = (1 - abs(sx - px)) * (1 - abs(sy - py)) * (px >= 0) * (px < width) * (py >= 0) * (py < height)
            out += weight[..., None] * picture[py.clip(0, height - 1), px.clip(0, width - 1)]
    return out


LEAN = math.radians(15.471)


@pytest.mark.parametrize(
    ("name", "value", "moves"),
    [
        # where a pixel goes, from the centre: imgaug's matrices
        ("slant_x", 15.471, [[1, -math.sin(LEAN), 0], [0, math.cos(LEAN), 0]]),
        ("slant_y", 15.471, [[math.cos(LEAN), 0, 0], [math.sin(LEAN), 1, 0]]),
        ("slant_x", -15.471, [[1, math.sin(LEAN), 0], [0, math.cos(LEAN), 0]]),
        ("move_x", 0.18, [[1, 0, -0.18 * 60], [0, 1, 0]]),
        ("move_y", -0.18, [[1, 0, 0], [0, 1, 0.18 * 48]]),
        ("turn", 27, [[math.cos(math.radians(27)), math.sin(math.radians(27)), 0],
                      [-math.sin(math.radians(27)), math.cos(math.radians(27)), 0]]),
    ],
)  # fmt: skip
def test_places_are_the_formulas(name, value, moves):
    inverse = np.linalg.inv([*moves, [0, 0, 1]])[:2].ravel()
    got = picture_of(OPERATIONS[name](clip_of(PICTURE), value))
    assert np.abs(got - looked_up(PICTURE, inverse)).max() <= 1


@pytest.mark.parametrize(
    ("name", "value", "angle", "translate", "shear"),
    [
        ("rotate", 27, -27, (0, 0), (0, 0)),
        ("rotate", -27, 27, (0, 0), (0, 0)),
        ("translate_x", 0.405, 0, (-0.405 * 60, 0), (0, 0)),
        ("translate_y", -0.405, 0, (0, 0.405 * 48), (0, 0)),
        ("shear_x", 0.27, 0, (-0.27 * 48 / 2, 0), (math.degrees(math.atan(0.27)), 0)),
        ("shear_y", -0.27, 0, (0, 0.27 * 60 / 2), (0, -math.degrees(math.atan(0.27)))),
    ],
)
def test_places_are_torchvisions(name, value, angle, translate, shear):
    clip = torch.cat([clip_of(PICTURE), clip_of(PICTURE[::-1].copy())])
    wanted = images.affine(
        clip, angle, list(translate), 1.0, list(shear), interpolation=images.InterpolationMode.BILINEAR, fill=[0.5] * 3
    )
    got = OPERATIONS[name](clip, value)
    assert (got.int() - wanted.int()).abs().max() <= 1


def test_a_quarter_turn_is_exact():
    clip = noise(2, 32, 32)
    assert torch.equal(warp(clip, rotation(90)), clip.rot90(1, (2, 3)))


def test_a_shear_keeps_its_edge_and_a_fill_is_black():
    clip = torch.full((1, 3, 40, 40), 200, dtype=torch.uint8)
    sheared = OPERATIONS["shear_x"](clip, 0.3)
    assert (sheared[..., 1, :38] == 200).all()
    assert (sheared[..., 39, :28] == 200).all()
    assert (sheared[..., 39, 30:] == 0).all()


def test_cutout_is_a_grey_square_that_may_leave_the_picture():
    clip = torch.zeros(2, 3, 100, 200, dtype=torch.uint8)
    cut = cutout(clip, 0.18, Told(random=[0.5, 0.5]))
    assert (cut[:, :, 41:59, 91:109] == 128).all()
    assert cut.sum() == 2 * 3 * 18 * 18 * 128
    corner = cutout(clip, 0.18, Told(random=[0.0, 0.999]))
    assert (corner[:, :, 90:, :9] == 128).all()
    assert corner.sum() == 2 * 3 * 10 * 9 * 128
    assert clip.sum() == 0


# ---- policies


@pytest.fixture
def journal(monkeypatch):
    """Operations that do nothing but write down their names and numbers."""
    calls = []

    def note(name):
        return lambda clip, value, *_: (calls.append((name, value)), clip)[1]

    monkeypatch.setattr(augment, "OPERATIONS", {name: note(name) for name in OPERATIONS})
    monkeypatch.setattr(augment, "cutout", note("cutout"))
    return calls


FLAT = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
IMGAUG_VALUES = [15.471, 15.471, 0.18, 0.18, 27, 3, 230, 1.72, 1.72, 1.72, 1.72, 0, 0, 0, 0.18]


def test_imgaug_applies_exactly_two_of_fifteen_in_list_order(journal):
    policy, rng, names = ImgaugRandAugment(0), draw(4), [name for name, _ in IMGAUG]
    assert [value for _, value in IMGAUG] == pytest.approx(IMGAUG_VALUES)
    pairs = Counter()
    for _ in range(5250):
        journal.clear()
        policy(FLAT, rng)
        first, second = (names.index(name) for name, _ in journal)
        assert first < second
        pairs[first, second] += 1
        assert [abs(value) for _, value in journal] == pytest.approx([IMGAUG_VALUES[first], IMGAUG_VALUES[second]])
    assert len(pairs) == 105
    assert all(abs(count - 50) < 36 for count in pairs.values())


def test_imgaugs_signs_belong_to_the_worker(journal):
    signs = Counter()
    for seed in range(200):
        policy = ImgaugRandAugment(seed)
        assert policy.operations == ImgaugRandAugment(seed).operations
        values = [value for _, value in policy.operations]
        signs.update(at for at in range(15) if values[at] < 0)
        assert values[5:] == pytest.approx(IMGAUG_VALUES[5:])
    assert set(signs) == set(range(5))
    assert all(60 < count < 140 for count in signs.values())
    policy, seen = ImgaugRandAugment(7), {}
    for seed in range(200):
        policy(FLAT, draw(seed))
        for name, value in journal:
            assert seen.setdefault(name, value) == value


def test_randaugment_draws_two_of_fourteen_and_leaves_out_half(journal):
    rng, lengths, counts, factors = draw(5), Counter(), Counter(), {name: [] for name in RANDAUGMENT}
    for _ in range(7000):
        journal.clear()
        ptv_randaugment(FLAT, rng)
        assert len({name for name, _ in journal}) == len(journal)  # without replacement
        lengths[len(journal)] += 1
        counts.update(name for name, _ in journal)
        for name, value in journal:
            factors[name].append(value)
    assert all(abs(lengths[length] - 7000 * share) < 250 for length, share in ((0, 0.25), (1, 0.5), (2, 0.25)))
    assert set(counts) == set(RANDAUGMENT)
    assert all(abs(count - 500) < 100 for count in counts.values())
    for name, (base, middle, spread) in {
        "brightness": (1, 0.81, 0.045), "contrast": (1, 0.81, 0.045), "saturation": (1, 0.81, 0.045),
        "sharpness": (1, 0.81, 0.045), "rotate": (0, 27, 1.5), "shear_x": (0, 0.27, 0.015),
        "shear_y": (0, 0.27, 0.015), "translate_x": (0, 0.405, 0.0225), "translate_y": (0, 0.405, 0.0225),
    }.items():  # fmt: skip
        changes = np.array(factors[name]) - base
        assert abs(np.mean(changes > 0) - 0.5) < 0.12
        assert np.mean(abs(changes)) == pytest.approx(middle, abs=spread / 4)
        assert np.std(abs(changes)) == pytest.approx(spread, rel=0.2)
        assert abs(changes).max() <= middle / 0.9 + 1e-9  # levels end at 10
    assert set(factors["posterize"]) <= {0, 1, 2}
    assert Counter(factors["posterize"]).most_common(1)[0][0] == 1
    assert np.mean(factors["solarize"]) == pytest.approx(25, abs=2.5)


def test_strengths_by_level():
    rng = draw()
    for level, bits, threshold in ((9, 1, 25), (10, 0, 0), (3, 3, 178), (0.1, 4, 252)):
        assert strength("posterize", RANDAUGMENT, level, rng) == bits
        assert strength("solarize", AUGMIX, level, rng) == threshold
    assert strength("brightness", AUGMIX, 3, rng) == pytest.approx(0.64)
    for name, table, level, both in (("brightness", RANDAUGMENT, 10, {0.1, 1.9}), ("rotate", AUGMIX, 1, {3, -3}),
                                     ("translate_x", AUGMIX, 3, {0.1, -0.1})):  # fmt: skip
        assert {round(strength(name, table, level, rng), 9) for _ in range(30)} == both


def test_augmix_mixes_three_chains_with_the_clip(journal):
    rng, counts, lengths = draw(6), Counter(), Counter()
    for _ in range(500):
        journal.clear()
        mixed = ptv_augmix(FLAT, rng)
        assert set(mixed.unique().tolist()) <= {99, 100}  # nothing but itself, cut off
        counts.update(name for name, _ in journal)
        lengths[len(journal)] += 1
    assert set(counts) == set(AUGMIX)
    assert "invert" not in counts
    assert set(lengths) == set(range(3, 10))
    assert abs(sum(counts.values()) / 500 - 6) < 0.4  # three chains, two operations on average
    assert all(abs(count - sum(counts.values()) / 13) < 90 for count in counts.values())
    # and the formula
    bright = OPERATIONS["brightness"](FLAT, 0.64)
    names, weights, kept = list(AUGMIX), np.array([0.2, 0.3, 0.5]), 0.25
    augment.OPERATIONS.update(brightness=OPERATIONS["brightness"], rotate=OPERATIONS["rotate"])
    chains = [[names.index("equalize")], [names.index("brightness")], [names.index("autocontrast")] * 3]
    told = Told(
        dirichlet=[weights], beta=[kept], integers=[1, chains[0], 1, chains[1], 3, chains[2]], uniform=[3.0] * 5
    )
    wanted = kept * 100 + (1 - kept) * (0.2 * 100 + 0.3 * float(bright[0, 0, 0, 0]) + 0.5 * 100)
    assert ptv_augmix(FLAT, told)[0, 0, 0, 0] == int(wanted)


@pytest.mark.parametrize("policy", [ImgaugRandAugment(1), ptv_randaugment, ptv_augmix])
def test_a_policy_treats_all_frames_alike_and_does_something(policy):
    clip, changed = clip_of(scenery(64, 64)).repeat(3, 1, 1, 1), 0
    for seed in range(12):
        pixels = policy(clip, draw(seed))
        assert pixels.dtype == torch.uint8
        assert all(torch.equal(pixels[0], pixel) for pixel in pixels)
        changed += not torch.equal(pixels, clip)
    assert changed >= 5
    assert torch.equal(clip[0], clip_of(scenery(64, 64))[0])


def test_workers_go_four_ways_with_two_signed_operations():
    clip = clip_of(PICTURE)
    ways = {ImgaugRandAugment(seed)(clip, Told(choice=[np.array([4, 0])])).numpy().tobytes() for seed in range(40)}
    assert len(ways) == 4


# ---- blending


def batch(clips=5, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, 2, 3, 6, 8, generator=generator), torch.randperm(classes, generator=generator)[:clips]


def parted(soft, labels):
    """The share of its own label that each clip kept, and whose label it got besides: read from the labels alone."""
    others = [int((row > 0).nonzero()[:, 0][(row > 0).nonzero()[:, 0] != own]) if (row > 0).sum() > 1 else int(own)
              for row, own in zip(soft, labels, strict=True)]  # fmt: skip
    return soft[torch.arange(len(labels)), labels], [labels.tolist().index(other) for other in others]


def test_mixup_is_one_share_and_one_permutation():
    moved = 0
    for seed in range(30):
        clips, labels = batch(seed=seed)
        before = clips.clone()
        mixed, soft = Blend("mixup", 7)(clips, labels, torch.Generator().manual_seed(seed))
        kept, others = parted(soft, labels)
        assert sorted(others) == list(range(5))  # a permutation
        shares = {
            round(float(share), 5) for share, own, other in zip(kept, range(5), others, strict=True) if own != other
        }
        assert len(shares) <= 1
        share = float(kept.min())
        assert torch.allclose(mixed, share * clips + (1 - share) * clips[others], atol=1e-5)
        assert torch.allclose(soft.sum(1), torch.ones(5))
        assert (soft.dtype, tuple(soft.shape)) == (torch.float32, (5, 7))
        assert torch.equal(clips, before)
        moved += others != list(range(5))
    assert moved >= 25


def test_cutmix_pastes_one_box_and_says_how_large_it_is():
    areas = set()
    for seed in range(40):
        clips, labels = batch(seed=seed)
        before = clips.clone()
        mixed, soft = Blend("cutmix", 7)(clips, labels, torch.Generator().manual_seed(seed))
        kept, others = parted(soft, labels)
        share = float(kept.min())
        area = round((1 - share) * 48)
        assert (1 - share) * 48 == pytest.approx(area, abs=1e-3)
        foreign = (mixed != clips).any(2).any(1)  # (N, H, W); same for all frames and colours
        for at, other in enumerate(others):
            if other != at and area:
                assert torch.equal(foreign[at], (mixed[at] != clips[at]).all(0).all(0))
                assert int(foreign[at].sum()) == area
                rows, columns = foreign[at].any(1).nonzero()[:, 0], foreign[at].any(0).nonzero()[:, 0]
                box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
                assert foreign[at][box].all()
                assert torch.equal(mixed[at][..., box[0], box[1]], clips[other][..., box[0], box[1]])
            elif not area:
                assert torch.equal(mixed[at], clips[at])
        assert torch.equal(clips, before)
        areas.add(area)
    assert len(areas) > 8


@pytest.mark.parametrize(
    ("share", "centre", "box"),
    [
        (0.75, (4, 3), (2, 2, 6, 4)),  # half the sides, 4 x 3: 3 // 2 to either side
        (0.75, (0, 0), (0, 0, 2, 1)),
        (0.75, (7, 5), (5, 4, 8, 6)),
        (0.0, (4, 3), (0, 0, 8, 6)),
        (0.0, (0, 5), (0, 2, 4, 6)),
        (1.0, (4, 3), (4, 3, 4, 3)),
    ],
)
def test_boxes_are_cut_off_at_the_edge(share, centre, box):
    assert cutmix_box(8, 6, share, Told(integers=centre)) == box


def test_the_labels_follow_the_box_that_is_left(monkeypatch):
    told = Told(beta=[0.75], permutation=[np.array([1, 0])], integers=[0, 0])
    monkeypatch.setattr(np.random, "default_rng", lambda _: told)
    clips = torch.stack([torch.zeros(1, 3, 6, 8), torch.ones(1, 3, 6, 8)])
    mixed, soft = Blend("cutmix", 2)(clips, torch.tensor([0, 1]), torch.Generator())
    assert mixed[0].sum() == 3 * 2
    assert torch.allclose(soft, torch.tensor([[46 / 48, 2 / 48], [2 / 48, 46 / 48]]))


def test_shares_come_from_the_beta_distribution():
    clips, labels = torch.zeros(2, 1, 1, 1, 1), torch.tensor([0, 1])
    for alpha in (0.2, 1.0):
        blend, generator = Blend("mixup", 2, alpha=alpha), torch.Generator().manual_seed(1)
        shares = torch.stack([blend(clips, labels, generator)[1][0, 0] for _ in range(2000)])
        shares = shares[shares < 1]  # every second permutation changes nothing
        assert 900 < len(shares) < 1100
        assert float(shares.mean()) == pytest.approx(0.5, abs=0.05)
        assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_blending_follows_its_generator_and_none_leaves_it_alone():
    clips, labels = batch()
    blend = Blend("mixup", 7)
    generator = torch.Generator().manual_seed(3)
    first, second = blend(clips, labels, generator)[1], blend(clips, labels, generator)[1]
    assert not torch.equal(first, second)
    assert torch.equal(first, blend(clips, labels, torch.Generator().manual_seed(3))[1])
    before = generator.get_state()
    same, soft = Blend("none", 7)(clips, labels, generator)
    assert same is clips
    assert torch.equal(soft, functional.one_hot(labels, 7).float())
    assert torch.equal(generator.get_state(), before)


def test_soft_cross_entropy_is_the_mean_over_the_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, requires_grad=True)
    soft = torch.rand(6, 4, generator=generator).softmax(1)
    loss = soft_cross_entropy(logits, soft)
    wanted = -np.mean(np.sum(soft.numpy() * np.log(logits.softmax(1).detach().numpy()), axis=1))
    assert loss.item() == pytest.approx(wanted, abs=1e-6)
    loss.backward()
    assert torch.allclose(logits.grad, (logits.softmax(1) - soft).detach() / 6, atol=1e-6)
    labels = torch.tensor([0, 3, 2, 1, 1, 0])
    hard = soft_cross_entropy(logits, functional.one_hot(labels, 4).float())
    assert torch.allclose(hard, functional.cross_entropy(logits, labels))


# ---- and the rest


def test_a_worker_can_be_sent_its_augmentation():
    for name in POLICIES:
        augmented = ClipAugment(Training(augment=name), PreprocessSpec(**SMALL), worker_seed=4)
        sent = pickle.loads(pickle.dumps(augmented))
        frames = noise(2, 40, 50)
        assert torch.equal(sent(frames, 0, draw(1))[0], augmented(frames, 0, draw(1))[0])


def test_wrong_input_is_named():
    for wrong, said in (
        ({"crop": "centre"}, "crop 'centre' must be one of multi_scale"),
        ({"augment": "trivial"}, "augment 'trivial' must be one of none, imgaug"),
        ({"flip_pairs": ((0, 1), (1, 2))}, "name each class once"),
    ):
        with pytest.raises(AugmentError, match=said) as caught:
            ClipAugment(Training(**wrong), PreprocessSpec())
        assert caught.value.reason == "invalid_augment"
    augmented = ClipAugment(Training(), PreprocessSpec())
    for wrong in (torch.zeros(2, 3, 8, 8), noise(1, 8, 8)[0], noise(1, 8, 8)[:, :2], noise(1, 8, 8)[:0]):
        with pytest.raises(ShapeError, match=r"frames must be uint8 \(T, 3, H, W\)"):
            augmented(wrong, 0, draw())
    for wrong in (("mix", 3), ("mixup", 0), ("mixup", 3, 0.0), ("mixup", 3, float("nan"))):
        with pytest.raises(AugmentError):
            Blend(*wrong)
    clips, labels = batch()
    for wrong in ((clips[0], labels), (clips, labels[:3]), (clips.to(torch.uint8), labels)):
        with pytest.raises(ShapeError, match=r"clips must be float \(N, T, C, H, W\)"):
            Blend("mixup", 7)(*wrong, torch.Generator())


def test_a_clip_costs_little():
    """8 frames of 340x256 to 224 px, cut and mirrored, in well under 6 ms of CPU (0.6 on an idle core)."""
    augmented, frames = ClipAugment(Training(), PreprocessSpec()), noise(8, 256, 340)
    costs = []
    for seed in range(20):
        begin = time.thread_time()
        augmented(frames, 0, draw(seed))
        costs.append(time.thread_time() - begin)
    assert sum(costs) / len(costs) < 6e-3
