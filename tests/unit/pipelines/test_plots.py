"""The picture of a confusion matrix: colours where they belong, whatever the number of classes."""

import numpy as np
import pytest
from PIL import Image

from pipelines.plots import NO_VIDEOS, PAPER, colour_of, confusion_picture, save_confusion
from tsm_core.errors import ShapeError


def matrix_of(classes: int) -> np.ndarray:
    """Half of each class is taken for the next; class 1 has no videos."""
    matrix = 5 * np.eye(classes, dtype=np.int64) + 5 * np.eye(classes, k=1, dtype=np.int64)
    matrix[1] = 0
    return matrix


def corner_of(pixels: np.ndarray, matrix: np.ndarray) -> tuple[int, int]:
    """(x, y) of the matrix, found by the grey row, and the side of a cell."""
    ys, xs = np.where((pixels == NO_VIDEOS).all(axis=2))
    cell = (xs.max() - xs.min() + 1) // len(matrix)
    assert (ys.max() - ys.min() + 1, xs.max() - xs.min() + 1) == (cell, cell * len(matrix))
    return int(xs.min()), int(ys.min()) - cell


@pytest.mark.parametrize("classes", [2, 9, 27, 51, 101, 174, 400])
def test_every_cell_has_the_colour_of_its_share(classes):
    matrix = matrix_of(classes)
    picture = confusion_picture(matrix, [f"class number {index}" for index in range(classes)], "title")
    pixels = np.asarray(picture)
    x, y = corner_of(pixels, matrix)
    cell = np.unique(np.where((pixels == NO_VIDEOS).all(axis=2))[0]).size
    inside = pixels[y + 1 : y + cell * classes : cell, x + 1 : x + cell * classes : cell]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    expected = colour_of(shares)
    expected[1] = NO_VIDEOS
    assert (inside == expected).all()
    assert max(picture.size) < 2600
    assert (pixels[:, -3:] == PAPER).all()  # nothing runs out of the picture


def test_colours_go_from_paper_to_dark():
    assert colour_of(np.array(0.0)).tolist() == list(PAPER)
    brightness = colour_of(np.linspace(0, 1, 101)).sum(axis=1).astype(int)
    assert (np.diff(brightness) < 0).all()


def test_long_labels_and_titles_stay_inside():
    labels = [f"Pretending to close something without actually closing it {index}" for index in range(120)]
    picture = confusion_picture(matrix_of(120), labels, "a title that goes on " * 20)
    assert (np.asarray(picture)[:, -3:] == PAPER).all()


def test_saving_is_all_or_nothing(tmp_path):
    save_confusion(tmp_path / "cm.png", matrix_of(3), ["a", "b", "c"])
    assert Image.open(tmp_path / "cm.png").format == "PNG"
    with pytest.raises(ShapeError, match=r"\(2, 2\) for 2 labels, got \(3, 3\)"):
        save_confusion(tmp_path / "other.png", matrix_of(3), ["a", "b"])
    assert [file.name for file in tmp_path.iterdir()] == ["cm.png"]
