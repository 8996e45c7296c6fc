"""Save and load model files: safetensors (nothing in them can run), with the recipe and card in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tsm_core.errors import CallerError
from tsm_core.model import TSM, WindowTSM, build
from tsm_core.recipes import Recipe

FORMAT = "tsm-live/1"


class ModelFileError(CallerError):
    """A model file is missing, damaged, or does not fit its recipe."""

    reason = "bad_model_file"


def save_model(path: Path | str, model: TSM | WindowTSM, card: dict[str, Any] | None = None) -> None:
    """Write weights, recipe and card (any JSON object: how it was trained, how it scores) to `path`, all or nothing.

    Weights carry torchvision's parameter names.
    """
    network = model.model if isinstance(model, WindowTSM) else model
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.net.state_dict().items()}
    metadata = {"format": FORMAT, "recipe": network.recipe.to_json(), "card": json.dumps(card or {})}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_card(path: Path | str) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and card of a model file, without its weights. Raises ModelFileError."""
    metadata, _ = _read(Path(path), weights=False)
    try:
        return Recipe.from_json(metadata["recipe"]), json.loads(metadata.get("card", "{}"))
    except CallerError as error:
        raise ModelFileError(f"{path}: {error}") from None


def load_model(path: Path | str, device: torch.device | str = "cpu") -> TSM | WindowTSM:
    """The model in a file, on `device`, in eval mode; in window mode when it cannot be stepped.

    Raises ModelFileError that lists keys which are missing, unknown or of another shape.
    """
    recipe, _ = read_card(path)
    _, tensors = _read(Path(path), weights=True)
    model = build(recipe)
    expected = model.net.state_dict()
    wrong = [f"missing {key}" for key in expected if key not in tensors]
    wrong += [f"unknown {key}" for key in tensors if key not in expected]
    wrong += [
        f"{key} is {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ModelFileError(f"{path} does not fit {recipe.name} ({recipe.backbone}): {', '.join(wrong[:20])}{more}")
    model.net.load_state_dict(tensors)
    # convolutions are quicker, on CPUs above all, when the channels of a pixel lie together
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return model if recipe.steppable else WindowTSM(model).eval()


def _read(path: Path, weights: bool) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise ModelFileError(f"model file {path} does not exist", reason="model_file_not_found")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()} if weights else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path} is no safetensors file: {error}") from None
    if metadata.get("format") != FORMAT or "recipe" not in metadata:
        raise ModelFileError(f"{path} has no recipe of format {FORMAT} in its metadata; write it with save_model")
    return metadata, tensors
