"""The tsm commands that need no service: recipes, models, data sets, evaluation.

What imports torch, which takes seconds, is imported by the commands that need it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from tqdm import tqdm

from pipelines.datasets import DATASETS, Kind, Part
from services.settings import Settings, load_settings
from services.tables import print_table
from tsm_core.detector_recipes import DETECTOR_RECIPES, DetectorRecipe, find_any_recipe
from tsm_core.labels import Convention
from tsm_core.model_file import read_card
from tsm_core.preprocess_spec import Crop
from tsm_core.recipes import RECIPES, Accuracy, Clips, Recipe, RecipeError, find_recipe
from tsm_core.zoo import available_models, find_model

if TYPE_CHECKING:
    from tsm_core.checkpoints import AnyModel

recipes_app = typer.Typer(no_args_is_help=True, help="Recipes: all that names and reproduces a model.")
models_app = typer.Typer(no_args_is_help=True, help="Models at hand; public and foreign weights.")
data_app = typer.Typer(
    no_args_is_help=True, help="Data sets: lists from official annotations, and whether all is there."
)

EXAMPLES = 10

Json = Annotated[bool, typer.Option("--json", help="print JSON")]
DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="kinetics400, sthv1, sthv2, jester, ...")]
DataRoot = Annotated[Path, typer.Option("--data", help="folder that holds the data set's folder")]
Split = Annotated[int | None, typer.Option("--split", help="one split of several; default: all")]
DataKind = Annotated[Kind | None, typer.Option("--kind", help="rawframes or videos; default: both that there are")]
DataPart = Annotated[Part | None, typer.Option("--part", help="train or val; default: both")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="name of the model")]


# recipes


@recipes_app.command("list")
def list_recipes(
    match: Annotated[str, typer.Argument(help="only names and data sets that contain this")] = "", as_json: Json = False
) -> None:
    """All recipes: MMAction2's 36 rows, their uni-directional twins, other published models, ours; detectors."""
    found = [row for row in RECIPES.values() if match in row.name or match == row.dataset]
    detectors = [row for row in DETECTOR_RECIPES.values() if match in row.name or match == row.dataset]
    if as_json:
        typer.echo(json.dumps([*map(_short, found), *map(_short_detector, detectors)]))
        return
    rows = [("RECIPE", "DATA", "BACKBONE", "FRAMES", "LIVE", "TOP-1", "WEIGHTS")]
    for row in found:
        short = _short(row)
        scores = [f"{value:g}" for value in (short["top1_efficient"], short["top1_accurate"]) if value is not None]
        weights = _weights_of(row)
        network = row.backbone + (f" + {row.non_local}" if row.non_local else "")
        rows.append(
            (row.name, row.dataset, network, str(row.frames), short["mode"], " / ".join(scores) or "-", weights)
        )
    if found:
        print_table(rows)
    typer.echo(f"{len(found)} recipes; TOP-1 as published, efficient / accurate setting where both were")
    rows = [("DETECTOR", "DATA", "ARCHITECTURE", "INPUT", "SHIFT", "COCO AP", "WEIGHTS")]
    for detector in detectors:
        ap = f"{detector.published.coco_ap:g}" if detector.published else "-"
        facts = (detector.dataset, detector.architecture, _input_of(detector), detector.shift, ap)
        rows.append((detector.name, *facts, _weights_of(detector)))
    if detectors:
        print_table(rows)
        typer.echo(f"{len(detectors)} detectors; COCO AP as published, at their authors' input size")


