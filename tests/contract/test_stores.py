"""One suite for every StateStore: what holds in memory holds in Redis and Valkey."""

from __future__ import annotations

import base64
import itertools
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from services.embedded import EmbeddedValkey, bundled_server, find_server
from services.schemas import Lease, ReplicaInfo, SourceSpec, StreamSpec, StreamStatus
from services.settings import StoreSettings
from services.store import (
    MemoryStore,
    RedisStore,
    StaleLease,
    StateStore,
    StoreDown,
    StreamChanged,
    StreamExists,
    StreamNotFound,
    open_store,
)
from tsm_core.errors import CallerError

SERVERS = {path.name: path for path in (bundled_server(), find_server()) if path is not None}
PREFIXES = (f"test{n}:" for n in itertools.count())
PASSWORD = "p@ss word/äß"
KEY = SecretStr(base64.b64encode(bytes(32)).decode())

NewStore = Callable[..., StateStore]


@pytest.fixture(params=["memory", *SERVERS, "two-servers"])
def new_store(request: pytest.FixtureRequest) -> NewStore:
    """Opens an empty store; keyword arguments are settings."""

    def new(**knobs: Any) -> StateStore:
        if request.param == "memory":
            return open_store(StoreSettings(url="memory://", **knobs))
        server_of: Callable[[Path], EmbeddedValkey] = request.getfixturevalue("server_of")
        if request.param == "two-servers":
            knobs["state_url"] = server_of(find_server()).url.removesuffix("/0") + "/1"
        url = server_of(SERVERS.get(request.param) or find_server()).url
        return open_store(StoreSettings(url=url, prefix=next(PREFIXES), encryption_key=KEY, **knobs))

    return new


@pytest.fixture
def store(new_store: NewStore) -> StateStore:
    return new_store()


def spec(stream_id: str = "door", **changes: Any) -> StreamSpec:
    source = SourceSpec(uri="rtsp://camera.local/1", username="viewer", password=PASSWORD)
    return StreamSpec(id=stream_id, source=source, **changes)


def owned(store: StateStore, stream_id: str = "door", owner: str = "a") -> Lease:
    store.put_stream(spec(stream_id), create=True)
    return store.assign(stream_id, owner)


def status(**changes: Any) -> StreamStatus:
    return StreamStatus(**{"state": "RUNNING", "since": 5.0, "dropped": {"stale": 2}, **changes})


# the registry


def test_a_change_of_what_was_read_is_refused_once_it_is_another(store: StateStore) -> None:
    store.put_stream(spec(), create=True)
    read = store.get_stream("door")
    store.put_stream(read.model_copy(update={"name": "A", "edition": 2}), create=False, before=read)
    for write in (
        lambda: store.put_stream(read.model_copy(update={"name": "B"}), create=False, before=read),
        lambda: store.delete_stream("door", before=read),
    ):
        with pytest.raises(StreamChanged, match="read it again"):
            write()
    assert store.get_stream("door").name == "A"
    store.delete_stream("door", before=store.get_stream("door"))
    store.put_stream(spec(), create=True)
    with pytest.raises(StreamChanged):  # of the same id and edition, but born later
        store.put_stream(read, create=False, before=read)


def test_specification_comes_back_with_its_password(store: StateStore) -> None:
    store.put_stream(spec("b", tags={"floor": "2"}), create=True)
    store.put_stream(spec("a"), create=True)
    assert [s.id for s in store.list_streams()] == ["a", "b"]
    back = store.get_stream("b")
    assert back.tags == {"floor": "2"}
    assert back.source.password is not None
    assert back.source.password.get_secret_value() == PASSWORD


def test_create_and_replace_do_not_mix(store: StateStore) -> None:
    with pytest.raises(StreamNotFound, match="door"):
        store.put_stream(spec(), create=False)
    store.put_stream(spec(), create=True)
    with pytest.raises(StreamExists, match="door"):
        store.put_stream(spec(name="other"), create=True)
    store.put_stream(spec(name="other", revision=2), create=False)
    assert store.get_stream("door").name == "other"


