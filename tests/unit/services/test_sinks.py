import threading
import time

import pytest

from services import sinks
from services.schemas import Lease, StreamStatus
from services.sinks import Publisher
from services.store import StoreDown
from tests.unit.services.engine_kit import wait


class Desk:
    """Takes parcels; can be down, and can refuse epochs below a number."""

    def __init__(self) -> None:
        self.down = False
        self.newest = 0
        self.rounds: list[list[tuple]] = []

    def publish_many(self, parcels) -> list[str]:
        if self.down:
            raise StoreDown("the store is down")
        self.rounds.append(list(parcels))
        return [lease.stream_id for lease, *_ in parcels if lease.epoch < self.newest]

    def events(self) -> list[int]:
        return [event["n"] for parcels in self.rounds for _, _, events, _ in parcels for event in events]

    def scores(self) -> list[int]:
        return [score["n"] for parcels in self.rounds for _, _, _, scores in parcels for score in scores]


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def publisher(desk):
    publisher = Publisher(desk)
    publisher.start()
    yield publisher
    publisher.stop()


def outlet(publisher: Publisher, stream_id: str = "door", epoch: int = 1, told=None, refused=None):
    return publisher.open(
        Lease(stream_id=stream_id, owner="r1", epoch=epoch),
        lambda: StreamStatus(state="RUNNING", since=0),
        lambda passage, now_s: (told if told is not None else []).append(now_s - passage.arrived_s),
        lambda: (refused if refused is not None else []).append(epoch),
    )


def test_events_and_scores_leave_in_order_and_few_rounds(desk, publisher):
    told: list[float] = []
    ways = [outlet(publisher, f"s{i}", told=told) for i in range(4)]
    for n in range(50):
        for way in ways:
            way.emit([{"n": n}], [{"n": n}], time.monotonic())
    assert publisher.flush(2.0)
    assert len(desk.rounds) < 50
    for i in range(4):
        mine = [event["n"] for r in desk.rounds for lease, _, es, _ in r if lease.stream_id == f"s{i}" for event in es]
        assert mine == list(range(50))
    assert len(told) == 200
    assert all(0 <= seconds < 5 for seconds in told)


def test_status_comes_every_half_second_without_being_asked(desk):
    publisher = Publisher(desk, status_s=0.05)
    outlet(publisher)
    publisher.start()
    wait(lambda: sum(parcel[1] is not None for r in desk.rounds for parcel in r) >= 3)
    publisher.stop()


def test_events_wait_for_a_store_that_is_down(desk, publisher):
    way = outlet(publisher)
    desk.down = True
    for n in range(500):
        way.emit([{"n": n}], [{"n": n}])
    time.sleep(0.05)
    assert publisher.last_error == "the store is down"
    desk.down = False
    wait(lambda: len(desk.events()) == 500)
    assert desk.events() == list(range(500))
    assert publisher.flush(2.0)
    assert desk.scores() == list(range(500 - sinks.MAX_SCORES, 500))  # the newest
    assert publisher.scores_lost == 500 - sinks.MAX_SCORES
    assert publisher.events_lost == 0


def test_what_does_not_fit_is_counted(desk, publisher, monkeypatch):
    monkeypatch.setattr(sinks, "MAX_EVENTS", 10)
    way, other = outlet(publisher), outlet(publisher, "other")
    desk.down = True
    for n in range(25):
        way.emit([{"n": n}])
    other.emit([{"n": 99}])
    assert publisher.events_lost == 16
    desk.down = False
    assert publisher.flush(3.0)
    assert desk.events() == list(range(15, 25))


def test_a_stale_lease_is_told_once_and_its_rest_thrown_away(desk, publisher):
    refused: list[int] = []
    old, new = outlet(publisher, epoch=1, refused=refused), outlet(publisher, epoch=2, refused=refused)
    desk.newest = 2
    old.emit([{"n": 1}])
    new.emit([{"n": 2}])
    wait(lambda: refused)
    assert publisher.flush(2.0)
    old.emit([{"n": 3}])
    assert publisher.flush(2.0)
    assert refused == [1]
    for parcels in desk.rounds:  # never two leases of one stream in a round: the answer names streams
        ids = [lease.stream_id for lease, *_ in parcels]
        assert len(ids) == len(set(ids))
    assert 3 not in desk.events()
    assert 2 in desk.events()


def test_a_closed_outlet_publishes_its_rest_and_a_last_status(desk, publisher):
    way = outlet(publisher)
    assert publisher.flush(1.0)
    way.emit([{"n": 1}])
    way.close()
    assert publisher.flush(2.0)
    assert desk.events() == [1]
    assert desk.rounds[-1][-1][1] is not None
    rounds = len(desk.rounds)
    time.sleep(0.6)
    assert len(desk.rounds) == rounds


def test_a_slow_status_does_not_hold_up_a_frame(desk):
    publisher = Publisher(desk)
    inside, go_on = threading.Event(), threading.Event()

    def slow() -> StreamStatus:
        inside.set()
        go_on.wait(5)
        return StreamStatus(state="RUNNING", since=0)

    way = publisher.open(Lease(stream_id="door", owner="r1", epoch=1), slow, lambda *_: None, lambda: None)
    publisher.start()
    assert inside.wait(5)
    way.emit([{"n": 1}])  # returns while the status is being made
    go_on.set()
    assert publisher.flush(2.0)
    publisher.stop()
    assert desk.events() == [1]
