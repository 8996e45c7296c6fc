"""tsm.v1.StreamService: thin over StreamManager, as the HTTP door is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from services.feed import Hub, Message
from services.http.cursors import decode_cursor, encode_cursor
from services.http.feeds import HEARTBEAT_S
from services.http.streams import NewStream, StreamChanges
from services.locks.callers import Caller
from services.locks.tokens import Role
from services.manager import StreamManager, StreamView
from services.rpc.messages import InvalidMessage, checked, enum_name, fill, to_json
from services.rpc.server import Call, RpcService
from services.rpc.tsm.v1 import streams_pb2 as pb
from services.schemas import StreamSpec

ROLES: dict[str, Role] = {
    "CreateStream": "operator",
    "GetStream": "viewer",
    "ListStreams": "viewer",
    "UpdateStream": "operator",
    "DeleteStream": "operator",
    "StartStream": "operator",
    "StopStream": "operator",
    "PauseStream": "operator",
    "ResumeStream": "operator",
    "RestartStream": "operator",
    "WatchStreams": "viewer",
    "ReceiveEvents": "viewer",
}
CHANGEABLE = tuple(StreamChanges.model_fields)
PAGE_SIZE, MAX_PAGE_SIZE = 100, 1000  # streams of one answer
PAGE = 500  # events read at once


def stream_service(manager: StreamManager, hub: Hub) -> RpcService:
    """The service as the doors take it."""
    return RpcService(pb.DESCRIPTOR.services_by_name["StreamService"], Streams(manager, hub), ROLES)


class Streams:
    """The methods of tsm.v1.StreamService."""

    def __init__(self, manager: StreamManager, hub: Hub) -> None:
        self._manager = manager
        self._hub = hub

    async def CreateStream(self, request: pb.CreateStreamRequest, call: Call) -> pb.Stream:  # noqa: N802
        """Register a stream. Raises InvalidMessage and what StreamManager.create raises."""
        given = to_json(request.stream)
        stream = checked(NewStream, {name: given[name] for name in NewStream.model_fields if name in given})
        spec = StreamSpec(**{name: getattr(stream, name) for name in NewStream.model_fields})
        return await self._changed(self._manager.create, spec, check=_probes(request))

    async def GetStream(self, request: pb.GetStreamRequest, call: Call) -> pb.Stream:  # noqa: N802
        """One stream. Raises StreamNotFound."""
        return stream_message(await asyncio.to_thread(self._manager.get, request.stream_id))

    async def ListStreams(self, request: pb.ListStreamsRequest, call: Call) -> pb.ListStreamsResponse:  # noqa: N802
        """A page of the streams that the caller may see, ordered by id. Raises InvalidMessage, BadCursor."""
        size = request.page_size or PAGE_SIZE
        if not 0 < size <= MAX_PAGE_SIZE:
            raise InvalidMessage(f"page_size must be 1 to {MAX_PAGE_SIZE}, or 0 for {PAGE_SIZE}; got {size}")
        behind = decode_cursor("streams", request.page_token, str)[0] if request.page_token else ""
        states = {enum_name(pb.StreamState.DESCRIPTOR, state) for state in request.states}
        found = [
            view
            for view in await asyncio.to_thread(self._manager.streams)
            if view.id > behind
            and call.caller.sees(view.id)
            and (not states or view.status.state in states)
            and request.tags.items() <= view.tags.items()
        ]
        page = found[:size]
        token = encode_cursor("streams", page[-1].id) if len(found) > size else ""
        return pb.ListStreamsResponse(streams=map(stream_message, page), next_page_token=token)

    async def UpdateStream(self, request: pb.UpdateStreamRequest, call: Call) -> pb.Stream:  # noqa: N802
        """Change the fields of the mask. Raises InvalidMessage and what StreamManager.update raises."""
        changes = checked(StreamChanges, masked(request)).given()
        options = {"check": _probes(request), "if_match": request.etag or None}
        return await self._changed(self._manager.update, request.stream.id, changes, **options)

    async def DeleteStream(self, request: pb.DeleteStreamRequest, call: Call) -> Empty:  # noqa: N802
        """Remove a stream. Raises StreamNotFound, StreamChanged."""
        await asyncio.to_thread(self._manager.delete, request.stream_id, if_match=request.etag or None)
        self._hub.look()
        return Empty()

    async def StartStream(self, request: pb.StartStreamRequest, call: Call) -> pb.Stream:  # noqa: N802
        """Serve a stream. Raises StreamNotFound, NoCapacity."""
        return await self._changed(self._manager.start, request.stream_id)

    async def StopStream(self, request: pb.StopStreamRequest, call: Call) -> pb.Stream:  # noqa: N802
        """Stop serving a stream. Raises StreamNotFound."""
        return await self._changed(self._manager.stop, request.stream_id)

    async def PauseStream(self, request: pb.PauseStreamRequest, call: Call) -> pb.Stream:  # noqa: N802
        """Close a stream's source; it keeps its place and shift state. Raises StreamNotFound, NotServed."""
        return await self._changed(self._manager.pause, request.stream_id)

    async def ResumeStream(self, request: pb.ResumeStreamRequest, call: Call) -> pb.Stream:  # noqa: N802
        """Open the source of a paused stream again. Raises StreamNotFound, NotServed."""
        return await self._changed(self._manager.resume, request.stream_id)

    async def RestartStream(self, request: pb.RestartStreamRequest, call: Call) -> pb.Stream:  # noqa: N802
        """Close a stream's source and open it anew. Raises StreamNotFound, NotServed."""
        return await self._changed(self._manager.restart, request.stream_id)

    async def WatchStreams(  # noqa: N802
        self, request: pb.WatchStreamsRequest, call: Call
    ) -> AsyncGenerator[pb.WatchStreamsResponse, None]:
        """Every stream as it is, then each change of state or specification; ends when all that were named are gone.

        Raises StreamNotFound.
        """
        named = frozenset(request.stream_ids)
        shown: dict[str, Any] = {}

        def wakes(message: Message) -> bool:
            kind = message["type"]
            return kind in ("open", "streams", "status") or (
                kind == "event" and message["event"]["type"].endswith("stream.state")
            )

        async with self._hub.subscribe(wakes, limit=1) as subscription:
            for stream_id in named:
                await asyncio.to_thread(self._manager.get, stream_id)
            told_s = time.monotonic()
            while True:
                views = {
                    view.id: view
                    for view in await asyncio.to_thread(self._manager.streams, sequences=bool(named))
                    if _wanted(view.id, named, call.caller)
                }
                for gone in shown.keys() - views.keys():
                    del shown[gone]
                    told_s = time.monotonic()
                    yield pb.WatchStreamsResponse(deleted=gone)
                if named and not views:
                    return
                for view in views.values():
                    if shown.get(view.id) != (now := _what_matters(view)):
                        shown[view.id] = now
                        told_s = time.monotonic()
                        yield pb.WatchStreamsResponse(stream=stream_message(view))
                if time.monotonic() >= told_s + HEARTBEAT_S:
                    told_s = time.monotonic()
                    yield pb.WatchStreamsResponse(heartbeat=_heartbeat())
                await subscription.get(HEARTBEAT_S)

    async def ReceiveEvents(  # noqa: N802
        self, request: pb.ReceiveEventsRequest, call: Call
    ) -> AsyncGenerator[pb.ReceiveEventsResponse, None]:
        """Events behind `after`, or from now on: the hub only says when to read on from the store.

        Ends when all streams that were named are gone. Raises StreamNotFound, InvalidMessage, StoreDown.
        """
        named = frozenset(request.stream_ids)
        if named and (stray := request.after.keys() - named):
            raise InvalidMessage(f"after has {', '.join(sorted(stray))}, which stream_ids does not name")

        def wakes(message: Message) -> bool:
            if message["type"] in ("event", "gone"):
                return _wanted(message["stream_id"], named, call.caller)
            return message["type"] in ("open", "streams")

        async with self._hub.subscribe(wakes) as subscription:
            live = await self._present(named, call.caller)
            if unknown := sorted(named - live):
                self._manager.get(unknown[0])
            read = await asyncio.to_thread(self._begin, live, request)
            yield pb.ReceiveEventsResponse(heartbeat=_heartbeat())
            missed, stale = 0, set(live)
            while True:
                for stream_id in sorted(stale):
                    async for event in self._behind(stream_id, read):
                        yield pb.ReceiveEventsResponse(event=event)
                messages = await subscription.get(HEARTBEAT_S)
                if not messages:
                    yield pb.ReceiveEventsResponse(heartbeat=_heartbeat())
                stale = {message["stream_id"] for message in messages if message["type"] == "event"}
                only_events = messages and all(message["type"] == "event" for message in messages)
                if subscription.missed > missed or not only_events:
                    missed = subscription.missed  # what found no room may have been of any stream
                    present = await self._present(named, call.caller)
                    stale |= present
                    for stream_id in sorted(live - present):
                        async for event in self._behind(stream_id, read):
                            yield pb.ReceiveEventsResponse(event=event)
                        yield pb.ReceiveEventsResponse(gone=stream_id)
                    live = present
                if named and not live:
                    return

    async def _present(self, named: Collection[str], caller: Caller) -> set[str]:
        specs = await asyncio.to_thread(self._manager.store.list_streams)
        return {spec.id for spec in specs if _wanted(spec.id, named, caller) and (named or not spec.source.is_pushed)}

    def _begin(self, stream_ids: Collection[str], request: pb.ReceiveEventsRequest) -> dict[str, int]:
        """The sequence behind which each stream begins."""
        latest = (lambda _: 0) if request.earliest else self._manager.store.latest_sequence
        return {one: request.after[one] if one in request.after else latest(one) for one in stream_ids}

    async def _behind(self, stream_id: str, read: dict[str, int]) -> AsyncGenerator[pb.Event, None]:
        """A stream's events behind what was read, which moves on with each of them."""
        while True:
            found = await asyncio.to_thread(self._manager.store.events, stream_id, read.get(stream_id, 0), PAGE)
            for event in found:
                yield fill(pb.Event(), event)
                read[stream_id] = event["sequence"]
            if len(found) < PAGE:
                return

    async def _changed(self, change: Callable[..., StreamView], *args: Any, **options: Any) -> pb.Stream:
        view = await asyncio.to_thread(change, *args, **options)
        self._hub.look()
        return stream_message(view)


