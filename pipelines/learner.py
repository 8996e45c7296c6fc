"""A recogniser while it learns: one process's part of each step, and how good the network is by now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pipelines.augment import Blend, ClipAugment, soft_cross_entropy
from pipelines.curves import contact_sheet
from pipelines.init_weights import init_model
from pipelines.metrics import confusion_matrix, mean_class_accuracy, ranking, top_k_accuracy
from pipelines.optim import freeze_norms, lr_share, sgd
from pipelines.scoring import NotFinite
from pipelines.study import Study, Team
from pipelines.training_data import (
    AugmentedClips,
    Batch,
    Judged,
    NothingReadable,
    TrainingData,
    ValidationViews,
    load_batches,
    load_views,
    open_training_data,
    taken,
)
from pipelines.training_job import Job
from tsm_core.backbones import run as run_network
from tsm_core.model import TSM, build
from tsm_core.preprocess import normalise
from tsm_core.recipes import Recipe, Training
from tsm_core.shift import ClipPass, Start, shift_clip

VIEWS = {"cuda": 32, "cpu": 4}  # at a time


# --- the network while it learns


class CarriedPass(ClipPass):
    """A call over clips of T frames that go on where others ended: reads `held`, collects `next_held`.

    held: of each shifted layer the first channels (N, fold, H, W) of the frame before the first; None: there is none.
    What is held takes no gradient.
    """

    def __init__(self, frames: int, held: dict[int, Tensor] | None, start: Start) -> None:
        super().__init__(frames, "uni", start)
        self.held, self.next_held = held, dict[int, Tensor]()

    def shift(self, layer: int, x: Tensor, fold_div: int) -> Tensor:
        """Frames (N * T, C, H, W) -> same shape."""
        clip = x.view(-1, self.frames, *x.shape[1:])
        shifted = shift_clip(clip, fold_div, "uni", self.start)
        fold = x.shape[1] // fold_div
        self.next_held[layer] = clip[:, -1, :fold].detach()
        if self.held is not None:
            shifted[:, 0, :fold] = self.held[layer]
        return shifted.flatten(0, 1)


class Learner(nn.Module):
    """The model, as one call that DDP can wrap: logits of frames, and the shift state behind them if it is carried."""

    def __init__(self, model: TSM, carry: bool) -> None:
        super().__init__()
        self.model, self.carry = model, carry

    def forward(self, clip: Tensor, held: dict[int, Tensor] | None = None) -> tuple[Tensor, dict[int, Tensor] | None]:
        """Logits (N, T, K) of clip (N, T, 3, H, W), and what the next piece of it is held."""
        if not self.carry:
            return self.model.forward_frames(clip), None
        how = CarriedPass(clip.shape[1], held, self.model.recipe.start)
        logits = run_network(self.model.net, clip.flatten(0, 1), how)
        return logits.view(*clip.shape[:2], -1), how.next_held


class Learning(Study):
    """A recogniser's training."""

    columns = ("train_top1", "val_loss", "top1", "top5", "mean_class")
    judged = ("val_loss", "top1", "top5", "mean_class")
    goal = "top1"

    model: TSM
    recipe: Recipe
    training: Training

    def __init__(self, job: Job, team: Team) -> None:
        assert isinstance(job.recipe, Recipe)
        self.recipe = job.recipe
        super().__init__(job, team)
        self.blend = Blend(self.training.blend, len(self.recipe.labels))

    def _open_data(self) -> TrainingData:
        return open_training_data(self.recipe, self.job.data, self.options.clips, validate=self.validate > 0)

    def _build(self) -> TSM:
        return build(self.recipe)

    @property
    def network(self) -> nn.Module:
        """See Study."""
        return self.model.net

    @property
    def facts(self) -> dict[str, Any]:
        """See Study."""
        options = self.options
        return {**super().facts, "carry_state": options.carry_state, "per_frame_loss": options.per_frame_loss}

    def begin(self) -> str:
        """See Study."""
        options = self.options
        return init_model(
            self.model,
            init=options.init,
            file=options.init_from,
            models_dir=options.models_dir,
            new_head=options.new_head,
        )

    def _to_training(self) -> None:
        self.model.net.train()
        if self.training.partial_bn:
            freeze_norms(self.model.net)

    def _optimiser(self) -> torch.optim.Optimizer:
        return sgd(self.model.net, self.training)

    def _learner(self) -> nn.Module:
        return Learner(self.model, self.options.carry_state)

    # --- one step

    def batches(self, first: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """See Study."""
        spec, seed = self.recipe.preprocess, self.options.seed

        def new_augment(number: int) -> ClipAugment:
            return ClipAugment(self.training, spec, worker_seed=seed * 1000 + number)

        clips = AugmentedClips(self.data.train, new_augment, seed, self.options.on_error)
        places = self.order.micro_batches(self.training.epochs, self.team.rank, first=first)
        return load_batches(clips, places, self.loaders, pin=self.device.type == "cuda")

    def rate(self, epoch: int, step: int) -> float:
        """See Study."""
        return self.lr * lr_share(self.training, epoch, step, self.order.steps)

    def _learn(self, batch: Batch, draw: tuple[int, int, int], clips: int, last: bool) -> Tensor:
        seed = self._seed(draw)
        pixels = batch.pixels.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        clip = normalise(pixels, self.recipe.preprocess)
        clip, soft = self.blend(clip, labels, torch.Generator().manual_seed(seed))
        pieces = torch.split(clip, self.recipe.frames, dim=1) if self.options.carry_state else (clip,)
        share = len(labels) / clips / len(pieces)
        held: dict[int, Tensor] | None = None
        sums = torch.zeros(2, device=self.device)
        for number, piece in enumerate(pieces):
            with self._sync(last and number == len(pieces) - 1):
                with self.autocast():
                    logits, held = self.learner(piece, held)
                loss = self._loss(logits.float(), labels, soft)
                torch.autograd.backward(self.scaler.scale(loss * share))
            right = (logits.detach().mean(1).argmax(1) == labels).sum()
            sums += torch.stack([loss.detach() * len(labels), right]) / len(pieces)
        return sums

    def _loss(self, logits: Tensor, labels: Tensor, soft: Tensor) -> Tensor:
        frames = logits.shape[1]
        if self.options.per_frame_loss:
            flat, labels, soft = (
                logits.flatten(0, 1),
                labels.repeat_interleave(frames),
                soft.repeat_interleave(frames, 0),
            )
        else:
            flat = logits.mean(1)
        return (
            functional.cross_entropy(flat, labels) if self.training.blend == "none" else soft_cross_entropy(flat, soft)
        )

    # --- validation

    def judge(self) -> dict[str, float]:
        """By the recipe's efficient views. See Study."""
        source = self.data.val
        assert source is not None
        recipe, rank, workers = self.recipe, self.team.rank, self.team.workers
        self._share_buffers()
        videos = ValidationViews(source, recipe.efficient, recipe.preprocess)
        mine = range(rank, len(source), workers)
        rows: list[tuple[int, int, float, list[int]]] = []  # video, label, loss, first classes
        unreadable: list[str] = []
        self.model.net.eval()
        for group in taken(load_views(videos, mine, self.loaders), VIEWS[self.device.type]):
            unreadable += [each.error for each in group if each.error is not None]
            there = [each for each in group if each.views is not None]
            if there:
                rows += self._judged(there)
        self._to_training()
        found = sorted(row for rows in self.team.gather(rows) for row in rows)
        lost = [error for errors in self.team.gather(unreadable) for error in errors]
        if len(lost) > self.options.max_skipped * len(source):
            raise NothingReadable(
                f"{len(lost)} of {len(source)} validation videos cannot be read, and "
                f"{self.options.max_skipped:g} is the most (--max-skipped); the first: {lost[0]}",
                reason="too_many_unreadable",
            )
        ranks, labels = np.array([row[3] for row in found]), np.array([row[1] for row in found])
        confusion = confusion_matrix(ranks[:, 0], labels, len(recipe.labels))
        return {
            "val_loss": float(np.mean([row[2] for row in found])),
            "top1": top_k_accuracy(ranks, labels, 1),
            "top5": top_k_accuracy(ranks, labels, 5),
            "mean_class": mean_class_accuracy(confusion, recipe.convention),
            "val_unreadable": float(len(lost)),
        }

    def _judged(self, group: Sequence[Judged]) -> list[tuple[int, int, float, list[int]]]:
        recipe = self.recipe
        counts = [len(each.views) for each in group if each.views is not None]
        views = torch.cat([each.views for each in group if each.views is not None])
        with torch.inference_mode(), self.autocast():
            logits = torch.cat(
                [
                    self.model(normalise(part.to(self.device, non_blocking=True), recipe.preprocess)).float()
                    for part in torch.split(views, VIEWS[self.device.type])
                ]
            )
        if not logits.isfinite().all():
            raise NotFinite(
                f"the network's scores of validation videos are no numbers ({recipe.name}); the weights have diverged"
            )
        rows = []
        for each, scores in zip(group, torch.split(logits.double().cpu(), counts), strict=True):
            shares = scores.mean(0).softmax(0) if recipe.convention == "mit" else scores.softmax(1).mean(0)
            loss = -float(shares[each.label].clamp(min=1e-12).log())
            rows.append((each.video, each.label, loss, ranking(shares[None].numpy())[0].tolist()))
        return rows

    # --- for people

    def figures(self, right: float, clips: float) -> dict[str, float]:
        """See Study."""
        return {"train_top1": right / clips if clips else math.nan}

    def words(self, row: Mapping[str, float]) -> str:
        """See Study."""
        judged = (
            f"  top1 {row['top1']:.2%}  top5 {row['top5']:.2%}  mean class {row['mean_class']:.2%}"
            if "top1" in row
            else ""
        )
        return f"train top1 {row['train_top1']:.2%}{judged}"

    def picture(self, batch: Batch) -> tuple[Image.Image, list[str]]:
        """See Study."""
        captions = [f"{label} {self.recipe.labels[label]}" for label in batch.labels.tolist()]
        return contact_sheet(batch.pixels, captions), captions
