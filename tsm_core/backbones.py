"""torchvision's ResNet and MobileNetV2 with the shifts put in; parameter names stay torchvision's.

A ResNet-50 may have non-local blocks (`layer2.0.nl.*` and so on), a ResNet a temporal pool behind layer1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import MobileNetV2, ResNet, mobilenet_v2, resnet50, resnet101
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from tsm_core.errors import CallerError, ShapeError
from tsm_core.non_local import NonLocalBlock, NonLocalMode
from tsm_core.shift import MeasurePass, Pass, running

Place = tuple[nn.Module, str]  # a convolution: the module that holds it, and its name there

FC_STD = 0.001
DEEP = 23  # blocks of a stage, as ResNet-101 has them
NON_LOCAL_PLACES = ("layer2.0", "layer2.2", "layer3.0", "layer3.2", "layer3.4")  # in a ResNet-50; none elsewhere


class UnknownBackbone(CallerError):
    """No backbone of this name, or none with such parts."""

    reason = "unknown_backbone"


class ShiftedConv2d(nn.Conv2d):
    """A convolution that reads its input through the temporal shift; weights and their names are those of Conv2d."""

    layer: int
    fold_div: int

    @classmethod
    def around(cls, conv: nn.Conv2d, layer: int, fold_div: int) -> ShiftedConv2d:
        """The same convolution, same weights, as shifted layer number `layer`."""
        shifted = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        shifted.weight, shifted.bias = conv.weight, conv.bias
        shifted.layer, shifted.fold_div = layer, fold_div
        return shifted

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x (frames, C, H, W), shifted as the running pass says."""
        how = running.get()
        out = super().forward(how.shift(self.layer, x, self.fold_div))
        how.unshift(self.layer, x)
        return out

    def extra_repr(self) -> str:
        """Conv2d's, and the shift."""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, shifted layer {self.layer}, 1/{self.fold_div} of the channels"


class NonLocalBottleneck(Bottleneck):  # type: ignore[misc]
    """A residual block with a non-local block `nl` behind it."""

    nl: NonLocalBlock

    @classmethod
    def around(cls, block: Bottleneck, mode: NonLocalMode) -> NonLocalBottleneck:
        """The same block, same layers, and a new non-local block."""
        with torch.device("meta"):  # every layer is replaced below
            whole = cls(block.conv1.in_channels, block.conv1.out_channels, block.stride, block.downsample)
        for name, layer in block.named_children():
            setattr(whole, name, layer)
        whole.nl = NonLocalBlock(block.conv3.out_channels, mode)
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """Frames (N * T, C, H, W) -> (N * T, C', H', W')."""
        out: Tensor = self.nl(super().forward(x))
        return out


class PooledStage(nn.Sequential):
    """A stage of a network behind a maximum over time, kernel 3 and stride 2: from here on a clip has T / 2 frames."""

    def forward(self, x: Tensor) -> Tensor:
        """Frames (N * T, C, H, W) -> (N * T / 2, C', H', W'). Raises ShapeError when T is odd."""
        how = running.get()
        if how.frames % 2:
            raise ShapeError(f"a temporal pool halves clips of an even number of frames, got {how.frames}")
        clip = x.view(-1, how.frames, *x.shape[1:]).transpose(1, 2)  # (N, C, T, H, W)
        halved = functional.max_pool3d(clip, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))
        how.frames //= 2
        out: Tensor = super().forward(halved.transpose(1, 2).flatten(0, 1))  # type: ignore[no-untyped-call]
        return out


