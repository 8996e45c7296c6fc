"""The gRPC services behind Ray Serve's proxy, which has no interceptors: each method passes the locks by itself.

The proxy is told `grpc_servicer_functions`, from which it learns the methods, and sends each call to the ingress'
method of that name: requests arrive there as bytes and are read once their caller is known, as on one machine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from services.rpc.open_inference import POOL, SERVICE
from services.rpc.tsm.v1 import streams_pb2

STREAMS: ServiceDescriptor = streams_pb2.DESCRIPTOR.services_by_name["StreamService"]
INFERENCE: ServiceDescriptor = POOL.FindServiceByName(SERVICE)

C = TypeVar("C", bound=type[Any])


def add_streams(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`: the methods of tsm.v1.StreamService."""
    _add(STREAMS, servicer, server)


def add_inference(servicer: Any, server: Any) -> None:
    """For `grpc_servicer_functions`: the methods of inference.GRPCInferenceService."""
    _add(INFERENCE, servicer, server)


def _add(service: ServiceDescriptor, servicer: Any, server: Any) -> None:
    handlers = {}
    for method in service.methods:
        kinds = ("stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming))
        handler = getattr(grpc, f"{'_'.join(kinds)}_rpc_method_handler")
        serializer = message_factory.GetMessageClass(method.output_type).SerializeToString
        handlers[method.name] = handler(getattr(servicer, method.name), response_serializer=serializer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def grpc_ingress(kind: C) -> C:
    """The class with a method for each of the services', which calls what its `rpc` has under that name."""
    for service in (STREAMS, INFERENCE):
        for method in service.methods:
            setattr(kind, method.name, _ingress_method(method))
    return kind


def _ingress_method(method: MethodDescriptor) -> Callable[..., Any]:
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
