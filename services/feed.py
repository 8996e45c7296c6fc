"""Everything that happens, told to whoever listens: one thread on the store, any number of asyncio subscribers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from services.manager import StreamManager
from tsm_core.errors import WorldError

BLOCK_S = 0.25  # longest wait in one look at the feeds; a new stream is seen after that long
LOOK_S = 1.0  # seconds between two looks at streams and statuses
WATCH_S = 5.0  # pictures keep coming for so long after the last look

Message = dict[str, Any]


class Subscription:
    """A bounded queue between the hub's threads and one asyncio task; the oldest messages make room for new ones."""

    def __init__(self, wants: Callable[[Message], bool], limit: int) -> None:
        self.wants = wants
        self.missed = 0
        self._loop = asyncio.get_running_loop()
        self._messages: deque[Message] = deque(maxlen=limit)
        self._ready = asyncio.Event()

    def push(self, message: Message) -> None:
        """Hand over a message from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take_in, message)

    async def get(self, timeout_s: float) -> list[Message]:
        """All waiting messages, oldest first; empty after `timeout_s` without any."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return []
        self._ready.clear()
        found = list(self._messages)
        self._messages.clear()
        return found

    def _take_in(self, message: Message) -> None:
        self.missed += len(self._messages) == self._messages.maxlen
        self._messages.append(message)
        self._ready.set()


class Hub:
    """Fans the store's feeds out. Its threads live only while somebody listens.

    Messages: {"type": "event", "event"}, {"type": "score", "score"}, {"type": "status", "statuses"},
    {"type": "streams", "streams"} when a stream came, went or changed, {"type": "gone", "stream_id"}, {"type": "open"}
    once the hub has begun to look, and {"type": "picture", "stream_id", "number", "jpeg"}.
    """

    def __init__(self, manager: StreamManager) -> None:
        self.manager = manager
        self._lock = threading.Lock()
        self._subscribers: set[Subscription] = set()
        self._viewers: dict[str, set[Subscription]] = {}
        self._follower: threading.Thread | None = None
        self._viewer: threading.Thread | None = None
        self._look_now = threading.Event()

    def look(self) -> None:
        """Look at the list of streams soon: it was just changed."""
        self._look_now.set()

    @asynccontextmanager
    async def subscribe(self, wants: Callable[[Message], bool], limit: int = 1000) -> AsyncIterator[Subscription]:
        """The messages that `wants` accepts, from now on."""
        subscription = Subscription(wants, limit)
        with self._lock:
            self._subscribers.add(subscription)
            if self._follower is None:
                self._follower = threading.Thread(target=self._follow, name="feed", daemon=True)
                self._follower.start()
        try:
            yield subscription
        finally:
            with self._lock:
                self._subscribers.discard(subscription)

    @asynccontextmanager
    async def pictures(self, stream_id: str) -> AsyncIterator[Subscription]:
        """A stream's pictures from now on, each once; who is slow gets the newest and misses the rest."""
        subscription = Subscription(lambda _: True, 1)
        with self._lock:
            self._viewers.setdefault(stream_id, set()).add(subscription)
            if self._viewer is None:
                self._viewer = threading.Thread(target=self._view, name="pictures", daemon=True)
                self._viewer.start()
        try:
            yield subscription
        finally:
            with self._lock:
                viewers = self._viewers[stream_id]
                viewers.discard(subscription)
                if not viewers:
                    del self._viewers[stream_id]

    def _follow(self) -> None:
        """Pass on what comes after this moment, until nobody listens."""
        store = self.manager.store
        cursors: dict[Any, str | int] | None = None
        known: dict[str, int] = {}
        next_look = 0.0
        while True:
            with self._lock:
                if not self._subscribers:
                    self._follower = None
                    return
            try:
                if self._look_now.is_set() or time.monotonic() >= next_look:
                    self._look_now.clear()
                    views = self.manager.streams()
                    now = {view.id: view.revision for view in views}
                    feeds = [(kind, name) for name in now for kind in ("event", "score")]
                    if cursors is None:
                        cursors = dict(store.now(feeds))  # type: ignore[arg-type]
                        self._tell({"type": "open"})
                    else:  # a stream's feeds begin empty, so a new one is read from its beginning
                        cursors = {feed: cursors.get(feed, "0") for feed in feeds}
                    for name in known.keys() - now.keys():
                        self._tell({"type": "gone", "stream_id": name})
                    if now != known:
                        self._tell({"type": "streams", "streams": [view.model_dump(mode="json") for view in views]})
                    known = now
                    self._tell(
                        {"type": "status", "statuses": {view.id: view.status.model_dump(mode="json") for view in views}}
                    )
                    next_look = time.monotonic() + LOOK_S
                if not cursors:
                    self._look_now.wait(BLOCK_S)
                    continue
                for kind, name, position, record in store.tail(cursors, BLOCK_S):
                    cursors[kind, name] = position
                    self._tell({"type": kind, "stream_id": name, kind: record})
            except WorldError:  # the store is away: look again until it is back, nothing is lost meanwhile
                time.sleep(BLOCK_S)

    def _tell(self, message: Message) -> None:
        with self._lock:
            for subscription in self._subscribers:
                if subscription.wants(message):
                    subscription.push(message)

    def _view(self) -> None:
        """Pass on new pictures of the streams that somebody looks at, until nobody does."""
        store = self.manager.store
        pause_s = 0.5 / self.manager.settings.preview.max_fps
        shown: dict[Subscription, int] = {}
        next_watch = 0.0
        while True:
            with self._lock:
                if not self._viewers:
                    self._viewer = None
                    return
                viewers = {name: tuple(subscriptions) for name, subscriptions in self._viewers.items()}
            present = {subscription for group in viewers.values() for subscription in group}
            shown = {subscription: number for subscription, number in shown.items() if subscription in present}
            try:
                gone: set[str] = set()
                if time.monotonic() >= next_watch:
                    gone = viewers.keys() - {spec.id for spec in store.list_streams()}
                    for name in viewers.keys() - gone:
                        store.watch(name, WATCH_S)
                    next_watch = time.monotonic() + LOOK_S
                for name, group in viewers.items():
                    if name in gone:
                        for subscription in group:
                            subscription.push({"type": "gone", "stream_id": name})
                        continue
                    picture = store.preview(name)
                    if picture is None:
                        continue
                    number, jpeg = picture
                    for subscription in group:
                        if shown.get(subscription) != number:
                            shown[subscription] = number
                            subscription.push({"type": "picture", "stream_id": name, "number": number, "jpeg": jpeg})
            except WorldError:
                time.sleep(BLOCK_S)
            time.sleep(pause_s)
