"""tsm.v1.StreamService over a memory store and a real Valkey: what it does, what it refuses, what it tells."""

import base64
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from pydantic import BaseModel, SecretStr

from services.http.streams import NewStream, StreamChanges
from services.manager import StreamManager, StreamView
from services.rpc import make_stubs
from services.rpc.messages import fill, to_json
from services.rpc.streams import ROLES, stream_message
from services.rpc.tsm.v1 import streams_pb2 as pb
from services.rpc.tsm.v1.streams_pb2_grpc import StreamServiceStub
from services.schemas import Latency, ModelStatus, Restored, SourceSpec, StreamSpec, StreamStatus, state_event
from services.settings import AuthSettings, Settings, SourceSettings, StoreSettings
from services.store import MemoryStore, RedisStore, StateStore
from services.stream_models import Filter, Line, ObjectsOf, Region, StreamModel, Zone
from tests.unit.services.http_kit import CANARY, MODELS
from tests.unit.services.rpc_kit import rpc_door, stub

SOURCE = pb.Source(uri="rtsp://127.0.0.1:9/cam", username="eye", password=CANARY)
CODE = grpc.StatusCode


@pytest.fixture(params=["memory", "valkey"])
def store(request: pytest.FixtureRequest) -> Iterator[StateStore]:
    if request.param == "memory":
        yield MemoryStore(StoreSettings())
        return
    url = SecretStr(request.getfixturevalue("valkey_url"))
    key = SecretStr(base64.b64encode(bytes(32)).decode())
    found = RedisStore(StoreSettings(url=url, prefix=f"rpc{time.monotonic_ns()}:", encryption_key=key))
    yield found
    found.close()


@pytest.fixture
def manager(store: StateStore, tmp_path: Path) -> StreamManager:
    settings = Settings(source=SourceSettings(file_roots=(tmp_path,), probe_timeout_s=1.0))
    return StreamManager(store, settings, models=MODELS)


@pytest.fixture
def streams(manager: StreamManager) -> Iterator[StreamServiceStub]:
    with stub(manager) as found:
        yield found


def add(streams: StreamServiceStub, stream_id: str = "door-1", **fields: Any) -> pb.Stream:
    stream = pb.Stream(id=stream_id, source=SOURCE, **fields)
    return streams.CreateStream(pb.CreateStreamRequest(stream=stream, probe=False), timeout=10)


def update(streams: StreamServiceStub, paths: list[str] | None = None, etag: str = "", **fields: Any) -> pb.Stream:
    mask = None if paths is None else FieldMask(paths=paths)
    stream = pb.Stream(id="door-1", **fields)
    request = pb.UpdateStreamRequest(stream=stream, update_mask=mask, etag=etag, probe=False)
    return streams.UpdateStream(request, timeout=10)


def refused(call: Callable[[], Any], code: grpc.StatusCode, reason: str) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    told = dict(error.trailing_metadata())
    assert (error.code(), told.get("reason")) == (code, reason), error.details()
    assert CANARY not in str(error)
    return str(error.details())


def tell(store: StateStore, stream_id: str, how_many: int, epoch: list[Any]) -> None:
    """Write events as the owning replica does."""
    if not epoch:
        epoch.append(store.assign(stream_id, "replica"))
    for _ in range(how_many):
        store.publish(epoch[0], events=[state_event(stream_id, "STARTING", "RUNNING", "", time.time())])


