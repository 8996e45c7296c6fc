"""Class names of the data sets, in the order of a checkpoint's classifier."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from tsm_core.errors import CallerError

FOLDER = Path(__file__).parent / "class_names"

Convention = Literal["mmaction2", "mit"]


class UnknownDataset(CallerError):
    """No data set of this name."""

    reason = "unknown_dataset"


@lru_cache
def labels_of(dataset: str, order: Convention = "mmaction2") -> tuple[str, ...]:
    """Class names by class index: in the official lists' order, or as mit-han-lab's models have them.

    The two differ for sthv1 and jester alone, which mit-han-lab sorts; sthv2 is sorted by itself, and sorted sthv1
    equals it. Raises UnknownDataset.
    """
    if dataset == "sthv2":
        return labels_of("sthv1", "mit")
    path = FOLDER / f"{dataset}.txt"
    if not path.is_file():
        known = sorted([*(file.stem for file in FOLDER.glob("*.txt")), "sthv2"])
        raise UnknownDataset(f"data set {dataset!r} does not exist; there are {', '.join(known)}")
    names = tuple(path.read_text(encoding="utf-8").splitlines())
    return tuple(sorted(names)) if order == "mit" and dataset in ("sthv1", "jester") else names
