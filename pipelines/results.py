"""What an evaluation leaves: the result, a line per video, the picture, the table of classes."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import torch

from pipelines.choice import BadEvaluation
from pipelines.journal import Prediction
from pipelines.metrics import Ints, class_scores, class_table, mean_class_accuracy, top_k_accuracy
from pipelines.plots import save_confusion
from pipelines.prepare import write_whole
from pipelines.scoring import RANKS
from tsm_core.labels import Convention
from tsm_core.recipes import Recipe, Views

METRICS = ("top_k_accuracy", "mean_class_accuracy")


class Outputs:
    """The files that a run leaves, and whether they can be written."""

    def __init__(
        self,
        out: Path | str | None,
        predictions: Path | str | None,
        confusion: Path | str | None,
        per_class: Path | str | None,
    ) -> None:
        named = {"out": out, "predictions": predictions, "confusion": confusion, "per-class": per_class}
        self._files = {name: Path(path) for name, path in named.items() if path is not None}
        self.journal = None if out is None else Path(f"{out}.journal")

    def check(self, resume: bool) -> None:
        """Raises BadEvaluation for what could not be written at the end."""
        if resume and self.journal is None:
            raise BadEvaluation("resume needs the --out of the run to go on with: its journal lies beside it")
        for name, ends in (("confusion", (".png",)), ("per-class", (".csv", ".md"))):
            if name in self._files and self._files[name].suffix.lower() not in ends:
                raise BadEvaluation(
                    f"--{name} {self._files[name]} must end in {' or '.join(ends)}", reason="bad_output"
                )
        places = [path.absolute() for path in (*self._files.values(), *([self.journal] if self.journal else []))]
        if len(set(places)) < len(places):
            raise BadEvaluation("two outputs have the same name", reason="bad_output")
        for path in places:
            try:
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path.parent):
                    pass
            except OSError as error:
                raise BadEvaluation(f"{path} cannot be written: {error.strerror}", reason="bad_output") from None

    def write(
        self,
        result: dict[str, Any],
        found: Sequence[Prediction],
        matrix: Ints,
        labels: Sequence[str],
        title: str,
    ) -> None:
        """Write all; the result last, so that who finds it finds the rest."""
        if path := self._files.get("predictions"):
            write_whole(path, "".join(f"{json.dumps(_shown(each, labels))}\n" for each in found))
        if path := self._files.get("confusion"):
            save_confusion(path, matrix, labels, title)
        if path := self._files.get("per-class"):
            write_whole(path, class_table(class_scores(matrix, labels), markdown=path.suffix.lower() == ".md"))
        if path := self._files.get("out"):
            write_whole(path, json.dumps(result, indent=2) + "\n")


def _shown(each: Prediction, labels: Sequence[str]) -> dict[str, Any]:
    line: dict[str, Any] = {"path": each.path, "label": each.label, "label_name": labels[each.label]}
    if each.error is not None:
        return {**line, "error": each.error}
    top = [{"class": index, "name": labels[index], "probability": share} for index, share in each.top]
    return {**line, "top": top}


def metric_values(
    judged: Sequence[Prediction], matrix: Ints, convention: Convention, metrics: Sequence[str]
) -> dict[str, float]:
    """Shares in 0..1 by MMAction2's names."""
    ranks, labels = [[index for index, _ in each.top] for each in judged], [each.label for each in judged]
    values: dict[str, float] = {}
    if "top_k_accuracy" in metrics:
        values |= {f"top{k}_acc": top_k_accuracy(ranks, labels, k) for k in (1, RANKS)}
    if "mean_class_accuracy" in metrics:
        values["mean_class_accuracy"] = mean_class_accuracy(matrix, convention)
    return values


def skipped(found: Sequence[Prediction], root: Path) -> dict[str, Any]:
    """Videos that could not be read, and how many for which reason."""
    failed = [each for each in found if each.error is not None]
    reasons = Counter(_reason(each, root) for each in failed)
    return {
        "reasons": dict(reasons.most_common()),
        "videos": [{"path": each.path, "error": each.error} for each in failed],
    }


def _reason(each: Prediction, root: Path) -> str:
    """The error without what belongs to this video alone, so that like ones can be counted."""
    text = (each.error or "").replace(str(root / each.path), "").strip("/: ")
    return re.sub(r"\d+", "N", text)


def setting_of(recipe: Recipe, seen: Views, asked: str) -> str:
    """Which of the recipe's settings these views are, or `other`."""
    names = [asked, *(name for name in ("efficient", "accurate") if name != asked)]
    return next((name for name in names if getattr(recipe, name) == seen), "other")


def published(recipe: Recipe, seen: Views, asked: str, digest: str, source: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the recipe's authors report for these views, if they do; clearly as theirs."""
    said = recipe.published
    names = [asked, *(name for name in ("accurate", "efficient") if name != asked)]
    scores = {
        name: getattr(said, name) for name in names if said and getattr(recipe, name) == seen and getattr(said, name)
    }
    if said is None or not scores:
        return None
    name, score = next(iter(scores.items()))
    begins = recipe.checkpoint.sha256 if recipe.checkpoint else None
    return {
        "source": said.source,
        "setting": name,
        "top1": score.top1,
        "top5": score.top5,
        "same_checkpoint": None if begins is None else str(source.get("sha256", digest)).startswith(begins),
        "note": "for its own checkpoint on all validation videos; not measured here",
    }


def machine() -> str:
    """What this was computed on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join([platform.machine(), f"{torch.get_num_threads()} threads of {os.cpu_count()} cores", *gpus])


def versions() -> dict[str, str]:
    """Of what decides about figures."""
    return {
        "tsm-live": version("tsm-live"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": av.__version__,
    }
