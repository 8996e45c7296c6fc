"""What the tests of the gRPC door share: the door over a store, and a channel to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from services.feed import Hub
from services.locks.callers import Locks
from services.manager import StreamManager
from services.rpc.server import GrpcDoor, RpcService
from services.rpc.streams import stream_service
from services.rpc.tsm.v1.streams_pb2_grpc import StreamServiceStub


@contextlib.contextmanager
def rpc_door(
    manager: StreamManager, *, services: Sequence[RpcService] | None = None, **options: Any
) -> Iterator[grpc.Channel]:
    """A channel to a running door."""
    found = [stream_service(manager, Hub(manager))] if services is None else services
    door = GrpcDoor("127.0.0.1", 0, found, Locks(manager.store, manager.settings), **options)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{door.port}") as channel:
            yield channel
    finally:
        door.stop()


@contextlib.contextmanager
def stub(manager: StreamManager, **options: Any) -> Iterator[StreamServiceStub]:
    """The stream service behind a running door."""
    with rpc_door(manager, **options) as channel:
        yield StreamServiceStub(channel)
