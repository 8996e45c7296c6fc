"""torchvision's detectors, as its builders make them, with the shifts put in; parameter names stay torchvision's.

Shifted is the backbone alone, inside its residual branches: pyramids and heads see single frames. v1 builders have the
frozen batch norm that their published files were trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from tsm_core.backbones import Place, residual_places, shift_at
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.rfcn import RFCN


class SmallBackbone(nn.Module):
    """Features (frames, 64, H / 8, W / 8) of pictures (frames, 3, H, W): eight residual blocks, 0.5 M parameters."""

    out_channels = 64

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_strided(3, 16), *_strided(16, 32))
        self.layer1 = nn.Sequential(*(BasicBlock(32, 32) for _ in range(2)))
        self.down = nn.Sequential(*_strided(32, 64))
        self.layer2 = nn.Sequential(*(BasicBlock(64, 64) for _ in range(6)))
        for module in self.modules():
            _even(module)

    def forward(self, x: Tensor) -> Tensor:
        """The features of x."""
        out: Tensor = self.layer2(self.down(self.layer1(self.stem(x))))
        return out


def _even(module: nn.Module) -> None:
    """Begin a convolution with weights that keep the size of what passes."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _strided(channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    return conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


def _fcos_small(classes: int) -> Any:
    anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    backbone = SmallBackbone()
    head = FCOSHead(backbone.out_channels, 1, classes, num_convs=2)
    # torchvision draws them for fine-tuning, so small that from scratch no class is told apart for 1,000 steps
    for branch in (head.classification_head.conv, head.regression_head.conv):
        branch.apply(_even)
    return FCOS(backbone, classes, anchor_generator=anchors, head=head)


def _fcos(classes: int) -> Any:
    pyramid = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return FCOS(pyramid, classes)


def _faster_mobilenet(proposals: int, classes: int) -> Any:
    pyramid = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=FrozenBatchNorm2d, trainable_layers=6
    )
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
    return FasterRCNN(
        pyramid,
        classes,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_test=proposals,
        rpn_post_nms_top_n_test=proposals,
        rpn_score_thresh=0.05,
    )


def _published(builder: Callable[..., Any]) -> Callable[[int], Any]:
    return lambda classes: builder(weights=None, weights_backbone=None, num_classes=classes)


NETWORKS: dict[str, Callable[[int], Any]] = {
    "ssdlite320_mobilenet_v3_large": _published(detection.ssdlite320_mobilenet_v3_large),
    "fasterrcnn_mobilenet_v3_large_320_fpn": lambda classes: _faster_mobilenet(150, classes),
    "fasterrcnn_mobilenet_v3_large_fpn": lambda classes: _faster_mobilenet(1000, classes),
    "fasterrcnn_resnet50_fpn_v2": _published(detection.fasterrcnn_resnet50_fpn_v2),
    "fcos_resnet50_fpn": _fcos,
    "retinanet_resnet50_fpn_v2": _published(detection.retinanet_resnet50_fpn_v2),
    "fcos_small": _fcos_small,
    "rfcn_resnet101": RFCN,
}


def build_network(recipe: DetectorRecipe) -> Any:
    """The recipe's network with random weights, its shifted layers numbered in the order in which they are passed."""
    net: Any = NETWORKS[recipe.architecture](recipe.outputs)
    if recipe.shift != "none":
        shift_at(_places(net.backbone), recipe.shift_div)
    return net


def _places(backbone: nn.Module) -> Iterator[Place]:
    """Of a ResNet as everywhere; of a MobileNetV3 the expanding 1x1 convolution of every block with an identity path.

    The first such block of a MobileNetV3 has no expansion and is not shifted.
    """
    stages = [each for each in backbone.modules() if isinstance(each, nn.Sequential) and _is_stage(each)]
    if stages:
        yield from residual_places(stages)
    for block in backbone.modules():
        if isinstance(block, InvertedResidual) and block.use_res_connect and block.block[0][0].kernel_size == (1, 1):
            yield block.block[0], "0"


def _is_stage(layers: nn.Sequential) -> bool:
    return len(layers) > 0 and all(isinstance(layer, BasicBlock | Bottleneck) for layer in layers)
