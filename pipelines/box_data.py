"""Videos with boxes: what is on each of their frames, and the one interface of every data set that has such."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from tsm_core.errors import CallerError

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

LEAST_PX = 1.0  # a box that is thinner shows nothing
UNKNOWN = -1  # a track that nobody numbered; a label that may be any


class BadBoxes(CallerError):
    """Boxes that are none, or that do not belong to their labels."""

    reason = "bad_boxes"


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """What is on one frame: M objects.

    boxes: float32 (M, 4), x1 y1 x2 y2 in pixels of the frame. labels: int64 (M,), places in the data set's labels.
    tracks: int64 (M,), the same number on every frame of one object, -1: nobody followed it. ignore: bool (M,), need
    not be found and may be (crowds, what is hardly visible); its label may be -1 for any. visible: float32 (M,), the
    share of the object that is seen, NaN: nobody said. condition: a word for the state of the frame.
    Raises BadBoxes; `clean` makes good ones of what an annotation file says.
    """

    boxes: Floats
    labels: Ints
    tracks: Ints
    ignore: Bools
    visible: Floats
    condition: str = ""

    def __post_init__(self) -> None:
        count = len(self.labels)
        shapes = [self.boxes.shape, self.labels.shape, self.tracks.shape, self.ignore.shape, self.visible.shape]
        if shapes != [(count, 4), *[(count,)] * 4]:
            raise BadBoxes(f"boxes, labels, tracks, ignore and visible have shapes {shapes}; M boxes need M of each")
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        bad = ~(np.isfinite(self.boxes).all(1) & (sides > 0).all(1))
        if bad.any():
            raise BadBoxes(f"box {self.boxes[bad][0].tolist()} is none: x1 y1 x2 y2 must be numbers, x1 < x2, y1 < y2")
        if (self.labels < np.where(self.ignore, UNKNOWN, 0)).any():
            raise BadBoxes(f"labels {self.labels.tolist()} must count from 0 (-1: ignored, of any class)")

    @classmethod
    def of(
        cls,
        boxes: ArrayLike = (),
        labels: ArrayLike = (),
        tracks: ArrayLike | None = None,
        ignore: ArrayLike | None = None,
        visible: ArrayLike | None = None,
        condition: str = "",
    ) -> Self:
        """From lists, or arrays of any kind of number."""
        names = np.asarray(labels, np.int64)
        count = len(names)
        return cls(
            np.asarray(boxes, np.float32).reshape(-1, 4),
            names,
            np.full(count, UNKNOWN, np.int64) if tracks is None else np.asarray(tracks, np.int64),
            np.zeros(count, np.bool_) if ignore is None else np.asarray(ignore, np.bool_),
            np.full(count, np.nan, np.float32) if visible is None else np.asarray(visible, np.float32),
            condition,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, keep: Bools) -> Objects:
        """Some of them."""
        return Objects(
            self.boxes[keep],
            self.labels[keep],
            self.tracks[keep],
            self.ignore[keep],
            self.visible[keep],
            self.condition,
        )


def clean(
    size: tuple[int, int],
    boxes: ArrayLike,
    labels: ArrayLike,
    *,
    tracks: ArrayLike | None = None,
    ignore: ArrayLike | None = None,
    visible: ArrayLike | None = None,
    condition: str = "",
) -> tuple[Objects, Counter[str]]:
    """Objects of a frame of `size` (width, height) pixels from what a file says, and what was left out, by reason.

    Boxes are cut at the frame's edges. Left out are those with a coordinate that is no number (`not_a_number`), those
    thinner than a pixel (`degenerate`), and those of which less than a pixel is inside (`outside`).
    """
    raw = np.asarray(boxes, np.float64).reshape(-1, 4)
    count = len(raw)
    finite: Bools = np.isfinite(np.max(np.abs(raw), axis=1))
    safe = np.where(finite[:, None], raw, 0.0)
    thin = _thin(safe)
    cut = np.clip(safe, 0.0, np.array([*size, *size], np.float64))
    out = _thin(cut)
    keep = finite & ~thin & ~out
    dropped = Counter(
        {
            "not_a_number": int((~finite).sum()),
            "degenerate": int((finite & thin).sum()),
            "outside": int((finite & ~thin & out).sum()),
        }
    )

    def kept(values: ArrayLike | None) -> NDArray[Any] | None:
        return None if values is None else np.asarray(values).reshape(count)[keep]

    found = Objects.of(
        cut[keep],
        np.asarray(labels, np.int64).reshape(count)[keep],
        kept(tracks),
        kept(ignore),
        kept(visible),
        condition,
    )
    return found, +dropped


def _thin(boxes: NDArray[np.float64]) -> Bools:
    thin: Bools = np.min(boxes[:, 2:] - boxes[:, :2], axis=1) < LEAST_PX
    return thin


Read: TypeAlias = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class BoxVideo:
    """A video: what is on each frame, and `read`, which gives frames of such numbers, uint8 (F, 3, H, W), RGB.

    All frames have one size. A still image is a video of one frame. `read` raises UnreadableVideo.
    """

    name: str
    objects: tuple[Objects, ...]
    read: Read

    @classmethod
    def of(cls, name: str, frames: Tensor, objects: Sequence[Objects]) -> Self:
        """A video whose frames uint8 (T, 3, H, W) are at hand."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or len(frames) != len(objects):
            raise BadBoxes(
                f"{name}: frames must be uint8 (T, 3, H, W), got {frames.dtype} {tuple(frames.shape)}, "
                f"for objects of {len(objects)} frames"
            )
        return cls(name, tuple(objects), lambda numbers: frames[list(numbers)])

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def frames(self) -> Tensor:
        """All frames, uint8 (T, 3, H, W)."""
        return self.read(range(len(self)))


