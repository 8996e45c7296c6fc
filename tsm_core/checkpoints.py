"""Save and load model files (safetensors with recipe and card in the metadata), and import other projects' weights.

Nothing in a file is ever run. What its pickles hold besides tensors and plain values is refused, or, where known to
be idle, read as nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import save_file
from torch import Tensor

from tsm_core.backbones import ShiftedConv2d
from tsm_core.detector import TSMDetector, build_detector
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.key_maps import Translated, translate
from tsm_core.model import TSM, WindowTSM, build
from tsm_core.model_file import FORMAT, ModelFileError, open_safetensors, read_card
from tsm_core.recipes import Recipe

LISTED = 20  # names in one message
SNIFFED_BYTES = 1 << 16
SORTED_BY_MIT = ("sthv1", "jester")  # data sets whose official order of classes mit-han-lab's models do not follow


AnyModel = TSM | WindowTSM | TSMDetector


def save_model(path: Path | str, model: AnyModel, card: dict[str, Any] | None = None) -> None:
    """Write weights, recipe and card (any JSON object: how it was trained, how it scores) to `path`, all or nothing.

    Weights carry torchvision's parameter names. Where they came from stands in the card as `source`.
    """
    network = model.model if isinstance(model, WindowTSM) else model
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.net.state_dict().items()}
    source = {"source": network.source} if network.source else {}
    metadata = {"format": FORMAT, "recipe": network.recipe.to_json(), "card": json.dumps({**source, **(card or {})})}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> AnyModel:
    """The recogniser or detector in a file, on `device`, in eval mode; in window mode when it cannot be stepped.

    Raises ModelFileError that lists keys which are missing, unknown or of another shape.
    """
    recipe, card = read_card(path)
    _, tensors = _read_safetensors(Path(path))
    model = build_detector(recipe) if isinstance(recipe, DetectorRecipe) else build(recipe)
    if wrong := _differences(model.net.state_dict(), tensors):
        raise ModelFileError(f"{path} does not fit {recipe.name} ({_network_of(recipe)}): {wrong}")
    model.net.load_state_dict(tensors)
    model.source = card.get("source") or {}
    # convolutions are quicker, on CPUs above all, when the channels of a pixel lie together
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return WindowTSM(model).eval() if isinstance(model, TSM) and model.mode == "window" else model


def load_recogniser(path: Path | str, device: torch.device | str = "cpu") -> TSM | WindowTSM:
    """`load_model`, for those who can use a recogniser alone. Raises ModelFileError."""
    model = load_model(path, device)
    if isinstance(model, TSMDetector):
        raise ModelFileError(
            f"{path} is a detector ({model.recipe.name}), and a recogniser is needed here", reason="other_task"
        )
    return model


def load_detector(path: Path | str, device: torch.device | str = "cpu") -> TSMDetector:
    """`load_model`, for those who can use a detector alone. Raises ModelFileError."""
    model = load_model(path, device)
    if not isinstance(model, TSMDetector):
        raise ModelFileError(
            f"{path} is a recogniser ({model.recipe.name}), and a detector is needed here", reason="other_task"
        )
    return model


def _network_of(recipe: Recipe | DetectorRecipe) -> str:
    return recipe.architecture if isinstance(recipe, DetectorRecipe) else recipe.backbone


@overload
def import_checkpoint(path: Path | str, recipe: Recipe) -> TSM: ...
@overload
def import_checkpoint(path: Path | str, recipe: DetectorRecipe) -> TSMDetector: ...
def import_checkpoint(path: Path | str, recipe: Recipe | DetectorRecipe) -> TSM | TSMDetector:
    """The recipe's model with the weights of another project's file, in eval mode.

    Reads files of MMAction2 0.x and 1.x, mit-han-lab, its online demo, and torchvision's names, pickled or safetensors;
    the names tell which. Every weight of the file is used and every weight of the model is filled, or ModelFileError
    says how file and recipe differ. Norms are applied as in eval mode. A detector's file is torchvision's.
    """
    file = Path(path)
    foreign = _read_foreign(file)
    if foreign.own:
        raise ModelFileError(f"{path} is a model of this project already; load it as it is", reason="already_imported")
    if isinstance(recipe, DetectorRecipe):
        return _import_detector(file, foreign.tensors, recipe)
    found = translate(foreign.tensors)
    model = build(recipe)
    _check_network(file, foreign, found, recipe)
    _check_shifts(file, found, model)
    _fill(file, model, found, set(model.net.state_dict()))
    model.source = _source_of(file, found.layout)
    if note := _label_order(found, recipe):
        model.source["note"] = note
    return model.to(memory_format=torch.channels_last).eval()


def _import_detector(file: Path, tensors: dict[str, Tensor], recipe: DetectorRecipe) -> TSMDetector:
    model = build_detector(recipe)
    expected = model.net.state_dict()
    shared = {key: value for key, value in tensors.items() if key in expected}
    told = [_differences({key: expected[key] for key in shared}, shared)]
    if not told[0]:
        _check_finite(file, tensors, {})
        # torchvision renames the keys of its older files as it loads them
        left = model.net.load_state_dict(tensors, strict=False)
        lists = {"missing ": left.missing_keys, "unknown ": left.unexpected_keys}
        told = [f"{what}{_some(which)}" for what, which in lists.items() if which]
    if told:
        raise ModelFileError(f"{file} does not fit {recipe.name} ({recipe.architecture}): {'; '.join(told)}")
    model.source = _source_of(file, "torchvision")
    if recipe.shift != "none":
        model.source["note"] = (
            f"{recipe.name} shifts, and the file does not say whether it was trained so; torchvision's were not"
        )
    return model.to(memory_format=torch.channels_last).eval()


def _source_of(file: Path, layout: str) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": file.name, "sha256": digest, "layout": layout}


def load_backbone(model: TSM | WindowTSM, path: Path | str) -> None:
    """Fill all but the classifier from a file of any layout, or a model of ours, to begin training: ImageNet's, say.

    Shifts and classes of the file do not matter; non-local blocks it does not have stay as they are. Raises
    ModelFileError.
    """
    file = Path(path)
    network = model.model if isinstance(model, WindowTSM) else model
    found = translate(_read_foreign(file).tensors)
    _check_backbone(file, found, network.recipe)
    head = f"{found.classifier}."
    wanted = {key for key in network.net.state_dict() if not key.startswith(head)}
    if not found.non_local_places:
        wanted = {key for key in wanted if ".nl." not in key}
    for key in [key for key in found.tensors if key.startswith(head)]:
        del found.tensors[key]
    _fill(file, network, found, wanted)


# ---- does the file fit the recipe


def _check_backbone(file: Path, found: Translated, recipe: Recipe) -> None:
    first = found.tensors.get("conv1.weight", found.tensors.get("features.0.0.weight"))
    if first is not None and first.ndim == 4 and first.shape[1] != 3:
        flow = " (optical flow: 5 frames of 2)" if first.shape[1] == 10 else ""
        raise ModelFileError(
            f"{file}: its first convolution reads {first.shape[1]} channels{flow}, {recipe.name} reads 3 (RGB); "
            "use the RGB file",
            reason="other_input",
        )
    if found.backbone is None:
        raise ModelFileError(
            f"{file} holds no network known here: its keys are {_some(list(found.old_names.values()), 3)}. Known are "
            "MMAction2's, mit-han-lab's and torchvision's ResNets and MobileNetV2",
            reason="other_backbone",
        )
    if found.backbone != recipe.backbone:
        raise ModelFileError(
            f"{file} holds a {found.backbone}, {recipe.name} is a {recipe.backbone}; use a recipe of that backbone",
            reason="other_backbone",
        )


def _check_network(file: Path, foreign: _Foreign, found: Translated, recipe: Recipe) -> None:
    """Raises ModelFileError that says in words what the file is and the recipe is not."""
    _check_backbone(file, found, recipe)
    name = recipe.name
    if found.whole_blocks:
        raise ModelFileError(
            f"{file} shifts whole blocks ({_some(found.whole_blocks, 3)}; shift_place=block): networks here shift "
            "inside the residual branch (blockres), and such weights mean nothing to them",
            reason="other_shift",
        )
    classifier = found.tensors.get(f"{found.classifier}.weight")
    if classifier is None:
        raise ModelFileError(
            f"{file} has no classifier: it is a backbone, to begin training with (load_backbone)",
            reason="no_classifier",
        )
    classes = classifier.shape[0] if classifier.ndim else 0
    if classes != len(recipe.labels):
        raise ModelFileError(
            f"{file} has {classes} classes, {name} has {len(recipe.labels)}; use a recipe of its data set, "
            "or begin training with its backbone",
            reason="other_classes",
        )
    kind = _non_local_kind(foreign, found)
    if recipe.non_local not in kind:
        raise ModelFileError(
            f"{file} has {' or '.join(map(_said, kind))}, {name} has {_said(recipe.non_local)}; "
            f"use a recipe with non_local={kind[0]}",
            reason="other_non_local",
        )
    pooled = ("layer2",) if recipe.temporal_pool else ()
    if found.pooled != pooled and (found.pooled or found.layout != "torchvision"):
        of_file, of_recipe = (f"before {_some(which)}" if which else "nowhere" for which in (found.pooled, pooled))
        raise ModelFileError(
            f"{file} pools over time {of_file}, {name} {of_recipe}; use a recipe whose temporal_pool is the file's",
            reason="other_temporal_pool",
        )


def _non_local_kind(foreign: _Foreign, found: Translated) -> tuple[str | None, ...]:
    """Which modes the file's non-local blocks may have: names alone do not always tell."""
    if not found.non_local_places:
        return (None,)
    if not any(".nl.theta." in key for key in found.tensors):
        return ("gaussian",)
    said = re.search(r"non_local_cfg\b.{0,400}?\bmode['\"]?\s*[=:]\s*['\"](\w+)", foreign.config, re.DOTALL)
    if said:
        return (said[1],)
    return ("embedded_gaussian",) if found.layout == "mit-han-lab" else ("embedded_gaussian", "dot_product")


