"""Two engines, a controller, a real Valkey, real ffmpeg and RTSP cameras: streams that move and stay whole."""

from __future__ import annotations

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
            max_frame_age_s=3.0,  # a busy test machine is no reason to drop
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
    assert set(owners.values()) == {"r1", "r2"}
    leaving, staying = engines["r1"], engines["r2"]
    moved = next(name for name, owner in owners.items() if owner == "r1")

    start = time.monotonic()
    leaving.drain()
    assert time.monotonic() - start <= 1.0
    blob = store.load(moved)
    assert blob is not None
    last = decode_snapshot(blob)
    assert last.epoch == status(store, moved).epoch

    wait(lambda: moved in staying.sessions and status(store, moved).worker == "r2", 5)
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
    wait(lambda: all(sees(store, name, 20) for name in CAMERAS), 60)
    for name in CAMERAS:
        spec = store.get_stream(name)
        store.put_stream(spec.model_copy(update={"enabled": False, "revision": 2}), create=False)
    wait(lambda: all(_balanced(status(store, name)) for name in CAMERAS), 10)
    for name in CAMERAS:
        received = status(store, name).received
        sent = len(SimulatorClient(f"rtsp://127.0.0.1:{cameras.port}/{name}").log())
        assert 0 <= sent - received <= 8  # on the wire or in the decoder when the connection was cut


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
    wait(lambda: {child.pid for child in me.children(recursive=True)} <= before, 5)
    assert store.replicas() == []


def _balanced(now: StreamStatus) -> bool:
    return now.state == "STOPPED" and now.received == now.processed + sum(now.dropped.values()) > 0
