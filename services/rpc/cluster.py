"""The gRPC services behind Ray Serve's proxy, which has no interceptors: each method passes the locks by itself.

The proxy is told `grpc_servicer_functions`, from which it learns the methods, and sends each call to the ingress'
method of that name: requests arrive there as bytes and are read once their caller is known, as on one machine.
Every proxy imports this module while Serve waits for it: it must stay light.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet, MethodDescriptorProto

from services.rpc.tsm.v1 import streams_pb2

STREAMS = FileDescriptorProto.FromString(streams_pb2.DESCRIPTOR.serialized_pb)
(INFERENCE,) = FileDescriptorSet.FromString((Path(__file__).parent / "open_inference.binpb").read_bytes()).file

C = TypeVar("C", bound=type[Any])


def add_streams(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`: the methods of tsm.v1.StreamService."""
    _add(STREAMS, servicer, server)


def add_inference(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`: the methods of inference.GRPCInferenceService."""
    _add(INFERENCE, servicer, server)


def _add(file: FileDescriptorProto, servicer: Any, server: Any) -> None:
    (service,) = file.service
    handlers = {}
    for method in service.method:
        kinds = ("stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming))
        handler = getattr(grpc, f"{'_'.join(kinds)}_rpc_method_handler")
        handlers[method.name] = handler(getattr(servicer, method.name))
    name = f"{file.package}.{service.name}"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


def grpc_ingress(kind: C) -> C:
    """The class with a method for each of the services', which calls what its `rpc` has under that name."""
    for file in (STREAMS, INFERENCE):
        for method in file.service[0].method:
            setattr(kind, method.name, _ingress_method(method))
    return kind


def _ingress_method(method: MethodDescriptorProto) -> Callable[..., Any]:
    name = method.name

    async def unary(self: Any, request: Any, grpc_context: Any) -> Any:
        return await self.rpc[name](request, grpc_context)

    async def stream(self: Any, request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(self.rpc[name](request, grpc_context)) as answers:
            async for answer in answers:
                yield answer

    made = stream if method.server_streaming else unary
    made.__name__ = name
    return made
