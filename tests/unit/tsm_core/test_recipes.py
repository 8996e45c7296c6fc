import json
from dataclasses import replace

import pytest

from tsm_core.model import build
from tsm_core.recipes import MOTION9, RECIPES, Recipe, RecipeError, UnknownRecipe, find_recipe, generic


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_builds_and_survives_json(name):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert build(recipe).labels == recipe.labels


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
    with pytest.raises(UnknownRecipe, match="motion9") as caught:
        find_recipe("motion10")
    assert caught.value.reason == "unknown_recipe"