class BoxVideos(Protocol):
    """Videos with boxes, to train on or to be judged by: the same video for the same index, whoever asks, and when.

    labels: names of the classes. identity: a word that is the same for the same videos and boxes only.
    It travels to other processes (pickle).
    """

    labels: tuple[str, ...]
    identity: str

    def __len__(self) -> int:
        """Number of videos."""
        ...

    def video(self, index: int) -> BoxVideo:
        """The video `index`. Raises UnreadableVideo."""
        ...


class Renamed:
    """A data set with its labels counted as others count them. BoxVideos.

    Raises BadBoxes that names the classes which the others do not have.
    """

    def __init__(self, videos: BoxVideos, labels: Sequence[str]) -> None:
        place: Mapping[str, int] = {label: index for index, label in enumerate(labels)}
        unknown = [label for label in videos.labels if label not in place]
        if unknown:
            raise BadBoxes(
                f"classes of the data that are not among the {len(labels)} of the recipe: {', '.join(unknown[:5])}"
                f"{', ...' * (len(unknown) > 5)}; use a recipe of this data set",
                reason="wrong_classes",
            )
        self._videos, self._place = videos, np.array([place[label] for label in videos.labels] + [UNKNOWN], np.int64)
        self.labels, self.identity = tuple(labels), videos.identity

    def __len__(self) -> int:
        return len(self._videos)

    def video(self, index: int) -> BoxVideo:
        """See BoxVideos."""
        video = self._videos.video(index)
        objects = tuple(
            Objects(each.boxes, self._place[each.labels], each.tracks, each.ignore, each.visible, each.condition)
            for each in video.objects
        )
        return BoxVideo(video.name, objects, video.read)


class Mixed:
    """Several data sets of the same labels as one, each taken so many times: of a long video several clips are drawn.

    BoxVideos.
    """

    def __init__(self, *parts: tuple[BoxVideos, int]) -> None:
        self.labels = parts[0][0].labels
        if any(videos.labels != self.labels for videos, _ in parts):
            raise BadBoxes("data sets of different labels cannot be mixed", reason="wrong_classes")
        self._parts = parts
        self.identity = "+".join(f"{times}x{videos.identity}" for videos, times in parts)

    def __len__(self) -> int:
        return sum(len(videos) * times for videos, times in self._parts)

    def video(self, index: int) -> BoxVideo:
        """See BoxVideos."""
        for videos, times in self._parts:
            if index < len(videos) * times:
                return videos.video(index % len(videos))
            index -= len(videos) * times
        raise IndexError(index)