def test_unknown_streams_are_not_found(store: StateStore) -> None:
    for verb in (store.get_stream, store.delete_stream, lambda stream_id: store.assign(stream_id, "a")):
        with pytest.raises(StreamNotFound, match="nope"):
            verb("nope")
    assert store.status("nope") is None
    assert store.preview("nope") is None
    assert store.load("nope") is None
    assert store.events("nope") == store.scores("nope") == []


def test_deleted_stream_leaves_nothing_but_its_counters(store: StateStore) -> None:
    lease = owned(store)
    store.publish(lease, status=status(), events=[{"n": 1}], scores=[{"n": 1}])
    store.save(lease, b"state")
    store.put_preview(lease, b"jpeg", 3)
    store.delete_stream("door")
    assert store.list_streams() == []
    assert store.leases() == {}
    assert store.statuses() == {}
    assert (store.load("door"), store.preview("door")) == (None, None)
    assert [e["n"] for e in store.events("door")] == [1], "followers may still read the end"
    with pytest.raises(StaleLease):
        store.publish(lease, status=status())
    assert store.statuses() == {}

    again = owned(store)
    assert again.epoch == lease.epoch + 1
    assert store.events("door") == store.scores("door") == []
    store.publish(again, events=[{"n": 2}])
    assert [e["sequence"] for e in store.events("door")] == [2]


# leases


def test_epochs_rise_and_the_newest_owner_holds(store: StateStore) -> None:
    store.put_stream(spec(), create=True)
    leases = [store.assign("door", owner) for owner in ("a", "b", "b", "replica:7")]
    assert [lease.epoch for lease in leases] == [1, 2, 3, 4]
    assert store.leases() == {"door": Lease(stream_id="door", owner="replica:7", epoch=4)}
    store.unassign("door")
    store.unassign("door")
    assert store.leases() == {}
    assert store.assign("door", "a").epoch == 5


def test_former_owner_cannot_write(store: StateStore) -> None:
    old = owned(store, owner="a")
    store.publish(old, status=status(worker="a"), events=[{"by": "a"}])
    store.save(old, b"a")
    store.put_preview(old, b"a", 1)
    new = store.assign("door", "b")
    store.publish(new, status=status(worker="b"), scores=[{"by": "b"}])

    def refused() -> None:
        with pytest.raises(StaleLease, match="door") as error:
            store.publish(old, status=status(worker="late"), events=[{"by": "late"}], scores=[{"by": "late"}])
        assert error.value.reason == "stale_lease"
        with pytest.raises(StaleLease):
            store.save(old, b"late")
        with pytest.raises(StaleLease):
            store.put_preview(old, b"late", 9)
        assert store.publish_many([(old, status(worker="late"), [{"by": "late"}], [])]) == ["door"]
        assert not store.release(old)

    refused()
    assert store.status("door") == status(worker="b")
    assert [e["by"] for e in store.events("door")] == ["a"]
    assert [s["by"] for s in store.scores("door")] == ["b"]
    assert store.load("door") == b"a"
    assert store.preview("door") == (1, b"a")
    store.unassign("door")
    refused()
    assert store.latest_sequence("door") == 1


def test_what_is_long_gone_is_forgotten_and_what_is_registered_is_not(store: StateStore) -> None:
    for name in ("seq-a", "seq-b", "door"):
        store.put_stream(spec(name), create=True)
        store.publish(store.assign(name, "a"), events=[{"n": 1}])
    store.delete_stream("seq-a")
    store.delete_stream("door")
    assert store.absent("seq-") == {"seq-a"}
    assert store.absent("") == {"seq-a", "door"}
    store.forget({"seq-a", "seq-b", "unknown"})
    assert store.absent("") == {"door"}
    assert [store.latest_sequence(name) for name in ("seq-a", "seq-b", "door")] == [0, 1, 1]
    store.put_stream(spec("seq-a"), create=True)
    assert store.assign("seq-a", "a").epoch == 1
    assert store.assign("seq-b", "a").epoch == 2


