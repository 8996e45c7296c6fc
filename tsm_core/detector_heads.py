"""What differs between families of detectors: how features become dense outputs, boxes, and a loss.

Boxes of every family are chosen by the same rule, `chosen`, from scores of rows (anchors, or proposals) and outputs
(classes): filtered by score first, so that a frame of noise costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import batched_nms, box_iou

from tsm_core.boxes import Boxes, cleaned
from tsm_core.detector_recipes import DetectorRecipe

Features = Mapping[str, Tensor]
Truth = Sequence[Mapping[str, Tensor]]
BoxesAt = Callable[[Tensor, Tensor], Tensor]  # boxes (M, 4) of rows (M,) as outputs (M,)

CANDIDATES = 1000  # boxes of a frame that compete in its NMS: the best so many
LEAST_BOX_PX = 0.01  # side of a box that is told, in pixels of the input


@dataclass(frozen=True, slots=True)
class Dense:
    """What the network says of frames before any box is chosen: row n of each tensor is frame n.

    features: what the heads read, (frames, C, h, w) by level. outputs: the heads' tensors by torchvision's names,
    (frames, anchors, values); of two-stage detectors those of the first stage, of which proposals are made, and of
    R-FCN the position-sensitive maps (frames, C, h, w) too.
    """

    features: Features
    outputs: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.features.values())))

    def rows(self, index: Sequence[int]) -> Dense:
        """The same of some frames, in that order."""
        first = next(iter(self.features.values()))
        chosen = torch.tensor(index, dtype=torch.int64, device=first.device)
        return Dense(
            {name: tensor.index_select(0, chosen) for name, tensor in self.features.items()},
            {name: tensor.index_select(0, chosen) for name, tensor in self.outputs.items()},
        )


class Family:
    """One-stage detectors: the heads' outputs are those of every anchor."""

    def __init__(self, recipe: DetectorRecipe) -> None:
        self.size = (recipe.input_size[0], recipe.input_size[1])

    def outputs(self, net: Any, features: Features) -> dict[str, Tensor]:
        """The heads' tensors, (frames, anchors, values) each."""
        heads: dict[str, Tensor] = net.head(list(features.values()))
        return heads

    def anchors(self, net: Any, features: Features) -> Tensor:
        """Anchors (A, 4) of a frame: the same for all, as the input has one size."""
        levels = [level[:1].float() for level in features.values()]
        one: Tensor = self._generator(net)(self._images(levels[0].new_empty(1, 3, *self.size)), levels)[0]
        return one

    def scored(self, net: Any, dense: Dense, anchors: Tensor) -> Iterator[tuple[Tensor, BoxesAt]]:
        """For each frame: scores (rows, outputs), and where the box of a row and an output is."""
        scores, deltas = self._scores(dense.outputs), dense.outputs["bbox_regression"].float()
        for row in range(len(dense)):
            yield (
                scores[row],
                lambda rows, _, row=row: self._decoded(net, deltas[row][rows], anchors[rows]),  # type: ignore[misc]
            )

    def losses(self, net: Any, frames: Tensor, features: Features, anchors: Tensor, truth: Truth) -> dict[str, Tensor]:
        """The terms of the loss over frames (M, 3, h, w) and their features; truth: boxes, and labels as outputs."""
        heads = {name: tensor.float() for name, tensor in self.outputs(net, features).items()}
        terms: dict[str, Tensor] = self._compute(net, heads, [anchors] * len(truth), features, truth)
        return terms

    def _generator(self, net: Any) -> Any:
        return net.anchor_generator

    def _images(self, frames: Tensor) -> ImageList:
        return ImageList(frames, [self.size] * len(frames))

    def _scores(self, outputs: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def _decoded(self, net: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = net.box_coder.decode_single(deltas, anchors)
        return boxes

    def _compute(
        self, net: Any, heads: dict[str, Tensor], anchors: list[Tensor], features: Features, truth: Truth
    ) -> Any:
        raise NotImplementedError


class SSDFamily(Family):
    """SSD: a softmax over labels and background, hard negatives mined."""

    def _scores(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["cls_logits"].float().softmax(dim=2)

    def _compute(
        self, net: Any, heads: dict[str, Tensor], anchors: list[Tensor], features: Features, truth: Truth
    ) -> Any:
        matched = [
            net.proposal_matcher(box_iou(each["boxes"], anchors[0]))
            if len(each["boxes"])
            else each["labels"].new_full((len(anchors[0]),), -1)
            for each in truth
        ]
        return net.compute_loss(truth, heads, anchors, matched)


class RetinaFamily(Family):
    """RetinaNet: a sigmoid for each label, focal loss."""

    def _scores(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["cls_logits"].float().sigmoid()

    def _compute(
        self, net: Any, heads: dict[str, Tensor], anchors: list[Tensor], features: Features, truth: Truth
    ) -> Any:
        return net.compute_loss(truth, heads, anchors)


class FCOSFamily(Family):
    """FCOS: a sigmoid for each label and for how central a place is in its object; an anchor is a place."""

    def _scores(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return (outputs["cls_logits"].float().sigmoid() * outputs["bbox_ctrness"].float().sigmoid()).sqrt()

    def _decoded(self, net: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = net.box_coder.decode(deltas, anchors)
        return boxes

    def _compute(
        self, net: Any, heads: dict[str, Tensor], anchors: list[Tensor], features: Features, truth: Truth
    ) -> Any:
        places = [level.shape[2] * level.shape[3] for level in features.values()]
        return net.compute_loss(truth, heads, anchors, places)


class FasterFamily(Family):
    """Faster R-CNN: proposals of a first stage, each looked at by a second, which reads the features again."""

    def outputs(self, net: Any, features: Features) -> dict[str, Tensor]:
        """Of the first stage: objectness (frames, anchors, 1) and box deltas (frames, anchors, 4)."""
        levels = list(features.values())
        objectness, deltas = concat_box_prediction_layers(*net.rpn.head(levels))
        frames = len(levels[0])
        return {"objectness": objectness.view(frames, -1, 1), "rpn_deltas": deltas.view(frames, -1, 4)}

    def scored(self, net: Any, dense: Dense, anchors: Tensor) -> Iterator[tuple[Tensor, BoxesAt]]:
        """For each frame: scores (proposals, outputs), and where the box of a proposal and an output is."""
        proposals = self._proposals(net, dense, anchors)
        logits, deltas = self._second(net, dense, proposals)
        counts = [len(each) for each in proposals]
        per_frame = zip(proposals, torch.split(logits.softmax(dim=1), counts), torch.split(deltas, counts), strict=True)
        for boxes, scores, each in per_frame:
            yield scores, lambda rows, outputs, boxes=boxes, each=each: self._refined(net, boxes, each, rows, outputs)  # type: ignore[misc]

    def losses(self, net: Any, frames: Tensor, features: Features, anchors: Tensor, truth: Truth) -> dict[str, Tensor]:
        """The terms of the loss, of both stages."""
        images = self._images(frames)
        floats = {name: level.float() for name, level in features.items()}
        proposals, first = net.rpn(images, floats, truth)
        _, second = net.roi_heads(floats, proposals, images.image_sizes, truth)
        return {**first, **second}

    def _generator(self, net: Any) -> Any:
        return net.rpn.anchor_generator

    def _proposals(self, net: Any, dense: Dense, anchors: Tensor) -> list[Tensor]:
        objectness = dense.outputs["objectness"].float().nan_to_num(nan=float("-inf"))
        deltas = dense.outputs["rpn_deltas"].float().flatten(0, 1)
        # what is no number becomes a box without a side, which is no proposal
        boxes = net.rpn.box_coder.decode(deltas, [anchors] * len(dense)).view(len(dense), -1, 4).nan_to_num(nan=0.0)
        places = [level.shape[2] * level.shape[3] for level in dense.features.values()]
        per_place = len(anchors) // sum(places)
        counts = [place * per_place for place in places]
        proposals: list[Tensor] = net.rpn.filter_proposals(boxes, objectness, [self.size] * len(dense), counts)[0]
        return proposals

    def _second(self, net: Any, dense: Dense, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (proposals of all frames, outputs) and box deltas (proposals, outputs, 4)."""
        heads = net.roi_heads
        features = {name: level.float() for name, level in dense.features.items()}
        pooled = heads.box_roi_pool(features, proposals, [self.size] * len(dense))
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return logits, deltas.view(*logits.shape, 4)

    def _refined(self, net: Any, proposals: Tensor, deltas: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
        boxes: Tensor = net.roi_heads.box_coder.decode_single(deltas[rows, outputs], proposals[rows])
        return boxes


class RFCNFamily(FasterFamily):
    """R-FCN: the second stage reads position-sensitive maps, and its boxes do not depend on the label."""

    def outputs(self, net: Any, features: Features) -> dict[str, Tensor]:
        """Of the first stage, and the maps of the second."""
        return {**super().outputs(net, features), **net.votes.maps(features["0"])}

    def losses(self, net: Any, frames: Tensor, features: Features, anchors: Tensor, truth: Truth) -> dict[str, Tensor]:
        """The terms of the loss, of both stages."""
        floats = {name: level.float() for name, level in features.items()}
        proposals, first = net.rpn(self._images(frames), floats, truth)
        second: dict[str, Tensor] = net.votes.losses(net.votes.maps(floats["0"]), proposals, truth)
        return {**first, **second}

    def _second(self, net: Any, dense: Dense, proposals: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, deltas = net.votes.vote(dense.outputs, proposals)
        return logits, deltas[:, None]

    def _refined(self, net: Any, proposals: Tensor, deltas: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
        boxes: Tensor = net.votes.box_coder.decode_single(deltas[rows, 0], proposals[rows])
        return boxes


FAMILIES: dict[str, type[Family]] = {
    "ssd": SSDFamily,
    "retina": RetinaFamily,
    "fcos": FCOSFamily,
    "faster": FasterFamily,
    "rfcn": RFCNFamily,
}


def chosen(scores: Tensor, boxes_at: BoxesAt, label_of: Tensor, recipe: DetectorRecipe, thresh: float) -> Boxes:
    """The best boxes of one frame. label_of (outputs,): index of an output's label, -1 for none.

    A score of NaN is none; what is no box inside of the input is left out.
    """
    rows, outputs = (scores > thresh).nonzero(as_tuple=True)
    labels = label_of[outputs]
    known = labels >= 0
    rows, outputs, labels = rows[known], outputs[known], labels[known]
    found = scores[rows, outputs]
    if len(found) > CANDIDATES:
        found, best = found.topk(CANDIDATES)
        rows, outputs, labels = rows[best], outputs[best], labels[best]
    height, width = recipe.input_size
    xyxy, fine = cleaned(boxes_at(rows, outputs), (width, height), LEAST_BOX_PX)
    xyxy, found, labels = xyxy[fine], found[fine], labels[fine]
    keep = batched_nms(xyxy, found, labels, recipe.nms_iou)[: recipe.max_detections]
    return Boxes(xyxy[keep], found[keep], labels[keep])
