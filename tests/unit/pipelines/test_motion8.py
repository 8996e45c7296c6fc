import numpy as np
import pytest
import torch

from pipelines.motion8 import TEST_PAIRS, Motion8, draw_clip
from pipelines.training_data import open_training_data
from tsm_core.labels import labels_of
from tsm_core.recipes import find_recipe


def moved(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().mean())


def test_the_test_set_holds_both_directions_of_every_clip():
    val = Motion8("val")
    assert len(val) == 2 * TEST_PAIRS
    labels = []
    for number in range(0, 40, 2):
        (forth, label), (back, opposite) = val.clip(number), val.clip(number + 1)
        assert (label % 2, opposite) == (0, label + 1)
        assert torch.equal(back, forth.flip(0))
        labels.append(label)
    assert set(labels) == {0, 2, 4, 6}
    opposites = {frozenset(labels_of("motion8")[i : i + 2]) for i in range(0, 8, 2)}
    assert frozenset(("left", "right")) in opposites


def test_any_clip_follows_from_its_number():
    one, other = Motion8("train"), Motion8("train")
    for number in (0, 7, 2399):
        (frames, label), (again, same) = one.clip(number), other.clip(number)
        assert torch.equal(frames, again)
        assert label == same
        assert (frames.dtype, tuple(frames.shape)) == (torch.uint8, (8, 3, 64, 64))
    counts = np.bincount([one.clip(number)[1] for number in range(160)], minlength=8)
    assert counts.min() >= 8
    assert not torch.equal(one.clip(0)[0], Motion8("val").clip(0)[0])
    with pytest.raises(IndexError):
        one.clip(2400)


def test_a_motion_is_what_it_is_called():
    """A roll of the pixels to the right, or down, brings each frame closest to the next."""
    frames = draw_clip(np.random.default_rng(3), 0)
    best = [min(range(-6, 7), key=lambda by, t=t: moved(frames[t + 1], frames[t].roll(by, 2))) for t in range(7)]
    assert all(1 <= by <= 5 for by in best)
    down = draw_clip(np.random.default_rng(3), 1)
    best = [min(range(-6, 7), key=lambda by, t=t: moved(down[t + 1], down[t].roll(by, 1))) for t in range(7)]
    assert all(1 <= by <= 5 for by in best)


def test_the_recipes_train_on_it():
    for name, shift in (("motion8_tsm", "uni"), ("motion8_tsn", "none")):
        recipe = find_recipe(name)
        assert (recipe.shift, recipe.labels) == (shift, labels_of("motion8"))
        data = open_training_data(recipe, None)
        assert (len(data.train), len(data.val), data.train.classes) == (2400, 400, 8)
