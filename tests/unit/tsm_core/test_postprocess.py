import json
import math

import pytest
import torch

from tsm_core.errors import ShapeError
from tsm_core.labels import labels_of
from tsm_core.postprocess import GestureSmoother, Smoother, SmootherMismatch, new_smoother
from tsm_core.recipes import MOTION9, find_recipe

LABELS = ("a", "b", "c")


def logits_of(*probabilities):
    return torch.tensor(probabilities).log()


def test_first_row_is_its_softmax():
    values = Smoother(LABELS, 1.0).update(torch.tensor([1.0, 2.0, 1000.0]), 5.0)
    assert values == pytest.approx((0, 0, 1))
    assert Smoother(LABELS, 1.0).update(logits_of(0.2, 0.3, 0.5), 0.0) == pytest.approx((0.2, 0.3, 0.5))


def test_after_one_time_constant_a_step_is_63_percent_done_at_any_rate():
    for fps in (1, 7, 30, 200):
        smoother = Smoother(LABELS, 1.0)
        smoother.update(logits_of(1.0, 1e-9, 1e-9), 0.0)
        for n in range(1, fps + 1):
            values = smoother.update(logits_of(1e-9, 1.0, 1e-9), n / fps)
        assert values[1] == pytest.approx(1 - math.exp(-1), abs=1e-6)
        assert sum(values) == pytest.approx(1)


def test_zero_smoothing_and_reset_forget_the_past():
    plain = Smoother(LABELS, 0.0)
    plain.update(logits_of(0.8, 0.1, 0.1), 0.0)
    assert plain.update(logits_of(0.1, 0.1, 0.8), 0.0) == pytest.approx((0.1, 0.1, 0.8))
    slow = Smoother(LABELS, 100.0)
    slow.update(logits_of(0.8, 0.1, 0.1), 0.0)
    assert slow.update(logits_of(0.1, 0.1, 0.8), -5.0) == pytest.approx((0.8, 0.1, 0.1))  # time went back: no time
    slow.reset()
    assert slow.update(logits_of(0.1, 0.1, 0.8), 1.0) == pytest.approx((0.1, 0.1, 0.8))


def test_state_goes_on_elsewhere():
    one, two = Smoother(LABELS, 2.0), Smoother(LABELS, 2.0)
    two.restore(json.loads(json.dumps(one.state())))
    for n in range(5):
        row = torch.randn(3, generator=torch.Generator().manual_seed(n))
        assert one.update(row, n / 3) == two.update(row.tolist(), n / 3)
        two = Smoother(LABELS, 2.0)
        two.restore(json.loads(json.dumps(one.state())))


def test_rows_that_cannot_be_scores():
    smoother = Smoother(LABELS, 1.0)
    with pytest.raises(ShapeError, match=r"must be \(3,\), got \(2,\)"):
        smoother.update([0.0, 1.0], 0.0)
    with pytest.raises(ValueError, match="not finite"):
        smoother.update([0.0, float("nan"), 1.0], 0.0)
    with pytest.raises(ShapeError, match="2 values for 3 labels"):
        smoother.restore({"values": [0.5, 0.5], "time_s": 0.0})


# ---- the online gestures

GESTURES = labels_of("jester", "mit")


def authors_rules(rows):
    """Labels by the rules as the authors write them, with class numbers; starts that would fail are let through."""
    history, logits, told = [2], [], []
    for row in rows:
        logits = [*logits, row][-12:]
        index = max(range(27), key=lambda k: sum(one[k] for one in logits))
        if index in (3, 7, 8, 21, 22):
            index = history[-1]
        if index == 0:
            index = 2
        if index != history[-1] and len(history) >= 2 and history[-1] != history[-2]:
            index = history[-1]
        history = [*history, index][-20:]
        told.append(history[-1])
    return told


@pytest.mark.parametrize("seed", range(4))
def test_gestures_follow_the_authors_rules(seed):
    rows = torch.randn(200, 27, generator=torch.Generator().manual_seed(seed)) * 3
    rows = [row + 4 * torch.nn.functional.one_hot(torch.tensor((n // 9 * 5) % 27), 27) for n, row in enumerate(rows)]
    smoother = GestureSmoother(GESTURES)
    told = []
    for n, row in enumerate(rows):
        values = smoother.update(row, n / 15)
        assert sum(values) == pytest.approx(1)
        told.append(max(range(27), key=values.__getitem__))
        if n == 100:  # moves house
            moved = GestureSmoother(GESTURES)
            moved.restore(json.loads(json.dumps(smoother.state())))
            smoother = moved
    wanted = authors_rules([row.tolist() for row in rows])
    assert told == wanted
    assert len(set(wanted)) > 3
    assert not set(wanted) & {0, 3, 7, 8, 21, 22}


def test_gestures_forget_and_refuse():
    smoother = GestureSmoother(GESTURES)
    one = [0.0] * 27
    one[20] = 5.0
    assert GESTURES[max(range(27), key=smoother.update(one, 0.0).__getitem__)] == "Thumb Up"
    smoother.reset()
    assert smoother.state() == {"rows": [], "history": [2]}
    with pytest.raises(ShapeError, match="another smoother"):
        smoother.restore({"values": None, "time_s": 0.0})
    with pytest.raises(ShapeError, match="another smoother"):
        Smoother(LABELS, 1.0).restore(smoother.state())
    with pytest.raises(ShapeError, match=r"must be \(27,\)"):
        smoother.update([0.0], 0.0)
    with pytest.raises(SmootherMismatch, match=r"No gesture, .* are missing"):
        GestureSmoother(LABELS)


def test_the_recipe_names_its_smoother():
    online = find_recipe("mobilenetv2_jester_online")
    assert isinstance(new_smoother(online), GestureSmoother)
    assert isinstance(new_smoother(online, "exponential"), Smoother)
    plain = new_smoother(MOTION9)
    assert isinstance(plain, Smoother)
    assert plain.smoothing_s == MOTION9.smoothing_s
    with pytest.raises(SmootherMismatch):
        new_smoother(MOTION9, "gesture")
