"""The card of a model that was trained here, as `tsm evaluate` leaves it beside its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.card_text import commands_text, recipe_text, table, training_text, versions_text
from pipelines.curves import save_curves
from pipelines.prepare import write_whole
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.model_file import ModelFileError, read_card
from tsm_core.recipes import Recipe


def card_files(out: Path) -> tuple[Path, Path]:
    """Where the card of a result is written, and the picture of its curves."""
    return out.with_name(f"{out.stem}.card.md"), out.with_name(f"{out.stem}.curves.png")


def save_card(out: Path, recipe: Recipe | DetectorRecipe, checkpoint: Path, result: Mapping[str, Any]) -> Path | None:
    """Write the card and its picture beside the result `out`; None: the model was not trained here.

    checkpoint: file of the model. result: what `run_evaluation` or `run_box_evaluation` returns.
    """
    try:
        _, source = read_card(checkpoint)
    except ModelFileError:  # another project's weights
        return None
    history = source.get("curves")
    if not history:
        return None
    text, picture = card_files(out)
    points = [[row["step"], row["lr"], row["loss"]] for row in history]
    part = picture.with_name(f".{picture.name}.part")
    save_curves(part, points, history, f"{recipe.name}, {source.get('steps')} steps")
    part.replace(picture)
    write_whole(text, card_text(recipe, source, result, picture.name))
    return text


def card_text(
    recipe: Recipe | DetectorRecipe, source: Mapping[str, Any], result: Mapping[str, Any], picture: str
) -> str:
    """The card in Markdown. source: what stands in the model file. picture: name of that of the curves."""
    run, checkpoint = result["run"], result["checkpoint"]
    best = source.get("scores", {}).get("best", {})
    about, facts = (
        _detection(recipe, best, result) if isinstance(recipe, DetectorRecipe) else _recognition(recipe, best, result)
    )
    scores = [(name, None if value is None else f"{value:.2f} %") for name, value in result["percent"].items()]
    parts = [
        f"# {recipe.name}",
        about,
        f"`{checkpoint['name']}`, SHA-256 `{checkpoint['sha256']}`.",
        "## Scores",
        table([*scores, *facts], ("score", "")),
        "Figures of this data alone; nothing is known of other videos.",
        "## Training",
        training_text(source),
        f"![Curves of the training]({picture})",
        "## Commands",
        commands_text(source.get("command"), run["command"]),
        "## Versions",
        versions_text(source.get("versions", {}), run["versions"]),
        "## Recipe",
        recipe_text(json.loads(recipe.to_json())),
        "Classes: " + ", ".join(recipe.labels) + ".",
    ]
    return "\n\n".join(parts) + "\n"


Told = tuple[str, list[tuple[str, object]]]  # what the model is, and what its scores are of


def _recognition(recipe: Recipe, best: Mapping[str, float], result: Mapping[str, Any]) -> Told:
    counts = result["counts"]
    seen = "one frame at a time, no future seen" if recipe.steppable else "whole clips, in window mode when live"
    about = (
        f"{recipe.backbone}, shift {recipe.shift}, clips of {recipe.frames} frames at {recipe.preprocess.input_px} px; "
        f"{len(recipe.labels)} classes; recognises {seen}."
    )
    return about, [
        ("on", f"{result['dataset'] or result['list']}, {counts['tested']} videos"),
        ("views", f"{result['views']['setting']}: {result['views']['per_video']} a video"),
        ("classes that have videos", f"{counts['classes_with_videos']} of {counts['classes']}"),
        ("videos that could not be read", counts["skipped"]),
        ("list", result["list_sha256"]),
        ("while it was trained, at its best", f"top-1 {best['top1']:.2%}" if best else None),
    ]


def _detection(recipe: DetectorRecipe, best: Mapping[str, float], result: Mapping[str, Any]) -> Told:
    counts, (height, width) = result["counts"], result["input_size"]
    about = (
        f"{recipe.architecture}, shift {recipe.shift}, clips of {recipe.frames} frames at {width}x{height} px; "
        f"{len(recipe.labels)} classes; finds objects one frame at a time, no future seen."
    )
    return about, [
        ("on", f"{result['dataset'] or result['list']}, {counts['tested']} videos, {counts['frames']} frames"),
        ("objects", ", ".join(f"{name} {number}" for name, number in counts["objects"].items())),
        ("videos that could not be read", counts["skipped"]),
        ("identity of the data", result["data_identity"]),
        ("rules", "; ".join(f"{name}: {rule}" for name, rule in result["rules"].items())),
        ("while it was trained, at its best", f"AP50 {best['vid_all']:.2%}" if best else None),
    ]
