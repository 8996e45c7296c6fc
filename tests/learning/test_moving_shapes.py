"""The shipped detectors of moving-shapes, judged again: the one with a sense of time finds more."""

import json

import pytest
import torch

from pipelines.box_scoring import compare
from tests.benchmark.moving_shapes import ARMS, DEGRADED, SEEDS, SINGLE, TSM, detector, found_by, judge
from tests.benchmark.run import RESULTS
from tsm_core.model_file import read_card
from tsm_core.zoo import find_model

LEAST, LEAST_DEGRADED = 0.05, 0.08  # AP50 that time must be worth


@pytest.fixture(scope="module")
def judged():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {arm: judge(found_by(detector(find_model(arm)))) for arm in ARMS}
    torch.set_num_threads(threads)
    return found


@pytest.mark.slow  # two networks look at all test films: three minutes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arm", ARMS)
def test_the_shipped_detector_scores_as_its_card_says(judged, arm):
    card = read_card(find_model(arm))[1]["moving_shapes"]
    for name, share in judged[arm][0].items():
        assert share == pytest.approx(card[name], abs=0.005)


@pytest.mark.slow
def test_time_helps_most_where_a_frame_tells_little(judged):
    (still, one), (moving, other) = judged[SINGLE], judged[TSM]
    assert moving["all"] - still["all"] >= LEAST
    for name in DEGRADED:
        assert moving[name] - still[name] >= LEAST_DEGRADED
        assert compare(other[name], one[name], samples=200).low > 0


def test_every_seed_says_the_same():
    result = json.loads((RESULTS / "moving_shapes.json").read_text())
    gaps = {(gap["seed"], gap["of"]): gap for gap in result["gaps"] if gap["against"] == SINGLE}
    for seed in SEEDS:
        assert gaps[seed, "all"]["gap"] >= LEAST
        assert min(gaps[seed, name]["gap"] for name in DEGRADED) >= LEAST_DEGRADED
        assert all(gaps[seed, name]["low"] > 0 for name in ("all", *DEGRADED))
