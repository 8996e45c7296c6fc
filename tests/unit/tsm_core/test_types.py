"""The records check themselves at birth, and a frame knows its way back to the camera's pixels."""

import pytest
import torch

from tsm_core.errors import ShapeError
from tsm_core.frame import Frame
from tsm_core.types import ActionEvent, Detection, ObjectEvent, Scores, Track


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


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    "xyxy",
    [(5.0, 0.0, 5.0, 9.0), (0.0, 9.0, 5.0, 3.0), (NAN, 0.0, 5.0, 9.0), (0.0, 0.0, INFINITE, 9.0), (0, 0, 0, 0)],
)
def test_a_box_that_is_none_is_refused(xyxy: tuple[float, float, float, float]):
    with pytest.raises(ShapeError, match="box of 'cat' must be finite"):
        Detection("cat", 0.5, xyxy)
    with pytest.raises(ShapeError, match="box of 'cat' must be finite"):
        Track("door:1", "cat", 0.5, 0.5, xyxy, 0.5, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("score", [-0.1, 1.1, NAN])
def test_a_score_is_a_probability(score: float):
    with pytest.raises(ShapeError, match=r"scores of 'cat' must be 0\.\.1"):
        Detection("cat", score, (0.0, 0.0, 1.0, 1.0))


def test_a_box_may_reach_over_the_edge():
    assert Detection("cat", 1.0, (-3.0, -2.0, 1e6, 4.0)).xyxy[0] == -3.0


@pytest.mark.parametrize(
    ("phase", "told", "end_time_s"),
    [("new", True, None), ("update", False, None), ("end", True, None), ("update", True, 2.0), ("new", False, 2.0)],
)
def test_an_object_event_has_what_its_phase_has(phase: str, told: bool, end_time_s: float | None):
    track = Track("door:1", "cat", 0.5, 0.5, (0.0, 0.0, 1.0, 1.0), 0.5, 0.0, 0.0, 0.0)
    before = track if told else None
    with pytest.raises(ShapeError, match="only a"):
        ObjectEvent("door", phase, before, track, "d", 1, 0.0, 0.0, (9, 9), (), end_time_s)  # type: ignore[arg-type]
    assert ObjectEvent("door", "update", track, track, "d", 1, 0.0, 0.0, (9, 9)).track_id == "door:1"