def test_same_epoch_of_another_owner_is_stale(store: StateStore) -> None:
    lease = owned(store)
    with pytest.raises(StaleLease):
        store.publish(lease.model_copy(update={"owner": "b"}), status=status())


def test_release_gives_the_stream_back(store: StateStore) -> None:
    lease = owned(store)
    assert store.release(lease)
    assert store.leases() == {}
    with pytest.raises(StaleLease):
        store.save(lease, b"late")


def test_announce_is_for_streams_without_owner(store: StateStore) -> None:
    with pytest.raises(StaleLease):
        store.announce("door", status(state="STOPPED"))
    store.put_stream(spec(), create=True)
    store.announce("door", status(state="STOPPED"), events=[{"n": 1}])
    assert store.statuses() == {"door": status(state="STOPPED")}
    assert [e["sequence"] for e in store.events("door")] == [1]
    store.assign("door", "a")
    with pytest.raises(StaleLease, match="owner"):
        store.announce("door", status(state="FAILED"))
    assert store.status("door") == status(state="STOPPED")


# feeds


def test_sequence_goes_on_over_owners_and_threads(store: StateStore) -> None:
    first = owned(store)

    def publish(lease: Lease) -> None:
        for _ in range(10):
            store.publish(lease, events=[{"epoch": lease.epoch}] * 2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish, [first] * 4))
    publish(store.assign("door", "b"))
    events = store.events("door", limit=1000)
    assert [e["sequence"] for e in events] == list(range(1, 101))
    assert [e["epoch"] for e in events] == [1] * 80 + [2] * 20
    assert store.latest_sequence("door") == 100


def test_records_get_the_time_of_publication(store: StateStore) -> None:
    lease = owned(store)
    event, score = {"data": {"label": "left", "empty": [], "exact": 0.1 + 0.2}}, {"label": "still"}
    store.publish(lease, events=[event], scores=[score])
    (told,), (scored,) = store.events("door"), store.scores("door")
    assert abs(told.pop("published_s") - time.time()) < 2
    assert abs(scored.pop("published_s") - time.time()) < 2
    assert told == {**event, "sequence": 1}
    assert scored == score == {"label": "still"}, "the caller's record is not touched"


def test_events_are_read_in_pages(store: StateStore) -> None:
    store.publish(owned(store), events=[{"n": n} for n in range(1, 8)])
    assert [e["n"] for e in store.events("door", after=2, limit=3)] == [3, 4, 5]
    assert store.events("door", after=7) == store.events("door", after=99) == store.events("door", limit=0) == []


def test_feeds_are_those_that_can_be_read(store: StateStore) -> None:
    assert store.event_feeds() == {}
    leases = [owned(store, name) for name in ("yard", "door")]
    assert store.event_feeds() == {"door": 0, "yard": 0}
    store.publish(leases[0], events=[{"n": 1}, {"n": 2}])
    store.delete_stream("yard")
    assert store.event_feeds() == {"door": 0, "yard": 2}, "deleted, but not yet forgotten"
    owned(store, "yard")
    assert store.event_feeds() == {"door": 0, "yard": 2}


def test_scores_are_the_newest(store: StateStore) -> None:
    lease = owned(store)
    store.publish(lease, scores=[{"n": n} for n in range(5)])
    assert [s["n"] for s in store.scores("door", limit=2)] == [3, 4]
    position = store.now([("score", "door")])["score", "door"]
    assert store.scores("door", after=position) == []
    store.publish(lease, scores=[{"n": 5}])
    assert [s["n"] for s in store.scores("door", after=position)] == [5]


