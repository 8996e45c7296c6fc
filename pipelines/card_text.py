"""The words that all model cards share, in Markdown: how the model was trained, by which commands and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[tuple[str, object]], header: tuple[str, str] = ("", "")) -> str:
    """Two columns; rows without a value are left out."""
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows if value is not None)])


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def training_text(card: Mapping[str, Any]) -> str:
    """How a model was trained, as the card in its file says."""
    data, options = card.get("data", {}), card.get("options", {})
    clips = {name: value for name, value in options.get("clips", {}).items() if value is not None}
    on = [name for name, value in options.items() if value is True]
    chosen = [f"{name} {value}" for name, value in clips.items()] + on
    seconds = card.get("training_s")
    return table(
        [
            ("data", data.get("dataset")),
            ("videos", data.get("videos")),
            ("identity of the lists", ", ".join(str(data[name]) for name in ("train", "val") if name in data) or None),
            ("it", card.get("began")),
            ("seed", card.get("seed")),
            ("learning rate", card.get("lr")),
            ("videos a step", card.get("total_batch")),
            ("precision", card.get("amp")),
            ("options", ", ".join(chosen) or None),
            ("epochs, steps", f"{card.get('epochs')}, {card.get('steps')}"),
            ("time", None if seconds is None else f"{seconds} s on {card.get('machine')}"),
            ("videos that could not be read and were replaced", card.get("replaced_videos")),
            ("steps left out, as their loss was no number", card.get("bad_steps")),
            ("date", card.get("date")),
        ],
        ("training", ""),
    )


def commands_text(train: str | None, evaluate: str | None) -> str:
    """The commands that lead here."""
    return "\n".join(["```sh", *(command for command in (train, evaluate) if command), "```"])


def versions_text(training: Mapping[str, str], evaluation: Mapping[str, str]) -> str:
    """Of what computed."""
    told = [("trained with", training), ("evaluated with", evaluation)]
    return "\n".join(f"- {name} " + ", ".join(f"{key} {value}" for key, value in each.items()) for name, each in told)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The recipe as it stands in the model file, without its classes."""
    shown = {name: value for name, value in recipe.items() if value is not None and name != "labels"}
    return "```json\n" + json.dumps(shown, indent=1) + "\n```"
