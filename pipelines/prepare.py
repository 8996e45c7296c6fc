"""Official annotation files -> our lists of videos; a check of what the lists name; video files -> folders of JPEGs."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipelines.addresses import FILE_FORMATS
from pipelines.datasets import (
    PARTS,
    VIDEO_SUFFIXES,
    BadList,
    DatasetRow,
    Kind,
    NoList,
    Part,
    VideoRecord,
    find_dataset,
    scan_list,
)
from pipelines.decoding import FolderReader, UnreadableVideo, VideoReader, open_frames
from pipelines.sources import find_ffmpeg
from tsm_core.errors import CallerError

Progress = Callable[[int, int], None]  # videos done, videos in all
Fault = Literal["missing", "unreadable", "too_short", "short", "wrong_count", "bad_label", "bad_list"]

FAULTS: dict[Fault, str] = {
    "missing": "not on disk",
    "unreadable": "empty, cut off, damaged, or a frame is missing",
    "too_short": "fewer than 3 frames; mit-han-lab leaves such videos out",
    "short": "fewer frames than a clip has; some are shown twice",
    "wrong_count": "the list says another number of frames",
    "bad_label": "the label is no class of the data set",
    "bad_list": "the line cannot be read",
}
HARMLESS: tuple[Fault, ...] = ("short",)
LEAST_FRAMES = 3
# where archives put their annotations when they are unpacked, under the data set's folder
PLACES = ("annotations", ".", "labels", "testTrainMulti_7030_splits", "ucfTrainTestlist")
ANNOTATION_FOLDERS = (*PLACES, *(f"annotations/{place}" for place in PLACES[2:]))

T = TypeVar("T")


class NoAnnotations(CallerError):
    """The official annotation files are not there."""

    reason = "no_annotations"


class BadAnnotations(CallerError):
    """An annotation file does not hold what it should."""

    reason = "bad_annotations"


class NoVideos(CallerError):
    """None of the annotated videos is there."""

    reason = "no_videos"


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated video: its class, and where it may lie (without suffix), the likeliest first."""

    label: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ListReport:
    """One list: how many videos it names, and the annotated ones it does not, each with the reason.

    written: false when it would name none, and then the file is not touched.
    """

    path: Path
    kind: Kind
    part: Part
    split: int
    videos: int
    absent: tuple[tuple[str, str], ...]

    @property
    def written(self) -> bool:
        """Whether there is a list."""
        return self.videos > 0

    def row(self) -> dict[str, str | int]:
        """For a table."""
        return {
            "list": self.path.name,
            "videos": self.videos,
            "absent": len(self.absent),
            "written": "yes" if self.written else "no",
        }


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `prepare` wrote; notes: what a person should know of the annotations."""

    dataset: str
    lists: tuple[ListReport, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, str | int]]:
        """A table, a row for each list."""
        return [each.row() for each in self.lists]


def prepare(
    dataset: str,
    root: Path | str,
    *,
    split: int | None = None,
    kind: Kind | None = None,
    on_progress: Progress | None = None,
) -> PrepareReport:
    """Write the lists of a data set, sorted by path, and say which annotated videos are not on disk.

    split: of those with several, one of them (None: all). kind: of videos (None: each that has a folder). Classes are
    numbered in the official order whatever the annotations' own. Frames of folders are counted. Raises NoAnnotations,
    BadAnnotations (an unknown label, a line that cannot be read), NoVideos and UnknownDataset.
    """
    row = find_dataset(dataset)
    home = row.home(root)
    kinds = _kinds_on_disk(row, home, kind)
    notes: list[str] = []
    reader = _Reader(row, home, notes)
    splits = [split] if split is not None else list(range(1, row.splits + 1))
    annotated: dict[tuple[Part, int], list[Annotation]] = {}
    lacking = []
    for number in splits:
        row.list_name(kinds[0], "val", number)  # is there such a split
        for part in PARTS:
            try:
                annotated[part, number] = reader.read(part, number)
            except _NotThere as file:
                lacking.append(str(file))
    if not annotated:
        raise NoAnnotations(f"{home / 'annotations'} holds no {' and no '.join(lacking)}; get it: {row.source}")
    notes += [f"there is no {file}, so no list for it" for file in lacking]
    total = sum(map(len, annotated.values())) * len(kinds)
    lists: list[ListReport] = []
    done = 0
    for (part, number), videos in annotated.items():
        for each in kinds:
            lists.append(_list_videos(row, home, each, part, number, videos, _counting(on_progress, done, total)))
            done += len(videos)
    if not any(each.written for each in lists):
        path, why = lists[0].absent[0] if lists[0].absent else ("", "")
        folder = home / row.folder(lists[0].kind, lists[0].part)
        raise NoVideos(f"none of {total} annotated videos lies in {folder} or beside it: {path} {why}")
    return PrepareReport(dataset, tuple(lists), tuple(dict.fromkeys(notes)))


def _kinds_on_disk(row: DatasetRow, home: Path, kind: Kind | None) -> list[Kind]:
    wanted = [kind] if kind else list(row.kinds)
    if kind and kind not in row.kinds:
        raise NoVideos(f"{row.title} comes as {' and '.join(row.kinds)}, not as {kind}")
    found = [each for each in wanted if any((home / row.folder(each, part)).is_dir() for part in PARTS)]
    if not found:
        folders = dict.fromkeys(str(home / row.folder(each, part)) for each in wanted for part in PARTS)
        raise NoVideos(f"{row.title} is not there: none of {', '.join(folders)} is a folder; get it: {row.source}")
    return found


def _counting(on_progress: Progress | None, before: int, total: int) -> Progress:
    return lambda done, _: on_progress(before + done, total) if on_progress else None


def _list_videos(
    row: DatasetRow,
    home: Path,
    kind: Kind,
    part: Part,
    split: int,
    annotations: Sequence[Annotation],
    on_progress: Progress,
) -> ListReport:
    """Find the annotated videos and write one list."""
    shelf = _Shelf(home / row.folder(kind, part), kind)

    def look(annotation: Annotation) -> tuple[str, str]:
        """(line, "") or (place, why it is absent)."""
        place = shelf.find(annotation.places)
        if place is None:
            return annotation.places[0], "is not there"
        if kind == "videos":
            return f"{place} {annotation.label}", ""
        try:
            return f"{place} {len(FolderReader(shelf.root / place, row.template, row.start))} {annotation.label}", ""
        except UnreadableVideo as error:
            return place, str(error)

    looked = list(_in_threads(look, annotations, on_progress))
    lines = sorted(line for line, why in looked if not why)
    path = home / row.list_name(kind, part, split)
    if lines:
        write_whole(path, "".join(f"{line}\n" for line in lines))
    return ListReport(path, kind, part, split, len(lines), tuple(sorted(pair for pair in looked if pair[1])))


class _Shelf:
    """The videos of one folder; each of its folders is read once."""

    def __init__(self, root: Path, kind: Kind) -> None:
        self.root, self._kind = root, kind
        self._known: dict[str, dict[str, str]] = {}

    def find(self, places: Iterable[str]) -> str | None:
        """The first of these places, with its suffix, where there is a video."""
        for place in places:
            folder, _, name = place.rpartition("/")
            found = self._names(folder).get(name)
            if found is not None:
                return f"{folder}/{found}" if folder else found
        return None

    def _names(self, folder: str) -> dict[str, str]:
        """Names in a folder, by what they are without suffix."""
        if folder not in self._known:
            try:
                names = sorted(os.listdir(self.root / folder))
            except OSError:
                names = []
            if self._kind == "videos":
                split = [os.path.splitext(name) for name in names]
                self._known[folder] = {stem: stem + end for stem, end in split if end.lower() in VIDEO_SUFFIXES}
            else:
                self._known[folder] = {name: name for name in names}
        return self._known[folder]


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _in_threads(
    work: Callable[[Any], T], items: Sequence[Any], on_progress: Progress, workers: int | None = None
) -> Iterator[T]:
    """The results in order. Threads are enough: what takes time (disk, decoders) does not hold Python's lock."""
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        rest, done = iter(items), 0
        while batch := list(islice(rest, 512)):
            for result in pool.map(work, batch):
                done += 1
                on_progress(done, len(items))
                yield result


