"""Placement: facts in, the next step out; and the thread that carries it out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from services import controller
from services.controller import Controller, plan
from services.schemas import PUSHED, SEQUENCES, Lease, ReplicaInfo, SourceSpec, StreamSpec, StreamStatus
from services.settings import ControllerSettings, StoreSettings
from services.store import MemoryStore, StaleLease, StoreDown

SETTINGS = ControllerSettings(tick_s=0.02, lease_ttl_ms=300)


def spec(stream_id: str, *, enabled: bool = True) -> StreamSpec:
    return StreamSpec(id=stream_id, enabled=enabled, source=SourceSpec(uri=f"rtsp://camera/{stream_id}"))


def replica(replica_id: str, slots: int = 4, *, draining: bool = False) -> ReplicaInfo:
    return ReplicaInfo(id=replica_id, pid=1, slots_total=slots, draining=draining)


def held(**owners: str) -> dict[str, Lease]:
    return {name: Lease(stream_id=name, owner=owner, epoch=1) for name, owner in owners.items()}


# the plan


@pytest.mark.parametrize(
    ("streams", "leases", "replicas", "assign", "unassign", "waiting"),
    [
        pytest.param("abcd", {}, "XY", {"a": "X", "b": "Y", "c": "X", "d": "Y"}, (), (), id="spread evenly"),
        pytest.param("abc", {"a": "X", "b": "X"}, "XY", {"c": "Y"}, (), (), id="most free slots first"),
        pytest.param("ab", {"a": "X", "b": "Y"}, "XY", {}, (), (), id="nothing to do"),
        pytest.param("abc", {"a": "X", "b": "Z", "c": "Z"}, "XY", {"b": "Y", "c": "X"}, (), (), id="owner is dead"),
        pytest.param("aB", {"a": "X", "B": "X", "gone": "X"}, "X", {}, ("B", "gone"), (), id="stopped and deleted"),
        pytest.param("ab", {"a": "x", "b": "x"}, "xY", {}, (), (), id="draining keeps its streams"),
        pytest.param("ab", {}, "xY", {"a": "Y", "b": "Y"}, (), (), id="draining gets no more"),
        pytest.param("a", {"a": "Z"}, "", {}, ("a",), ("a",), id="no replica"),
        pytest.param("a", {}, "x", {}, (), ("a",), id="all drain"),
    ],
)
def test_next_step(
    streams: str,
    leases: dict[str, str],
    replicas: str,
    assign: dict[str, str],
    unassign: tuple[str, ...],
    waiting: tuple[str, ...],
) -> None:
    specs = [spec(name, enabled=name.islower()) for name in streams]
    alive = [replica(name.upper() if name.isupper() else name, draining=name.islower()) for name in replicas]
    step = plan(specs, held(**leases), alive)
    assert (step.assign, step.unassign, tuple(step.waiting)) == (assign, unassign, waiting)


def test_streams_that_do_not_fit_wait_with_the_capacity() -> None:
    step = plan(
        [spec(f"s{n}") for n in range(5)],
        held(s0="X"),
        [replica("X", 2), replica("Y", 2), replica("Z", 9, draining=True)],
    )
    assert sorted(step.assign) == ["s1", "s2", "s3"]
    code, why = step.waiting["s4"]
    assert code == "CAPACITY"
    assert "all 4 slots of 2 live replicas" in why


def test_ended_file_gives_its_place_away() -> None:
    step = plan([spec("a"), spec("b")], held(a="X"), [replica("X", 1)], ended=frozenset("a"))
    assert (step.assign, step.unassign) == ({"b": "X"}, ("a",))
    assert plan([spec("a")], {}, [replica("X")], ended=frozenset("a")).assign == {}


@pytest.mark.parametrize("loads", [(7, 0), (5, 1, 0), (3, 3, 0), (2, 1), (1, 1, 1), (0, 0)])
def test_rebalancing_ends_level_and_never_turns_back(loads: tuple[int, ...]) -> None:
    names = [f"R{i}" for i in range(len(loads))]
    leases = held(**{f"s{i}{n}": names[i] for i, load in enumerate(loads) for n in range(load)})
    specs, replicas = [spec(name) for name in leases], [replica(name, 8) for name in names]
    moved: Counter[str] = Counter()
    for _ in range(20):
        step = plan(specs, leases, replicas, settled=frozenset(names))
        assert len(step.assign) <= 1, "one at a time"
        assert not step.unassign
        if not step.assign:
            break
        leases |= held(**step.assign)
        moved.update(list(step.assign))
    final = Counter(lease.owner for lease in leases.values())
    counts = [final[name] for name in names]
    assert max(counts) - min(counts) <= 1
    assert all(times == 1 for times in moved.values()), "no stream moves twice"


def test_new_replica_gets_streams_of_others_only_once_settled() -> None:
    specs, leases = [spec("a"), spec("b")], held(a="X", b="X")
    replicas = [replica("X"), replica("Y")]
    assert plan(specs, leases, replicas, settled=frozenset("X")).assign == {}
    assert plan(specs, leases, replicas, settled=frozenset("XY")).assign == {"b": "Y"}
    pushed = [one.model_copy(update={"source": SourceSpec(uri=PUSHED)}) for one in specs]
    assert plan(pushed, leases, replicas, settled=frozenset("XY")).assign == {}
    assert plan([*specs, spec("c")], leases, replicas, settled=frozenset("XY")).assign == {"c": "Y"}, (
        "need before order"
    )


def test_plan_does_not_depend_on_the_order_of_facts() -> None:
    specs = [spec(name) for name in "dbca"]
    replicas = [replica("Y"), replica("X"), replica("Z", 3)]
    assert plan(specs, held(c="Y", a="gone"), replicas) == plan(specs[::-1], held(a="gone", c="Y"), replicas[::-1])


# the thread


class UnreachableStore(MemoryStore):
    """A store that can be switched off."""

    down = False

    def lead(self, owner: str, ttl_ms: int) -> bool:
        if self.down:
            raise StoreDown("the store does not serve")
        return super().lead(owner, ttl_ms)


@pytest.fixture
def store() -> UnreachableStore:
    return UnreachableStore(StoreSettings())


@pytest.fixture
def lead(store: UnreachableStore) -> Iterator[Callable[[str], Controller]]:
    """Starts controllers by name, ends them with the test."""
    running = []

    def start(owner_id: str) -> Controller:
        running.append(Controller(store, SETTINGS, owner_id))
        running[-1].start()
        return running[-1]

    yield start
    for one in running:
        one.stop()


def until(what: Callable[[], object], timeout_s: float = 3.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.01)


def owners(store: MemoryStore) -> dict[str, str]:
    return {name: lease.owner for name, lease in store.leases().items()}


def test_streams_move_when_their_replica_is_silent(store: UnreachableStore, lead: Callable[[str], Controller]) -> None:
    for name in "abcd":
        store.put_stream(spec(name), create=True)
    store.heartbeat(replica("X"), ttl_ms=300)
    store.heartbeat(replica("Y"), ttl_ms=60_000)
    lead("one")
    until(lambda: len(store.leases()) == 4)
    assert Counter(owners(store).values()) == {"X": 2, "Y": 2}
    old = next(lease for lease in store.leases().values() if lease.owner == "X")
    until(lambda: set(owners(store).values()) == {"Y"})
    assert store.leases()[old.stream_id].epoch == 2
    with pytest.raises(StaleLease):
        store.publish(old, events=[{}])


def test_stream_moves_at_once_when_its_replica_retires(
    store: UnreachableStore, lead: Callable[[str], Controller]
) -> None:
    store.put_stream(spec("a"), create=True)
    for name in "XY":
        store.heartbeat(replica(name), ttl_ms=60_000)
    lead("one")
    until(lambda: owners(store) == {"a": "X"})
    store.heartbeat(replica("X", draining=True), ttl_ms=60_000)
    time.sleep(5 * SETTINGS.tick_s)
    store.save(store.leases()["a"], b"the last state")
    store.retire("X")
    until(lambda: owners(store) == {"a": "Y"}, timeout_s=0.5)
    assert store.load("a") == b"the last state"


def test_full_house_is_told_and_solved(store: UnreachableStore, lead: Callable[[str], Controller]) -> None:
    store.put_stream(spec("a"), create=True)
    lead("one")
    until(lambda: (now := store.status("a")) and now.error_code == "NO_REPLICA")
    store.heartbeat(replica("X", slots=1), ttl_ms=60_000)
    until(lambda: owners(store) == {"a": "X"})
    store.put_stream(spec("b"), create=True)
    until(lambda: (now := store.status("b")) and now.error_code == "CAPACITY")
    told = store.status("b")
    assert told is not None
    assert (told.state, told.worker) == ("STARTING", None)
    assert "all 1 slots of 1 live replicas" in told.status_message
    assert [e["data"]["after"] for e in store.events("b")] == ["STARTING"]
    time.sleep(5 * SETTINGS.tick_s)
    assert store.status("b") == told, "told once"
    store.heartbeat(replica("Y", slots=1), ttl_ms=60_000)
    until(lambda: owners(store) == {"a": "X", "b": "Y"})


def test_stopped_stream_keeps_its_counters(store: UnreachableStore, lead: Callable[[str], Controller]) -> None:
    store.put_stream(spec("a"), create=True)
    store.heartbeat(replica("X"), ttl_ms=60_000)
    lead("one")
    until(lambda: owners(store) == {"a": "X"})
    running = StreamStatus(
        state="RUNNING", since=1.0, worker="X", received=70, processed=60, dropped={"stale": 10}, fps=15
    )
    store.publish(store.leases()["a"], status=running)
    store.put_stream(spec("a", enabled=False), create=False)
    until(lambda: (now := store.status("a")) and now.state == "STOPPED")
    stopped = store.status("a")
    assert stopped is not None
    assert (stopped.received, stopped.processed, stopped.dropped) == (70, 60, {"stale": 10})
    assert (stopped.worker, stopped.fps) == (None, 0)
    assert stopped.since > 1.0
    assert owners(store) == {}
    (event,) = store.events("a")
    assert (event["data"]["before"], event["data"]["after"]) == ("RUNNING", "STOPPED")
    store.put_stream(spec("a"), create=False)
    until(lambda: owners(store) == {"a": "X"})


def test_ended_file_is_served_again_when_its_specification_changes(
    store: UnreachableStore, lead: Callable[[str], Controller]
) -> None:
    store.put_stream(spec("a"), create=True)
    store.heartbeat(replica("X"), ttl_ms=60_000)
    lead("one")
    until(lambda: owners(store) == {"a": "X"})
    store.publish(store.leases()["a"], status=StreamStatus(state="ENDED", since=1.0))
    until(lambda: owners(store) == {})
    time.sleep(5 * SETTINGS.tick_s)
    assert owners(store) == {}
    store.put_stream(spec("a").model_copy(update={"revision": 2}), create=False)
    until(lambda: owners(store) == {"a": "X"})
    time.sleep(5 * SETTINGS.tick_s)
    assert store.leases()["a"].epoch == 2, "and stays there"


def test_second_controller_takes_over(store: UnreachableStore, lead: Callable[[str], Controller]) -> None:
    first, second = lead("one"), lead("two")
    until(lambda: first.leading or second.leading)
    assert first.leading != second.leading
    leader, other = (first, second) if first.leading else (second, first)
    leader.stop()
    until(lambda: other.leading, timeout_s=0.5)
    assert not leader.leading
    assert other.healthy()
    assert not leader.healthy()


def test_store_that_was_away_is_not_a_reason_to_move(
    store: UnreachableStore, lead: Callable[[str], Controller]
) -> None:
    store.put_stream(spec("a"), create=True)
    store.heartbeat(replica("X"), ttl_ms=200)
    store.heartbeat(replica("Y"), ttl_ms=60_000)
    one = lead("one")
    until(lambda: owners(store) == {"a": "X"})
    store.down = True
    time.sleep(0.5)  # heartbeats of X run out meanwhile
    assert not one.leading
    assert one.healthy()
    store.down = False
    until(lambda: one.leading)
    time.sleep(3 * SETTINGS.tick_s)
    assert owners(store) == {"a": "X"}, "replicas may speak first"
    until(lambda: owners(store) == {"a": "Y"})


def test_new_replica_gets_its_share(
    store: UnreachableStore, lead: Callable[[str], Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "SETTLE_S", 0.1)
    for name in "abcdef":
        store.put_stream(spec(name), create=True)
    store.heartbeat(replica("X", 8), ttl_ms=60_000)
    lead("one")
    until(lambda: set(owners(store).values()) == {"X"})
    store.heartbeat(replica("Y", 8), ttl_ms=60_000)
    until(lambda: Counter(owners(store).values()) == {"X": 3, "Y": 3})
    epochs = {name: lease.epoch for name, lease in store.leases().items()}
    time.sleep(0.3)
    assert {name: lease.epoch for name, lease in store.leases().items()} == epochs, "and then there is peace"


def test_a_sequence_that_is_long_over_leaves_nothing(
    store: UnreachableStore, lead: Callable[[str], Controller], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "FORGET_S", 0.1)
    for name in ("seq-over", "seq-late", "seq-goes-on", "door"):
        store.put_stream(spec(name), create=True)
        store.assign(name, "X")
        if name != "seq-goes-on":
            store.delete_stream(name)
    store.put_document(SEQUENCES, "seq-late", "ended", 60)
    lead("c1")
    until(lambda: store.absent("") == {"seq-late", "door"})
    time.sleep(0.3)
    assert store.absent("") == {"seq-late", "door"}
    assert store.assign("seq-goes-on", "X").epoch == 2


def test_a_new_sequence_is_left_to_the_gateway_that_began_it(
    store: UnreachableStore, lead: Callable[[str], Controller]
) -> None:
    store.heartbeat(replica("X"), 60_000)
    young = spec("seq").model_copy(update={"source": SourceSpec(uri=PUSHED)})
    store.put_stream(young, create=True)
    store.put_stream(spec("yard"), create=True)
    lead("one")
    until(lambda: owners(store) == {"yard": "X"})
    old = young.model_copy(update={"created_at": young.created_at - timedelta(seconds=controller.NEW_SEQUENCE_S)})
    store.put_stream(old, create=False)
    until(lambda: owners(store) == {"seq": "X", "yard": "X"})
