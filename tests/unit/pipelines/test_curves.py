from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.curves import COLOURS, contact_sheet, curves_picture, save_curves, ticks

POINTS = [[step, 0.1 if step < 30 else 0.01, 3 - step / 20] for step in range(5, 45, 5)]
HISTORY = [
    {"epoch": epoch, "step": 20 * epoch, "loss": 2 / epoch, "train_top1": 0.4 * epoch, "val_loss": 2.2 / epoch}
    | {"top1": 0.3 * epoch, "top5": 0.5 * epoch, "mean_class": 0.25 * epoch}
    for epoch in (1, 2)
]


def colours_in(picture: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()}


def test_every_line_is_drawn():
    picture = curves_picture(POINTS, HISTORY, "a recipe")
    assert set(COLOURS) <= colours_in(picture)
    # the loss falls: its line is higher at the left
    blue = np.argwhere((np.asarray(picture)[70:290] == COLOURS[0]).all(2))
    inside = blue[blue[:, 1] < 800]
    assert inside[inside[:, 1].argmin(), 0] < inside[inside[:, 1].argmax(), 0]


def test_accuracies_are_left_out_where_there_are_none():
    bare = curves_picture(POINTS, [], "a recipe")
    assert bare.height < curves_picture(POINTS, HISTORY, "a recipe").height
    assert COLOURS[1] not in colours_in(bare)


def test_nothing_and_no_numbers_can_be_drawn(tmp_path):
    assert curves_picture([], [], "nothing yet").size[0] == 960
    save_curves(tmp_path / "curves.png", [[1, 0.1, float("nan")], [2, 0.1, 1.0]], [], "odd")
    assert Image.open(tmp_path / "curves.png").size[0] == 960


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 3.1, [0, 1, 2, 3]), (0, 0.011, [0, 0.005, 0.01]), (2, 2, [2])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_contact_sheet_has_a_row_per_clip():
    clips = torch.zeros(3, 20, 3, 40, 80, dtype=torch.uint8)
    clips[1, :, 0] = 200
    clips[1, 19, 0], clips[1, 19, 2] = 0, 200
    sheet = np.asarray(contact_sheet(clips, ["one", "two", "three"]))
    assert sheet.shape == (3 * (48 + 24), 16 * 98, 3)
    assert tuple(sheet[72 + 30, 40]) == (200, 0, 0)
    assert tuple(sheet[72 + 30, 15 * 98 + 40]) == (0, 0, 200), "the last frame is shown"
    assert len(np.unique(sheet[:18])) > 2, "captions are written"
    assert contact_sheet(clips, ["one", "two", "three"], most=2).height == 2 * 72
