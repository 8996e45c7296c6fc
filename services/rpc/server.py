"""The gRPC door: a server in a thread of its own; every call passes the locks, every error has its code and `reason`.

A servicer is a plain class with one coroutine, or asynchronous generator, per method, taking `(request, call)`; what
its methods are, the descriptor of its service says. So one class serves here and behind Ray Serve's proxy.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from services.http.problems import status_of
from services.locks.callers import RECHECK_S, Caller, Locks
from services.locks.tokens import Role
from services.ports import PortTaken, bracketed
from services.rpc.observe import observed
from services.store import StreamExists
from services.telemetry import DoorTelemetry
from tsm_core.errors import CallerError, TSMError, WorldError

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
    409: grpc.StatusCode.FAILED_PRECONDITION,
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


class BadMessage(CallerError):
    """Bytes that are no message of the method's kind."""

    reason = "invalid_message"


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

    def paths(self) -> list[str]:
        """The full names of the methods, `/package.Service/Method`."""
        return [f"/{self.descriptor.full_name}/{method.name}" for method in self.descriptor.methods]

    def role(self, method: str) -> Role:
        """The least role for a method."""
        return self.roles.get(method, "admin")

    def guarded(self, locks: Locks, telemetry: DoorTelemetry | None = None) -> dict[str, Callable[[Any, Any], Any]]:
        """By method: what it does with a request, a message or its bytes, and gRPC's context, behind the locks."""
        return {method.name: self._guarded(method, locks, telemetry) for method in self.descriptor.methods}

    def handlers(
        self, locks: Locks, telemetry: DoorTelemetry | None = None
    ) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """By method: its handler for grpc.aio. Requests are read only once their caller is known."""
        found = {}
        for method in self.descriptor.methods:
            kinds = ("stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming))
            handler = getattr(grpc, f"{'_'.join(kinds)}_rpc_method_handler")
            serializer = message_factory.GetMessageClass(method.output_type).SerializeToString
            found[method.name] = handler(self._guarded(method, locks, telemetry), response_serializer=serializer)
        return found

    def _guarded(
        self, method: MethodDescriptor, locks: Locks, telemetry: DoorTelemetry | None
    ) -> Callable[[Any, Any], Any]:
        behaviour, role = getattr(self.servicer, method.name), self.role(method.name)
        kind = message_factory.GetMessageClass(method.input_type)
        answer = message_factory.GetMessageClass(method.output_type)

        async def admitted(request: Any, context: Any) -> tuple[Any, Call]:
            call = await admit(locks, role, context)
            if method.client_streaming:
                return (parsed(kind, one) async for one in request), call
            message = parsed(kind, request)
            for stream_id in named_streams(message):
                locks.allow(call.caller, role, stream_id)
            return message, call

        async def unary(request: Any, context: Any) -> Any:
            try:
                return await behaviour(*await admitted(request, context))
            except Exception as error:  # noqa: BLE001  all become a code
                await refuse(context, error)
                return answer()

        async def stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
            try:
                message, call = await admitted(request, context)
                with locks.feed(call.caller):
                    until_s = time.monotonic() + RECHECK_S
                    async with aclosing(behaviour(message, call)) as answers:
                        async for one in answers:
                            if time.monotonic() >= until_s:
                                until_s = time.monotonic() + RECHECK_S
                                await admit_again(locks, role, context)
                            yield one
            except Exception as error:
                await refuse(context, error)
                raise

        made = stream if method.server_streaming else unary
        name = f"/{self.descriptor.full_name}/{method.name}"
        return made if telemetry is None else observed(made, name, telemetry, streams=method.server_streaming)


async def admit(locks: Locks, role: Role, context: Any) -> Call:
    """The call of a caller who has the role. Raises NoToken, BadToken, TooManyRequests, Forbidden, StoreDown."""
    told = dict(context.invocation_metadata())
    given = told.get("authorization")
    authorization = given if isinstance(given, str) else None
    caller = await asyncio.to_thread(locks.caller, authorization, address_of(context.peer()))
    locks.allow(caller, role)
    return Call(caller, told)


async def admit_again(locks: Locks, role: Role, context: Any) -> None:
    """Return while the caller of a feed would still be let in. Raises NoToken, BadToken, Forbidden."""
    try:
        await admit(locks, role, context)
    except WorldError:
        return  # the store is away, or calls come too fast: not the moment to judge


def address_of(peer: str) -> str:
    """The address of gRPC's name for a peer, such as `ipv4:127.0.0.1:5312` or `ipv6:[::1]:5312`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def parsed(kind: Any, request: Any) -> Any:
    """The message of these bytes; one that is read already as it is. Raises BadMessage."""
    if not isinstance(request, bytes):
        return request
    try:
        return kind.FromString(request)
    except DecodeError:
        raise BadMessage(f"these {len(request)} bytes are no message of the type {kind.DESCRIPTOR.full_name}") from None


def named_streams(request: Any) -> tuple[str, ...]:
    """The streams that a request is about: its `stream_id` or `stream.id`, given or not, or its `stream_ids`."""
    if hasattr(request, "stream_id"):
        return (request.stream_id,)
    if hasattr(request, "stream"):
        return (request.stream.id,)
    return tuple(getattr(request, "stream_ids", ()))


def refusal(error: Exception) -> tuple[grpc.StatusCode, str, str]:
    """(code, text, reason) that a caller is told for an error; a bug is logged and told without its text."""
    if isinstance(error, StreamExists):
        return grpc.StatusCode.ALREADY_EXISTS, str(error), error.reason
    if isinstance(error, TSMError):
        unlisted = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, CallerError) else grpc.StatusCode.UNAVAILABLE
        return CODES.get(status_of(error), unlisted), str(error), error.reason
    log.error("a gRPC method failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, "an error of the service; its log says more", "internal_error"


async def refuse(context: Any, error: Exception) -> None:
    """Tell the caller of an error: under grpc.aio this ends the call, behind Serve's proxy it notes what to say."""
    code, text, reason = refusal(error)
    if hasattr(context, "abort"):
        await context.abort(code, text, (("reason", reason),))
    context.set_code(code)
    context.set_details(text)
    context.set_trailing_metadata([("reason", reason)])


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
        telemetry: DoorTelemetry | None = None,
    ) -> None:
        self._telemetry = telemetry
        if telemetry is not None:
            telemetry.calls(path for service in services for path in service.paths())
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
                (grpc.method_handlers_generic_handler(name, service.handlers(locks, self._telemetry)),)
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