def test_feeds_are_bounded(new_store: NewStore) -> None:
    store = new_store(events_kept=200, scores_kept=100)
    lease = owned(store)
    for n in range(20):
        store.publish(lease, events=[{"n": n}] * 50, scores=[{"n": n}] * 50)
    kept = store.events("door", limit=10_000)
    assert 200 <= len(kept) <= 300
    assert kept[-1]["sequence"] == 1000
    assert 100 <= len(store.scores("door", limit=10_000)) <= 200


def test_record_that_is_no_json_writes_nothing(store: StateStore) -> None:
    lease = owned(store)
    for bad in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            store.publish(lease, status=status(), events=[{"fine": 1}, bad])
    assert store.latest_sequence("door") == 0
    assert store.status("door") is None


def test_publish_many_serves_each_by_its_own_lease(store: StateStore) -> None:
    leases = [owned(store, f"s{n}") for n in range(8)]
    store.assign("s3", "b")
    store.unassign("s5")
    batch = [(lease, status(fps=n), [{"n": n}], [{"n": n}]) for n, lease in enumerate(leases)]
    assert store.publish_many(batch) == ["s3", "s5"]
    assert {name: s.fps for name, s in store.statuses().items()} == {f"s{n}": n for n in (0, 1, 2, 4, 6, 7)}
    assert [len(store.events(f"s{n}")) for n in range(8)] == [1, 1, 1, 0, 1, 0, 1, 1]
    assert store.publish_many([]) == []


def test_tail_wakes_up_on_a_publication(store: StateStore) -> None:
    door, yard = owned(store, "door"), owned(store, "yard")
    cursors = store.now([("event", "door"), ("score", "yard"), ("event", "yard")])
    timer = threading.Timer(
        0.3, lambda: store.publish_many([(door, None, [{"n": 1}], []), (yard, None, [], [{"n": 2}])])
    )
    began = time.monotonic()
    timer.start()
    got = store.tail(cursors, block_s=10)
    assert 0.2 < time.monotonic() - began < 2
    while len(got) < 2:
        cursors.update({(kind, stream_id): position for kind, stream_id, position, _ in got})
        got += store.tail(cursors, block_s=10)
    assert sorted((kind, stream_id, record["n"]) for kind, stream_id, _, record in got) == [
        ("event", "door", 1),
        ("score", "yard", 2),
    ]
    cursors.update({(kind, stream_id): position for kind, stream_id, position, _ in got})
    assert store.tail(cursors, block_s=0) == []


def test_tail_reads_what_is_behind_the_cursor(store: StateStore) -> None:
    lease = owned(store)
    store.publish(lease, events=[{"n": n} for n in (1, 2, 3)])
    assert [(p, r["n"], r["sequence"]) for _, _, p, r in store.tail({("event", "door"): 1}, block_s=5)] == [
        ("2", 2, 2),
        ("3", 3, 3),
    ]
    assert len(store.tail({("event", "door"): "0"}, block_s=5)) == 3


def test_tail_gives_up_in_time(store: StateStore) -> None:
    store.publish(owned(store), events=[{"n": 1}])
    for cursors, block_s in (({("event", "door"): "$", ("score", "nobody"): "0"}, 0.6), ({}, 0.1)):
        began = time.monotonic()
        assert store.tail(cursors, block_s=block_s) == []
        assert block_s - 0.05 < time.monotonic() - began < block_s + 0.8


def test_tail_from_now_sees_what_comes_while_it_waits(store: StateStore) -> None:
    lease = owned(store)
    store.publish(lease, events=[{"n": 1}])
    threading.Timer(0.8, lambda: store.publish(lease, events=[{"n": 2}])).start()
    assert [r["n"] for *_, r in store.tail({("event", "door"): "$"}, block_s=10)] == [2]


# states, pictures, watchers, metrics


