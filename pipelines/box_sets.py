"""Data sets with boxes by their names: what a detector's recipe says it is trained and judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.box_data import BoxVideos, Renamed
from pipelines.datasets import Part
from pipelines.moving_shapes import MovingShapes
from pipelines.scene_boxes import SceneBoxes
from tsm_core.errors import CallerError

Opener = Callable[[Path | None, Part], BoxVideos]  # folder that holds the data sets' folders, part -> videos

# by a recipe's `dataset`; a set that is drawn looks at no folder
BOX_SETS: dict[str, Opener] = {
    "moving_shapes": lambda _, part: MovingShapes(part),
    "scenes": lambda _, part: SceneBoxes(part),
}


class UnknownBoxes(CallerError):
    """No data set with boxes has this name."""

    reason = "unknown_dataset"


def open_boxes(dataset: str, labels: Sequence[str], root: Path | str | None, part: Part) -> BoxVideos:
    """A part of a data set, its labels counted as in `labels`. root: folder that holds its folder.

    Raises UnknownBoxes, BadBoxes (wrong_classes), and what its opener raises.
    """
    if dataset not in BOX_SETS:
        raise UnknownBoxes(f"no data set with boxes is called {dataset!r}; there are {', '.join(sorted(BOX_SETS))}")
    return Renamed(BOX_SETS[dataset](None if root is None else Path(root), part), labels)