def masked(request: pb.UpdateStreamRequest) -> dict[str, Any]:
    """The fields that an update changes, as JSON; one that the mask names and nothing sets gets its default.

    Raises InvalidMessage.
    """
    given = to_json(request.stream)
    if not request.HasField("update_mask"):
        return {name: given[name] for name in CHANGEABLE if name in given}
    paths = list(request.update_mask.paths)
    if strange := [path for path in paths if path not in CHANGEABLE]:
        raise InvalidMessage(
            f"update_mask: {', '.join(strange)[:200]} cannot be changed alone; name {', '.join(CHANGEABLE)}"
        )
    if bare := [path for path in ("source", "enabled") if path in paths and path not in given]:
        raise InvalidMessage(f"update_mask names {' and '.join(bare)}, and the stream has no such field set")
    return {
        path: given.get(path, StreamChanges.model_fields[path].get_default(call_default_factory=True)) for path in paths
    }


def stream_message(view: StreamView) -> pb.Stream:
    """A stream as gRPC shows it."""
    return fill(pb.Stream(etag=view.etag), view.model_dump(mode="json"))


def _probes(request: pb.CreateStreamRequest | pb.UpdateStreamRequest) -> bool:
    return request.probe if request.HasField("probe") else True


def _wanted(stream_id: str, named: Collection[str], caller: Caller) -> bool:
    return stream_id in named if named else caller.sees(stream_id)


def _what_matters(view: StreamView) -> tuple[Any, ...]:
    """What makes a watcher hear of a stream again: not its counters, which change with every frame."""
    status = view.status
    return view.etag, status.state, status.status_message, status.error_code, status.worker, status.epoch


def _heartbeat() -> pb.Heartbeat:
    now = Timestamp()
    now.GetCurrentTime()
    return pb.Heartbeat(time=now)
