"""Miniatures of the seven data sets, in their official layout: `python tests/assets/make.py DATASET ROOT`.

Annotations have the original formats and real class names, videos are encoded as the originals are, only smaller and
shorter. Every picture shows its label and its number (`shown`), so that a test can tell what it was given.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from pipelines.camera import burn_frame_number, read_frame_number
from pipelines.datasets import DATASETS, DatasetRow, Part
from tsm_core.labels import labels_of

FAULTS = ("truncated", "empty", "missing")
MP4 = (".mp4", "libx264", {"preset": "ultrafast", "x264-params": "log-level=none"})
WEBM = (".webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"})
AVI = (".avi", "mpeg4", {"vtag": "xvid"})
LOOKS: dict[str, tuple[tuple[int, int], tuple[str, str, dict[str, str]] | None]] = {  # (width, height), encoding
    "kinetics400": ((340, 256), MP4),
    "sthv1": ((176, 100), None),
    "sthv2": ((212, 120), WEBM),
    "jester": ((176, 100), None),
    "diving48": ((170, 128), MP4),
    "hmdb51": ((160, 120), AVI),
    "ucf101": ((160, 120), AVI),
}
AWKWARD = {"kinetics400": ("massaging person's head", "petting animal (not cat)")}  # always among the classes


@dataclass(frozen=True, slots=True)
class Made:
    """One video of a miniature. path: from the folder of its kind, without suffix; fault: "" or one of FAULTS."""

    path: str
    label: int
    part: Part
    frames: int
    fault: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    def part_in(self, split: int) -> Part:
        """Where split 1, 2 or 3 has it: the second is the first turned round."""
        return self.part if split != 2 else "val" if self.part == "train" else "train"


@dataclass(frozen=True, slots=True)
class Miniature:
    """What was made: the videos that the annotations name, and the folder of the data set."""

    row: DatasetRow
    home: Path
    videos: tuple[Made, ...]
    suffix: str


def picture(label: int, number: int, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Frame `number` of a video: a square that moves over the class's colour, and both numbers."""
    colour = np.random.default_rng(label).integers(60, 200, 3)
    image = np.full((size[1], size[0], 3), colour, np.uint8)
    side, left = size[1] // 3, (7 * number) % (size[0] * 2 // 3)
    image[side // 2 : side // 2 + side, left : left + side] = 255 - colour
    return burn_frame_number(image, label << 8 | number)


def shown(image: Any) -> tuple[int, int] | None:
    """(label, frame number) that a picture (3, H, W) or (H, W, 3) shows, or None."""
    pixels = np.asarray(image)
    code = read_frame_number(pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels)
    return None if code is None else (code >> 8, code & 255)


def make_miniature(
    dataset: str, root: Path | str, *, videos_per_class: int = 2, classes: int = 3, broken: bool = False, seed: int = 0
) -> Miniature:
    """Write root/dataset and say what is in it.

    videos_per_class: in train and again in val; of each first class, the first has 3 to 5 frames. broken: val of the
    first class has three more, a truncated, an empty and a missing one. Same seed, same bytes.
    """
    row, (size, encoding) = DATASETS[dataset], LOOKS[dataset]
    dice = random.Random(f"{dataset} {seed}")
    labels = _choose(row, classes)
    made: list[Made] = []
    for label in labels:
        for part in ("train", "val"):
            for number in range(videos_per_class):
                short = label == labels[0] and number == 0
                frames = dice.randint(3, 5) if short else dice.randint(20, 40)
                made.append(Made(_path(row, label, len(made), dice), label, part, frames))
    for fault in FAULTS if broken else ():
        made.append(Made(_path(row, labels[0], len(made), dice), labels[0], "val", 30, fault))
    home = Path(root) / row.name
    (home / "annotations").mkdir(parents=True, exist_ok=True)
    suffix = encoding[0] if encoding else ""
    for video in made:
        _write_folder(home / row.folder("rawframes", video.part) / video.path, video, size, row)
        if encoding:
            _write_video(home / row.folder("videos", video.part) / (video.path + suffix), video, size, *encoding[1:])
    _ANNOTATE[dataset](home / "annotations", made, dice)
    return Miniature(row, home, tuple(made), suffix)


def _choose(row: DatasetRow, classes: int) -> list[int]:
    chosen = [row.labels.index(name) for name in AWKWARD.get(row.name, ())][:classes]
    spread = np.linspace(0, len(row.labels) - 1, classes).astype(int).tolist()
    return sorted([*chosen, *(label for label in spread if label not in chosen)][:classes])


def _path(row: DatasetRow, label: int, number: int, dice: random.Random) -> str:
    """A name as the original has them."""
    name = row.labels[label]
    match row.name:
        case "kinetics400":
            letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
            start = dice.randint(0, 500)
            return f"{name.replace(' ', '_')}/{''.join(dice.choices(letters, k=11))}_{start:06d}_{start + 10:06d}"
        case "hmdb51":
            odd = ("#20_Rhythm_clap", "Faith_Rewarded", "AC_DC(live)", "Die;&_Hard")[number % 4]
            return f"{name}/{odd}_{name}_u_nm_np1_fr_goo_{number}"
        case "ucf101":
            return f"{name}/v_{name}_g{number // 4 + 1:02d}_c{number % 4 + 1:02d}"
        case "diving48":
            return f"{''.join(dice.choices('abcdefXYZ019-_', k=11))}_{number:05d}"
        case _:
            return str(1000 + 37 * number + dice.randrange(37))


def _write_folder(folder: Path, video: Made, size: tuple[int, int], row: DatasetRow) -> None:
    if video.fault == "missing":
        return
    folder.mkdir(parents=True, exist_ok=True)
    if video.fault == "empty":
        return
    for number in range(video.frames):
        path = folder / row.template.format(number + row.start)
        Image.fromarray(picture(video.label, number, size)).save(path, quality=90)
    if video.fault == "truncated":
        for path in sorted(folder.iterdir())[video.frames // 2 :]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write_video(path: Path, video: Made, size: tuple[int, int], codec: str, options: dict[str, str]) -> None:
    if video.fault == "missing":
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 12, 1
        stream.codec_context.bit_rate = 800_000
        stream.options = {key: value for key, value in options.items() if key != "vtag"}
        if "vtag" in options:
            stream.codec_context.codec_tag = options["vtag"]
        for number in range(video.frames):
            frame = av.VideoFrame.from_ndarray(picture(video.label, number, size), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    if video.fault:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if video.fault == "truncated" else b"")


# --- annotations, as their makers wrote them


def _kinetics400(folder: Path, made: Sequence[Made], dice: random.Random) -> None:
    for part in ("train", "val", "test"):
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["label", "youtube_id", "time_start", "time_end", "split", "is_cc"])
        for video in made:
            if video.part == part:
                clip, start, end = video.name.rsplit("_", 2)
                label = labels_of("kinetics400")[video.label]
                rows.writerow([label, clip, int(start), int(end), part, dice.randint(0, 1)])
        lines = text.getvalue().splitlines()
        # as in the original, a label of several words stands in quotes
        quoted = [
            f'"{first}",{rest}' if " " in first else line for line in lines for first, _, rest in [line.partition(",")]
        ]
        _save(folder / f"kinetics_{part}.csv", quoted)


def _something_csv(name: str, sort: bool = False) -> Callable[[Path, Sequence[Made], random.Random], None]:
    dataset = {"something-something-v1": "sthv1", "jester-v1": "jester"}[name]

    def annotate(folder: Path, made: Sequence[Made], dice: random.Random) -> None:
        labels = labels_of(dataset)
        _save(folder / f"{name}-labels.csv", labels)
        for part, file in (("train", "train"), ("val", "validation")):
            lines = [f"{video.path};{labels[video.label]}" for video in made if video.part == part]
            _save(folder / f"{name}-{file}.csv", dice.sample(lines, len(lines)))
        _save(folder / f"{name}-test.csv", ["7", "8"])

    return annotate


def _sthv2(folder: Path, made: Sequence[Made], dice: random.Random) -> None:
    labels = labels_of("sthv2")
    _save_json(folder / "something-something-v2-labels.json", {label: str(i) for i, label in enumerate(labels)})
    for part, file in (("train", "train"), ("val", "validation")):
        entries = []
        for video in made:
            if video.part == part:
                label = labels[video.label]
                template = label.replace("Something", "[Something]").replace("something", "[something]")
                text = label.replace("something", "a cup")
                holders = ["a cup"] * template.count("[")
                entries.append({"id": video.path, "label": text, "template": template, "placeholders": holders})
        _save_json(folder / f"something-something-v2-{file}.json", dice.sample(entries, len(entries)))
    _save_json(folder / "something-something-v2-test.json", [{"id": "7"}, {"id": "8"}])


def _diving48(folder: Path, made: Sequence[Made], dice: random.Random) -> None:
    vocabulary = [label.split("+") for label in labels_of("diving48")]
    _save_json(folder / "Diving48_vocab.json", vocabulary)
    for part, file in (("train", "train"), ("val", "test")):
        entries = [
            {"vid_name": video.path, "label": video.label, "start_frame": 0, "end_frame": video.frames}
            for video in made
            if video.part == part
        ]
        _save_json(folder / f"Diving48_V2_{file}.json", dice.sample(entries, len(entries)))


def _hmdb51(folder: Path, made: Sequence[Made], dice: random.Random) -> None:
    for split in (1, 2, 3):
        for label, name in enumerate(labels_of("hmdb51")):
            lines = [
                f"{video.name}.avi {1 if video.part_in(split) == 'train' else 2} "
                for video in made
                if video.label == label
            ]
            if lines:
                _save(folder / f"{name}_test_split{split}.txt", [*lines, f"Unused_{name}_f_cm_np1_ri_med_0.avi 0 "])


def _ucf101(folder: Path, made: Sequence[Made], dice: random.Random) -> None:
    _save(folder / "classInd.txt", [f"{index} {name}" for index, name in enumerate(labels_of("ucf101"), 1)])
    for split in (1, 2, 3):
        parts: dict[Part, list[Made]] = {"train": [], "val": []}
        for video in made:
            parts[video.part_in(split)].append(video)
        _save(folder / f"trainlist0{split}.txt", [f"{video.path}.avi {video.label + 1}" for video in parts["train"]])
        _save(folder / f"testlist0{split}.txt", [f"{video.path}.avi" for video in parts["val"]])


_ANNOTATE: dict[str, Callable[[Path, Sequence[Made], random.Random], None]] = {
    "kinetics400": _kinetics400,
    "sthv1": _something_csv("something-something-v1"),
    "sthv2": _sthv2,
    "jester": _something_csv("jester-v1"),
    "diving48": _diving48,
    "hmdb51": _hmdb51,
    "ucf101": _ucf101,
}


def _save(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _save_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("root", type=Path)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--videos-per-class", type=int, default=2)
    parser.add_argument("--broken", action="store_true", help="add a truncated, an empty and a missing video")
    parser.add_argument("--seed", type=int, default=0)
    made = make_miniature(**vars(parser.parse_args()))
    print(f"{made.home}: {len(made.videos)} videos of {len({video.label for video in made.videos})} classes")


if __name__ == "__main__":
    main()
