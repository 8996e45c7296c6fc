"""Rows are those of the zoo; lists are read or refused by line; a Dataset gives frames and never stumbles."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipelines import sampling
from pipelines.datasets import (
    DATASETS,
    BadList,
    NoList,
    VideoRecord,
    find_dataset,
    in_order,
    open_list,
    read_list,
    scan_list,
)
from pipelines.decoding import UnreadableVideo
from pipelines.video_dataset import VideoDataset
from tsm_core.labels import UnknownDataset, labels_of
from tsm_core.recipes import RECIPES

CLASSES = {"kinetics400": 400, "sthv1": 174, "sthv2": 174, "jester": 27, "diving48": 48, "hmdb51": 51, "ucf101": 101}


# --- rows


def test_the_rows():
    assert {name: len(row.labels) for name, row in DATASETS.items()} == CLASSES
    assert {recipe.dataset for recipe in RECIPES.values()} - {"", "motion8"} == set(DATASETS)  # motion8 is drawn
    with pytest.raises(UnknownDataset, match=r"'k400' does not exist; there are kinetics400, sthv1"):
        find_dataset("k400")


@pytest.mark.parametrize(
    ("dataset", "kind", "part", "split", "name", "folder"),
    [
        ("kinetics400", "rawframes", "train", 1, "kinetics400_train_list_rawframes.txt", "rawframes_train"),
        ("kinetics400", "videos", "val", 1, "kinetics400_val_list_videos.txt", "videos_val"),
        ("sthv1", "rawframes", "val", 1, "sthv1_val_list_rawframes.txt", "rawframes"),
        ("sthv2", "videos", "train", 1, "sthv2_train_list_videos.txt", "videos"),
        ("jester", "rawframes", "train", 1, "jester_train_list_rawframes.txt", "rawframes"),
        ("diving48", "videos", "val", 1, "diving48_val_list_videos.txt", "videos"),
        ("hmdb51", "rawframes", "train", 1, "hmdb51_train_split_1_rawframes.txt", "rawframes"),
        ("ucf101", "rawframes", "val", 3, "ucf101_val_split_3_rawframes.txt", "rawframes"),
    ],
)
def test_names_are_those_of_the_zoo(dataset, kind, part, split, name, folder):
    row = DATASETS[dataset]
    assert row.list_name(kind, part, split) == name
    assert row.folder(kind, part) == folder


def test_a_split_that_is_none():
    for dataset, split in (("hmdb51", 4), ("ucf101", 0), ("jester", 2)):
        with pytest.raises(NoList, match=f"{dataset} has no split {split}"):
            DATASETS[dataset].list_name("rawframes", "val", split)


def test_home(tmp_path):
    row = DATASETS["jester"]
    assert row.home(tmp_path) == tmp_path / "jester"
    (tmp_path / "jester").mkdir()
    assert row.home(tmp_path) == row.home(tmp_path / "jester") == tmp_path / "jester"


@pytest.mark.parametrize(
    ("dataset", "official", "mit"),
    [
        ("sthv1", {(2, 4), (30, 41), (52, 66)}, {(166, 167), (93, 94), (86, 87)}),
        ("sthv2", {(86, 87), (93, 94), (166, 167)}, {(86, 87), (93, 94), (166, 167)}),
        ("jester", {(0, 1), (6, 7)}, {(16, 17), (11, 12)}),
        ("diving48", set(), set()),
    ],
)
def test_mirrored_classes(dataset, official, mit):
    row = DATASETS[dataset]
    assert {tuple(sorted(pair)) for pair in row.mirrored()} == official
    assert {tuple(sorted(pair)) for pair in row.mirrored("mit")} == mit
    for a, b in row.flip_pairs:
        swapped = row.labels[a].replace("left", "#").replace("right", "left").replace("#", "right")
        swapped = swapped.replace("Left", "#").replace("Right", "Left").replace("#", "Right")
        assert swapped == row.labels[b]


def test_labels_in_another_order():
    records = [VideoRecord(str(label), label) for label in range(27)]
    moved = in_order(records, "jester", "mit")
    assert [record.label for record in moved][:6] == [16, 17, 15, 18, 5, 3]
    for before, after in zip(records, moved, strict=True):
        assert labels_of("jester")[before.label] == labels_of("jester", "mit")[after.label]
    assert in_order(records, "jester", "mmaction2") == records


# --- lists


def write_list(folder, *lines, name="list.txt"):
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "more", "record"),
    [
        ("abseiling/0wR5jVB-WPk_000417_000427 300 0", {}, VideoRecord("abseiling/0wR5jVB-WPk_000417_000427", 0, 300)),
        ("img/100218\t42  171 ", {}, VideoRecord("img/100218", 171, 42)),
        ("air drumming/a b 120 3", {}, VideoRecord("air drumming/a b", 3, 120)),
        ("100218 7 42 5", {"with_offset": True}, VideoRecord("100218", 5, 42, 7)),
        ("a b 7 42 5", {"with_offset": True}, VideoRecord("a b", 5, 42, 7)),
        ("some/path.mp4 1", {}, VideoRecord("some/path.mp4", 1)),
        ("air drumming/a 1.webm 3", {}, VideoRecord("air drumming/a 1.webm", 3)),
        ("a/b.WEBM 3", {}, VideoRecord("a/b.WEBM", 3)),
        ("a/b.unknown 3", {"kind": "videos"}, VideoRecord("a/b.unknown", 3)),
        ("brush_hair/#a&b;(c)_x.avi 0", {}, VideoRecord("brush_hair/#a&b;(c)_x.avi", 0)),
        ("x..y/a 3 0", {}, VideoRecord("x..y/a", 0, 3)),
    ],
)
def test_lines(tmp_path, line, more, record):
    assert read_list(write_list(tmp_path, "", line, ""), classes=174, **more) == [record]


@pytest.mark.parametrize(
    ("line", "more", "said"),
    [
        ("100218", {}, "1 words where `path frames label` is needed"),
        ("100218 42", {}, "2 words where `path frames label` is needed"),
        ("100218 42 5", {"with_offset": True}, "3 words where `path offset frames label` is needed"),
        ("100218 many 5", {}, "'many 5' should be whole numbers"),
        ("100218 42 5.0", {}, "'42 5.0' should be whole numbers"),
        ("100218 42 -1", {}, "'42 -1' should be whole numbers"),
        ("100218 42 ²", {}, "should be whole numbers"),
        ("100218 7 42 5", {}, "say with_offset"),
        ("100218 42 174", {}, "label 174 is not in 0..173"),
        ("/data/100218 42 1", {}, "leads out of the data set's folder"),
        ("a/../../b 42 1", {}, "leads out of the data set's folder"),
        ("first 42 1", {}, "the same video as line 1"),
        ("first 10 9", {}, "the same video as line 1"),
        ("b.mp4", {"kind": "videos"}, "1 words where `path label` is needed"),
        ("b.mp4 x", {"kind": "videos"}, "'x' should be whole numbers"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, more, said):
    good = {"videos": "a.mp4 3"}.get(more.get("kind"), "first 0 42 1" if more.get("with_offset") else "first 42 1")
    path = write_list(tmp_path, good, "", line, "last 1 1 1")
    with pytest.raises(BadList) as raised:
        read_list(path, classes=174, **more)
    text = str(raised.value)
    assert text.startswith(f"{path}, line 3: ")
    assert said in text
    assert text.endswith(f": {line!r}")
    assert raised.value.reason == ("bad_label" if "label 174" in said else "bad_list")


def test_scanning_goes_on_after_a_fault(tmp_path):
    path = write_list(tmp_path, "a 1 0", "b", "c 1 0", "c 1 0", "d 2 1")
    found = list(scan_list(path))
    assert [type(each).__name__ for each in found] == [
        "VideoRecord",
        "BadList",
        "VideoRecord",
        "BadList",
        "VideoRecord",
    ]


def test_json_lists(tmp_path):
    entries = [
        {"frame_dir": "a b/c", "total_frames": 42, "label": [3]},
        {"filename": "d.mp4", "label": 4},
        {"frame_dir": "e", "total_frames": 9, "label": [0], "offset": 5},
    ]
    path = write_list(tmp_path, json.dumps(entries), name="list.json")
    expected = [VideoRecord("a b/c", 3, 42), VideoRecord("d.mp4", 4), VideoRecord("e", 0, 9, 5)]
    assert read_list(path, classes=5) == expected


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"label": [1]}, "neither frame_dir nor filename"),
        (5, "neither frame_dir nor filename"),
        ({"filename": "a.mp4"}, "one label is needed"),
        ({"filename": "a.mp4", "label": [1, 2]}, "one label is needed"),
        ({"filename": "a.mp4", "label": ["1"]}, "one label is needed"),
        ({"frame_dir": "a", "label": [1]}, "total_frames is needed"),
        ({"filename": "a.mp4", "label": [7]}, "label 7 is not in 0..4"),
        ({"filename": "a.mp4", "label": [-1]}, "label -1 is not in 0..4"),
        ({"filename": "../a.mp4", "label": [1]}, "leads out"),
        ({"filename": "first.mp4", "label": [1]}, "the same video as entry 1"),
    ],
)
def test_json_entries_that_cannot_be_used(tmp_path, entry, said):
    path = write_list(tmp_path, json.dumps([{"filename": "first.mp4", "label": 0}, entry]), name="list.json")
    with pytest.raises(BadList, match=r"list.json, entry 2: ") as raised:
        read_list(path, classes=5)
    assert said in str(raised.value)


def test_lists_that_are_none(tmp_path):
    with pytest.raises(NoList, match="tsm data prepare"):
        read_list(tmp_path / "nowhere.txt")
    with pytest.raises(BadList, match="names no video"):
        read_list(write_list(tmp_path))
    for text in ("{", '{"a": 1}'):
        with pytest.raises(BadList, match="is no JSON list"):
            read_list(write_list(tmp_path, text, name="list.json"))
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(BadList, match="cannot be read"):
        read_list(tmp_path / "binary.txt")


def test_a_prepared_list_in_an_order(tmp_path):
    (tmp_path / "jester").mkdir()
    write_list(tmp_path / "jester", "7 37 0", name="jester_val_list_rawframes.txt")
    records, folder = open_list("jester", tmp_path, kind="rawframes")
    assert (records, folder) == ([VideoRecord("7", 0, 37)], tmp_path / "jester/rawframes")
    assert open_list("jester", tmp_path, kind="rawframes", order="mit")[0] == [VideoRecord("7", 16, 37)]
    with pytest.raises(NoList, match=r"jester_train_list_rawframes.txt does not exist"):
        open_list("jester", tmp_path, kind="rawframes", part="train")


# --- frames


def make_folder(root, name, count, *, first=1, size=(24, 16), template="img_{:05}.jpg"):
    folder = root / name
    folder.mkdir(parents=True)
    for number in range(count):
        shade = np.full((size[1], size[0], 3), 5 * number, np.uint8)
        Image.fromarray(shade).save(folder / template.format(number + first), quality=100)
    return folder


def shades(sample):
    """Which frames a sample holds, read from their grey."""
    return [round(float(value) / 5) for value in sample.images.float().mean(dim=(1, 2, 3))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    make_folder(root, "long", 37)
    make_folder(root, "short", 3)
    make_folder(root, "holed", 12)
    (root / "holed/img_00004.jpg").unlink()
    make_folder(root, "mixed", 8)
    Image.new("RGB", (8, 8)).save(root / "mixed/img_00004.jpg")
    return root


@pytest.mark.parametrize("clips", ["uniform", "twice", "dense"])
@pytest.mark.parametrize("name", ["long", "short"])
def test_samples_hold_the_frames_of_the_rule(root, name, clips):
    total = {"long": 37, "short": 3}[name]
    for record in (VideoRecord(name, 4, total), VideoRecord(name, 4)):
        sample = VideoDataset([record], root, clips=clips)[0]
        assert (sample.index, sample.label, sample.error) == (0, 4, None)
        assert sample.images.shape[1:] == (3, 16, 24)
        assert sample.images.dtype == torch.uint8
        assert shades(sample) == sampling.test_indices(total, 8, clips=clips)


def test_the_list_says_how_many_frames_there_are_and_where_they_begin(root):
    sample = VideoDataset([VideoRecord("long", 0, 10, 20)], root)[0]
    assert shades(sample) == [20 + index for index in sampling.test_indices(10, 8)]


def test_names_and_numbers_of_the_files(tmp_path):
    make_folder(tmp_path, "v", 5, first=0, template="{:06d}.jpg")
    assert shades(VideoDataset([VideoRecord("v", 0)], tmp_path, template="{:06d}.jpg", start=0, frames=5)[0]) == [
        *range(5)
    ]


BROKEN = [
    (VideoRecord("nowhere", 1, 20), "nowhere does not exist"),
    (VideoRecord("holed", 1, 12), "img_00004.jpg is missing"),
    (VideoRecord("holed", 1), "img_00004.jpg is missing"),
    (VideoRecord("long", 1, 90), "img_00040.jpg is missing"),
    (VideoRecord("long", 1, 0), "0 frames"),
    (VideoRecord("mixed", 1, 8), "changes its size: 8x8, 24x16"),
]


@pytest.mark.parametrize(("record", "said"), BROKEN)
def test_a_broken_video_is_reported_or_raised(root, record, said):
    sample = VideoDataset([record], root)[0]
    assert sample.images is None
    assert sample.label == 1
    assert said in sample.error
    with pytest.raises(UnreadableVideo, match=record.path) as raised:
        VideoDataset([record], root, on_error="raise")[0]
    assert str(raised.value) == sample.error


def test_in_workers(root):
    records = [VideoRecord("long", 1, 37), VideoRecord("nowhere", 2, 5), VideoRecord("short", 3, 3)]
    dataset = VideoDataset(records, root)
    assert len(pickle.loads(pickle.dumps(dataset))) == 3
    samples = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert [(sample.index, sample.label) for sample in samples] == [(0, 1), (1, 2), (2, 3)]
    assert [sample.error is None for sample in samples] == [True, False, True]
    for sample in samples[::2]:
        assert torch.equal(sample.images, dataset[sample.index].images)
    strict = DataLoader(VideoDataset(records, root, on_error="raise"), batch_size=None, num_workers=1)
    with pytest.raises(UnreadableVideo, match="nowhere does not exist"):
        list(strict)


def test_pixels_lie_as_the_network_wants_them(root):
    images = VideoDataset([VideoRecord("long", 1, 37)], root)[0].images
    assert images.is_contiguous(memory_format=torch.channels_last)
