"""Test a detector on videos with boxes: COCO's and ImageNet VID's average precision, and what makes them comparable."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from pipelines.box_data import BoxVideos, Renamed
from pipelines.box_files import CocoVideos
from pipelines.box_judging import BATCH, watch
from pipelines.box_scoring import SPEEDS, Judged, score
from pipelines.box_sets import open_boxes
from pipelines.choice import BadEvaluation, find_checkpoint
from pipelines.datasets import Part
from pipelines.decoding import UnreadableVideo
from pipelines.evaluate import Facts, Progress, TooManyUnreadable
from pipelines.model_card import save_card
from pipelines.prepare import write_whole
from pipelines.results import machine, versions
from tsm_core.checkpoints import import_checkpoint, load_detector
from tsm_core.detector import TSMDetector
from tsm_core.detector_recipes import DETECTOR_RECIPES, DetectorRecipe
from tsm_core.errors import CallerError
from tsm_core.model_file import ModelFileError, read_card

RULES = {
    "coco": "faster-coco-eval; IoU .50:.05:.95, 100 detections a frame; ignored objects are crowds",
    "vid": (
        "AP at all points; an object is found from IoU min(0.5, wh/((w+10)(h+10))) on, boxes a pixel wider than "
        "x2 - x1; slow, medium, fast: mean IoU with itself in the frames up to 10 away > 0.9, 0.7 to 0.9, < 0.7; "
        "objects of other speeds are ignored plainly (detections on them are neither right nor wrong)"
    ),
}


def is_detector_test(recipe: str, checkpoint: Path | str, model_dirs: Sequence[Path | str] = ()) -> bool:
    """Whether `tsm evaluate RECIPE CHECKPOINT` is of a detector: by the recipe's name, or the model file's recipe."""
    if recipe in DETECTOR_RECIPES:
        return True
    try:
        inside, _ = read_card(find_checkpoint(checkpoint, model_dirs))
    except CallerError:
        return False
    return isinstance(inside, DetectorRecipe) and inside.name == recipe


def run_box_evaluation(
    recipe: DetectorRecipe | str,
    checkpoint: Path | str,
    *,
    data_root: Path | str | None = None,
    part: Part = "val",
    list_file: Path | str | None = None,
    prefix: Path | str | None = None,
    limit: int | None = None,
    out: Path | str | None = None,
    batch: int | None = None,
    loaders: int | None = None,
    device: str | None = None,
    on_error: Literal["skip", "raise"] = "skip",
    max_skipped: float = 0.5,
    model_dirs: Sequence[Path | str] = (),
    command: str = "",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Step a detector through every video as it is served, and return the result, also written to `out` (JSON).

    checkpoint: a model file, torchvision's weights, or the name of a model at hand (also in model_dirs). data_root:
    folder of the recipe's data set. Instead, list_file: a COCO or COCO-VID file, its pictures below `prefix` (None:
    beside it). limit: only so many videos, the first. batch: videos side by side. loaders: threads that read ahead.
    Beside `out`, a model that was trained here gets its card: see `model_card`.

    Raises BadEvaluation, ModelFileError, UnknownModel, UnreadableVideo, TooManyUnreadable, NotFinite, and what opening
    the data raises.
    """
    if limit is not None and limit < 1:
        raise BadEvaluation(f"limit {limit} must be at least 1")
    if out is not None and (Path(out).is_dir() or not Path(out).absolute().parent.is_dir()):
        raise BadEvaluation(f"{out} cannot be written: its folder must exist, and it must be none", reason="bad_output")
    file = find_checkpoint(checkpoint, model_dirs)
    model = open_detector(recipe, file)
    row = model.recipe
    videos = _videos(row, data_root, part, list_file, prefix)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(where).eval()
    total = min(len(videos), limit or len(videos))
    side_by_side = batch or BATCH[torch.device(where).type]
    began_s = time.monotonic()
    judged: dict[int, Judged] = {}
    skipped: list[dict[str, str]] = []
    frames = 0
    for each in watch(model, videos, range(total), batch=side_by_side, readers=loaders or 2):
        if each.judged is not None:
            judged[each.index] = each.judged
            frames += len(each.judged.objects)
        else:
            if on_error == "raise":
                raise UnreadableVideo(each.error or "")
            skipped.append({"video": str(each.index), "error": each.error or ""})
            if len(skipped) > max_skipped * total:
                raise TooManyUnreadable(
                    f"{len(skipped)} of {total} videos cannot be read, and {max_skipped:g} is the most "
                    f"(--max-skipped); the first: {skipped[0]['error']}"
                )
        _tell(on_progress, len(judged), len(skipped), total, time.monotonic() - began_s)
    if not judged:
        raise TooManyUnreadable(f"none of {total} videos can be read", reason="no_readable_videos")
    seconds = time.monotonic() - began_s
    figures, precisions = score([judged[index] for index in sorted(judged)], row.labels)
    named = {name: None if math.isnan(value) else value for name, value in figures.items()}
    classes = zip(row.labels, precisions["all"].per_class(), strict=True)
    result: dict[str, Any] = {
        "recipe": row.name,
        "task": "detection",
        "checkpoint": {
            "name": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "source": model.source or None,
        },
        "dataset": None if list_file is not None else row.dataset,
        "part": None if list_file is not None else part,
        "list": None if list_file is None else Path(list_file).name,
        "data_identity": videos.identity,
        "input_size": list(model.input_size),
        "shift": row.shift,
        "start": row.start,
        "detection": {
            "score_thresh": row.score_thresh,
            "nms_iou": row.nms_iou,
            "max_detections": row.max_detections,
        },
        "metrics": named,
        "percent": {name: None if value is None else round(100 * value, 2) for name, value in named.items()},
        "per_class": {label: None if math.isnan(value) else value for label, value in classes},
        "rules": RULES,
        "counts": {
            "listed": total,
            "tested": len(judged),
            "skipped": len(skipped),
            "frames": frames,
            "objects": {name: precisions[name].objects for name in SPEEDS},
            "classes": len(row.labels),
        },
        "skipped": skipped,
        "run": {
            "seconds": round(seconds, 3),
            "frames_per_s": round(frames / seconds, 3),
            "videos_side_by_side": side_by_side,
            "device": str(model.device),
            "command": command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
        },
    }
    if out is not None:
        if card := save_card(Path(out), row, file, result):
            result["card"] = str(card)
        write_whole(Path(out), json.dumps(result, indent=2) + "\n")
    return result