# --- official annotations


_Row = tuple[str, int, tuple[str, ...]]  # where it stands, class, where the video may lie


class _NotThere(Exception):
    """No such annotation file; the text says which."""


class _Reader:
    """The annotation files of one data set; notes gets what a person should know of them."""

    def __init__(self, row: DatasetRow, home: Path, notes: list[str]) -> None:
        self.row, self.home, self.notes = row, home, notes
        self.index = {label: index for index, label in enumerate(row.labels)}

    def read(self, part: Part, split: int) -> list[Annotation]:
        """The videos of one part. Raises _NotThere and BadAnnotations."""
        rows: Callable[[Part, int], Iterator[_Row]] = getattr(self, f"_{self.row.name}")
        found: dict[str, Annotation] = {}
        for where, label, places in rows(part, split):
            for place in places:
                if place.startswith("/") or ".." in place.split("/") or not place.isprintable():
                    raise BadAnnotations(f"{where}: {place!r} is no name of a video in the data set's folder")
            other = found.setdefault(places[0], Annotation(label, places))
            if other.label != label:
                both = f"{self.row.labels[other.label]!r} and {self.row.labels[label]!r}"
                raise BadAnnotations(f"{where}: {places[0]} is both {both}")
        return list(found.values())

    def _kinetics400(self, part: Part, split: int) -> Iterator[_Row]:
        names = {"train": ("kinetics_train.csv", "train.csv"), "val": ("kinetics_val.csv", "validate.csv")}
        path = self._find(*names[part])
        index = {label.replace(" ", "_"): place for label, place in self.index.items()}
        lines = csv.DictReader(_text(path).splitlines())
        needed = {"label", "youtube_id", "time_start", "time_end"}
        if missing := needed - set(lines.fieldnames or ()):
            raise BadAnnotations(f"{path}: the first line lacks {', '.join(sorted(missing))}")
        for line in lines:
            where = f"{path}, line {lines.line_num}"
            try:
                clip, start, end = line["youtube_id"], int(float(line["time_start"])), int(float(line["time_end"]))
            except (TypeError, ValueError):
                raise BadAnnotations(f"{where}: time_start and time_end should be seconds: {line}") from None
            label = self._label(line["label"].replace('"', "").replace(" ", "_"), where, index)
            underscored = self.row.labels[label].replace(" ", "_")
            folders = dict.fromkeys((underscored, self.row.labels[label], re.sub("[()']", "", underscored), ""))
            stems = (f"{clip}_{start:06d}_{end:06d}", f"{clip}_{start}")  # the second is mit-han-lab's
            yield where, label, tuple(f"{folder}/{stem}" if folder else stem for stem in stems for folder in folders)

    def _sthv1(self, part: Part, split: int) -> Iterator[_Row]:
        return self._semicolons("something-something-v1", part)

    def _jester(self, part: Part, split: int) -> Iterator[_Row]:
        return self._semicolons("jester-v1", part)

    def _semicolons(self, stem: str, part: Part) -> Iterator[_Row]:
        path = self._find(f"{stem}-{'train' if part == 'train' else 'validation'}.csv")
        if labels := self._find_if(f"{stem}-labels.csv"):
            self._compare(labels, [line for _, line in _lines(labels)])
        for where, line in _lines(path):
            name, semicolon, label = line.partition(";")
            if not semicolon:
                raise BadAnnotations(f"{where}: `id;label` is needed: {line!r}")
            yield where, self._label(label, where), (name.strip(),)

    def _sthv2(self, part: Part, split: int) -> Iterator[_Row]:
        name = "train" if part == "train" else "validation"
        path = self._find(f"something-something-v2-{name}.json", f"{name}.json")
        if labels := self._find_if("something-something-v2-labels.json", "labels.json"):
            numbers = _json(labels, dict)
            try:
                self._compare(labels, sorted(numbers, key=lambda label: int(numbers[label])))
            except (TypeError, ValueError):
                raise BadAnnotations(f"{labels}: each template needs its number") from None
        for where, entry in _entries(path, "id", "template"):
            template = str(entry["template"]).replace("[", "").replace("]", "")
            yield where, self._label(template, where), (str(entry["id"]),)

    def _diving48(self, part: Part, split: int) -> Iterator[_Row]:
        path = self._find(f"Diving48_V2_{'train' if part == 'train' else 'test'}.json")
        if vocabulary := self._find_if("Diving48_vocab.json"):  # labels are numbers: another order is another meaning
            labels = ["+".join(map(str, parts)) for parts in _json(vocabulary, list)]
            self._compare(vocabulary, labels, order_matters=True)
        for where, entry in _entries(path, "vid_name", "label"):
            label = entry["label"]
            if type(label) is not int or not 0 <= label < len(self.index):
                raise BadAnnotations(f"{where}: label {label!r} is not in 0..{len(self.index) - 1}")
            yield where, label, (str(entry["vid_name"]),)

    def _hmdb51(self, part: Part, split: int) -> Iterator[_Row]:
        flags: dict[str, Part | None] = {"1": "train", "2": "val", "0": None}
        files = self._find_all(f"*_test_split{split}.txt")
        classes = [path.name.partition("_test_split")[0] for path in files]
        if missing := [name for name in self.row.labels if name not in classes]:
            few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            self.notes.append(f"split {split} has no file of {len(missing)} classes: {few}")
        for path, name in zip(files, classes, strict=True):
            label = self._label(name, str(path))
            for where, line in _lines(path):
                video, _, flag = line.rpartition(" ")
                if not video or flag not in flags:
                    raise BadAnnotations(f"{where}: `name.avi flag` is needed, flag one of 0, 1, 2: {line!r}")
                if flags[flag] == part:
                    yield where, label, (f"{name}/{_stem(video)}",)

    def _ucf101(self, part: Part, split: int) -> Iterator[_Row]:
        path = self._find(f"{'train' if part == 'train' else 'test'}list0{split}.txt")
        numbers = {name: index + 1 for name, index in self.index.items()}
        if classes := self._find_if("classInd.txt"):
            numbers = {}
            for where, line in _lines(classes):
                number, _, name = line.partition(" ")
                if not number.isdigit():
                    raise BadAnnotations(f"{where}: `number name` is needed: {line!r}")
                numbers[name.strip()] = int(number)
            self._compare(classes, sorted(numbers, key=numbers.__getitem__))
        for where, line in _lines(path):
            video, _, number = line.partition(" ")
            name, slash, _ = video.partition("/")
            if not slash:
                raise BadAnnotations(f"{where}: `Class/video.avi` is needed: {line!r}")
            label = self._label(name, where)
            if number and number != str(numbers[name]):
                raise BadAnnotations(f"{where}: {name} has the number {numbers[name]}, not {number}")
            yield where, label, (_stem(video),)

    # --- finding and comparing

    def _find(self, *names: str) -> Path:
        path = self._find_if(*names)
        if path is None:
            raise _NotThere(" or ".join(names))
        return path

    def _find_if(self, *names: str) -> Path | None:
        paths = (self.home / folder / name for name in names for folder in ANNOTATION_FOLDERS)
        return next((path for path in paths if path.is_file()), None)

    def _find_all(self, pattern: str) -> list[Path]:
        for folder in ANNOTATION_FOLDERS:
            if found := sorted((self.home / folder).glob(pattern)):
                return found
        raise _NotThere(pattern)

    def _label(self, name: str, where: str, index: Mapping[str, int] | None = None) -> int:
        index = self.index if index is None else index
        if name.strip() not in index:
            raise BadAnnotations(f"{where}: {name.strip()!r} is no class of {self.row.title}")
        return index[name.strip()]

    def _compare(self, path: Path, labels: Sequence[str], *, order_matters: bool = False) -> None:
        """Hold an annotation's own list of classes against ours."""
        ours = self.row.labels
        if sorted(labels) != sorted(ours):
            strange, lacking = sorted(set(labels) - set(ours)), sorted(set(ours) - set(labels))
            raise BadAnnotations(
                f"{path} is not {self.row.title}'s list of classes: "
                f"{len(strange)} strange ones {strange[:3]}, {len(lacking)} missing {lacking[:3]}"
            )
        if list(labels) != list(ours):
            first = next(place for place, pair in enumerate(zip(labels, ours, strict=True)) if pair[0] != pair[1])
            manner = "sorted, as for mit-han-lab's weights" if list(labels) == sorted(labels) else "in another order"
            text = f"{path} has the classes {manner}: {first} is {labels[first]!r}, officially {ours[first]!r}"
            if order_matters:
                raise BadAnnotations(f"{text}; the annotations' numbers would mean other classes")
            self.notes.append(f"{text}; the lists number them officially")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadAnnotations(f"{path} cannot be read: {error}") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, line) of the lines that are not empty."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _json(path: Path, kind: type[T]) -> T:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise BadAnnotations(f"{path} is no JSON: {error}") from None
    if not isinstance(content, kind):
        raise BadAnnotations(f"{path} holds a {type(content).__name__} where a {kind.__name__} is needed")
    return content