def test_a_stream_is_registered_changed_and_removed(streams: StreamServiceStub, manager: StreamManager):
    made = add(streams, name="Door", max_fps=15, tags={"floor": "1"})
    assert (made.id, made.name, made.enabled, made.max_fps, made.tags["floor"]) == ("door-1", "Door", True, 15.0, "1")
    assert (made.source.username, made.source.HasField("password")) == ("eye", False)
    assert made.status.state == pb.STREAM_STATE_STARTING
    assert [model.name for model in made.models] == ["motion9"]
    kept = manager.store.get_stream("door-1").source.password
    assert kept is not None
    assert kept.get_secret_value() == CANARY
    stopped = streams.StopStream(pb.StopStreamRequest(stream_id="door-1"), timeout=10)
    assert stopped.status.state == pb.STREAM_STATE_STOPPED
    idle = pb.PauseStreamRequest(stream_id="door-1")
    refused(lambda: streams.PauseStream(idle, timeout=10), CODE.FAILED_PRECONDITION, "stream_not_served")
    started = streams.StartStream(pb.StartStreamRequest(stream_id="door-1"), timeout=10)
    assert started.status.state == pb.STREAM_STATE_STARTING
    assert streams.PauseStream(pb.PauseStreamRequest(stream_id="door-1"), timeout=10).paused
    assert not streams.ResumeStream(pb.ResumeStreamRequest(stream_id="door-1"), timeout=10).paused
    again = streams.RestartStream(pb.RestartStreamRequest(stream_id="door-1"), timeout=10)
    assert again.revision == started.revision + 1
    got = streams.GetStream(pb.GetStreamRequest(stream_id="door-1"), timeout=10)
    assert got.etag == again.etag == manager.get("door-1").etag
    streams.DeleteStream(pb.DeleteStreamRequest(stream_id="door-1"), timeout=10)
    gone = pb.GetStreamRequest(stream_id="door-1")
    refused(lambda: streams.GetStream(gone, timeout=10), CODE.NOT_FOUND, "stream_not_found")


def test_an_id_is_made_up_where_none_is_given(streams: StreamServiceStub):
    assert add(streams, "").id.startswith("stream-")


def test_only_what_the_mask_names_is_changed(streams: StreamServiceStub):
    add(streams, name="Door", max_fps=15, tags={"floor": "1"})
    changed = update(streams, ["name"], name="Gate", max_fps=3)
    assert (changed.name, changed.max_fps, list(changed.restarts)) == ("Gate", 15.0, [])
    cleared = update(streams, ["max_fps", "tags", "name"])
    assert (cleared.HasField("max_fps"), dict(cleared.tags), cleared.name) == (False, {}, "")
    assert list(cleared.restarts) == ["max_fps"]
    without = update(streams, name="Yard", enabled=False)
    assert (without.name, without.enabled, without.source.uri) == ("Yard", False, SOURCE.uri)
    assert update(streams, [], name="ignored").name == "Yard", "an empty mask changes nothing"


@pytest.mark.parametrize("path", ["id", "status", "source.uri", "source.password", "etag", "no_such_field", "*"])
def test_what_the_mask_cannot_name_is_told(streams: StreamServiceStub, path: str):
    add(streams)
    told = refused(lambda: update(streams, [path], source=SOURCE), CODE.INVALID_ARGUMENT, "invalid_request")
    assert path in told


def test_a_source_cannot_be_taken_away(streams: StreamServiceStub):
    add(streams)
    refused(lambda: update(streams, ["source"]), CODE.INVALID_ARGUMENT, "invalid_request")
    refused(lambda: update(streams, ["enabled"]), CODE.INVALID_ARGUMENT, "invalid_request")


def test_an_old_etag_changes_nothing(streams: StreamServiceStub):
    made = add(streams)
    renamed = update(streams, name="Gate", etag=made.etag)
    assert renamed.etag != made.etag
    refused(lambda: update(streams, name="Late", etag=made.etag), CODE.ABORTED, "stream_changed")
    late = pb.DeleteStreamRequest(stream_id="door-1", etag=made.etag)
    refused(lambda: streams.DeleteStream(late, timeout=10), CODE.ABORTED, "stream_changed")
    streams.DeleteStream(pb.DeleteStreamRequest(stream_id="door-1", etag=renamed.etag), timeout=10)


