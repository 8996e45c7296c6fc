"""Letterboxes there and back, and which boxes are boxes."""

import pytest
import torch

from tsm_core.boxes import Boxes, cleaned, detections_of, detections_on, letterbox_of, letterboxed
from tsm_core.errors import ShapeError
from tsm_core.frame import Frame

NAN, INF = float("nan"), float("inf")
SOURCES = [(1280, 720), (320, 320), (720, 1280), (33, 200), (1, 1), (4000, 3)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [(320, 320), (96, 96), (192, 320), (512, 896)])
def test_there_and_back(source, size):
    box = letterbox_of(source, size)
    corners = torch.tensor([[0.0, 0.0, *source], [0.1, 0.2, source[0] / 2, source[1] / 3]], dtype=torch.float64)
    inside = box.to_input(corners)
    assert torch.allclose(box.to_source(inside), corners, atol=1e-6)
    # the whole picture lies inside, touches two sides, and is in the middle (to a pixel of rounding)
    left, top, right, bottom = inside[0].tolist()
    assert min(left, top) == 0
    assert right <= size[1] + 1
    assert bottom <= size[0] + 1
    assert abs(left - (size[1] - right)) <= 2
    assert abs(top - (size[0] - bottom)) <= 2


@pytest.mark.parametrize("source", SOURCES[:4])
def test_a_scaled_picture_fills_its_letterbox(source):
    picture = torch.randint(0, 255, (2, 3, source[1], source[0]), dtype=torch.uint8)
    scaled, (left, right, top, bottom) = letterboxed(picture, (96, 160))
    assert (scaled.shape[3] + left + right, scaled.shape[2] + top + bottom) == (160, 96)
    box = letterbox_of(source, (96, 160))
    assert (box.left, box.top) == (left, top)
    assert min(left, right, top, bottom) >= 0


def test_a_picture_without_pixels_says_so():
    with pytest.raises(ShapeError, match="0x5 has no pixels"):
        letterbox_of((0, 5), (96, 96))


BOXES = [
    ((10, 10, 20, 20), (10, 10, 20, 20)),
    ((-5, -5, 20, 20), (0, 0, 20, 20)),  # over the edge: clipped
    ((90, 40, 500, INF), None),
    ((90, 40, 500, 500), (90, 40, 100, 50)),
    ((101, 10, 120, 20), None),  # outside
    ((-9, -9, -1, -1), None),
    ((20, 10, 10, 20), None),  # turned round
    ((10, 10, 10, 20), None),  # without a side
    ((10, 10, 10.4, 20), None),
    ((NAN, 1, 5, 5), None),
]


@pytest.mark.parametrize(("box", "wanted"), BOXES)
def test_what_is_a_box(box, wanted):
    clipped, fine = cleaned(torch.tensor([box]), (100, 50))
    assert fine.tolist() == [wanted is not None]
    if wanted:
        assert clipped[0].tolist() == list(wanted)


def test_detections_are_in_source_pixels_and_clean():
    letterbox = letterbox_of((200, 100), (96, 96))  # scale 0.48, 24 px above
    wanted = torch.tensor([[50.0, 20.0, 150.0, 80.0], [-10.0, 10.0, 30.0, 40.0], [300.0, 0.0, 310.0, 9.0]])
    boxes = Boxes(letterbox.to_input(wanted), torch.tensor([0.9, 0.5, 0.4]), torch.tensor([1, 0, 1]))
    first, second = detections_of(boxes, ("a", "b"), letterbox, (200, 100))
    assert (first.label, second.label) == ("b", "a")
    assert first.score == pytest.approx(0.9)
    assert first.xyxy == pytest.approx((50, 20, 150, 80), abs=1e-3)
    assert second.xyxy == pytest.approx((0, 10, 30, 40), abs=1e-3)


def test_no_boxes_are_no_detections():
    none = Boxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert len(none) == 0
    assert detections_of(none, ("a",), letterbox_of((9, 9), (96, 96)), (9, 9)) == []


@pytest.mark.parametrize("decoded", [(100, 50), (400, 200), (100, 100)])
def test_detections_do_not_depend_on_the_decoders_size(decoded):
    width, height = decoded
    frame = Frame("s", 0, torch.zeros(3, height, width, dtype=torch.uint8), 0.0, 0.0, source_size=(400, 200))
    in_picture = torch.tensor([[0.25, 0.2, 0.75, 0.8]]) * torch.tensor([width, height, width, height])
    boxes = Boxes(letterbox_of(decoded, (96, 96)).to_input(in_picture), torch.tensor([0.9]), torch.tensor([0]))
    (found,) = detections_on(frame, boxes, ("a",), (96, 96))
    assert found.xyxy == pytest.approx((100, 40, 300, 160), abs=1e-2)


def test_boxes_check_themselves():
    with pytest.raises(ShapeError, match=r"\(M, 4\)"):
        Boxes(torch.zeros(2, 4), torch.zeros(1), torch.zeros(2, dtype=torch.int64))
