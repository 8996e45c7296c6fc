"""One frozen Recipe and one table: all that names and reproduces a model.

Names of the zoo's rows are MMAction2's config names (`__340x256`, `__ss256`, `__ss320` where one was trained on frames
stored in several sizes); facts and figures are those of its TSM page, v0.24.1. Each row without non-local blocks has a
uni-directional twin, `_uni`, whose weights must be trained.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tsm_core.errors import CallerError
from tsm_core.labels import Convention, labels_of
from tsm_core.preprocess_spec import Crop, PreprocessSpec


class RecipeError(CallerError):
    """A recipe cannot be used."""

    reason = "invalid_recipe"


class UnknownRecipe(CallerError):
    """No recipe of this name."""

    reason = "unknown_recipe"


Kind = TypeVar("Kind")
SmootherName = Literal["exponential", "gesture"]
Clips = Literal["uniform", "twice", "dense"]
CLIPS: dict[Clips, int] = {"uniform": 1, "twice": 2, "dense": 10}
CROPS: dict[Crop, int] = {"center": 1, "three": 3, "ten": 10}


@dataclass(frozen=True)
class Views:
    """How a video is cut up at test time: clips x crops views of T frames each.

    clips: `uniform` one frame from the middle of each segment, `twice` a second clip from the segments' beginnings,
    `dense` ten clips of 64 frames' span. crop: of the picture whose short side is 256, crop_px wide and high.
    """

    clips: Clips = "uniform"
    crop: Crop = "center"
    crop_px: int = 224

    def __post_init__(self) -> None:
        if self.clips not in CLIPS or self.crop not in CROPS or self.crop_px < 1:
            raise RecipeError(
                f"views {self.clips!r} x {self.crop!r} of {self.crop_px} px: clips are {', '.join(CLIPS)}, "
                f"crops {', '.join(CROPS)}"
            )

    @property
    def total(self) -> int:
        """Views of one video."""
        return CLIPS[self.clips] * CROPS[self.crop]

    def __str__(self) -> str:
        clips = {"uniform": "1 clip", "twice": "2 clips", "dense": "10 dense clips"}[self.clips]
        return f"{clips} x {self.crop} {self.crop_px}"


# Parameter groups of the optimiser: (members, times the learning rate, times the weight decay).
PARAM_GROUPS: tuple[tuple[str, float, float], ...] = (
    ("first_conv_weight", 1, 1),
    ("first_conv_bias", 2, 0),
    ("normal_weight", 1, 1),
    ("normal_bias", 2, 0),
    ("bn", 1, 0),
    ("fc_weight", 5, 1),
    ("fc_bias", 10, 0),
)


@dataclass(frozen=True)
class Training:
    """How the weights came about: SGD with steps, all frames of a clip cropped and flipped alike.

    lr belongs to a total batch of `lr_batch` videos and scales with it; milestones: epochs (from 0) where it falls to a
    tenth. warmup_epochs: linear from a tenth. batch: videos of one step on all GPUs. clips: `uniform` or `dense`.
    flip_pairs: classes that change places when a picture is mirrored. init: ImageNet weights of a backbone, or a
    recipe's. groups: see PARAM_GROUPS. gpu_normalize: pictures travel as bytes.
    """

    epochs: int = 50
    milestones: tuple[int, ...] = (20, 40)
    lr: float = 0.01
    lr_batch: int = 64
    batch: int = 64
    gpus: int = 8
    weight_decay: float = 1e-4
    warmup_epochs: int = 0
    momentum: float = 0.9
    clip_norm: float = 20.0
    clips: Clips = "uniform"
    crop: Literal["multi_scale", "random_resized", "none"] = "multi_scale"
    flip: bool = True
    flip_pairs: tuple[tuple[int, int], ...] = ()
    augment: Literal["none", "imgaug_randaugment", "ptv_randaugment", "ptv_augmix"] = "none"
    blend: Literal["none", "mixup", "cutmix"] = "none"
    partial_bn: bool = False
    gpu_normalize: bool = False
    init: str = "resnet50"
    groups: tuple[tuple[str, float, float], ...] = PARAM_GROUPS
    validate_epochs: int = 5


@dataclass(frozen=True)
class Accuracy:
    """Percentages; None where nothing was reported."""

    top1: float | None = None
    top5: float | None = None


@dataclass(frozen=True)
class Published:
    """What its authors report of a checkpoint; nothing of it was measured here.

    efficient, accurate: with the recipe's views of that name; reference_*: of the original authors' own checkpoint.
    params and flops (multiply-adds of one view) are from the page's metafile. notes: what differs between sources.
    """

    source: str
    efficient: Accuracy | None = None
    accurate: Accuracy | None = None
    reference_efficient: Accuracy | None = None
    reference_accurate: Accuracy | None = None
    gpu_mem_mb: int | None = None
    videos_per_s: float | None = None
    params: int | None = None
    flops: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """Where published weights are. sha256: the first digits of the file's SHA-256, None where nobody published it."""

    url: str
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Recipe:
    """All that names and reproduces a model; checks itself at birth and raises RecipeError.

    shift: `uni` reads the past alone and can be stepped, `bi` reads the future too, `none` is a still-image control.
    frames: T of a training clip. fps: rate of the training clips (None: one frame from each of T segments).
    non_local: pairwise function of five non-local blocks in a ResNet-50, which mix all frames of a clip. temporal_pool:
    halve the frames behind layer1. Neither can be stepped.
    start: what a new stream's first frame reads in place of its past. window_s, stride_s: in window mode, the seconds
    of video one result sees and the seconds between two results (None: a quarter of the window).
    smoothing_s: time constant of the smoothed scores; smoother `gesture` is mit-han-lab's rule for its online
    gestures instead. threshold, off_threshold, min_action_s: when a score begins an action, ends it, and how long it
    must last. background: labels that are no action.
    dataset, data, stored: what it was trained on, as folders of pictures or as videos, in which size. convention: whose
    frame sampling, crop offsets and averaging of views (`mmaction2`: of probabilities, `mit`: of logits).
    efficient, accurate: how a test cuts up a video.
    """

    name: str
    backbone: str
    shift: Literal["bi", "uni", "none"]
    labels: tuple[str, ...]
    frames: int = 8
    shift_div: int = 8
    non_local: Literal["embedded_gaussian", "gaussian", "dot_product"] | None = None
    temporal_pool: bool = False
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    dropout: float = 0.5
    fps: float | None = None
    start: Literal["zeros", "own"] = "zeros"
    window_s: float = 8.0
    stride_s: float | None = None
    smoothing_s: float = 0.5
    smoother: SmootherName = "exponential"
    threshold: float = 0.6
    off_threshold: float = 0.4
    min_action_s: float = 0.5
    background: tuple[str, ...] = ()
    dataset: str = ""
    data: Literal["rawframes", "videos"] = "rawframes"
    stored: str = ""
    convention: Convention = "mmaction2"
    efficient: Views = Views()
    accurate: Views = Views()
    training: Training | None = None
    published: Published | None = None
    checkpoint: Checkpoint | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "background", tuple(self.background))
        unknown = [label for label in self.background if label not in self.labels]
        checks: list[tuple[bool, str]] = [
            (bool(self.name), "name is empty"),
            (bool(self.labels), "labels are empty"),
            (len(set(self.labels)) == len(self.labels), "labels are not unique"),
            (not unknown, f"background {unknown} is not among the labels"),
            (self.shift in ("bi", "uni", "none"), f"shift {self.shift!r} must be 'bi', 'uni' or 'none'"),
            (self.start in ("zeros", "own"), f"start {self.start!r} must be 'zeros' or 'own'"),
            (self.frames >= 1, f"frames {self.frames} must be at least 1"),
            (self.shift_div >= 2, f"shift_div {self.shift_div} must be at least 2"),
            (
                self.non_local in (None, "embedded_gaussian", "gaussian", "dot_product"),
                f"non_local {self.non_local!r} must be 'embedded_gaussian', 'gaussian' or 'dot_product'",
            ),
            (
                self.non_local is None or self.backbone == "resnet50",
                f"non_local blocks stand in a resnet50, not in {self.backbone}",
            ),
            (
                not self.temporal_pool or self.backbone.startswith("resnet"),
                f"temporal_pool stands in a ResNet, not in {self.backbone}",
            ),
            (
                self.shift != "uni" or (self.non_local is None and not self.temporal_pool),
                "a uni-directional recipe has neither non_local nor temporal_pool: both read the future",
            ),
            (
                not self.temporal_pool or self.frames % 2 == 0,
                f"temporal_pool needs an even number of frames, not {self.frames}",
            ),
            (
                self.smoother in ("exponential", "gesture"),
                f"smoother {self.smoother!r} must be 'exponential' or 'gesture'",
            ),
            (0 <= self.dropout < 1, f"dropout {self.dropout} must be in [0, 1)"),
            (self.fps is None or self.fps > 0, f"fps {self.fps} must be above 0"),
            (self.window_s > 0, f"window_s {self.window_s} must be above 0"),
            (self.stride_s is None or self.stride_s > 0, f"stride_s {self.stride_s} must be above 0"),
            (self.smoothing_s >= 0, f"smoothing_s {self.smoothing_s} must be at least 0"),
            (0 < self.threshold <= 1, f"threshold {self.threshold} must be in (0, 1]"),
            (
                0 <= self.off_threshold <= self.threshold,
                f"off_threshold {self.off_threshold} must be in [0, threshold {self.threshold}]",
            ),
            (self.min_action_s >= 0, f"min_action_s {self.min_action_s} must be at least 0"),
            (self.data in ("rawframes", "videos"), f"data {self.data!r} must be 'rawframes' or 'videos'"),
            (
                self.convention in ("mmaction2", "mit"),
                f"convention {self.convention!r} must be 'mmaction2' or 'mit'",
            ),
        ]
        wrong = [text for fine, text in checks if not fine]
        if wrong:
            raise RecipeError(f"recipe {self.name!r}: {'; '.join(wrong)}")

    @property
    def steppable(self) -> bool:
        """Whether a frame needs its past alone; else the model sees windows of `frames` frames."""
        return self.shift != "bi" and self.non_local is None and not self.temporal_pool

    @property
    def window_stride_s(self) -> float:
        """Seconds between two results in window mode."""
        return self.stride_s or self.window_s / 4

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote. Raises RecipeError that names unknown, missing or wrong fields."""
        return record_from_json(cls, text)


def record_from_json(kind: type[Kind], text: str) -> Kind:
    """The record of this kind that a JSON object holds. Raises RecipeError, as Recipe.from_json."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"recipe is not JSON: {error}") from None
    try:
        record: Kind = _read(kind, data)
        return record
    except (TypeError, AttributeError, ValueError) as error:
        raise RecipeError(f"recipe cannot be read: {error}") from None


