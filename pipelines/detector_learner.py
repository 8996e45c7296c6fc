"""A detector while it learns: one process's part of each step, and how good the network is by now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.utils import draw_bounding_boxes

from pipelines.box_data import BoxVideos
from pipelines.box_judging import watch
from pipelines.box_scoring import score
from pipelines.box_sets import open_boxes
from pipelines.box_training import BoxBatch, BoxClips, clear_pads, load_boxes
from pipelines.curves import contact_sheet
from pipelines.datasets import Part
from pipelines.init_boxes import init_detector
from pipelines.optim import FALL, WARM_UP_FROM
from pipelines.study import Study, Team
from pipelines.training_data import NothingReadable
from pipelines.training_job import BadOptions, Job
from tsm_core.detector import TSMDetector, build_detector
from tsm_core.detector_recipes import BoxTraining, DetectorRecipe

RISE = 0.3  # of one cycle
FIRST_SHARE, LAST_SHARE = 1 / 25, 1e-4  # of one cycle, as torch's OneCycleLR has them
BACKBONE = "backbone."
PAINT = ("#e41a1c", "#377eb8", "#4daf4a", "#ff7f00", "#984ea3")


class BoxData(NamedTuple):
    """Videos to train on, and those to be judged by (None: nothing is validated)."""

    train: BoxVideos
    val: BoxVideos | None


class BoxLearner(nn.Module):
    """The detector, as one call that DDP can wrap: the terms of the loss."""

    def __init__(self, model: TSMDetector) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Of all frames of clips (N, T, 3, h, w), whose boxes the N * T targets are."""
        return self.model.losses(clip, targets)


