"""The models at hand: shipped with the package, and found in folders of yours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tsm_core.detector_recipes import DETECTOR_RECIPES
from tsm_core.errors import CallerError
from tsm_core.recipes import RECIPES

WEIGHTS = Path(__file__).parent / "weights"


class UnknownModel(CallerError):
    """No model of this name."""

    reason = "unknown_model"


def available_models(extra_dirs: Iterable[Path | str] = ()) -> dict[str, Path]:
    """Name -> model file. A file in `extra_dirs` goes before a shipped one of the same name, later before earlier."""
    found: dict[str, Path] = {}
    for folder in (WEIGHTS, *map(Path, extra_dirs)):
        found.update({file.stem: file for file in sorted(folder.glob("*.safetensors"))})
    return found


def find_model(name: str, path: Path | str | None = None, extra_dirs: Iterable[Path | str] = ()) -> Path:
    """The file of a model: `path` if given, else the one of this name. Raises UnknownModel that lists what exists."""
    if path is not None:
        if not Path(path).is_file():
            raise UnknownModel(f"model {name!r}: file {path} does not exist")
        return Path(path)
    models = available_models(extra_dirs)
    if name not in models:
        have = f"there are {', '.join(sorted(models)) or 'none'}"
        row = RECIPES.get(name) or DETECTOR_RECIPES.get(name)
        way = f"tsm models import FILE --recipe {name}" if row else ""
        if row and row.checkpoint:
            way = f"tsm models pull {name} fetches it, {way} takes a file of yours"
        raise UnknownModel(f"model {name!r} does not exist here; {have}{f'. {way}' if way else ''}")
    return models[name]