def _weights_of(recipe: Recipe | DetectorRecipe) -> str:
    return "public" if recipe.checkpoint else "shipped" if recipe.name in available_models() else "to be trained"


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="RECIPE")], as_json: Json = False) -> None:
    """One recipe: network, data, training, views, what was published."""
    recipe = find_any_recipe(name)
    if isinstance(recipe, DetectorRecipe):
        _show_detector(recipe, as_json)
        return
    facts = _cost_of(recipe)
    data = {
        **asdict(recipe),
        "mode": _mode(recipe),
        "stride_s": None if recipe.steppable else recipe.window_stride_s,
        **facts,
    }
    if as_json:
        typer.echo(json.dumps(data))
        return
    live = (
        "stepped frame by frame: a result for each"
        if recipe.steppable
        else f"window of {recipe.window_s:g} s, a result every {recipe.window_stride_s:g} s"
    )
    _facts(
        recipe.name,
        {
            "network": f"{recipe.backbone}, shift {recipe.shift} of 1/{recipe.shift_div}"
            + (f", non-local {recipe.non_local}" if recipe.non_local else "")
            + (", temporal pool" if recipe.temporal_pool else ""),
            "clip": f"{recipe.frames} frames of {recipe.preprocess.input_px} px",
            "parameters": f"{facts['params']:,}",
            "one result": f"{facts['gmac_per_result']:g} GMAC",
            "live": live,
            "classes": f"{len(recipe.labels)}: {', '.join(recipe.labels[:3])}, ...",
            "data": " ".join(filter(None, (recipe.dataset, recipe.data, recipe.stored))) if recipe.dataset else "",
            "convention": recipe.convention,
            "efficient views": f"{recipe.efficient} ({recipe.efficient.total})",
            "accurate views": f"{recipe.accurate} ({recipe.accurate.total})",
        },
    )
    if recipe.training is not None:
        train = recipe.training
        groups = ", ".join(f"{part} {lr:g}x lr {decay:g}x decay" for part, lr, decay in train.groups)
        _facts(
            "training",
            {
                "epochs": f"{train.epochs}, lr / 10 at {', '.join(map(str, train.milestones))}"
                + (f", {train.warmup_epochs} of warm-up" if train.warmup_epochs else ""),
                "lr": f"{train.lr:g} for a batch of {train.lr_batch} (here {train.batch} on {train.gpus} GPUs)",
                "SGD": f"momentum {train.momentum:g}, decay {train.weight_decay:g}, clip {train.clip_norm:g}",
                "groups": groups,
                "crop": train.crop,
                "flip": ("half of the clips" if train.flip else "none")
                + (f", exchanging classes {train.flip_pairs}" if train.flip_pairs else ""),
                "augment": ", ".join(one for one in (train.augment, train.blend) if one != "none"),
                "begins from": train.init,
            },
        )
    if recipe.published is not None:
        page = recipe.published
        _facts(
            f"published by {page.source} (not measured here)",
            {
                "efficient": _score(page.efficient),
                "accurate": _score(page.accurate),
                "reference": " / ".join(
                    filter(None, (_score(page.reference_efficient), _score(page.reference_accurate)))
                ),
                "training memory": f"{page.gpu_mem_mb} MB" if page.gpu_mem_mb else "",
                "speed": f"{page.videos_per_s:g} videos/s" if page.videos_per_s else "",
                "notes": "; ".join(page.notes),
                "weights": recipe.checkpoint.url if recipe.checkpoint else "",
                "sha256": (recipe.checkpoint.sha256 or "not published") if recipe.checkpoint else "",
            },
        )


def _show_detector(recipe: DetectorRecipe, as_json: bool) -> None:
    facts = _cost_of(recipe)
    if as_json:
        typer.echo(json.dumps({**asdict(recipe), "mode": "step", **facts}))
        return
    _facts(
        recipe.name,
        {
            "network": f"{recipe.architecture}, {_shift_of(recipe)}",
            "input": f"{_input_of(recipe)}, letterboxed",
            "parameters": f"{facts['params']:,}",
            "one frame": f"{facts['gmac_per_result']:g} GMAC",
            "labels": f"{len(recipe.labels)}: {', '.join(recipe.labels[:3])}, ...",
            "boxes": f"score above {recipe.score_thresh:g}, NMS {recipe.nms_iou:g}, at most {recipe.max_detections}",
            "data": recipe.dataset,
        },
    )
    if recipe.training is not None:
        said = {key: value for key, value in asdict(recipe.training).items() if value not in ((), None, "", 0.0)}
        _facts("training", {key: str(value) for key, value in said.items()})
    if recipe.published is not None:
        _facts(
            f"published by {recipe.published.source} (not measured here)",
            {
                "COCO AP": f"{recipe.published.coco_ap:g} %, at its authors' input size",
                "weights": recipe.checkpoint.url if recipe.checkpoint else "",
                "sha256": (recipe.checkpoint.sha256 or "not published") if recipe.checkpoint else "",
            },
        )


def _cost_of(recipe: Recipe | DetectorRecipe) -> dict[str, Any]:
    from tsm_core.cost import multiply_adds, parameters

    return {"params": parameters(recipe), "gmac_per_result": round(multiply_adds(recipe) / 1e9, 3)}


