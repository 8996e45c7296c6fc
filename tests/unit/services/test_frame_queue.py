import threading

import pytest
import torch

from services.frame_queue import FrameQueue
from tsm_core.frame import Frame

IMAGE = torch.zeros(3, 4, 4, dtype=torch.uint8)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def frame(number: int, time_s: float = 0.0) -> Frame:
    return Frame("door", number, IMAGE, time_s, time_s, (4, 4))


def balanced(queue: FrameQueue) -> bool:
    received, processed, dropped, waiting = queue.counts()
    return received == processed + sum(dropped.values()) + waiting


def test_the_newest_frame_wins_and_the_older_one_is_counted():
    queue = FrameQueue()
    assert queue.put(frame(0))
    assert queue.put(frame(1))
    taken = queue.take()
    assert taken is not None
    assert taken.frame.number == 1
    assert queue.dropped == {"queue": 1}
    assert queue.waiting == 1  # taken, not yet done
    queue.done()
    assert queue.counts() == (2, 1, {"queue": 1}, 0)


def test_a_longer_queue_keeps_order_and_drops_its_oldest():
    queue = FrameQueue(capacity=3)
    for number in range(5):
        queue.put(frame(number))
    assert [queue.take().frame.number for _ in range(3)] == [2, 3, 4]  # type: ignore[union-attr]
    assert queue.take() is None
    assert queue.dropped == {"queue": 2}


def test_an_old_frame_is_dropped_before_work_is_spent_on_it():
    clock = Clock()
    queue = FrameQueue(max_age_s=0.5, clock=clock)
    queue.put(frame(0))
    clock.now_s += 0.6
    assert queue.take() is None
    assert queue.dropped == {"age": 1}
    assert balanced(queue)


@pytest.mark.parametrize(
    ("camera_fps", "max_fps", "expected"),
    [(15, 10, 100), (15, 15, 150), (30, 10, 100), (25, 10, 100), (10, 15, 100), (30, 29, 290), (15, 1, 10)],
)
@pytest.mark.parametrize("jitter_s", [0.0, 0.004])
def test_max_fps_gives_the_rate_asked_for(camera_fps, max_fps, expected, jitter_s):
    queue = FrameQueue(max_fps=max_fps)
    passed = 0
    for number in range(camera_fps * 10):
        time_s = number / camera_fps + jitter_s * (-1) ** number
        if queue.put(frame(number, 1e9 + time_s)):
            passed += 1
            queue.take()
            queue.done()
    assert abs(passed - expected) <= 1 + 0.02 * expected
    assert balanced(queue)


def test_max_fps_survives_a_pause_and_a_clock_that_jumps_back():
    queue = FrameQueue(max_fps=10)
    assert queue.put(frame(0, 100.0))
    assert not queue.put(frame(1, 100.05))
    assert queue.put(frame(2, 200.0))  # a pause earns no burst
    assert not queue.put(frame(3, 200.05))
    assert queue.put(frame(4, 50.0))
    assert not queue.put(frame(5, 50.05))
    assert queue.put(frame(6, 50.1))


def test_a_closed_queue_counts_what_it_held_and_what_still_comes():
    queue = FrameQueue()
    queue.put(frame(0))
    queue.close()
    assert not queue.put(frame(1))
    assert queue.take() is None
    assert queue.counts() == (2, 0, {"closed": 2}, 0)


def test_a_replaced_frame_does_not_lose_the_streams_turn():
    clock = Clock()
    queue = FrameQueue(max_age_s=1.0, clock=clock)
    queue.put(frame(0))
    before = queue.deadline_s
    clock.now_s += 0.3
    queue.put(frame(1))
    assert queue.deadline_s == before


def test_counters_resume_where_an_earlier_owner_stopped():
    queue = FrameQueue()
    queue.resume(10, 7, {"queue": 2, "lost": 5})  # `lost` never arrived; one was still waiting
    assert queue.counts() == (10, 7, {"queue": 2, "closed": 1}, 0)


def test_the_books_balance_while_a_reader_and_a_loop_race():
    queue = FrameQueue(max_fps=1e6)

    def read() -> None:
        for number in range(5000):
            queue.put(frame(number, number / 1e3))

    reader = threading.Thread(target=read)
    reader.start()
    seen = []
    while reader.is_alive() or queue.queued:
        assert balanced(queue)
        if waiting := queue.take():
            seen.append(waiting.frame.number)
            queue.done()
    reader.join()
    assert seen == sorted(seen)
    assert queue.received == 5000
    assert queue.waiting == 0
    assert balanced(queue)
