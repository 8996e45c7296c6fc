"""Pause, resume and restart: what stays, what begins anew, and what is told."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from pipelines.sources import SourceState
from services.engine import Engine
from services.manager import NotServed, StreamManager
from services.schemas import StreamStatus
from services.settings import Settings
from services.store import MemoryStore
from services.stream_models import StreamModel
from tests.unit.services.engine_kit import MODEL, Cameras, give, picture, processed, running, settings, spec, wait
from tests.unit.services.http_kit import MODELS, serving


def feed(engine: Engine, cameras: Cameras, stream_id: str, number: int, began_s: float) -> None:
    """One picture at one time, the same for every stream, and wait for its result."""
    before = processed(engine, stream_id)
    cameras[stream_id].feed(picture("same", number), began_s + number / 15)
    wait(lambda: processed(engine, stream_id) > before)


def state(store: MemoryStore, stream_id: str) -> str:
    status = store.status(stream_id)
    return status.state if status else ""


def pause(store: MemoryStore, paused: bool) -> None:
    before = store.get_stream("door")
    store.put_stream(before.model_copy(update={"paused": paused}), create=False, before=before)


def test_a_paused_stream_goes_on_as_if_there_had_been_no_pause():
    store, began_s = MemoryStore(), time.time()
    with running(store) as (engine, cameras):
        give(store, engine, spec("door"), spec("other"))
        for number in range(6):
            for name in ("door", "other"):
                cameras[name].tell(SourceState("RUNNING"))
                feed(engine, cameras, name, number, began_s)
        first = cameras["door"]
        pause(store, True)
        wait(lambda: first.stopped and state(store, "door") == "PAUSED")
        session, lease = engine.sessions["door"], store.leases()["door"]
        wait(lambda: session.source is None and session.checkpoint_age_s is not None)
        assert store.load("door") is not None, "a replica that dies now loses nothing"
        first.feed(picture("same", 99))  # a late frame harms nobody
        assert session.queue.counts()[0] == 6
        assert engine.served[MODEL].arena.used == 2, "it keeps its place"

        pause(store, False)
        wait(lambda: cameras["door"] is not first)
        cameras["door"].tell(SourceState("RUNNING"))
        for number in range(6, 12):
            for name in ("door", "other"):
                feed(engine, cameras, name, number, began_s)
        wait(lambda: state(store, "door") == "RUNNING")
        assert engine.sessions["door"] is session
        assert store.leases()["door"] == lease
        wait(lambda: len(store.scores("door")) == len(store.scores("other")) == 12)
        for one, other in zip(store.scores("door"), store.scores("other"), strict=True):
            assert (one["frame_number"], one["label"]) == (other["frame_number"], other["label"])
            assert one["score"] == pytest.approx(other["score"], abs=2e-4)
        told = [event["data"]["after"] for event in store.events("door") if "after" in event["data"]]
        assert told == ["STARTING", "RUNNING", "PAUSED", "STARTING", "RUNNING"]


def test_a_pause_longer_than_the_law_ends_what_was_open_and_begins_cold():
    store = MemoryStore()
    with running(store, using=settings(state_max_gap_s=0.5)) as (engine, cameras):
        give(store, engine, spec("door", models=(StreamModel(name=MODEL, threshold=0.01, off_threshold=0.0),)))
        began_s = time.time()
        for number in range(40):
            cameras["door"].feed(picture("same", 0), began_s - 4 + number / 15)
            wait(lambda n=number: processed(engine, "door") == n + 1)

        def told(phase: str) -> list[dict]:
            return [event for event in store.events("door") if event["type"] == f"tsm.v1.action.{phase}"]

        wait(lambda: told("new"))
        pause(store, True)
        wait(lambda: engine.sessions["door"].source is None)
        open_now = {event["subject"] for event in told("new")} - {event["subject"] for event in told("end")}
        assert len(open_now) == 1
        before = cameras["door"]
        pause(store, False)
        wait(lambda: cameras["door"] is not before)
        cameras["door"].feed(picture("same", 0), began_s + 100)
        wait(lambda: open_now <= {event["subject"] for event in told("end")})
        wait(lambda: store.scores("door")[-1]["warmup"] is not None)


def test_a_paused_stream_moves_and_stays_paused():
    store = MemoryStore()
    with running(store, "r1") as (one, cameras), running(store, "r2") as (two, others):
        give(store, one, spec("door"))
        feed(one, cameras, "door", 0, time.time())
        pause(store, True)
        wait(lambda: one.sessions["door"].source is None and store.load("door"))
        store.assign("door", "r2")
        wait(
            lambda: "door" in two.sessions and (s := store.status("door")) and s.worker == "r2" and s.state == "PAUSED"
        )
        assert "door" not in others.sources, "nobody opens its camera"
        assert two.sessions["door"].restored.mode == "checkpoint"
        pause(store, False)
        wait(lambda: "door" in others.sources)
        assert others["door"].number == 1


@pytest.fixture
def manager() -> StreamManager:
    manager = StreamManager(MemoryStore(), Settings(), models=MODELS)
    manager.store.put_stream(spec("door"), create=True)
    return manager


@pytest.fixture
def client(manager: StreamManager) -> Iterator[httpx.Client]:
    with serving(manager) as address, httpx.Client(base_url=address, trust_env=False) as client:
        yield client


def test_the_verbs(client: httpx.Client, manager: StreamManager):
    def ask(verb: str) -> dict:
        return client.post(f"/v1/streams/door/{verb}").raise_for_status().json()

    paused = ask("pause")
    assert (paused["paused"], paused["enabled"], paused["revision"]) == (True, True, 1)
    assert ask("pause")["edition"] == paused["edition"], "it is paused already"
    lease = manager.store.assign("door", "r1")
    manager.store.publish(lease, status=StreamStatus(state="PAUSED", since=1.0))
    assert client.get("/v1/streams?state=PAUSED").json()["streams"][0]["id"] == "door"
    resumed = ask("resume")
    assert (resumed["paused"], resumed["status"]["state"]) == (False, "STARTING")
    assert ask("restart")["revision"] == 2
    ask("pause")
    assert (ask("restart")["paused"], ask("start")["paused"]) == (False, False)
    ask("pause")
    assert ask("start")["paused"] is False
    ask("pause")
    assert ask("stop")["paused"] is False
    manager.store.unassign("door")
    manager.store.announce("door", StreamStatus(state="STOPPED", since=1.0))
    for verb in ("pause", "resume", "restart"):
        answer = client.post(f"/v1/streams/door/{verb}")
        assert (answer.status_code, answer.json()["reason"]) == (409, "stream_not_served")
        assert "start it" in answer.json()["detail"]
        assert client.post(f"/v1/streams/nope/{verb}").status_code == 404
    ask("start")
    ask("pause")
    assert client.patch("/v1/streams/door", json={"enabled": False}).json()["paused"] is False


def test_what_has_ended_cannot_be_paused(manager: StreamManager):
    manager.store.announce("door", StreamStatus(state="ENDED", since=1.0))
    with pytest.raises(NotServed, match="ENDED"):
        manager.pause("door")