def _entries(path: Path, *needed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, entry) of a JSON list of objects that have these keys."""
    for number, entry in enumerate(_json(path, list), 1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or any(key not in entry for key in needed):
            raise BadAnnotations(f"{where}: {' and '.join(needed)} are needed: {entry}")
        yield where, entry


def _stem(name: str) -> str:
    return os.path.splitext(name.strip())[0]


# --- check


@dataclass(frozen=True, slots=True)
class Finding:
    """One video, or one line of a list, that is not as it should be."""

    fault: Fault
    path: str
    detail: str


@dataclass(frozen=True, slots=True)
class ListCheck:
    """One list: how many lines it has, how many of them have each fault, and the first few of each."""

    path: Path
    kind: Kind
    part: Part
    split: int
    videos: int
    counts: Mapping[Fault, int]
    findings: tuple[Finding, ...]

    def row(self) -> dict[str, str | int]:
        """For a table."""
        fine = self.videos - sum(self.counts.values())
        return {
            "list": self.path.name,
            "videos": self.videos,
            "fine": fine,
            **{fault: self.counts.get(fault, 0) for fault in FAULTS},
        }


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found; a short video is told of but is no failure."""

    dataset: str
    full: bool
    lists: tuple[ListCheck, ...]

    @property
    def fine(self) -> bool:
        """Whether every listed video can be used."""
        return not any(fault not in HARMLESS for each in self.lists for fault in each.counts)

    def rows(self) -> list[dict[str, str | int]]:
        """A table, a row for each list."""
        return [each.row() for each in self.lists]


