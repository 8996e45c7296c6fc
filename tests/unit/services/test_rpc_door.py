"""The gRPC door itself: who comes in, what an error looks like, health, reflection, and how it closes."""

import logging
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from services.feed import Hub
from services.locks.callers import Locks
from services.manager import StreamManager
from services.ports import PortTaken
from services.rpc.server import GrpcDoor, RpcService, address_of
from services.rpc.streams import ROLES, stream_service
from services.rpc.tsm.v1 import streams_pb2 as pb
from services.rpc.tsm.v1.streams_pb2_grpc import StreamServiceStub
from services.schemas import SourceSpec, StreamSpec, state_event
from services.settings import AuthSettings, Settings, StoreSettings
from services.store import MemoryStore
from tests.unit.services.http_kit import CANARY, MODELS
from tests.unit.services.rpc_kit import rpc_door, stub

CODE = grpc.StatusCode
SERVICE = pb.DESCRIPTOR.services_by_name["StreamService"]


def manager_of(*streams: str, **auth: Any) -> StreamManager:
    manager = StreamManager(MemoryStore(StoreSettings()), Settings(auth=AuthSettings(**auth)), models=MODELS)
    for stream_id in streams:
        manager.create(StreamSpec(id=stream_id, source=SourceSpec(uri="rtsp://127.0.0.1:9/x")), check=False)
    return manager


def bearer(text: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {text}"),)


def code_of(call: Any, *, feed: bool = False) -> tuple[grpc.StatusCode, str]:
    """Code and reason with which a call ends; a feed is asked for its first message."""
    try:
        if feed:
            next(call)
            call.cancel()
        else:
            call.result(timeout=30)
    except grpc.RpcError as error:
        told: Any = error
        return told.code(), dict(told.trailing_metadata()).get("reason", "")
    return CODE.OK, ""


# who comes in

OWN, OTHER = "door-1", "yard-1"


def invoke(channel: grpc.Channel, method: str, request: Any, metadata: Any) -> tuple[grpc.StatusCode, str]:
    described = SERVICE.methods_by_name[method]
    path, serialize = f"/{SERVICE.full_name}/{method}", type(request).SerializeToString
    if described.server_streaming:
        return code_of(channel.unary_stream(path, serialize)(request, metadata=metadata, timeout=30), feed=True)
    return code_of(channel.unary_unary(path, serialize).future(request, metadata=metadata, timeout=30))


def test_a_token_of_some_streams_sees_no_others():
    manager = manager_of(OWN, OTHER, required="always")
    own = bearer(Locks(manager.store, manager.settings).tokens.create("elsewhere", "operator", ("yard-*",))[1])
    with rpc_door(manager) as channel:
        streams = StreamServiceStub(channel)
        listed = streams.ListStreams(pb.ListStreamsRequest(), metadata=own, timeout=10)
        assert [stream.id for stream in listed.streams] == [OTHER]
        watched = streams.WatchStreams(pb.WatchStreamsRequest(), metadata=own, timeout=30)
        heard = streams.ReceiveEvents(pb.ReceiveEventsRequest(earliest=True), metadata=own, timeout=30)
        assert next(watched).stream.id == OTHER
        next(heard)
        for stream_id in (OWN, OTHER):
            lease = manager.store.assign(stream_id, "replica")
            manager.store.publish(lease, events=[state_event(stream_id, None, "RUNNING", "", time.time())])
            manager.update(stream_id, {"name": "new"})
        assert next(heard).event.partitionkey == OTHER
        while (found := next(watched).stream).name != "new":
            assert found.id == OTHER
        watched.cancel()
        heard.cancel()
        nameless = pb.CreateStreamRequest(stream=pb.Stream(source=pb.Source(uri="rtsp://127.0.0.1:9/x")), probe=False)
        assert invoke(channel, "CreateStream", nameless, own) == (CODE.PERMISSION_DENIED, "forbidden")


def test_a_feed_ends_when_its_token_is_revoked(monkeypatch):
    monkeypatch.setattr("services.rpc.server.RECHECK_S", 0.2)
    monkeypatch.setattr("services.rpc.streams.HEARTBEAT_S", 0.2)
    manager = manager_of(OWN, required="always")
    tokens = Locks(manager.store, manager.settings).tokens
    metadata = bearer(tokens.create("looker", "viewer")[1])
    with rpc_door(manager) as channel:
        streams = StreamServiceStub(channel)
        feeds = [
            streams.WatchStreams(pb.WatchStreamsRequest(), metadata=metadata, timeout=30),
            streams.ReceiveEvents(pb.ReceiveEventsRequest(), metadata=metadata, timeout=30),
        ]
        began_s = time.monotonic()
        for feed in feeds:
            next(feed)
            while time.monotonic() < began_s + 1:
                next(feed)  # it goes on while the token is good
        tokens.revoke("looker")
        for feed in feeds:
            with pytest.raises(grpc.RpcError) as ended:
                list(feed)
            assert ended.value.code() == CODE.UNAUTHENTICATED


def test_a_method_without_a_role_is_for_admins():
    service = stream_service(manager := manager_of(required="always"), Hub(manager))
    bare = RpcService(service.descriptor, service.servicer, {"ListStreams": "viewer"})
    tokens = Locks(manager.store, manager.settings).tokens
    operator = bearer(tokens.create("o", "operator")[1])
    with rpc_door(manager, services=[bare]) as channel:
        assert invoke(channel, "ListStreams", pb.ListStreamsRequest(), operator)[0] == CODE.OK
        assert invoke(channel, "GetStream", pb.GetStreamRequest(), operator)[0] == CODE.PERMISSION_DENIED


def test_every_request_about_a_stream_names_it_where_the_door_looks():
    for method in SERVICE.methods:
        fields = method.input_type.fields_by_name
        assert {"stream_id", "stream", "stream_ids"} & set(fields) or method.name == "ListStreams", method.name


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:127.0.0.1:53", "127.0.0.1"), ("ipv6:%5B::1%5D:53", "::1"), ("ipv6:[fe80::1%25eth0]:1", "fe80::1%eth0")],
)
def test_the_address_of_a_peer(peer: str, address: str):
    assert address_of(peer) == address


