import pytest

from tsm_core.cost import multiply_adds, parameters
from tsm_core.detector_recipes import DETECTOR_RECIPES
from tsm_core.recipes import find_recipe


@pytest.mark.parametrize(
    ("name", "gmac"),
    [
        ("tsm_r50_1x1x8_50e_kinetics400_rgb__ss256", 32.7),  # of 8 frames, a ResNet-50's 4.1 each
        ("tsm_r50_1x1x16_50e_sthv2_rgb", 65.4),
        ("mobilenetv2_jester_online", 0.3),  # stepped: of one frame
    ],
)
def test_a_result_costs_what_its_frames_cost(name, gmac):
    assert multiply_adds(find_recipe(name)) / 1e9 == pytest.approx(gmac, rel=0.01)


def test_a_detector_costs_what_torchvision_publishes():
    assert multiply_adds(DETECTOR_RECIPES["ssdlite320_mobilenet_v3_large"]) / 1e9 == pytest.approx(0.583, rel=0.02)


def test_the_past_costs_nothing():
    sees_past, still = (DETECTOR_RECIPES[name] for name in ("moving_shapes_tsm", "moving_shapes_still"))
    assert multiply_adds(sees_past) == multiply_adds(still)
    assert parameters(sees_past) == parameters(still)
