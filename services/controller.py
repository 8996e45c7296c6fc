"""Who serves which stream: one leader looks at what should be and at what is, and closes the gap, again and again.

It talks to nobody: replicas read their leases from the store. A stream on a draining replica stays there until the
replica releases it or retires, so that its last save is still its owner's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from services.schemas import SEQUENCE_PREFIX, SEQUENCES, Lease, ReplicaInfo, StreamSpec, StreamStatus, state_event
from services.settings import ControllerSettings
from services.store import StaleLease, StateStore, StoreDown, StreamNotFound

SETTLE_S = 2.0  # a replica so long alive may be given streams of others, one in each such time
NEW_SEQUENCE_S = 2.0  # a sequence so young is given to a replica by the gateway that began it
FORGET_S = 600.0  # of a sequence that is over for so long nothing is kept
HUNG_S = 15.0  # a look takes milliseconds, a store that is down a few seconds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What to change: streams to give to replicas, streams to take away, and why others wait (code, message)."""

    assign: dict[str, str] = field(default_factory=dict)
    unassign: tuple[str, ...] = ()
    waiting: dict[str, tuple[str, str]] = field(default_factory=dict)


def plan(
    specs: Iterable[StreamSpec],
    leases: Mapping[str, Lease],
    replicas: Iterable[ReplicaInfo],
    ended: frozenset[str] = frozenset(),
    settled: frozenset[str] = frozenset(),
) -> Plan:
    """The next step towards every enabled stream on a live replica; the same answer for the same facts.

    Streams in `ended` need no place any more. A stream without a live owner goes to the replica with most free slots.
    When all have their place, one stream moves between two `settled` replicas whose free slots differ by two or more;
    it loses the frames since its last save, so a sequence, whose frames are counted, never does.
    """
    specs = list(specs)
    live = {replica.id: replica for replica in replicas}
    wanted = sorted(spec.id for spec in specs if spec.enabled and spec.id not in ended)
    held = {stream_id: leases[stream_id].owner for stream_id in wanted if stream_id in leases}
    load = Counter(owner for owner in held.values() if owner in live)
    free = {name: live[name].slots_total - load[name] for name in sorted(live) if not live[name].draining}

    assign: dict[str, str] = {}
    waiting: dict[str, tuple[str, str]] = {}
    for stream_id in wanted:
        if held.get(stream_id) in live:
            continue
        best = max(free, key=lambda name: free[name], default=None)
        if best is not None and free[best] > 0:
            assign[stream_id] = best
            free[best] -= 1
        else:
            waiting[stream_id] = _why_waiting(live, load, free)
    unassign = (set(leases) - set(wanted)) | (set(waiting) & set(leases))

    movable = {name: slots for name, slots in free.items() if name in settled}
    if not assign and not waiting and movable:
        fullest = min(movable, key=lambda name: movable[name])
        emptiest = max(movable, key=lambda name: movable[name])
        pushed = {spec.id for spec in specs if spec.source.is_pushed}
        theirs = [stream_id for stream_id, owner in held.items() if owner == fullest and stream_id not in pushed]
        if theirs and movable[emptiest] - movable[fullest] >= 2:
            assign[theirs[-1]] = emptiest
    return Plan(assign, tuple(sorted(unassign)), waiting)


def _why_waiting(live: Mapping[str, ReplicaInfo], load: Mapping[str, int], free: Mapping[str, int]) -> tuple[str, str]:
    if not live:
        return "NO_REPLICA", "no engine replica is alive; the stream starts when one is"
    total = sum(live[name].slots_total for name in free)
    draining = f", {len(live) - len(free)} more drain" if len(free) < len(live) else ""
    return "CAPACITY", (
        f"all {total} slots of {len(free)} live replicas are taken{draining}; "
        "stop a stream, raise engine.slots or engine.replicas"
    )


