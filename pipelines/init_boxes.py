"""What a detector's training begins with: weights of a detector, of ImageNet's networks for its backbone, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.init_weights import NONE, NoInitialWeights, find_backbone, find_trained
from tsm_core.backbones import BACKBONES
from tsm_core.checkpoints import load_detector
from tsm_core.detector import TSMDetector
from tsm_core.detector_nets import build_network
from tsm_core.detector_recipes import DETECTOR_RECIPES, DetectorRecipe
from tsm_core.model_file import ModelFileError, read_card

PLACES = ("backbone.", "backbone.body.")  # where detectors have a ResNet


def init_detector(
    model: TSMDetector,
    *,
    init: str | None = None,
    file: Path | str | None = None,
    models_dir: Path | str,
    new_head: bool = False,
) -> str:
    """Give `model` its initial weights, in place; a sentence that says which, and whether the classifier is new.

    file: of a detector of the same architecture, ours or torchvision's, of any shift, or of a ResNet that is its
    backbone. Else init (None: what the recipe says): `none`, a detector's recipe or a backbone whose file lies in
    models_dir. The classifier is new where classes differ, or new_head is said.
    Raises NoInitialWeights that says what to fetch, and ModelFileError.
    """
    recipe = model.recipe
    wanted = init or (recipe.training.init if recipe.training else NONE)
    if file is not None:
        return _from_file(model, Path(file), new_head)
    if wanted == NONE:
        return "begins with random weights"
    if wanted in DETECTOR_RECIPES:
        return _from_file(model, find_trained(DETECTOR_RECIPES[wanted], models_dir), new_head)
    if wanted in BACKBONES or wanted.startswith("resnet"):
        return _from_file(model, find_backbone(wanted, models_dir), new_head)
    raise NoInitialWeights(
        f"initial weights {wanted!r}: neither {NONE}, a detector's recipe (`tsm recipes list`) nor a ResNet; name a "
        "file with --init-from"
    )


def _from_file(model: TSMDetector, file: Path, new_head: bool) -> str:
    weights, labels, told = _read(file)
    state = model.net.state_dict()
    if not any(name.startswith("backbone.") for name in weights):
        return _backbone_from(model, file, weights)
    head = classifier_names(model.recipe)
    other = labels is not None and labels != model.recipe.labels
    fresh = new_head or other or any(_shape(weights, name) != state[name].shape for name in head)
    wanted = {name for name in state if not (fresh and name in head) and not name.endswith("num_batches_tracked")}
    missing = sorted(name for name in wanted if name not in weights)
    wrong = sorted(name for name in wanted - set(missing) if weights[name].shape != state[name].shape)
    unknown = sorted(name for name in weights if name not in state and not name.endswith("num_batches_tracked"))
    if missing or wrong or unknown:
        parts = {"missing": missing, "unknown": unknown, "of another shape": wrong}
        listed = "; ".join(f"{what}: {', '.join(names[:5])} ({len(names)})" for what, names in parts.items() if names)
        raise ModelFileError(f"{file} is no {model.recipe.architecture}: {listed}", reason="other_network")
    _fill(model, {name: weights[name] for name in weights if name in state and not (fresh and name in head)})
    if not fresh:
        return f"begins with {file.name}{told}, classifier and all"
    why = (
        ""
        if labels is None or not other
        else f": {len(labels)} classes there, {len(model.labels)} here, of other names"
    )
    return f"begins with {file.name}{told}, its classifier replaced by a new one{why}"


def _read(file: Path) -> tuple[Mapping[str, Tensor], tuple[str, ...] | None, str]:
    """Weights, the classes where the file says which, and the name of its recipe."""
    if file.suffix == ".safetensors":
        recipe, _ = read_card(file)
        if not isinstance(recipe, DetectorRecipe):
            raise ModelFileError(f"{file} holds {recipe.name}, which is no detector", reason="other_task")
        return load_detector(file).net.state_dict(), recipe.labels, f" ({recipe.name})"
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelFileError(f"{file} does not exist", reason="no_model_file") from None
    except Exception as error:  # noqa: BLE001  a damaged pickle fails in any way
        raise ModelFileError(f"{file} cannot be read: {str(error).splitlines()[0][:200]}") from None
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        weights = weights["model"]
    if not isinstance(weights, dict) or not all(isinstance(each, Tensor) for each in weights.values()):
        raise ModelFileError(f"{file} holds no weights by name")
    return weights, None, ""


def _backbone_from(model: TSMDetector, file: Path, weights: Mapping[str, Tensor]) -> str:
    state = model.net.state_dict()
    place = next((each for each in PLACES if f"{each}conv1.weight" in state), None)
    wanted = [] if place is None else [name.removeprefix(place) for name in state if name.startswith(place)]
    # what a detector adds to its backbone is beside the four stages
    wanted = [name for name in wanted if name.startswith(("conv1.", "bn1.", "layer"))]
    short = [
        name
        for name in wanted
        if not name.endswith("num_batches_tracked") and _shape(weights, name) != state[f"{place}{name}"].shape
    ]
    if not wanted or short:
        differ = f"; {len(short)} weights are missing or differ: {', '.join(short[:5])}" if short else ""
        raise ModelFileError(
            f"{file} is neither a {model.recipe.architecture} nor its backbone{differ}", reason="other_network"
        )
    _fill(model, {f"{place}{name}": weights[name] for name in wanted if name in weights})
    return f"begins with the backbone of {file.name}; all else is new"


def _shape(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def _fill(model: TSMDetector, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.net.state_dict().items():
            if name in weights:
                value.copy_(weights[name])


def classifier_names(recipe: DetectorRecipe) -> set[str]:
    """Names of the weights whose shape depends on the number of classes."""
    more = replace(recipe, labels=(*recipe.labels, "one more"), label_ids=(*recipe.label_ids, recipe.outputs))
    with torch.device("meta"):
        own, other = (_shapes(build_network(each)) for each in (recipe, more))
    return {name for name, shape in own.items() if other[name] != shape}


def _shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in net.state_dict().items()}