def _said(mode: str | None) -> str:
    return f"{mode} non-local blocks" if mode else "no non-local blocks"


def _check_shifts(file: Path, found: Translated, model: TSM) -> None:
    """Raises ModelFileError unless the file's weights were trained with the recipe's shifts, as far as names tell."""
    recipe = model.recipe
    places = [path for path, module in model.net.named_modules() if isinstance(module, ShiftedConv2d)]
    if found.layout == "torchvision" and not found.shifted:
        return  # names without marks: our own, of any shift
    if found.layout == "mit-han-lab online" and not found.shifted:
        if recipe.shift == "uni":
            return
        raise ModelFileError(
            f"{file} has the names of mit-han-lab's online network, whose weights are for shifts from the past alone; "
            f"{recipe.name} has shift={recipe.shift}. Use a recipe with shift=uni",
            reason="other_shift",
        )
    if not found.shifted and places:
        raise ModelFileError(
            f"{file} has no shifted convolutions: it is a 2D network (TSN, say), {recipe.name} shifts {len(places)}. "
            "Use a recipe with shift=none, or begin training with its backbone",
            reason="other_shift",
        )
    if found.shifted and recipe.shift == "uni":
        raise ModelFileError(
            f"{file} was trained with shifts both ways ({len(found.shifted)} convolutions inside a `net`), "
            f"{recipe.name} shifts from the past alone. Use a recipe with shift=bi, such as "
            f"{recipe.name.removesuffix('_uni')}, or train {recipe.name} from it",
            reason="other_shift",
        )
    theirs, ours = found.shifted.difference(places), set(places) - found.shifted
    if theirs or ours:
        facts = {"the file alone shifts": theirs, f"{recipe.name} alone shifts": ours}
        told = "; ".join(f"{who} {_some(sorted(which), 8)}" for who, which in facts.items() if which)
        raise ModelFileError(f"{file} and {recipe.name} shift other convolutions: {told}", reason="other_shift")


