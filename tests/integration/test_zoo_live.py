"""Rows of the zoo on live cameras: both-way and non-local ones in window mode, the online gestures frame by frame."""

import statistics
import time
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.simulator import start_simulator
from services.engine import Engine
from services.manager import served_models
from services.schemas import Lease, SourceSpec, StreamModel, StreamSpec
from services.settings import EngineSettings, ModelSettings, ModelsSettings, Settings, StoreSettings
from services.store import MemoryStore
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
    """Hears what goes into a served model's step and what comes out, and what it costs."""

    def __init__(self, served) -> None:
        self.calls: list[tuple[torch.Tensor, float, list[float]]] = []
        self.costs_ms: list[float] = []
        step = served.step

        def heard(pixels, slots, times_s):
            began_s = time.thread_time()
            rows = step(pixels, slots, times_s)
            if rows[0][0] == rows[0][0]:
                self.costs_ms.append(1000 * (time.thread_time() - began_s))
            self.calls.append((pixels.clone(), times_s[0], rows[0]))
            return rows

        served.step = heard

    @property
    def results(self) -> int:
        return sum(row[0] == row[0] for _, _, row in self.calls)


@contextmanager
def camera_on(models_dir: Path, name: str, options: StreamModel):
    """An engine that serves one model, and a simulated camera on it: (engine, ear, store)."""
    store = MemoryStore(StoreSettings())
    engine = Engine(settings_of(models_dir, name), store, "r1")
    with start_simulator({"cam": "scene:3"}) as simulator:
        engine.start()
        ear = Ear(engine.served[name])
        try:
            spec = StreamSpec(id="cam", source=SourceSpec(uri=simulator.urls[0]), models=(options,))
            store.put_stream(spec, create=True)
            assert isinstance(store.assign("cam", "r1"), Lease)
            until = time.monotonic() + 60
            while ear.results < RESULTS + 1:
                assert time.monotonic() < until, store.status("cam")
                engine.healthy()
                time.sleep(0.05)
            yield engine, ear, store
        finally:
            engine.stop()


def windows(calls, frames: int, window_s: float):
    """For each result, the clip that its window should hold: told from the times alone, by hand."""
    entered: list[torch.Tensor] = []
    due_s = None
    for pixels, time_s, row in calls:
        interval_s = window_s / frames
        if due_s is None or time_s > due_s + interval_s:
            entered.append(pixels)
            due_s = time_s + interval_s
        elif time_s >= due_s - 1e-6:
            entered.append(pixels)
            due_s += interval_s
        if row[0] == row[0]:
            held = entered[-frames:]
            yield torch.cat([held[0]] * (frames - len(held)) + held)[None], torch.tensor(row)


@pytest.mark.parametrize("name", [BI, NON_LOCAL])
def test_a_row_that_reads_the_future_sees_windows(models_dir, name):
    options = StreamModel(name=name, window_s=WINDOW_S, stride_s=STRIDE_S)
    with camera_on(models_dir, name, options) as (engine, ear, _):
        engine.sessions["cam"].stop_source(2.0)
        calls, session = list(ear.calls), engine.sessions["cam"]
        told = session.status().models[0]
        model = engine.served[name].model
    due = [time_s for _, time_s, row in calls if row[0] == row[0]]
    assert all(later - earlier >= STRIDE_S * 0.8 for earlier, later in pairwise(due)), due
    compared = 0
    for clip, row in windows(calls, 8, WINDOW_S):
        with torch.no_grad():
            wanted = model(clip)[0]
        assert (row - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        compared += 1
    assert compared >= RESULTS
    assert len({tuple(row[:5]) for _, _, row in calls if row[0] == row[0]}) == compared  # no two results alike

    (stated,) = served_models(settings_of(models_dir, name))
    assert (told.mode, told.frames_per_result, told.window_s, told.stride_s) == ("window", 8, WINDOW_S, STRIDE_S)
    assert (stated.mode, stated.frames_per_result, stated.window_s, stated.stride_s) == ("window", 8, 8.0, 2.0)
    assert told.results == compared
    # what is stated is what one result takes here ...
    assert told.result_cost_ms == pytest.approx(statistics.median(ear.costs_ms), rel=0.2)
    # ... and what it computes
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    assert stated.gmac_per_result == pytest.approx(counter.get_total_flops() / 2e9, rel=0.2)


def test_the_online_gestures_have_a_result_for_every_frame(models_dir):
    with camera_on(models_dir, ONLINE, StreamModel(name=ONLINE)) as (engine, ear, store):
        engine.sessions["cam"].stop_source(2.0)
        calls = list(ear.calls)
        told = engine.sessions["cam"].status().models[0]
        model = engine.served[ONLINE].model
    clip = torch.cat([pixels for pixels, _, _ in calls])[None]
    with torch.no_grad():
        wanted = model.forward_frames(clip)[0]
    assert (torch.tensor([row for _, _, row in calls]) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (told.mode, told.frames_per_result, told.stride_s, told.results) == ("step", 1, None, len(calls))
    assert told.result_cost_ms == pytest.approx(statistics.median(ear.costs_ms[-32:]), rel=0.2)
    (stated,) = served_models(settings_of(models_dir, ONLINE))
    assert (stated.smoother, stated.gmac_per_result) == ("gesture", pytest.approx(0.3, rel=0.01))
    scores = store.scores("cam")
    assert {score["label"] for score in scores} <= set(model.labels)
    assert all(score["label"] not in ("Doing other things", "Pulling Hand In") for score in scores)
