"""Parts of a picture, cut in the camera's pixels from the picture that the decoder scaled."""

import pytest
import torch

from tsm_core.crops import crop_object, crop_region
from tsm_core.errors import ShapeError
from tsm_core.frame import Frame


def frame_of(width=40, height=20, source_size=(400, 200)) -> Frame:
    """A picture whose red is the column, green the row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([columns, rows, rows * 0]).to(torch.uint8)
    return Frame("door", 0, image, 0.0, 0.0, source_size)


def window(crop):
    """(left, top, right, bottom) of the pixels that were cut out."""
    return crop[0].min().item(), crop[1].min().item(), crop[0].max().item() + 1, crop[1].max().item() + 1


@pytest.mark.parametrize(
    ("region", "cut"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0, 0, 40, 20)),
        ((0.25, 0.5, 0.75, 1.0), (10, 10, 30, 20)),
        ((0.26, 0.51, 0.74, 0.99), (10, 10, 30, 20)),  # every pixel it touches
        ((0.5, 0.5, 0.5001, 0.5001), (20, 10, 21, 11)),  # at least one
        ((0.9999, 0.9999, 1.0, 1.0), (39, 19, 40, 20)),
    ],
)
def test_a_region(region, cut):
    crop = crop_region(frame_of(), region)
    assert window(crop) == cut
    assert crop.shape == (3, cut[3] - cut[1], cut[2] - cut[0])


@pytest.mark.parametrize("size", [(40, 20), (33, 17), (240, 120), (97, 61)])
def test_a_region_is_the_same_part_at_any_scale(size):
    crop = crop_region(frame_of(*size), (0.2, 0.3, 0.7, 0.9))
    left, top, right, bottom = window(crop)
    assert left / size[0] == pytest.approx(0.2, abs=1 / size[0])
    assert top / size[1] == pytest.approx(0.3, abs=1 / size[1])
    assert right / size[0] == pytest.approx(0.7, abs=1 / size[0])
    assert bottom / size[1] == pytest.approx(0.9, abs=1 / size[1])


@pytest.mark.parametrize(
    "region", [(0.5, 0.0, 0.5, 1.0), (0.6, 0.0, 0.5, 1.0), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (0, float("nan"), 1, 1)]
)
def test_a_region_that_is_none_is_refused(region):
    with pytest.raises(ShapeError, match=r"region is .*give x1 < x2"):
        crop_region(frame_of(), region)


@pytest.mark.parametrize(
    ("xyxy", "margin", "cut"),
    [
        ((180, 80, 220, 120), 0.0, (18, 8, 22, 12)),
        ((190, 60, 210, 140), 0.0, (16, 6, 24, 14)),  # tall: a square about it
        ((190, 60, 210, 140), 0.25, (14, 4, 26, 16)),
        ((0, 0, 40, 40), 0.25, (0, 0, 6, 6)),  # moved into the picture
        ((380, 180, 420, 220), 0.25, (34, 14, 40, 20)),
        ((-20, 60, 20, 140), 0.0, (0, 6, 8, 14)),
        ((100, 0, 300, 200), 0.5, (0, 0, 40, 20)),  # as much as there is
        ((150, 20, 350, 60), 0.0, (15, 0, 35, 20)),  # as high as the picture
        ((200.1, 100.1, 200.2, 100.2), 0.0, (20, 10, 21, 11)),
        ((399.95, 199.95, 500, 300), 0.0, (29, 9, 40, 20)),
    ],
)
def test_a_square_about_an_object(xyxy, margin, cut):
    assert window(crop_object(frame_of(), xyxy, margin)) == cut


def test_a_square_of_the_cameras_from_a_picture_that_was_squeezed():
    frame = frame_of(40, 40, (400, 200))  # half as wide as it should be
    assert window(crop_object(frame, (180, 80, 220, 120), 0.0)) == (18, 16, 22, 24)


def test_the_crop_looks_into_the_picture():
    frame = frame_of()
    crop_region(frame, (0.0, 0.0, 0.5, 0.5)).fill_(9)
    assert frame.image[:, 0, 0].tolist() == [9, 9, 9]
    assert frame.image.dtype == torch.uint8


@pytest.mark.parametrize(
    "xyxy", [(-50, 0, 0, 50), (400, 0, 450, 50), (0, 200, 50, 250), (10, 10, 10, 50), (float("nan"), 0, 9, 9)]
)
def test_a_box_outside_is_refused(xyxy):
    with pytest.raises(ShapeError, match="is not in the picture of 400 x 200"):
        crop_object(frame_of(), xyxy, 0.25)
    with pytest.raises(ShapeError, match="margin is -1"):
        crop_object(frame_of(), (0, 0, 9, 9), -1)
