"""Names of weights in other projects' files -> torchvision's, by rules; and what the old names say of the network.

Layouts: MMAction2 0.x and 1.x (one naming; mmcls's backbones share it), mit-han-lab's training code, its online demo,
and torchvision's own, which is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Layout = Literal["mmaction2", "mit-han-lab", "mit-han-lab online", "torchvision"]

MOBILE_BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # of each stage; torchvision counts them through, from features.1
DEPTHS: dict[tuple[bool, tuple[int, ...]], str] = {  # (three convolutions a block, blocks of each stage)
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (False, (1, 2, 2, 2)): "resnet_small",
}
NON_LOCAL_PARTS = {
    "g.0": "g",
    "theta": "theta",
    "phi.0": "phi",
    "W.0": "out",
    "W.1": "norm",
    "g.0.conv": "g",
    "theta.conv": "theta",
    "phi.0.conv": "phi",
    "conv_out.conv": "out",
    "conv_out.bn": "norm",
}


@dataclass(frozen=True)
class Translated:
    """Weights under torchvision's names.

    old_names: each one's name in the file. shifted: convolutions the file marks as shifted. whole_blocks: blocks it
    marks instead. pooled: stages behind a temporal pool. twice: pairs of file keys with one meaning.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    old_names: dict[str, str]
    shifted: frozenset[str]
    whole_blocks: tuple[str, ...]
    pooled: tuple[str, ...]
    twice: tuple[tuple[str, str], ...]

    @property
    def classifier(self) -> str:
        """Path of the last layer."""
        return "classifier.1" if any(key.startswith("features.") for key in self.tensors) else "fc"

    @property
    def backbone(self) -> str | None:
        """Which network this is, from its blocks alone; None: none known here."""
        if "features.0.0.weight" in self.tensors:
            return "mobilenet_v2"
        blocks = {tuple(key.split(".")[:2]) for key in self.tensors if re.match(r"layer[1-4]\.\d+\.conv1\.", key)}
        depths = tuple(sum(stage == f"layer{number}" for stage, _ in blocks) for number in (1, 2, 3, 4))
        return DEPTHS.get(("layer1.0.conv3.weight" in self.tensors, depths))

    @property
    def non_local_places(self) -> tuple[str, ...]:
        """Blocks with a non-local block behind them."""
        return tuple(dict.fromkeys(key.partition(".nl.")[0] for key in self.tensors if ".nl." in key))


@dataclass
class _Marks:
    shifted: set[str] = field(default_factory=set)
    whole_blocks: dict[str, None] = field(default_factory=dict)
    pooled: dict[str, None] = field(default_factory=dict)

    def note(self, place: str, module: str, is_convolution: bool) -> None:
        # a `net` stands inside the wrapper of whatever is shifted or pooled
        if re.fullmatch(r"layer\d", place):
            self.pooled[place] = None
        elif re.fullmatch(r"(layer\d|features)\.\d+", place):
            self.whole_blocks[place] = None
        elif is_convolution:
            self.shifted.add(module)


def translate(weights: Mapping[str, Tensor]) -> Translated:
    """Weights under torchvision's names; what no rule knows stays as it is.

    A bias in front of a non-local block's norm goes into the norm's running mean: the same sum in eval mode.
    """
    prefix = "module." if all(key.startswith("module.") for key in weights) else ""  # torch's DataParallel
    names = {key: key.removeprefix(prefix) for key in weights}
    plain = {key: _without_wrappers(name) for key, name in names.items()}
    paths = [path for path, _ in plain.values()]
    mobile = any(re.match(r"features\.|layer\d\.\d\.conv\.", path) for path in paths)
    # torchvision's MobileNetV2 puts a convolution and its norm into a row of their own; mit-han-lab's does not
    flat = mobile and not any(re.match(r"features\.\d+\.conv\.\d\.\d\.", path) for path in paths)
    layout = _layout(names.values(), flat)

    marks = _Marks()
    tensors: dict[str, Tensor] = {}
    old_names: dict[str, str] = {}
    twice = []
    for key, (path, wrapped) in plain.items():
        if path in ("classifier.weight", "classifier.bias"):
            name = path.replace("classifier", "classifier.1" if mobile else "fc")
        elif mobile:
            name = _mobilenet_name(path, flat)
        else:
            name = _resnet_name(path, layout)
        if name in tensors:
            twice.append((old_names[name], key))
        value = weights[key]
        tensors[name] = value[..., 0] if ".nl." in name and value.ndim == 5 else value  # 1x1x1 over a clip's frames
        old_names[name] = key
        for place in wrapped:
            marks.note(place, name.rpartition(".")[0], value.ndim > 1)
    for bias in [key for key in tensors if key.endswith(".nl.out.bias")]:
        mean = bias.replace(".nl.out.bias", ".nl.norm.running_mean")
        if mean in tensors and tensors[mean].shape == tensors[bias].shape:
            tensors[mean] = tensors[mean] - tensors.pop(bias)
    places = tuple(marks.whole_blocks), tuple(marks.pooled)
    return Translated(layout, tensors, old_names, frozenset(marks.shifted), *places, tuple(twice))


