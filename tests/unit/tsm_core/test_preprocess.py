import hashlib
import json
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tsm_core.errors import ShapeError
from tsm_core.preprocess import crop_offsets, crop_views, normalise, preprocess, resize_crop, resized_size
from tsm_core.preprocess_spec import PreprocessError, PreprocessSpec
from tsm_core.recipes import MOTION9

SHORT = PreprocessSpec()


def pictures(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes]


@pytest.mark.parametrize(
    ("width", "height", "resized"),
    [
        (340, 256, (340, 256)), (320, 240, (341, 256)), (426, 240, (454, 256)), (1280, 720, (455, 256)),
        (720, 1280, (256, 455)), (568, 320, (454, 256)), (176, 100, (451, 256)), (132, 100, (338, 256)),
        (178, 100, (456, 256)),
    ],
)  # fmt: skip
def test_long_side_is_rounded_half_up(width, height, resized):
    assert resized_size(height, width, SHORT) == resized[::-1]


def test_centre_crop_floors_its_offsets():
    (image,) = pictures((256, 455))
    assert torch.equal(resize_crop(image[None], SHORT)[0], image[:, 16:240, 115:339])


def test_values_are_normalised_as_the_formula_says(device):
    (image,) = pictures((224, 224))
    spec = PreprocessSpec(input_px=224, resize="exact")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    got = preprocess([image], spec, device)
    assert (got.dtype, got.device.type, tuple(got.shape)) == (torch.float32, device.type, (1, 3, 224, 224))
    assert torch.allclose(got[0].cpu(), (image / 255 - mean) / std, atol=2e-6)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_values_do_not_depend_on_how_pixels_lie(device, channels):
    spec = PreprocessSpec(channels=channels)
    planes = torch.stack(pictures((30, 41), (30, 41), (30, 41))).to(device)
    side_by_side = planes.contiguous(memory_format=torch.channels_last)
    wanted = normalise(planes, spec)
    assert torch.equal(normalise(side_by_side, spec), wanted)
    assert normalise(side_by_side, spec).stride() == side_by_side.stride()
    assert torch.equal(normalise(side_by_side[:, :, 3:20, 5:30], spec), wanted[:, :, 3:20, 5:30])
    assert torch.equal(normalise(side_by_side.view(1, 3, 3, 30, 41), spec), wanted[None])
    assert torch.equal(normalise(planes[0], spec), wanted[0])


@pytest.mark.parametrize("spec", [SHORT, PreprocessSpec(64, "exact", antialias=True)])
def test_sizes_may_be_mixed_and_rows_keep_their_order(spec, device):
    images = pictures((240, 320), (256, 256), (240, 320), (300, 200), (256, 256))
    together = preprocess(images, spec, device)
    for row, image in zip(together, images, strict=True):
        assert torch.equal(row, preprocess([image], spec, device)[0])


def test_memory_order_of_a_picture_does_not_matter():
    (image,) = pictures((240, 320))
    as_decoded = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # rows of RGB pixels, as decoders give them
    assert torch.equal(preprocess([image], SHORT), preprocess([as_decoded], SHORT))
    assert torch.equal(preprocess(image[None], SHORT), preprocess([image], SHORT))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(720, 405), (100, 180)])
def test_resize_is_within_one_level_of_exact_arithmetic(height, width, antialias, device):
    (image,) = pictures((height, width))
    spec = PreprocessSpec(256, "exact", antialias=antialias)
    exact = torch.nn.functional.interpolate(image[None].double(), (256, 256), mode="bilinear", antialias=antialias)
    got = resize_crop(image[None].to(device), spec).cpu()
    assert (got - exact).abs().max() <= 1.0


def test_wrong_input_is_named():
    with pytest.raises(ShapeError, match=r"torch.float32 \(3, 4, 4\)"):
        preprocess([torch.zeros(3, 4, 4)], SHORT)
    with pytest.raises(ShapeError, match=r"\(4, 4, 3\)"):
        preprocess([torch.zeros(4, 4, 3, dtype=torch.uint8)], SHORT)
    with pytest.raises(ShapeError, match=r"\(2, 4, 4, 3\)"):
        preprocess(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), SHORT)
    with pytest.raises(ShapeError, match="no images"):
        preprocess([], SHORT)
    for wrong in ({"resize": "long"}, {"input_px": 300}, {"std": (1, 0, 1)}, {"mean": (0.5,)}):
        with pytest.raises(PreprocessError):
            PreprocessSpec(**wrong)


