"""What a model file says of itself, read without its weights and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from tsm_core.detector_recipes import DetectorRecipe, recipe_from_json
from tsm_core.errors import CallerError
from tsm_core.recipes import Recipe

FORMAT = "tsm-live/1"


class ModelFileError(CallerError):
    """A model file is missing, damaged, or does not fit its recipe."""

    reason = "bad_model_file"


def read_card(path: Path | str) -> tuple[Recipe | DetectorRecipe, dict[str, Any]]:
    """Recipe and card of a model file, without its weights. Raises ModelFileError."""
    file = Path(path)
    if not file.is_file():
        raise ModelFileError(f"model file {file} does not exist", reason="model_file_not_found")
    with open_safetensors(file, "numpy") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("format") != FORMAT or "recipe" not in metadata:
        raise ModelFileError(f"{file} has no recipe of format {FORMAT} in its metadata; write it with save_model")
    try:
        return recipe_from_json(metadata["recipe"]), json.loads(metadata.get("card", "{}"))
    except CallerError as error:
        raise ModelFileError(f"{file}: {error}") from None


@contextmanager
def open_safetensors(path: Path, framework: Literal["pt", "numpy"]) -> Iterator[Any]:
    """The file as `safe_open` gives it, with tensors of that framework. Raises ModelFileError."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} is no safetensors file: {error}") from None