def _input_of(recipe: DetectorRecipe) -> str:
    height, width = recipe.input_size
    return f"{width}x{height} px"


def _shift_of(recipe: DetectorRecipe) -> str:
    if recipe.shift == "none":
        return "no shift: every frame is a still image to it"
    return f"shift uni of 1/{recipe.shift_div}: it sees the frames before"


def _short_detector(recipe: DetectorRecipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "task": recipe.task,
        "dataset": recipe.dataset,
        "architecture": recipe.architecture,
        "input_size": list(recipe.input_size),
        "frames": recipe.frames,
        "shift": recipe.shift,
        "mode": "step",
        "classes": len(recipe.labels),
        "coco_ap": recipe.published.coco_ap if recipe.published else None,
        "source": recipe.published.source if recipe.published else None,
        "checkpoint": recipe.checkpoint.url if recipe.checkpoint else None,
        "sha256": recipe.checkpoint.sha256 if recipe.checkpoint else None,
    }


def _mode(recipe: Recipe) -> str:
    return "step" if recipe.steppable else "window"


def _score(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return ""
    top5 = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:g} %"
    return ("" if accuracy.top1 is None else f"top-1 {accuracy.top1:g} %") + top5


def _short(recipe: Recipe) -> dict[str, Any]:
    page = recipe.published
    return {
        "name": recipe.name,
        "dataset": recipe.dataset,
        "backbone": recipe.backbone,
        "non_local": recipe.non_local,
        "frames": recipe.frames,
        "shift": recipe.shift,
        "mode": _mode(recipe),
        "classes": len(recipe.labels),
        "top1_efficient": page.efficient.top1 if page and page.efficient else None,
        "top1_accurate": page.accurate.top1 if page and page.accurate else None,
        "source": page.source if page else None,
        "checkpoint": recipe.checkpoint.url if recipe.checkpoint else None,
        "sha256": recipe.checkpoint.sha256 if recipe.checkpoint else None,
    }


def _facts(title: str, facts: Mapping[str, str]) -> None:
    typer.echo(title)
    for name, value in facts.items():
        if value:
            typer.echo(f"  {name + ':':<17} {value}")


# models


def model_folders(settings: Settings) -> list[Path]:
    """Where models are looked for beside the shipped ones."""
    return [settings.models.folder]


@models_app.command("list")
def list_models(as_json: Json = False) -> None:
    """Models at hand on this machine: shipped, pulled and imported."""
    found = [_at_hand(name, path) for name, path in sorted(available_models(model_folders(load_settings())).items())]
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows: list[tuple[str, ...]] = [("NAME", "MODE", "NETWORK", "INPUT", "GMAC", "LABELS")]
    for model in found:
        labels = model["labels"]
        shown = " ".join(labels) if len(labels) < 12 else f"{len(labels)}: {', '.join(labels[:3])}, ..."
        gmac = f"{model['gmac_per_result']:g}"
        if model["task"] == "detection":
            network = f"{model['architecture']}, {'no shift' if model['shift'] == 'none' else 'shift uni'}"
            size = "{1}x{0} px".format(*model["input_size"])
        else:
            network, size = model["backbone"], f"{model['input_px']} px"
        rows.append((model["name"], model["mode"], network, size, gmac, shown))
    print_table(rows)


@models_app.command("show")
def show_model(name: ModelName, as_json: Json = False) -> None:
    """One model at hand: its recipe, how it is served, and its card."""
    model = _at_hand(name, find_model(name, None, model_folders(load_settings())))
    if as_json:
        typer.echo(json.dumps(model))
        return
    card = model.pop("card")
    model["labels"] = ", ".join(model["labels"])
    _facts(model.pop("name"), {key: str(value) for key, value in model.items() if value is not None})
    _facts("card", {key: value if isinstance(value, str) else json.dumps(value) for key, value in card.items()})


@models_app.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a recipe with public weights, or a backbone")],
    as_json: Json = False,
) -> None:
    """Download public weights, verify and import them; ImageNet weights of a backbone are kept for training."""
    from pipelines.hub import pull

    with _bytes_bar(name) as on_progress:
        path = pull(name, load_settings().models.folder, on_progress)
    checked = (
        "" if name not in {**RECIPES, **DETECTOR_RECIPES} else read_card(path)[1].get("source", {}).get("checked", "")
    )
    _tell(as_json, {"name": name, "file": str(path), "checked": checked}, f"{name}: {path} {checked}".rstrip())


