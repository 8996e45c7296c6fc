"""Parts of a picture: what a recogniser looks at when it does not look at all of it."""

from __future__ import annotations

import math

from torch import Tensor

from tsm_core.errors import ShapeError
from tsm_core.frame import Frame
from tsm_core.types import Box


def crop_region(frame: Frame, region: Box) -> Tensor:
    """The region (x1, y1, x2, y2), in shares of the picture, as uint8 (3, h, w); no copy. Raises ShapeError."""
    x1, y1, x2, y2 = region
    if not (0.0 <= x1 < x2 <= 1.0 and 0.0 <= y1 < y2 <= 1.0):
        raise ShapeError(f"region is {region}; give x1 < x2 and y1 < y2 as shares of the picture, 0..1")
    width, height = frame.source_size
    return _cut(frame, (x1 * width, y1 * height, x2 * width, y2 * height))


def crop_object(frame: Frame, xyxy: Box, margin: float) -> Tensor:
    """A square around a box in source pixels, with `margin` of its longer side about it, as uint8 (3, h, w); no copy.

    The square is the camera's, and moves into the picture where it reaches over the edge; what is larger than the
    picture is cut off. So a recogniser, which takes the middle of what it gets, sees all of the object. Raises
    ShapeError when the box is not in the picture at all.
    """
    if margin < 0:
        raise ShapeError(f"margin is {margin}; give 0 or more")
    width, height = frame.source_size
    x1, y1, x2, y2 = xyxy
    if not (x1 < x2 and y1 < y2 and x1 < width and y1 < height and x2 > 0 and y2 > 0):
        raise ShapeError(f"box {xyxy} is not in the picture of {width} x {height}")
    side = max(x2 - x1, y2 - y1) * (1 + 2 * margin)
    left = min(max((x1 + x2 - side) / 2, 0.0), max(width - side, 0.0))
    top = min(max((y1 + y2 - side) / 2, 0.0), max(height - side, 0.0))
    return _cut(frame, (left, top, min(left + side, width), min(top + side, height)))


def _cut(frame: Frame, xyxy: Box) -> Tensor:
    """The pixels that a box inside the picture touches, at least one."""
    _, height, width = frame.image.shape
    to_x, to_y = frame.to_source
    # a hair within: a box that ends on a pixel's edge does not touch the next
    left, right = min(math.floor(xyxy[0] / to_x + 1e-6), width - 1), math.ceil(xyxy[2] / to_x - 1e-6)
    top, bottom = min(math.floor(xyxy[1] / to_y + 1e-6), height - 1), math.ceil(xyxy[3] / to_y - 1e-6)
    return frame.image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
