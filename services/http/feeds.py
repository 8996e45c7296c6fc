"""What does not end: pictures, server-sent events and the page's WebSocket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from services.feed import Hub
from services.locks.callers import Caller
from services.manager import StreamManager
from tsm_core.errors import WorldError

HEARTBEAT_S = 10.0
SCORE_PAUSE_S = 0.2
BOUNDARY = "frame"


async def mjpeg(hub: Hub, stream_id: str) -> AsyncIterator[bytes]:
    """A stream's pictures as parts of a multipart body, until the stream is gone."""
    async with hub.pictures(stream_id) as viewer:
        while True:
            for message in await viewer.get(HEARTBEAT_S):
                if message["type"] == "gone":
                    return
                jpeg: bytes = message["jpeg"]
                head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n"
                yield f"{head}X-Frame-Number: {message['number']}\r\n\r\n".encode() + jpeg + b"\r\n"


async def stream_events(manager: StreamManager, hub: Hub, stream_id: str, after: int) -> AsyncIterator[str]:
    """Every event behind `after` once: the hub only says when to read on from the store."""

    def wakes(message: dict[str, Any]) -> bool:
        return message["type"] == "open" or (message.get("stream_id") == stream_id and message["type"] != "score")

    async with hub.subscribe(wakes, limit=8) as subscription:
        yield ": open\n\n"
        gone = False
        while True:
            try:
                found = await run_in_threadpool(manager.store.events, stream_id, after, 500)
            except WorldError as error:
                yield f": {error.reason}\n\n"
                found = []
            for event in found:
                after = event["sequence"]
                yield _sse_event(str(after), event)
            if gone:
                return
            if len(found) < 500:
                messages = await subscription.get(HEARTBEAT_S)
                gone = any(message["type"] == "gone" for message in messages)
                if not messages:
                    yield ": still here\n\n"


async def all_events(hub: Hub, wants: Callable[[dict[str, Any]], bool]) -> AsyncIterator[str]:
    """The events of all streams that are wanted, from now on."""

    def wanted(message: dict[str, Any]) -> bool:
        return message["type"] == "event" and wants(message["event"])

    async with hub.subscribe(wanted) as subscription:
        yield ": open\n\n"
        while True:
            messages = await subscription.get(HEARTBEAT_S)
            for message in messages:
                event = message["event"]
                yield _sse_event(f"{message['stream_id']}:{event['sequence']}", event)
            if not messages:
                yield ": still here\n\n"


def _sse_event(event_id: str, event: dict[str, Any]) -> str:
    return f"id: {event_id}\nevent: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n"


class Feed(StreamingResponse):
    """An answer that does not end, one of those that its caller may follow at once. Raises TooManyFeeds."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        with scope["app"].state.locks.feed(scope["state"]["caller"]):
            await super().__call__(scope, receive, send)


def sse(lines: AsyncIterator[str]) -> Feed:
    """An answer of server-sent events."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Feed(lines, media_type="text/event-stream", headers=headers)


def seen_by(caller: Caller, message: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a message of the hub that the caller may see; None when that is nothing."""
    if caller.streams is None:
        return message
    if message["type"] == "streams":
        return {"type": "streams", "streams": [view for view in message["streams"] if caller.sees(view["id"])]}
    if message["type"] == "status":
        return {"type": "status", "statuses": {k: v for k, v in message["statuses"].items() if caller.sees(k)}}
    return message if caller.sees(message["stream_id"]) else None


async def follow(socket: WebSocket, manager: StreamManager, hub: Hub, caller: Caller) -> None:
    """Tell the page all about the caller's streams until it goes away; of scores the newest, at most five a second."""

    async def talk() -> None:
        async with hub.subscribe(lambda message: message["type"] not in ("gone", "open")) as subscription:
            views = [view.model_dump(mode="json") for view in await run_in_threadpool(manager.streams)]
            await socket.send_json(seen_by(caller, {"type": "streams", "streams": views}))
            newest: dict[tuple[str, str], dict[str, Any]] = {}
            next_scores = 0.0
            clock = asyncio.get_running_loop().time
            while True:
                for told in await subscription.get(SCORE_PAUSE_S if newest else HEARTBEAT_S):
                    if (message := seen_by(caller, told)) is None:
                        continue
                    if message["type"] == "score":
                        newest[message["stream_id"], message["score"]["model"]] = message["score"]
                    else:
                        await socket.send_json({key: message[key] for key in message if key != "stream_id"})
                if newest and clock() >= next_scores:
                    for score in newest.values():
                        await socket.send_json({"type": "score", "score": score})
                    newest.clear()
                    next_scores = clock() + SCORE_PAUSE_S

    async def listen() -> None:
        while True:
            await socket.receive_text()  # the page has nothing to say; this notices when it leaves

    tasks = [asyncio.create_task(talk()), asyncio.create_task(listen())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not isinstance(task.exception(), WebSocketDisconnect | RuntimeError | WorldError | None):
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