class DropoutLinear(nn.Linear):
    """A linear layer behind dropout, so that a network's `fc` keeps its name."""

    p: float = 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Logits (frames, classes) of x (frames, features)."""
        return super().forward(functional.dropout(x, self.p, self.training))


class SmallResNet(ResNet):  # type: ignore[misc]
    """A ResNet of BasicBlocks [1, 2, 2, 2], 16 to 128 channels, 5x5 stride-2 stem and no max-pool: 0.7 M parameters."""

    def __init__(self, num_classes: int) -> None:
        with torch.device("meta"):  # every layer with weights is replaced below
            super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, 16, kernel_size=5, stride=2, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.maxpool = nn.Identity()
        self.layer1 = self._make_layer(BasicBlock, 16, 1)
        self.layer2 = self._make_layer(BasicBlock, 32, 2, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 64, 2, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 128, 2, stride=2)
        self.fc = nn.Linear(128, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def residual_places(stages: Sequence[nn.Sequential]) -> Iterator[Place]:
    """Of ResNet stages: the first convolution of a residual branch, of every second block where one stage is deep."""
    every = 2 if max(len(stage) for stage in stages) >= DEEP else 1
    for stage in stages:
        for index, block in enumerate(stage):
            if index % every == 0:
                yield block, "conv1"


def _resnet_slots(net: ResNet) -> Iterator[Place]:
    return residual_places((net.layer1, net.layer2, net.layer3, net.layer4))


def _mobilenet_slots(net: MobileNetV2) -> Iterator[Place]:
    # the expanding 1x1 convolution of every block that has one and keeps its identity path
    for block in net.features:
        if isinstance(block, InvertedResidual) and block.use_res_connect and len(block.conv) == 4:
            yield block.conv[0], "0"


def shift_at(places: Iterable[Place], fold_div: int) -> None:
    """Put a shift before each of these convolutions, in that order."""
    for layer, (parent, name) in enumerate(list(places)):
        setattr(parent, name, ShiftedConv2d.around(getattr(parent, name), layer, fold_div))


def _non_local_blocks(net: nn.Module, mode: NonLocalMode) -> None:
    for place in NON_LOCAL_PLACES:
        stage, _, index = place.partition(".")
        blocks = net.get_submodule(stage)
        blocks[int(index)] = NonLocalBottleneck.around(blocks[int(index)], mode)  # type: ignore[index,operator]


def _classifier(net: nn.Module, dropout: float) -> None:
    if isinstance(net, ResNet):
        fc = DropoutLinear(net.fc.in_features, net.fc.out_features)
        fc.p, net.fc = dropout, fc
        last: nn.Linear = fc
    else:
        net.classifier[0].p = dropout  # type: ignore[index,union-attr]
        last = net.classifier[1]  # type: ignore[index,assignment]
    nn.init.normal_(last.weight, std=FC_STD)
    nn.init.zeros_(last.bias)


BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    "resnet50": lambda classes: resnet50(num_classes=classes),
    "resnet101": lambda classes: resnet101(num_classes=classes),
    "mobilenet_v2": lambda classes: mobilenet_v2(num_classes=classes),
    "resnet_small": SmallResNet,
}


def build_backbone(
    name: str,
    num_classes: int,
    *,
    shifted: bool = True,
    fold_div: int = 8,
    dropout: float = 0.5,
    non_local: NonLocalMode | None = None,
    temporal_pool: bool = False,
) -> nn.Module:
    """A torchvision network with random weights, shifted layers and a fresh classifier: (frames, 3, H, W) -> logits.

    Call it through `run`, which says what the shift does. `shifted=False` leaves the plain network, which sees single
    frames. A state_dict of torchvision's class loads strictly where there are no non-local blocks. With temporal_pool
    there are logits for every second frame. Raises UnknownBackbone.
    """
    if name not in BACKBONES:
        raise UnknownBackbone(f"backbone {name!r} does not exist; there are {', '.join(sorted(BACKBONES))}")
    if non_local and name != "resnet50":
        raise UnknownBackbone(f"non-local blocks have their places in resnet50, not in {name}; leave them out")
    net = BACKBONES[name](num_classes)
    if temporal_pool and not isinstance(net, ResNet):
        raise UnknownBackbone(f"a temporal pool has its place behind layer1 of a ResNet, not in {name}; leave it out")
    if shifted:
        shift_at(_resnet_slots(net) if isinstance(net, ResNet) else _mobilenet_slots(net), fold_div)
    if non_local:
        _non_local_blocks(net, non_local)
    if temporal_pool:
        net.layer2 = PooledStage(*net.layer2)  # type: ignore[misc]
    _classifier(net, dropout)
    return net


def fold_batch_norm(net: nn.Module) -> None:
    """Put each batch norm's statistics into the convolution before it: same outputs in eval mode, fewer passes.

    torchvision registers every norm right behind its convolution. The network cannot be trained any more.
    """
    for parent in list(net.modules()):
        children = list(parent.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                setattr(parent, name, nn.Identity())


def shifted_layers(net: nn.Module) -> int:
    """How many layers of `net` are shifted: so many frames back its memory reaches."""
    return sum(isinstance(module, ShiftedConv2d) for module in net.modules())


@contextmanager
def passing(how: Pass) -> Iterator[None]:
    """Within it, layers that look at other frames do as `how` says. Other threads do not see it."""
    token = running.set(how)
    try:
        yield
    finally:
        running.reset(token)


def run(net: nn.Module, frames: Tensor, how: Pass) -> Tensor:
    """`net(frames)`, with `how` at the layers that look at other frames."""
    with passing(how):
        out: Tensor = net(frames)
        return out


def state_spec(net: nn.Module, input_px: int) -> list[tuple[int, int, int]]:
    """Shape (fold, H, W) of each shifted layer's state for square frames of `input_px`; leaves `net` unchanged."""
    measure = MeasurePass()
    weight = next(net.parameters())
    training = net.training
    net.eval()
    with torch.no_grad():
        run(net, weight.new_zeros(1, 3, input_px, input_px), measure)
    net.train(training)
    return measure.spec
