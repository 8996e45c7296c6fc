"""Where streams, their owners, states and findings are kept: one protocol, in memory or in Redis.

Every write about a stream carries the lease of its owner and is refused once the lease is no longer the newest, so a
replica that was thought dead and wakes up cannot harm its successor. In Redis the check and the write are one script.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from typing_extensions import override

from services.locks.vault import open_spec, seal_spec, vault_of
from services.schemas import Lease, ReplicaInfo, StreamSpec, StreamStatus
from services.settings import StoreSettings
from tsm_core.errors import CallerError, WorldError

FeedKind = Literal["event", "score"]
Feed = tuple[FeedKind, str]  # ("event", stream_id)
Record = dict[str, Any]
Publication = tuple[Lease, StreamStatus | None, Sequence[Record], Sequence[Record]]  # status, events, scores

CONNECT_TIMEOUT_S = 1.0
SOCKET_TIMEOUT_S = 2.0
BLOCK_S = 0.5  # longest single blocking read, so that a dead server is noticed while one waits
TAIL_BATCH = 256  # most records of one feed in one answer of `tail`
FAREWELL_S = 60  # feeds of a deleted stream stay readable so long, for those who follow them


class StreamExists(CallerError):
    """A stream of this id is registered already."""

    reason = "stream_exists"


class StreamNotFound(CallerError):
    """No stream of this id is registered."""

    reason = "stream_not_found"


class StreamChanged(CallerError):
    """The stream is no longer the one that was read; nothing was written."""

    reason = "stream_changed"


class StaleLease(WorldError):
    """The stream was given to another owner, or taken away; nothing was written."""

    reason = "stale_lease"


class StoreDown(WorldError):
    """The store does not answer or cannot write; it is used again as soon as it is back."""

    reason = "store_unavailable"


class Survey(NamedTuple):
    """What should be and what is, at one instant; each sorted by id."""

    specs: dict[str, StreamSpec]
    leases: dict[str, Lease]
    statuses: dict[str, StreamStatus]
    replicas: dict[str, ReplicaInfo]


class StateStore(Protocol):
    """Registry, leases, heartbeats, feeds, pictures and states of all streams. Thread-safe.

    Any verb may raise StoreDown; it does so within a few seconds and the store recovers by itself.
    """

    def put_stream(self, spec: StreamSpec, *, create: bool, before: StreamSpec | None = None) -> None:
        """Register a stream (`create`) or replace its specification, with `before` only if it is still that one.

        A new stream begins with empty feeds; its epochs and sequences go on where an earlier stream of the same id
        ended. Raises StreamExists, StreamNotFound, StreamChanged.
        """

    def get_stream(self, stream_id: str) -> StreamSpec:
        """The stream's specification, password included. Raises StreamNotFound."""

    def list_streams(self) -> list[StreamSpec]:
        """All specifications, sorted by id."""

    def delete_stream(self, stream_id: str, before: StreamSpec | None = None) -> None:
        """Forget the stream: specification, lease, status, picture and state; with `before` only if it is still that.

        Its feeds stay readable for a minute. Raises StreamNotFound, StreamChanged.
        """

    def absent(self, prefix: str) -> set[str]:
        """Streams that are gone and whose epochs and sequences are still kept; of those whose ids begin so."""

    def forget(self, stream_ids: Collection[str]) -> None:
        """Keep the epochs and sequences of these no longer, unless they are registered: one that comes back is new.

        Call it long after the last owner of any of them has seen that its lease is stale.
        """

    def heartbeat(self, info: ReplicaInfo, ttl_ms: int) -> None:
        """Say that a replica lives; without another heartbeat it counts as dead after `ttl_ms`."""

    def replicas(self) -> list[ReplicaInfo]:
        """Replicas that live, sorted by id."""

    def retire(self, replica_id: str) -> None:
        """Forget a replica at once: the last act of a planned drain. Stop its heartbeats first."""

    def survey(self) -> Survey:
        """Specifications, leases, statuses and live replicas, in one round trip."""

    def lead(self, owner: str, ttl_ms: int) -> bool:
        """True while `owner` is the leader, for `ttl_ms` from now; takes a free leadership, renews its own."""

    def abdicate(self, owner: str) -> None:
        """Give up the leadership, if `owner` has it."""

    def assign(self, stream_id: str, owner: str) -> Lease:
        """Give the stream to `owner`: a lease whose epoch is one above any before, deleted streams included.

        Replaces any previous lease. Raises StreamNotFound.
        """

    def unassign(self, stream_id: str) -> None:
        """Take the stream from its owner, if it has one."""

    def release(self, lease: Lease) -> bool:
        """Give the stream back after a last save: the controller finds it a new owner. False when it was stale."""

    def leases(self) -> dict[str, Lease]:
        """The newest lease of every stream that has an owner."""

    def publish(
        self,
        lease: Lease,
        *,
        status: StreamStatus | None = None,
        events: Sequence[Record] = (),
        scores: Sequence[Record] = (),
    ) -> None:
        """Write status, events and scores of a stream, all or nothing. Raises StaleLease.

        The store adds `sequence` (from 1, never used twice) to events and `published_s` (its clock, Unix) to both.
        """

    def publish_many(self, publications: Sequence[Publication]) -> list[str]:
        """As `publish`, for many streams in one round trip; gives the ids of streams whose lease was stale."""

    def announce(self, stream_id: str, status: StreamStatus, *, events: Sequence[Record] = ()) -> None:
        """Write the status of a stream that nobody owns: stopped, or waiting for a place.

        Raises StaleLease when it has an owner or is not registered.
        """

    def save(self, lease: Lease, blob: bytes) -> None:
        """Keep the stream's shift state, in place of the previous one. Raises StaleLease."""

    def load(self, stream_id: str) -> bytes | None:
        """The state saved last, by whichever owner; None when there is none or it is too old."""

    def status(self, stream_id: str) -> StreamStatus | None:
        """The status written last; None when there was none."""

    def statuses(self) -> dict[str, StreamStatus]:
        """The status of every stream that has one."""

    def events(self, stream_id: str, after: int = 0, limit: int = 100) -> list[Record]:
        """The first `limit` events with a sequence above `after`, oldest first."""

    def latest_sequence(self, stream_id: str) -> int:
        """Sequence of the stream's newest event; 0 when it never had one."""

    def event_feeds(self) -> dict[str, int]:
        """The newest event's sequence of every stream whose events can be read: registered, or deleted lately."""

    def scores(self, stream_id: str, after: str = "0", limit: int = 100) -> list[Record]:
        """The newest `limit` score records behind position `after`, oldest first."""

    def now(self, feeds: Iterable[Feed]) -> dict[Feed, str]:
        """The position of each feed's newest record: where to begin for all that comes later."""

    def tail(self, cursors: Mapping[Feed, str | int], block_s: float) -> list[tuple[FeedKind, str, str, Record]]:
        """(kind, stream_id, position, record) of what is behind the cursors, waiting up to `block_s` for the first.

        A cursor is a position given with a record, for events equal to their sequence; "0" is the beginning and "$"
        is now. Who calls again and again begins with `now()`: what falls between two calls with "$" is not seen.
        """

    def put_preview(self, lease: Lease, jpeg: bytes, frame_number: int) -> None:
        """Keep the stream's newest picture. Raises StaleLease."""

    def preview(self, stream_id: str) -> tuple[int, bytes] | None:
        """(frame number, JPEG) of the newest picture, if there is one."""

    def watch(self, stream_id: str, ttl_s: float) -> None:
        """Say that somebody looks at the stream's pictures for the next `ttl_s`."""

    def watched(self) -> set[str]:
        """Ids of streams that somebody looks at."""

    def put_metrics(self, replica_id: str, text: str, ttl_s: float) -> None:
        """Keep a replica's metrics for `ttl_s`."""

    def metrics(self) -> dict[str, str]:
        """Metrics by replica."""

    def document(self, kind: str, key: str) -> str | None:
        """A small text of a kind (tokens, jobs, marks of readers, ...); None where there is none."""

    def documents(self, kind: str) -> dict[str, str]:
        """All texts of a kind, sorted by key."""

    def put_document(self, kind: str, key: str, text: str, ttl_s: float | None = None) -> None:
        """Write a text, over what was there; with `ttl_s` it vanishes after so many seconds."""

    def swap_document(
        self, kind: str, key: str, before: str | None, after: str | None, ttl_s: float | None = None
    ) -> bool:
        """Replace a text only if it is still `before` (None: is not there); `after` None deletes. True when done."""

    def ping(self) -> None:
        """Return when the store answers. Raises StoreDown."""

    def close(self) -> None:
        """Let go of connections; the store can be used again and opens new ones."""


