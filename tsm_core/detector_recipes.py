"""One frozen DetectorRecipe and one table: all that names and reproduces a detector."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from tsm_core.labels import labels_of
from tsm_core.preprocess_spec import IMAGENET_MEAN, IMAGENET_STD
from tsm_core.recipes import RECIPES, Checkpoint, Recipe, RecipeError, UnknownRecipe, record_from_json

TASK: Literal["detection"] = "detection"  # what tells a detector's recipe from a recogniser's in a file


@dataclass(frozen=True)
class Architecture:
    """What a detector network asks of its recipe.

    stride: sides of the input are its multiples. background: output 0 of its classifier is no object. family: how
    its dense outputs become boxes. norm: `frozen` statistics are constants, `batch` ones learn.
    """

    family: Literal["ssd", "fcos", "retina", "faster", "rfcn"]
    stride: int
    background: bool
    norm: Literal["frozen", "batch"]


ARCHITECTURES: dict[str, Architecture] = {
    "ssdlite320_mobilenet_v3_large": Architecture("ssd", 32, background=True, norm="batch"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Architecture("faster", 32, background=True, norm="frozen"),
    "fasterrcnn_mobilenet_v3_large_fpn": Architecture("faster", 32, background=True, norm="frozen"),
    "fasterrcnn_resnet50_fpn_v2": Architecture("faster", 32, background=True, norm="batch"),
    "fcos_resnet50_fpn": Architecture("fcos", 32, background=False, norm="frozen"),
    "retinanet_resnet50_fpn_v2": Architecture("retina", 32, background=False, norm="batch"),
    "rfcn_resnet101": Architecture("rfcn", 16, background=True, norm="frozen"),
    "fcos_small": Architecture("fcos", 8, background=False, norm="batch"),
}


@dataclass(frozen=True)
class BoxTraining:
    """How a detector's weights came about; the loss is that of all frames of a clip.

    lr belongs to `batch` clips a step on all GPUs; backbone_lr is the backbone's share of it. schedule `steps`: lr
    falls to a tenth at the milestones (epochs); `one_cycle`: rises and falls once. warmup_steps: linear, of `steps`.
    strides: the least and largest step, in frames, between a clip's frames, drawn anew for each clip. flip, reverse:
    half of the clips are mirrored, or run backwards. colour: largest change of brightness, contrast and saturation, as
    shares. frozen: parts of the network that do not learn; freeze_norm: nor do the statistics of its norms. init:
    weights to begin with: a recipe's, a backbone's ImageNet weights, or `none`.
    """

    optimiser: Literal["sgd", "adamw"] = "adamw"
    epochs: int = 12
    schedule: Literal["steps", "one_cycle"] = "steps"
    milestones: tuple[float, ...] = (8, 11)
    lr: float = 1e-4
    backbone_lr: float = 1.0
    batch: int = 4
    gpus: int = 1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup_steps: int = 500
    clip_norm: float = 10.0
    strides: tuple[int, ...] = (1, 6)
    flip: bool = True
    reverse: bool = False
    colour: float = 0.0
    frozen: tuple[str, ...] = ()
    freeze_norm: bool = True
    init: str = "none"
    validate_epochs: int = 1

    @property
    def lr_batch(self) -> int:
        """The total batch that lr belongs to."""
        return self.batch


@dataclass(frozen=True)
class PublishedBoxes:
    """What a checkpoint's authors report: COCO AP of val2017 in percent, at their input size; not measured here."""

    source: str
    coco_ap: float
    params: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DetectorRecipe:
    """All that names and reproduces a detector; checks itself at birth and raises RecipeError.

    labels: names of what it finds, no background among them. label_ids: the number of each in the network's output
    (default: one after the other; COCO's have gaps). shift: `uni` reads the past, `none` is a still-image detector.
    start: what a new stream's first frame reads in place of its past: its `own` channels, so that the first frame and
    a still scene are the still-image detector's, or `zeros`. input_size: (height, width) in pixels of its one input,
    into which pictures are letterboxed. mean, std: per channel (RGB), of values in 0..1. frames: T of a training clip.
    score_thresh: boxes below it are not told; nms_iou: of two boxes of one label that overlap more, the better stays;
    max_detections: the best so many of a frame.
    """

    name: str
    architecture: str
    labels: tuple[str, ...]
    input_size: tuple[int, ...]
    label_ids: tuple[int, ...] = ()
    shift: Literal["uni", "none"] = "none"
    shift_div: int = 8
    start: Literal["own", "zeros"] = "own"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    frames: int = 8
    score_thresh: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100
    dataset: str = ""
    training: BoxTraining | None = None
    published: PublishedBoxes | None = None
    checkpoint: Checkpoint | None = None
    task: Literal["detection"] = TASK

    def __post_init__(self) -> None:
        known = ARCHITECTURES.get(self.architecture)
        first = 1 if known and known.background else 0
        for name in ("labels", "input_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "label_ids", tuple(self.label_ids) or tuple(range(first, first + len(self.labels))))
        stride = known.stride if known else 1
        checks: list[tuple[bool, str]] = [
            (bool(self.name), "name is empty"),
            (known is not None, f"architecture {self.architecture!r} must be one of {', '.join(ARCHITECTURES)}"),
            (bool(self.labels), "labels are empty"),
            (len(set(self.labels)) == len(self.labels), "labels are not unique"),
            (
                len(self.label_ids) == len(self.labels) == len(set(self.label_ids)),
                f"label_ids {self.label_ids} must be one number, and another, for each of {len(self.labels)} labels",
            ),
            (
                min(self.label_ids, default=first) >= first,
                f"label_ids of a {self.architecture} begin at {first}" + (": 0 is its background" if first else ""),
            ),
            (
                len(self.input_size) == 2 and all(side > 0 and side % stride == 0 for side in self.input_size),
                f"input_size {self.input_size} must be (height, width), multiples of {stride}",
            ),
            (self.shift in ("uni", "none"), f"shift {self.shift!r} must be 'uni' or 'none'"),
            (self.shift_div >= 2, f"shift_div {self.shift_div} must be at least 2"),
            (self.start in ("own", "zeros"), f"start {self.start!r} must be 'own' or 'zeros'"),
            (
                len(self.mean) == len(self.std) == 3 and min(self.std) > 0,
                f"mean {self.mean} and std {self.std} must be 3 numbers each, std above 0",
            ),
            (self.frames >= 1, f"frames {self.frames} must be at least 1"),
            (0 <= self.score_thresh < 1, f"score_thresh {self.score_thresh} must be in [0, 1)"),
            (0 < self.nms_iou <= 1, f"nms_iou {self.nms_iou} must be in (0, 1]"),
            (self.task == TASK, f"task {self.task!r} must be {TASK!r}"),
            (self.max_detections >= 1, f"max_detections {self.max_detections} must be at least 1"),
        ]
        wrong = [text for fine, text in checks if not fine]
        if wrong:
            raise RecipeError(f"recipe {self.name!r}: {'; '.join(wrong)}")

    @property
    def steppable(self) -> bool:
        """Whether a frame needs its past alone: always."""
        return True

    @property
    def outputs(self) -> int:
        """Classes in the network's output, gaps and background among them."""
        return max(self.label_ids) + 1

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> DetectorRecipe:
        """The recipe that `to_json` wrote. Raises RecipeError that names unknown, missing or wrong fields."""
        return record_from_json(cls, text)


def recipe_from_json(text: str) -> Recipe | DetectorRecipe:
    """The recipe of either kind that `to_json` wrote. Raises RecipeError."""
    return DetectorRecipe.from_json(text) if is_detector(text) else Recipe.from_json(text)


def is_detector(text: str) -> bool:
    """Whether a recipe's JSON is a detector's."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(data, dict) and data.get("task") == TASK


# ---- torchvision's detectors, trained on COCO as still-image detectors

TORCHVISION = "torchvision"
TORCHVISION_URL = "https://download.pytorch.org/models"

# The numbers among COCO's 90 that no object has; names: tsm_core/class_names/coco.txt.
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = tuple(number for number in range(1, 91) if number not in COCO_GAPS)


def _coco(
    architecture: str, file: str, ap: float, params: int, input_size: tuple[int, int], **changes: Any
) -> DetectorRecipe:
    # named as torchvision's builder; no shift, as it was trained without
    sha256 = file.removesuffix(".pth").rpartition("-")[2]  # names end in the first 8 digits of the file's hash
    return DetectorRecipe(
        architecture,
        architecture,
        labels_of("coco"),
        input_size,
        label_ids=COCO_IDS,
        dataset="coco",
        published=PublishedBoxes(TORCHVISION, ap, params),
        checkpoint=Checkpoint(f"{TORCHVISION_URL}/{file}", sha256),
        **changes,
    )


_WIDE = (512, 896)  # 16:9; torchvision's figures are for 800 px of the short side
COCO_ROWS: tuple[DetectorRecipe, ...] = (
    _coco(
        "ssdlite320_mobilenet_v3_large",
        "ssdlite320_mobilenet_v3_large_coco-a79551df.pth",
        21.3,
        3_440_060,
        (320, 320),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        nms_iou=0.55,
        max_detections=300,
    ),
    _coco(
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth",
        22.8,
        19_386_354,
        (320, 576),
    ),
    _coco(
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth",
        32.8,
        19_386_354,
        _WIDE,
    ),
    _coco(
        "fcos_resnet50_fpn",
        "fcos_resnet50_fpn_coco-99b0c9b7.pth",
        39.2,
        32_269_600,
        _WIDE,
        score_thresh=0.2,  # what it is sure to be nothing has 0.07
        nms_iou=0.6,
    ),
    _coco("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", 46.7, 43_712_278, _WIDE),
    _coco(
        "retinanet_resnet50_fpn_v2",
        "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth",
        41.5,
        38_198_935,
        _WIDE,
        max_detections=300,
    ),
)


def twin(recipe: DetectorRecipe) -> DetectorRecipe:
    """The detector with a sense of time that begins with a still-image one's weights, and must be trained."""
    training = BoxTraining(init=recipe.name, backbone_lr=0.3, colour=0.2)
    changes: dict[str, Any] = {"shift": "uni", "training": training, "published": None, "checkpoint": None}
    return replace(recipe, name=f"{recipe.name}_uni", **changes)


# Lin et al., arXiv:1811.08383: R-FCN as FGFA trains it (Zhu et al., arXiv:1703.10025), shifted; no weights were given.
# Their pictures have a short side of 600 px and a long one of at most 1000, here rounded up to whole strides.
RFCN_VID = DetectorRecipe(
    "rfcn_resnet101_vid",
    "rfcn_resnet101",
    labels_of("imagenet_vid"),
    (608, 1008),
    nms_iou=0.3,
    score_thresh=0.001,
    max_detections=300,
    dataset="imagenet_vid",
    training=BoxTraining(
        optimiser="sgd",
        epochs=2,
        milestones=(4 / 3,),
        lr=2.5e-4,
        batch=4,
        gpus=4,
        weight_decay=5e-4,
        warmup_steps=0,
        strides=(1, 1),
        frozen=("backbone.body.conv1", "backbone.body.layer1"),
        init="resnet101",
    ),
)

MOVING_SHAPES_TSM = DetectorRecipe(
    "moving_shapes_tsm",
    "fcos_small",
    ("disc", "square", "triangle", "plus"),
    (96, 96),
    shift="uni",
    start="zeros",
    nms_iou=0.6,
    dataset="moving_shapes",
    training=BoxTraining(
        epochs=11,  # 1,650 steps of 6 of 900 films; init: `make moving-shapes` begins with moving_photos
        schedule="one_cycle",
        lr=2e-3,
        batch=6,
        weight_decay=0.02,
        clip_norm=5.0,
        strides=(1, 1),
        reverse=True,
        freeze_norm=False,
    ),
)
# Learns the shapes from single clean frames, as detectors of videos begin with a network that knows photos.
MOVING_PHOTOS = replace(
    MOVING_SHAPES_TSM,
    name="moving_photos",
    shift="none",
    frames=1,
    dataset="moving_photos",
    training=BoxTraining(
        epochs=6,  # 672 steps of 32 of 3,600 photos
        schedule="one_cycle",
        lr=2e-3,
        batch=32,
        weight_decay=0.02,
        clip_norm=5.0,
        strides=(1, 1),
        freeze_norm=False,
    ),
)

# Finds what the demo's cameras show.
SCENES_DETECTOR = DetectorRecipe(
    "scenes_detector",
    "fcos_small",
    ("badge",),
    (96, 96),
    shift="uni",
    nms_iou=0.6,
    dataset="scenes",
    training=BoxTraining(
        epochs=6,  # each of 200 steps of 4 of 800 films
        schedule="one_cycle",
        lr=2e-3,
        batch=4,
        weight_decay=0.02,
        clip_norm=5.0,
        strides=(1, 3),
        reverse=True,
        colour=0.15,
        freeze_norm=False,
    ),
)

DETECTOR_RECIPES: dict[str, DetectorRecipe] = {
    row.name: row
    for row in (
        *COCO_ROWS,
        *map(twin, COCO_ROWS),
        RFCN_VID,
        replace(RFCN_VID, name="rfcn_resnet101_vid_uni", shift="uni"),
        MOVING_SHAPES_TSM,
        replace(MOVING_SHAPES_TSM, name="moving_shapes_still", shift="none"),
        MOVING_PHOTOS,
        SCENES_DETECTOR,
    )
}


def find_any_recipe(name: str) -> Recipe | DetectorRecipe:
    """The row of this name, a recogniser's or a detector's. Raises UnknownRecipe that names the nearest rows."""
    every: dict[str, Recipe | DetectorRecipe] = {**RECIPES, **DETECTOR_RECIPES}
    if name not in every:
        near = get_close_matches(name, every, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownRecipe(f"recipe {name!r} does not exist; {hint}`tsm recipes list` shows all {len(every)}")
    return every[name]
