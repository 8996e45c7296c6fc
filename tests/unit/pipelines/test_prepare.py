"""Every data set, in miniature: official annotations become lists, lists are checked, videos give their frames."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipelines import sampling
from pipelines.datasets import DATASETS, NoList, VideoRecord, open_list, read_list
from pipelines.decoding import FolderReader, VideoReader
from pipelines.prepare import (
    FAULTS,
    BadAnnotations,
    NoAnnotations,
    NoVideos,
    check,
    extract,
    prepare,
    scale_filter,
)
from pipelines.sources import find_ffmpeg
from pipelines.video_dataset import VideoDataset
from tests.assets.make import make_miniature, shown
from tsm_core.errors import CallerError
from tsm_core.labels import UnknownDataset, labels_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from a data set to its miniature, made once; tests that change it take `copy_of`."""
    root, known = tmp_path_factory.mktemp("data"), {}

    def miniature(dataset):
        if dataset not in known:
            known[dataset] = make_miniature(dataset, root, videos_per_class=1, broken=True)
        return known[dataset]

    return miniature


@pytest.fixture
def copy_of(made, tmp_path):
    """A function from a data set to a data root of the test's own."""

    def copied(dataset):
        shutil.copytree(made(dataset).home, tmp_path / dataset)
        return tmp_path

    return copied


def expected(miniature, kind, part, split):
    """(path, label, frames) of the videos that are there, by the maker's word."""
    absent = ("missing",) if kind == "videos" else ("missing", "empty")
    suffix = miniature.suffix if kind == "videos" else ""
    return sorted(
        (video.path + suffix, video.label, None if kind == "videos" else video.frames)
        for video in miniature.videos
        if video.part_in(split if miniature.row.splits > 1 else 1) == part and video.fault not in absent
    )


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_whole_way(made, copy_of, dataset):
    root = copy_of(dataset)
    miniature = replace(made(dataset), home=root / dataset)
    row = miniature.row
    kinds = ["rawframes", "videos"] if miniature.suffix else ["rawframes"]
    assert list(row.kinds) == kinds
    seen = []
    report = prepare(dataset, root, on_progress=lambda done, total: seen.append((done, total)))
    assert len(report.lists) == len(kinds) * 2 * row.splits
    assert seen[-1][0] == seen[-1][1] == sum(each.videos + len(each.absent) for each in report.lists)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({row["list"] for row in report.rows()}) == len(report.lists)
    checked = {(each.kind, each.part, each.split): each for each in check(dataset, root, full=True).lists}
    quick = {(each.kind, each.part, each.split): each for each in check(dataset, root).lists}
    for each in report.lists:
        key = (each.kind, each.part, each.split)
        records = read_list(each.path, classes=len(row.labels))
        assert [(record.path, record.label, record.frames) for record in records] == expected(miniature, *key)
        here = [video for video in miniature.videos if video.part_in(each.split) == each.part]
        absent = ("missing",) if each.kind == "videos" else ("missing", "empty")
        gone = [video.path for video in here if video.fault in absent]
        assert sorted(path for path, _ in each.absent) == sorted(gone)
        broken = sum(video.fault == "truncated" for video in here)
        empty = broken if each.kind == "videos" else 0
        short = sum(video.frames < 8 for video in here)
        counts = {"unreadable": broken + empty, "short": short}
        assert checked[key].counts == {fault: count for fault, count in counts.items() if count}
        assert quick[key].counts.get("unreadable", 0) == (broken + empty if each.kind == "videos" else 0)
        assert checked[key].row()["fine"] == len(records) - broken - empty - short
        assert_frames(miniature, *key)


def assert_frames(miniature, kind, part, split):
    """Every video of a list gives the frames of the rule, or says why not."""
    row = miniature.row
    records, folder = open_list(row.name, miniature.home.parent, kind=kind, part=part, split=split)
    by_path = {video.path: video for video in miniature.videos}
    dataset = VideoDataset(records, folder, template=row.template, start=row.start)
    for record, sample in zip(records, dataset, strict=True):
        video = by_path[record.path.removesuffix(miniature.suffix)]
        assert sample.label == video.label
        if video.fault:
            assert sample.images is None
            assert video.name in sample.error
            continue
        assert sample.error is None
        indices = sampling.test_indices(video.frames, 8)
        assert [shown(image) for image in sample.images.numpy()] == [(video.label, index) for index in indices]


