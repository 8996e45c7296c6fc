"""Every vector of the two originals, short videos included."""

import numpy as np
import pytest

from pipelines import sampling
from pipelines.sampling import NothingToSample, train_indices, validation_indices
from tsm_core.recipes import CLIPS


def rng(seed=0):
    return np.random.default_rng(seed)


def drawn(total, frames, *, times=2000, **more):
    """(times, frames): what training sees of one video in the long run."""
    dice = rng()
    return np.array([train_indices(total, frames, dice, **more) for _ in range(times)])


# --- uniform, in training


@pytest.mark.parametrize("convention", ["mmaction2", "mit"])
@pytest.mark.parametrize(
    ("total", "frames", "first", "last"),
    [
        (300, 8, (0, 36), (259, 295)),
        (37, 8, (0, 3), (28, 31)),
        (8, 8, (0, 0), (7, 7)),
        (9, 8, (0, 0), (7, 7)),
        (100, 16, (0, 5), (90, 95)),
        (250, 16, (0, 14), (225, 239)),
    ],
)
def test_each_segment_gives_any_of_its_frames(total, frames, first, last, convention):
    seen = drawn(total, frames, convention=convention)
    assert (seen[:, 0].min(), seen[:, 0].max()) == first
    assert (seen[:, -1].min(), seen[:, -1].max()) == last
    length = total // frames
    assert (seen // length == np.arange(frames)).all()
    assert all(len(set(column)) == length for column in seen.T)
    if length == 1:
        assert (seen == np.arange(frames)).all()


@pytest.mark.parametrize(
    ("total", "frames", "expected"),
    [
        (7, 8, [0, 1, 2, 3, 4, 4, 5, 6]),
        (6, 8, [0, 1, 2, 2, 3, 4, 4, 5]),
        (5, 8, [0, 1, 1, 2, 2, 3, 4, 4]),
        (4, 8, [0, 0, 1, 2, 2, 2, 3, 0]),  # the last one rounds to 4 and wraps
        (3, 8, [0, 0, 1, 1, 2, 2, 2, 0]),
        (2, 8, [0, 0, 0, 1, 1, 1, 0, 0]),
        (1, 8, [0] * 8),
        (12, 16, [0, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 10, 11]),
        (10, 16, [0, 1, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 9]),
    ],
)
def test_short_videos_in_training(total, frames, expected):
    assert train_indices(total, frames, rng()) == expected
    assert train_indices(total, frames, rng(), convention="mit") == [0] * frames


# --- uniform, in tests

MIDDLES = [
    (300, 8, [18, 56, 93, 131, 168, 206, 243, 281]),
    (250, 16, [7, 23, 39, 54, 70, 85, 101, 117, 132, 148, 164, 179, 195, 210, 226, 242]),
    (100, 8, [6, 18, 31, 43, 56, 68, 81, 93]),
    (37, 8, [2, 6, 11, 16, 20, 25, 30, 34]),
    (10, 8, [0, 1, 3, 4, 5, 6, 8, 9]),
    (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
    (5, 8, [0, 0, 1, 2, 2, 3, 4, 4]),
    (3, 8, [0, 0, 0, 1, 1, 2, 2, 2]),
    (12, 16, [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11]),
]
TWICE = [
    (300, 8, [18, 56, 93, 131, 168, 206, 243, 281], [0, 37, 75, 112, 150, 187, 225, 262]),
    (37, 8, [2, 6, 11, 16, 20, 25, 30, 34], [0, 4, 9, 13, 18, 23, 27, 32]),
    (10, 8, [0, 1, 3, 4, 5, 6, 8, 9], [0, 1, 2, 3, 5, 6, 7, 8]),
    (5, 8, [0, 0, 1, 2, 2, 3, 4, 4], [0, 0, 1, 1, 2, 3, 3, 4]),
    (
        45,
        16,
        [1, 4, 7, 9, 12, 15, 18, 21, 23, 26, 29, 32, 35, 37, 40, 43],
        [0, 2, 5, 8, 11, 14, 16, 19, 22, 25, 28, 30, 33, 36, 39, 42],
    ),
    (8, 8, list(range(8)), list(range(8))),
]


@pytest.mark.parametrize("convention", ["mmaction2", "mit"])
@pytest.mark.parametrize(("total", "frames", "expected"), MIDDLES)
def test_middles(total, frames, expected, convention):
    assert sampling.test_indices(total, frames, convention=convention) == expected


@pytest.mark.parametrize("convention", ["mmaction2", "mit"])
@pytest.mark.parametrize(("total", "frames", "middles", "beginnings"), TWICE)
def test_twice(total, frames, middles, beginnings, convention):
    assert sampling.test_indices(total, frames, clips="twice", convention=convention) == middles + beginnings


@pytest.mark.parametrize("frames", [8, 16])
def test_powers_of_two_have_an_exact_form(frames):
    for total in range(1, 2001):
        expected = [((2 * i + 1) * total) // (2 * frames) for i in range(frames)]
        expected += [(i * total) // frames for i in range(frames)]
        assert sampling.test_indices(total, frames, clips="twice") == expected


def test_other_numbers_keep_the_originals_rounding():
    step = 6 / 7
    assert sampling.test_indices(6, 7) == [int(i * step + step / 2) for i in range(7)]


# --- dense

STARTS = [
    (300, [0, 26, 52, 78, 104, 131, 157, 183, 209, 236]),
    (64, [0] * 10),
    (65, [0] * 9 + [1]),
    (70, [0, 0, 1, 2, 2, 3, 4, 4, 5, 6]),
    (40, [0] * 10),
]


@pytest.mark.parametrize("convention", ["mmaction2", "mit"])
@pytest.mark.parametrize(("total", "starts"), STARTS)
def test_dense_clips(total, starts, convention):
    found = np.reshape(sampling.test_indices(total, 8, clips="dense", convention=convention), (10, 8))
    assert found[:, 0].tolist() == starts
    assert (found == (np.array(starts)[:, None] + 8 * np.arange(8)) % total).all()


@pytest.mark.parametrize(
    ("total", "frames", "first", "last"),
    [
        (300, 8, [0, 8, 16, 24, 32, 40, 48, 56], [236, 244, 252, 260, 268, 276, 284, 292]),
        (64, 8, [0, 8, 16, 24, 32, 40, 48, 56], [0, 8, 16, 24, 32, 40, 48, 56]),
        (65, 8, [0, 8, 16, 24, 32, 40, 48, 56], [1, 9, 17, 25, 33, 41, 49, 57]),
        (70, 8, [0, 8, 16, 24, 32, 40, 48, 56], [6, 14, 22, 30, 38, 46, 54, 62]),
        (40, 8, [0, 8, 16, 24, 32, 0, 8, 16], [0, 8, 16, 24, 32, 0, 8, 16]),
        (100, 16, list(range(0, 64, 4)), list(range(36, 100, 4))),
    ],
)
def test_first_and_last_dense_clip(total, frames, first, last):
    found = sampling.test_indices(total, frames, clips="dense")
    assert len(found) == 10 * frames
    assert found[:frames] == first
    assert found[-frames:] == last


def test_dense_starts_with_sixteen_frames():
    found = sampling.test_indices(100, 16, clips="dense")
    assert found[::16] == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]


@pytest.mark.parametrize("convention", ["mmaction2", "mit"])
@pytest.mark.parametrize(("total", "latest"), [(40, 0), (64, 0), (65, 0), (66, 1), (70, 5), (100, 35)])
def test_a_dense_training_clip_never_starts_at_the_last_position(total, latest, convention):
    seen = drawn(total, 8, dense=True, convention=convention, times=1000)
    assert set(seen[:, 0]) == set(range(latest + 1))
    assert (seen == (seen[:, :1] + 8 * np.arange(8)) % total).all()


# --- between two epochs


@pytest.mark.parametrize(
    ("total", "frames", "one_based"),
    [
        (300, 8, [19, 57, 94, 132, 169, 207, 244, 282]),
        (37, 8, [3, 7, 12, 17, 21, 26, 31, 35]),
        (10, 8, [1, 2, 4, 5, 6, 7, 9, 10]),
        (9, 8, [1, 2, 3, 4, 6, 7, 8, 9]),
        (8, 8, [1] * 8),
        (5, 8, [1] * 8),
        (100, 16, [4, 10, 16, 22, 29, 35, 41, 47, 54, 60, 66, 72, 79, 85, 91, 97]),
    ],
)
def test_mit_validation(total, frames, one_based):
    assert validation_indices(total, frames, rng(), convention="mit") == [i - 1 for i in one_based]
    assert validation_indices(total, frames, rng()) == sampling.test_indices(total, frames)


@pytest.mark.parametrize(
    ("total", "frames", "clips", "one_based"),
    [
        (300, 8, "uniform", [19, 57, 94, 132, 169, 207, 244, 282]),
        (37, 8, "uniform", [3, 7, 12, 17, 21, 26, 31, 35]),
        (8, 8, "uniform", [1, 2, 3, 4, 5, 6, 7, 8]),
        (5, 8, "uniform", [1, 1, 2, 3, 3, 4, 5, 5]),
        (100, 16, "uniform", [4, 10, 16, 22, 29, 35, 41, 47, 54, 60, 66, 72, 79, 85, 91, 97]),
        (37, 8, "twice", [3, 7, 12, 17, 21, 26, 31, 35, 1, 5, 10, 14, 19, 24, 28, 33]),
        (5, 8, "twice", [1, 1, 2, 3, 3, 4, 5, 5, 1, 1, 2, 2, 3, 4, 4, 5]),
    ],
)
def test_mit_test(total, frames, clips, one_based):
    found = sampling.test_indices(total, frames, clips=clips, convention="mit")
    assert found == [i - 1 for i in one_based]


def test_dense_validation():
    dice = rng()
    starts = {validation_indices(70, 8, dice, dense=True, convention="mit")[0] for _ in range(300)}
    assert starts == {0, 1, 2, 3, 4, 5}
    assert len(validation_indices(70, 8, dice, dense=True, convention="mit")) == 8
    assert validation_indices(70, 8, dice, dense=True) == sampling.test_indices(70, 8, clips="dense")


# --- always


@pytest.mark.parametrize("convention", ["mmaction2", "mit"])
def test_indices_are_whole_and_lie_in_the_video(convention):
    dice = rng()
    for total in [*range(1, 80), 1000]:
        for frames in (1, 7, 8, 16):
            for dense in (False, True):
                for rule in (train_indices, validation_indices):
                    found = rule(total, frames, dice, dense=dense, convention=convention)
                    assert all(type(i) is int and 0 <= i < total for i in found)
            for clips, count in CLIPS.items():
                found = sampling.test_indices(total, frames, clips=clips, convention=convention)
                assert len(found) == count * frames
                assert all(type(i) is int and 0 <= i < total for i in found)


def test_the_same_dice_give_the_same_frames():
    assert train_indices(300, 8, rng(5)) == train_indices(300, 8, rng(5)) != train_indices(300, 8, rng(6))


@pytest.mark.parametrize(("total", "frames", "said"), [(0, 8, "0 frames"), (-1, 8, "-1 frames"), (8, 0, "0 frames")])
def test_nothing_to_sample(total, frames, said):
    for rule in (train_indices, validation_indices):
        for convention in ("mmaction2", "mit"):
            for dense in (False, True):
                with pytest.raises(NothingToSample, match=said):
                    rule(total, frames, rng(), dense=dense, convention=convention)
    for clips in CLIPS:
        with pytest.raises(NothingToSample, match=said):
            sampling.test_indices(total, frames, clips=clips)
