"""Evaluation against a plain second calculation of the whole road, and what it does about videos that are broken."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.datasets import VideoRecord
from pipelines.decoding import UnreadableVideo
from pipelines.evaluate import TooManyUnreadable, evaluate
from pipelines.journal import Journal
from pipelines.scoring import CropDoesNotFit, NotFinite, Videos
from tests.unit.pipelines.evaluate_kit import make_videos, model_of, pictures, recipe_of, write_folder, write_video
from tsm_core.model import TSM
from tsm_core.preprocess import normalise
from tsm_core.preprocess_spec import IMAGENET_MEAN, IMAGENET_STD
from tsm_core.recipes import Recipe, Views


@pytest.fixture(autouse=True)
def _single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    return make_videos(tmp_path_factory.mktemp("videos"))


# ---- the second calculation


def own_indices(count: int, frames: int, clips: str) -> list[list[int]]:
    if clips == "dense":
        last = max(0, count - 64)
        starts = [int(place * last / 9) if place < 9 else last for place in range(10)]
        return [[(start + step * (64 // frames)) % count for step in range(frames)] for start in starts]
    found = [[int(count / frames * (i + 0.5)) for i in range(frames)]]
    return found if clips == "uniform" else [*found, [int(count / frames * i) for i in range(frames)]]


def own_resized(picture: Image.Image, convention: str) -> np.ndarray:
    width, height = picture.size
    short = min(width, height)
    if convention == "mit":
        size = (40 * width // short, 40 * height // short)
        return np.asarray(picture if short == 40 else picture.resize(size, Image.Resampling.BILINEAR), float)
    wide, high = int(40 / short * width + 0.5), int(40 / short * height + 0.5)
    pixels = np.asarray(picture, float)
    for axis, old, new in ((0, height, high), (1, width, wide)):  # without antialiasing, centres aligned
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        below = np.floor(at).astype(int)
        above = np.minimum(below + 1, old - 1)
        part = (at - below).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        pixels = np.take(pixels, below, axis) * (1 - part) + np.take(pixels, above, axis) * part
    return np.floor(pixels + 0.5)


def own_corners(width: int, height: int, views: Views, convention: str) -> list[tuple[int, int]]:
    px = views.crop_px
    x, y = width - px, height - px
    if views.crop == "center":
        return [(round(x / 2), round(y / 2))] if convention == "mit" else [(x // 2, y // 2)]
    if views.crop == "ten":
        return [(4 * (x // 4) * i // 2, 4 * (y // 4) * j // 2) for i, j in ((0, 0), (2, 0), (0, 2), (2, 2), (1, 1))]
    if convention == "mit":
        return [(0, 2 * (y // 4)), (4 * (x // 4), 2 * (y // 4)), (2 * (x // 4), 2 * (y // 4))]
    return [(0, 0), (x // 2 * 2, y // 2 * 2), (x // 2, y // 2)]


def own_shares(model: TSM, folder: Path, count: int, recipe: Recipe, views: Views) -> np.ndarray:
    """Probabilities of one folder, view by view."""
    logits = []
    for indices in own_indices(count, recipe.frames, views.clips):
        frames = [own_resized(Image.open(folder / f"img_{i + 1:05}.jpg"), recipe.convention) for i in indices]
        height, width = frames[0].shape[:2]
        for x, y in own_corners(width, height, views, recipe.convention):
            clip = np.stack([frame[y : y + views.crop_px, x : x + views.crop_px] for frame in frames])
            for seen in [clip, clip[:, :, ::-1]] if views.crop == "ten" else [clip]:
                network_input = (seen / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
                tensor = torch.tensor(network_input.transpose(0, 3, 1, 2)[None], dtype=torch.float32)
                with torch.no_grad():
                    logits.append(model(tensor)[0].double().numpy())
    powers = np.exp(np.stack(logits))
    if recipe.convention == "mit":
        powers = np.exp(np.mean(logits, axis=0))[None]
    return (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)


def check(predictions, model: TSM, videos: Videos, recipe: Recipe, views: Views) -> None:
    """The same probabilities: a level of grey may differ where pictures were resized, else nothing may."""
    for prediction, record in zip(predictions, videos.records, strict=True):
        folder = videos.root / record.path
        resized = min(Image.open(folder / "img_00001.jpg").size) != 40
        shares = own_shares(model, folder, record.frames, recipe, views)
        close = partial(pytest.approx, abs=0.03 if resized else 1e-5)
        assert [share for _, share in prediction.top] == close(sorted(shares)[:-6:-1])
        assert [shares[index] for index, _ in prediction.top] == close(sorted(shares)[:-6:-1])
        assert (prediction.path, prediction.label) == (record.path, record.label)
    assert len({prediction.top[0][0] for prediction in predictions}) > 2


@pytest.mark.parametrize(
    ("convention", "views"),
    [
        ("mmaction2", Views(crop_px=36)),
        ("mit", Views(crop_px=36)),
        ("mmaction2", Views("twice", "three", 40)),
        ("mit", Views("twice", "three", 36)),
        ("mmaction2", Views("dense", "center", 40)),
        ("mit", Views("dense", "three", 40)),
        ("mmaction2", Views("uniform", "ten", 36)),
        ("mit", Views("twice", "ten", 36)),
    ],
    ids=str,
)
def test_predictions_are_those_of_a_second_calculation(videos, convention, views):
    recipe = recipe_of(convention)
    model = model_of(recipe)
    found = evaluate(model_of(recipe), recipe, videos, views)
    check(found, model, videos, recipe, views)


# ---- every way to run it gives the same


CENTER = Views(crop_px=36)


def test_files_give_what_their_frames_give(videos, tmp_path):
    recipe = recipe_of()
    frames = pictures(7, 30, 71, 40)
    write_video(tmp_path / "a.mp4", [np.pad(frame, ((0, 0), (0, 1), (0, 0)), "edge") for frame in frames])
    with av.open(str(tmp_path / "a.mp4")) as film:
        decoded = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    (tmp_path / "b").mkdir()
    listed = Videos((VideoRecord("a.mp4", 2),), tmp_path)
    (found,) = evaluate(model_of(recipe), recipe, listed, CENTER)
    clip = torch.from_numpy(np.stack([decoded[i] for i in (3, 11, 18, 26)])).permute(0, 3, 1, 2)[None]
    with torch.no_grad():
        shares = model_of(recipe)(normalise(clip[..., 2:38, 18:54], recipe.preprocess)).softmax(1)[0]
    assert found.top[0] == (int(shares.argmax()), pytest.approx(float(shares.max()), abs=1e-4))
    assert found.label == 2


@pytest.mark.parametrize("views", [CENTER, Views("twice", "three", 40)], ids=str)
def test_batches_and_loaders_change_nothing(videos, views):
    recipe = recipe_of()
    plain = evaluate(model_of(recipe), recipe, videos, views, loaders=0)
    assert evaluate(model_of(recipe), recipe, videos, views, loaders=2) == plain
    for batch in (4, 100):
        batched = evaluate(model_of(recipe), recipe, videos, views, batch=batch)
        for one, other in zip(batched, plain, strict=True):
            assert [share for _, share in one.top] == pytest.approx([share for _, share in other.top], abs=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_in_two_goes_equals_one(videos, tmp_path, batch):
    recipe = recipe_of()
    whole = evaluate(model_of(recipe), recipe, videos, CENTER, batch=batch)

    class Stop(Exception):
        pass

    def stop(done, *_):
        if done >= 3:
            raise Stop

    with Journal(tmp_path / "journal", {}) as journal, pytest.raises(Stop):
        evaluate(model_of(recipe), recipe, videos, CENTER, batch=batch, journal=journal, on_progress=stop)
    calls = []
    with Journal(tmp_path / "journal", {}, resume=True) as journal:
        assert len(journal.found) == 3
        again = evaluate(
            model_of(recipe),
            recipe,
            videos,
            CENTER,
            batch=batch,
            journal=journal,
            on_progress=lambda *a: calls.append(a),
        )
    assert again == whole
    assert [done for done, _, _ in calls] == ([3, 4, 5, 6] if batch == 1 else [3, 6])
    with Journal(tmp_path / "journal", {}, resume=True) as journal:
        assert (
            evaluate(lambda _: pytest.fail("nothing is left to do"), recipe, videos, CENTER, journal=journal) == whole
        )


def test_progress_tells_hits_pace_and_time_left(videos):
    recipe = recipe_of()
    told = []
    found = evaluate(model_of(recipe), recipe, videos, CENTER, on_progress=lambda *all: told.append(all))
    assert [(done, total) for done, total, _ in told] == [(done, 6) for done in range(7)]
    hits = sum(each.top[0][0] == each.label for each in found)
    assert told[0][2].top1 is None
    assert told[0][2].eta_s is None
    assert told[-1][2].top1 == hits / 6
    assert told[-1][2].eta_s == 0
    assert told[-1][2].videos_per_s > 0


@pytest.mark.parametrize("shift", ["uni", "none"])
def test_networks_of_other_shifts_are_tested_alike(videos, shift):
    recipe = recipe_of(shift=shift)
    found = evaluate(model_of(recipe), recipe, videos, CENTER)
    check(found, model_of(recipe), videos, recipe, CENTER)


# ---- what can go wrong


@pytest.fixture
def broken(videos, tmp_path) -> Videos:
    """Two good folders, one without its third frame, one that is not there, and a file that is no video."""
    for number in (0, 1):
        write_folder(tmp_path / f"good {number}", pictures(number, 8, 53, 40))
    write_folder(tmp_path / "holed", pictures(3, 8, 53, 40))
    (tmp_path / "holed" / "img_00004.jpg").unlink()
    (tmp_path / "text.mp4").write_text("no video")
    names = ("good 0", "holed", "absent", "text.mp4", "good 1")
    return Videos(tuple(VideoRecord(name, 0, None if name == "text.mp4" else 8) for name in names), tmp_path)


@pytest.mark.parametrize("loaders", [0, 1])
def test_unreadable_videos_are_skipped_and_named(broken, loaders):
    recipe, told = recipe_of(), []
    found = evaluate(
        model_of(recipe),
        recipe,
        broken,
        CENTER,
        batch=2,
        loaders=loaders,
        max_skipped=0.6,
        on_progress=lambda *all: told.append(all),
    )
    assert [bool(each.top) for each in found] == [True, False, False, False, True]
    for each, word in zip(found[1:4], ("img_00004.jpg is missing", "does not exist", "no whole video"), strict=True):
        assert word in each.error
        assert str(broken.root / each.path) in each.error
    assert told[-1][2].skipped == 3


def test_more_unreadable_ones_than_allowed_end_it(broken):
    recipe = recipe_of()
    with pytest.raises(TooManyUnreadable, match=r"3 of 4 videos cannot be read, and 2.5 of 5 is the most; .*holed"):
        evaluate(model_of(recipe), recipe, broken, CENTER)
    with pytest.raises(UnreadableVideo, match="holed"):
        evaluate(model_of(recipe), recipe, broken, CENTER, on_error="raise")
    nothing = replace(broken, records=broken.records[2:4])
    for most in (0.0, 1.0):
        with pytest.raises(TooManyUnreadable, match="none of") as caught:
            evaluate(model_of(recipe), recipe, nothing, CENTER, max_skipped=most)
        assert caught.value.reason == "no_readable_videos"


def test_crops_that_do_not_fit_are_refused_before_anything_is_read(videos):
    nothing = Videos((), Path())
    with pytest.raises(CropDoesNotFit, match=r"crops of 41 px .* is 40 px .* --crop-px 40 or less"):
        evaluate(model_of(recipe_of()), recipe_of(), nothing, Views(crop_px=41))
    with pytest.raises(CropDoesNotFit, match=r"three crops of 36 px.*--crop-px 40"):
        evaluate(model_of(recipe_of()), recipe_of(), nothing, Views(crop="three", crop_px=36))
    recipe = recipe_of("mit")
    evaluate(model_of(recipe), recipe, replace(videos, records=videos.records[:1]), Views(crop="three", crop_px=36))


def test_scores_that_are_no_numbers_end_it(videos):
    recipe = recipe_of()
    model = model_of(recipe)
    with torch.no_grad():
        model.net.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match="video_0: the model's scores are no numbers"):
        evaluate(model, recipe, videos, CENTER)