def test_same_annotations_same_bytes(copy_of):
    root = copy_of("hmdb51")
    prepare("hmdb51", root)
    first = {path.name: path.read_bytes() for path in (root / "hmdb51").glob("*") if path.is_file()}
    assert len(first) == 12
    prepare("hmdb51", root / "hmdb51")
    assert {path.name: path.read_bytes() for path in (root / "hmdb51").glob("*") if path.is_file()} == first


def test_same_seed_same_miniature(tmp_path):
    for name in ("a", "b"):
        make_miniature("sthv2", tmp_path / name, classes=1, videos_per_class=1, seed=3)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert files
    for file in files:
        if file.suffix != ".webm":  # libvpx's container holds a random number
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_one_split_and_one_kind(copy_of):
    root = copy_of("ucf101")
    report = prepare("ucf101", root, split=2, kind="rawframes")
    assert [each.path.name for each in report.lists] == [
        "ucf101_train_split_2_rawframes.txt",
        "ucf101_val_split_2_rawframes.txt",
    ]
    assert len(check("ucf101", root, split=2).lists) == 2
    assert len(check("ucf101", root, part="val").lists) == 1
    with pytest.raises(NoList, match="no split 4"):
        prepare("ucf101", root, split=4)
    with pytest.raises(NoList, match="holds no list"):
        check("ucf101", root, split=1)


# --- what may be otherwise


def test_kinetics_folders_as_others_name_them(copy_of):
    root = copy_of("kinetics400")
    home = root / "kinetics400"
    before = {each.path.name: each.videos for each in prepare("kinetics400", root).lists}
    folders = home / "videos_train"
    names = {path.name for path in folders.iterdir()}
    assert names == {"abseiling", "massaging_person's_head", "petting_animal_(not_cat)"}
    (folders / "massaging_person's_head").rename(folders / "massaging person's head")  # the original
    (folders / "petting_animal_(not_cat)").rename(folders / "petting_animal_not_cat")  # mit-han-lab
    for path in list((folders / "abseiling").iterdir()):
        path.rename(folders / path.name)  # all in one folder
    for path in list((home / "rawframes_val/abseiling").iterdir()):
        clip, start, _ = path.name.rsplit("_", 2)
        path.rename(path.with_name(f"{clip}_{int(start)}"))  # mit-han-lab
    after = {each.path.name: each.videos for each in prepare("kinetics400", root).lists}
    assert after == before
    records, folder = open_list("kinetics400", root, kind="videos", part="train")
    assert {record.path.rpartition("/")[0] for record in records} == {
        "",
        "massaging person's head",
        "petting_animal_not_cat",
    }
    assert all((folder / record.path).is_file() for record in records)
    assert check("kinetics400", root, part="train").fine


def test_annotations_elsewhere_and_under_other_names(copy_of):
    root = copy_of("kinetics400")
    folder = root / "kinetics400/annotations"
    before = {each.path.name: each.path.read_bytes() for each in prepare("kinetics400", root).lists}
    (folder / "kinetics_train.csv").rename(root / "kinetics400/train.csv")
    (folder / "kinetics_val.csv").rename(root / "kinetics400/validate.csv")
    assert {each.path.name: each.path.read_bytes() for each in prepare("kinetics400", root).lists} == before
    root = copy_of("ucf101")
    (root / "ucf101/annotations").rename(root / "ucf101/ucfTrainTestlist")
    assert prepare("ucf101", root, split=1).lists


def test_labels_in_another_order_are_told_of(copy_of):
    root = copy_of("sthv1")
    before = {each.path.name: each.path.read_bytes() for each in prepare("sthv1", root).lists}
    labels = root / "sthv1/annotations/something-something-v1-labels.csv"
    labels.write_text("".join(f"{label}\r\n" for label in labels_of("sthv1", "mit")))
    report = prepare("sthv1", root)
    assert len(report.notes) == 1
    assert "has the classes sorted, as for mit-han-lab's weights: 0 is 'Approaching" in report.notes[0]
    assert {each.path.name: each.path.read_bytes() for each in report.lists} == before