def test_state_and_picture_are_the_last_ones(store: StateStore) -> None:
    lease = owned(store)
    for n in range(3):
        store.save(lease, bytes([n, 0, 255]) * 1000)
        store.put_preview(lease, b"\xff\xd8" + bytes([n]), n)
    assert store.load("door") == bytes([2, 0, 255]) * 1000
    assert store.preview("door") == (2, b"\xff\xd8\x02")
    store.assign("door", "b")
    assert store.load("door") == bytes([2, 0, 255]) * 1000, "the next owner goes on from here"


def test_state_is_forgotten_in_time(new_store: NewStore) -> None:
    store = new_store(state_ttl_s=0.2)
    store.save(owned(store), b"state")
    time.sleep(0.4)
    assert store.load("door") is None


def test_watchers_are_forgotten_in_time(store: StateStore) -> None:
    store.watch("door", 10)
    store.watch("door", 0.1)
    store.watch("yard", 0.1)
    assert store.watched() == {"door", "yard"}
    time.sleep(0.3)
    assert store.watched() == {"door"}


def test_metrics_by_replica(store: StateStore) -> None:
    store.put_metrics("a", "up 1 ä", 10)
    store.put_metrics("b", "up 1", 0.1)
    store.put_metrics("a", "up 2 ä", 10)
    time.sleep(0.2)
    assert store.metrics() == {"a": "up 2 ä"}


# replicas and the leader


def replica(replica_id: str, **changes: Any) -> ReplicaInfo:
    return ReplicaInfo(id=replica_id, pid=1, slots_total=4, **changes)


def test_silent_replica_is_dead(store: StateStore) -> None:
    store.heartbeat(replica("b"), ttl_ms=5000)
    store.heartbeat(replica("a"), ttl_ms=300)
    store.heartbeat(replica("b", slots_used=2), ttl_ms=5000)
    assert [(r.id, r.slots_used) for r in store.replicas()] == [("a", 0), ("b", 2)]
    time.sleep(0.4)
    assert [r.id for r in store.replicas()] == ["b"]
    store.heartbeat(replica("a"), ttl_ms=5000)
    store.retire("b")
    store.retire("unknown")
    assert [r.id for r in store.replicas()] == ["a"]


def test_survey_sees_all_at_once(store: StateStore) -> None:
    assert store.survey() == ({}, {}, {}, {})
    for name in ("b", "a"):
        store.publish(owned(store, name, owner="r"), status=status())
    store.heartbeat(replica("r"), ttl_ms=60_000)
    store.heartbeat(replica("dead"), ttl_ms=100)
    time.sleep(0.2)
    survey = store.survey()
    assert list(survey.specs.values()) == store.list_streams()
    assert survey.leases == store.leases()
    assert survey.statuses == store.statuses()
    assert list(survey.specs) == list(survey.leases) == list(survey.statuses) == ["a", "b"]
    assert survey.replicas == {"r": replica("r")}


def test_leadership_goes_over_when_the_leader_is_silent(store: StateStore) -> None:
    assert store.lead("a", 400)
    assert not store.lead("b", 400)
    assert store.lead("a", 400)
    store.abdicate("b")
    assert not store.lead("b", 400)
    time.sleep(0.5)
    assert store.lead("b", 5000)
    assert not store.lead("a", 5000)
    store.abdicate("b")
    assert store.lead("a", 5000)


# the store itself


def test_store_travels_to_other_processes(store: StateStore) -> None:
    store.ping()
    if isinstance(store, MemoryStore):
        return
    store.put_stream(spec(), create=True)
    copy: StateStore = pickle.loads(pickle.dumps(store))
    assert copy.get_stream("door") == store.get_stream("door")
    store.close()
    copy.close()


@pytest.mark.parametrize("url", [None, "http://u:secret@host", "nonsense-secret"])
def test_address_that_cannot_be_used(url: str | None) -> None:
    with pytest.raises(CallerError, match=r"store\.url") as error:
        open_store(StoreSettings(url=url))
    assert "secret" not in str(error.value)


