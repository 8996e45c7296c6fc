"""Rows of the zoo on live cameras: both-way and non-local ones in window mode, the online gestures frame by frame."""

import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.simulator import start_simulator
from services.engine import Engine
from services.manager import served_models
from services.schemas import Lease, SourceSpec, StreamSpec
from services.settings import EngineSettings, ModelSettings, ModelsSettings, Settings, StoreSettings
from services.store import MemoryStore
from services.stream_models import StreamModel
from tsm_core.checkpoints import save_model
from tsm_core.model import build
from tsm_core.recipes import find_recipe

BI = "tsm_r50_1x1x8_50e_kinetics400_rgb__ss256"
NON_LOCAL = "tsm_nl_embedded_gaussian_r50_1x1x8_50e_kinetics400_rgb"
ONLINE = "mobilenetv2_jester_online"
WINDOW_S, STRIDE_S = 2.0, 1.5
RESULTS = 3  # of each model


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three rows with random weights, lively enough to tell one clip from another."""
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate((BI, NON_LOCAL, ONLINE)):
        torch.manual_seed(number)
        model = build(find_recipe(name))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
                torch.nn.init.ones_(module.weight)
        save_model(folder / f"{name}.safetensors", model)
    return folder


def settings_of(models_dir: Path, *names: str) -> Settings:
    models = tuple(ModelSettings(name=name) for name in names)
    engine = EngineSettings(models=models, slots=2, max_frame_age_s=10.0)
    return Settings(engine=engine, models=ModelsSettings(dir=models_dir))


class Ear:
    """Hears what a served model is given and what it says: frames with their times, rows of results, what they cost."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.frames: list[torch.Tensor] = []
        self.times_s: list[float] = []
        self.due: list[int] = []  # for each clip that went its way, how many frames had come
        self.rows: list[list[float]] = []
        self.costs_ms: list[float] = []
        served = engine.served[name]
        self._step, self._infer = served.step, served.infer
        served.step, served.infer = self.step, self.infer
        if served.model.mode == "window":
            lane, arena = engine._lanes[name], served.arena
            self._plan, self._put, self._submit = arena.plan, arena.put, lane.submit
            arena.plan, arena.put, lane.submit = self.plan, self.put, self.submit

    def timed(self, work, *arguments):
        began_s = time.thread_time()
        rows = work(*arguments)
        self.costs_ms.append(1000 * (time.thread_time() - began_s))
        self.rows.append(rows[0])
        return rows

    def step(self, pixels, slots, times_s):
        self.frames.append(pixels.clone())
        return self.timed(self._step, pixels, slots, times_s)

    def infer(self, clips):
        return self.timed(self._infer, clips)

    def plan(self, slots, times_s):
        self.times_s.append(times_s[0])
        return self._plan(slots, times_s)

    def put(self, slots, pixels):
        self.frames.append(pixels.clone())
        self._put(slots, pixels)

    def submit(self, clip):
        self.due.append(len(self.frames))
        self._submit(clip)


@contextmanager
def camera_on(models_dir: Path, name: str, options: StreamModel):
    """An engine that serves one model, and a simulated camera on it: (engine, ear, store)."""
    store = MemoryStore(StoreSettings())
    engine = Engine(settings_of(models_dir, name), store, "r1")
    with start_simulator({"cam": "scene:3"}) as simulator:
        engine.start()
        ear = Ear(engine, name)
        try:
            spec = StreamSpec(id="cam", source=SourceSpec(uri=simulator.urls[0]), models=(options,))
            store.put_stream(spec, create=True)
            assert isinstance(store.assign("cam", "r1"), Lease)
            until = time.monotonic() + 60
            while len(ear.rows) < RESULTS + 1:
                assert time.monotonic() < until, store.status("cam")
                engine.healthy()
                time.sleep(0.05)
            yield engine, ear, store
        finally:
            engine.stop()


@pytest.mark.parametrize("name", [BI, NON_LOCAL])
def test_a_row_that_reads_the_future_sees_windows(models_dir, name):
    options = StreamModel(name=name, window_s=WINDOW_S, stride_s=STRIDE_S)
    with camera_on(models_dir, name, options) as (engine, ear, _):
        session = engine.sessions["cam"]
        session.stop_source(2.0)
        while session.in_flight:
            time.sleep(0.01)
        told = session.status().models[0]
        model, gmac = engine.served[name].model, engine.served[name].gmac_per_result
    # frames enter a window's eighth apart, whatever the camera's rate
    assert len(ear.frames) <= (ear.times_s[-1] - ear.times_s[0]) / (WINDOW_S / 8) + 2
    assert len(ear.times_s) > 2 * len(ear.frames)
    assert len(ear.rows) == len(ear.due) - told.skipped == told.results
    # each result is that of an offline forward over the last eight of them; the first repeats its oldest in front
    compared = 0
    for seen, row in zip(ear.due, ear.rows, strict=False):
        held = ear.frames[:seen][-8:]
        clip = torch.cat([held[0]] * (8 - len(held)) + held)[None]
        with torch.no_grad():
            wanted = model(clip)[0]
        assert (torch.tensor(row) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        compared += 1
        if told.skipped:
            break  # which one was left out is not known here
    assert compared >= RESULTS or told.skipped
    assert len({tuple(row[:5]) for row in ear.rows}) == len(ear.rows)  # no two alike

    (stated,) = served_models(settings_of(models_dir, name))
    assert (told.mode, told.frames_per_result, told.window_s, told.stride_s) == ("window", 8, WINDOW_S, STRIDE_S)
    assert (stated.mode, stated.frames_per_result, stated.window_s, stated.stride_s) == ("window", 8, 8.0, 2.0)
    # what is stated is what one result takes here ...
    assert told.result_cost_ms == pytest.approx(statistics.median(ear.costs_ms), rel=0.2)
    # ... and what it computes
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    assert gmac == pytest.approx(counter.get_total_flops() / 2e9, rel=0.2)


def test_the_online_gestures_have_a_result_for_every_frame(models_dir):
    with camera_on(models_dir, ONLINE, StreamModel(name=ONLINE)) as (engine, ear, store):
        engine.sessions["cam"].stop_source(2.0)
        time.sleep(0.5)
        told = engine.sessions["cam"].status().models[0]
        model, gmac = engine.served[ONLINE].model, engine.served[ONLINE].gmac_per_result
    clip = torch.cat(ear.frames)[None]
    with torch.no_grad():
        wanted = model.forward_frames(clip)[0]
    assert (torch.tensor(ear.rows) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (told.mode, told.frames_per_result, told.stride_s, told.results) == ("step", 1, None, len(ear.rows))
    assert told.result_cost_ms == pytest.approx(statistics.median(ear.costs_ms[-32:]), rel=0.2)
    (stated,) = served_models(settings_of(models_dir, ONLINE))
    assert (stated.smoother, gmac) == ("gesture", pytest.approx(0.3, rel=0.01))
    scores = store.scores("cam")
    assert {score["label"] for score in scores} <= set(model.labels)
    assert all(score["label"] not in ("Doing other things", "Pulling Hand In") for score in scores)
