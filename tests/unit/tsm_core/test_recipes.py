import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tsm_core.recipes import (
    MOTION9,
    PAGE_ROWS,
    RECIPES,
    Accuracy,
    Published,
    Recipe,
    RecipeError,
    Training,
    UnknownRecipe,
    Views,
    find_recipe,
    generic,
    twin,
)


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_survives_json(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_the_demo_row():
    assert MOTION9.labels == (
        "left", "right", "up", "down", "clockwise", "counter-clockwise", "grow", "shrink", "still",
    )  # fmt: skip
    assert (MOTION9.background, MOTION9.shift, MOTION9.frames, MOTION9.preprocess.input_px) == (
        ("still",),
        "uni",
        16,
        64,
    )


@pytest.mark.parametrize(
    ("backbone", "shift", "name"),
    [
        ("resnet50", "bi", "tsm_r50"),
        ("resnet101", "uni", "tsm_r101_uni"),
        ("mobilenet_v2", "uni", "tsm_mobilenetv2_uni"),
        ("mobilenet_v2", "none", "tsm_mobilenetv2_none"),
    ],
)
def test_generic_rows_are_named_after_what_they_are(backbone, shift, name):
    recipe = generic(backbone, shift, ["a", "b"], frames=16)
    assert (recipe.name, recipe.frames, recipe.shift_div, recipe.labels) == (name, 16, 8, ("a", "b"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": ()}, "labels are empty"),
        ({"labels": ("a", "a"), "background": ()}, "not unique"),
        ({"background": ("standing",)}, "standing"),
        ({"shift": "both"}, "'both'"),
        ({"start": "ones"}, "'ones'"),
        ({"frames": 0}, "frames 0"),
        ({"shift_div": 1}, "shift_div 1"),
        ({"threshold": 1.5}, r"threshold 1\.5"),
        ({"off_threshold": 0.9}, r"off_threshold 0\.9 must be in \[0, threshold 0\.6\]"),
        ({"window_s": 0}, "window_s 0"),
        ({"min_action_s": -1}, "min_action_s -1"),
        ({"non_local": "gauss"}, "'gauss'"),
        ({"non_local": "gaussian"}, "stand in a resnet50, not in resnet_small"),
        ({"temporal_pool": True}, "neither non_local nor temporal_pool"),
        ({"temporal_pool": True, "shift": "bi", "frames": 7}, "even number of frames, not 7"),
        ({"smoother": "mean"}, "'mean'"),
        ({"convention": "torch"}, "'torch'"),
        ({"data": "zip"}, "'zip'"),
    ],
)
def test_a_recipe_checks_itself(change, says):
    with pytest.raises(RecipeError, match=says):
        replace(MOTION9, **change)


def test_foreign_json_is_refused_by_name():
    data = json.loads(MOTION9.to_json())
    with pytest.raises(RecipeError, match="unknown fields colour in a Recipe"):
        Recipe.from_json(json.dumps({**data, "colour": 1}))
    with pytest.raises(RecipeError, match="unknown fields crop in a PreprocessSpec"):
        Recipe.from_json(json.dumps({**data, "preprocess": {"crop": 1}}))
    del data["backbone"]
    with pytest.raises(RecipeError, match="backbone"):
        Recipe.from_json(json.dumps(data))
    for text in ("{", "[]", "7"):
        with pytest.raises(RecipeError):
            Recipe.from_json(text)


def test_unknown_row_lists_the_rows():
    with pytest.raises(UnknownRecipe, match="did you mean motion9") as caught:
        find_recipe("motion10")
    assert caught.value.reason == "unknown_recipe"


PAGE_FACTS = (
    Path(os.environ.get("TSM_REFERENCE_DIR", Path(__file__).parents[4] / "shared" / "reference")) / "recipes.yaml"
)
BACKBONES = {"ResNet50": "resnet50", "ResNet101": "resnet101", "MobileNetV2": "mobilenet_v2"}
AUGMENT = {
    "imgaug_randaugment": "imgaug_randaugment", "ptv_randaugment": "ptv_randaugment", "ptv_augmix": "ptv_augmix",
}  # fmt: skip
TRAIN_CROPS = {"multi_scale_crop": "multi_scale", "random_resized_crop": "random_resized"}


def views_of(facts):
    clips = "dense" if facts["temporal"].startswith("dense") else "twice" if facts["temporal_clips"] == 2 else "uniform"
    views = Views(clips, facts["crop"], facts["crop_size"])
    assert views.total == facts["total_views"]
    return views


def score_of(facts, kind, setting):
    """(top-1, top-5) as the page prints it, None where it prints nothing."""
    pair = []
    for name in (f"{kind}top1", f"{kind}top5"):
        value = facts.get(name)
        pair.append(value.get(setting) if isinstance(value, dict) else value if setting == "accurate" else None)
    return None if pair == [None, None] else Accuracy(*pair)


def test_the_page_says_what_the_table_says():
    """Every row against the facts that were collected from the configurations and the page."""
    if not PAGE_FACTS.is_file():
        pytest.skip(f"no collected facts at {PAGE_FACTS}; set TSM_REFERENCE_DIR to their folder")
    page = yaml.safe_load(PAGE_FACTS.read_text())["recipes"]
    assert [row.name for row in PAGE_ROWS] == list(page)
    for row, facts in zip(PAGE_ROWS, page.values(), strict=True):
        model, train, evaluation = facts["model"], facts["train_pipeline"], facts["eval"]
        ops = {op["op"]: op for op in train}
        said = {
            "backbone": BACKBONES[model["backbone"]], "frames": model["num_segments"], "shift_div": model["shift_div"],
            "dropout": model["head"]["dropout"], "labels": model["head"]["num_classes"], "dataset": facts["dataset"],
            "non_local": model["non_local"]["type"] if model["non_local"] else None,
            "data": "videos" if facts["data_format"] == "video" else "rawframes",
            "stored": facts["stored_resolution"]["seed"] or "", "convention": "mmaction2",
            "efficient": views_of((evaluation.get("efficient") or evaluation["val_during_training"])["views"]),
            "accurate": views_of((evaluation.get("accurate") or evaluation["reported"])["views"]),
            "mean": [round(value * 255, 3) for value in row.preprocess.mean],
            "url": facts["checkpoint"]["ckpt_url"], "sha256": facts["checkpoint"]["ckpt_hash_prefix"],
        }  # fmt: skip
        ours = {
            **{name: getattr(row, name) for name in said if hasattr(row, name)},
            "labels": len(row.labels), "mean": facts["normalization"]["mean"], "url": row.checkpoint.url,
            "sha256": row.checkpoint.sha256,
        }  # fmt: skip
        assert ours == said, row.name
        optimizer, schedule, flip = facts["optimizer"], facts["lr_schedule"], ops.get("flip")
        pairs = sorted({tuple(sorted(pair)) for pair in (flip or {}).get("flip_label_map", {}).items()})
        blend = facts["batch_blending"]
        load_from = facts["pretrain"]["load_from"]
        assert row.training == Training(
            epochs=facts["epochs"],
            milestones=tuple(schedule["milestones_epochs"]),
            lr=optimizer["lr"],
            lr_batch=optimizer["lr_is_for_total_batch"],
            batch=facts["total_batch"],
            gpus=facts["gpus"]["count"],
            weight_decay=optimizer["weight_decay"],
            momentum=optimizer["momentum"],
            clip_norm=optimizer["grad_clip"]["max_norm"],
            clips="dense" if ops["sample_frames"]["strategy"] == "dense" else "uniform",
            crop=next(TRAIN_CROPS[name] for name in ops if name in TRAIN_CROPS),
            flip=flip is not None,
            flip_pairs=tuple(pairs),
            augment=next((AUGMENT[name] for name in ops if name in AUGMENT), "none"),
            blend=blend["type"] if blend else "none",
            partial_bn=model["partial_bn"],
            gpu_normalize="gpu" in facts["normalization"]["where"],
            init=next((other.name for other in PAGE_ROWS if other.checkpoint.url == load_from), None)
            or facts["pretrain"]["backbone_init"].partition("://")[2],
            validate_epochs=evaluation["val_during_training"]["interval_epochs"],
        ), row.name
        groups = [(group["lr_mult"], group["decay_mult"]) for group in optimizer["param_groups"]]
        assert [(lr, decay) for _, lr, decay in row.training.groups] == groups
        reported, metafile = facts["reported"], facts["checkpoint"].get("metafile") or {}
        speed = reported["inference_time_video_per_s"]
        assert replace(row.published, notes=()) == Published(
            "MMAction2 v0.24.1",
            efficient=score_of(reported, "", "efficient"),
            accurate=score_of(reported, "", "accurate"),
            reference_efficient=score_of(reported, "reference_", "efficient"),
            reference_accurate=score_of(reported, "reference_", "accurate"),
            gpu_mem_mb=reported["gpu_mem_mb"],
            videos_per_s=speed["value"] if speed else None,
            params=metafile.get("params", row.published.params),
            flops=metafile.get("flops", row.published.flops),
        ), row.name


def test_every_row_has_its_twin_and_no_twin_has_public_weights():
    twins = [row for row in RECIPES.values() if row.name.endswith("_uni")]
    assert len(twins) == 33
    for row in twins:
        page = find_recipe(row.name.removesuffix("_uni"))
        assert (row.shift, row.steppable, row.checkpoint, row.published) == ("uni", True, None, None)
        assert replace(row, name=page.name, shift="bi", checkpoint=page.checkpoint, published=page.published) == page
    with pytest.raises(RecipeError, match="neither non_local nor temporal_pool"):
        twin(find_recipe("tsm_nl_gaussian_r50_1x1x8_50e_kinetics400_rgb"))


def test_rows_beyond_the_page():
    later = [row for row in RECIPES.values() if row.published and row.published.source == "MMAction2 v1.2.0"]
    assert len(later) == 11
    assert all((row.data, row.training.batch, row.training.lr) == ("videos", 128, 0.02) for row in later)
    assert all(row.checkpoint.sha256 and row.checkpoint.sha256 in row.checkpoint.url for row in later)
    theirs = [row for row in RECIPES.values() if row.published and row.published.source == "mit-han-lab"]
    assert len(theirs) == 13
    assert all(row.convention == row.preprocess.convention == "mit" and row.preprocess.antialias for row in theirs)
    assert all(row.checkpoint.sha256 is None for row in theirs)
    online = find_recipe("mobilenetv2_jester_online")
    assert (online.steppable, len(online.labels), online.labels[2]) == (True, 27, "No gesture")