@models_app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="checkpoint of MMAction2, mit-han-lab or torchvision")],
    recipe_name: Annotated[str, typer.Option("--recipe", help="recipe that the weights belong to")],
    name: Annotated[str | None, typer.Option(help="name of the new model; default: the recipe's")] = None,
    backbone_only: Annotated[
        bool, typer.Option("--backbone-only", help="ImageNet weights and the like: leave the classifier untrained")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="write the model file here instead")] = None,
    as_json: Json = False,
) -> None:
    """Make a model of a foreign checkpoint: every weight must fit, nothing in the file is executed."""
    from tsm_core.checkpoints import import_checkpoint, load_backbone, save_model
    from tsm_core.model import build

    recipe = find_any_recipe(recipe_name)
    target = out or load_settings().models.folder / f"{name or recipe.name}.safetensors"
    model: AnyModel
    if backbone_only:
        if isinstance(recipe, DetectorRecipe):
            raise RecipeError(f"--backbone-only makes recognisers; tsm train {recipe.name} begins with what it needs")
        model = build(recipe)
        load_backbone(model, file)
        save_model(target, model, {"note": f"backbone of {file.name}; the classifier is untrained"})
    else:
        model = import_checkpoint(file, recipe)
        save_model(target, model)
    note = model.source.get("note")
    facts = {"name": target.stem, "recipe": recipe.name, "file": str(target), **({"note": note} if note else {})}
    _tell(as_json, facts, f"{target.stem}: {target}" + (f"\nnote: {note}" if note else ""))


@models_app.command("export")
def export_model(
    name: ModelName,
    out: Annotated[Path, typer.Option("--out", help=".onnx or .pt2 file to write")],
    step: Annotated[bool, typer.Option("--step", help="one frame and the shift state, in and out")] = False,
    as_json: Json = False,
) -> None:
    """Write a model for other runtimes: ONNX or torch.export, over clips or frame by frame."""
    from tsm_core.checkpoints import load_recogniser
    from tsm_core.export import ExportError
    from tsm_core.export import export_model as write

    formats: dict[str, Literal["onnx", "torch"]] = {".onnx": "onnx", ".pt2": "torch"}
    if out.suffix not in formats:
        raise ExportError(f"{out} must end in .onnx or .pt2: it says which format to write")
    model = load_recogniser(find_model(name, None, model_folders(load_settings())))
    what: Literal["step", "clip"] = "step" if step else "clip"
    write(model, out, formats[out.suffix], what)
    _tell(as_json, {"name": name, "what": what, "file": str(out)}, f"{name} ({what}): {out}")


# data sets


@data_app.command("list")
def list_datasets(as_json: Json = False) -> None:
    """The data sets, and where to get them."""
    from pipelines import vid

    boxes: list[dict[str, Any]] = [  # data sets with boxes that lie in files
        {"name": vid.NAME, "title": vid.TITLE, "classes": len(vid.WNIDS), "kinds": ["boxes"], "source": vid.SOURCE}
    ]
    if as_json:
        listed = [{**asdict(row), "classes": len(row.labels)} for row in DATASETS.values()]
        typer.echo(json.dumps([*listed, *boxes]))
        return
    rows: list[tuple[str, ...]] = [("NAME", "TITLE", "CLASSES", "AS", "SPLITS", "FROM")]
    for row in DATASETS.values():
        kinds = " or ".join(row.kinds)
        rows.append((row.name, row.title, str(len(row.labels)), kinds, str(row.splits), row.source))
    rows += [(each["name"], each["title"], str(each["classes"]), "boxes", "1", each["source"]) for each in boxes]
    print_table(rows)


@data_app.command("prepare")
def prepare_dataset(
    dataset: DatasetName, data: DataRoot, split: Split = None, kind: DataKind = None, as_json: Json = False
) -> None:
    """Turn a data set's official annotations into lists of videos, and say which of those are absent."""
    from pipelines import vid
    from pipelines.prepare import prepare

    if dataset == vid.NAME:
        _prepare_vid(data, as_json)
        return
    with _items_bar(f"prepare {dataset}", "video") as on_progress:
        report = prepare(dataset, data, split=split, kind=kind, on_progress=on_progress)
    if as_json:
        absent = {each.path.name: dict(each.absent) for each in report.lists}
        typer.echo(json.dumps({"lists": report.rows(), "notes": report.notes, "absent": absent}))
        return
    _print_rows(report.rows())
    for note in report.notes:
        typer.echo(f"note: {note}")
    for each in report.lists:
        for place, why in each.absent[:EXAMPLES]:
            typer.echo(f"absent from {each.path.name}: {place}: {why}")
        if len(each.absent) > EXAMPLES:
            typer.echo(f"... and {len(each.absent) - EXAMPLES} more (--json names all)")