def test_store_that_is_down_says_so_and_comes_back(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        settings = StoreSettings(url=server.url, encryption_key=KEY)
        store = RedisStore(settings)
        lease = owned(store)
        store.publish(lease, status=status(), events=[{"n": 1}])
        store.save(lease, b"state")
        caught: list[StoreDown] = []

        def wait() -> None:
            try:
                store.tail({("event", "door"): "1"}, block_s=20)
            except StoreDown as error:
                caught.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        server.stop()
        waiting.join(5)
        assert len(caught) == 1, "a blocked reader notices"
        verbs = (store.ping, store.list_streams, store.leases, lambda: store.publish(lease, status=status()))
        for verb in verbs:
            began = time.monotonic()
            with pytest.raises(StoreDown, match=rf"127\.0\.0\.1:{server.port}") as error:
                verb()
            assert time.monotonic() - began < 3
            assert error.value.reason == "store_unavailable"
            secret = settings.url.get_secret_value().split("@")[0].split(":")[-1] if settings.url else ""
            assert secret
            assert secret not in f"{error.value!r} {error.value.__cause__!r}"

        server.start()
        store.ping()
        assert [s.id for s in store.list_streams()] == ["door"]
        assert store.leases() == {"door": lease}
        assert store.load("door") == b"state"
        store.publish(lease, events=[{"n": 2}])
        assert [e["sequence"] for e in store.events("door")] == [1, 2]


def test_scripts_are_loaded_again_when_the_server_forgot_them(new_store: NewStore) -> None:
    store = new_store()
    leases = [owned(store, f"s{n}") for n in range(3)]
    store.publish_many([(lease, None, [{"n": 1}], []) for lease in leases])
    if isinstance(store, RedisStore):
        store._main.script_flush()
    assert store.publish_many([(lease, None, [{"n": 2}], []) for lease in leases]) == []
    assert [store.latest_sequence(f"s{n}") for n in range(3)] == [2, 2, 2]


def test_wrong_password_is_not_blamed_on_the_network(valkey_url: str) -> None:
    address = valkey_url.partition("@")[2]
    with pytest.raises(StoreDown, match="refused the password"):
        open_store(StoreSettings(url=f"redis://:wrong@{address}")).ping()


# documents


def test_a_document_is_written_over_and_listed_by_kind(store: StateStore) -> None:
    assert store.document("token", "a") is None
    store.put_document("token", "b", "two")
    store.put_document("token", "a", "one")
    store.put_document("job", "a", "other")
    store.put_document("token", "b", "zwei äß")
    assert store.documents("token") == {"a": "one", "b": "zwei äß"}
    assert list(store.documents("token")) == ["a", "b"]
    assert (store.document("job", "a"), store.documents("nothing")) == ("other", {})


def test_a_document_is_swapped_only_while_it_is_what_was_read(store: StateStore) -> None:
    assert not store.swap_document("job", "a", "never", "new")
    assert store.swap_document("job", "a", None, "1")
    assert not store.swap_document("job", "a", None, "2")
    assert not store.swap_document("job", "a", "0", "2")
    assert store.swap_document("job", "a", "1", "2")
    assert store.document("job", "a") == "2"
    assert not store.swap_document("job", "a", "1", None)
    assert store.swap_document("job", "a", "2", None)
    assert store.documents("job") == {}


def test_a_document_vanishes_when_its_time_is_over(store: StateStore) -> None:
    store.put_document("answer", "a", "x", ttl_s=0.15)
    store.put_document("answer", "b", "y", ttl_s=0.15)
    store.put_document("answer", "b", "y")
    assert store.document("answer", "a") == "x"
    time.sleep(0.2)
    assert store.documents("answer") == {"b": "y"}
    assert store.swap_document("answer", "a", None, "again", ttl_s=0.15)
    time.sleep(0.2)
    assert store.swap_document("answer", "a", None, "free"), "what is over counts as absent"