def check(
    dataset: str,
    root: Path | str,
    *,
    split: int | None = None,
    kind: Kind | None = None,
    part: Part | None = None,
    frames: int = 8,
    full: bool = False,
    examples: int = 10,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> CheckReport:
    """Look at every video that the lists name: whether it is there, can be opened, and has the frames it should have.

    None: all splits, kinds and parts that have a list. full: decode every frame, else the first. examples: findings
    kept of each fault and list. Raises NoList when there is no list.
    """
    row = find_dataset(dataset)
    home = row.home(root)
    lists: list[tuple[Path, Kind, Part, int]] = []
    for number in [split] if split is not None else range(1, row.splits + 1):
        for each_kind in [kind] if kind else row.kinds:
            for each_part in [part] if part else PARTS:
                path = home / row.list_name(each_kind, each_part, number)
                if path.is_file():
                    lists.append((path, each_kind, each_part, number))
    if not lists:
        raise NoList(f"{home} holds no list of {row.title}; `tsm data prepare {dataset} --data {root}` makes them")
    lines = [list(scan_list(path, kind=each, classes=len(row.labels))) for path, each, _, _ in lists]
    total, done, checks = sum(map(len, lines)), 0, []
    for (path, each_kind, each_part, number), records in zip(lists, lines, strict=True):
        looker = _Looker(row, home / row.folder(each_kind, each_part), frames, full)
        counts: Counter[Fault] = Counter()
        kept: list[Finding] = []
        for finding in _in_threads(looker, records, _counting(on_progress, done, total), workers):
            if finding is not None:
                counts[finding.fault] += 1
                if counts[finding.fault] <= examples:
                    kept.append(finding)
        done += len(records)
        kept.sort(key=lambda finding: list(FAULTS).index(finding.fault))
        checks.append(ListCheck(path, each_kind, each_part, number, len(records), dict(counts), tuple(kept)))
    return CheckReport(dataset, full, tuple(checks))


@dataclass(frozen=True, slots=True)
class _Looker:
    """Looks at one line of a list."""

    row: DatasetRow
    folder: Path
    frames: int
    full: bool

    def __call__(self, record: VideoRecord | BadList) -> Finding | None:
        """What is wrong with it; None when nothing is."""
        if isinstance(record, BadList):
            return Finding("bad_label" if record.reason == "bad_label" else "bad_list", "", str(record))
        path = self.folder / record.path
        if not path.exists():
            return Finding("missing", record.path, f"{path} is not there")
        try:
            with open_frames(path, self.row.template, self.row.start) as reader:
                total = len(reader)
                if not self.full:
                    reader.frames([0])
                elif isinstance(reader, VideoReader):
                    reader.verify()
                else:
                    for index in range(total):
                        reader.frames([index])
        except UnreadableVideo as error:
            return Finding("unreadable", record.path, str(error))
        said = total if record.frames is None else record.frames + record.offset
        if total < said or (total > said and not record.offset):
            return Finding("wrong_count", record.path, f"{total} frames where the list says {said}")
        usable = total - record.offset
        if usable < LEAST_FRAMES:
            return Finding("too_short", record.path, f"{usable} frames")
        if usable < self.frames:
            return Finding("short", record.path, f"{usable} frames")
        return None


# --- video files -> folders of JPEGs


@dataclass(slots=True)
class ExtractReport:
    """How many videos were turned into folders, were so before, or could not be (with the reason)."""

    extracted: int = 0
    kept: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def scale_filter(stored: str) -> str:
    """The ffmpeg filter for a recipe's `stored`: `340x256` (width x height), `short-side 256`, `height 256` or nothing.

    Long sides are rounded half up. Raises CallerError.
    """
    if not stored:
        return ""
    if match := re.fullmatch(r"(\d+)x(\d+)", stored):
        return f"scale=w={match[1]}:h={match[2]}:flags=bilinear"
    if match := re.fullmatch(r"(short-side|height) (\d+)", stored):
        side, tall = match[2], f"trunc(ih*{match[2]}/iw+0.5)"
        wide = f"trunc(iw*{side}/ih+0.5)"
        if match[1] == "height":
            return f"scale=w='{wide}':h={side}:flags=bilinear"
        return f"scale=w='if(lt(iw,ih),{side},{wide})':h='if(lt(iw,ih),{tall},{side})':flags=bilinear"
    raise CallerError(f"stored {stored!r} is none of 340x256, `short-side 256` and `height 256`")


def extract(
    dataset: str,
    root: Path | str,
    *,
    stored: str = "",
    part: Part | None = None,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> ExtractReport:
    """Turn the video files of a data set into folders of JPEGs, every frame once, in the size of a recipe's `stored`.

    A folder that is there is kept, and each appears whole or not at all, so that a run can be broken off and begun
    again. Raises NoVideos, CallerError and FFmpegMissing.
    """
    row = find_dataset(dataset)
    home = row.home(root)
    _kinds_on_disk(row, home, "videos")
    pairs = dict.fromkeys(
        (row.folder("videos", each), row.folder("rawframes", each)) for each in PARTS if part in (None, each)
    )
    scale = scale_filter(stored)
    jobs = [
        (path, home / frames / path.relative_to(home / videos).with_suffix(""))
        for videos, frames in pairs
        for path in sorted((home / videos).rglob("*"))
        if path.suffix.lower() in VIDEO_SUFFIXES
    ]
    report = ExtractReport()

    def work(job: tuple[Path, Path]) -> tuple[Path, str | None]:
        return job[0], "" if job[1].is_dir() else _extract_one(row, *job, scale)

    for path, trouble in _in_threads(work, jobs, _counting(on_progress, 0, len(jobs)), workers):
        if trouble is None:
            report.extracted += 1
        elif not trouble:
            report.kept += 1
        else:
            report.failed.append((str(path), trouble))
    return report


def _extract_one(row: DatasetRow, video: Path, folder: Path, scale: str) -> str | None:
    """What went wrong; None when nothing did."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    binary = find_ffmpeg()
    names = re.sub(r"\{:(\d+)d?\}", r"%\1d", str(draft.absolute()).replace("%", "%%") + "/" + row.template)
    every_frame = ["-fps_mode" if binary.version >= (5, 1) else "-vsync", "passthrough"]
    command = [
        *(binary.path, "-v", "error", "-nostdin", "-threads", "1"),
        *("-protocol_whitelist", "file", "-format_whitelist", FILE_FORMATS, "-i", f"file:{video.absolute()}"),
        *("-map", "0:v:0", *every_frame, *(("-vf", scale) if scale else ())),
        *("-threads", "1", "-q:v", "2", "-start_number", str(row.start), "-f", "image2", names),
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")  # noqa: S603
        if run.returncode or run.stderr.strip():
            return run.stderr.strip().replace("\n", "; ")[:500] or f"ffmpeg ended with {run.returncode}"
        draft.replace(folder)
        return None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
