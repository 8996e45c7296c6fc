"""What an evaluation is of: the checkpoint, the views and the videos, from names and paths."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pipelines.datasets import (
    DATASETS,
    TEMPLATE,
    BadList,
    Kind,
    NoList,
    Part,
    VideoRecord,
    find_dataset,
    in_order,
    read_list,
)
from pipelines.scoring import Videos
from tsm_core.checkpoints import import_checkpoint, load_recogniser
from tsm_core.errors import CallerError
from tsm_core.labels import Convention, labels_of
from tsm_core.model import TSM, WindowTSM
from tsm_core.model_file import ModelFileError, read_card
from tsm_core.preprocess_spec import Crop
from tsm_core.recipes import RECIPES, Clips, Recipe, Views, find_recipe
from tsm_core.zoo import find_model


class BadEvaluation(CallerError):
    """What is asked for cannot be done."""

    reason = "bad_evaluation"


class NoData(CallerError):
    """There are no videos where they should be."""

    reason = "no_data"


def find_checkpoint(checkpoint: Path | str, model_dirs: Sequence[Path | str] = ()) -> Path:
    """The file: a path, or the name of a model at hand. Raises UnknownModel."""
    path = Path(checkpoint)
    if path.is_file() or path.suffix in (".safetensors", ".pth", ".tar", ".pt", ".pyth") or len(path.parts) > 1:
        return path.absolute()  # whether it is there and what it holds is for those who read it to say
    return find_model(str(checkpoint), extra_dirs=model_dirs)


def open_model(file: Path, recipe: Recipe, device: str = "cpu") -> TSM:
    """The recipe's model with the file's weights, of any layout. Raises ModelFileError that names what differs."""
    try:
        model = import_checkpoint(file, recipe)
    except ModelFileError as error:
        if error.reason != "already_imported":
            raise
        own = load_recogniser(file)
        model = own.model if isinstance(own, WindowTSM) else own
        _check_same(file, model.recipe, recipe)
    return model.to(device)


def _check_same(file: Path, theirs: Recipe, recipe: Recipe) -> None:
    differ = [
        f"{name} {getattr(theirs, name)!r} there, {getattr(recipe, name)!r} here"
        for name in ("backbone", "shift", "shift_div", "frames", "non_local", "temporal_pool", "start")
        if getattr(theirs, name) != getattr(recipe, name)
    ]
    if len(theirs.labels) != len(recipe.labels):
        differ.append(f"{len(theirs.labels)} classes there, {len(recipe.labels)} here")
    elif theirs.labels != recipe.labels:
        pairs = zip(theirs.labels, recipe.labels, strict=True)
        index, (one, other) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        differ.append(f"class {index} is {one!r} there, {other!r} here")
    specs = asdict(theirs.preprocess), asdict(recipe.preprocess)
    differ += [
        f"{name} {specs[0][name]!r} there, {value!r} here"
        for name, value in specs[1].items()
        if specs[0][name] != value
    ]
    if differ:
        raise ModelFileError(
            f"{file} holds {theirs.name}, which is not {recipe.name}: {'; '.join(differ)}. Test it by its own recipe",
            reason="other_recipe",
        )


def find_row(recipe: Recipe | str, file: Path) -> Recipe:
    """The row of this name, or the recipe inside a model file that has this name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES and file.suffix == ".safetensors":
        with contextlib.suppress(ModelFileError):
            inside, _ = read_card(file)
            if isinstance(inside, Recipe) and inside.name == recipe:
                return inside
    return find_recipe(recipe)


def choose_views(
    recipe: Recipe,
    views: Literal["efficient", "accurate"] = "efficient",
    clips: Clips | None = None,
    crop: Crop | None = None,
    crop_px: int | None = None,
) -> Views:
    """The recipe's views of this name, changed where something is said; a crop's size follows its kind."""
    if views not in ("efficient", "accurate"):
        raise BadEvaluation(f"views {views!r} must be 'efficient' or 'accurate'")
    base: Views = getattr(recipe, views)
    spec = recipe.preprocess
    if crop_px is None:
        if spec.resize == "exact":
            crop_px = spec.input_px
        elif crop is None or crop == base.crop:
            crop_px = base.crop_px
        elif crop == "three" and spec.convention == "mmaction2":
            crop_px = spec.resize_px  # nothing else fits
        else:
            crop_px = recipe.efficient.crop_px
    return Views(clips or base.clips, crop or base.crop, crop_px)


