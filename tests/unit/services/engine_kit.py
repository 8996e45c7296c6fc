"""What the engine's tests share: a small model with random weights, and a source that a test feeds by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch

from pipelines.sources import SourceConfig, SourceCounters, SourceState
from services.engine import Engine
from services.schemas import Lease, SourceSpec, StreamSpec
from services.served import Model
from services.settings import EngineSettings, ModelSettings, Settings
from services.store import StateStore
from tsm_core.frame import Frame
from tsm_core.model import TSM, WindowTSM, build
from tsm_core.recipes import MOTION9

MODEL = "motion9"
torch.set_num_threads(1)  # as an engine does; more threads than cores wait for each other


@lru_cache
def small_model(seed: int = 0) -> TSM:
    """The demo's network with random weights and lively logits."""
    torch.manual_seed(seed)
    model = build(replace(MOTION9, smoothing_s=0.1, min_action_s=0.1, threshold=0.2, off_threshold=0.1))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def settings(**engine: object) -> Settings:
    """Settings of a quick engine."""
    values: dict[str, object] = {"slots": 8, "reconcile_s": 0.02, "max_wait_ms": 1.0, **engine}
    values.setdefault("models", (ModelSettings(name=MODEL),))
    return Settings(engine=EngineSettings(**values))  # type: ignore[arg-type]


def spec(stream_id: str, **more: object) -> StreamSpec:
    """A camera that a HandSource stands for."""
    return StreamSpec(id=stream_id, source=SourceSpec(uri=f"rtsp://127.0.0.1/{stream_id}"), **more)  # type: ignore[arg-type]


def picture(stream_id: str, number: int) -> torch.Tensor:
    """uint8 (3, 48, 64), a pure function of stream and number."""
    seed = sum(map(ord, stream_id)) * 100_003 + number
    return torch.randint(0, 256, (3, 48, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class HandSource:
    """A source whose frames a test feeds by hand."""

    def __init__(
        self,
        config: SourceConfig,
        on_frame: Callable[[Frame], None],
        on_state: Callable[[SourceState], None],
        first_number: int = 0,
    ) -> None:
        self.config = config
        self.counters = SourceCounters()
        self.number = first_number
        self.stopped = False
        self._on_frame, self._on_state = on_frame, on_state

    def start(self) -> None:
        self.tell(SourceState("STARTING"))

    def stop(self, timeout_s: float = 3.0) -> bool:
        self.stopped = True
        return True

    def tell(self, state: SourceState) -> None:
        self._on_state(state)

    def feed(self, image: torch.Tensor, time_s: float | None = None, source_size: tuple[int, int] = (64, 48)) -> Frame:
        at_s = time.time() if time_s is None else time_s
        frame = Frame(self.config.stream_id, self.number, image, at_s, at_s, source_size)
        self.number += 1
        self.counters.received += 1
        self._on_frame(frame)
        return frame


class Cameras:
    """Opens HandSources and keeps them by stream id; the newest of a stream wins."""

    def __init__(self) -> None:
        self.sources: dict[str, HandSource] = {}

    def open(
        self,
        config: SourceConfig,
        on_frame: Callable[[Frame], None],
        on_state: Callable[[SourceState], None],
        first_number: int = 0,
    ) -> HandSource:
        source = self.sources[config.stream_id] = HandSource(config, on_frame, on_state, first_number)
        return source

    def __getitem__(self, stream_id: str) -> HandSource:
        return self.sources[stream_id]


@contextmanager
def running(
    store: StateStore,
    name: str = "r1",
    model: TSM | WindowTSM | None = None,
    using: Settings | None = None,
    more: Mapping[str, Model] | None = None,
) -> Iterator[tuple[Engine, Cameras]]:
    """An engine at work, stopped at the end."""
    cameras = Cameras()
    models = {MODEL: model or small_model(), **(more or {})}
    using = using or settings()
    named = using.engine.model_copy(update={"models": tuple(ModelSettings(name=each) for each in models)})
    using = using.model_copy(update={"engine": named})
    engine = Engine(using, store, name, models, open_source=cameras.open)
    engine.start()
    try:
        yield engine, cameras
    finally:
        engine.stop()


def give(store: StateStore, engine: Engine, *specs: StreamSpec) -> None:
    """Register streams where needed, assign them to the engine and wait for their sessions."""
    known = {each.id for each in store.list_streams()}
    for each in specs:
        if each.id not in known:
            store.put_stream(each, create=True)
        lease = store.assign(each.id, engine.id)
        wait(lambda e=each, x=lease: _serves(engine, e.id, x))


def _serves(engine: Engine, stream_id: str, lease: Lease) -> bool:
    session = engine.sessions.get(stream_id)
    return session is not None and session.lease == lease and session.source is not None


def wait(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Until the condition holds; fails the test when it does not in time."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.002)


def processed(engine: Engine, stream_id: str) -> int:
    """Frames of the stream that went through the models here and before."""
    session = engine.sessions.get(stream_id)
    return session.queue.processed if session else -1
