"""The records check themselves at birth, and a frame knows its way back to the camera's pixels."""

import pytest
import torch

from tsm_core.errors import ShapeError
from tsm_core.types import ActionEvent, Frame, Scores


def test_a_frame_maps_back_to_the_cameras_pixels():
    frame = Frame("door", 7, torch.zeros(3, 256, 320, dtype=torch.uint8), 0.5, 1_000_000.5, (1280, 768))
    assert frame.to_source == (4.0, 3.0)
    assert repr(frame) == "Frame(door#7, 3x256x320, pts 0.500 s, time 1000000.500 s)"


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 4, 4), torch.zeros(4, 4, 3, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)]
)
def test_a_picture_of_another_kind_is_no_frame(image: torch.Tensor):
    with pytest.raises(ShapeError, match="uint8 \\(3, H, W\\), got"):
        Frame("door", 0, image, 0.0, 0.0, (4, 4))


def test_scores_name_the_best_first():
    scores = Scores(("left", "right", "still"), (0.1, 0.7, 0.2), 7, 7)
    assert scores.top(2) == (("right", 0.7), ("still", 0.2))
    with pytest.raises(ShapeError, match="1 labels but 2 values"):
        Scores(("left",), (0.1, 0.9), 0, 7)


@pytest.mark.parametrize(("phase", "end_time_s"), [("new", 2.0), ("end", None)])
def test_only_an_end_has_an_end_time(phase: str, end_time_s: float | None):
    with pytest.raises(ShapeError, match="only an end"):
        ActionEvent("door", "a", phase, "left", 0.9, 0.9, (), "motion9", 1, 0.1, 1.0, 0.9, 0.0, end_time_s)  # type: ignore[arg-type]