def _label_order(found: Translated, recipe: Recipe) -> str | None:
    """A warning where the file's authors count the classes in another order than the recipe."""
    theirs = "mmaction2" if found.layout == "mmaction2" else "mit"
    if found.layout == "torchvision" or recipe.convention == theirs or recipe.dataset not in SORTED_BY_MIT:
        return None
    return (
        f"{found.layout} counts the classes of {recipe.dataset} in another order than {recipe.name} names them; for "
        f"such files use a recipe with convention={theirs}"
    )


def _fill(file: Path, model: TSM, found: Translated, wanted: set[str]) -> None:
    """Load the file's weights into `wanted`, all of both. Raises ModelFileError."""
    if found.twice:
        pairs = [f"{one} and {other}" for one, other in found.twice]
        raise ModelFileError(f"{file} has two names for one weight: {_some(pairs)}")
    expected = {key: value for key, value in model.net.state_dict().items() if key in wanted}
    counters = {key: value for key, value in expected.items() if key.endswith(".num_batches_tracked")}
    tensors = {**counters, **found.tensors}  # old files do not count batches, and nothing here asks
    if wrong := _differences(expected, tensors, found.old_names):
        raise ModelFileError(f"{file} does not fit {model.recipe.name} ({model.recipe.backbone}): {wrong}")
    _check_finite(file, tensors, found.old_names)
    model.net.load_state_dict(tensors, strict=False)


