"""The card of a model that was trained here, as `tsm evaluate` leaves it beside its result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.card_text import commands_text, recipe_text, table, training_text, versions_text
from pipelines.curves import save_curves
from pipelines.prepare import write_whole
from tsm_core.checkpoints import ModelFileError, read_card
from tsm_core.recipes import Recipe


def card_files(out: Path) -> tuple[Path, Path]:
    """Where the card of a result is written, and the picture of its curves."""
    return out.with_name(f"{out.stem}.card.md"), out.with_name(f"{out.stem}.curves.png")


def save_card(out: Path, recipe: Recipe, checkpoint: Path, result: Mapping[str, Any]) -> Path | None:
    """Write the card and its picture beside the result `out`; None: the model was not trained here.

    checkpoint: file of the model. result: what `run_evaluation` returns.
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


def card_text(recipe: Recipe, source: Mapping[str, Any], result: Mapping[str, Any], picture: str) -> str:
    """The card in Markdown. source: what stands in the model file. picture: name of that of the curves."""
    counts, run, checkpoint = result["counts"], result["run"], result["checkpoint"]
    seen = "one frame at a time, no future seen" if recipe.steppable else "whole clips, in window mode when live"
    about = (
        f"{recipe.backbone}, shift {recipe.shift}, clips of {recipe.frames} frames at {recipe.preprocess.input_px} px; "
        f"{len(recipe.labels)} classes; recognises {seen}."
    )
    scores = [(name, f"{value:.2f} %") for name, value in result["percent"].items()]
    best = source.get("scores", {}).get("best", {})
    parts = [
        f"# {recipe.name}",
        about,
        f"`{checkpoint['name']}`, SHA-256 `{checkpoint['sha256']}`.",
        "## Scores",
        table(
            [
                *scores,
                ("on", f"{result['dataset'] or result['list']}, {counts['tested']} videos"),
                ("views", f"{result['views']['setting']}: {result['views']['per_video']} a video"),
                ("classes that have videos", f"{counts['classes_with_videos']} of {counts['classes']}"),
                ("videos that could not be read", counts["skipped"]),
                ("list", result["list_sha256"]),
                ("while it was trained, at its best", f"top-1 {best['top1']:.2%}" if best else None),
            ],
            ("score", ""),
        ),
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
