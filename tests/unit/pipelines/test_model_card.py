"""The card of a model that was trained a moment ago, as its evaluation leaves it."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.evaluate import run_evaluation
from pipelines.model_card import card_files
from pipelines.train import fit
from tests.unit.pipelines.evaluate_kit import write_folder
from tests.unit.pipelines.training_kit import RECIPE, Moving, moving_job
from tsm_core.checkpoints import save_model
from tsm_core.model import build
from tsm_core.model_file import read_card


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work dir, and a list of videos that it was not trained on."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("card")
    fit(moving_job(folder / "work", seed=3))
    videos = Moving(4, 6)
    lines = []
    for number in range(len(videos)):
        clip, label = videos.clip(number, np.random.default_rng(number))
        write_folder(folder / "videos" / str(number), [frame.permute(1, 2, 0).numpy() for frame in clip])
        lines.append(f"{number} 6 {label}\n")
    (folder / "videos" / "list.txt").write_text("".join(lines))
    return folder


def evaluated(folder, checkpoint, out):
    return run_evaluation(
        RECIPE, checkpoint, list_file=folder / "videos/list.txt", out=out, loaders=0, command="tsm evaluate moving_uni"
    )


def test_a_card_tells_what_the_run_and_its_evaluation_tell(trained, tmp_path):
    out = tmp_path / "moving.json"
    result = evaluated(trained, trained / "work/best.safetensors", out)
    text, picture = card_files(out)
    assert result["card"] == json.loads(out.read_text())["card"] == str(text)
    card = text.read_text()
    _, source = read_card(trained / "work/best.safetensors")
    assert card.startswith("# moving_uni\n")
    for value in result["percent"].values():
        assert f"{value:.2f} %" in card
    assert f"| seed | {source['seed']} |" in card
    assert source["seed"] == 3
    assert f"| epochs, steps | {source['epochs']}, {source['steps']} |" in card
    assert f"| learning rate | {source['lr']} |" in card
    assert result["checkpoint"]["sha256"] in card
    assert result["list_sha256"] in card
    (commands,) = re.findall(r"```sh\n(.*?)\n```", card, re.DOTALL)
    assert commands.splitlines() == ["a command", "tsm evaluate moving_uni"]
    for name, value in {**source["versions"], **result["run"]["versions"]}.items():
        assert f"{name} {value}" in card
    recipe = json.loads(re.findall(r"```json\n(.*?)\n```", card, re.DOTALL)[0])
    assert (recipe["training"]["epochs"], recipe["backbone"]) == (2, "resnet_small")
    assert f"]({picture.name})" in card
    with Image.open(picture) as curves:
        assert len(set(curves.convert("RGB").crop((76, 70, 800, 290)).tobytes())) > 4, "something is drawn"


def test_weights_of_others_get_none(trained, tmp_path):
    save_model(tmp_path / "other.safetensors", build(RECIPE), {"note": "from elsewhere"})
    out = tmp_path / "other.json"
    assert "card" not in evaluated(trained, tmp_path / "other.safetensors", out)
    assert out.is_file()
    assert not any(path.exists() for path in card_files(out))
