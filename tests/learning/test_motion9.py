"""The shipped weights keep their promise on films they have never seen, and time is what they live by."""

from __future__ import annotations

import pytest
import torch

from pipelines.camera import viewed_pictures
from pipelines.scenes import LABELS, Scene
from pipelines.train_motion import evaluate_streams, step_films
from tsm_core.checkpoints import load_model
from tsm_core.model import TSM
from tsm_core.model_file import read_card
from tsm_core.zoo import find_model

UNSEEN = range(70_000, 70_008)


def _load(name: str) -> TSM:
    model = load_model(find_model(name))
    assert isinstance(model, TSM)
    return model


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waits for no other thread when the machine is busy
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def motion9() -> TSM:
    return _load("motion9")


@pytest.fixture(scope="module")
def motion9_none() -> TSM:
    return _load("motion9_none")


def test_motion9_knows_unseen_streams(motion9: TSM):
    score = evaluate_streams(motion9, UNSEEN, seconds=36, size_px=128)
    assert score.settled >= 0.97
    assert set(score.by_label) == set(LABELS)
    assert min(score.by_label.values()) >= 0.85, score.by_label
    assert score.intervals >= 0.97


def test_motion9_knows_what_a_camera_sends(motion9: TSM):
    score = evaluate_streams(motion9, range(71_000, 71_003), seconds=24, size_px=320, pictures=viewed_pictures)
    assert score.settled >= 0.97, score


@pytest.mark.slow
def test_without_shift_it_stays_at_chance(motion9_none: TSM):
    # it says much the same whatever it sees, so a few films could flatter it by the labels they happen to hold
    score = evaluate_streams(motion9_none, range(70_000, 70_016), seconds=36, size_px=128)
    assert score.settled <= 0.20
    assert sum(score.by_label.values()) / len(LABELS) <= 0.20, score.by_label


def test_without_shift_time_may_run_backwards(motion9: TSM, motion9_none: TSM):
    scenes = [Scene(seed, 128) for seed in range(72_000, 72_004)]
    images = [torch.from_numpy(scene.frame(number)).permute(2, 0, 1) for scene in scenes for number in range(20, 36)]
    clip = motion9.preprocess(images).view(4, 16, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(motion9_none(clip), motion9_none(clip.flip(1)), rtol=0, atol=1e-5)
        assert (motion9(clip) - motion9(clip.flip(1))).abs().max() > 1


def test_stepping_films_equals_the_clip(motion9: TSM):
    scenes = [Scene(seed, 128) for seed in range(72_000, 72_003)]
    stepped = step_films(motion9, scenes, 24)
    images = [torch.from_numpy(scene.frame(number)).permute(2, 0, 1) for scene in scenes for number in range(24)]
    with torch.no_grad():
        whole = motion9.forward_frames(motion9.preprocess(images).view(3, 24, 3, 64, 64))
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["motion9", "motion9_none"])
def test_card_says_how_it_was_made(name: str):
    recipe, card = read_card(find_model(name))
    assert recipe.labels == LABELS
    assert card["command"].startswith("python -m pipelines.train_motion")
    assert set(card["scores"]["drawn"]["by_label"]) == set(LABELS)
    assert card["steps"] > 0
    text = find_model(name).with_suffix(".md").read_text(encoding="utf-8")
    assert card["command"] in text


def test_weights_are_small():
    sizes = [find_model(name).stat().st_size for name in ("motion9", "motion9_none")]
    assert sum(sizes) <= 6_000_000
