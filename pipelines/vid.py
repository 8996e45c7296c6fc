"""ImageNet VID's and DET's XML, as they are published -> COCO-VID JSON, as other projects make it.

The folder holds `Annotations/` and `Data/` with `VID/train|val` and `DET/train`, itself or in an `ILSVRC*` folder. Of
DET the pictures of VID's 30 classes are wanted: `DET_train_30classes.txt` (from the projects that train on both, in
`annotations/` or `ImageSets/`) lists them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pipelines.box_data import clean
from pipelines.box_files import CocoVideos, read_picture
from pipelines.decoding import UnreadableVideo
from pipelines.prepare import BadAnnotations, NoAnnotations, Progress, write_whole
from tsm_core.labels import labels_of

NAME, TITLE, SOURCE = "imagenet_vid", "ImageNet VID", "https://image-net.org/challenges/LSVRC/2015/"
FILES = {"train": "imagenet_vid_train.json", "val": "imagenet_vid_val.json", "det": "imagenet_det_30plus1cls.json"}
DET_LIST = "DET_train_30classes.txt"
SAMPLED = 15  # frames of each snippet that a still-image detector is trained on
WNIDS: dict[str, str] = dict(
    zip(
        (
            *("n02691156", "n02419796", "n02131653", "n02834778", "n01503061", "n02924116", "n02958343", "n02402425"),
            *("n02084071", "n02121808", "n02503517", "n02118333", "n02510455", "n02342885", "n02374451", "n02129165"),
            *("n01674464", "n02484322", "n03790512", "n02324045", "n02509815", "n02411705", "n01726692", "n02355227"),
            *("n02129604", "n04468005", "n01662784", "n04530566", "n02062744", "n02391049"),
        ),
        labels_of(NAME),
        strict=True,
    )
)
CATEGORIES = [{"id": number, "name": name, "encode_name": wnid} for number, (wnid, name) in enumerate(WNIDS.items(), 1)]


@dataclass(frozen=True, slots=True)
class BoxFile:
    """One JSON: what it has, and what was left out of it, by reason."""

    path: Path
    videos: int
    frames: int
    objects: int
    left_out: dict[str, int]

    def row(self) -> dict[str, str | int]:
        """For a table."""
        return {
            "file": self.path.name,
            "videos": self.videos,
            "frames": self.frames,
            "objects": self.objects,
            "left out": ", ".join(f"{count} {why}" for why, count in self.left_out.items()) or "-",
        }


@dataclass(frozen=True, slots=True)
class BoxReport:
    """What `prepare_vid` wrote; notes: what a person should know."""

    files: tuple[BoxFile, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, str | int]]:
        """A table, a row for each file."""
        return [each.row() for each in self.files]


def home_of(root: Path | str) -> Path:
    """The data set's folder: root/imagenet_vid, or root itself where that is not there but root has the name."""
    home = Path(root) / NAME
    return Path(root) if not home.is_dir() and Path(root).absolute().name == NAME else home


def layout_of(home: Path) -> Path:
    """The folder that has Annotations/ and Data/. Raises NoAnnotations."""
    for place in (home, *sorted(home.glob("ILSVRC*"))):
        if (place / "Annotations" / "VID").is_dir():
            return place
    raise NoAnnotations(f"neither {home} nor an ILSVRC folder in it holds Annotations/VID; get it: {SOURCE}")


def prepare_vid(root: Path | str, *, on_progress: Progress | None = None) -> BoxReport:
    """Write the JSON of VID's train and val parts, and of DET's pictures of the same classes, where they are there.

    Raises NoAnnotations, BadAnnotations.
    """
    home = home_of(root)
    place = layout_of(home)
    (home / "annotations").mkdir(exist_ok=True)
    notes, files = list[str](), list[BoxFile]()
    for part in ("train", "val"):
        if (place / "Annotations" / "VID" / part).is_dir():
            files.append(_write(home, FILES[part], _snippets(place / "Annotations" / "VID", part), "VID", on_progress))
        else:
            notes.append(f"there is no {place / 'Annotations' / 'VID' / part}, so no {FILES[part]}")
    listed = next(
        (each for folder in (home / "annotations", place / "ImageSets", home) if (each := folder / DET_LIST).is_file()),
        None,
    )
    if listed is None:
        notes.append(f"there is no {home / 'annotations' / DET_LIST}, so no {FILES['det']}: training sees VID alone")
    else:
        files.append(_write(home, FILES["det"], _stills(place / "Annotations" / "DET", listed), "DET", on_progress))
    if not files:
        raise NoAnnotations(f"{place / 'Annotations' / 'VID'} holds neither train nor val; get it: {SOURCE}")
    notes += [
        f"{each.path.name} names no class but VID's 30: objects of others were left out"
        for each in files
        if each.left_out.get("of another class")
    ]
    return BoxReport(tuple(files), tuple(notes))


Snippet = tuple[str, list[tuple[str, Path]]]  # name, (frame without suffix, its XML)


def _snippets(annotations: Path, part: str) -> list[Snippet]:
    """The snippets of a part, sorted, with their frames."""
    found = []
    for folder, _, names in sorted(os.walk(annotations / part)):
        frames = sorted(name for name in names if name.endswith(".xml"))
        if frames:
            name = Path(folder).relative_to(annotations).as_posix()
            found.append((name, [(f"{name}/{each.removesuffix('.xml')}", Path(folder) / each) for each in frames]))
    return found