class Controller:
    """A thread that leads when no other does, and while it leads carries out `plan`."""

    def __init__(self, store: StateStore, settings: ControllerSettings, owner_id: str) -> None:
        self.owner_id = owner_id
        self.leading = False
        self._store = store
        self._settings = settings
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._looked_at = time.monotonic()
        self._alive_at = time.monotonic()
        self._patient_until = 0.0
        self._seen: dict[str, float] = {}  # live replicas, since when
        self._ended: dict[str, int] = {}  # files that are over, and the revision that was served
        self._moved_at = 0.0
        self._over: set[str] = set()  # sequences that were gone at the last look for them
        self._looked_for_over_at = time.monotonic()

    def start(self) -> None:
        """Begin to look at the registry every `tick_s`."""
        if self._thread is None:
            self._stopping.clear()
            self._looked_at = self._alive_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and let another lead at once."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(HUNG_S)
            self._thread = None
        self.leading = False
        with contextlib.suppress(StoreDown):
            self._store.abdicate(self.owner_id)

    def healthy(self) -> bool:
        """False when the thread died of a bug or hangs; a store that is down is no reason."""
        return self._thread is not None and self._thread.is_alive() and time.monotonic() - self._alive_at < HUNG_S

    def _run(self) -> None:
        reachable = True
        while not self._stopping.is_set():
            self._alive_at = time.monotonic()
            try:
                self.tick()
                if not reachable:
                    log.info("the store is back")
                reachable = True
            except StoreDown as error:
                self.leading = False
                if reachable:
                    log.warning("%s; assignments stay as they are", error)
                reachable = False
            self._stopping.wait(self._settings.tick_s)

    def tick(self) -> None:
        """One look at the registry, and what follows from it if we lead. Raises StoreDown."""
        self.leading = self._store.lead(self.owner_id, self._settings.lease_ttl_ms)
        now, patience_s = time.monotonic(), self._settings.lease_ttl_ms / 1000
        if now - self._looked_at > patience_s:
            # we or the store slept, and heartbeats may have run out meanwhile: first let the replicas speak
            self._patient_until = now + patience_s
        if self.leading:
            self._reconcile(now)
            if now - self._looked_for_over_at >= FORGET_S:
                self._looked_for_over_at = now
                self._forget_sequences()
        self._looked_at = time.monotonic()

    def _reconcile(self, now: float) -> None:
        specs, leases, statuses, replicas = self._store.survey()
        self._seen = {name: self._seen.get(name, now) for name in replicas}

        young_s = time.time() - NEW_SEQUENCE_S
        begun = {
            stream_id
            for stream_id, spec in specs.items()
            if spec.source.is_pushed and stream_id not in leases and spec.created_at.timestamp() > young_s
        }
        specs = {stream_id: spec for stream_id, spec in specs.items() if stream_id not in begun}

        calm = now - self._moved_at >= SETTLE_S
        if now < self._patient_until:
            calm = False
            silent = {stream_id for stream_id, lease in leases.items() if lease.owner not in replicas}
            specs = {stream_id: spec for stream_id, spec in specs.items() if stream_id not in silent}
            leases = {stream_id: lease for stream_id, lease in leases.items() if stream_id not in silent}
        settled = frozenset(name for name, since in self._seen.items() if now - since >= SETTLE_S)
        over = {stream_id for stream_id, status in statuses.items() if status.state == "ENDED"} & specs.keys()
        self._ended = {stream_id: self._ended.get(stream_id, specs[stream_id].revision) for stream_id in over}
        ended = frozenset(name for name, revision in self._ended.items() if specs[name].revision == revision)
        step = plan(specs.values(), leases, replicas.values(), ended, settled if calm else frozenset())

        for stream_id in step.unassign:
            self._store.unassign(stream_id)
        for stream_id, replica_id in step.assign.items():
            with contextlib.suppress(StreamNotFound):  # deleted meanwhile
                lease = self._store.assign(stream_id, replica_id)
                before = leases.get(stream_id)
                if before is not None and before.owner in replicas:
                    self._moved_at = now
                log.info(
                    "stream %s: epoch %d on %s, before on %s",
                    stream_id,
                    lease.epoch,
                    replica_id,
                    before.owner if before else "none",
                    extra={"stream": stream_id},
                )
        for stream_id, (code, why) in step.waiting.items():
            self._announce(
                stream_id,
                statuses.get(stream_id),
                StreamStatus(state="STARTING", error_code=code, status_message=why, since=0),
            )
        for stream_id, spec in specs.items():
            if not spec.enabled:
                self._announce(stream_id, statuses.get(stream_id), StreamStatus(state="STOPPED", since=0))

    def _forget_sequences(self) -> None:
        """Forget the sequences that were gone at the last look too, and of which no late frame is expected."""
        over = self._store.absent(SEQUENCE_PREFIX) - self._store.documents(SEQUENCES).keys()
        self._store.forget(over & self._over)
        self._over = over - self._over

    def _announce(self, stream_id: str, before: StreamStatus | None, now: StreamStatus) -> None:
        """Write the state of a stream that has no owner, unless it is written already; its counters stay."""
        told = ("state", "error_code", "status_message")
        if before is not None and all(getattr(before, name) == getattr(now, name) for name in told):
            return
        at_s = time.time()
        changed = before is None or before.state != now.state
        counters = {"received", "processed", "dropped", "reconnects", "last_frame_time", "clock", "source_size"}
        kept = before.model_dump(include=counters) if before else {}
        since = at_s if before is None or changed else before.since
        status = now.model_copy(update={**kept, "since": since, "updated_at": at_s})
        events = []
        if changed:
            events.append(state_event(stream_id, before.state if before else None, now.state, now.status_message, at_s))
        with contextlib.suppress(StaleLease):  # it found an owner, or was deleted
            self._store.announce(stream_id, status, events=events)
