"""The gRPC services as Ray Serve's proxy calls them: bytes in, a code and its reason out, the locks passed first."""

import asyncio
import inspect
import subprocess
import sys
from typing import Any

import grpc
import pytest

from services.feed import Hub
from services.locks.callers import Locks
from services.manager import StreamManager
from services.rpc import cluster, open_inference
from services.rpc.streams import stream_service
from services.rpc.tsm.v1 import streams_pb2 as pb
from services.schemas import SourceSpec, StreamSpec
from services.settings import AuthSettings, Settings, StoreSettings
from services.store import MemoryStore
from tests.unit.services.http_kit import MODELS


class Context:
    """What of a call Serve sends to a replica."""

    def __init__(self, **metadata: str) -> None:
        self.metadata = tuple(metadata.items())
        self.told: dict[str, Any] = {}

    def invocation_metadata(self) -> Any:
        return self.metadata

    def peer(self) -> str:
        return "ipv4:10.0.0.7:4711"

    def set_code(self, code: Any) -> None:
        self.told["code"] = code

    def set_details(self, details: str) -> None:
        self.told["details"] = details

    def set_trailing_metadata(self, metadata: list[tuple[str, str]]) -> None:
        self.told |= dict(metadata)


@cluster.grpc_ingress
class Ingress:
    """An ingress with the stream service alone."""

    def __init__(self) -> None:
        settings = Settings(auth=AuthSettings(required="always"))
        self.manager = StreamManager(MemoryStore(StoreSettings()), settings, models=MODELS)
        self.manager.create(StreamSpec(id="door-1", source=SourceSpec(uri="rtsp://127.0.0.1:9/x")), check=False)
        self.locks = Locks(self.manager.store, settings)
        self.token = self.locks.tokens.create("reader", "viewer")[1]
        self.rpc = stream_service(self.manager, Hub(self.manager)).guarded(self.locks)


def test_a_call_has_its_answer_and_a_refusal_its_code():
    async def run() -> None:
        ingress: Any = Ingress()
        raw = pb.GetStreamRequest(stream_id="door-1").SerializeToString()
        own = Context(authorization=f"Bearer {ingress.token}")
        assert (await ingress.GetStream(raw, grpc_context=own)).id == "door-1"
        assert own.told == {}
        stranger = Context()
        assert await ingress.GetStream(raw, grpc_context=stranger) == pb.Stream(), "nothing is told"
        assert (stranger.told["code"], stranger.told["reason"]) == (grpc.StatusCode.UNAUTHENTICATED, "token_required")
        weak = Context(authorization=f"Bearer {ingress.token}")
        await ingress.DeleteStream(pb.DeleteStreamRequest(stream_id="door-1").SerializeToString(), grpc_context=weak)
        assert weak.told["code"] == grpc.StatusCode.PERMISSION_DENIED
        assert ingress.manager.get("door-1").id == "door-1"
        feed = ingress.WatchStreams(b"", grpc_context=Context(authorization=f"Bearer {ingress.token}"))
        assert (await anext(feed)).stream.id == "door-1"
        await feed.aclose()
        refused = Context()
        with pytest.raises(Exception, match="token"):
            await anext(ingress.WatchStreams(b"", grpc_context=refused))
        assert refused.told["code"] == grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())


def test_a_proxy_imports_little():
    """Serve gives a proxy few seconds to be there."""
    script = "import sys, services.rpc.cluster; print(sorted({'torch', 'pydantic', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_the_ingress_has_every_method_and_the_proxy_learns_them_all():
    added: dict[str, Any] = {}

    class Server:
        def add_generic_rpc_handlers(self, handlers: Any) -> None:
            added.update(handlers[0]._method_handlers)

    class Anything:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    cluster.add_streams(Anything(), Server())
    cluster.add_inference(Anything(), Server())
    inference = open_inference.POOL.FindServiceByName(open_inference.SERVICE)
    for service in (pb.DESCRIPTOR.services_by_name["StreamService"], inference):
        for method in service.methods:
            handler = added.pop(f"/{service.full_name}/{method.name}")
            assert (handler.request_streaming, handler.response_streaming) == (
                method.client_streaming,
                method.server_streaming,
            )
            assert handler.request_deserializer is None, "bytes are read behind the locks"
            made = getattr(Ingress, method.name)
            assert "grpc_context" in inspect.signature(made).parameters
            assert inspect.isasyncgenfunction(made) == method.server_streaming
    assert not added
