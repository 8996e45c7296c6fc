"""Pictures of results: the confusion matrix of any number of classes, legible from a handful to hundreds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.metrics import Ints, class_scores
from tsm_core.errors import ShapeError

NAMED = 110  # up to so many classes are named at both axes; more are numbered, and the worst confusions listed
SIDE_PX = 960  # of the matrix, about; 400 classes take more
LEAST_CELL_PX, MOST_CELL_PX = 4, 64
COUNTED_PX = 30  # cells of this size show their share in per cent
LISTED = 36
LINE_PX = 24
LONGEST_LABEL = 34  # characters
GAP = 12

INK, PALE_INK, PAPER, NO_VIDEOS = (17, 24, 39), (107, 114, 128), (255, 255, 255), (229, 231, 235)
COLOURS = ((255, 255, 255), (199, 225, 247), (107, 174, 214), (33, 113, 181), (8, 29, 88))  # share 0 to 1
TICKS = (0, 1, 5, 10, 25, 50, 75, 100)  # per cent

Rgb = NDArray[np.uint8]


def confusion_picture(confusion: Ints, labels: Sequence[str], title: str = "") -> Image.Image:
    """The matrix as a picture: a row per true class, coloured by the share of its videos per predicted class.

    confusion (K, K) counts. Colours grow with the square root of the share, so that rare confusions show; a grey row
    is a class without videos. Raises ShapeError.
    """
    classes = len(labels)
    if confusion.shape != (classes, classes) or not classes:
        raise ShapeError(f"confusion must be ({classes}, {classes}) for {classes} labels, got {confusion.shape}")
    cell = int(np.clip(SIDE_PX // classes, LEAST_CELL_PX if classes > NAMED else 13, MOST_CELL_PX))
    named = classes <= NAMED
    font, heading = _font(int(np.clip(cell - 2, 11, 15)) if named else 16), _font(20)
    names = [_short(label) for label in labels]
    margin = max(int(font.getlength(name)) for name in names) + GAP if named else 52
    side, left, top = cell * classes, margin + 44, margin + 88
    listed = [] if named else _worst(confusion, labels)
    bar = left + side + 2 * GAP
    right = 120 + max((int(font.getlength(line)) for line in listed), default=0)
    bottom = top + max(side, (len(listed) + 2) * LINE_PX) + 2 * GAP
    picture = Image.new("RGB", (max(bar + right, int(heading.getlength(title)) + 2 * GAP), bottom), PAPER)
    draw = ImageDraw.Draw(picture)

    draw.text((GAP, GAP), title, INK, heading)
    draw.text((left + side // 2, 44), "predicted class", INK, heading, anchor="mt")
    _upright(picture, "true class", heading, (GAP, top + side // 2), "middle")
    cells = _coloured(confusion).repeat(cell, axis=0).repeat(cell, axis=1)
    picture.paste(Image.fromarray(cells), (left, top))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=PALE_INK)
    if named:
        for index, name in enumerate(names):
            middle = cell * index + cell // 2
            draw.text((left - GAP // 2, top + middle), name, INK, font, anchor="rm")
            _upright(picture, name, font, (left + middle - int(font.size) // 2 - 1, top - GAP // 2), "end")
    else:
        step = 10 if classes <= 250 else 20
        for index in range(0, classes, step):
            middle = cell * index + cell // 2
            draw.text((left - 10, top + middle), str(index), INK, font, anchor="rm")
            draw.line((left - 7, top + middle, left - 2, top + middle), PALE_INK)
            draw.text((left + middle, top - 10), str(index), INK, font, anchor="mb")
            draw.line((left + middle, top - 7, left + middle, top - 2), PALE_INK)
    if cell >= COUNTED_PX:
        _write_shares(draw, confusion, cell, (left, top))
    _scale(picture, font, (bar, top), min(side, 320))
    if listed:
        draw.text((bar + 100, top), f"the {len(listed)} most frequent confusions", PALE_INK, font)
        for place, line in enumerate(listed, 1):
            draw.text((bar + 100, top + LINE_PX * place), line, INK, font)
    return picture


def save_confusion(path: Path | str, confusion: Ints, labels: Sequence[str], title: str = "") -> None:
    """Write the picture as PNG, all or nothing."""
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        confusion_picture(confusion, labels, title).save(part, "PNG", optimize=True)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def colour_of(share: NDArray[np.float64]) -> Rgb:
    """(..., 3) colours of shares in 0..1."""
    place = np.sqrt(np.clip(share, 0, 1)) * (len(COLOURS) - 1)
    stops = np.array(COLOURS, dtype=np.float64)
    channels = [np.interp(place, np.arange(len(COLOURS)), stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _coloured(confusion: Ints) -> Rgb:
    videos = confusion.sum(axis=1, keepdims=True)
    pixels = colour_of(confusion / np.maximum(videos, 1))
    pixels[videos[:, 0] == 0] = NO_VIDEOS
    return pixels


def _write_shares(draw: ImageDraw.ImageDraw, confusion: Ints, cell: int, corner: tuple[int, int]) -> None:
    font = _font(max(11, cell // 4))
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for row, column in np.argwhere(confusion):
        share = shares[row, column]
        at = (corner[0] + cell * int(column) + cell // 2, corner[1] + cell * int(row) + cell // 2)
        draw.text(at, f"{100 * share:.0f}", PAPER if share > 0.3 else INK, font, anchor="mm")


def _worst(confusion: Ints, labels: Sequence[str]) -> list[str]:
    """Lines of the classes most often taken for one other, by count and then by class."""
    rows = [row for row in class_scores(confusion, labels) if row.taken_for is not None]
    rows.sort(key=lambda row: (-row.times, row.index))
    places = {label: index for index, label in enumerate(labels)}
    return [
        f"{row.times} of {row.videos}: {row.index} {_short(row.label)}  as  {places[row.taken_for]} "
        f"{_short(row.taken_for)}"
        for row in rows[:LISTED]
        if row.taken_for is not None
    ]


def _scale(picture: Image.Image, font: ImageFont.FreeTypeFont, corner: tuple[int, int], height: int) -> None:
    """The bar that says which share has which colour, 100 % at the top; evenly in the root, as the colours are."""
    x, y = corner
    place = np.linspace(1, 0, height)
    column = colour_of(place**2)[:, None].repeat(18, axis=1)
    picture.paste(Image.fromarray(column), (x, y))
    draw = ImageDraw.Draw(picture)
    draw.text((x, y - GAP), "of the true class", INK, font, anchor="lb")
    draw.rectangle((x - 1, y - 1, x + 18, y + height), outline=PALE_INK)
    for tick in TICKS:
        at = y + round((1 - (tick / 100) ** 0.5) * (height - 1))
        draw.line((x + 18, at, x + 22, at), PALE_INK)
        draw.text((x + 26, at), f"{tick} %", INK, font, anchor="lm")


def _upright(picture: Image.Image, text: str, font: ImageFont.FreeTypeFont, at: tuple[int, int], anchor: str) -> None:
    """Text that reads upwards: `end` begins at `at`, `middle` is centred on it."""
    strip = Image.new("RGB", (max(1, int(font.getlength(text)) + 2), int(1.35 * font.size) + 1), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, INK, font)
    strip = strip.rotate(90, expand=True)
    x, y = at
    picture.paste(strip, (x, y - (strip.height if anchor == "end" else strip.height // 2)))


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 2] + ".."


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