def _layout(names: Iterable[str], flat: bool) -> Layout:
    for name in names:
        if name.startswith(("backbone.", "cls_head.")):
            return "mmaction2"
        if name.startswith(("base_model.", "new_fc.")):
            return "mit-han-lab"
    return "mit-han-lab online" if flat else "torchvision"


def _without_wrappers(name: str) -> tuple[str, list[str]]:
    """The name without what wrappers add, the last layer's as `classifier`; the path of each module inside a `net`."""
    name = re.sub(r"^(backbone|base_model)\.", "", name)
    name = re.sub(r"^(cls_head\.fc_cls|head\.fc|new_fc|fc|classifier\.1)\.(?=(weight|bias)$)", "classifier.", name)
    path: list[str] = []
    wrapped = []
    for part in name.split("."):
        if part == "net":
            wrapped.append(".".join(path))
        elif part != "block":
            path.append(part)
    return ".".join(path), wrapped


def _resnet_name(path: str, layout: Layout) -> str:
    path = re.sub(r"\bconv(\d)\.(conv|bn)\.", lambda found: f"{found[2]}{found[1]}.", path)
    path = re.sub(r"\bdownsample\.(conv|bn)\.", lambda found: f"downsample.{int(found[1] == 'bn')}.", path)
    block, _, inside = path.replace(".non_local_block.", ".nl.").partition(".nl.")
    if not inside:
        return path
    part, _, kind = inside.rpartition(".")
    # without its index a part is not followed by pooling: another kind of block, unless the names are ours
    unknown = part if layout == "torchvision" else f"({part})"
    return f"{block}.nl.{NON_LOCAL_PARTS.get(part, unknown)}.{kind}"


def _mobilenet_name(path: str, flat: bool) -> str:
    if found := re.fullmatch(r"conv([12])\.(conv|bn)\.(\w+)", path):  # MMAction2's first and last layer
        return f"features.{0 if found[1] == '1' else 18}.{int(found[2] == 'bn')}.{found[3]}"
    if found := re.fullmatch(r"layer([1-7])\.(\d)\.conv\.(\d)\.(conv|bn)\.(\w+)", path):  # MMAction2's blocks
        stage, index = int(found[1]) - 1, int(found[2])
        if index < MOBILE_BLOCKS[stage]:
            block = 1 + sum(MOBILE_BLOCKS[:stage]) + index
            return _in_block(block, int(found[3]), found[4] == "bn", found[5]) or path
    if flat and (found := re.fullmatch(r"features\.(\d+)\.conv\.(\d)\.(\w+)", path)):
        position, kind = divmod(int(found[2]), 3)  # convolution, norm, ReLU6
        if kind < 2:
            return _in_block(int(found[1]), position, kind == 1, found[3]) or path
    return path


def _in_block(block: int, position: int, norm: bool, kind: str) -> str | None:
    # expand (not in the first block), depthwise, project; torchvision nests all but the last
    last = 1 if block == 1 else 2
    if position > last:
        return None
    inside = f"{last + norm}" if position == last else f"{position}.{int(norm)}"
    return f"features.{block}.conv.{inside}.{kind}"
