"""Two engines, a controller, a real Valkey, real ffmpeg and RTSP cameras: streams that move and stay whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.simulator import SimulatorClient, SimulatorProcess, start_simulator
from services.controller import Controller
from services.engine import Engine
from services.schemas import SourceSpec, StreamSpec, StreamStatus
from services.settings import EngineSettings, ModelSettings, Settings, StoreSettings
from services.snapshots import decode_snapshot, sha256
from services.store import RedisStore, StateStore
from tests.unit.services.engine_kit import MODEL, small_model, wait
from tsm_core.checkpoints import save_model

CAMERAS = ("north", "south")


@pytest.fixture
def cameras() -> Iterator[SimulatorProcess]:
    with start_simulator({name: f"scene:{seed}" for seed, name in enumerate(CAMERAS)}, size_px=160) as simulator:
        yield simulator


@pytest.fixture
def using(valkey_url: str, tmp_path: Path) -> Settings:
    save_model(tmp_path / "motion9.safetensors", small_model())
    return Settings(
        store=StoreSettings(url=valkey_url, prefix=f"{tmp_path.name}:"),
        engine=EngineSettings(
            slots=4,
            max_frame_age_s=3.0,  # a busy test machine is no reason to drop, nor to call a replica dead
            heartbeat_ttl_ms=2000,
            models=(ModelSettings(name=MODEL, path=tmp_path / "motion9.safetensors"),),
        ),
    )


@pytest.fixture
def store(using: Settings) -> Iterator[StateStore]:
    store = RedisStore(using.store)
    yield store
    store.close()


@pytest.fixture
def engines(using: Settings, store: StateStore) -> Iterator[dict[str, Engine]]:
    engines = {name: Engine(using, RedisStore(using.store), name) for name in ("r1", "r2")}
    controller = Controller(store, using.controller, "c1")
    for engine in engines.values():
        engine.start()
    wait(lambda: len(store.replicas()) == 2)
    controller.start()
    yield engines
    controller.stop()
    for engine in engines.values():
        engine.stop()
        engine.store.close()


def serve(store: StateStore, simulator: SimulatorProcess) -> None:
    for name in CAMERAS:
        uri = f"rtsp://127.0.0.1:{simulator.port}/{name}"
        store.put_stream(StreamSpec(id=name, source=SourceSpec(uri=uri)), create=True)


def status(store: StateStore, name: str) -> StreamStatus:
    found = store.status(name)
    assert found is not None
    return found


def sees(store: StateStore, name: str, frames: int) -> bool:
    found = store.status(name)
    return found is not None and found.state == "RUNNING" and found.processed >= frames


def test_a_drained_replicas_streams_go_on_elsewhere_with_their_state(cameras, store, engines):
    serve(store, cameras)
    wait(lambda: all(sees(store, name, 15) for name in CAMERAS), 60)
    owners = {name: status(store, name).worker for name in CAMERAS}
    moved = CAMERAS[0]
    leaving = engines.pop(str(owners[moved]))
    (staying,) = engines.values()
    engines[leaving.id] = leaving

    start = time.monotonic()
    leaving.drain()
    assert time.monotonic() - start <= 1.0
    blob = store.load(moved)
    assert blob is not None
    last = decode_snapshot(blob)
    assert last.epoch == status(store, moved).epoch

    wait(lambda: moved in staying.sessions and status(store, moved).worker == staying.id, 5)
    restored = staying.sessions[moved].restored
    assert restored.mode == "checkpoint"
    assert (restored.blob_bytes, restored.blob_sha256) == (len(blob), sha256(blob))
    assert restored.frame_number == last.frame_number
    wait(lambda: sees(store, moved, last.processed + 10), 30)

    numbers = [score["frame_number"] for score in store.scores(moved)]
    assert numbers == sorted(set(numbers))  # none twice, none out of order
    first = next(score for score in store.scores(moved) if score["frame_number"] > last.frame_number)
    assert first["warmup"] is None
    now = status(store, moved)
    assert now.restored == restored
    assert now.epoch == last.epoch + 1
    sequence = [event["sequence"] for event in store.events(moved)]
    assert sequence == list(range(1, len(sequence) + 1))


def test_what_the_camera_sent_is_processed_or_counted_as_dropped(cameras, store, engines):
    serve(store, cameras)
    wait(lambda: all(sees(store, name, 30) for name in CAMERAS), 60)
    off_s = time.time()
    for name in CAMERAS:
        spec = store.get_stream(name)
        store.put_stream(spec.model_copy(update={"enabled": False, "revision": 2}), create=False)
    wait(lambda: all(_balanced(status(store, name)) for name in CAMERAS), 10)
    for name in CAMERAS:
        received = status(store, name).received
        sent = SimulatorClient(f"rtsp://127.0.0.1:{cameras.port}/{name}").log()
        before = [entry for entry in sent if entry.sent_unix_s < off_s - 1]  # later ones may be cut off on their way
        assert len(before) <= received <= len(sent)


ALONE = """
import sys, threading
from services.engine import Engine
from services.settings import Settings
from services.store import RedisStore