@pytest.mark.parametrize(
    ("stream", "code", "reason"),
    [
        (pb.Stream(id="door-1", source=SOURCE), CODE.ALREADY_EXISTS, "stream_exists"),
        (pb.Stream(id="a/b", source=SOURCE), CODE.INVALID_ARGUMENT, "invalid_request"),
        (pb.Stream(id="x"), CODE.INVALID_ARGUMENT, "invalid_request"),
        (pb.Stream(id="x", source=pb.Source(uri=f"http://u:{CANARY}@h/")), CODE.INVALID_ARGUMENT, "invalid_request"),
        (pb.Stream(id="x", source=pb.Source(uri="file:///etc/passwd")), CODE.INVALID_ARGUMENT, "source_not_allowed"),
        (pb.Stream(id="x", source=SOURCE, max_fps=0), CODE.INVALID_ARGUMENT, "invalid_request"),
        (pb.Stream(id="x", source=SOURCE, max_fps=float("nan")), CODE.INVALID_ARGUMENT, "invalid_request"),
        (pb.Stream(id="x", source=SOURCE, models=[pb.StreamModel(name="gpt")]), CODE.INVALID_ARGUMENT, "unknown_model"),
        (pb.Stream(id="x", source=pb.Source(uri="rtsp://h/", rtsp_transport=9)), CODE.INVALID_ARGUMENT, None),
    ],
)
def test_what_cannot_be_registered_is_refused(
    streams: StreamServiceStub, stream: pb.Stream, code: grpc.StatusCode, reason: str | None
):
    add(streams)
    request = pb.CreateStreamRequest(stream=stream, probe=False)
    refused(lambda: streams.CreateStream(request, timeout=10), code, reason or "invalid_request")


def test_a_source_answers_a_probe_first(streams: StreamServiceStub):
    request = pb.CreateStreamRequest(stream=pb.Stream(id="x", source=SOURCE))
    with pytest.raises(grpc.RpcError) as caught:
        streams.CreateStream(request, timeout=20)
    assert caught.value.code() == CODE.UNAVAILABLE  # type: ignore[attr-defined]
    assert not streams.ListStreams(pb.ListStreamsRequest(), timeout=10).streams


def test_pages_hold_every_stream_once(streams: StreamServiceStub):
    for number in range(7):
        add(streams, f"s{number}", tags={"odd": str(number % 2), "n": str(number)}, enabled=number > 0)
    seen, token = [], ""
    while True:
        answer = streams.ListStreams(pb.ListStreamsRequest(page_size=2, page_token=token), timeout=10)
        assert len(answer.streams) <= 2
        seen += [stream.id for stream in answer.streams]
        if not (token := answer.next_page_token):
            break
    assert seen == [f"s{number}" for number in range(7)]

    def ids(**wanted: Any) -> list[str]:
        return [stream.id for stream in streams.ListStreams(pb.ListStreamsRequest(**wanted), timeout=10).streams]

    assert ids(states=[pb.STREAM_STATE_STOPPED]) == ["s0"]
    assert ids(tags={"odd": "1"}) == ["s1", "s3", "s5"]
    assert ids(tags={"odd": "1", "n": "3"}) == ["s3"]


@pytest.mark.parametrize("wanted", [{"page_size": -1}, {"page_size": 1001}, {"page_token": "?"}, {"states": [99]}])
def test_a_page_that_cannot_be_is_refused(streams: StreamServiceStub, wanted: dict[str, Any]):
    request = pb.ListStreamsRequest(**wanted)
    reason = "bad_cursor" if "page_token" in wanted else "invalid_request"
    refused(lambda: streams.ListStreams(request, timeout=10), CODE.INVALID_ARGUMENT, reason)


