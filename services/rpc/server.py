"""The gRPC door: a server in a thread of its own; every call passes the locks, every error has its code and `reason`.

A servicer is a plain class with one coroutine, or asynchronous generator, per method, taking `(request, call)`; what
its methods are, the descriptor of its service says. So one class serves here and behind Ray Serve's proxy.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from services.http.problems import status_of
from services.locks.callers import Caller, Locks, Role
from services.ports import PortTaken, bracketed
from tsm_core.errors import CallerError, TSMError

log = logging.getLogger(__name__)

START_S = 20.0
GRACE_S = 1.0  # calls that are under way when the door closes may end by themselves for so long
THREADS = 32  # calls that wait for the store or a camera at once
MAX_CALLS = 1000
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, LEAST_PING_MS = 30_000, 10_000, 10_000
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    412: grpc.StatusCode.ABORTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    428: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status of an error to the code that gRPC has for it."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a method knows of its call beside the request. metadata: names in lower case."""

    caller: Caller
    metadata: Mapping[str, str | bytes]


Handler = grpc.RpcMethodHandler[Any, Any]
Unary = Callable[[Any, Any], Awaitable[Any]]
Streaming = Callable[[Any, Any], AsyncIterator[Any]]


@dataclass(frozen=True, slots=True)
class RpcService:
    """A service and who may call it.

    descriptor names the methods; servicer has `async def Method(request, call)` for each, which yields where the
    method's answer is a stream, and whose request is an asynchronous iterator where the request is one. roles: the
    least role by method; a method that is not named needs admin.
    """

    descriptor: ServiceDescriptor
    servicer: object
    roles: Mapping[str, Role]

    def role(self, method: str) -> Role:
        """The least role for a method."""
        return self.roles.get(method, "admin")

    def handlers(self, locks: Locks) -> dict[str, Handler]:
        """Handlers for grpc.aio by method, behind the locks."""
        return {method.name: self._handler(method, locks) for method in self.descriptor.methods}

    def _handler(self, method: MethodDescriptor, locks: Locks) -> Handler:
        behaviour = getattr(self.servicer, method.name)
        kind = f"{_arity(method.client_streaming)}_{_arity(method.server_streaming)}"
        guarded = (_guarded_stream if method.server_streaming else _guarded_unary)(
            behaviour, locks, self.role(method.name)
        )
        handler: Handler = getattr(grpc, f"{kind}_rpc_method_handler")(
            guarded,
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
        )
        return handler


def _arity(streaming: bool) -> str:
    return "stream" if streaming else "unary"


async def admit(locks: Locks, role: Role, request: Any, metadata: Iterable[tuple[str, str | bytes]]) -> Call:
    """The call, when its caller has the role and sees every stream that the request names.

    Raises NoToken, BadToken, Forbidden, StoreDown.
    """
    told = dict(metadata)
    authorization = told.get("authorization")
    caller = await asyncio.to_thread(locks.caller, authorization if isinstance(authorization, str) else None)
    for stream_id in named_streams(request) or (None,):
        locks.allow(caller, role, stream_id)
    return Call(caller, told)


def named_streams(request: Any) -> tuple[str, ...]:
    """The streams that a request is about: its `stream_id`, given or not, or its `stream_ids`."""
    if hasattr(request, "stream_id"):
        return (request.stream_id,)
    return tuple(getattr(request, "stream_ids", ()))


def refusal(error: Exception) -> tuple[grpc.StatusCode, str, str]:
    """(code, text, reason) that a caller is told for an error; a bug is logged and told without its text."""
    if isinstance(error, TSMError):
        unlisted = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, CallerError) else grpc.StatusCode.UNAVAILABLE
        return CODES.get(status_of(error), unlisted), str(error), error.reason
    log.error("a gRPC method failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, "an error of the service; its log says more", "internal_error"


async def _refuse(context: Any, error: Exception) -> None:
    code, text, reason = refusal(error)
    await context.abort(code, text, (("reason", reason),))


def _guarded_unary(behaviour: Unary, locks: Locks, role: Role) -> Unary:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            call = await admit(locks, role, request, context.invocation_metadata())
            return await behaviour(request, call)
        except Exception as error:  # noqa: BLE001  all become a code
            return await _refuse(context, error)

    return guarded


def _guarded_stream(behaviour: Streaming, locks: Locks, role: Role) -> Streaming:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            call = await admit(locks, role, request, context.invocation_metadata())
            async with aclosing(behaviour(request, call)) as answers:  # type: ignore[type-var]
                async for answer in answers:
                    yield answer
        except Exception as error:  # noqa: BLE001  all become a code
            await _refuse(context, error)

    return guarded


def one_pool(files: Iterable[Any]) -> descriptor_pool.DescriptorPool:
    """A pool that knows the file descriptors and what they import, whichever pools they are in."""
    pool, known = descriptor_pool.DescriptorPool(), set()

    def add(file: Any) -> None:
        if file.name not in known:
            known.add(file.name)
            for needed in file.dependencies:
                add(needed)
            own = FileDescriptorProto()
            file.CopyToProto(own)
            pool.Add(own)

    for file in files:
        add(file)
    return pool


class GrpcDoor:
    """A running gRPC server with grpc.health.v1 and, if wanted, reflection; end it with `stop()`.

    Raises PortTaken. `port` is the one it listens on, also where 0 asked for a free one.
    """

    def __init__(
        self,
        host: str,
        port: int,
        services: Sequence[RpcService],
        locks: Locks,
        *,
        with_reflection: bool = False,
        max_message_bytes: int = 4 << 20,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(THREADS, "grpc-call"))
        self._thread = threading.Thread(target=self._run, name="grpc", daemon=True)
        self._thread.start()
        try:
            self.port = self._wait(
                self._start(host, port, services, locks, with_reflection, max_message_bytes), START_S
            )
        except BaseException:
            self._end_loop()
            raise

    def alive(self) -> bool:
        """True while it serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Refuse new calls, end those under way, close the port: within `GRACE_S` and a little."""
        if self._thread.is_alive():
            self._wait(self._stop(), GRACE_S + 2.0)
            self._end_loop()

    async def _start(
        self,
        host: str,
        port: int,
        services: Sequence[RpcService],
        locks: Locks,
        with_reflection: bool,
        max_message_bytes: int,
    ) -> int:
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # a port that is taken is told, not shared
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_MS),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        for service in services:
            name = service.descriptor.full_name
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(name, service.handlers(locks)),)
            )
        names = [service.descriptor.full_name for service in services]
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if with_reflection:
            files = [service.descriptor.file for service in services]
            pool = one_pool([*files, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR])
            shown = [*names, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(shown, self._server, pool)
        try:
            bound = int(self._server.add_insecure_port(f"{bracketed(host)}:{port}"))
        except RuntimeError:
            raise PortTaken(
                f"cannot listen on {host}:{port} for gRPC; choose another with --grpc-port (0 takes a free one)"
            ) from None
        await self._server.start()
        return bound

    async def _stop(self) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(GRACE_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _wait(self, work: Any, timeout_s: float) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2.0)
