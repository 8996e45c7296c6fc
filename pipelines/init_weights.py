"""What a training begins with: ImageNet's weights, those of another recipe, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision

from tsm_core.backbones import BACKBONES
from tsm_core.checkpoints import import_checkpoint, load_backbone, load_recogniser
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.errors import CallerError
from tsm_core.model import TSM, WindowTSM
from tsm_core.model_file import ModelFileError, read_card
from tsm_core.recipes import RECIPES, Recipe

NONE = "none"
SUFFIXES = (".pth", ".pt", ".safetensors")


class NoInitialWeights(CallerError):
    """The weights that a recipe begins with are not there."""

    reason = "no_initial_weights"


def init_model(
    model: TSM,
    *,
    init: str | None = None,
    file: Path | str | None = None,
    models_dir: Path | str,
    new_head: bool = False,
) -> str:
    """Give `model` its initial weights, in place; a sentence that says which, and whether the classifier is new.

    file: of weights, ours or another project's, of any direction of shifts. Else init (None: what the recipe says):
    `none`, a backbone whose ImageNet weights lie in models_dir/checkpoints, or a recipe whose model lies in models_dir
    or whose published checkpoint lies in models_dir/checkpoints. new_head: a new classifier whatever the file has.
    Raises NoInitialWeights that says what to fetch, and ModelFileError.
    """
    if file is not None:
        return _from_file(model, Path(file), new_head)
    training = model.recipe.training
    wanted = init or (training.init if training else NONE)
    if wanted == NONE:
        return "begins with random weights"
    if wanted in BACKBONES:
        return _from_file(model, find_backbone(wanted, models_dir), new_head)
    if wanted in RECIPES:
        return _from_file(model, find_trained(RECIPES[wanted], models_dir), new_head)
    raise NoInitialWeights(
        f"initial weights {wanted!r}: neither {NONE}, a backbone ({', '.join(BACKBONES)}) nor a recipe; name a file "
        "with --init-from"
    )


def find_backbone(name: str, models_dir: Path | str) -> Path:
    """The file of a backbone's ImageNet weights. Raises NoInitialWeights."""
    folder = Path(models_dir).expanduser() / "checkpoints"
    there = sorted(path for path in folder.glob(f"{name}-*") if path.suffix in SUFFIXES)
    if there:
        return there[0]
    url = imagenet_url(name)
    fetch = f"fetch {url} to {folder / url.rpartition('/')[2]}" if url else f"put a file {name}-*.pth to {folder}"
    raise NoInitialWeights(
        f"the ImageNet weights of {name} are not in {folder}: {fetch}, name a file with --init-from, or begin with "
        f"random weights (--init {NONE})"
    )


def imagenet_url(name: str) -> str | None:
    """Where torchvision publishes the weights that the recipes begin with."""
    try:
        weights: Any = torchvision.models.get_model_weights(name)
    except ValueError:
        return None
    url: str = weights.IMAGENET1K_V1.url
    return url


def find_trained(recipe: Recipe | DetectorRecipe, models_dir: Path | str) -> Path:
    """The file of a recipe's trained weights. Raises NoInitialWeights."""
    models = Path(models_dir).expanduser()
    places = [models / f"{recipe.name}.safetensors"]
    if recipe.checkpoint is not None:
        places.append(models / "checkpoints" / recipe.checkpoint.file)
    for place in places:
        if place.is_file():
            return place
    fetch = f"`tsm models pull {recipe.name}` fetches them" if recipe.checkpoint else f"train {recipe.name} first"
    raise NoInitialWeights(
        f"the weights of {recipe.name} are not there (looked for {' and '.join(map(str, places))}): {fetch}; or name a "
        f"file with --init-from, or begin with random weights (--init {NONE})"
    )


def _from_file(model: TSM, file: Path, new_head: bool) -> str:
    recipe = model.recipe
    own = _own_recipe(file)
    if own is None:
        return _from_foreign(model, file, new_head)
    if own.backbone != recipe.backbone or own.non_local not in (None, recipe.non_local):
        load_backbone(model, file)  # says how they differ
    same = own.labels == recipe.labels
    if not same or new_head or own.non_local != recipe.non_local:
        load_backbone(model, file)
        why = "" if same else f": {len(own.labels)} classes there, {len(recipe.labels)} here, of other names"
        return f"begins with {file.name} ({own.name}), its classifier replaced by a new one{why}"
    trained = load_recogniser(file)
    model.net.load_state_dict((trained.model if isinstance(trained, WindowTSM) else trained).net.state_dict())
    return f"begins with {file.name} ({own.name}), classifier and all{_turned(own.shift, recipe)}"


def _own_recipe(file: Path) -> Recipe | None:
    try:
        recipe = read_card(file)[0]
    except ModelFileError:
        return None
    return recipe if isinstance(recipe, Recipe) else None


def _from_foreign(model: TSM, file: Path, new_head: bool) -> str:
    recipe = model.recipe
    why = ""
    if not new_head:
        theirs = recipe
        if recipe.shift == "uni":  # what others publish shifts both ways
            theirs = replace(recipe, name=recipe.name.removesuffix("_uni"), shift="bi")
        try:
            trained = import_checkpoint(file, theirs)
        except ModelFileError as error:
            if error.reason not in ("other_classes", "no_classifier", "other_shift", "other_non_local"):
                raise
            why = f": {str(error).partition('; ')[0]}" if error.reason == "other_classes" else ""
        else:
            model.net.load_state_dict(trained.net.state_dict())
            return f"begins with {file.name}, classifier and all{_turned(theirs.shift, recipe)}"
    with torch.no_grad():
        load_backbone(model, file)
    return f"begins with {file.name}, with a new classifier{why}"


def _turned(shift: str, recipe: Recipe) -> str:
    return f"; shifts {shift} there, {recipe.shift} here" if shift != recipe.shift else ""