def test_a_watcher_is_told_what_is_and_each_change(streams: StreamServiceStub, store: StateStore):
    add(streams)
    feed = streams.WatchStreams(pb.WatchStreamsRequest(), timeout=30)
    assert next(feed).stream.status.state == pb.STREAM_STATE_STARTING
    update(streams, name="Gate")
    assert next(feed).stream.name == "Gate"
    event = state_event("door-1", "STARTING", "FAILED", "", time.time())
    status = StreamStatus(state="FAILED", since=1.0, error_code="STREAM_AUTH_FAILED")
    store.announce("door-1", status, events=[event])
    while not (found := next(feed)).stream.status.error_code:
        pass
    assert found.stream.status.error_code == "STREAM_AUTH_FAILED"
    add(streams, "yard")
    assert next(feed).stream.id == "yard"
    streams.DeleteStream(pb.DeleteStreamRequest(stream_id="door-1"), timeout=10)
    assert next(feed).deleted == "door-1"
    feed.cancel()
    refused(
        lambda: next(streams.WatchStreams(pb.WatchStreamsRequest(stream_ids=["nope"]), timeout=10)),
        CODE.NOT_FOUND,
        "stream_not_found",
    )


def received(feed: Any, how_many: int) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    while len(found) < how_many:
        answer = next(feed)
        if answer.HasField("event"):
            found.append((answer.event.partitionkey, answer.event.sequence))
    return found


def test_events_come_once_in_order_over_broken_calls(streams: StreamServiceStub, store: StateStore):
    """A reader that is cut off again and again has every event of every stream once, in each stream's order."""
    names, each = ["a", "b", "c"], 120
    for name in names:
        add(streams, name)

    def write() -> None:
        leases: dict[str, list[Any]] = {name: [] for name in names}
        for number in range(each):
            for name in names:
                tell(store, name, 1, leases[name])
            if number % 10 == 0:
                time.sleep(0.01)

    writer = threading.Thread(target=write)
    writer.start()
    chance, seen = random.Random(5), {name: [] for name in names}
    while sum(map(len, seen.values())) < each * len(names):
        after = {name: sequences[-1] for name, sequences in seen.items() if sequences}
        feed = streams.ReceiveEvents(pb.ReceiveEventsRequest(after=after, earliest=True), timeout=30)
        left = each * len(names) - sum(map(len, seen.values()))
        for name, sequence in received(feed, min(left, chance.randrange(1, 60))):
            seen[name].append(sequence)
        feed.cancel()
    writer.join()
    assert all(sequences == list(range(1, each + 1)) for sequences in seen.values()), seen


def test_a_call_for_named_streams_ends_with_them(streams: StreamServiceStub, store: StateStore):
    leases: list[Any] = []
    add(streams)
    add(streams, "other")
    tell(store, "door-1", 2, leases)
    feed = streams.ReceiveEvents(pb.ReceiveEventsRequest(stream_ids=["door-1"]), timeout=30)
    assert next(feed).HasField("heartbeat"), "what comes from now on is not missed"
    tell(store, "other", 1, [])
    tell(store, "door-1", 2, leases)
    streams.DeleteStream(pb.DeleteStreamRequest(stream_id="door-1"), timeout=10)
    rest = list(feed)
    assert [one.event.sequence for one in rest[:-1]] == [3, 4]
    assert rest[-1].gone == "door-1"
    assert feed.code() == CODE.OK


def test_streams_that_come_later_are_heard(streams: StreamServiceStub, store: StateStore):
    feed = streams.ReceiveEvents(pb.ReceiveEventsRequest(), timeout=30)
    assert next(feed).HasField("heartbeat")
    add(streams, "late")
    tell(store, "late", 3, [])
    assert received(feed, 3) == [("late", 1), ("late", 2), ("late", 3)]
    feed.cancel()


def test_an_event_says_what_the_store_has(streams: StreamServiceStub, store: StateStore):
    add(streams)
    tell(store, "door-1", 1, [])
    feed = streams.ReceiveEvents(pb.ReceiveEventsRequest(after={"door-1": 0}), timeout=10)
    event = next(answer for answer in feed if answer.HasField("event")).event
    feed.cancel()
    (kept,) = store.events("door-1")
    told = MessageToDict(event, preserving_proto_field_name=True)
    assert told.keys() == kept.keys(), "every attribute has its field"
    assert told.pop("time")[:19] == kept.pop("time")[:19]
    assert int(told.pop("sequence")) == kept.pop("sequence")
    assert told == kept


