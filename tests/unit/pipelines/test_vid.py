from __future__ import annotations

import json
import pickle

import pytest
import torch

from pipelines.box_data import BadBoxes
from pipelines.box_files import CocoVideos
from pipelines.box_sets import NoBoxes, UnknownBoxes, open_boxes
from pipelines.datasets import BadList, NoList
from pipelines.decoding import UnreadableVideo
from pipelines.prepare import BadAnnotations, NoAnnotations
from pipelines.vid import WNIDS, check_boxes, open_part, prepare_vid, sampled
from tests.unit.pipelines.vid_kit import AIRPLANE, DOG, make_vid, write_frame
from tsm_core.detector_recipes import DETECTOR_RECIPES

LABELS = DETECTOR_RECIPES["rfcn_resnet101_vid"].labels
NAN = float("nan")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    make_vid(place)
    prepare_vid(place)
    return place


def written(root, name):
    return json.loads((root / "imagenet_vid" / "annotations" / name).read_text())


def test_thirty_classes_by_their_wnids():
    assert (len(WNIDS), WNIDS[AIRPLANE], WNIDS[DOG], WNIDS["n02391049"]) == (30, "airplane", "dog", "zebra")


def test_report_counts_what_was_written_and_left_out(tmp_path):
    make_vid(tmp_path)
    told: list[tuple[int, int]] = []
    train, val, det = prepare_vid(tmp_path, on_progress=lambda done, total: told.append((done, total))).files
    assert (train.videos, train.frames, train.objects, train.left_out) == (2, 22, 2 * 18 + 5, {"of another class": 1})
    assert (val.videos, val.frames, val.objects, val.left_out) == (2, 12, 12, {})
    assert (det.videos, det.frames, det.objects) == (3, 3, 3)
    assert told[-1] == (3, 3)


def test_json_is_coco_vid(root):
    made = written(root, "imagenet_vid_train.json")
    assert made["categories"][0] == {"id": 1, "name": "airplane", "encode_name": AIRPLANE}
    short, long = made["videos"]
    assert short["name"] == "train/ILSVRC2015_VID_train_0000/ILSVRC2015_train_00000000"
    assert short["vid_train_frames"] == [0, 1, 2, 3]
    assert len(long["vid_train_frames"]) == 15
    image = made["images"][4]
    assert (image["video_id"], image["frame_id"], image["is_vid_train_frame"]) == (2, 0, True)
    assert image["file_name"] == "VID/train/ILSVRC2015_VID_train_0000/ILSVRC2015_train_00000001/000000.JPEG"
    first, second, *_, last = made["annotations"]
    assert (first["bbox"], first["instance_id"], first["generated"], first["occluded"]) == ([13, 20, 40, 40], 1, 1, 0)
    assert (second["instance_id"], last["instance_id"], last["video_id"]) == (2, 4, 2)
    still = written(root, "imagenet_det_30plus1cls.json")
    assert "video_id" not in still["images"][0]
    assert still["images"][0]["file_name"].startswith("DET/train/ILSVRC2013_train/")


def test_videos_are_read_with_their_boxes(root):
    videos = open_part(root, "train")
    assert (len(videos), len(videos.labels)) == (2, 30)
    video = videos.video(0)
    assert [len(each) for each in video.objects] == [0, 2, 1, 2]  # an empty frame stays
    assert video.objects[2].boxes.tolist() == [[0, 70, 30, 120]]  # cut at the picture's edges
    assert video.objects[1].tracks.tolist() == video.objects[3].tracks.tolist()
    frame = video.read([3])[0]
    x1, y1, x2, y2 = (int(side) for side in video.objects[3].boxes[0])
    assert frame.shape == (3, 120, 160)
    assert (frame[0, y1 + 4 : y2 - 4, x1 + 4 : x2 - 4] > 200).all()
    again = pickle.loads(pickle.dumps(videos)).video(0)
    assert torch.equal(again.frames, video.frames)