def test_only_one_part_is_there(copy_of):
    root = copy_of("sthv2")
    (root / "sthv2/annotations/something-something-v2-train.json").unlink()
    report = prepare("sthv2", root)
    assert {each.part for each in report.lists} == {"val"}
    assert report.notes == ("there is no something-something-v2-train.json or train.json, so no list for it",)
    root = copy_of("kinetics400")
    shutil.rmtree(root / "kinetics400/videos_train")
    shutil.rmtree(root / "kinetics400/rawframes_train")
    report = prepare("kinetics400", root)
    assert [each.written for each in report.lists] == [False, False, True, True]
    assert not (root / "kinetics400/kinetics400_train_list_videos.txt").exists()
    assert len(report.lists[0].absent) == 3


def test_a_video_named_twice_is_listed_once(copy_of):
    root = copy_of("jester")
    path = root / "jester/annotations/jester-v1-train.csv"
    before = prepare("jester", root).lists[0].videos
    path.write_text(path.read_text() * 2)
    assert prepare("jester", root).lists[0].videos == before


# --- what is refused


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BAD = [
    (
        "kinetics400",
        "kinetics_train.csv",
        "abseiling",
        "juggling mammoths",
        r"line 2: 'juggling_mammoths' is no class of Kin",
    ),
    ("kinetics400", "kinetics_train.csv", "label,", "name,", r"the first line lacks label"),
    ("kinetics400", "kinetics_val.csv", ",val,", "x,val,", r"line 2: time_start and time_end should be seconds"),
    ("sthv1", "something-something-v1-validation.csv", ";", ",", r"line 1: `id;label` is needed"),
    ("sthv1", "something-something-v1-train.csv", ";", ";Not ", r"line 1: 'Not .* is no class of Something"),
    (
        "sthv1",
        "something-something-v1-labels.csv",
        "Holding something\n",
        "",
        r"0 strange ones \[\], 1 missing \['Holding",
    ),
    ("sthv2", "something-something-v2-train.json", '"template"', '"pattern"', r"entry 1: id and template are needed"),
    ("sthv2", "something-something-v2-train.json", "[something]", "[some]thing new", r"is no class of Something"),
    ("sthv2", "something-something-v2-labels.json", '"0"', '"zero"', r"each template needs its number"),
    ("sthv2", "something-something-v2-labels.json", "{", "[", r"is no JSON"),
    ("jester", "jester-v1-train.csv", ";", ";Not ", r"is no class of Jester"),
    ("jester", "jester-v1-labels.csv", "Thumb Up", "Thumb Sideways", r"1 strange ones \['Thumb Sideways'\], 1 missing"),
    ("diving48", "Diving48_V2_test.json", '"label": ', '"label": 9', r"label 9\d+ is not in 0..47"),
    ("diving48", "Diving48_V2_test.json", '"label": ', '"label": null, "x": ', r"label None is not in 0..47"),
    (
        "diving48",
        "Diving48_V2_train.json",
        '"vid_name": "',
        '"vid_name": "../',
        r"entry 1: '../.*' is no name of a video",
    ),
    (
        "diving48",
        "Diving48_V2_train.json",
        '"vid_name": "',
        '"vid_name": "a\\n',
        r"entry 1: 'a\\n.*' is no name of a video",
    ),
    ("sthv1", "something-something-v1-train.csv", "1", "/1", r"line \d: '/1.*' is no name of a video"),
    ("diving48", "Diving48_vocab.json", "FREE", "TUCK", r"strange ones"),
    ("hmdb51", "wave_test_split1.txt", ".avi 1", ".avi 3", r"wave_test_split1.txt, line \d: `name.avi flag` is needed"),
    ("ucf101", "trainlist01.txt", ".avi 1", ".avi 2", r"line 1: ApplyEyeMakeup has the number 1, not 2"),
    (
        "ucf101",
        "trainlist01.txt",
        "ApplyEyeMakeup/",
        "ApplyEarMakeup/",
        r"line 1: 'ApplyEarMakeup' is no class of UCF101",
    ),
    ("ucf101", "testlist01.txt", "/", ":", r"line 1: `Class/video.avi` is needed"),
    ("ucf101", "classInd.txt", "1 ApplyEyeMakeup", "one ApplyEyeMakeup", r"line 1: `number name` is needed"),
    ("ucf101", "classInd.txt", "1 ApplyEyeMakeup", "1 ApplyEarMakeup", r"1 strange ones \['ApplyEarMakeup'\]"),
]