def open_store(settings: StoreSettings) -> StateStore:
    """The store that `settings.url` names: redis://, rediss://, unix:// or memory:// (one process, for tests).

    Does not connect yet. Raises CallerError when there is no URL or it cannot be used.
    """
    if settings.url is None:
        raise CallerError("store.url is empty: use redis://HOST:PORT or memory://", reason="invalid_settings")
    if settings.url.get_secret_value().startswith("memory:"):
        return MemoryStore(settings)
    return RedisStore(settings)


T = TypeVar("T")


class _Expiring(Generic[T]):
    """A dict whose entries vanish when their time is over. Not thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, T]] = {}

    def put(self, key: str, value: T, ttl_s: float) -> None:
        until = time.monotonic() + ttl_s
        self._entries[key] = (max(until, self._entries.get(key, (0.0, value))[0]), value)

    def pop(self, key: str) -> None:
        self._entries.pop(key, None)

    def get(self, key: str) -> T | None:
        return self.live().get(key)

    def live(self) -> dict[str, T]:
        now = time.monotonic()
        self._entries = {key: entry for key, entry in self._entries.items() if entry[0] > now}
        return {key: value for key, (_, value) in sorted(self._entries.items())}


class MemoryStore(StateStore):
    """A StateStore inside one process: for tests, and for a single process without a server."""

    def __init__(self, settings: StoreSettings | None = None) -> None:
        self._settings = settings or StoreSettings()
        self._lock = threading.Condition()
        self._specs: dict[str, StreamSpec] = {}
        self._leases: dict[str, Lease] = {}
        self._epochs: dict[str, int] = {}
        self._farewells: _Expiring[bool] = _Expiring()
        self._sequences: dict[str, int] = {}
        self._statuses: dict[str, StreamStatus] = {}
        self._feeds: dict[Feed, deque[tuple[int, str, float]]] = {}  # (position, JSON, published_s)
        self._positions: dict[Feed, int] = {}
        self._replicas: _Expiring[ReplicaInfo] = _Expiring()
        self._leader: _Expiring[str] = _Expiring()
        self._states: _Expiring[bytes] = _Expiring()
        self._previews: _Expiring[tuple[int, bytes]] = _Expiring()
        self._watched: _Expiring[bool] = _Expiring()
        self._metrics: _Expiring[str] = _Expiring()
        self._documents: dict[str, _Expiring[str]] = {}

    @override
    def put_stream(self, spec: StreamSpec, *, create: bool, before: StreamSpec | None = None) -> None:
        with self._lock:
            held = self._specs.get(spec.id)
            if create and held is not None:
                raise _exists(spec.id)
            if not create and held is None:
                raise _not_found(spec.id)
            if before is not None and held is not None and held.etag != before.etag:
                raise _changed(spec.id)
            self._specs[spec.id] = spec
            if create:
                self._feeds.pop(("event", spec.id), None)
                self._feeds.pop(("score", spec.id), None)

    @override
    def get_stream(self, stream_id: str) -> StreamSpec:
        with self._lock:
            if stream_id not in self._specs:
                raise _not_found(stream_id)
            return self._specs[stream_id]

    @override
    def list_streams(self) -> list[StreamSpec]:
        with self._lock:
            return [self._specs[stream_id] for stream_id in sorted(self._specs)]

    @override
    def delete_stream(self, stream_id: str, before: StreamSpec | None = None) -> None:
        with self._lock:
            held = self._specs.get(stream_id)
            if held is None:
                raise _not_found(stream_id)
            if before is not None and held.etag != before.etag:
                raise _changed(stream_id)
            del self._specs[stream_id]
            self._farewells.put(stream_id, True, FAREWELL_S)
            self._leases.pop(stream_id, None)
            self._statuses.pop(stream_id, None)
            self._states.pop(stream_id)
            self._previews.pop(stream_id)

    @override
    def absent(self, prefix: str) -> set[str]:
        with self._lock:
            return {one for one in {*self._epochs, *self._sequences} - self._specs.keys() if one.startswith(prefix)}

    @override
    def forget(self, stream_ids: Collection[str]) -> None:
        with self._lock:
            for stream_id in set(stream_ids) - self._specs.keys():
                self._epochs.pop(stream_id, None)
                self._sequences.pop(stream_id, None)

    @override
    def heartbeat(self, info: ReplicaInfo, ttl_ms: int) -> None:
        with self._lock:
            self._replicas.put(info.id, info, ttl_ms / 1000)

    @override
    def replicas(self) -> list[ReplicaInfo]:
        with self._lock:
            return list(self._replicas.live().values())

    @override
    def retire(self, replica_id: str) -> None:
        with self._lock:
            self._replicas.pop(replica_id)

    @override
    def survey(self) -> Survey:
        with self._lock:
            specs = {spec.id: spec for spec in self.list_streams()}
            return Survey(specs, self.leases(), self.statuses(), self._replicas.live())

    @override
    def lead(self, owner: str, ttl_ms: int) -> bool:
        with self._lock:
            if self._leader.get("leader") not in (None, owner):
                return False
            self._leader.put("leader", owner, ttl_ms / 1000)
            return True

    @override
    def abdicate(self, owner: str) -> None:
        with self._lock:
            if self._leader.get("leader") == owner:
                self._leader.pop("leader")

    @override
    def assign(self, stream_id: str, owner: str) -> Lease:
        with self._lock:
            if stream_id not in self._specs:
                raise _not_found(stream_id)
            epoch = self._epochs[stream_id] = self._epochs.get(stream_id, 0) + 1
            lease = self._leases[stream_id] = Lease(stream_id=stream_id, owner=owner, epoch=epoch)
            return lease

    @override
    def unassign(self, stream_id: str) -> None:
        with self._lock:
            self._leases.pop(stream_id, None)

    @override
    def release(self, lease: Lease) -> bool:
        with self._lock:
            if self._leases.get(lease.stream_id) != lease:
                return False
            del self._leases[lease.stream_id]
            return True

    @override
    def leases(self) -> dict[str, Lease]:
        with self._lock:
            return dict(sorted(self._leases.items()))

    @override
    def publish(
        self,
        lease: Lease,
        *,
        status: StreamStatus | None = None,
        events: Sequence[Record] = (),
        scores: Sequence[Record] = (),
    ) -> None:
        with self._lock:
            self._check(lease)
            self._write(lease.stream_id, status, events, scores)

    @override
    def publish_many(self, publications: Sequence[Publication]) -> list[str]:
        refused = []
        with self._lock:
            for lease, status, events, scores in publications:
                if self._leases.get(lease.stream_id) == lease:
                    self._write(lease.stream_id, status, events, scores)
                else:
                    refused.append(lease.stream_id)
        return refused

    @override
    def announce(self, stream_id: str, status: StreamStatus, *, events: Sequence[Record] = ()) -> None:
        with self._lock:
            if stream_id not in self._specs or stream_id in self._leases:
                raise _not_free(stream_id)
            self._write(stream_id, status, events, ())

    @override
    def save(self, lease: Lease, blob: bytes) -> None:
        with self._lock:
            self._check(lease)
            self._states.put(lease.stream_id, bytes(blob), self._settings.state_ttl_s)

    @override
    def load(self, stream_id: str) -> bytes | None:
        with self._lock:
            return self._states.get(stream_id)

    @override
    def status(self, stream_id: str) -> StreamStatus | None:
        with self._lock:
            return self._statuses.get(stream_id)

    @override
    def statuses(self) -> dict[str, StreamStatus]:
        with self._lock:
            return dict(sorted(self._statuses.items()))

    @override
    def events(self, stream_id: str, after: int = 0, limit: int = 100) -> list[Record]:
        with self._lock:
            return [record for _, record in islice(self._behind(("event", stream_id), after), limit)]

    @override
    def latest_sequence(self, stream_id: str) -> int:
        with self._lock:
            return self._sequences.get(stream_id, 0)

    @override
    def event_feeds(self) -> dict[str, int]:
        with self._lock:
            return {name: self._sequences.get(name, 0) for name in sorted({*self._specs, *self._farewells.live()})}

    @override
    def scores(self, stream_id: str, after: str = "0", limit: int = 100) -> list[Record]:
        with self._lock:
            return [record for _, record in self._behind(("score", stream_id), _number(after))][-limit:]

    @override
    def now(self, feeds: Iterable[Feed]) -> dict[Feed, str]:
        with self._lock:
            return {feed: self._position(feed) for feed in feeds}

    @override
    def tail(self, cursors: Mapping[Feed, str | int], block_s: float) -> list[tuple[FeedKind, str, str, Record]]:
        with self._lock:
            fixed = {feed: _number(self._position(feed) if at == "$" else at) for feed, at in cursors.items()}

            def ready() -> list[tuple[FeedKind, str, str, Record]]:
                return [
                    (feed[0], feed[1], _position(feed[0], number), record)
                    for feed, at in fixed.items()
                    for number, record in islice(self._behind(feed, at), TAIL_BATCH)
                ]

            return self._lock.wait_for(ready, block_s) or []

    @override
    def put_preview(self, lease: Lease, jpeg: bytes, frame_number: int) -> None:
        with self._lock:
            self._check(lease)
            self._previews.put(lease.stream_id, (frame_number, bytes(jpeg)), self._settings.state_ttl_s)

    @override
    def preview(self, stream_id: str) -> tuple[int, bytes] | None:
        with self._lock:
            return self._previews.get(stream_id)

    @override
    def watch(self, stream_id: str, ttl_s: float) -> None:
        with self._lock:
            self._watched.put(stream_id, True, ttl_s)

    @override
    def watched(self) -> set[str]:
        with self._lock:
            return set(self._watched.live())

    @override
    def put_metrics(self, replica_id: str, text: str, ttl_s: float) -> None:
        with self._lock:
            self._metrics.put(replica_id, text, ttl_s)

    @override
    def metrics(self) -> dict[str, str]:
        with self._lock:
            return self._metrics.live()

    @override
    def document(self, kind: str, key: str) -> str | None:
        return self.documents(kind).get(key)

    @override
    def documents(self, kind: str) -> dict[str, str]:
        with self._lock:
            return self._documents[kind].live() if kind in self._documents else {}

    @override
    def put_document(self, kind: str, key: str, text: str, ttl_s: float | None = None) -> None:
        with self._lock:
            texts = self._documents.setdefault(kind, _Expiring())
            texts.pop(key)
            texts.put(key, text, math.inf if ttl_s is None else ttl_s)

    @override
    def swap_document(
        self, kind: str, key: str, before: str | None, after: str | None, ttl_s: float | None = None
    ) -> bool:
        with self._lock:
            if self.document(kind, key) != before:
                return False
            if after is not None:
                self.put_document(kind, key, after, ttl_s)
            elif kind in self._documents:
                self._documents[kind].pop(key)
            return True

    @override
    def ping(self) -> None:
        return

    @override
    def close(self) -> None:
        return

    def _check(self, lease: Lease) -> None:
        if self._leases.get(lease.stream_id) != lease:
            raise _stale(lease)

    def _write(
        self, stream_id: str, status: StreamStatus | None, events: Sequence[Record], scores: Sequence[Record]
    ) -> None:
        # dumped first: a record that is no JSON must change nothing
        lines: list[tuple[FeedKind, str]] = [("event", _dump(event)) for event in events]
        lines += [("score", _dump(score)) for score in scores]
        if status is not None:
            self._statuses[stream_id] = status
        for kind, line in lines:
            feed = (kind, stream_id)
            kept = self._settings.events_kept if kind == "event" else self._settings.scores_kept
            counts = self._sequences if kind == "event" else self._positions
            key: Any = stream_id if kind == "event" else feed
            counts[key] = number = counts.get(key, 0) + 1
            self._feeds.setdefault(feed, deque(maxlen=kept)).append((number, line, time.time()))
        if lines:
            self._lock.notify_all()

    def _position(self, feed: Feed) -> str:
        kind, stream_id = feed
        return _position(kind, self._sequences.get(stream_id, 0) if kind == "event" else self._positions.get(feed, 0))

    def _behind(self, feed: Feed, after: int) -> Iterator[tuple[int, Record]]:
        for number, line, published_s in self._feeds.get(feed, ()):
            if number > after:
                yield number, _record(feed[0], line, published_s, number)


class Script:
    """A Lua script with its digest; runs as one atomic step of the server."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


