"""The shipped detector finds what cameras show that it has never seen, frame by frame, through codec and scaling."""

from __future__ import annotations

import json

import pytest
import torch

from pipelines.box_data import BoxVideo
from pipelines.box_evaluate import run_box_evaluation
from pipelines.box_judging import watch
from pipelines.box_scoring import score
from pipelines.model_card import card_files
from pipelines.scene_boxes import FILMS, FIRST_SEED, sent_film
from pipelines.scenes import KINDS
from tsm_core.checkpoints import load_model
from tsm_core.detector import TSMDetector
from tsm_core.detector_recipes import DETECTOR_RECIPES
from tsm_core.model_file import read_card
from tsm_core.zoo import find_model

NAME = "scenes_detector"


class Films:
    """The films of some seeds, as the service sees them when a camera shows them. BoxVideos."""

    labels = KINDS

    def __init__(self, seeds: range, frames: int) -> None:
        self.seeds, self.frames, self.identity = seeds, frames, f"{seeds} {frames}"

    def __len__(self) -> int:
        return len(self.seeds)

    def video(self, index: int) -> BoxVideo:
        return sent_film(self.seeds[index], self.frames)


@pytest.fixture(scope="module")
def detector():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waits for no other thread when the machine is busy
    model = load_model(find_model(NAME))
    assert isinstance(model, TSMDetector)
    yield model.for_inference()
    torch.set_num_threads(threads)


def _figures(model: TSMDetector, films: Films) -> dict[str, float]:
    judged = [each.judged for each in watch(model, films, range(len(films)))]
    figures, _ = score([each for each in judged if each is not None], KINDS)
    return figures


@pytest.mark.parametrize(
    ("seeds", "frames", "floor"),
    [
        (range(80_000, 80_012), 32, 0.85),
        (range(1, 5), 75, 0.75),  # the demo's cameras
    ],
)
def test_it_finds_what_unseen_cameras_show(detector: TSMDetector, seeds: range, frames: int, floor: float):
    for first in FIRST_SEED.values():
        assert seeds.stop <= first
    figures = _figures(detector, Films(seeds, frames))
    assert figures["vid_all"] >= floor, figures
    assert figures["coco_ap50"] >= floor, figures


def test_card_says_how_it_was_made():
    recipe, card = read_card(find_model(NAME))
    assert recipe.labels == KINDS
    assert card["command"].startswith("tsm train scenes_detector")
    assert card["steps"] > 0
    assert card["data"]["videos"] == FILMS["train"]
    text = find_model(NAME).with_suffix(".md").read_text(encoding="utf-8")
    assert card["command"] in text


def test_weights_are_small():
    assert find_model(NAME).stat().st_size <= 6_000_000


def test_an_evaluation_leaves_a_card(tmp_path):
    out = tmp_path / "found.json"
    result = run_box_evaluation(DETECTOR_RECIPES[NAME], NAME, limit=1, out=out, command="tsm evaluate it")
    text, picture = card_files(out)
    assert result["card"] == json.loads(out.read_text())["card"] == str(text)
    told = text.read_text()
    assert f"| vid_all | {result['percent']['vid_all']:.2f} % |" in told
    assert "tsm evaluate it" in told
    assert f"]({picture.name})" in told
    assert picture.is_file()
