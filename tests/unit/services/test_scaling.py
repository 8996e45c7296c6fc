"""The autoscaling policy is arithmetic on what the replicas report."""

from types import SimpleNamespace

import pytest

from services.scaling import SlotsInUse


def wanted(used: list[int], slots: int = 10, target: float = 0.5) -> int:
    reported = {
        "slots_used": {f"engine-{index}": float(count) for index, count in enumerate(used)},
        "slots_total": {f"engine-{index}": float(slots) for index in range(len(used))},
    }
    count, state = SlotsInUse(target)(SimpleNamespace(aggregated_metrics=reported, target_num_replicas=len(used)))
    assert state == {}
    return count


@pytest.mark.parametrize(
    ("used", "replicas"), [([0], 1), ([5], 1), ([6], 2), ([10, 10], 4), ([5, 5, 0], 2), ([0, 0, 0], 1), ([1, 0, 0], 1)]
)
def test_replicas_for_the_streams_that_are_served(used: list[int], replicas: int):
    assert wanted(used) == replicas


@pytest.mark.parametrize("target", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("streams", range(0, 60, 7))
def test_enough_and_not_one_too_many(streams: int, target: float):
    count = wanted([streams], target=target)
    assert streams <= count * 10 * target + 1e-6
    assert count == 1 or streams > (count - 1) * 10 * target - 1e-6


def test_without_a_report_nothing_changes():
    assert SlotsInUse()(SimpleNamespace(aggregated_metrics={}, target_num_replicas=3)) == (3, {})


@pytest.mark.parametrize("target", [0.0, -1.0, 1.5])
def test_a_share_is_a_share(target: float):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        SlotsInUse(target)