def find_videos(
    recipe: Recipe,
    *,
    data_root: Path | str | None = None,
    part: Part = "val",
    split: int = 1,
    kind: Kind | None = None,
    list_file: Path | str | None = None,
    prefix: Path | str | None = None,
    list_order: Convention | None = None,
    template: str | None = None,
    limit: int | None = None,
) -> tuple[Videos, dict[str, Any]]:
    """Listed videos with labels as the recipe counts them, and what a result says of them; see `run_evaluation`."""
    if limit is not None and limit < 1:
        raise BadEvaluation(f"limit {limit} must be at least 1")
    if list_file is not None:
        return _listed(recipe, Path(list_file), prefix, kind, list_order, template, limit)
    if data_root is None:
        raise NoData("no videos to test on: give --data ROOT, or --list FILE")
    if not Path(data_root).is_dir():
        raise NoData(f"{data_root} is no folder; --data names the one that holds the data sets' folders")
    if not recipe.dataset:
        raise NoData(f"{recipe.name} belongs to no data set; give --list FILE")
    row = find_dataset(recipe.dataset)
    if len(row.labels) != len(recipe.labels):
        raise BadEvaluation(f"{row.name} has {len(row.labels)} classes, {recipe.name} has {len(recipe.labels)}")
    kind = kind or recipe.data
    if kind not in row.kinds:
        raise BadEvaluation(f"{row.title} does not come as {kind}; use --kind {' or '.join(row.kinds)}")
    home = row.home(data_root)
    path = home / row.list_name(kind, part, split)
    if not path.is_file():
        others = [each for each in row.kinds if (home / row.list_name(each, part, split)).is_file()]
        way = f"`tsm data prepare {row.name} --data {data_root}` makes it from the official annotations"
        if others:
            way = f"there is one of {others[0]}: --kind {others[0]}; {way}"
        raise NoList(f"list {path} does not exist; {way}")
    records = in_order(read_list(path, kind=kind, classes=len(row.labels)), row.name, recipe.convention)
    folder = home / row.folder(kind, part)
    if not folder.is_dir():
        raise NoData(f"{folder} does not exist; the {kind} of {path.name} should lie there")
    videos = Videos(tuple(records[:limit]), folder.absolute(), template or row.template, row.start)
    return videos, {"dataset": row.name, "data": kind, "part": part, "list": path.name}


def _listed(
    recipe: Recipe,
    path: Path,
    prefix: Path | str | None,
    kind: Kind | None,
    order: Convention | None,
    template: str | None,
    limit: int | None,
) -> tuple[Videos, dict[str, Any]]:
    records = read_clips(path, recipe.labels, kind=kind)
    if order is not None and order != recipe.convention:
        if not recipe.dataset:
            raise BadEvaluation(f"{recipe.name} belongs to no data set, so there is no other order of its classes")
        place = [recipe.labels.index(label) for label in labels_of(recipe.dataset, order)]
        records = [replace(record, label=place[record.label]) for record in records]
    row = DATASETS.get(recipe.dataset)
    videos = Videos(
        tuple(records[:limit]),
        (path.parent if prefix is None else Path(prefix)).absolute(),
        template or (row.template if row else TEMPLATE),
        row.start if row else 1,
    )
    return videos, {"dataset": None, "data": kind, "part": None, "list": path.name}


def read_clips(path: Path | str, labels: Sequence[str], *, kind: Kind | None = None) -> list[VideoRecord]:
    """The videos of a list whose labels are numbers, as `read_list` has it, or names: `path label`, one a line.

    A name may be written with underscores for spaces, in any case. Raises BadList, NoList.
    """
    file = Path(path)
    if not file.is_file():
        raise NoList(f"list {path} does not exist")
    if file.suffix == ".json":
        return read_list(file, kind=kind, classes=len(labels))
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    if all(line.rpartition(" ")[2].isdigit() for line in lines if line):
        return read_list(file, kind=kind, classes=len(labels))
    known = {_plain(label): index for index, label in enumerate(labels)}
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        words = line.split()
        # the longest name that fits, but something must be left for the path
        tails = (len(words) - count for count in range(len(words) - 1, 0, -1))
        found = next((at for at in tails if _plain(" ".join(words[at:])) in known), None)
        if found is None:
            near = get_close_matches(_plain(words[-1]), known, n=3)
            hint = f"; near are {', '.join(near)}" if near else ""
            raise BadList(
                f"{path}, line {number}: {line!r} does not end in a class of {len(labels)}{hint}", reason="bad_label"
            )
        records.append(VideoRecord(line.rsplit(None, len(words) - found)[0], known[_plain(" ".join(words[found:]))]))
    return records


def _plain(label: str) -> str:
    return " ".join(label.lower().replace("_", " ").split())