@pytest.mark.parametrize("request_", [{"stream_ids": ["nope"]}, {"stream_ids": ["door-1"], "after": {"other": 1}}])
def test_a_feed_that_cannot_be_is_refused(streams: StreamServiceStub, request_: dict[str, Any]):
    add(streams)
    feed = streams.ReceiveEvents(pb.ReceiveEventsRequest(**request_), timeout=10)
    code, reason = (
        (CODE.INVALID_ARGUMENT, "invalid_request")
        if "after" in request_
        else (
            CODE.NOT_FOUND,
            "stream_not_found",
        )
    )
    refused(lambda: next(feed), code, reason)


# messages


def fields_of(model: type[BaseModel], message: type[Message], *, without: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    names = {field.name for field in message.DESCRIPTOR.fields}
    assert set(model.model_fields) - without <= names, f"{model.__name__}: what has no field in the proto?"


def test_every_field_of_the_json_is_in_the_proto():
    fields_of(StreamView, pb.Stream)
    fields_of(NewStream, pb.Stream)
    fields_of(StreamChanges, pb.Stream)
    fields_of(SourceSpec, pb.Source)
    fields_of(StreamStatus, pb.StreamStatus)
    fields_of(ModelStatus, pb.ModelStatus)
    fields_of(Latency, pb.Latency)
    fields_of(Restored, pb.Restored)
    fields_of(StreamModel, pb.StreamModel, without={"where"})
    fields_of(Region, pb.Region)
    fields_of(ObjectsOf, pb.ObjectsOf)
    fields_of(Filter, pb.Filter)
    fields_of(Zone, pb.Zone)
    fields_of(Line, pb.Line)
    states = {value.name.removeprefix("STREAM_STATE_") for value in pb.StreamState.DESCRIPTOR.values}
    said = StreamStatus.model_fields["state"].annotation
    assert states - {"UNSPECIFIED"} == set(said.__args__)  # type: ignore[union-attr]


def test_models_mean_the_same_in_both_doors():
    models = (
        StreamModel(
            name="boxes",
            labels=("person", "car"),
            min_score=0.4,
            filters={"car": Filter(threshold=0.9, max_area=0.5)},
            zones=(Zone(name="yard", points=((0, 0), (1, 0), (1, 1)), loitering_s=60, objects=("car",)),),
            lines=(Line(name="gate", a=(0.3, 1), b=(0.3, 0.4), inertia=4),),
            required_zones=("yard",),
        ),
        StreamModel(name="a", threshold=0.5, off_threshold=0.0, where=Region(region="left", box=(0, 0, 0.5, 1))),
        StreamModel(name="b", window_s=4, where=ObjectsOf(objects_of="boxes", labels=("car",), margin=0.0)),
        StreamModel(name="c", smoother="gesture"),
    )
    source = SourceSpec(uri="rtsp://h/x", rtsp_transport="udp", decoder="pyav", loop=True)
    spec = StreamSpec(id="x", source=source, models=models, tags={"a": "b"}, enabled=False, max_fps=4)
    view = StreamView(**dict(spec), status=StreamStatus(state="RUNNING", since=1.0, source_size=(4, 3)))
    shown = stream_message(view)
    again = NewStream.model_validate({k: v for k, v in to_json(shown).items() if k in NewStream.model_fields})
    assert again == NewStream(**{name: getattr(spec, name) for name in NewStream.model_fields})
    assert list(shown.status.source_size) == [4, 3]


def test_every_method_has_a_role():
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["StreamService"].methods}
    assert methods == set(ROLES)
    assert {name for name, role in ROLES.items() if role == "viewer"} == {
        "GetStream",
        "ListStreams",
        "WatchStreams",
        "ReceiveEvents",
    }


def test_generated_files_are_what_the_proto_gives(tmp_path: Path):
    for made in make_stubs.make(tmp_path):
        assert (make_stubs.ROOT / made.relative_to(tmp_path)).read_bytes() == made.read_bytes(), "run `make docs`"


