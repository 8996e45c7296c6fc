"""Data sets with boxes in files: COCO's JSON, with or without the videos of COCO-VID, beside folders of pictures."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.box_data import UNKNOWN, BoxVideo, Objects, clean
from pipelines.datasets import BadList, NoList
from pipelines.decoding import UnreadableVideo


class CocoVideos:
    """The videos of a COCO or COCO-VID file, whose pictures' names start from a folder. BoxVideos.

    Pictures with a `video_id` are the frames of a video, in the order of their `frame_id`; each of the others is a
    still image. Classes count in the order of their ids, which may have gaps. `instance_id` (or `track_id`) tells who
    is who; `iscrowd` or `ignore` is not to be found. Boxes are cut at the picture's edges; those that are none are left
    out, and `dropped` counts them when they are met.
    Raises NoList, BadList (no such class or picture, ids twice, pictures without a size).
    """

    def __init__(self, file: Path | str, folder: Path | str) -> None:
        self.file, self._folder = Path(file), Path(folder)
        try:
            data = self.file.read_bytes()
        except OSError:
            raise NoList(
                f"{file} does not exist; `tsm data prepare` makes it where the data set has another format"
            ) from None
        try:
            found = json.loads(data)
            categories = sorted(found["categories"], key=lambda each: each["id"])
            images, annotations = found["images"], found.get("annotations", [])
            self.labels = tuple(str(each["name"]) for each in categories)
            numbers = {each["id"]: number for number, each in enumerate(categories)}
            self._take(images, {each["id"]: str(each["name"]) for each in found.get("videos", [])})
            self._take_objects(images, annotations, numbers)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadList(f"{file} is no COCO file: {type(error).__name__} {error}") from None
        if len(set(self.labels)) < len(self.labels) or len(numbers) < len(categories):
            raise BadList(f"{file}: two categories have the same name or id")
        self.identity = hashlib.sha256(data).hexdigest()[:16]
        self.dropped = Counter[str]()

    def _take(self, images: Sequence[dict[str, Any]], names: dict[Any, str]) -> None:
        self._paths = [str(each["file_name"]) for each in images]
        for path in self._paths:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise BadList(f"{self.file}: {path!r} leads out of the data set's folder")
        self._sizes = np.array([(each.get("width", 0), each.get("height", 0)) for each in images], np.int64)
        self._sizes = self._sizes.reshape(-1, 2)
        if (self._sizes < 1).any():
            path = self._paths[int((self._sizes < 1).any(axis=1).argmax())]
            raise BadList(f"{self.file}: {path} has no width and height")
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, each in enumerate(images):
            groups[("still", number) if each.get("video_id") is None else each["video_id"]].append(number)
        self._videos: list[tuple[str, list[int]]] = []
        for key, members in groups.items():
            members.sort(key=lambda number: images[number].get("frame_id", 0))
            self._videos.append((names.get(key) or self._paths[members[0]], members))

    def _take_objects(
        self, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]], numbers: dict[Any, int]
    ) -> None:
        """Boxes of all pictures in arrays: there may be millions."""
        place = {each["id"]: number for number, each in enumerate(images)}
        if len(place) < len(images):
            raise BadList(f"{self.file}: two images have the same id")
        at = np.empty(len(annotations), np.int64)
        labels, tracks, ignore = np.empty_like(at), np.empty_like(at), np.zeros(len(annotations), np.bool_)
        boxes = np.empty((len(annotations), 4))
        for row, each in enumerate(annotations):
            if each["image_id"] not in place:
                raise BadList(
                    f"{self.file}: annotation {each.get('id')} is of image {each['image_id']}, which is not there"
                )
            if each["category_id"] not in numbers:
                raise BadList(
                    f"{self.file}: annotation {each.get('id')} has category {each['category_id']}; there are "
                    f"{sorted(numbers)[:5]}, ...",
                    reason="bad_label",
                )
            x, y, width, height = each["bbox"]
            boxes[row] = x, y, x + width, y + height
            at[row], labels[row] = place[each["image_id"]], numbers[each["category_id"]]
            track = each.get("instance_id", each.get("track_id"))
            tracks[row] = UNKNOWN if track is None else track
            ignore[row] = bool(each.get("iscrowd") or each.get("ignore"))
        order = np.argsort(at, kind="stable")
        self._boxes, self._names, self._tracks, self._ignore = boxes[order], labels[order], tracks[order], ignore[order]
        self._first: NDArray[np.int64] = np.searchsorted(at[order], np.arange(len(images) + 1))

    def __len__(self) -> int:
        return len(self._videos)

    def video(self, index: int) -> BoxVideo:
        """See BoxVideos."""
        name, members = self._videos[index]
        paths = [self._folder / self._paths[number] for number in members]
        return BoxVideo(name, tuple(self._objects(number) for number in members), Pictures(paths))

    def paths(self, index: int) -> list[Path]:
        """Where the pictures of a video lie."""
        return [self._folder / self._paths[number] for number in self._videos[index][1]]

    def _objects(self, number: int) -> Objects:
        mine = slice(int(self._first[number]), int(self._first[number + 1]))
        width, height = self._sizes[number].tolist()
        found, dropped = clean(
            (width, height),
            self._boxes[mine],
            self._names[mine],
            tracks=self._tracks[mine],
            ignore=self._ignore[mine],
        )
        self.dropped.update(dropped)
        return found


class Pictures:
    """Reads pictures of a video by their numbers, as BoxVideo wants it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        """uint8 (F, 3, H, W), RGB. Raises UnreadableVideo."""
        pictures = [read_picture(self._paths[number]) for number in numbers]
        sizes = {picture.shape for picture in pictures}
        if len(sizes) > 1:
            raise UnreadableVideo(f"{self._paths[0].parent} has frames of several sizes: {sorted(sizes)}")
        return torch.stack(pictures).permute(0, 3, 1, 2)


def read_picture(path: Path) -> Tensor:
    """uint8 (H, W, 3), RGB. Raises UnreadableVideo."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableVideo(f"{path}: {getattr(error, 'strerror', None) or error}") from None