def test_training_sees_fifteen_clips_of_each_snippet_beside_stills(root):
    videos = open_boxes("imagenet_vid", LABELS, root, "train")
    assert len(videos) == 2 * 15 + 3
    assert [len(videos.video(index)) for index in (0, 1, 29, 30, 32)] == [4, 18, 18, 1, 1]
    assert len(open_boxes("imagenet_vid", LABELS, root, "val")) == 2
    (root / "imagenet_vid" / "annotations" / "imagenet_det_30plus1cls.json").rename(root / "kept.json")
    assert len(open_boxes("imagenet_vid", LABELS, root, "train")) == 30
    (root / "kept.json").rename(root / "imagenet_vid" / "annotations" / "imagenet_det_30plus1cls.json")


@pytest.mark.parametrize("frames", [1, 14, 15, 16, 100, 1000])
def test_sampled_frames_are_spread(frames):
    found = sampled(frames)
    assert len(found) == min(frames, 15)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert found[-1] < frames
    assert found[-1] >= frames - 1 - frames // 15


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((NAN, 0, 5, 5), "not_a_number"),
        ((5, 5, 5, 9), "degenerate"),
        ((400, 0, 500, 9), "outside"),
        ((9, 5, 3, 9), "degenerate"),
    ],
)
def test_boxes_that_are_none_are_left_out_and_counted(tmp_path, box, reason):
    place = tmp_path / "imagenet_vid" / "ILSVRC"
    write_frame(place, "VID", "val/a/000000", [(DOG, 0, box), (DOG, 1, (0, 0, 9, 9))])
    report = prepare_vid(tmp_path)
    (val,) = report.files
    assert (val.objects, val.left_out) == (1, {reason: 1})
    assert any("no imagenet_vid_train.json" in note for note in report.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "no element found|unclosed"),
        ("<annotation><size><width>0</width><height>5</height></size></annotation>", "a picture of 0x5"),
        ("<annotation></annotation>", "no size/width in an annotation"),
        (
            "<annotation><size><width>9</width><height>9</height></size><object><name>x</name></object></annotation>",
            "no bndbox/xmin in an object",
        ),
    ],
)
def test_damaged_annotations_are_named(tmp_path, text, message):
    file = tmp_path / "imagenet_vid" / "Annotations" / "VID" / "val" / "a" / "000000.xml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(BadAnnotations, match=message) as caught:
        prepare_vid(tmp_path)
    assert "000000.xml" in str(caught.value)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(NoAnnotations, match="holds Annotations/VID; get it"):
        prepare_vid(tmp_path)
    with pytest.raises(NoBoxes, match="--data"):
        open_boxes("imagenet_vid", LABELS, None, "val")
    with pytest.raises(UnknownBoxes, match=r"there are .*moving_shapes"):
        open_boxes("nowhere", LABELS, tmp_path, "val")
    (tmp_path / "imagenet_vid" / "Annotations" / "VID").mkdir(parents=True)
    with pytest.raises(NoList, match="tsm data prepare"):
        open_boxes("imagenet_vid", LABELS, tmp_path, "val")


def test_list_of_stills_may_not_lead_elsewhere(tmp_path):
    make_vid(tmp_path)
    listed = tmp_path / "imagenet_vid" / "ILSVRC2015" / "ImageSets" / "DET_train_30classes.txt"
    for line in ("../../x 1", "train/nothing 1"):
        listed.write_text(f"{line}\n")
        with pytest.raises(BadAnnotations, match=r"line 1"):
            prepare_vid(tmp_path)