# the specification that is held against the one that was read: a stream of another birth, or another edition
SAME_SPEC = """
local function same(held, created_at, edition)
  if created_at == nil then return true end
  local spec = cjson.decode(held)
  return spec['created_at'] == created_at and tostring(spec['edition'] or 1) == edition
end
"""

PUT_STREAM = Script(f"""{SAME_SPEC}
-- KEYS specs, events, scores. ARGV id, spec, "1" to create, and of the one that was read: created_at, edition
local held = redis.call('HGET', KEYS[1], ARGV[1])
if (ARGV[3] == '1') == (held ~= false) then return 0 end
if held and not same(held, ARGV[4], ARGV[5]) then return -1 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
if ARGV[3] == '1' then redis.call('DEL', KEYS[2], KEYS[3]) end
return 1
""")

DELETE_STREAM = Script(f"""{SAME_SPEC}
-- KEYS specs, leases, statuses, events, scores, state, preview, farewells. ARGV id, farewell in s, created_at, edition
local held = redis.call('HGET', KEYS[1], ARGV[1])
if not held then return 0 end
if not same(held, ARGV[3], ARGV[4]) then return -1 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[8], redis.call('TIME')[1] + ARGV[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('EXPIRE', KEYS[4], ARGV[2])
redis.call('EXPIRE', KEYS[5], ARGV[2])
redis.call('DEL', KEYS[6], KEYS[7])
return 1
""")

