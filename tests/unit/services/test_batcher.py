import threading
import time

import torch

from services.batcher import Batcher
from services.frame_queue import FrameQueue
from tsm_core.frame import Frame

IMAGE = torch.zeros(3, 4, 4, dtype=torch.uint8)


def frame(stream_id: str, number: int) -> Frame:
    return Frame(stream_id, number, IMAGE, float(number), float(number), (4, 4))


def put(batcher: Batcher, queue: FrameQueue, stream_id: str, number: int) -> None:
    if queue.put(frame(stream_id, number)):
        batcher.ready(queue)


def streams(batcher: Batcher, count: int, **options: float) -> dict[str, FrameQueue]:
    queues = {f"s{i}": FrameQueue(**options) for i in range(count)}  # type: ignore[arg-type]
    for queue in queues.values():
        batcher.open(queue)
    return queues


def names(rows) -> list[str]:
    return [row.frame.stream_id for row in rows]


def test_one_frame_per_stream_and_the_next_one_in_the_next_batch():
    batcher = Batcher(max_batch=8, max_wait_s=0.0)
    queue = FrameQueue(capacity=2)
    batcher.open(queue)
    put(batcher, queue, "a", 0)
    put(batcher, queue, "a", 1)
    assert [row.frame.number for row in batcher.take(1.0)] == [0]
    assert [row.frame.number for row in batcher.take(1.0)] == [1]
    assert batcher.take(0.01) == []


def test_earliest_deadline_first_when_more_are_ready_than_fit():
    batcher = Batcher(max_batch=2, max_wait_s=0.0)
    queues = streams(batcher, 3)
    for name in ("s2", "s0", "s1"):
        put(batcher, queues[name], name, 0)
        time.sleep(0.002)
    assert names(batcher.take(1.0)) == ["s2", "s0"]
    put(batcher, queues["s2"], "s2", 1)
    assert names(batcher.take(1.0)) == ["s1", "s2"]  # the one left behind comes first


def test_a_fast_camera_keeps_its_turn_though_its_frame_is_always_young():
    batcher = Batcher(max_batch=1, max_wait_s=0.0)
    queues = streams(batcher, 2)
    put(batcher, queues["s0"], "s0", 0)
    time.sleep(0.002)
    put(batcher, queues["s1"], "s1", 0)
    time.sleep(0.002)
    put(batcher, queues["s0"], "s0", 1)  # newer than s1's, but s0 waited longer
    rows = batcher.take(1.0)
    assert names(rows) == ["s0"]
    assert rows[0].frame.number == 1


def test_it_waits_for_company_but_no_longer_than_told():
    batcher = Batcher(max_batch=8, max_wait_s=0.05)
    queues = streams(batcher, 3)
    start = time.monotonic()
    put(batcher, queues["s0"], "s0", 0)
    threading.Timer(0.01, put, (batcher, queues["s1"], "s1", 0)).start()
    assert sorted(names(batcher.take(1.0))) == ["s0", "s1"]
    assert 0.045 <= time.monotonic() - start < 0.5


def test_it_leaves_at_once_when_every_stream_is_ready():
    batcher = Batcher(max_batch=8, max_wait_s=5.0)
    queues = streams(batcher, 2)
    for name, queue in queues.items():
        put(batcher, queue, name, 0)
    start = time.monotonic()
    assert len(batcher.take(1.0)) == 2
    assert time.monotonic() - start < 1.0


def test_a_loop_that_was_busy_does_not_wait_again():
    batcher = Batcher(max_batch=8, max_wait_s=0.2)
    queues = streams(batcher, 2)
    put(batcher, queues["s0"], "s0", 0)
    time.sleep(0.25)  # a long step
    start = time.monotonic()
    assert names(batcher.take(1.0)) == ["s0"]
    assert time.monotonic() - start < 0.1


def test_frames_too_old_make_no_batch():
    batcher = Batcher(max_batch=8, max_wait_s=0.0)
    queues = streams(batcher, 1, max_age_s=0.01)
    put(batcher, queues["s0"], "s0", 0)
    time.sleep(0.02)
    assert batcher.take(0.01) == []
    assert queues["s0"].dropped == {"age": 1}


def test_a_stream_that_left_is_not_taken():
    batcher = Batcher(max_batch=8, max_wait_s=0.0)
    queues = streams(batcher, 2)
    for name, queue in queues.items():
        put(batcher, queue, name, 0)
    batcher.leave(queues["s0"])
    assert names(batcher.take(1.0)) == ["s1"]
    put(batcher, queues["s0"], "s0", 1)
    assert batcher.take(0.01) == []


def test_work_that_waits_is_seen_from_outside():
    batcher = Batcher(max_batch=8, max_wait_s=0.0)
    queues = streams(batcher, 1)
    assert batcher.waiting_since_s is None
    put(batcher, queues["s0"], "s0", 0)
    since = batcher.waiting_since_s
    assert since is not None
    assert time.monotonic() - since < 1.0
    batcher.take(1.0)
    assert batcher.waiting_since_s is None


def test_close_wakes_the_loop():
    batcher = Batcher(max_batch=8, max_wait_s=0.0)
    threading.Timer(0.02, batcher.close).start()
    start = time.monotonic()
    assert batcher.take(10.0) == []
    assert time.monotonic() - start < 5.0
