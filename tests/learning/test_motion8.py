"""The shipped motion8 networks, judged again: with time nearly all directions, without it exactly half of them."""

import json

import pytest
import torch

from tests.benchmark.motion8 import ARMS, SEEDS, judge
from tests.benchmark.run import RESULTS
from tsm_core.checkpoints import load_model
from tsm_core.model_file import read_card
from tsm_core.zoo import find_model


@pytest.fixture(autouse=True, scope="module")
def _single():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("arm", ARMS)
def test_the_shipped_network_scores_as_its_card_says(arm):
    found = judge(load_model(find_model(arm)))
    card = read_card(find_model(arm))[1]["motion8"]
    for name, share in found.items():
        assert share == pytest.approx(card[name], abs=0.005)
    if arm == "motion8_tsm":
        assert found["top1"] >= 0.95
    else:  # both directions of a clip get the same logits
        assert found["direction_given_pair"] == 0.5
        assert found["top1"] <= 0.5


def test_every_seed_says_the_same():
    runs = json.loads((RESULTS / "motion8.json").read_text())["runs"]
    assert {(run["recipe"], run["seed"]) for run in runs} == {(arm, seed) for arm in ARMS for seed in SEEDS}
    for run in runs:
        if run["recipe"] == "motion8_tsm":
            assert run["top1"] >= 0.95
        else:
            assert run["direction_given_pair"] == 0.5
