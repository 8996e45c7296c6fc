import json
import math

import pytest
import torch

from tsm_core.errors import ShapeError
from tsm_core.postprocess import Smoother

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