# errors


class Broken:
    """A servicer with bugs."""

    async def GetStream(self, request: Any, call: Any) -> Any:  # noqa: N802
        raise RuntimeError(f"text with {CANARY}")

    async def WatchStreams(self, request: Any, call: Any) -> AsyncIterator[Any]:  # noqa: N802
        yield pb.WatchStreamsResponse(deleted="one")
        raise RuntimeError(f"text with {CANARY}")

    def __getattr__(self, name: str) -> Any:
        return self.GetStream


def test_a_bug_is_logged_and_told_without_its_text(caplog: pytest.LogCaptureFixture):
    manager = manager_of()
    with (
        caplog.at_level(logging.ERROR, "services.rpc"),
        stub(manager, services=[RpcService(SERVICE, Broken(), dict.fromkeys(ROLES, "viewer"))]) as streams,
    ):
        with pytest.raises(grpc.RpcError) as caught:
            streams.GetStream(pb.GetStreamRequest(stream_id="x"), timeout=10)
        feed = streams.WatchStreams(pb.WatchStreamsRequest(), timeout=10)
        assert next(feed).deleted == "one", "what came before the bug arrives"
        with pytest.raises(grpc.RpcError) as broken:
            next(feed)
    for error in (caught.value, broken.value):
        assert error.code() == CODE.INTERNAL  # type: ignore[attr-defined]
        assert CANARY not in str(error)
    assert CANARY in caplog.text, "the log has what it takes to mend it"


def test_what_is_no_message_is_refused_and_what_is_unknown_too():
    with rpc_door(manager_of()) as channel:
        call = channel.unary_unary("/tsm.v1.StreamService/GetStream")
        assert code_of(call.future(b"\xff\xff\xff", timeout=10)) == (CODE.INVALID_ARGUMENT, "invalid_message")
        unknown = channel.unary_unary("/tsm.v1.StreamService/NoSuchMethod")
        assert code_of(unknown.future(b"", timeout=10))[0] == CODE.UNIMPLEMENTED


def test_a_message_above_the_limit_is_refused():
    with rpc_door(manager_of(), max_message_bytes=10_000) as channel:
        call = channel.unary_unary("/tsm.v1.StreamService/GetStream")
        assert code_of(call.future(bytes(20_000), timeout=10))[0] == CODE.RESOURCE_EXHAUSTED
        assert code_of(call.future(b"", timeout=10))[0] == CODE.NOT_FOUND, "the next is served"


# health, reflection, ports


def test_health_is_open_to_everybody():
    with rpc_door(manager_of(required="always")) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "tsm.v1.StreamService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_only_where_it_is_wanted():
    with rpc_door(manager_of()) as channel:
        call = channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        assert code_of(call.future(b"", timeout=10))[0] == CODE.UNIMPLEMENTED
    with rpc_door(manager_of(), with_reflection=True) as channel:
        told = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE.full_name, "grpc.health.v1.Health"} <= set(told.get_services())
        found = DescriptorPool(told).FindServiceByName(SERVICE.full_name)
        assert [method.name for method in found.methods] == [method.name for method in SERVICE.methods]


def test_a_taken_port_is_told_with_the_way_out():
    manager = manager_of()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortTaken, match="--grpc-port"):
        GrpcDoor("127.0.0.1", taken.getsockname()[1], [], Locks(manager.store, manager.settings))


def test_it_listens_where_it_is_told_alone():
    manager = manager_of()
    door = GrpcDoor("127.0.0.1", 0, [], Locks(manager.store, manager.settings))
    try:
        with pytest.raises(OSError):
            socket.create_connection(("::1", door.port), timeout=2).close()
        socket.create_connection(("127.0.0.1", door.port), timeout=2).close()
    finally:
        door.stop()


def test_closing_ends_open_feeds_within_three_seconds(tmp_path: Path):
    manager = manager_of("door-1")
    ended: list[grpc.StatusCode] = []
    before = {thread.name for thread in threading.enumerate()}
    door = GrpcDoor("127.0.0.1", 0, [stream_service(manager, Hub(manager))], Locks(manager.store, manager.settings))
    with grpc.insecure_channel(f"127.0.0.1:{door.port}") as channel:
        feeds = [StreamServiceStub(channel).ReceiveEvents(pb.ReceiveEventsRequest(), timeout=60) for _ in range(5)]
        for feed in feeds:
            next(feed)
        began = time.monotonic()
        door.stop()
        assert time.monotonic() - began < 3.0
        assert not door.alive()
        for feed in feeds:
            with pytest.raises(grpc.RpcError):
                next(feed)
            ended.append(feed.code())
    assert set(ended) <= {CODE.CANCELLED, CODE.UNAVAILABLE}, ended
    assert "grpc" not in {thread.name for thread in threading.enumerate()} - before
    door.stop()  # once more does nothing