def _stills(annotations: Path, listed: Path) -> list[Snippet]:
    """The pictures that a list names, `path number` a line; each is a snippet of its own."""
    found = []
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name = line.split()[0]
        if name.startswith("/") or ".." in name.split("/"):
            raise BadAnnotations(f"{listed}, line {number}: {name!r} leads out of the data set's folder")
        places = [each for each in (name, f"train/{name}") if (annotations / f"{each}.xml").is_file()]
        if not places:
            raise BadAnnotations(f"{listed}, line {number}: {annotations / name}.xml does not exist")
        found.append(("", [(places[0], annotations / f"{places[0]}.xml")]))
    return found


def _write(home: Path, name: str, snippets: Sequence[Snippet], kind: str, on_progress: Progress | None) -> BoxFile:
    videos, images, annotations = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    left_out = Counter[str]()
    instances = 0
    for done, (video, frames) in enumerate(snippets, 1):
        chosen = sampled(len(frames))
        known: dict[str, int] = {}
        if video:
            videos.append({"id": len(videos) + 1, "name": video, "vid_train_frames": chosen})
        for number, (frame, file) in enumerate(frames):
            size, objects = read_xml(file)
            images.append(
                {
                    "id": len(images) + 1,
                    "file_name": f"{kind}/{frame}.JPEG",
                    "width": size[0],
                    "height": size[1],
                    "frame_id": number,
                    **({"video_id": len(videos), "is_vid_train_frame": number in chosen} if video else {}),
                }
            )
            for each in objects:
                if each["wnid"] not in WNIDS:
                    left_out["of another class"] += 1
                    continue
                x1, y1, x2, y2 = each["box"]
                kept, dropped = clean(size, [each["box"]], [0])
                left_out.update(dropped)
                if not len(kept):
                    continue
                if video and each["track"] not in known:
                    known[each["track"]] = instances = instances + 1
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": list(WNIDS).index(each["wnid"]) + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                        "occluded": each["occluded"],
                        "generated": each["generated"],
                        **({"video_id": len(videos), "instance_id": known[each["track"]]} if video else {}),
                    }
                )
        if on_progress:
            on_progress(done, len(snippets))
    path = home / "annotations" / name
    made = {"categories": CATEGORIES, "videos": videos, "images": images, "annotations": annotations}
    write_whole(path, json.dumps(made, separators=(",", ":")))
    return BoxFile(
        path, len(snippets), len(images), len(annotations), {why: count for why, count in left_out.items() if count}
    )


def sampled(frames: int) -> list[int]:
    """Numbers of SAMPLED frames, spread evenly; all where there are fewer."""
    return (
        sorted({number * frames // SAMPLED for number in range(SAMPLED)}) if frames > SAMPLED else list(range(frames))
    )


def read_xml(path: Path) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """Size (width, height) of a picture, and its objects: wnid, track, box xyxy, occluded, generated.

    A frame without objects has none. Raises BadAnnotations for what is no annotation.
    """
    try:
        root = ElementTree.parse(path).getroot()  # noqa: S314  expat bounds what entities may become
        size = int(_text(root, "size/width")), int(_text(root, "size/height"))
        if min(size) < 1:
            raise ValueError(f"a picture of {size[0]}x{size[1]}")
        objects = [
            {
                "wnid": _text(each, "name"),
                "track": each.findtext("trackid", ""),
                "box": [float(_text(each, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")],
                "occluded": int(each.findtext("occluded", "0")),
                "generated": int(each.findtext("generated", "0")),
            }
            for each in root.iter("object")
        ]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise BadAnnotations(f"{path}: {error}") from None
    return size, objects


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no {path} in an {element.tag}")
    return text


def open_part(root: Path | str, name: str) -> CocoVideos:
    """What one of the JSON files has: train, val or det. Raises NoList, BadList, NoAnnotations."""
    home = home_of(root)
    return CocoVideos(home / "annotations" / FILES[name], layout_of(home) / "Data")


# --- a check


@dataclass(frozen=True, slots=True)
class BoxCheck:
    """What is wrong with one part: pictures that are missing or unreadable, boxes that are none."""

    part: str
    videos: int
    frames: int
    missing: int
    unreadable: int
    bad_boxes: int
    examples: tuple[str, ...]

    @property
    def fine(self) -> bool:
        """Whether all pictures can be used."""
        return not self.missing and not self.unreadable

    def row(self) -> dict[str, str | int]:
        """For a table."""
        return {
            name: getattr(self, name) for name in ("part", "videos", "frames", "missing", "unreadable", "bad_boxes")
        }


def check_boxes(
    parts: Iterable[tuple[str, CocoVideos]],
    *,
    full: bool = False,
    examples: int = 10,
    on_progress: Progress | None = None,
) -> Iterator[BoxCheck]:
    """Look at every picture of the parts. full: decode them all, not the first of each video."""
    for part, videos in parts:
        frames = missing = unreadable = 0
        told = list[str]()
        for index in range(len(videos)):
            videos.video(index)
            for number, path in enumerate(videos.paths(index)):
                frames += 1
                if not path.is_file():
                    missing += 1
                    told.append(f"missing: {path}")
                elif full or not number:
                    try:
                        read_picture(path)
                    except UnreadableVideo as error:
                        unreadable += 1
                        told.append(f"unreadable: {error}")
            if on_progress:
                on_progress(index + 1, len(videos))
        yield BoxCheck(part, len(videos), frames, missing, unreadable, videos.dropped.total(), tuple(told[:examples]))
