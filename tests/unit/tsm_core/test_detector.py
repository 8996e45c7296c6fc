"""The laws of a detector that is stepped, on its dense outputs, and what becomes of those."""

import torch

from tsm_core.checkpoints import load_detector, read_card, save_model
from tsm_core.detector import build_detector
from tsm_core.detector_recipes import MOVING_SHAPES_TSM


def test_a_saved_detector_is_the_same(tmp_path):
    model = build_detector(MOVING_SHAPES_TSM).eval()
    save_model(tmp_path / "model.safetensors", model, {"note": "random"})
    again = load_detector(tmp_path / "model.safetensors")
    assert read_card(tmp_path / "model.safetensors") == (MOVING_SHAPES_TSM, {"note": "random"})
    clip = torch.randn(1, 3, 3, *model.input_size)
    with torch.no_grad():
        ours, theirs = model(clip), again(clip)
    assert all(torch.allclose(ours.outputs[name], theirs.outputs[name], atol=1e-6) for name in ours.outputs)