def _read(kind: Any, data: Any) -> Any:
    """A value of the annotated type from JSON: records from objects, tuples from lists."""
    if get_origin(kind) in (Union, types.UnionType):
        return None if data is None else _read(next(one for one in get_args(kind) if one is not type(None)), data)
    if is_dataclass(kind):
        unknown = sorted(set(data) - {each.name for each in fields(kind)})
        if unknown:
            raise RecipeError(
                f"unknown fields {', '.join(unknown)} in a {kind.__name__}: written by a newer version?"  # type: ignore[union-attr]
            )
        hints = get_type_hints(kind)
        return kind(**{name: _read(hints[name], value) for name, value in data.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], value) for value in data)
    return data


def generic(backbone: str, shift: Literal["bi", "uni", "none"], labels: Sequence[str], **more: Any) -> Recipe:
    """A recipe at 224 px for any label set, named like tsm_r50 or tsm_mobilenetv2_uni."""
    short = {"resnet50": "r50", "resnet101": "r101", "mobilenet_v2": "mobilenetv2"}.get(backbone, backbone)
    name = f"tsm_{short}" + {"bi": "", "uni": "_uni", "none": "_none"}[shift]
    return Recipe(**{"name": name, "backbone": backbone, "shift": shift, "labels": tuple(labels), **more})


