"""What is evaluated: checkpoint, views, videos; and every way to ask for something that is not there."""

from dataclasses import replace

import pytest
import torch

from pipelines.choice import BadEvaluation, NoData, choose_views, find_checkpoint, find_row, find_videos, open_model
from pipelines.choice import read_clips as read
from pipelines.datasets import BadList, NoList, VideoRecord
from tests.unit.pipelines.evaluate_kit import model_of, recipe_of
from tsm_core.checkpoints import save_model
from tsm_core.labels import labels_of
from tsm_core.model import build
from tsm_core.model_file import ModelFileError
from tsm_core.recipes import MOTION9, UnknownRecipe, Views, find_recipe, generic
from tsm_core.zoo import UnknownModel

K400 = find_recipe("tsm_r50_1x1x8_50e_kinetics400_rgb__ss256")
JESTER = find_recipe("tsm_r50_1x1x8_50e_jester_rgb")
DENSE = find_recipe("tsm_mobilenetv2_dense_1x1x8_100e_kinetics400_rgb")
STHV1 = find_recipe("tsm_r50_1x1x8_50e_sthv1_rgb")
STHV1_MIT = find_recipe("TSM_something_RGB_resnet50_shift8_blockres_avg_segment8_e45")


# ---- views


@pytest.mark.parametrize(
    ("recipe", "asked", "expected"),
    [
        (K400, {}, Views()),
        (STHV1, {"views": "accurate"}, Views("twice", "three", 256)),
        (STHV1, {"views": "accurate", "clips": "uniform"}, Views("uniform", "three", 256)),
        (STHV1, {"views": "accurate", "crop": "center"}, Views("twice", "center", 224)),
        (K400, {"crop": "three"}, Views("uniform", "three", 256)),  # by the rule, nothing else fits
        (K400, {"crop": "three", "crop_px": 224}, Views("uniform", "three", 224)),  # refused later, by its name
        (STHV1_MIT, {"crop": "three"}, Views("uniform", "three", 224)),
        (K400, {"crop": "ten", "clips": "dense"}, Views("dense", "ten", 224)),
        (JESTER, {"crop": "ten"}, Views("uniform", "ten", 256)),
        (DENSE, {"views": "accurate"}, Views("dense", "three", 256)),
        (MOTION9, {}, Views("uniform", "center", 64)),
    ],
)
def test_views(recipe, asked, expected):
    assert choose_views(recipe, **asked) == expected


def test_unknown_views():
    with pytest.raises(BadEvaluation, match="'best' must be 'efficient' or 'accurate'"):
        choose_views(K400, "best")


# ---- checkpoints


def test_a_model_file_must_hold_the_recipes_network_and_labels(tmp_path):
    recipe = recipe_of()
    save_model(tmp_path / "a.safetensors", model_of(recipe))
    assert open_model(tmp_path / "a.safetensors", recipe).recipe == recipe
    others = {
        "shift 'bi' there, 'uni' here": replace(recipe, shift="uni"),
        "frames 4 there, 8 here": replace(recipe, frames=8),
        "9 classes there, 2 here": replace(recipe, labels=("a", "b")),
        "class 1 is 'b' there, 'z' here": replace(recipe, labels=(*"azcdefghi",)),
        "resize_px 40 there, 44 here": replace(recipe, preprocess=replace(recipe.preprocess, resize_px=44)),
    }
    for said, other in others.items():
        with pytest.raises(ModelFileError, match=f"holds tiny, which is not other: {said}") as caught:
            open_model(tmp_path / "a.safetensors", replace(other, name="other"))
        assert caught.value.reason == "other_recipe"


def test_weights_of_others_are_imported(tmp_path):
    recipe = generic("mobilenet_v2", "bi", ("a", "b", "c"))
    model = build(recipe).eval()
    torch.save(model.net.state_dict(), tmp_path / "plain.pth")
    opened = open_model(tmp_path / "plain.pth", recipe)
    assert opened.source["file"] == "plain.pth"
    assert torch.equal(opened.net.classifier[1].weight, model.net.classifier[1].weight)
    with pytest.raises(ModelFileError, match="3 classes") as caught:
        open_model(tmp_path / "plain.pth", replace(recipe, labels=("a", "b")))
    assert caught.value.reason == "other_classes"


def test_a_checkpoint_is_a_file_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "motion9").mkdir()  # no file
    assert find_checkpoint("motion9").name == "motion9.safetensors"
    save_model(tmp_path / "mine.safetensors", model_of(recipe_of()))
    assert find_checkpoint("mine", [tmp_path]) == tmp_path / "mine.safetensors"
    with pytest.raises(UnknownModel, match="'nope' does not exist"):
        find_checkpoint("nope")
    with pytest.raises(ModelFileError, match=r"nope.pth does not exist"):
        open_model(find_checkpoint("nope.pth"), K400)


def test_a_recipe_may_be_in_the_file_alone(tmp_path):
    recipe = recipe_of()
    save_model(tmp_path / "a.safetensors", model_of(recipe))
    assert find_row("tiny", tmp_path / "a.safetensors") == recipe
    assert find_row("motion9", tmp_path / "a.safetensors") == MOTION9
    with pytest.raises(UnknownRecipe):
        find_row("other", tmp_path / "a.safetensors")


# ---- videos