@data_app.command("check")
def check_dataset(
    dataset: DatasetName,
    data: DataRoot,
    split: Split = None,
    kind: DataKind = None,
    part: DataPart = None,
    frames: Annotated[int, typer.Option(help="fewer frames than this are too short")] = 8,
    full: Annotated[bool, typer.Option("--full", help="decode every frame, not the first alone")] = False,
    workers: Annotated[int | None, typer.Option(help="threads; default: one a core")] = None,
    as_json: Json = False,
) -> None:
    """Look at every listed video: missing, unreadable, too short, miscounted; exit code 1 for an unusable one."""
    from pipelines import vid
    from pipelines.prepare import check

    if dataset == vid.NAME:
        _check_vid(data, part, full, as_json)
        return
    with _items_bar(f"check {dataset}", "video") as on_progress:
        report = check(
            dataset,
            data,
            split=split,
            kind=kind,
            part=part,
            frames=frames,
            full=full,
            examples=EXAMPLES,
            workers=workers,
            on_progress=on_progress,
        )
    found = [asdict(finding) for each in report.lists for finding in each.findings]
    if as_json:
        typer.echo(json.dumps({"fine": report.fine, "lists": report.rows(), "examples": found}))
    else:
        _print_rows(report.rows())
        for finding in found:
            typer.echo(f"{finding['fault']}: {finding['path']}: {finding['detail']}")
    if not report.fine:
        raise typer.Exit(1)


def _prepare_vid(data: Path, as_json: bool) -> None:
    from pipelines import vid

    with _items_bar(f"prepare {vid.NAME}", "video") as on_progress:
        report = vid.prepare_vid(data, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps({"files": report.rows(), "notes": report.notes}))
        return
    _print_rows(report.rows())
    for note in report.notes:
        typer.echo(f"note: {note}")


def _check_vid(data: Path, part: Part | None, full: bool, as_json: bool) -> None:
    from pipelines import vid

    home = vid.home_of(data)
    names = [part] if part else [name for name, file in vid.FILES.items() if (home / "annotations" / file).is_file()]
    with _items_bar(f"check {vid.NAME}", "video") as on_progress:
        parts = ((name, vid.open_part(data, name)) for name in names or vid.FILES)
        found = list(vid.check_boxes(parts, full=full, examples=EXAMPLES, on_progress=on_progress))
    fine = all(each.fine for each in found)
    examples = [example for each in found for example in each.examples]
    if as_json:
        typer.echo(json.dumps({"fine": fine, "parts": [each.row() for each in found], "examples": examples}))
    else:
        _print_rows([each.row() for each in found])
        for example in examples:
            typer.echo(example)
    if not fine:
        raise typer.Exit(1)


@data_app.command("extract")
def extract_frames(
    dataset: DatasetName,
    data: DataRoot,
    recipe_name: Annotated[
        str | None, typer.Option("--recipe", help="in the size that this recipe was trained on")
    ] = None,
    size: Annotated[str, typer.Option(help="340x256, 'short-side 256' or 'height 256'; default: as it is")] = "",
    part: DataPart = None,
    workers: Annotated[int | None, typer.Option(help="videos at a time; default: one a core")] = None,
    as_json: Json = False,
) -> None:
    """Turn a data set's video files into folders of JPEGs; what is there already is kept."""
    from pipelines.prepare import extract

    stored = find_recipe(recipe_name).stored if recipe_name else size
    with _items_bar(f"extract {dataset}", "video") as on_progress:
        report = extract(dataset, data, stored=stored, part=part, workers=workers, on_progress=on_progress)
    line = f"{report.extracted} extracted, {report.kept} kept, {len(report.failed)} failed"
    _tell(as_json, asdict(report), line)
    if not as_json:
        for path, why in report.failed:
            typer.echo(f"failed: {path}: {why}")
    if report.failed:
        raise typer.Exit(1)