EVENT_FEEDS = Script("""
-- KEYS specs, sequences, farewells
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', redis.call('TIME')[1])
local found = {}
for _, names in ipairs({redis.call('HKEYS', KEYS[1]), redis.call('ZRANGE', KEYS[3], 0, -1)}) do
  for _, name in ipairs(names) do
    found[#found + 1] = name
    found[#found + 1] = redis.call('HGET', KEYS[2], name) or '0'
  end
end
return found
""")

ASSIGN = Script("""
-- KEYS specs, leases, epochs. ARGV id, owner
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
local epoch = redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
redis.call('HSET', KEYS[2], ARGV[1], string.format('%d:%s', epoch, ARGV[2]))
return epoch
""")

FORGET = Script("""
-- KEYS specs, epochs, sequences. ARGV ids
for _, name in ipairs(ARGV) do
  if redis.call('HEXISTS', KEYS[1], name) == 0 then
    redis.call('HDEL', KEYS[2], name)
    redis.call('HDEL', KEYS[3], name)
  end
end
return 1
""")

RELEASE = Script("""
-- KEYS leases. ARGV id, token
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
""")

LEAD = Script("""
-- KEYS leader. ARGV owner, ttl in ms
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
""")

ABDICATE = Script("""
-- KEYS leader. ARGV owner
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
""")