settings = Settings.model_validate_json(sys.stdin.readline())
Engine(settings, RedisStore(settings.store), "doomed").start()
threading.Event().wait()
"""


def test_a_killed_replicas_streams_are_restored_from_their_last_save(cameras, using, store):
    name = "north"
    values = using.model_dump(mode="json")
    values["store"]["url"] = using.store.url.get_secret_value() if using.store.url else None
    doomed = subprocess.Popen([sys.executable, "-c", ALONE], stdin=subprocess.PIPE, text=True)
    assert doomed.stdin is not None
    doomed.stdin.write(json.dumps(values) + "\n")
    doomed.stdin.flush()
    wait(lambda: [replica.id for replica in store.replicas()] == ["doomed"], 60)
    controller = Controller(store, using.controller, "c1")
    controller.start()
    heir = Engine(using, RedisStore(using.store), "heir")
    try:
        store.put_stream(StreamSpec(id=name, source=SourceSpec(uri=cameras.urls[0])), create=True)
        wait(lambda: sees(store, name, 20) and store.load(name), 60)
        heir.start()
        wait(lambda: len(store.replicas()) == 2)
        decoders = psutil.Process(doomed.pid).children(recursive=True)
        assert decoders

        doomed.kill()
        doomed.wait()
        blob = store.load(name)
        assert blob is not None
        start = time.monotonic()
        wait(lambda: store.leases()[name].owner == "heir", 5)
        reassigned_s = time.monotonic() - start
        wait(lambda: (s := store.status(name)) is not None and s.worker == "heir" and s.restored, 10)
        restored = status(store, name).restored
        assert restored is not None
        assert (restored.mode, restored.blob_bytes) == ("checkpoint", len(blob))
        assert restored.blob_sha256 == sha256(blob)
        assert restored.frame_number == decode_snapshot(blob).frame_number
        known = status(store, name).processed
        wait(lambda: sees(store, name, known + 5), 20)
        assert reassigned_s <= using.engine.heartbeat_ttl_ms / 1000 + 1.0
        assert not [child for child in decoders if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        doomed.kill()
        doomed.stdin.close()
        doomed.wait()
        controller.stop()
        heir.stop()
        heir.store.close()


def test_nothing_is_left_behind(cameras, using, store):
    me = psutil.Process()
    before = {child.pid for child in me.children(recursive=True)}
    engine = Engine(using, RedisStore(using.store), "r1")
    controller = Controller(store, using.controller, "c1")
    engine.start()
    controller.start()
    serve(store, cameras)
    wait(lambda: all(sees(store, name, 3) for name in CAMERAS), 60)
    assert {child.pid for child in me.children(recursive=True)} > before  # decoders
    controller.stop()
    engine.stop()
    engine.store.close()
    wait(lambda: {child.pid for child in me.children(recursive=True)} <= before, 5)
    assert store.replicas() == []


def _balanced(now: StreamStatus) -> bool:
    return now.state == "STOPPED" and now.received == now.processed + sum(now.dropped.values()) > 0