# evaluation


def evaluate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE")],
    checkpoint: Annotated[str, typer.Argument(help="model file, public checkpoint, or name of a model at hand")],
    data: Annotated[Path | None, typer.Option("--data", help="folder that holds the data set's folder")] = None,
    evaluations: Annotated[
        list[str] | None, typer.Option("--eval", help="top_k_accuracy, mean_class_accuracy; default: both")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[METRIC]...", help="further --eval metrics")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="result as JSON; its journal lies beside it")] = None,
    views: Annotated[Literal["efficient", "accurate"], typer.Option(help="the recipe's setting")] = "efficient",
    clips: Annotated[Clips | None, typer.Option(help="uniform, twice or dense, in place of the setting's")] = None,
    crop: Annotated[Crop | None, typer.Option(help="center, three or ten, in place of the setting's")] = None,
    crop_px: Annotated[int | None, typer.Option("--crop-px", help="side of the crop")] = None,
    part: Annotated[Part, typer.Option(help="train or val")] = "val",
    split: Annotated[int, typer.Option(help="of a data set with several")] = 1,
    kind: Annotated[Kind | None, typer.Option("--kind", help="rawframes or videos; default: the recipe's")] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="any list: `path label` or `path frames label`, one a line")
    ] = None,
    prefix: Annotated[Path | None, typer.Option(help="with --list: folder of its paths; default: the list's")] = None,
    list_order: Annotated[
        Convention | None, typer.Option("--list-order", help="with --list: whose order its label numbers have")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="only so many videos, the first")] = None,
    predictions: Annotated[Path | None, typer.Option(help="a JSON line per video")] = None,
    confusion: Annotated[Path | None, typer.Option(help="picture of the confusion matrix, .png")] = None,
    per_class: Annotated[Path | None, typer.Option("--per-class", help="table of the classes, .csv or .md")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where a run with the same --out stopped")] = False,
    workers: Annotated[int, typer.Option(help="share the list among so many Ray workers")] = 0,
    gpus: Annotated[float | None, typer.Option(help="GPUs of each worker; default: what there is")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: this machine")] = None,
    batch: Annotated[int | None, typer.Option(help="views at a time; default: 1 on a CPU, 32 on a GPU")] = None,
    loaders: Annotated[int | None, typer.Option(help="processes that decode ahead")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="end at the first video that cannot be read")] = False,
    max_skipped: Annotated[
        float, typer.Option("--max-skipped", help="largest share of videos that may be unreadable")
    ] = 0.5,
    as_json: Json = False,
) -> None:
    """Test a checkpoint on listed videos: top-1, top-5, mean class accuracy; a detector: COCO's and VID's AP."""
    from pipelines.box_evaluate import is_detector_test, run_box_evaluation
    from pipelines.choice import BadEvaluation
    from pipelines.evaluate import run_evaluation
    from pipelines.progress import ProgressBar
    from pipelines.results import METRICS

    folders = model_folders(load_settings())
    if is_detector_test(recipe, checkpoint, folders):
        others = {
            "--eval": evaluations,
            "METRIC": more,
            "--views": views != "efficient",
            "--clips": clips,
            "--crop": crop,
            "--crop-px": crop_px,
            "--split": split != 1,
            "--kind": kind,
            "--list-order": list_order,
            "--predictions": predictions,
            "--confusion": confusion,
            "--per-class": per_class,
            "--resume": resume,
            "--workers": workers,
            "--gpus": gpus,
            "--address": address,
        }
        if asked := [name for name, said in others.items() if said]:
            raise BadEvaluation(
                f"{', '.join(asked)}: for recognisers; {recipe} is a detector, which one process tests from the "
                "first video to the last, and its result has every metric and class"
            )
        with ProgressBar() as bar:
            result = run_box_evaluation(
                recipe,
                checkpoint,
                data_root=data,
                part=part,
                list_file=list_file,
                prefix=prefix,
                limit=limit,
                out=out,
                batch=batch,
                loaders=loaders,
                device=device,
                on_error="raise" if strict else "skip",
                max_skipped=max_skipped,
                model_dirs=folders,
                command=shlex.join(["tsm", *sys.argv[1:]]),
                on_progress=bar,
            )
        _tell_boxes(result, out, as_json)
        return
    with ProgressBar() as bar:
        result = run_evaluation(
            recipe,
            checkpoint,
            data_root=data,
            part=part,
            split=split,
            kind=kind,
            list_file=list_file,
            prefix=prefix,
            list_order=list_order,
            limit=limit,
            views=views,
            clips=clips,
            crop=crop,
            crop_px=crop_px,
            metrics=[*(evaluations or []), *(more or [])] or METRICS,
            out=out,
            predictions=predictions,
            confusion=confusion,
            per_class=per_class,
            resume=resume,
            model_dirs=folders,
            command=shlex.join(["tsm", *sys.argv[1:]]),
            workers=workers,
            gpus=gpus,
            address=address,
            batch=batch,
            loaders=loaders,
            device=device,
            on_error="raise" if strict else "skip",
            max_skipped=max_skipped,
            on_progress=bar,
        )
    if as_json:
        typer.echo(json.dumps(result))
        return
    counts = result["counts"]
    typer.echo(f"{counts['tested']} of {counts['listed']} videos, {result['views']['per_video']} views each")
    for name, value in result["percent"].items():
        typer.echo(f"{name:<20} {value:.2f} %")
    for fault in result["skipped"]["videos"][:EXAMPLES]:
        typer.echo(f"skipped: {fault['path']}: {fault['error']}")
    if page := result["published"]:
        shown = _score(Accuracy(page["top1"], page["top5"]))
        typer.echo(f"{page['source']} reports {shown} in its {page['setting']} setting, {page['note']}")
    _tell_files(result, out)


