"""Sequences through `tsm serve` and the public tritonclient: many at once, and while a replica is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import psutil
import pytest

from tests.benchmark.sequences import films, judge, load, serving, sound

pytestmark = pytest.mark.slow


def test_two_hundred_sequences_do_not_meet():
    pictures = films()
    with serving(slots=200) as (_, address):
        told = asyncio.run(load(address, pictures, 200, 20.0))
    figures = judge(pictures, told, 20.0)
    assert sound(figures), figures


def test_no_sequence_fails_when_a_replica_is_killed():
    pictures = films()
    with serving(slots=16, heartbeat_ttl_ms=3_000) as (process, address):
        killer = threading.Thread(target=_kill_a_replica, args=(process.pid, 6.0))
        killer.start()
        told = asyncio.run(load(address, pictures, 8, 20.0))
        killer.join()
    assert [error for one in told for error in one.errors] == []
    assert any(len(one.epochs) > 1 for one in told)
    for one in told:
        steps = {after - before for before, after in zip(one.numbers, one.numbers[1:], strict=False)}
        assert max(steps) == 1  # no frame is counted twice; those since the last snapshot may be lost


def _kill_a_replica(service: int, after_s: float) -> None:
    time.sleep(after_s)
    replicas = [
        one for one in psutil.Process(service).children(recursive=True) if "Engine" in " ".join(one.cmdline()[:1])
    ]
    assert len(replicas) == 2, [one.cmdline()[:1] for one in psutil.Process(service).children(recursive=True)]
    os.kill(replicas[0].pid, signal.SIGKILL)
