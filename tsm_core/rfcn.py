"""R-FCN on ResNet-101, as Flow-Guided Feature Aggregation trains it on ImageNet VID.

Source: Dai et al., arXiv:1605.06409, and the configuration of Zhu et al., arXiv:1703.10025: stage 5 dilated to stride
16, a 3x3 convolution of dilation 6 to 1024 channels, one half of which proposes boxes, the other votes for what is in
them by position; boxes do not depend on the class; hard examples are mined online. Parts are torchvision's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet101
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import FrozenBatchNorm2d, box_iou, ps_roi_pool

STRIDE = 16
CHANNELS = 1024  # of the features that both halves share
GRID = 7  # cells of a box, each way, that vote
ANCHORS_PX = (128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
PROPOSALS = 300
MINED = 128  # proposals of a frame that are learnt from: the hardest
STD = 0.01


class DilatedBackbone(nn.Module):
    """Features (frames, 1024, H / 16, W / 16): ResNet-101 (`body`) with a stage 5 that keeps the size of stage 4."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        whole = resnet101(norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False, False, True])
        self.body = IntermediateLayerGetter(whole, {"layer4": "0"})
        self.conv = nn.Conv2d(2048, CHANNELS, kernel_size=3, padding=6, dilation=6)
        _start(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """The features of pictures x."""
        return functional.relu(self.conv(self.body(x)["0"]))


class ProposalHead(nn.Module):
    """Objectness and box deltas of nine anchors a place, from the first half of the features."""

    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.cls_logits = nn.Conv2d(channels, anchors, kernel_size=1)
        self.bbox_pred = nn.Conv2d(channels, 4 * anchors, kernel_size=1)
        _start(self.cls_logits, self.bbox_pred)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each level (frames, C, h, w): (frames, anchors, h, w) and (frames, 4 * anchors, h, w)."""
        halves = [level[:, : level.shape[1] // 2] for level in levels]
        return [self.cls_logits(half) for half in halves], [self.bbox_pred(half) for half in halves]


class VotingHead(nn.Module):
    """What is in a proposal, and where exactly: the mean over 7 x 7 cells, each of which reads maps of its own."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.cls_maps = nn.Conv2d(channels, GRID * GRID * classes, kernel_size=1)
        self.bbox_maps = nn.Conv2d(channels, GRID * GRID * 4 * 2, kernel_size=1)  # of background and of any object
        self.box_coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.matcher = Matcher(0.5, 0.5, allow_low_quality_matches=False)
        _start(self.cls_maps, self.bbox_maps)

    def maps(self, features: Tensor) -> dict[str, Tensor]:
        """Position-sensitive maps of features (frames, C, h, w), whose second half is read."""
        half = features[:, features.shape[1] // 2 :]
        return {"cls_maps": self.cls_maps(half), "bbox_maps": self.bbox_maps(half)}

    def vote(self, maps: Mapping[str, Tensor], proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (proposals of all frames, classes) and box deltas (proposals, 4)."""
        logits, deltas = (
            ps_roi_pool(maps[name].float().contiguous(), proposals, GRID, 1 / STRIDE).mean(dim=(2, 3))
            for name in ("cls_maps", "bbox_maps")
        )
        return logits, deltas[:, 4:]

    def losses(
        self, maps: Mapping[str, Tensor], proposals: list[Tensor], truth: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Of each frame, its hardest proposals: cross entropy of the class, and smooth L1 of the box of an object.

        True boxes are proposals too. truth: boxes (M, 4), labels (M,) from 1. Both terms are means over what is mined.
        """
        boxes = [torch.cat([found, each["boxes"]]) for found, each in zip(proposals, truth, strict=True)]
        logits, deltas = self.vote(maps, boxes)
        matched = [self._matched(found, each) for found, each in zip(boxes, truth, strict=True)]
        classes = torch.cat([labels for labels, _ in matched])
        wanted = torch.cat(
            [self.box_coder.encode_single(of, found) for (_, of), found in zip(matched, boxes, strict=True)]
        )
        class_loss = functional.cross_entropy(logits, classes, reduction="none")
        box_loss = functional.smooth_l1_loss(deltas, wanted, reduction="none").sum(dim=1) * (classes > 0)
        counts = [len(found) for found in boxes]
        mined = hardest((class_loss + box_loss).detach(), counts, MINED)
        return {"loss_classifier": class_loss[mined].mean(), "loss_box_reg": box_loss[mined].mean()}

    def _matched(self, boxes: Tensor, truth: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Class (M,) of each box, 0 for background, and the true box (M, 4) that it is to become."""
        if not len(truth["boxes"]):
            return boxes.new_zeros(len(boxes), dtype=torch.int64), boxes
        of = self.matcher(box_iou(truth["boxes"], boxes))
        return truth["labels"][of.clamp(min=0)] * (of >= 0), truth["boxes"][of.clamp(min=0)]


def hardest(losses: Tensor, counts: Sequence[int], most: int) -> Tensor:
    """Indices of the `most` largest losses of each frame; losses (sum of counts,), frame after frame."""
    chosen, begin = [], 0
    for count in counts:
        chosen.append(losses[begin : begin + count].topk(min(most, count)).indices + begin)
        begin += count
    return torch.cat(chosen)


class RFCN(nn.Module):
    """Backbone, proposals (torchvision's RegionProposalNetwork) and votes; see detector_heads.RFCNFamily."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = DilatedBackbone()
        anchors = AnchorGenerator((ANCHORS_PX,), (RATIOS,))
        half = CHANNELS // 2
        self.rpn: Any = RegionProposalNetwork(
            anchors,
            ProposalHead(half, len(ANCHORS_PX) * len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 6000, "testing": 6000},
            post_nms_top_n={"training": PROPOSALS, "testing": PROPOSALS},
            nms_thresh=0.7,
        )
        self.votes = VotingHead(half, classes)


def _start(*convs: nn.Conv2d) -> None:
    for conv in convs:
        nn.init.normal_(conv.weight, std=STD)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