def test_a_data_sets_list_is_found_and_counted_as_the_recipe_counts(tmp_path):
    folder = tmp_path / "sthv1"
    (folder / "rawframes").mkdir(parents=True)
    (folder / "sthv1_val_list_rawframes.txt").write_text("7 12 0\n8 30 173\n")
    videos, told = find_videos(STHV1, data_root=tmp_path)
    assert videos.records == (VideoRecord("7", 0, 12), VideoRecord("8", 173, 30))
    assert (videos.root, videos.template) == (folder / "rawframes", "{:05}.jpg")
    assert told == {"dataset": "sthv1", "data": "rawframes", "part": "val", "list": "sthv1_val_list_rawframes.txt"}
    sorted_ones, _ = find_videos(STHV1_MIT, data_root=tmp_path)
    for one, other in zip(videos.records, sorted_ones.records, strict=True):
        assert STHV1_MIT.labels[other.label] == STHV1.labels[one.label]
    assert sorted_ones.records[0].label == 16
    assert len(find_videos(STHV1, data_root=tmp_path, limit=1)[0].records) == 1


def test_what_is_not_there_is_told_with_the_way_out(tmp_path):
    with pytest.raises(NoData, match="--data ROOT, or --list FILE"):
        find_videos(K400)
    with pytest.raises(NoData, match="nowhere is no folder"):
        find_videos(K400, data_root=tmp_path / "nowhere")
    with pytest.raises(NoData, match="motion9 belongs to no data set; give --list FILE"):
        find_videos(MOTION9, data_root=tmp_path)
    with pytest.raises(NoList, match=r"tsm data prepare kinetics400 --data"):
        find_videos(K400, data_root=tmp_path)
    home = tmp_path / "kinetics400"
    home.mkdir()
    (home / "kinetics400_val_list_videos.txt").write_text("a.mp4 3\n")
    with pytest.raises(NoList, match=r"there is one of videos: --kind videos"):
        find_videos(K400, data_root=tmp_path)
    with pytest.raises(NoData, match="videos_val does not exist"):
        find_videos(K400, data_root=tmp_path, kind="videos")
    (home / "videos_val").mkdir()
    assert find_videos(K400, data_root=tmp_path, kind="videos")[0].records == (VideoRecord("a.mp4", 3),)
    (home / "kinetics400_val_list_videos.txt").write_text("a.mp4 400\n")
    with pytest.raises(BadList, match=r"label 400 is not in 0..399"):
        find_videos(K400, data_root=tmp_path, kind="videos")
    with pytest.raises(BadEvaluation, match="does not come as videos; use --kind rawframes"):
        find_videos(JESTER, data_root=tmp_path, kind="videos")
    with pytest.raises(BadEvaluation, match=r"kinetics400 has 400 classes, .* has 2"):
        find_videos(replace(K400, labels=("a", "b")), data_root=tmp_path)
    with pytest.raises(BadEvaluation, match="limit 0"):
        find_videos(K400, data_root=tmp_path, limit=0)


def test_a_list_of_loose_clips(tmp_path):
    listed = tmp_path / "clips.txt"
    listed.write_text("a b.mp4 arm wrestling\n\nsub/c.mp4 Cleaning_Pool\nd.mkv flipping pancake\n")
    videos, told = find_videos(K400, list_file=listed)
    assert [(each.path, K400.labels[each.label]) for each in videos.records] == [
        ("a b.mp4", "arm wrestling"),
        ("sub/c.mp4", "cleaning pool"),
        ("d.mkv", "flipping pancake"),
    ]
    assert videos.root == tmp_path
    assert told["list"] == "clips.txt"
    assert find_videos(K400, list_file=listed, prefix=tmp_path / "other")[0].root == tmp_path / "other"
    listed.write_text("a.mp4 5\nb.mp4 399\n")
    assert [each.label for each in find_videos(K400, list_file=listed)[0].records] == [5, 399]
    listed.write_text("folder 30 5\n")
    assert find_videos(K400, list_file=listed)[0].records == (VideoRecord("folder", 5, 30),)


def test_a_longer_class_name_goes_before_a_shorter_one(tmp_path):
    listed = tmp_path / "clips.txt"
    listed.write_text("a.mp4 pool cleaning\nb.mp4 cleaning\n")
    assert [each.label for each in read(listed, ["cleaning", "pool cleaning"])] == [1, 0]


def test_numbers_in_another_order_of_classes(tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("7 12 0\n")
    order = labels_of("sthv1")
    for recipe, list_order, label in (
        (STHV1_MIT, None, STHV1_MIT.labels[0]),
        (STHV1_MIT, "mit", STHV1_MIT.labels[0]),
        (STHV1_MIT, "mmaction2", order[0]),
        (STHV1, "mmaction2", order[0]),
        (STHV1, "mit", STHV1_MIT.labels[0]),
    ):
        videos, _ = find_videos(recipe, list_file=listed, list_order=list_order)
        assert recipe.labels[videos.records[0].label] == label
    with pytest.raises(BadEvaluation, match="belongs to no data set"):
        find_videos(MOTION9, list_file=listed, list_order="mit")


def test_lists_that_cannot_be_used(tmp_path):
    listed = tmp_path / "clips.txt"
    with pytest.raises(NoList, match=r"clips.txt does not exist"):
        find_videos(K400, list_file=listed)
    listed.write_text("a.mp4 arm wrestling\nb.mp4 arm wrestlin\n")
    with pytest.raises(BadList, match=r"line 2: 'b.mp4 arm wrestlin' does not end in a class of 400") as caught:
        find_videos(K400, list_file=listed)
    assert caught.value.reason == "bad_label"
    listed.write_text("a.mp4 400\n")
    with pytest.raises(BadList, match=r"label 400 is not in 0..399"):
        find_videos(K400, list_file=listed)
    listed.write_text("\n")
    with pytest.raises(BadList, match="names no video"):
        find_videos(K400, list_file=listed)