def open_detector(recipe: DetectorRecipe | str, file: Path) -> TSMDetector:
    """The detector in a file, ours or torchvision's, which must be that of the recipe.

    One of ours is tested as its own recipe says: at another size than the row's where it was trained so.
    Raises ModelFileError.
    """
    if file.suffix == ".safetensors":
        model = load_detector(file)
        wanted = recipe if isinstance(recipe, str) else recipe.name
        if model.recipe.name != wanted:
            raise ModelFileError(
                f"{file} holds {model.recipe.name}, which is not {wanted}; test it by its own recipe",
                reason="other_recipe",
            )
        return model
    return import_checkpoint(file, DETECTOR_RECIPES[recipe] if isinstance(recipe, str) else recipe)


def _videos(
    recipe: DetectorRecipe,
    data_root: Path | str | None,
    part: Part,
    list_file: Path | str | None,
    prefix: Path | str | None,
) -> BoxVideos:
    if list_file is None:
        return open_boxes(recipe.dataset, recipe.labels, data_root, part)
    place = Path(list_file).parent if prefix is None else Path(prefix)
    return Renamed(CocoVideos(list_file, place), recipe.labels)


def _tell(on_progress: Progress | None, done: int, skipped: int, total: int, seconds: float) -> None:
    if on_progress is None:
        return
    pace = (done + skipped) / seconds if seconds > 0 else 0.0
    left = (total - done - skipped) / pace if pace > 0 else None
    on_progress(done + skipped, total, Facts(skipped, None, pace, left))