@pytest.mark.parametrize(("dataset", "file", "old", "new", "said"), BAD)
def test_annotations_that_are_wrong(copy_of, dataset, file, old, new, said):
    root = copy_of(dataset)
    path = root / dataset / "annotations" / file
    change(path, old, new)
    with pytest.raises(BadAnnotations, match=said) as raised:
        prepare(dataset, root)
    assert str(raised.value).startswith(str(path))
    assert not list((root / dataset).glob("*.txt")), "nothing is half written"


def test_a_vocabulary_in_another_order_is_refused(copy_of):
    root = copy_of("diving48")
    path = root / "diving48/annotations/Diving48_vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    with pytest.raises(BadAnnotations, match="would mean other classes"):
        prepare("diving48", root)


def test_two_labels_for_one_video(copy_of):
    root = copy_of("jester")
    path = root / "jester/annotations/jester-v1-train.csv"
    video, _, label = path.read_text().splitlines()[0].partition(";")
    path.write_text(path.read_text() + f"{video};{'Thumb Up' if label != 'Thumb Up' else 'Thumb Down'}\n")
    with pytest.raises(BadAnnotations, match=rf"line 4: {video} is both '{label}' and 'Thumb"):
        prepare("jester", root)


def test_nothing_is_there(copy_of, tmp_path):
    with pytest.raises(UnknownDataset, match="'k400'"):
        prepare("k400", tmp_path)
    with pytest.raises(NoVideos, match=r"Jester is not there: none of .*jester/rawframes is a folder; get it: https"):
        prepare("jester", tmp_path)
    with pytest.raises(NoList, match="tsm data prepare jester"):
        check("jester", tmp_path)
    (tmp_path / "jester/rawframes").mkdir(parents=True)
    with pytest.raises(NoAnnotations, match=r"holds no jester-v1-train.csv and no jester-v1-validation.csv; get it"):
        prepare("jester", tmp_path)
    with pytest.raises(NoVideos, match="comes as rawframes, not as videos"):
        prepare("jester", tmp_path, kind="videos")
    shutil.rmtree(tmp_path / "jester")
    root = copy_of("jester")
    shutil.rmtree(root / "jester/rawframes")
    (root / "jester/rawframes").mkdir()
    with pytest.raises(NoVideos, match=r"none of 9 annotated videos lies in .*jester/rawframes"):
        prepare("jester", root)


# --- check


def test_check_names_every_fault(copy_of):
    root = copy_of("sthv1")
    prepare("sthv1", root)
    home = root / "sthv1"
    path = home / "sthv1_train_list_rawframes.txt"
    for number, frames in ((1, 2), (2, 5), (3, 12)):
        folder = home / "rawframes" / f"x{number}"
        folder.mkdir()
        for frame in range(frames):
            Image.new("RGB", (32, 24)).save(folder / f"{frame + 1:05}.jpg")
    (home / "rawframes/x3/00006.jpg").unlink()
    before = path.read_text()
    lines = ["x1 2 0", "x2 5 0", "x3 12 0", "x4 9 0", "x5 0 174", "x5", "/etc 9 0", "x1 3 0"]
    path.write_text(before + "".join(f"{line}\n" for line in lines))
    found = check("sthv1", root, part="train").lists[0]
    good = len(before.splitlines())
    short = sum(
        "00008.jpg" not in [p.name for p in (home / "rawframes" / line.split()[0]).iterdir()]
        for line in before.splitlines()
    )
    counts = {"too_short": 1, "short": 1 + short, "unreadable": 1, "missing": 1, "bad_label": 1, "bad_list": 3}
    assert found.counts == counts
    assert found.row() == {"list": path.name, "videos": good + 8, "fine": good - short, "wrong_count": 0} | counts
    assert list(found.row())[3:] == list(FAULTS)
    details = {finding.fault: finding.detail for finding in found.findings}
    assert details["unreadable"].endswith("00006.jpg is missing")
    assert "label 174 is not in 0..173" in details["bad_label"]
    assert not check("sthv1", root).fine
    path.write_text("x2 4 0\nx2 6 1\n".replace("x2 6", "x1 6"))
    found = check("sthv1", root, part="train").lists[0]
    assert found.counts == {"wrong_count": 2}
    assert [finding.detail for finding in found.findings] == [
        "5 frames where the list says 4",
        "2 frames where the list says 6",
    ]