PUBLISH = Script("""
-- KEYS specs, leases, statuses, sequences, (events, scores) of each stream. ARGV events kept, scores kept, and of each
-- stream: id, token (empty: nobody's), status or empty, number of events, number of scores, events.., scores..
local clock = redis.call('TIME')
local at = clock[1] .. '.' .. string.format('%06d', clock[2])
local done, arg = {}, 3
for key = 5, #KEYS, 2 do
  local id, events, scores = ARGV[arg], tonumber(ARGV[arg + 3]), tonumber(ARGV[arg + 4])
  local held = redis.call('HGET', KEYS[2], id) or ''
  local fresh = held == ARGV[arg + 1] and redis.call('HEXISTS', KEYS[1], id) == 1
  if fresh then
    if ARGV[arg + 2] ~= '' then redis.call('HSET', KEYS[3], id, ARGV[arg + 2]) end
    for i = arg + 5, arg + 4 + events do
      local entry = string.format('%d-0', redis.call('HINCRBY', KEYS[4], id, 1))
      redis.call('XADD', KEYS[key], 'MAXLEN', '~', ARGV[1], entry, 'r', ARGV[i], 't', at)
    end
    for i = arg + 5 + events, arg + 4 + events + scores do
      redis.call('XADD', KEYS[key + 1], 'MAXLEN', '~', ARGV[2], '*', 'r', ARGV[i], 't', at)
    end
  end
  done[#done + 1] = fresh and 1 or 0
  arg = arg + 5 + events + scores
end
return done
""")

SAVE = Script("""
-- KEYS target, specs, leases. ARGV id, token, ttl in ms, epoch, (field, value)..
local held = redis.call('HGET', KEYS[3], ARGV[1])
if held ~= ARGV[2] or redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then return 0 end
redis.call('HSET', KEYS[1], 'epoch', unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
""")

SAVE_ELSEWHERE = Script("""
-- KEYS target, on a server that holds no leases. ARGV ttl in ms, epoch, (field, value)..
if tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0) > tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], 'epoch', unpack(ARGV, 2))
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
""")

# a hash whose entries expire: the sorted set holds the end of each, in ms of the server's clock
PUT_EXPIRING = Script("""
-- KEYS values, ends. ARGV key, value, ttl in ms
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('ZADD', KEYS[2], 'GT', string.format('%d', now + ARGV[3]), ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
""")

GET_EXPIRING = Script("""
-- KEYS values, ends
local clock = redis.call('TIME')
local now = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000))
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do
  redis.call('HDEL', KEYS[1], key)
  redis.call('ZREM', KEYS[2], key)
end
return redis.call('HGETALL', KEYS[1])
""")

GET_DOCUMENT = Script("""
-- KEYS texts, ends. ARGV key
local clock = redis.call('TIME')
local ends = redis.call('ZSCORE', KEYS[2], ARGV[1])
if ends and tonumber(ends) <= clock[1] * 1000 + math.floor(clock[2] / 1000) then return false end
return redis.call('HGET', KEYS[1], ARGV[1])
""")

SWAP_DOCUMENT = Script("""
-- KEYS texts, ends. ARGV key, ttl in ms or empty, "put", "is" or "absent", text before, text after (left out: delete)
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local ends = redis.call('ZSCORE', KEYS[2], ARGV[1])
local held = redis.call('HGET', KEYS[1], ARGV[1])
if ends and tonumber(ends) <= now then held = false end
if ARGV[3] == 'absent' and held then return 0 end
if ARGV[3] == 'is' and held ~= ARGV[4] then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
if ARGV[5] == nil then
  redis.call('HDEL', KEYS[1], ARGV[1])
  return 1
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[5])
if ARGV[2] ~= '' then redis.call('ZADD', KEYS[2], string.format('%d', now + ARGV[2]), ARGV[1]) end
return 1
""")


SURVEY = Script("""
-- KEYS specs, leases, statuses, replicas, ends of replicas
local clock = redis.call('TIME')
local now = string.format('%d', clock[1] * 1000 + math.floor(clock[2] / 1000))
local live = {}
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[5], '(' .. now, '+inf')) do
  live[#live + 1] = key
  live[#live + 1] = redis.call('HGET', KEYS[4], key)
end
return {redis.call('HGETALL', KEYS[1]), redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3]), live}
""")


