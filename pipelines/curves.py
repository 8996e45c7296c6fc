"""Pictures of a training: its curves, and the clips that it sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH_PX, PANEL_PX, LEFT_PX, RIGHT_PX, TOP_PX, GAP_PX = 960, 220, 76, 150, 70, 48
INK, PALE, PAPER, GRID = (17, 24, 39), (107, 114, 128), (255, 255, 255), (229, 231, 235)
COLOURS = ((33, 113, 181), (217, 95, 2), (27, 158, 119), (117, 112, 179))
THUMB_PX, CAPTION_PX, MOST_CLIPS, MOST_FRAMES = 96, 18, 16, 16

Line = tuple[str, Sequence[tuple[float, float]]]  # name, (x, y) points


def curves_picture(
    points: Sequence[Sequence[float]], history: Sequence[Mapping[str, float]], title: str
) -> Image.Image:
    """Loss, learning rate and, where there are any, accuracies over the steps.

    points: (step, lr, loss) each. history: a row per epoch with `step` and figures by name.
    """

    def over_epochs(name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in history if name in row]

    losses: list[Line] = [
        ("training", [(point[0], point[2]) for point in points]),
        ("validation", over_epochs("val_loss")),
    ]
    rates: list[Line] = [("learning rate", [(point[0], point[1]) for point in points])]
    shares: list[Line] = [
        (name, over_epochs(key))
        for name, key in (
            ("top-1", "top1"),
            ("top-5", "top5"),
            ("mean class", "mean_class"),
            ("training", "train_top1"),
        )
    ]
    panels = [("loss", losses), ("learning rate", rates), ("accuracy", shares)]
    shown = [(name, [line for line in lines if line[1]]) for name, lines in panels]
    shown = [(name, lines) for name, lines in shown if lines]
    picture = Image.new("RGB", (WIDTH_PX, TOP_PX + len(shown) * (PANEL_PX + GAP_PX) + 24), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((16, 14), title, INK, _font(20))
    last = max((x for _, lines in shown for _, line in lines for x, _ in line), default=1.0)
    for place, (name, lines) in enumerate(shown):
        _panel(
            draw, TOP_PX + place * (PANEL_PX + GAP_PX), name, lines, last, within=(0, 1) if name == "accuracy" else None
        )
    draw.text(
        (LEFT_PX + (WIDTH_PX - LEFT_PX - RIGHT_PX) // 2, picture.height - 22), "step", INK, _font(14), anchor="mm"
    )
    return picture


def save_curves(
    path: Path | str, points: Sequence[Sequence[float]], history: Sequence[Mapping[str, float]], title: str
) -> None:
    """Write the picture as PNG."""
    curves_picture(points, history, title).save(path, "PNG")


def _panel(
    draw: ImageDraw.ImageDraw,
    top: int,
    name: str,
    lines: Sequence[Line],
    last: float,
    within: tuple[float, float] | None,
) -> None:
    font = _font(13)
    values = [y for _, line in lines for _, y in line if math.isfinite(y)]
    low, high = within or (min(0.0, *values, 0.0), max([*values, 1e-12]))
    width = WIDTH_PX - LEFT_PX - RIGHT_PX

    def at(x: float, y: float) -> tuple[float, float]:
        inside = min(max((y - low) / (high - low), 0.0), 1.0)
        return LEFT_PX + width * x / max(last, 1e-12), top + PANEL_PX * (1 - inside)

    draw.text((LEFT_PX, top - 22), name, INK, _font(15))
    for tick in ticks(low, high):
        y = at(0, tick)[1]
        draw.line((LEFT_PX, y, LEFT_PX + width, y), GRID)
        draw.text((LEFT_PX - 8, y), f"{tick:g}", PALE, font, anchor="rm")
    for tick in ticks(0, last):
        x = at(tick, low)[0]
        draw.line((x, top + PANEL_PX, x, top + PANEL_PX + 4), PALE)
        draw.text((x, top + PANEL_PX + 6), f"{tick:g}", PALE, font, anchor="mt")
    draw.rectangle((LEFT_PX, top, LEFT_PX + width, top + PANEL_PX), outline=PALE)
    for place, (line_name, line) in enumerate(lines):
        colour = COLOURS[place % len(COLOURS)]
        there = [at(x, y) for x, y in line if math.isfinite(y)]
        if len(there) > 1:
            draw.line(there, colour, width=2, joint="curve")
        if len(there) <= 60:
            for x, y in there:
                draw.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), colour)
        value = f" {line[-1][1]:.4g}" if line else ""
        draw.text((LEFT_PX + width + 10, top + 8 + 20 * place), f"{line_name}{value}", colour, font, anchor="lm")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two others, about so many."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / about
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def contact_sheet(clips: Tensor, captions: Sequence[str], most: int = MOST_CLIPS) -> Image.Image:
    """Clips uint8 (N, T, 3, H, W) as rows of small pictures, each under its caption; at most 16 frames of a clip."""
    count, frames = min(len(clips), most), clips.shape[1]
    chosen = sorted({round(place) for place in np.linspace(0, frames - 1, min(frames, MOST_FRAMES)).tolist()})
    height = round(THUMB_PX * clips.shape[3] / clips.shape[4])
    row = height + CAPTION_PX + 6
    sheet = Image.new("RGB", (len(chosen) * (THUMB_PX + 2), count * row), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number in range(count):
        draw.text((2, number * row + 1), captions[number], INK, _font(13))
        for column, frame in enumerate(chosen):
            pixels = clips[number, frame].permute(1, 2, 0).contiguous().numpy()
            small = Image.fromarray(pixels).resize((THUMB_PX, height), Image.Resampling.BILINEAR)
            sheet.paste(small, (column * (THUMB_PX + 2), number * row + CAPTION_PX))
    return sheet


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