class BoxLearning(Study):
    """A detector's training."""

    columns = ("vid_all", "vid_slow", "vid_medium", "vid_fast", "coco_ap", "coco_ap50")
    judged = columns
    goal = "vid_all"

    model: TSMDetector
    recipe: DetectorRecipe
    training: BoxTraining

    def __init__(self, job: Job, team: Team) -> None:
        assert isinstance(job.recipe, DetectorRecipe)
        self.recipe = job.recipe
        super().__init__(job, team)

    def _open_data(self) -> BoxData:
        recipe, root = self.recipe, self.job.data

        def part(name: Part) -> BoxVideos:
            return open_boxes(recipe.dataset, recipe.labels, root, name)

        return BoxData(part("train"), part("val") if self.validate > 0 else None)

    def _build(self) -> TSMDetector:
        return build_detector(self.recipe)

    @property
    def network(self) -> nn.Module:
        """See Study."""
        net: nn.Module = self.model.net
        return net

    def begin(self) -> str:
        """See Study."""
        options = self.options
        return init_detector(
            self.model,
            init=options.init,
            file=options.init_from,
            models_dir=options.models_dir,
            new_head=options.new_head,
        )

    def _to_training(self) -> None:
        self.model.train()
        if self.training.freeze_norm:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _optimiser(self) -> torch.optim.Optimizer:
        freeze(self.model.net, self.training.frozen)
        groups = box_groups(self.model.net, self.training)
        if self.training.optimiser == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=self.training.momentum)
        return torch.optim.AdamW(groups, lr=0.0)

    def _learner(self) -> nn.Module:
        return BoxLearner(self.model)

    # --- one step

    def rate(self, epoch: int, step: int) -> float:
        """See Study."""
        return self.lr * rate_share(self.training, epoch, step, self.order.steps)

    def batches(self, first: tuple[int, int] = (0, 0)) -> Iterator[BoxBatch]:
        """See Study."""
        frames = self.options.clips.frames or self.recipe.frames
        clips = BoxClips(
            self.data.train, frames, self.model.input_size, self.training, self.options.seed, self.options.on_error
        )
        places = self.order.micro_batches(self.training.epochs, self.team.rank, first=first)
        return load_boxes(clips, places, self.loaders, pin=self.device.type == "cuda")

    def _learn(self, batch: BoxBatch, draw: tuple[int, int, int], clips: int, last: bool) -> Tensor:
        self._seed(draw)
        count, frames = batch.pixels.shape[:2]
        clip = self.model.preprocess(batch.pixels.to(self.device, non_blocking=True).flatten(0, 1))
        clip = clear_pads(clip.view(count, frames, *clip.shape[1:]), batch.pads)
        targets = [{name: each.to(self.device) for name, each in target.items()} for target in batch.targets()]
        with self._sync(last):
            with self.autocast():
                terms = self.learner(clip, targets)
            loss = torch.stack([term.float() for term in terms.values()]).sum()
            torch.autograd.backward(self.scaler.scale(loss * (count / clips)))
        return torch.stack([loss.detach() * count, loss.new_zeros(())])

    # --- validation

    def judge(self) -> dict[str, float]:
        """By the recipe's input, each video stepped from its first frame to its last. See Study."""
        source = self.data.val
        assert source is not None
        self._share_buffers()
        self.model.eval()
        with self.autocast():
            mine = list(watch(self.model, source, range(self.team.rank, len(source), self.team.workers)))
        self._to_training()
        found = sorted((each for part in self.team.gather(mine) for each in part), key=lambda each: each.index)
        lost = [each.error for each in found if each.error is not None]
        if len(lost) > self.options.max_skipped * len(source):
            raise NothingReadable(
                f"{len(lost)} of {len(source)} validation videos cannot be read, and "
                f"{self.options.max_skipped:g} is the most (--max-skipped); the first: {lost[0]}",
                reason="too_many_unreadable",
            )
        figures, _ = score([each.judged for each in found if each.judged is not None], self.recipe.labels)
        told = {name: figures[name] for name in self.judged if not math.isnan(figures[name])}
        return {**told, "val_unreadable": float(len(lost))}

    # --- for people

    def figures(self, right: float, clips: float) -> dict[str, float]:
        """See Study."""
        return {}

    def words(self, row: Mapping[str, float]) -> str:
        """See Study."""
        names = {
            "vid_all": "AP50",
            "vid_slow": "slow",
            "vid_medium": "medium",
            "vid_fast": "fast",
            "coco_ap": "COCO AP",
        }
        return "  ".join(f"{name} {row[key]:.2%}" for key, name in names.items() if key in row)

    def picture(self, batch: BoxBatch) -> tuple[Image.Image, list[str]]:
        """See Study."""
        targets, frames = batch.targets(), batch.pixels.shape[1]
        pictures = [self._drawn(*each) for each in zip(batch.pixels.flatten(0, 1), targets, strict=True)]
        captions = []
        for number in range(len(batch.pixels)):
            labels = {int(label) for each in targets[number * frames :][:frames] for label in each["labels"]}
            captions.append(", ".join(self.recipe.labels[label] for label in sorted(labels)) or "nothing")
        return contact_sheet(torch.stack(pictures).view(batch.pixels.shape), captions), captions

    def _drawn(self, picture: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        if not len(target["boxes"]):
            return picture
        colours: Any = [PAINT[int(label) % len(PAINT)] for label in target["labels"]]
        drawn: Tensor = draw_bounding_boxes(picture, target["boxes"], colors=colours, width=1 + picture.shape[2] // 128)
        return drawn


def freeze(net: nn.Module, parts: Sequence[str]) -> None:
    """Keep parts of a network, by the names that their parameters begin with, from learning. Raises BadOptions."""
    for part in parts:
        there = [each for name, each in net.named_parameters() if name == part or name.startswith(f"{part}.")]
        if not there:
            raise BadOptions(
                f"frozen: the network has no part {part!r}; its parts are {', '.join(dict(net.named_children()))}"
            )
        for parameter in there:
            parameter.requires_grad = False


def box_groups(net: nn.Module, training: BoxTraining) -> list[dict[str, Any]]:
    """Groups for torch's optimisers: backbone and the rest, each with and without decay; norms and biases have none."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith(BACKBONE), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": members,
            "lr_factor": training.backbone_lr if backbone else 1.0,
            "weight_decay": training.weight_decay if decays else 0.0,
        }
        for (backbone, decays), members in groups.items()
    ]


def rate_share(training: BoxTraining, epoch: int, step: int, steps: int) -> float:
    """The share of the learning rate in step `step` of the `steps` of an epoch; all count from 0.

    `steps`: a tenth from each milestone on, which may lie within an epoch; it rises linearly from a tenth at first.
    `one_cycle`: half a cosine up in the first 0.3 of all steps, and half of one down in the rest.
    """
    done, total = epoch * steps + step, training.epochs * steps
    if training.schedule == "one_cycle":
        top = RISE * total - 1
        if done <= top:
            return _between(FIRST_SHARE, 1.0, done / top if top > 0 else 1.0)
        return _between(1.0, FIRST_SHARE * LAST_SHARE, (done - top) / max(total - 1 - top, 1))
    share = FALL ** sum(done >= milestone * steps - 1e-6 for milestone in training.milestones)
    if done < training.warmup_steps:
        share *= WARM_UP_FROM + (1 - WARM_UP_FROM) * done / training.warmup_steps
    return share


def _between(first: float, last: float, way: float) -> float:
    return last + (first - last) / 2 * (1 + math.cos(math.pi * way))
