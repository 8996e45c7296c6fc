"""Data sets with boxes by their names: what a detector's recipe says it is trained and judged on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines import vid
from pipelines.box_data import BoxVideos, Mixed, Renamed
from pipelines.box_files import CocoVideos
from pipelines.datasets import Part
from pipelines.moving_shapes import MovingPhotos, MovingShapes
from pipelines.scene_boxes import SceneBoxes
from tsm_core.errors import CallerError

Opener = Callable[[Path | None, Part], BoxVideos]  # folder that holds the data sets' folders, part -> videos


class UnknownBoxes(CallerError):
    """No data set with boxes has this name."""

    reason = "unknown_dataset"


class NoBoxes(CallerError):
    """The data set is not where it should be."""

    reason = "no_data"


def _vid(root: Path | None, part: Part) -> BoxVideos:
    """VID; to train on, 15 clips of each snippet an epoch beside the still images of DET, where they are there."""
    place = _root(root, vid.NAME)
    if part == "val":
        return vid.open_part(place, "val")
    snippets = (vid.open_part(place, "train"), vid.SAMPLED)
    stills = vid.home_of(place) / "annotations" / vid.FILES["det"]
    return Mixed(snippets, (vid.open_part(place, "det"), 1)) if stills.is_file() else Mixed(snippets)


def _coco(root: Path | None, part: Part) -> BoxVideos:
    """COCO 2017's still images."""
    home = _root(root, "coco") / "coco"
    return CocoVideos(home / "annotations" / f"instances_{part}2017.json", home / f"{part}2017")


def _root(root: Path | None, dataset: str) -> Path:
    if root is None:
        raise NoBoxes(f"{dataset} lies in files; name the folder that holds {dataset}/ with --data")
    if not root.is_dir():
        raise NoBoxes(f"{root} is no folder; --data names the one that holds {dataset}/")
    return root


# by a recipe's `dataset`; a set that is drawn looks at no folder
BOX_SETS: dict[str, Opener] = {
    "moving_photos": lambda _, part: MovingPhotos(part),
    "moving_shapes": lambda _, part: MovingShapes(part),
    "scenes": lambda _, part: SceneBoxes(part),
    vid.NAME: _vid,
    "coco": _coco,
}


def open_boxes(dataset: str, labels: Sequence[str], root: Path | str | None, part: Part) -> BoxVideos:
    """A part of a data set, its labels counted as in `labels`. root: folder that holds its folder.

    A data set of another name is a folder of its own: `annotations/train.json` and `annotations/val.json` in COCO's
    format, with or without COCO-VID's videos, whose file names start from its folder `frames`.
    Raises UnknownBoxes, NoBoxes, BadBoxes (wrong_classes), and what its opener raises.
    """
    place = None if root is None else Path(root)
    if dataset in BOX_SETS:
        return Renamed(BOX_SETS[dataset](place, part), labels)
    home = None if place is None else place / dataset
    if home is None or not (home / "annotations" / f"{part}.json").is_file():
        where = "" if home is None else f", and {home / 'annotations' / f'{part}.json'} does not exist"
        raise UnknownBoxes(
            f"no data set with boxes is called {dataset!r}; there are {', '.join(sorted(BOX_SETS))}{where}"
        )
    return Renamed(CocoVideos(home / "annotations" / f"{part}.json", home / "frames"), labels)