class RedisStore(StateStore):
    """A StateStore in Redis or Valkey (6.2 or newer, no cluster mode); as durable as the server's append-only file.

    Keys begin with `settings.prefix`. With `settings.state_url`, shift states and pictures live on a second server;
    their writes look at the lease first and never go behind a newer epoch's, but that is two steps, not one.
    """

    def __init__(self, settings: StoreSettings) -> None:
        if settings.url is None:
            raise CallerError("store.url is empty: use redis://HOST:PORT", reason="invalid_settings")
        self._settings = settings
        self._prefix = settings.prefix
        self._vault = vault_of(settings)
        # read often and changed seldom; frozen, so one object serves all
        self._spec = lru_cache(maxsize=4096)(partial(open_spec, vault=self._vault))
        url = settings.url.get_secret_value()
        state_url = settings.state_url.get_secret_value() if settings.state_url else url
        self._main = _client(url)
        self._states = _client(state_url) if state_url != url else self._main

    def __reduce__(self) -> tuple[Callable[[StoreSettings], RedisStore], tuple[StoreSettings]]:
        """Travels as its settings: every process has its own connections."""
        return RedisStore, (self._settings,)

    def __repr__(self) -> str:
        return f"RedisStore({_address(self._main)})"

    @override
    def put_stream(self, spec: StreamSpec, *, create: bool, before: StreamSpec | None = None) -> None:
        keys = [self._key("specs"), self._feed(("event", spec.id)), self._feed(("score", spec.id))]
        done = self._run(PUT_STREAM, keys, [spec.id, seal_spec(spec, self._vault), int(create), *_read(before)])
        if done < 0:
            raise _changed(spec.id)
        if not done:
            raise _exists(spec.id) if create else _not_found(spec.id)

    @override
    def get_stream(self, stream_id: str) -> StreamSpec:
        with self._world():
            raw = self._main.hget(self._key("specs"), stream_id)
        if raw is None:
            raise _not_found(stream_id)
        return self._spec(raw)

    @override
    def list_streams(self) -> list[StreamSpec]:
        with self._world():
            raw = self._main.hgetall(self._key("specs"))
        return [self._spec(raw[stream_id]) for stream_id in sorted(raw)]

    @override
    def delete_stream(self, stream_id: str, before: StreamSpec | None = None) -> None:
        state, preview = self._key("state", stream_id), self._key("preview", stream_id)
        keys = [*map(self._key, ("specs", "leases", "statuses")), self._feed(("event", stream_id))]
        keys += [self._feed(("score", stream_id)), state, preview, self._key("farewells")]
        done = self._run(DELETE_STREAM, keys, [stream_id, FAREWELL_S, *_read(before)])
        if done < 0:
            raise _changed(stream_id)
        if not done:
            raise _not_found(stream_id)
        if self._states is not self._main:
            with self._world(self._states):
                self._states.delete(state, preview)

    @override
    def absent(self, prefix: str) -> set[str]:
        with self._world(), self._main.pipeline(transaction=True) as pipe:
            for name in ("epochs", "sequences", "specs"):
                pipe.hkeys(self._key(name))
            epochs, sequences, specs = pipe.execute()
        gone: set[bytes] = {*epochs, *sequences} - {*specs}
        return {name.decode() for name in gone if name.startswith(prefix.encode())}

    @override
    def forget(self, stream_ids: Collection[str]) -> None:
        keys = [self._key(name) for name in ("specs", "epochs", "sequences")]
        names = sorted(stream_ids)
        for begin in range(0, len(names), 1000):
            self._run(FORGET, keys, names[begin : begin + 1000])

    @override
    def heartbeat(self, info: ReplicaInfo, ttl_ms: int) -> None:
        self._put_expiring("replicas", info.id, info.model_dump_json(), ttl_ms)

    @override
    def replicas(self) -> list[ReplicaInfo]:
        return [ReplicaInfo.model_validate_json(raw) for raw in self._get_expiring("replicas").values()]

    @override
    def retire(self, replica_id: str) -> None:
        with self._world(), self._main.pipeline(transaction=True) as pipe:
            pipe.hdel(self._key("replicas"), replica_id)
            pipe.zrem(self._key("replicas", "ends"), replica_id)
            pipe.execute()

    @override
    def survey(self) -> Survey:
        keys = [self._key(name) for name in ("specs", "leases", "statuses", "replicas", "replicas:ends")]
        specs, leases, statuses, replicas = map(_pairs, self._run(SURVEY, keys, []))
        return Survey(
            {stream_id: self._spec(raw) for stream_id, raw in specs.items()},
            {stream_id: _lease(stream_id, raw.decode()) for stream_id, raw in leases.items()},
            {stream_id: StreamStatus.model_validate_json(raw) for stream_id, raw in statuses.items()},
            {name: ReplicaInfo.model_validate_json(raw) for name, raw in replicas.items()},
        )

    @override
    def lead(self, owner: str, ttl_ms: int) -> bool:
        return bool(self._run(LEAD, [self._key("leader")], [owner, ttl_ms]))

    @override
    def abdicate(self, owner: str) -> None:
        self._run(ABDICATE, [self._key("leader")], [owner])

    @override
    def assign(self, stream_id: str, owner: str) -> Lease:
        keys = [self._key("specs"), self._key("leases"), self._key("epochs")]
        epoch = self._run(ASSIGN, keys, [stream_id, owner])
        if not epoch:
            raise _not_found(stream_id)
        return Lease(stream_id=stream_id, owner=owner, epoch=epoch)

    @override
    def unassign(self, stream_id: str) -> None:
        with self._world():
            self._main.hdel(self._key("leases"), stream_id)

    @override
    def release(self, lease: Lease) -> bool:
        return bool(self._run(RELEASE, [self._key("leases")], [lease.stream_id, _token(lease)]))

    @override
    def leases(self) -> dict[str, Lease]:
        with self._world():
            raw = self._main.hgetall(self._key("leases"))
        return {key.decode(): _lease(key.decode(), raw[key].decode()) for key in sorted(raw)}

    @override
    def publish(
        self,
        lease: Lease,
        *,
        status: StreamStatus | None = None,
        events: Sequence[Record] = (),
        scores: Sequence[Record] = (),
    ) -> None:
        if self.publish_many([(lease, status, events, scores)]):
            raise _stale(lease)

    @override
    def publish_many(self, publications: Sequence[Publication]) -> list[str]:
        if not publications:
            return []
        written = self._publish(
            (lease.stream_id, _token(lease), status, events, scores) for lease, status, events, scores in publications
        )
        return [lease.stream_id for (lease, *_), done in zip(publications, written, strict=True) if not done]

    @override
    def announce(self, stream_id: str, status: StreamStatus, *, events: Sequence[Record] = ()) -> None:
        if not self._publish([(stream_id, "", status, events, ())])[0]:
            raise _not_free(stream_id)

    @override
    def save(self, lease: Lease, blob: bytes) -> None:
        self._save("state", lease, ["blob", blob])

    @override
    def load(self, stream_id: str) -> bytes | None:
        with self._world(self._states):
            blob: bytes | None = self._states.hget(self._key("state", stream_id), "blob")
        return blob

    @override
    def status(self, stream_id: str) -> StreamStatus | None:
        with self._world():
            raw = self._main.hget(self._key("statuses"), stream_id)
        return None if raw is None else StreamStatus.model_validate_json(raw)

    @override
    def statuses(self) -> dict[str, StreamStatus]:
        with self._world():
            raw = self._main.hgetall(self._key("statuses"))
        return {key.decode(): StreamStatus.model_validate_json(raw[key]) for key in sorted(raw)}

    @override
    def events(self, stream_id: str, after: int = 0, limit: int = 100) -> list[Record]:
        if limit < 1:
            return []
        with self._world():
            rows = self._main.xrange(self._feed(("event", stream_id)), f"{after + 1}-0", "+", limit)
        return [record for _, record in _rows("event", rows)]

    @override
    def latest_sequence(self, stream_id: str) -> int:
        with self._world():
            return int(self._main.hget(self._key("sequences"), stream_id) or 0)

    @override
    def event_feeds(self) -> dict[str, int]:
        keys = [self._key(name) for name in ("specs", "sequences", "farewells")]
        return {name: int(newest) for name, newest in _pairs(self._run(EVENT_FEEDS, keys, [])).items()}

    @override
    def scores(self, stream_id: str, after: str = "0", limit: int = 100) -> list[Record]:
        if limit < 1:
            return []
        with self._world():
            rows = self._main.xrevrange(self._feed(("score", stream_id)), "+", f"({_entry_id(after)}", limit)
        return [record for _, record in _rows("score", reversed(rows))]

    @override
    def now(self, feeds: Iterable[Feed]) -> dict[Feed, str]:
        feeds = list(feeds)
        with self._world(), self._main.pipeline(transaction=False) as pipe:
            for kind, stream_id in feeds:
                if kind == "event":
                    pipe.hget(self._key("sequences"), stream_id)
                else:
                    pipe.xrevrange(self._feed((kind, stream_id)), "+", "-", 1)
            newest = pipe.execute() if feeds else []
        return {
            feed: (found or b"0").decode() if feed[0] == "event" else found[0][0].decode() if found else "0-0"
            for feed, found in zip(feeds, newest, strict=True)
        }

    @override
    def tail(self, cursors: Mapping[Feed, str | int], block_s: float) -> list[tuple[FeedKind, str, str, Record]]:
        deadline = time.monotonic() + block_s
        if not cursors:
            time.sleep(max(block_s, 0))
            return []
        unknown = [feed for feed, at in cursors.items() if at == "$"]
        fixed = {**cursors, **self.now(unknown)} if unknown else cursors
        feeds = {self._feed(feed): feed for feed in fixed}
        entries = {key: _entry_id(fixed[feed]) for key, feed in feeds.items()}
        while True:
            left_s = deadline - time.monotonic()
            block_ms = max(1, int(1000 * min(left_s, BLOCK_S))) if left_s > 0 else None
            with self._world():
                answer = self._main.xread(entries, count=TAIL_BATCH, block=block_ms)
            if answer or block_ms is None:
                return [
                    (feed[0], feed[1], position, record)
                    for key, rows in answer
                    for feed in [feeds[key.decode()]]
                    for position, record in _rows(feed[0], rows)
                ]

    @override
    def put_preview(self, lease: Lease, jpeg: bytes, frame_number: int) -> None:
        self._save("preview", lease, ["jpeg", jpeg, "frame", frame_number])

    @override
    def preview(self, stream_id: str) -> tuple[int, bytes] | None:
        with self._world(self._states):
            frame, jpeg = self._states.hmget(self._key("preview", stream_id), "frame", "jpeg")
        return None if jpeg is None else (int(frame), jpeg)

    @override
    def watch(self, stream_id: str, ttl_s: float) -> None:
        self._put_expiring("watched", stream_id, "1", int(1000 * ttl_s))

    @override
    def watched(self) -> set[str]:
        return set(self._get_expiring("watched"))

    @override
    def put_metrics(self, replica_id: str, text: str, ttl_s: float) -> None:
        self._put_expiring("metrics", replica_id, text, int(1000 * ttl_s))

    @override
    def metrics(self) -> dict[str, str]:
        return {replica_id: text.decode() for replica_id, text in self._get_expiring("metrics").items()}

    @override
    def document(self, kind: str, key: str) -> str | None:
        name = self._key("documents", kind)
        raw: bytes | None = self._run(GET_DOCUMENT, [name, f"{name}:ends"], [key])
        return raw.decode() if raw is not None else None

    @override
    def documents(self, kind: str) -> dict[str, str]:
        return {key: raw.decode() for key, raw in self._get_expiring(f"documents:{kind}").items()}

    @override
    def put_document(self, kind: str, key: str, text: str, ttl_s: float | None = None) -> None:
        self._swap(kind, key, ["put", "", text], ttl_s)

    @override
    def swap_document(
        self, kind: str, key: str, before: str | None, after: str | None, ttl_s: float | None = None
    ) -> bool:
        known = "absent" if before is None else "is"
        return self._swap(kind, key, [known, before or "", *([] if after is None else [after])], ttl_s)

    @override
    def ping(self) -> None:
        for client in (self._main, self._states):
            with self._world(client):
                client.ping()

    @override
    def close(self) -> None:
        self._main.close()
        self._states.close()

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    def _feed(self, feed: Feed) -> str:
        return self._key(f"{feed[0]}s", feed[1])

    def _run(self, script: Script, keys: list[str], args: list[Any]) -> Any:
        with self._world():
            return _run(self._main, script, keys, args)

    def _publish(
        self, batch: Iterable[tuple[str, str, StreamStatus | None, Sequence[Record], Sequence[Record]]]
    ) -> list[int]:
        keys = [self._key(name) for name in ("specs", "leases", "statuses", "sequences")]
        args: list[Any] = [self._settings.events_kept, self._settings.scores_kept]
        for stream_id, token, status, events, scores in batch:
            keys += [self._feed(("event", stream_id)), self._feed(("score", stream_id))]
            args += [stream_id, token, status.model_dump_json() if status else "", len(events), len(scores)]
            args += [*map(_dump, events), *map(_dump, scores)]
        written: list[int] = self._run(PUBLISH, keys, args)
        return written

    def _save(self, kind: str, lease: Lease, fields: list[Any]) -> None:
        target, ttl_ms = self._key(kind, lease.stream_id), int(1000 * self._settings.state_ttl_s)
        tail = [ttl_ms, lease.epoch, *fields]
        if self._states is self._main:
            keys = [target, self._key("specs"), self._key("leases")]
            done = self._run(SAVE, keys, [lease.stream_id, _token(lease), *tail])
        else:
            with self._world():
                done = self._main.hget(self._key("leases"), lease.stream_id) == _token(lease).encode()
            with self._world(self._states):
                done = done and _run(self._states, SAVE_ELSEWHERE, [target], tail)
        if not done:
            raise _stale(lease)

    def _put_expiring(self, name: str, key: str, value: str, ttl_ms: int) -> None:
        self._run(PUT_EXPIRING, [self._key(name), self._key(name, "ends")], [key, value, ttl_ms])

    def _get_expiring(self, name: str) -> dict[str, bytes]:
        return _pairs(self._run(GET_EXPIRING, [self._key(name), self._key(name, "ends")], []))

    def _swap(self, kind: str, key: str, change: list[str], ttl_s: float | None) -> bool:
        name = self._key("documents", kind)
        ttl_ms = "" if ttl_s is None else int(1000 * ttl_s)
        return bool(self._run(SWAP_DOCUMENT, [name, f"{name}:ends"], [key, ttl_ms, *change]))

    @contextmanager
    def _world(self, client: Any = None) -> Iterator[None]:
        """Turn what the server or the network did into StoreDown; mistakes of ours stay loud."""
        try:
            yield
        except redis.AuthenticationError as error:
            raise StoreDown(
                f"the store at {_address(client or self._main)} refused the password of store.url"
            ) from error
        except (redis.ConnectionError, redis.TimeoutError, redis.OutOfMemoryError, redis.ReadOnlyError) as error:
            address = _address(client or self._main)
            raise StoreDown(
                f"the store at {address} does not serve: {type(error).__name__}; start it or set store.url"
            ) from error


