"""Data sets as rows: where their videos, lists and labels lie; and the lists.

Lists hold one video a line, `path frames label` for folders of JPEGs or `path label` for files, with paths relative
to the folder of the kind. They and their names are those of MMAction2, so that existing lists can be used. Labels in
lists count in the official order ("mmaction2"); `in_order` changes them for weights that have another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from tsm_core.errors import CallerError
from tsm_core.labels import Convention, UnknownDataset, labels_of

Kind = Literal["rawframes", "videos"]
Part = Literal["train", "val"]

KINDS: tuple[Kind, ...] = ("rawframes", "videos")
PARTS: tuple[Part, ...] = ("train", "val")
TEMPLATE = "img_{:05}.jpg"  # names of JPEGs, unless a data set has others
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".flv", ".gif")


class BadList(CallerError):
    """A list of videos has a line that cannot be used; the reason is bad_label where its label is out of range."""

    reason = "bad_list"


class NoList(CallerError):
    """The list of videos is not there."""

    reason = "no_list"


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One data set.

    name: also that of its folder under the data root. kinds: what it comes as, or can be turned into. apart: train
    and val videos lie in folders of their own. splits: how many ways there are to part it. template, start: names of
    the JPEGs and the number of the first. flip_pairs: classes that change places in a mirror, in the official order.
    source: where to get it.
    """

    name: str
    title: str
    source: str
    kinds: tuple[Kind, ...] = KINDS
    apart: bool = False
    splits: int = 1
    template: str = TEMPLATE
    start: int = 1
    flip_pairs: tuple[tuple[int, int], ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the official order."""
        return labels_of(self.name)

    def home(self, root: Path | str) -> Path:
        """The data set's folder: root/name, or root itself where that is not there but root has the name."""
        home = Path(root) / self.name
        return Path(root) if not home.is_dir() and Path(root).absolute().name == self.name else home

    def folder(self, kind: Kind, part: Part) -> str:
        """Folder that the paths in a list start from, relative to `home`."""
        return f"{kind}_{part}" if self.apart else kind

    def list_name(self, kind: Kind, part: Part, split: int = 1) -> str:
        """File name of a list, which lies in `home`. Raises NoList when there is no such split."""
        if not 1 <= split <= self.splits:
            raise NoList(f"{self.name} has no split {split}; it has {self.splits}")
        between = f"split_{split}" if self.splits > 1 else "list"
        return f"{self.name}_{part}_{between}_{kind}.txt"

    def mirrored(self, order: Convention = "mmaction2") -> tuple[tuple[int, int], ...]:
        """flip_pairs in an order of labels."""
        place = _places(self.name, order)
        return tuple((place[a], place[b]) for a, b in self.flip_pairs)


DATASETS: dict[str, DatasetRow] = {
    row.name: row
    for row in (
        DatasetRow(
            "kinetics400",
            "Kinetics-400",
            "lists: https://storage.googleapis.com/deepmind-media/Datasets/kinetics400.tar.gz, "
            "videos: https://github.com/cvdfoundation/kinetics-dataset",
            apart=True,
        ),
        DatasetRow(
            "sthv1",
            "Something-Something V1",
            "no official page any more; MMAction2's page of the data set points to copies",
            kinds=("rawframes",),
            template="{:05}.jpg",
            flip_pairs=((2, 4), (30, 41), (52, 66)),
        ),
        DatasetRow(
            "sthv2",
            "Something-Something V2",
            "https://developer.qualcomm.com/software/ai-datasets/something-something",
            flip_pairs=((86, 87), (93, 94), (166, 167)),
        ),
        DatasetRow(
            "jester",
            "Jester",
            "https://developer.qualcomm.com/software/ai-datasets/jester",
            kinds=("rawframes",),
            template="{:05}.jpg",
            flip_pairs=((0, 1), (6, 7)),
        ),
        DatasetRow(
            "diving48",
            "Diving48 (V2 labels)",
            "http://www.svcl.ucsd.edu/projects/resound/Diving48_rgb.tar.gz, and there Diving48_V2_train.json, "
            "Diving48_V2_test.json and Diving48_vocab.json",
        ),
        DatasetRow(
            "hmdb51",
            "HMDB51",
            "http://serre-lab.clps.brown.edu/wp-content/uploads/2013/10/hmdb51_org.rar and test_train_splits.rar",
            splits=3,
        ),
        DatasetRow(
            "ucf101",
            "UCF101",
            "https://www.crcv.ucf.edu/datasets/human-actions/ucf101/UCF101.rar and "
            "https://www.crcv.ucf.edu/wp-content/uploads/2019/03/UCF101TrainTestSplits-RecognitionTask.zip",
            splits=3,
        ),
    )
}


def find_dataset(name: str) -> DatasetRow:
    """The row of this name. Raises UnknownDataset that lists the rows."""
    if name not in DATASETS:
        raise UnknownDataset(f"data set {name!r} does not exist; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def _places(dataset: str, order: Convention) -> list[int]:
    """For each class in the official order, its place in another order."""
    place = {label: index for index, label in enumerate(labels_of(dataset, order))}
    return [place[label] for label in labels_of(dataset)]


# --- lists


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One line of a list. frames: how many JPEGs there are (None for a file); offset: JPEGs before the first."""

    path: str
    label: int
    frames: int | None = None
    offset: int = 0


def read_list(
    path: Path | str, *, kind: Kind | None = None, classes: int | None = None, with_offset: bool = False
) -> list[VideoRecord]:
    """The videos of a list: MMAction2's (text or .json) or mit-han-lab's, with labels as they stand there.

    kind None: told by the lines. A path may hold spaces. Raises BadList that names the first line at fault (wrong
    number of words, label out of range, a video named twice, a path out of the folder), and NoList.
    """
    records = []
    for record in scan_list(path, kind=kind, classes=classes, with_offset=with_offset):
        if isinstance(record, BadList):
            raise record
        records.append(record)
    if not records:
        raise BadList(f"{path} names no video")
    return records


def scan_list(
    path: Path | str, *, kind: Kind | None = None, classes: int | None = None, with_offset: bool = False
) -> Iterator[VideoRecord | BadList]:
    """Like read_list, but goes on: in place of a line that cannot be used comes the BadList."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NoList(f"{path} does not exist; `tsm data prepare` makes it from the official annotations") from None
    except (OSError, ValueError) as error:
        raise BadList(f"{path} cannot be read: {error}") from None
    entries = _json_entries(path, text) if str(path).endswith(".json") else _text_entries(text, kind, with_offset)
    seen: dict[tuple[str, int], str] = {}
    for where, line, record in entries:
        if isinstance(record, str):
            yield BadList(f"{path}, {where}: {record}: {line!r}")
        elif record.label < 0 or (classes is not None and record.label >= classes):
            said = f"label {record.label} is not in 0..{'' if classes is None else classes - 1}"
            yield BadList(f"{path}, {where}: {said}: {line!r}", reason="bad_label")
        elif fault := _fault(record, seen):
            yield BadList(f"{path}, {where}: {fault}: {line!r}")
        else:
            seen[record.path, record.offset] = where
            yield record


_Entry = tuple[str, str, VideoRecord | str]  # where it stands, how it reads, what it says or why it says nothing


def _text_entries(text: str, kind: Kind | None, with_offset: bool) -> Iterator[_Entry]:
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        if kind is None:
            is_video = line.rsplit(None, 1)[0].lower().endswith(VIDEO_SUFFIXES)
            kind = "videos" if is_video else "rawframes"
        wanted = 1 if kind == "videos" else 3 if with_offset else 2
        path, *words = line.rsplit(None, wanted)
        where = f"line {number}"
        if len(words) < wanted:
            names = {1: "path label", 2: "path frames label", 3: "path offset frames label"}[wanted]
            yield where, line, f"{len(words) + 1} words where `{names}` is needed"
        elif not all(word.isascii() and word.isdigit() for word in words):
            yield where, line, f"{' '.join(words)!r} should be whole numbers"
        elif wanted == 2 and len(tail := path.rsplit(None, 1)) == 2 and tail[1].isdigit():
            yield where, line, "three numbers; if the first is an offset, say with_offset"
        else:
            numbers = [int(word) for word in words]
            frames = numbers[-2] if wanted > 1 else None
            yield where, line, VideoRecord(path, numbers[-1], frames, numbers[0] if wanted == 3 else 0)


def _json_entries(path: Path | str, text: str) -> Iterator[_Entry]:
    try:
        entries = json.loads(text)
        if not isinstance(entries, list):
            raise ValueError(f"a list is needed, not a {type(entries).__name__}")
    except ValueError as error:
        raise BadList(f"{path} is no JSON list of videos: {error}") from None
    for number, entry in enumerate(entries, 1):
        where, line = f"entry {number}", json.dumps(entry)
        name = (entry.get("frame_dir") or entry.get("filename")) if isinstance(entry, dict) else None
        if not isinstance(name, str):
            yield where, line, "neither frame_dir nor filename"
            continue
        labels = entry["label"] if isinstance(entry.get("label"), list) else [entry.get("label")]
        frames, offset = entry.get("total_frames"), entry.get("offset", 0)
        if len(labels) != 1 or any(type(number) is not int for number in (*labels, offset)):
            yield where, line, "one label is needed, a whole number"
        elif "frame_dir" in entry and type(frames) is not int:
            yield where, line, "total_frames is needed, a whole number"
        else:
            yield where, line, VideoRecord(name, labels[0], frames, offset)


def _fault(record: VideoRecord, seen: dict[tuple[str, int], str]) -> str:
    """What is wrong with a record's path or numbers; empty when nothing is."""
    path = PurePosixPath(record.path)
    if path.is_absolute() or ".." in path.parts:
        return "the path leads out of the data set's folder"
    if (record.frames or 0) < 0 or record.offset < 0:
        return "a number of frames below 0"
    if (record.path, record.offset) in seen:
        return f"the same video as {seen[record.path, record.offset]}"
    return ""


def in_order(records: Sequence[VideoRecord], dataset: str, order: Convention) -> list[VideoRecord]:
    """The records with their labels counted as a convention's weights have them."""
    place = _places(dataset, order)
    return [replace(record, label=place[record.label]) for record in records]


def open_list(
    dataset: str, root: Path | str, *, kind: Kind, part: Part = "val", split: int = 1, order: Convention = "mmaction2"
) -> tuple[list[VideoRecord], Path]:
    """Records of a list that `prepare` wrote, and the folder that their paths start from. Raises NoList, BadList."""
    row = find_dataset(dataset)
    home = row.home(root)
    records = read_list(home / row.list_name(kind, part, split), kind=kind, classes=len(row.labels))
    return in_order(records, dataset, order), home / row.folder(kind, part)