def test_the_demo_recogniser_costs_little():
    """A decoded 320 px frame to 64 px in well under 2 ms of CPU (0.2 on an idle core)."""
    image = pictures((320, 320))[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    preprocess([image], MOTION9.preprocess)
    costs = []
    for _ in range(20):
        begin = time.thread_time()
        preprocess([image], MOTION9.preprocess)
        costs.append(time.thread_time() - begin)
    assert min(costs) < 2e-3


# ---- against both originals

CASES = json.loads((Path(__file__).parents[2] / "assets" / "parity" / "preprocessing.json").read_text())["images"]
MIT = PreprocessSpec(antialias=True, convention="mit")
SPECS = {"mmaction2": SHORT, "mit": MIT}


def synthetic(height: int, width: int) -> np.ndarray:
    """The parity kit's picture (height, width, 3): made of integers alone."""
    y, x, c = np.ogrid[:height, :width, :3]
    ramps = [x * 255 // (width - 1) + 0 * y, y * 255 // (height - 1) + 0 * x, (x + y) * 255 // (width + height - 2)]
    g = np.concatenate(ramps, axis=2)
    n = ((x * 7919 + y * 104729 + c * 1299709 + x * y * 31) // 64) % 32
    return ((g * 7 + n * 8) // 8).astype(np.uint8)


def opencv_axis(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two neighbours of each target pixel and their weights in 1/2048, as OpenCV resizes bytes bilinearly."""
    at = ((np.arange(target) + 0.5) * (size / target) - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int64)
    share = np.where((first < 0) | (first >= size - 1), 0, at - first).astype(np.float32)
    first = first.clip(0, size - 1)
    weights = [np.rint(part * np.float32(2048)).astype(np.int64) for part in (np.float32(1) - share, share)]
    return first, np.minimum(first + 1, size - 1), weights[0], weights[1]


def opencv_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    x0, x1, a0, a1 = opencv_axis(image.shape[1], width)
    y0, y1, b0, b1 = opencv_axis(image.shape[0], height)
    levels = image.astype(np.int64)
    rows = levels[:, x0] * a0[None, :, None] + levels[:, x1] * a1[None, :, None]
    upper = (b0[:, None, None] * (rows[y0] >> 4)) >> 16
    lower = (b1[:, None, None] * (rows[y1] >> 4)) >> 16
    return ((upper + lower + 2) >> 2).clip(0, 255).astype(np.uint8)


def reference_crop(image: np.ndarray, pipeline: str, height: int, width: int) -> np.ndarray:
    """The original pipeline's bytes: resized by OpenCV's arithmetic or by Pillow, then the centre 224."""
    if pipeline == "mmaction2":
        resized, top, left = opencv_resize(image, height, width), (height - 224) // 2, (width - 224) // 2
    else:
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        top, left = round((height - 224) / 2), round((width - 224) / 2)
    return resized[top : top + 224, left : left + 224]


def picture_of(facts):
    if "video" not in facts:
        image = synthetic(facts["height"], facts["width"])
    else:
        path = Path(__file__).parents[4] / "shared" / "videos" / facts["video"]
        if not path.is_file():
            pytest.skip(f"no real clip at {path}")
        with av.open(str(path)) as container:
            frame = next(islice(container.decode(video=0), facts["frame_index"], None))
        image = frame.to_ndarray(format="rgb24")
    if hashlib.sha256(image.tobytes()).hexdigest() != facts["sha256_rgb24"]:
        assert "video" in facts
        pytest.skip("this FFmpeg converts colours otherwise")
    return image


@pytest.mark.parametrize("pipeline", SPECS)
@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_parity_with_the_reference_pipelines(case, pipeline):
    """Bytes within one level of the original's everywhere, whose own bytes are known by their hash."""
    image, wanted, spec = picture_of(case["image"]), case["results"][pipeline], SPECS[pipeline]
    height, width = wanted["resized_hw"]
    assert resized_size(*image.shape[:2], spec) == (height, width)
    reference = reference_crop(image, pipeline, height, width)
    assert hashlib.sha256(np.ascontiguousarray(reference).tobytes()).hexdigest() == wanted["sha256_uint8_crop"]
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    ours = resize_crop(pixels[None], spec)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - reference).max() <= 1
    got = preprocess([pixels], spec)[0]
    for x, y, channel, _, value in wanted["samples"]:
        assert got[channel, y, x].item() == pytest.approx(value, abs=1.01 / (255 * spec.std[channel]))
    assert got.mean().item() == pytest.approx(wanted["normalised_mean"], abs=0.01)
    assert got.std().item() == pytest.approx(wanted["normalised_std"], abs=0.01)
    exact = normalise(torch.from_numpy(reference.copy()).permute(2, 0, 1), spec)
    for x, y, channel, level, value in wanted["samples"]:
        assert int(reference[y, x, channel]) == level
        assert exact[channel, y, x].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "resized"),
    [
        (340, 256, (340, 256)), (320, 240, (341, 256)), (426, 240, (454, 256)), (1280, 720, (455, 256)),
        (720, 1280, (256, 455)), (568, 320, (454, 256)), (176, 100, (450, 256)), (132, 100, (337, 256)),
        (178, 100, (455, 256)),
    ],
)  # fmt: skip
def test_mit_truncates_the_long_side(width, height, resized):
    assert resized_size(height, width, MIT) == resized[::-1]


TEN_340 = [(0, 0), (116, 0), (0, 32), (116, 32), (58, 16)]
TEN_455 = [(0, 0), (228, 0), (0, 32), (228, 32), (114, 16)]


@pytest.mark.parametrize(
    ("width", "height", "crop", "px", "mmaction2", "mit"),
    [
        (455, 256, "center", 224, [(115, 16)], [(116, 16)]),
        (451, 256, "center", 224, [(113, 16)], [(114, 16)]),
        (340, 256, "center", 224, [(58, 16)], [(58, 16)]),
        (341, 256, "center", 224, [(58, 16)], [(58, 16)]),
        (340, 256, "three", 256, [(0, 0), (84, 0), (42, 0)], [(0, 0), (84, 0), (42, 0)]),
        (341, 256, "three", 256, [(0, 0), (84, 0), (42, 0)], [(0, 0), (84, 0), (42, 0)]),
        (342, 256, "three", 256, [(0, 0), (86, 0), (43, 0)], [(0, 0), (84, 0), (42, 0)]),
        (455, 256, "three", 256, [(0, 0), (198, 0), (99, 0)], [(0, 0), (196, 0), (98, 0)]),
        (451, 256, "three", 256, [(0, 0), (194, 0), (97, 0)], [(0, 0), (192, 0), (96, 0)]),
        (256, 455, "three", 256, [(0, 0), (0, 198), (0, 99)], [(0, 98), (0, 98), (0, 98)]),
        (256, 256, "three", 256, [(0, 0)] * 3, [(0, 0)] * 3),
        (340, 256, "ten", 224, TEN_340, TEN_340),
        (455, 256, "ten", 224, TEN_455, TEN_455),
    ],
)
def test_offsets_of_crops(width, height, crop, px, mmaction2, mit):
    assert crop_offsets(height, width, crop, px) == mmaction2
    assert crop_offsets(height, width, crop, px, "mit") == mit


@pytest.mark.parametrize("convention", ["mmaction2", "mit"])
@pytest.mark.parametrize(("crop", "views"), [("center", 1), ("three", 3), ("ten", 10)])
def test_views_are_cut_from_every_frame_alike(crop, views, convention):
    px = 256 if crop == "three" else 224
    frames = torch.stack(pictures((256, 342), (256, 342), seed=4))
    got = crop_views(frames, PreprocessSpec(convention=convention), crop, px)
    assert tuple(got.shape) == (views, 2, 3, px, px)
    for place, (left, top) in enumerate(crop_offsets(256, 342, crop, px, convention)):
        cut = frames[:, :, top : top + px, left : left + px]
        if crop == "ten":
            assert torch.equal(got[2 * place + 1], cut.flip(3))
        assert torch.equal(got[2 * place if crop == "ten" else place], cut)


def test_the_centre_view_is_what_serving_sees():
    frames = torch.stack(pictures((240, 320), (240, 320), seed=5))
    for spec in SPECS.values():
        assert torch.equal(crop_views(frames, spec, "center", 224)[0], resize_crop(frames, spec))
        assert torch.equal(normalise(resize_crop(frames, spec), spec), preprocess(frames, spec))


def test_crops_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match="300 px does not fit a picture of 340x256"):
        crop_offsets(256, 340, "center", 300)
    with pytest.raises(ShapeError, match="as high or wide as the picture: 224 px of 340x256"):
        crop_offsets(256, 340, "three", 224)
    assert crop_offsets(256, 340, "three", 224, "mit") == [(0, 16), (116, 16), (58, 16)]


def test_blue_may_come_first():
    frames = torch.stack(pictures((224, 224)))
    flat = PreprocessSpec(224, "exact", mean=(0, 0, 0), std=(1, 1, 1))
    swapped = PreprocessSpec(224, "exact", mean=(0, 0, 0), std=(1, 1, 1), channels="bgr")
    assert torch.equal(preprocess(frames, swapped), preprocess(frames, flat).flip(1))