def _client(url: str) -> Any:
    try:
        return redis.Redis.from_url(
            url,
            protocol=2,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_keepalive=True,
            health_check_interval=15,
            max_connections=1024,
            # a connection may have been reset while it was idle: one new attempt, at once
            retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        )
    except ValueError:
        raise CallerError(
            "store.url must be redis://, rediss:// or unix:// (or memory:// for tests)", reason="invalid_settings"
        ) from None


def _address(client: Any) -> str:
    where = client.connection_pool.connection_kwargs
    return str(where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}")


def _run(client: Any, script: Script, keys: list[str], args: list[Any]) -> Any:
    """The script's answer; loads it where the server does not know it."""
    try:
        return client.evalsha(script.sha, len(keys), *keys, *args)
    except redis.exceptions.NoScriptError:
        return client.eval(script.source, len(keys), *keys, *args)


def _pairs(flat: list[bytes]) -> dict[str, bytes]:
    """A hash as scripts give it, sorted by key."""
    return dict(sorted(zip(map(bytes.decode, flat[::2]), flat[1::2], strict=True)))


def _token(lease: Lease) -> str:
    return f"{lease.epoch}:{lease.owner}"


def _lease(stream_id: str, token: str) -> Lease:
    epoch, _, owner = token.partition(":")
    return Lease(stream_id=stream_id, owner=owner, epoch=int(epoch))