def test_check_finds_missing_and_unreadable_pictures(tmp_path):
    home = make_vid(tmp_path)
    prepare_vid(tmp_path)
    (found,) = check_boxes([("val", open_part(tmp_path, "val"))])
    assert (found.fine, found.videos, found.frames, found.bad_boxes) == (True, 2, 12, 0)
    frames = home / "ILSVRC2015" / "Data" / "VID" / "val" / "ILSVRC2015_val_00000000"
    (frames / "000003.JPEG").unlink()
    (frames / "000004.JPEG").write_bytes(b"no picture")
    (found,) = check_boxes([("val", open_part(tmp_path, "val"))], full=True)
    assert (found.fine, found.missing, found.unreadable) == (False, 1, 1)
    assert len(found.examples) == 2
    with pytest.raises(UnreadableVideo, match=r"000003\.JPEG"):
        open_part(tmp_path, "val").video(0).read([2, 3])


# --- COCO's format


def coco(tmp_path, **changes):
    made = {
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [
            {"id": 11, "file_name": "a.jpg", "width": 20, "height": 10},
            {"id": 5, "file_name": "b.jpg", "width": 20, "height": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 1},
            {"id": 2, "image_id": 11, "category_id": 3, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 3, "image_id": 11, "category_id": 3, "bbox": [1, 2, 0, 4]},
        ],
        **changes,
    }
    file = tmp_path / "made.json"
    file.write_text(json.dumps(made))
    return file


def test_classes_with_gaps_and_still_images(tmp_path):
    videos = CocoVideos(coco(tmp_path), tmp_path)
    assert (videos.labels, len(videos)) == (("cat", "dog"), 2)
    first, second = videos.video(0).objects[0], videos.video(1).objects[0]
    assert (first.labels.tolist(), first.boxes.tolist(), first.ignore.tolist()) == ([0], [[1, 2, 4, 6]], [False])
    assert (second.labels.tolist(), second.ignore.tolist(), second.tracks.tolist()) == ([1], [True], [-1])
    assert videos.dropped == {"degenerate": 1}


def test_frames_of_a_video_are_in_order(tmp_path):
    images = [
        {"id": number, "file_name": f"{number}.jpg", "width": 9, "height": 9, "video_id": 1, "frame_id": 5 - number}
        for number in range(4)
    ]
    videos = CocoVideos(coco(tmp_path, images=images, annotations=[], videos=[{"id": 1, "name": "film"}]), tmp_path)
    assert (len(videos), videos.video(0).name) == (1, "film")
    assert [path.name for path in videos.paths(0)] == ["3.jpg", "2.jpg", "1.jpg", "0.jpg"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{"id": 9, "image_id": 5, "category_id": 8, "bbox": [0, 0, 1, 1]}]},
            "annotation 9 has category 8",
        ),
        ({"annotations": [{"id": 9, "image_id": 4, "category_id": 7, "bbox": [0, 0, 1, 1]}]}, "of image 4"),
        ({"annotations": [{"id": 9, "image_id": 5, "category_id": 7, "bbox": [0, 0, 1]}]}, "no COCO file"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, "a.jpg has no width"),
        ({"images": [{"id": 1, "file_name": "../a.jpg", "width": 9, "height": 9}]}, "leads out"),
        ({"images": 2 * [{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}]}, "two images have the same id"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "annotations": []}, "same name or id"),
        ({"images": None}, "no COCO file"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, changes, message):
    with pytest.raises(BadList, match=message):
        CocoVideos(coco(tmp_path, **changes), tmp_path)


def test_data_sets_of_ones_own(tmp_path):
    home = tmp_path / "mine"
    (home / "annotations").mkdir(parents=True)
    coco(tmp_path).rename(home / "annotations" / "val.json")
    videos = open_boxes("mine", ("dog", "bird", "cat"), tmp_path, "val")
    assert videos.video(0).objects[0].labels.tolist() == [2]
    with pytest.raises(BadBoxes, match="not among the 1 of the recipe: cat"):
        open_boxes("mine", ("dog",), tmp_path, "val")
    with pytest.raises(UnknownBoxes, match=r"train\.json does not exist"):
        open_boxes("mine", ("dog", "cat"), tmp_path, "train")