def test_short_videos_are_told_of_but_fine(copy_of):
    root = copy_of("jester")
    prepare("jester", root)
    report = check("jester", root, part="train", frames=8)
    assert report.lists[0].counts == {"short": 1}
    assert report.fine
    assert check("jester", root, part="train", frames=3).lists[0].counts == {}


def test_check_keeps_the_first_examples(copy_of):
    root = copy_of("jester")
    prepare("jester", root)
    shutil.rmtree(root / "jester/rawframes")
    seen = []
    report = check("jester", root, examples=2, on_progress=lambda done, total: seen.append((done, total)))
    assert [each.counts["missing"] for each in report.lists] == [3, 4]
    assert [len(each.findings) for each in report.lists] == [2, 2]
    assert seen[-1] == (7, 7)


# --- extract


@pytest.mark.parametrize(
    ("stored", "size", "becomes"),
    [
        ("", (64, 48), (64, 48)),
        ("340x256", (64, 48), (340, 256)),
        ("short-side 30", (64, 48), (40, 30)),
        ("short-side 30", (48, 64), (30, 40)),
        ("short-side 31", (64, 48), (41, 31)),
        ("height 30", (48, 64), (23, 30)),
    ],
)
def test_sizes(tmp_path, stored, size, becomes):
    path = tmp_path / "picture.png"
    Image.new("RGB", size).save(path)
    scale = ["-vf", scale_filter(stored)] if stored else []
    out = tmp_path / "out.png"
    subprocess.run([find_ffmpeg().path, "-v", "error", "-i", path, *scale, out], check=True)
    assert Image.open(out).size == becomes


def test_a_size_that_is_none():
    with pytest.raises(CallerError, match="'256' is none of 340x256"):
        scale_filter("256")


@pytest.mark.parametrize("dataset", ["hmdb51", "kinetics400"])
def test_videos_become_folders(copy_of, made, dataset):
    root = copy_of(dataset)
    home, row = root / dataset, DATASETS[dataset]
    kept = next(video for video in made(dataset).videos if not video.fault)
    for part in ("train", "val"):
        for folder in list((home / row.folder("rawframes", part)).glob("*/*")):
            if folder.name != kept.name:
                shutil.rmtree(folder)
    seen = []
    report = extract(dataset, root, stored="height 60", on_progress=lambda done, total: seen.append((done, total)))
    there = [video for video in made(dataset).videos if video.fault != "missing"]
    assert report.kept == 1
    assert report.extracted + len(report.failed) + 1 == len(there) == seen[-1][0]
    assert {Path(path).stem for path, _ in report.failed} == {video.name for video in there if video.fault}
    for video in there:
        folder = home / row.folder("rawframes", video.part) / video.path
        assert not list(folder.parent.glob(".*"))
        if video.fault:
            assert not folder.exists()
        elif video is not kept:
            reader = FolderReader(folder)
            assert len(reader) == video.frames
            with VideoReader(home / row.folder("videos", video.part) / (video.path + made(dataset).suffix)) as film:
                high, wide = film.frames([0])[0].shape[1:]
            image = reader.frames([video.frames - 1])[0]
            assert tuple(image.shape[1:]) == (60, int(wide * 60 / high + 0.5))
    again = extract(dataset, root, stored="height 60")
    assert again.extracted == 0
    assert again.kept == report.kept + report.extracted


def test_extracted_frames_are_the_videos_frames(copy_of, made):
    root = copy_of("ucf101")
    shutil.rmtree(root / "ucf101/rawframes")
    extract("ucf101", root, workers=1)
    for video in made("ucf101").videos:
        if not video.fault:
            reader = FolderReader(root / "ucf101/rawframes" / video.path)
            images = reader.frames(range(len(reader)))
            assert [shown(image.numpy()) for image in images] == [(video.label, index) for index in range(video.frames)]
    report = prepare("ucf101", root, split=1, kind="rawframes")
    assert [each.videos for each in report.lists] == [3, 3]
    assert isinstance(read_list(report.lists[0].path)[0], VideoRecord)