# anything at all


def scribbled(message: Message, chance: random.Random) -> Message:
    """The message with random values in random fields."""
    texts = ("", "door-1", "a/b", "\x00", "é" * 300, "*", "rtsp://127.0.0.1:9/x", "file:///etc")
    numbers = (0, 1, -1, 2**31 - 1, -(2**31))
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.5:
            continue
        kind, there = field.message_type, getattr(message, field.name)
        if kind is not None and kind.GetOptions().map_entry:
            if kind.fields_by_name["value"].message_type is not None:
                scribbled(there[chance.choice(texts)], chance)
            else:
                text = kind.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING
                there[chance.choice(texts)] = chance.choice(texts) if text else chance.choice(numbers)
        elif kind is not None and field.is_repeated:
            for _ in range(chance.randrange(3)):
                scribbled(there.add(), chance)
        elif kind is not None and kind.full_name.startswith("google."):
            there.SetInParent()
            if kind.name == "FieldMask":
                there.paths.extend(chance.choices([*StreamChanges.model_fields, *texts], k=chance.randrange(4)))
        elif kind is not None:
            scribbled(there, chance)
        else:
            values: tuple[Any, ...] = numbers
            if field.type == FieldDescriptor.TYPE_STRING:
                values = (*texts, f"rtsp://u:{CANARY}@[", f"rtsp://{CANARY}@h:x/") if field.name == "uri" else texts
            elif field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
                values = (0.0, 0.5, -1.0, float("nan"), float("inf"), 1e308)
            elif field.type == FieldDescriptor.TYPE_BOOL:
                values = (True, False)
            if field.is_repeated:
                there.extend(chance.choices(values, k=chance.randrange(4)))
            else:
                setattr(message, field.name, chance.choice(values))
    return message


def test_no_message_breaks_it(tmp_path: Path):
    """3,000 messages of random values, and bytes that are none: each has an answer or a refusal, none is a bug."""
    settings = Settings(
        source=SourceSettings(file_roots=(tmp_path,), probe_timeout_s=0.2), auth=AuthSettings(requests_burst=100_000)
    )
    manager = StreamManager(MemoryStore(StoreSettings()), settings, models=MODELS)
    manager.create(StreamSpec(id="door-1", source=SourceSpec(uri="rtsp://127.0.0.1:9/x")), check=False)
    kinds = [
        method for method in pb.DESCRIPTOR.services_by_name["StreamService"].methods if not method.server_streaming
    ]
    chance = random.Random(11)
    expected = {CODE.INVALID_ARGUMENT, CODE.NOT_FOUND, CODE.ALREADY_EXISTS, CODE.ABORTED, CODE.UNAVAILABLE}
    expected.add(CODE.FAILED_PRECONDITION)
    answered = 0
    with rpc_door(manager) as channel:
        calls: deque[tuple[str, bytes, Any]] = deque()
        for number in range(3000):
            kind = chance.choice(kinds)
            request = getattr(pb, kind.input_type.name)()
            raw = bytearray(scribbled(request, chance).SerializeToString())
            if number % 3 == 0 and raw:
                for _ in range(chance.randrange(1, 4)):
                    raw[chance.randrange(len(raw))] = chance.randrange(256)
            call = channel.unary_unary(f"/tsm.v1.StreamService/{kind.name}")
            calls.append((kind.name, bytes(raw), call.future(bytes(raw), timeout=60)))
            while len(calls) > (100 if number < 2999 else 0):
                name, sent, future = calls.popleft()
                if (error := future.exception()) is None:
                    answered += 1
                else:
                    assert error.code() in expected, (name, sent, error)
                    assert CANARY not in str(error.details())
        assert answered > 50
        StreamServiceStub(channel).ListStreams(pb.ListStreamsRequest(), timeout=10)


def test_fill_leaves_a_password_out():
    assert not fill(pb.Source(), {"uri": "rtsp://h/", "password": CANARY}).HasField("password")