# ---- the zoo: MMAction2's TSM page

PAGE = "MMAction2 v0.24.1"
PAGE_URL = "https://download.openmmlab.com/mmaction/recognition/tsm"
PAGE_1X_URL = "https://download.openmmlab.com/mmaction/v1.0/recognition/tsm"
MIT = "mit-han-lab"
MIT_URL = "https://hanlab18.mit.edu/projects/tsm/models"

TEN, DENSE = Views(crop="ten"), Views("dense")
DENSE_TEN, DENSE_THREE = Views("dense", "ten"), Views("dense", "three", 256)
TWICE_THREE = Views("twice", "three", 256)
DENSE_S = 64 / 30  # a dense clip's span

Pair = tuple[float | None, float | None]  # top-1, top-5


def _file(path: str) -> Checkpoint:
    # published names end in the first 8 digits of the file's hash
    return Checkpoint(f"{PAGE_URL}/{path.removeprefix('/')}", path.removesuffix(".pth").rpartition("-")[2])


def _row(
    base: Recipe,
    name: str,
    file: str,
    score: Pair,
    *,
    efficient_score: Pair | None = None,
    reference: Pair | None = None,
    efficient_reference: Pair | None = None,
    gpu_mem_mb: int | None = None,
    videos_per_s: float | None = None,
    params: int | None = None,
    flops: int | None = None,
    notes: tuple[str, ...] = (),
    training: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Recipe:
    """A row of the page: what is not said is the base's. file: in the folder of the row's name, unless it has a /."""
    said = base.published or Published(PAGE)
    path = file if "/" in file else f"{name.partition('__')[0]}/{file}"

    def accuracy(pair: Pair | None) -> Accuracy | None:
        return None if pair is None else Accuracy(*pair)

    published = Published(
        PAGE,
        efficient=accuracy(efficient_score),
        accurate=accuracy(score),
        reference_efficient=accuracy(efficient_reference),
        reference_accurate=accuracy(reference),
        gpu_mem_mb=gpu_mem_mb,
        videos_per_s=videos_per_s,
        params=params or said.params,
        flops=flops or said.flops,
        notes=notes,
    )
    trained = replace(base.training or Training(), **(training or {}))
    return replace(base, name=name, checkpoint=_file(path), training=trained, published=published, **changes)


# Bases carry what many rows share; they are no rows themselves.
_K400 = Recipe(
    "kinetics400",
    backbone="resnet50",
    shift="bi",
    labels=labels_of("kinetics400"),
    dataset="kinetics400",
    stored="short-side 320",
    training=Training(),
    published=Published(PAGE, params=24_327_632, flops=32_965_562_368),
)
_K400_16 = replace(
    _K400,
    frames=16,
    accurate=TEN,
    training=Training(lr=0.0075, lr_batch=48, batch=48),
    published=Published(PAGE, params=24_327_632, flops=65_931_124_736),
)
_K400_NL = replace(
    _K400,
    non_local="embedded_gaussian",
    training=Training(batch=256, gpus=32),
    published=Published(PAGE, params=31_682_000, flops=49_457_811_456),
)
_K400_MOBILE = replace(
    _K400,
    backbone="mobilenet_v2",
    efficient=DENSE,
    accurate=DENSE_THREE,
    window_s=DENSE_S,
    training=Training(epochs=100, milestones=(40, 80), weight_decay=2e-5, init="mobilenet_v2"),
    published=Published(PAGE, params=2_736_272, flops=3_337_519_104),
)
_DIVING48 = Recipe(
    "diving48",
    backbone="resnet50",
    shift="bi",
    labels=labels_of("diving48"),
    dataset="diving48",
    data="videos",
    window_s=5.0,
    training=Training(validate_epochs=1),
    published=Published(PAGE, params=23_606_384, flops=32_959_795_200),
)
_STHV1 = Recipe(
    "sthv1",
    backbone="resnet50",
    shift="bi",
    labels=labels_of("sthv1"),
    dataset="sthv1",
    stored="height 100",
    window_s=4.0,
    accurate=TWICE_THREE,
    training=Training(weight_decay=5e-4, flip=False, validate_epochs=2),
    published=Published(PAGE, params=23_864_558, flops=32_961_859_584),
)
_STHV2 = replace(_STHV1, labels=labels_of("sthv2"), dataset="sthv2", stored="height 256")
_HMDB51 = Recipe(
    "hmdb51",
    backbone="resnet50",
    shift="bi",
    labels=labels_of("hmdb51"),
    dataset="hmdb51",
    window_s=3.0,
    training=Training(
        epochs=25,
        milestones=(10, 20),
        lr=0.0015,
        lr_batch=96,
        batch=96,
        flip=False,
        init="tsm_r50_1x1x8_50e_kinetics400_rgb__ss256",
        validate_epochs=1,
    ),
    published=Published(PAGE, params=23_612_531, flops=32_959_844_352),
)
_UCF101 = replace(
    _HMDB51,
    labels=labels_of("ucf101"),
    dataset="ucf101",
    window_s=7.0,
    published=Published(PAGE, params=23_714_981, flops=32_960_663_552),
)
_LONG: dict[str, Any] = {"epochs": 100, "milestones": (40, 80)}
_FINE_TUNE_16: dict[str, Any] = {
    "lr": 0.00075,
    "lr_batch": 48,
    "batch": 48,
    "init": "tsm_r50_1x1x16_50e_kinetics400_rgb__ss256",
}
_MIRRORED_STHV1: dict[str, Any] = {"flip": True, "flip_pairs": ((2, 4), (30, 41), (52, 66))}
_R101: dict[str, Any] = {"backbone": "resnet101", "params": 42_856_686, "flops": 62_782_459_904}
_INIT_101 = {"init": "resnet101"}
_STHV1_REFERENCE: dict[str, Any] = {"efficient_reference": (45.5, 74.34), "reference": (47.33, 76.6)}
_DENSE_VIEWS: dict[str, Any] = {"efficient": DENSE, "accurate": DENSE_TEN, "window_s": DENSE_S}
_BATCH_48: dict[str, Any] = {"lr": 0.0075, "lr_batch": 48, "batch": 48}
_MOBILE = "trained with uniform sampling, whatever the name says; dense for tests alone"
_AT_256 = "the metafile gives the FLOPs at 256 px"
_TEN_CROP = "tested with a centre crop until v0.18.0, with ten crops since"
_DENSE_LR = "base learning rate 0.02 until v0.15.0 and 0.01 since; the logs are older than the change"

# fmt: off
PAGE_ROWS: tuple[Recipe, ...] = (
    _row(_K400, "tsm_r50_1x1x8_50e_kinetics400_rgb__340x256",
         "tsm_r50_1x1x8_50e_kinetics400_rgb_20200607-af7fb746.pth", (70.24, 89.56), stored="340x256",
         reference=(70.36, 89.49), gpu_mem_mb=7079, videos_per_s=74.0),
    _row(_K400, "tsm_r50_1x1x8_50e_kinetics400_rgb__ss256",
         "tsm_r50_256p_1x1x8_50e_kinetics400_rgb/tsm_r50_256p_1x1x8_50e_kinetics400_rgb_20200726-020785e2.pth",
         (70.59, 89.52), stored="short-side 256", gpu_mem_mb=7079),
    _row(_K400, "tsm_r50_1x1x8_50e_kinetics400_rgb__ss320",
         "tsm_r50_1x1x8_50e_kinetics400_rgb_20210701-68d582b4.pth", (70.73, 89.81), gpu_mem_mb=7079),
    _row(_K400, "tsm_r50_1x1x8_100e_kinetics400_rgb", "tsm_r50_1x1x8_100e_kinetics400_rgb_20210701-7ff22268.pth",
         (71.9, 90.03), training=_LONG, gpu_mem_mb=7079),
    _row(_K400, "tsm_r50_gpu_normalize_1x1x8_50e_kinetics400_rgb",
         "tsm_r50_gpu_normalize_1x1x8_50e_kinetics400_rgb_20210219-bf96e6cc.pth", (70.48, 89.4),
         stored="short-side 256", training={"gpu_normalize": True}, gpu_mem_mb=7076),
    _row(_K400, "tsm_r50_video_1x1x8_50e_kinetics400_rgb",
         "tsm_r50_video_1x1x8_100e_kinetics400_rgb/tsm_r50_video_1x1x8_100e_kinetics400_rgb_20200702-a77f4328.pth",
         (70.25, 89.66), data="videos", stored="short-side 256", training={"lr": 0.02}, reference=(70.36, 89.49),
         gpu_mem_mb=7077, videos_per_s=74.0, notes=("the file says 100e, the run has 50 epochs",)),
    _row(_K400, "tsm_r50_dense_1x1x8_50e_kinetics400_rgb",
         "tsm_r50_dense_1x1x8_50e_kinetics400_rgb_20210701-a54ff3d3.pth", (73.46, 90.84), gpu_mem_mb=7079,
         notes=(_DENSE_LR, _TEN_CROP), training={"clips": "dense", "validate_epochs": 2}, **_DENSE_VIEWS),
    _row(_K400, "tsm_r50_dense_1x1x8_100e_kinetics400_rgb",
         "tsm_r50_dense_1x1x8_100e_kinetics400_rgb_20210701-e3e5e97f.pth", (74.55, 91.74), gpu_mem_mb=7079,
         notes=(_DENSE_LR, _TEN_CROP), training={**_LONG, "clips": "dense", "validate_epochs": 2}, **_DENSE_VIEWS),
    _row(_K400_16, "tsm_r50_1x1x16_50e_kinetics400_rgb__340x256",
         "tsm_r50_340x256_1x1x16_50e_kinetics400_rgb_20201011-2f27f229.pth", (72.09, 90.37), stored="340x256",
         reference=(70.67, 89.98), gpu_mem_mb=10404, videos_per_s=47.0, notes=(_TEN_CROP,)),
    _row(_K400_16, "tsm_r50_1x1x16_50e_kinetics400_rgb__ss256",
         "tsm_r50_256p_1x1x16_50e_kinetics400_rgb/tsm_r50_256p_1x1x16_50e_kinetics400_rgb_20201010-85645c2a.pth",
         (71.89, 90.73), stored="short-side 256", training={"batch": 192, "gpus": 32}, gpu_mem_mb=10398,
         notes=(_TEN_CROP,)),
    _row(_K400_16, "tsm_r50_1x1x16_100e_kinetics400_rgb",
         "tsm_r50_1x1x16_100e_kinetics400_rgb_20210701-41ac92b9.pth", (72.8, 90.75), training=_LONG,
         gpu_mem_mb=10398,
         notes=(_TEN_CROP, "the metafile names another file, 7c0c5d54, in the folder of the 50e row")),
    _row(_K400_NL, "tsm_nl_embedded_gaussian_r50_1x1x8_50e_kinetics400_rgb",
         "tsm_nl_embedded_gaussian_r50_1x1x8_50e_kinetics400_rgb_20200724-f00f1336.pth", (72.03, 90.25),
         non_local="embedded_gaussian", gpu_mem_mb=8931, reference=(71.81, 90.36)),
    _row(_K400_NL, "tsm_nl_gaussian_r50_1x1x8_50e_kinetics400_rgb",
         "tsm_nl_gaussian_r50_1x1x8_50e_kinetics400_rgb_20200816-b93fd297.pth", (70.7, 89.9), non_local="gaussian",
         gpu_mem_mb=10125, params=28_007_888, flops=41_231_355_904),
    _row(_K400_NL, "tsm_nl_dot_product_r50_1x1x8_50e_kinetics400_rgb",
         "tsm_nl_dot_product_r50_1x1x8_50e_kinetics400_rgb_20200724-d8ad84d2.pth", (71.6, 90.34),
         non_local="dot_product", gpu_mem_mb=8358),
    _row(_K400_MOBILE, "tsm_mobilenetv2_dense_1x1x8_100e_kinetics400_rgb",
         "tsm_mobilenetv2_dense_320p_1x1x8_100e_kinetics400_rgb_20210202-61135809.pth", (68.46, 88.64),
         gpu_mem_mb=3385, notes=(_MOBILE,)),
    _row(_K400_MOBILE, "tsm_mobilenetv2_dense_1x1x8_kinetics400_rgb_port",
         "/tsm_mobilenetv2_dense_1x1x8_kinetics400_rgb_port_20210922-aa5cadf6.pth", (69.89, 89.01), gpu_mem_mb=3385,
         notes=(_MOBILE, "mit-han-lab's weights, ported")),
    _row(_DIVING48, "tsm_r50_video_1x1x8_50e_diving48_rgb",
         "tsm_r50_video_1x1x8_50e_diving48_rgb_20210426-aba5aa3d.pth", (75.99, 97.16), gpu_mem_mb=7070),
    _row(_DIVING48, "tsm_r50_video_1x1x16_50e_diving48_rgb",
         "tsm_r50_video_1x1x16_50e_diving48_rgb_20210426-aa9631c0.pth", (81.62, 97.66), frames=16,
         training={"lr": 0.005, "lr_batch": 32, "batch": 32}, gpu_mem_mb=7070, flops=65_919_590_400),
    _row(_STHV1, "tsm_r50_1x1x8_50e_sthv1_rgb", "tsm_r50_1x1x8_50e_sthv1_rgb_20210203-01dce462.pth", (47.7, 76.12),
         efficient_score=(45.58, 75.02), gpu_mem_mb=7077, **_STHV1_REFERENCE),
    _row(_STHV1, "tsm_r50_flip_1x1x8_50e_sthv1_rgb", "tsm_r50_flip_1x1x8_50e_sthv1_rgb_20210203-12596f16.pth",
         (48.51, 77.56), efficient_score=(47.1, 76.02), training=_MIRRORED_STHV1, gpu_mem_mb=7077,
         **_STHV1_REFERENCE),
    _row(_STHV1, "tsm_r50_randaugment_1x1x8_50e_sthv1_rgb",
         "tsm_r50_randaugment_1x1x8_50e_sthv1_rgb_20210324-481268d9.pth", (48.9, 77.92),
         efficient_score=(47.16, 76.07), training={"augment": "imgaug_randaugment"}, gpu_mem_mb=7077,
         **_STHV1_REFERENCE),
    _row(_STHV1, "tsm_r50_ptv_randaugment_1x1x8_50e_sthv1_rgb",
         "tsm_r50_ptv_randaugment_1x1x8_50e_sthv1_rgb-ee93e5e3.pth", (48.66, 77.41), efficient_score=(47.65, 76.67),
         training={"augment": "ptv_randaugment"}, gpu_mem_mb=7077, **_STHV1_REFERENCE),
    _row(_STHV1, "tsm_r50_ptv_augmix_1x1x8_50e_sthv1_rgb", "tsm_r50_ptv_augmix_1x1x8_50e_sthv1_rgb-4f4f4740.pth",
         (47.68, 76.49), efficient_score=(46.26, 75.92), training={"augment": "ptv_augmix"}, gpu_mem_mb=7077,
         **_STHV1_REFERENCE),
    _row(_STHV1, "tsm_r50_flip_randaugment_1x1x8_50e_sthv1_rgb",
         "tsm_r50_flip_randaugment_1x1x8_50e_sthv1_rgb_20210324-76937692.pth", (50.31, 78.18),
         efficient_score=(47.85, 76.78), training={**_MIRRORED_STHV1, "augment": "imgaug_randaugment"},
         gpu_mem_mb=7077, **_STHV1_REFERENCE),
    _row(_STHV1, "tsm_r50_1x1x16_50e_sthv1_rgb", "tsm_r50_1x1x16_50e_sthv1_rgb_20211202-b922e5d2.pth",
         (49.03, 77.83), efficient_score=(47.77, 76.82), frames=16, training=_BATCH_48,
         efficient_reference=(47.05, 76.4), reference=(48.61, 77.96), gpu_mem_mb=10390, flops=65_923_719_168),
    _row(_STHV1, "tsm_r101_1x1x8_50e_sthv1_rgb", "tsm_r101_1x1x8_50e_sthv1_rgb_20211202-49970a5b.pth", (48.59, 77.1),
         efficient_score=(46.09, 75.41), training=_INIT_101, efficient_reference=(46.64, 75.4),
         reference=(48.13, 77.31), gpu_mem_mb=9800,
         notes=("the page prints ResNet50 for this row; configuration and checkpoint are ResNet101",), **_R101),
    _row(_STHV2, "tsm_r50_1x1x8_50e_sthv2_rgb", "tsm_r50_256h_1x1x8_50e_sthv2_rgb_20210816-032aa4da.pth",
         (61.82, 86.8), efficient_score=(59.11, 85.39), reference=(61.2, None), training=_BATCH_48, gpu_mem_mb=7069,
         notes=("the metafile gives the reference 57.98/60.69 top-1 and 84.57/86.28 top-5",)),
    _row(_STHV2, "tsm_r50_1x1x16_50e_sthv2_rgb", "tsm_r50_256h_1x1x16_50e_sthv2_rgb_20210331-0a45549c.pth",
         (63.19, 87.93), efficient_score=(61.06, 86.66), reference=(63.1, None), frames=16, training=_BATCH_48,
         gpu_mem_mb=10400, notes=("the metafile gives the FLOPs of 8 frames",)),
    _row(_STHV2, "tsm_r101_1x1x8_50e_sthv2_rgb", "tsm_r101_256h_1x1x8_50e_sthv2_rgb_20210401-df97f3e1.pth",
         (63.84, 88.3), efficient_score=(60.88, 86.56), reference=(63.3, None), training=_INIT_101, gpu_mem_mb=9727,
         **_R101),
    _row(_STHV1, "tsm_r50_mixup_1x1x8_50e_sthv1_rgb", "tsm_r50_mixup_1x1x8_50e_sthv1_rgb-9eca48e5.pth",
         (48.49, 76.88), efficient_score=(46.35, 75.07), training={"blend": "mixup"}, flops=43_051_352_064,
         notes=(_AT_256,)),
    _row(_STHV1, "tsm_r50_cutmix_1x1x8_50e_sthv1_rgb", "tsm_r50_cutmix_1x1x8_50e_sthv1_rgb-34934615.pth",
         (47.46, 76.71), efficient_score=(45.92, 75.23), training={"blend": "cutmix"}, flops=43_051_352_064,
         notes=(_AT_256,)),
    _row(_STHV1, "tsm_r50_1x1x8_50e_jester_rgb", "tsm_r50_1x1x8_50e_jester_rgb-c799267e.pth", (97.2, None),
         efficient_score=(96.5, None), labels=labels_of("jester"), dataset="jester", window_s=3.0,
         efficient=Views(crop_px=256),
         training={"crop": "random_resized", "flip": True, "flip_pairs": ((0, 1), (6, 7))}, params=23_563_355,
         flops=43_048_943_616,
         notes=(_AT_256, "turning a hand clockwise and counterclockwise are not exchanged when mirrored")),
    _row(_HMDB51, "tsm_k400_pretrained_r50_1x1x8_25e_hmdb51_rgb",
         "tsm_k400_pretrained_r50_1x1x8_25e_hmdb51_rgb_20210630-10c74ee5.pth", (72.68, 92.03), gpu_mem_mb=10388),
    _row(_HMDB51, "tsm_k400_pretrained_r50_1x1x16_25e_hmdb51_rgb",
         "tsm_k400_pretrained_r50_1x1x16_25e_hmdb51_rgb_20210630-4785548e.pth", (74.77, 93.86), frames=16,
         training=_FINE_TUNE_16, gpu_mem_mb=10388, flops=65_919_688_704),
    _row(_UCF101, "tsm_k400_pretrained_r50_1x1x8_25e_ucf101_rgb",
         "tsm_k400_pretrained_r50_1x1x8_25e_ucf101_rgb_20210630-1fae312b.pth", (94.5, 99.58), gpu_mem_mb=10389),
    _row(_UCF101, "tsm_k400_pretrained_r50_1x1x16_25e_ucf101_rgb",
         "tsm_k400_pretrained_r50_1x1x16_25e_ucf101_rgb_20210630-8df9c358.pth", (94.58, 99.37), frames=16,
         training=_FINE_TUNE_16, gpu_mem_mb=10389, flops=65_921_327_104),
)
# fmt: on


def _successor(row: str, name: str, date: str, sha256: str, score: Pair, **changes: Any) -> Recipe:
    """MMAction2 1.x's own training of a row: videos, batch 128, another schedule; not the row's recipe."""
    base = _PAGE[row]
    schedule = {"epochs": 50, "milestones": (25, 45), "warmup_epochs": 5}
    training = {**schedule, "lr": 0.02, "lr_batch": 128, "batch": 128, "gpus": 8, **changes.pop("training", {})}
    assert base.training is not None
    assert base.published is not None
    return replace(
        base,
        **{"data": "videos", "stored": "", "accurate": TEN, **changes},
        name=name,
        training=replace(base.training, **training),
        published=Published(
            "MMAction2 v1.2.0",
            accurate=Accuracy(*score),
            params=base.published.params,
            flops=base.published.flops,
        ),
        checkpoint=Checkpoint(f"{PAGE_1X_URL}/{name}/{name}_{date}-{sha256}.pth", sha256),
    )


_PAGE = {row.name: row for row in PAGE_ROWS}
_R50 = "tsm_r50_1x1x8_50e_kinetics400_rgb__ss256"
_MIRRORED_STHV2: dict[str, Any] = {"flip": True, "flip_pairs": ((86, 87), (93, 94), (166, 167))}
_STHV2_1X: dict[str, Any] = {"accurate": TWICE_THREE, "training": _MIRRORED_STHV2}

# fmt: off
SUCCESSOR_ROWS: tuple[Recipe, ...] = (
    _successor(_R50, "tsm_imagenet-pretrained-r50_8xb16-1x1x8-50e_kinetics400-rgb", "20220831", "64d69186",
         (73.18, 90.56) ),
    _successor("tsm_r50_1x1x8_100e_kinetics400_rgb", "tsm_imagenet-pretrained-r50_8xb16-1x1x8-100e_kinetics400-rgb",
         "20220831", "a6db1e5d", (73.22, 90.22), training={"epochs": 100, "milestones": (50, 90)}),
    _successor("tsm_r50_dense_1x1x8_50e_kinetics400_rgb",
         "tsm_imagenet-pretrained-r50_8xb16-dense-1x1x8-50e_kinetics400-rgb", "20220831", "f55d3c2b", (73.38, 90.78),
         accurate=DENSE_TEN),
    _successor("tsm_r50_1x1x16_50e_kinetics400_rgb__ss256",
         "tsm_imagenet-pretrained-r50_8xb16-1x1x16-50e_kinetics400-rgb", "20220831", "042b1748", (75.12, 91.55)),
    _successor("tsm_nl_embedded_gaussian_r50_1x1x8_50e_kinetics400_rgb",
         "tsm_imagenet-pretrained-r50-nl-embedded-gaussian_8xb16-1x1x8-50e_kinetics400-rgb", "20220831", "35eddb57",
         (74.34, 91.23)),
    _successor("tsm_nl_gaussian_r50_1x1x8_50e_kinetics400_rgb",
         "tsm_imagenet-pretrained-r50-nl-gaussian_8xb16-1x1x8-50e_kinetics400-rgb", "20220831", "7e54dacf",
         (73.66, 90.99)),
    _successor("tsm_nl_dot_product_r50_1x1x8_50e_kinetics400_rgb",
         "tsm_imagenet-pretrained-r50-nl-dot-product_8xb16-1x1x8-50e_kinetics400-rgb", "20220831", "108bfde5",
         (74.49, 91.15)),
    _successor("tsm_mobilenetv2_dense_1x1x8_100e_kinetics400_rgb",
         "tsm_imagenet-pretrained-mobilenetv2_8xb16-1x1x8-100e_kinetics400-rgb", "20230414", "401127fd",
         (68.71, 88.32), training={**_LONG, "warmup_epochs": 0}, window_s=8.0, efficient=Views(),
         accurate=Views(crop="three", crop_px=256)),
    _successor("tsm_r50_1x1x8_50e_sthv2_rgb", "tsm_imagenet-pretrained-r50_8xb16-1x1x8-50e_sthv2-rgb", "20230317",
         "be0fc26e", (62.72, 87.7), **_STHV2_1X),
    _successor("tsm_r50_1x1x16_50e_sthv2_rgb", "tsm_imagenet-pretrained-r50_8xb16-1x1x16-50e_sthv2-rgb", "20230317",
         "ec6696ad", (64.16, 88.61), **_STHV2_1X),
    _successor("tsm_r101_1x1x8_50e_sthv2_rgb", "tsm_imagenet-pretrained-r101_8xb16-1x1x8-50e_sthv2-rgb", "20230320",
         "efcc0d1b", (63.7, 88.28), **_STHV2_1X),
)
# fmt: on


def _mit(
    file: str, base: Recipe, score: Pair, *, efficient_score: Pair | None = None, views: Views = TEN, **changes: Any
) -> Recipe:
    """A checkpoint of mit-han-lab's page, named as its file; no hash was published."""
    training = changes.pop("training", {})
    assert base.training is not None
    return replace(
        base,
        **{
            "convention": "mit",
            "preprocess": PIL_SPEC,
            "efficient": Views(),
            "labels": labels_of(base.dataset, "mit"),
            "stored": "",
            "data": "rawframes",
            **changes,
        },
        name=file.removesuffix(".pth"),
        accurate=views,
        training=replace(base.training, **training),
        published=Published(
            MIT,
            efficient=None if efficient_score is None else Accuracy(*efficient_score),
            accurate=Accuracy(*score),
        ),
        checkpoint=Checkpoint(f"{MIT_URL}/{file}"),
    )


PIL_SPEC = PreprocessSpec(antialias=True, convention="mit")
_MIT_K400: dict[str, Any] = {"lr": 0.02, "lr_batch": 128, "batch": 128}
_MIT_DENSE: dict[str, Any] = {**_MIT_K400, **_LONG, "clips": "dense"}
_MIT_STH: dict[str, Any] = {"epochs": 45, "flip": False}

# fmt: off
MIT_ROWS: tuple[Recipe, ...] = (
    _mit("TSM_kinetics_RGB_resnet50_avg_segment5_e50.pth", _K400, (69.9, None), efficient_score=(68.8, None),
         shift="none", frames=5, training=_MIT_K400),
    _mit("TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e50.pth", _K400, (72.8, None),
         efficient_score=(71.2, None), training=_MIT_K400),
    _mit("TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment16_e50.pth", _K400_16, (73.7, None),
         efficient_score=(72.6, None), training=_MIT_K400),
    _mit("TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e100_dense.pth", _K400, (74.1, None),
         views=DENSE_THREE, window_s=DENSE_S, training=_MIT_DENSE),
    _mit("TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e100_dense_nl.pth", _K400_NL, (75.6, None),
         views=DENSE_THREE, window_s=DENSE_S, training={**_MIT_DENSE, "gpus": 8}),
    _mit("TSM_kinetics_RGB_mobilenetv2_shift8_blockres_avg_segment8_e100_dense.pth", _K400_MOBILE, (69.5, None),
         views=DENSE_THREE, training={**_MIT_DENSE, "weight_decay": 2e-5}),
    _mit("TSM_something_RGB_resnet50_shift8_blockres_avg_segment8_e45.pth", _STHV1, (47.2, None),
         efficient_score=(45.6, None), views=TWICE_THREE, training=_MIT_STH),
    _mit("TSM_something_RGB_resnet50_shift8_blockres_avg_segment16_e45.pth", _STHV1, (48.4, None),
         efficient_score=(47.2, None), frames=16, views=TWICE_THREE, training=_MIT_STH),
    _mit("TSM_something_RGB_resnet101_shift8_blockres_avg_segment8_e45.pth", _STHV1, (48.7, None),
         efficient_score=(46.9, None), backbone="resnet101", views=TWICE_THREE,
         training={**_MIT_STH, "init": "resnet101"}),
    _mit("TSM_somethingv2_RGB_resnet50_shift8_blockres_avg_segment8_e45.pth", _STHV2, (61.2, None),
         views=TWICE_THREE, training=_MIT_STH),
    _mit("TSM_somethingv2_RGB_resnet50_shift8_blockres_avg_segment16_e45.pth", _STHV2, (63.1, None), frames=16,
         views=TWICE_THREE, training=_MIT_STH),
    _mit("TSM_somethingv2_RGB_resnet101_shift8_blockres_avg_segment8_e45.pth", _STHV2, (63.3, None),
         backbone="resnet101", views=TWICE_THREE, training={**_MIT_STH, "init": "resnet101"}),
)
# fmt: on

JESTER_ONLINE = Recipe(
    "mobilenetv2_jester_online",
    backbone="mobilenet_v2",
    shift="uni",
    labels=labels_of("jester", "mit"),
    preprocess=PIL_SPEC,
    fps=12.0,
    smoother="gesture",
    threshold=0.5,
    off_threshold=0.3,
    background=("No gesture", "Doing other things"),
    dataset="jester",
    stored="height 100",
    convention="mit",
    published=Published(MIT, notes=("accuracy was not stated; nor was the order of the colour channels",)),
    checkpoint=Checkpoint(f"{MIT_URL}/mobilenetv2_jester_online.pth.tar"),
)


def twin(recipe: Recipe) -> Recipe:
    """The uni-directional twin of a row: the same network and training, shifted one way, with weights of its own.

    Raises RecipeError for a row that cannot have one.
    """
    return replace(recipe, name=f"{recipe.name}_uni", shift="uni", published=None, checkpoint=None)


MOTION9 = Recipe(
    "motion9",
    backbone="resnet_small",
    shift="uni",
    labels=("left", "right", "up", "down", "clockwise", "counter-clockwise", "grow", "shrink", "still"),
    frames=16,
    shift_div=4,
    preprocess=PreprocessSpec(input_px=64, resize="exact", antialias=True),
    dropout=0.0,
    fps=15.0,
    window_s=16 / 15,
    smoothing_s=0.25,
    threshold=0.6,
    off_threshold=0.4,
    min_action_s=0.3,
    background=("still",),
)

MOTION8_TSM = Recipe(
    "motion8_tsm",
    backbone="resnet_small",
    shift="uni",
    labels=labels_of("motion8"),
    shift_div=4,
    preprocess=PreprocessSpec(input_px=64, resize="exact", antialias=True),
    dropout=0.0,
    dataset="motion8",
    efficient=Views(crop_px=64),
    accurate=Views(crop_px=64),
    training=Training(
        epochs=7,
        milestones=(4, 6),
        lr=0.05,
        lr_batch=16,
        batch=16,
        gpus=1,
        warmup_epochs=1,
        clip_norm=5.0,
        crop="none",
        flip=False,
        init="none",
        groups=tuple((name, 1.0, decay) for name, _, decay in PARAM_GROUPS),
        validate_epochs=1,
    ),
)

RECIPES: dict[str, Recipe] = {
    row.name: row
    for row in (
        *PAGE_ROWS,
        *(twin(row) for row in PAGE_ROWS if row.non_local is None),
        *SUCCESSOR_ROWS,
        *MIT_ROWS,
        JESTER_ONLINE,
        MOTION9,
        replace(MOTION9, name="motion9_none", shift="none"),  # the same network without time: must stay at chance
        MOTION8_TSM,
        replace(MOTION8_TSM, name="motion8_tsn", shift="none"),  # without time: half of the directions, whatever else
    )
}


def find_recipe(name: str) -> Recipe:
    """The row of this name. Raises UnknownRecipe that names the nearest rows."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownRecipe(f"recipe {name!r} does not exist; {hint}`tsm recipes list` shows all {len(RECIPES)}")
    return RECIPES[name]
