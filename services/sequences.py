"""Sequences at a gateway: which replica has the next frame, and what to do when it has gone."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from services.inference import (
    MAX_IN_FLIGHT,
    InferReply,
    InferRequest,
    ModelNotReady,
    NoCapacity,
    NotMine,
    RequestTimeout,
    SequenceBusy,
    UnknownSequence,
)
from services.schemas import PUSHED, SEQUENCE_PREFIX, SEQUENCES, Lease, SourceSpec, StreamSpec
from services.store import StateStore, StreamExists, StreamNotFound
from services.stream_models import StreamModel

LEASES_KEPT = 20_000
FIRST_WAIT_S = 0.01
LONGEST_WAIT_S = 0.1


class Replicas(Protocol):
    """The engine replicas, as a gateway calls them."""

    async def infer(self, request: InferRequest, owner: str | None = None) -> InferReply:
        """The answer of any replica, or of this one. Raises ModelNotReady when it does not hold the model."""

    async def push(self, lease: Lease, token: str, request: InferRequest) -> InferReply:
        """The answer of the lease's owner. Raises NotMine when it is another's by now, or the owner is gone."""


class Turns:
    """One caller at a time for each key, in the order they came; they may come from several event loops."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[str, deque[Future[None]]] = {}
        self._lock = threading.Lock()

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[None]:
        """Within it no other has the key. Raises SequenceBusy when so many wait already."""
        mine: Future[None] | None = None
        with self._lock:
            queue = self._waiting.get(key)
            if queue is None:
                self._waiting[key] = deque()
            elif len(queue) >= self._most:
                raise SequenceBusy(f"{len(queue)} frames of this sequence wait; send the next after an answer")
            else:
                mine = Future()
                queue.append(mine)
        if mine is not None:
            try:
                await asyncio.wrap_future(mine)
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():  # the turn had come
                    self._pass_on(key)
                raise
        try:
            yield
        finally:
            self._pass_on(key)

    def _pass_on(self, key: str) -> None:
        with self._lock:
            queue = self._waiting[key]
            while queue:
                following = queue.popleft()
                if following.set_running_or_notify_cancel():
                    following.set_result(None)
                    return
            del self._waiting[key]


def sequence_stream(model: str, sequence_id: str) -> str:
    """The id of the stream that a sequence is."""
    return SEQUENCE_PREFIX + hashlib.sha256(f"{model}\0{sequence_id}".encode()).hexdigest()[:32]


class Sequences:
    """Pushes the frames of sequences to the replicas that own them, in order, and again where one was lost.

    What it keeps is a memory of leases: any number of gateways may run.
    """

    def __init__(self, store: StateStore, replicas: Replicas, check: Callable[[InferRequest], object]) -> None:
        """check: raises UnknownModel or BadInput for a request that can begin no sequence."""
        self._check = check
        self._store = store
        self._replicas = replicas
        self._turns = Turns(MAX_IN_FLIGHT)
        self._leases: OrderedDict[str, Lease] = OrderedDict()
        self._lock = threading.Lock()

    async def push(self, request: InferRequest) -> InferReply:
        """The answer to the next frames of a sequence, which begins if there is none of this id.

        Raises UnknownModel, BadInput, UnknownSequence, ModelNotReady, NoCapacity, SequenceBusy, RequestTimeout, and
        what the owner says.
        """
        assert request.sequence is not None
        stream_id = sequence_stream(request.model, request.sequence.id)
        try:
            async with asyncio.timeout(request.timeout_s):
                async with self._turns.turn(stream_id):
                    return await self._push(stream_id, request)
        except TimeoutError:
            raise RequestTimeout(
                f"sequence {request.sequence.id!r} had no answer within {request.timeout_s:g} s; whether the frame was "
                "counted is not known: the next answer's frame_number tells"
            ) from None

    async def _push(self, stream_id: str, request: InferRequest) -> InferReply:
        assert request.sequence is not None
        token, wait_s = uuid.uuid4().hex, FIRST_WAIT_S
        while True:
            lease = self._leases.get(stream_id)
            if lease is None:
                lease = await asyncio.to_thread(self._find, stream_id, request)
            if lease is not None:
                try:
                    reply = await self._replicas.push(lease, token, request)
                except NotMine:
                    self._remember(stream_id, None)
                else:
                    self._remember(stream_id, None if request.sequence.end else lease)
                    return reply
            await asyncio.sleep(wait_s)
            wait_s = min(LONGEST_WAIT_S, 2 * wait_s)

    def _remember(self, stream_id: str, lease: Lease | None) -> None:
        with self._lock:
            self._leases.pop(stream_id, None)
            if lease is not None:
                self._leases[stream_id] = lease
                if len(self._leases) > LEASES_KEPT:
                    self._leases.popitem(last=False)

    def _find(self, stream_id: str, request: InferRequest) -> Lease | None:
        """The lease of the sequence, which is begun where there is none; None while it waits for a replica."""
        assert request.sequence is not None
        try:
            self._store.get_stream(stream_id)
        except StreamNotFound:
            note = self._store.document(SEQUENCES, stream_id)
            if note is not None and not request.sequence.start:
                how = {"ended": "was ended by sequence_end", "evicted": "stood still too long and was let go"}
                raise UnknownSequence(
                    f"sequence {request.sequence.id!r} of {request.model} {how.get(note, 'failed')}; this frame is "
                    "late. Send sequence_start with a frame to begin it anew"
                ) from None
            return self._begin(stream_id, request, note)
        lease = self._store.leases().get(stream_id)
        alive = {replica.id for replica in self._store.replicas()}
        return lease if lease is not None and lease.owner in alive else None

    def _begin(self, stream_id: str, request: InferRequest, note: str | None) -> Lease | None:
        assert request.sequence is not None
        spec = StreamSpec(
            id=stream_id,
            name=request.sequence.id,
            source=SourceSpec(uri=PUSHED),
            models=(StreamModel(name=request.model),),
        )
        self._check(request)
        owner = self._freest(request.model)
        if note is not None:
            self._store.swap_document(SEQUENCES, stream_id, note, None)
        with suppress(StreamExists):  # another gateway was faster
            self._store.put_stream(spec, create=True)
            return self._store.assign(stream_id, owner)
        return None

    def _freest(self, model: str) -> str:
        """The replica with most free slots of those that hold the model. Raises ModelNotReady, NoCapacity."""
        live = [one for one in self._store.replicas() if not one.draining and model in one.models]
        if not live:
            raise ModelNotReady(f"no replica holds model {model!r} at the moment; try again")
        taken = Counter(lease.owner for lease in self._store.leases().values())
        best = max(live, key=lambda one: one.slots_total - taken[one.id])
        if taken[best.id] >= best.slots_total:
            total = sum(one.slots_total for one in live)
            raise NoCapacity(
                f"all {total} slots of {len(live)} replicas are taken; end a sequence or stop a stream, or serve with "
                "more engine.slots or engine.replicas"
            )
        return best.id