def _tell_boxes(result: dict[str, Any], out: Path | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    counts = result["counts"]
    typer.echo(f"{counts['tested']} of {counts['listed']} videos, {counts['frames']} frames, stepped one by one")
    for name, value in result["percent"].items():
        objects = counts["objects"].get(name.removeprefix("vid_"))
        typer.echo(
            f"{name:<20} {'-' if value is None else f'{value:.2f} %'}" + (f" of {objects} objects" if objects else "")
        )
    for fault in result["skipped"][:EXAMPLES]:
        typer.echo(f"skipped: {fault['error']}")
    _tell_files(result, out)


def _tell_files(result: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        typer.echo(f"written to {out}")
    if "card" in result:
        typer.echo(f"model card: {result['card']}")


# training

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def train(context: typer.Context) -> None:
    """Train a recipe, on this machine or on a Ray cluster; `tsm train --help` says how."""
    from pipelines.train import main

    raise typer.Exit(main(context.args, "tsm train", str(load_settings().models.folder)))


# helpers


def _print_rows(rows: Sequence[Mapping[str, str | int]]) -> None:
    names = list(rows[0]) if rows else ["list"]
    print_table([[name.upper() for name in names], *([str(row[name]) for name in names] for row in rows)])


@contextmanager
def _items_bar(what: str, unit: str) -> Iterator[Any]:
    with tqdm(desc=what, unit=unit, leave=False, delay=0.3) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress


def _at_hand(name: str, path: Path) -> dict[str, Any]:
    recipe, card = read_card(path)
    if isinstance(recipe, DetectorRecipe):
        return {
            "name": name,
            "task": recipe.task,
            "recipe": recipe.name,
            "mode": "step",
            "architecture": recipe.architecture,
            "shift": recipe.shift,
            "sense_of_time": _shift_of(recipe),
            "frames": recipe.frames,
            "input_size": list(recipe.input_size),
            "score_thresh": recipe.score_thresh,
            "gmac_per_result": _cost_of(recipe)["gmac_per_result"],
            "labels": list(recipe.labels),
            "file": str(path),
            "card": card,
        }
    window = {} if recipe.steppable else {"window_s": recipe.window_s, "stride_s": recipe.window_stride_s}
    return {
        "name": name,
        "task": "recognition",
        "recipe": recipe.name,
        "mode": _mode(recipe),
        **window,
        "backbone": recipe.backbone,
        "frames": recipe.frames,
        "input_px": recipe.preprocess.input_px,
        "gmac_per_result": _cost_of(recipe)["gmac_per_result"],
        "labels": list(recipe.labels),
        "file": str(path),
        "card": card,
    }


@contextmanager
def _bytes_bar(name: str) -> Iterator[Any]:
    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, leave=False, delay=0.3) as bar:

        def on_progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress


def _tell(as_json: bool, facts: Mapping[str, Any], line: str) -> None:
    typer.echo(json.dumps(facts) if as_json else line)