def _dump(record: Record) -> str:
    return json.dumps(record, separators=(",", ":"), allow_nan=False)


def _record(kind: FeedKind, line: str | bytes, published_s: float, sequence: int) -> Record:
    record: Record = json.loads(line)
    if kind == "event":
        record["sequence"] = sequence
    record["published_s"] = published_s
    return record


def _rows(kind: FeedKind, rows: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> Iterator[tuple[str, Record]]:
    """(position, record) of raw entries of a Redis stream."""
    for entry, fields in rows:
        name = entry.decode()
        sequence = int(name.partition("-")[0])
        yield (
            _position(kind, sequence) if kind == "event" else name,
            _record(kind, fields[b"r"], float(fields[b"t"]), sequence),
        )


def _position(kind: FeedKind, number: int) -> str:
    return str(number) if kind == "event" else f"{number}-0"


def _number(position: str | int) -> int:
    return int(str(position).partition("-")[0])


def _entry_id(position: str | int) -> str:
    name = str(position)
    return name if "-" in name else f"{int(name)}-0"


def _exists(stream_id: str) -> StreamExists:
    return StreamExists(f"stream {stream_id!r} exists; update it, or choose another id")


def _changed(stream_id: str) -> StreamChanged:
    return StreamChanged(f"stream {stream_id!r} was changed meanwhile; read it again, and change what it is now")


def _read(before: StreamSpec | None) -> list[str]:
    """What tells the specification that was read from any other, as it stands in the store's JSON."""
    if before is None:
        return []
    return [str(before.model_dump(mode="json", include={"created_at"})["created_at"]), str(before.edition)]


def _not_found(stream_id: str) -> StreamNotFound:
    return StreamNotFound(f"stream {stream_id!r} is not registered")


def _stale(lease: Lease) -> StaleLease:
    return StaleLease(f"{lease.owner} no longer owns stream {lease.stream_id!r} (epoch {lease.epoch}); nothing written")


def _not_free(stream_id: str) -> StaleLease:
    return StaleLease(f"stream {stream_id!r} has an owner or is not registered; nothing written")