def _check_finite(file: Path, tensors: Mapping[str, Tensor], old_names: Mapping[str, str]) -> None:
    odd = {key: int((~value.isfinite()).sum()) for key, value in tensors.items() if value.is_floating_point()}
    if bad := [f"{old_names.get(key, key)} ({count} of {tensors[key].numel()})" for key, count in odd.items() if count]:
        raise ModelFileError(
            f"{file} holds values that are not finite in {_some(bad)}: training diverged or the file is damaged",
            reason="not_finite",
        )


def _differences(
    expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], old_names: Mapping[str, str] | None = None
) -> str:
    theirs = old_names or {}
    missing = [key for key in expected if key not in tensors]
    unknown = [theirs.get(key, key) for key in tensors if key not in expected]
    other = [
        f"{theirs.get(key, key)} is {tuple(tensors[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    told = {"missing ": missing, "unknown ": unknown, "": other}
    return "; ".join(f"{what}{_some(which)}" for what, which in told.items() if which)


def _some(names: Iterable[str], most: int = LISTED) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


# ---- reading files


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with open_safetensors(path, "pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class _Foreign:
    """Tensors of a file. config: the text that MMAction2 trained it with, if there. own: it is a model of ours."""

    tensors: dict[str, Tensor]
    config: str = ""
    own: bool = False


class _Idle:
    """Stands for an object of a foreign pickle that nobody here asks for; holds and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Idle:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


# What training programs leave beside the weights: scores, histories, options, times.
IDLE = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.dtypes.{name}DType" for name in ("Float16", "Float32", "Float64", "Int32", "Int64", "UInt8", "Bool")),
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # how a HistoryBuffer names its methods
    "argparse.Namespace",
    "datetime.datetime",
    "pathlib.PosixPath",
)
DICTS = ("mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict", "addict.addict.Dict")


def _read_foreign(path: Path) -> _Foreign:
    """The tensors of any file that other projects write. Raises ModelFileError."""
    if not path.is_file():
        what = "is a folder; name the file in it" if path.is_dir() else "does not exist"
        raise ModelFileError(f"checkpoint {path} {what}", reason="model_file_not_found")
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(SNIFFED_BYTES)
    if size == 0:
        raise ModelFileError(f"{path} is empty (0 bytes): fetch it again", reason="empty_file")
    if head.lstrip()[:1] == b"<":
        raise ModelFileError(
            f"{path} is a web page, not a checkpoint: it begins {head[:40]!r}. The download met an error or log-in "
            "page; fetch it again",
            reason="not_a_checkpoint",
        )
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        metadata, tensors = _read_safetensors(path)
        return _Foreign(_tensors_of(path, tensors), own=metadata.get("format") == FORMAT)
    content = _unpickled(path, head, size)
    if isinstance(content, Mapping) and "state_dict" in content:
        return _Foreign(_tensors_of(path, content["state_dict"]), _config_of(content.get("meta")))
    return _Foreign(_tensors_of(path, content))


def _unpickled(path: Path, head: bytes, size: int) -> Any:
    """What torch.save put into the file, or ModelFileError; nothing in it is run."""
    stand_ins = [*((_Idle, name) for name in IDLE), *((OrderedDict, name) for name in DICTS)]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  a damaged pickle fails in any way
        asked = re.search(r"GLOBAL (\S+)", str(error))
        names = [asked[1]] if asked else _globals_in(path, head)
        if isinstance(error, pickle.UnpicklingError) and names:
            raise ModelFileError(
                f"{path} asks for {_some(names, 3)}, which weights do not need; nothing of it was run. If you trust "
                "its origin, load it with the program that wrote it and save its state_dict alone",
                reason="unsafe_pickle",
            ) from None
        if head[:2] == b"PK" or head[:1] == b"\x80":
            said = re.search(r"WeightsUnpickler error: *(.*)|(.+)", str(error))
            why = (said[1] or said[2] if said else "") or type(error).__name__
            raise ModelFileError(
                f"{path} is cut short, damaged, or not by torch.save ({size} bytes; {why}): fetch it again",
                reason="damaged_file",
            ) from None
        raise ModelFileError(
            f"{path} is no checkpoint: it begins {head[:16]!r}. Files of torch.save and safetensors are read; unpack "
            "an archive first",
            reason="not_a_checkpoint",
        ) from None


def _globals_in(path: Path, head: bytes) -> list[str]:
    """Names a pickle asks for and weights have no need of, read without running it; as far as they can be seen."""
    names: list[str] = []
    texts: list[str] = []
    try:
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                (inside,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(inside) as stream:
                    head = stream.read(SNIFFED_BYTES)
        for code, value, _ in pickletools.genops(head):
            if code.name == "GLOBAL":
                names.append(str(value).replace(" ", "."))
            elif code.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif isinstance(value, str):
                texts.append(value)
    except (ValueError, zipfile.BadZipFile):
        pass
    return [name for name in names if name not in (*IDLE, *DICTS) and not name.startswith(("torch.", "collections."))]


def _tensors_of(path: Path, weights: Any) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping):
        raise ModelFileError(f"{path} holds a {type(weights).__name__}, not a state_dict", reason="no_weights")
    if not any(isinstance(value, Tensor) for value in weights.values()):
        entries = _some(map(str, weights)) or "none"
        raise ModelFileError(f"{path} has no state_dict: its entries are {entries}", reason="no_weights")
    odd = [
        f"{key} ({type(value).__name__})"
        for key, value in weights.items()
        if not isinstance(key, str)
        or not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.is_quantized
        or value.is_complex()
    ]
    if odd:
        raise ModelFileError(f"{path}: {_some(odd)} among its weights are no plain tensors", reason="no_weights")
    return dict(weights)


def _config_of(meta: Any) -> str:
    values = [meta.get("config"), meta.get("cfg")] if isinstance(meta, Mapping) else []
    return "\n".join(str(value) for value in values if value)
