"""Metrics against figures worked out by hand."""

import numpy as np
import pytest

from pipelines.metrics import class_scores, class_table, confusion_matrix, mean_class_accuracy, ranking, top_k_accuracy
from tsm_core.errors import ShapeError

SCORES = np.array(
    [
        [0.1, 0.2, 0.3, 0.4, 0.0, 0.0],  # 3 2 1 0 5 4
        [0.9, 0.0, 0.0, 0.0, 0.1, 0.0],  # 0 4 5 3 2 1
        [0.2, 0.2, 0.2, 0.2, 0.2, 0.0],  # 4 3 2 1 0 5
        [0.0, 0.5, 0.5, 0.0, 0.0, 0.0],  # 2 1 5 4 3 0
    ]
)


def test_the_later_of_equal_scores_ranks_first():
    assert ranking(SCORES).tolist() == [[3, 2, 1, 0, 5], [0, 4, 5, 3, 2], [4, 3, 2, 1, 0], [2, 1, 5, 4, 3]]
    assert ranking(SCORES, 1).tolist() == [[3], [0], [4], [2]]
    assert ranking([[0.3, 0.7]], 5).tolist() == [[1, 0]]  # fewer classes than ranks


@pytest.mark.parametrize(
    ("labels", "k", "expected"),
    [
        ([3, 0, 4, 2], 1, 1.0),
        ([3, 0, 4, 1], 1, 0.75),  # a tie lost
        ([3, 0, 4, 1], 2, 1.0),
        ([4, 1, 5, 0], 5, 0.0),  # the last of six each time
        ([5, 2, 0, 3], 5, 1.0),
        ([0, 1, 0, 0], 4, 0.25),
    ],
)
def test_top_k(labels, k, expected):
    assert top_k_accuracy(ranking(SCORES), labels, k) == expected


def test_top_five_of_three_classes_is_everything():
    ranks = ranking(np.eye(3), 5)
    assert top_k_accuracy(ranks, [2, 0, 1], 1) == 0.0
    assert top_k_accuracy(ranks, [2, 0, 1], 5) == 1.0


def test_confusion_counts_truth_by_row():
    matrix = confusion_matrix([1, 1, 0, 3], [1, 0, 0, 0], 4)
    assert matrix.tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize(
    ("predicted", "labels", "mmaction2", "mit"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 0], (2 / 3 + 1) / 2, (2 / 3 + 1) / 2),
        ([0, 3, 1, 1], [0, 0, 1, 0], (1 / 3 + 1 + 0) / 3, (1 / 3 + 1) / 2),  # 3 is only predicted
        ([1, 1], [0, 0], 0.0, 0.0),
        ([2], [2], 1.0, 1.0),  # the absent ones do not count
    ],
)
def test_mean_class_accuracy_of_both_conventions(predicted, labels, mmaction2, mit):
    matrix = confusion_matrix(predicted, labels, 5)
    assert mean_class_accuracy(matrix) == pytest.approx(mmaction2)
    assert mean_class_accuracy(matrix, "mit") == pytest.approx(mit)


def test_a_row_per_class():
    matrix = confusion_matrix([0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 2, 2], 4)
    rows = class_scores(matrix, ["run", "walk", "sit", "fly"])
    told = [(row.label, row.videos, row.correct, row.accuracy, row.taken_for, row.times) for row in rows]
    assert told == [
        ("run", 4, 1, 0.25, "walk", 2),
        ("walk", 0, 0, None, None, 0),
        ("sit", 2, 2, 1.0, None, 0),
        ("fly", 0, 0, None, None, 0),
    ]


def test_the_table_as_csv_and_markdown():
    rows = class_scores(confusion_matrix([0, 1, 1], [0, 0, 0], 2), ["a, b", "c|d"])
    assert class_table(rows) == (
        'class,label,videos,correct,accuracy,taken for,times\n0,"a, b",3,1,33.33,c|d,2\n1,c|d,0,0,,,\n'
    )
    assert class_table(rows, markdown=True).splitlines()[2:] == [
        "| 0 | a, b | 3 | 1 | 33.33 | c/d | 2 |",
        "| 1 | c/d | 0 | 0 |  |  |  |",
    ]


def test_nothing_is_no_accuracy():
    with pytest.raises(ShapeError, match="no predictions"):
        top_k_accuracy(np.zeros((0, 5)), [])
    with pytest.raises(ShapeError, match="2 predictions for 1 labels"):
        confusion_matrix([1, 2], [1], 3)
    with pytest.raises(ShapeError, match="no predictions"):
        mean_class_accuracy(np.zeros((3, 3), np.int64))
