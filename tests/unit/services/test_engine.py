import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from pipelines.sources import SourceState
from services.engine import Engine, EngineUnhealthy, StepLock
from services.schemas import Lease
from services.settings import ModelSettings
from services.store import MemoryStore, StoreDown
from services.stream_models import StreamModel
from tests.unit.services.engine_kit import (
    MODEL,
    Cameras,
    give,
    picture,
    processed,
    running,
    settings,
    small_model,
    spec,
    wait,
)
from tsm_core.arena import Arena, Slot
from tsm_core.model import TSM, WindowTSM, build
from tsm_core.recipes import MOTION9


class Wrapped(torch.nn.Module):
    """The small model with something put before its step; keeps the logits of every row by slot."""

    mode = "step"

    def __init__(self, before=lambda frames, slots: None) -> None:
        super().__init__()
        self.model: TSM = small_model()
        self.recipe = self.model.recipe
        self.labels, self.input_px = self.model.labels, self.model.input_px
        self.memory_frames = self.model.memory_frames
        self.preprocess, self.new_arena, self.warmup = self.model.preprocess, self.model.new_arena, self.model.warmup
        self.before = before
        self.rows: list[tuple[Slot, list[float]]] = []
        self.batches: list[int] = []

    def step(self, frames: torch.Tensor, arena: Arena, slots: Sequence[Slot], times_s: Sequence[float]) -> torch.Tensor:
        self.before(frames, slots)
        logits = self.model.step(frames, arena, slots)
        self.batches.append(len(slots))
        self.rows += zip(slots, logits.tolist(), strict=True)
        return logits


def feed_one(engine, cameras: Cameras, stream_id: str) -> int:
    """Feed the stream's next picture and wait for its result; the frame's number."""
    source = cameras[stream_id]
    before = processed(engine, stream_id)
    number = source.feed(picture(stream_id, source.number)).number
    wait(lambda: processed(engine, stream_id) == before + 1)
    return number


def books(engine, stream_id: str) -> None:
    received, done, dropped, waiting = engine.sessions[stream_id].queue.counts()
    assert received == done + sum(dropped.values()) + waiting


def test_frames_become_scores_and_status():
    store = MemoryStore()
    with running(store) as (engine, cameras):
        give(store, engine, spec("door"))
        cameras["door"].tell(SourceState("RUNNING", source_size=(64, 48)))
        for _ in range(12):
            feed_one(engine, cameras, "door")
        wait(lambda: len(store.scores("door")) == 12)
        wait(lambda: (s := store.status("door")) is not None and s.processed == 12 and s.latency_ms is not None)
        scores = store.scores("door")
        assert [score["frame_number"] for score in scores] == list(range(12))
        total = small_model().memory_frames
        assert [score["warmup"] for score in scores[: total + 1]] == [*(f"{k}/{total}" for k in range(total)), None]
        status = store.status("door")
        assert status is not None
        assert (status.state, status.worker, status.received, status.dropped) == ("RUNNING", "r1", 12, {})
        assert status.restored is not None
        assert status.restored.mode == "cold"
        assert status.source_size == (64, 48)
        states = [e["data"]["after"] for e in store.events("door") if e["type"].endswith("stream.state")]
        assert states == ["STARTING", "RUNNING"]
        engine.healthy()


def test_streams_share_batches_and_do_not_touch_each_other():
    alone: dict[str, list[list[float]]] = {}
    for name in ("a", "b", "c"):
        model, arena = small_model(), small_model().new_arena(1)
        slot = arena.allocate()
        alone[name] = [model.step(model.preprocess([picture(name, n)]), arena, [slot])[0].tolist() for n in range(10)]
    model, store = Wrapped(), MemoryStore()
    with running(store, model=model, using=settings(max_wait_ms=200.0)) as (engine, cameras):
        give(store, engine, *(spec(name) for name in alone))
        slots = {engine.sessions[name].analytics[MODEL].slot: name for name in alone}
        model.batches.clear()
        for n in range(10):
            for name in alone:
                cameras[name].feed(picture(name, n))
            wait(lambda n=n: all(processed(engine, name) == n + 1 for name in alone))
    together: dict[str, list[list[float]]] = {name: [] for name in alone}
    for slot, row in model.rows:
        if slot in slots:
            together[slots[slot]].append(row)
    for name, rows in alone.items():
        assert torch.allclose(torch.tensor(together[name]), torch.tensor(rows), atol=1e-4)
    assert model.batches == [3] * 10


def test_a_drained_stream_goes_on_elsewhere_as_if_it_had_never_moved():
    store, first, second, still = MemoryStore(), Wrapped(), Wrapped(), Wrapped()
    with (
        running(store, "r1", first) as (one, cameras),
        running(store, "r2", second) as (two, others),
        running(MemoryStore(), "r3", still) as (three, unmoved),
    ):
        give(store, one, spec("door"))
        give(three.store, three, spec("door"))
        for _ in range(15):
            assert feed_one(one, cameras, "door") == feed_one(three, unmoved, "door")
        one.drain()
        assert cameras["door"].stopped
        assert "r1" not in [replica.id for replica in store.replicas()]
        blob = store.load("door")
        assert blob is not None
        give(store, two, spec("door"))
        restored = two.sessions["door"].restored
        assert (restored.mode, restored.frame_number, restored.blob_bytes) == ("checkpoint", 14, len(blob))
        assert others["door"].number == 15
        for _ in range(5):
            assert feed_one(two, others, "door") == feed_one(three, unmoved, "door")
        for (_, moved), (_, stayed) in zip(second.rows[-5:], still.rows[-5:], strict=True):
            scale = max(map(abs, stayed))
            assert max(abs(a - b) for a, b in zip(moved, stayed, strict=True)) <= 2e-3 * scale  # fp16 state
        wait(lambda: (s := store.status("door")) is not None and s.processed == 20)
        scores = store.scores("door")
        assert [score["frame_number"] for score in scores] == list(range(20))
        assert scores[15]["warmup"] is None  # warm from the first frame on


def test_an_open_action_goes_on_over_a_move():
    store = MemoryStore()
    eager = spec("door", models=(StreamModel(name=MODEL, threshold=0.01, off_threshold=0.0),))
    with running(store, "r1") as (one, cameras), running(store, "r2") as (two, others):
        give(store, one, eager)
        source, at_s = cameras["door"], time.time()

        def actions() -> list[tuple[str, str]]:
            kind = "tsm.v1.action."
            return [
                (e["type"].removeprefix(kind), e["subject"]) for e in store.events("door") if e["type"].startswith(kind)
            ]

        for n in range(40):
            source.feed(picture("door", 0), at_s - 4 + n / 15)
            wait(lambda n=n: processed(one, "door") == n + 1)
        wait(actions)
        one.drain()  # publishes the rest
        told = actions()
        action = [subject for kind, subject in told if kind == "new"][-1]
        assert ("end", action) not in told
        give(store, two, eager)
        for n in range(20):
            others["door"].feed(picture("door", 0), at_s - 1 + n / 15)
            wait(lambda n=n: processed(two, "door") == 41 + n)
        store.put_stream(eager.model_copy(update={"enabled": False, "revision": 2}), create=False)
        store.unassign("door")
        wait(lambda: (s := store.status("door")) is not None and s.state == "STOPPED")
        after = actions()[len(told) :]
        assert after[-1] == ("end", action)
        assert set(after[:-1]) <= {("update", action)}
        assert [e["sequence"] for e in store.events("door")] == list(range(1, len(store.events("door")) + 1))


def test_window_mode_gives_a_result_every_stride_and_moves_with_its_ring():
    network = build(replace(MOTION9, shift="bi", frames=4)).eval()
    wide = spec("door", models=(StreamModel(name=MODEL, window_s=0.4, stride_s=0.2),))
    store, at_s = MemoryStore(), time.time() - 5
    with (
        running(store, "r1", WindowTSM(network).eval()) as (one, cameras),
        running(store, "r2", WindowTSM(network).eval()) as (two, others),
    ):
        give(store, one, wide)
        for n in range(20):
            cameras["door"].feed(picture("door", n), at_s + n / 10)
            wait(lambda n=n: processed(one, "door") == n + 1)
            wait(
                lambda n=n: len(store.scores("door")) == n // 2 + 1
            )  # a clip takes its time, frames do not wait for it
        assert [score["frame_number"] for score in store.scores("door")] == list(range(0, 20, 2))
        assert [score["warmup"] for score in store.scores("door")[:3]] == ["1/4", "3/4", None]
        one.drain()
        give(store, two, wide)
        assert two.sessions["door"].restored.mode == "checkpoint"
        others["door"].feed(picture("door", 20), at_s + 2.0)
        wait(lambda: len(store.scores("door")) == 11)
        assert store.scores("door")[-1]["warmup"] is None


def test_a_long_clip_holds_up_no_other_stream():
    """While a clip computes, frames of a stepped stream go through; when it is over, the newest due clip follows."""
    torch.manual_seed(0)
    wide = WindowTSM(build(replace(MOTION9, name="wide", shift="bi", frames=4)).eval()).eval()
    gate, entered = threading.Event(), threading.Event()
    forward = wide.model.forward

    def slow(clip):
        entered.set()
        assert gate.wait(20)
        return forward(clip)

    store = MemoryStore()
    models = {MODEL: small_model(), "wide": wide}
    config = settings(models=(ModelSettings(name=MODEL), ModelSettings(name="wide")))
    cameras = Cameras()
    engine = Engine(config, store, "r1", models, open_source=cameras.open)
    gate.set()  # for the warm-up
    engine.start()
    try:
        wide.model.forward = slow
        gate.clear()
        give(store, engine, spec("steps", models=(StreamModel(name=MODEL),)))
        give(store, engine, spec("sees", models=(StreamModel(name="wide", window_s=0.4, stride_s=0.1),)))
        at_s = time.time() - 5
        cameras["sees"].feed(picture("sees", 0), at_s)
        assert entered.wait(10)
        for n in range(1, 6):  # due, every one of them
            cameras["sees"].feed(picture("sees", n), at_s + n / 10)
            wait(lambda n=n: processed(engine, "sees") == n + 1)
        for n in range(10):
            cameras["steps"].feed(picture("steps", n), at_s + n / 10)
            wait(lambda n=n: processed(engine, "steps") == n + 1)
        wait(lambda: len(store.scores("steps")) == 10)
        assert store.scores("sees") == []
        assert engine.sessions["sees"].in_flight == 2  # one at work, one that waits
        gate.set()
        wait(lambda: len(store.scores("sees")) == 2)
        assert [score["frame_number"] for score in store.scores("sees")] == [0, 5]  # the newest, not the oldest
        told = engine.sessions["sees"].status().models[0]
        assert (told.results, told.skipped, engine.sessions["sees"].in_flight) == (2, 4, 0)
    finally:
        gate.set()
        engine.stop()


def test_a_clip_that_throws_fails_its_own_stream_alone():
    wide = WindowTSM(build(replace(MOTION9, shift="bi", frames=4)).eval()).eval()
    forward = wide.model.forward

    def picky(clip):
        if clip.mean() > 1.0:
            raise ValueError("too bright")
        return forward(clip)

    store = MemoryStore()
    with running(store, "r1", wide) as (engine, cameras):
        wide.model.forward = picky
        for stream_id in ("fine", "bright"):
            give(store, engine, spec(stream_id, models=(StreamModel(name=MODEL, window_s=0.4, stride_s=0.1),)))
        at_s = time.time() - 5
        cameras["bright"].feed(torch.full((3, 48, 64), 255, dtype=torch.uint8), at_s)
        wait(lambda: engine.sessions["bright"].failed)
        cameras["fine"].feed(picture("fine", 0), at_s)
        wait(lambda: len(store.scores("fine")) == 1)
        assert "too bright" in engine.sessions["bright"].status().status_message
        assert not engine.sessions["fine"].failed
        engine.healthy()


def test_a_second_epoch_makes_the_first_owner_stop():
    store = MemoryStore()
    with running(store, "r1") as (one, cameras), running(store, "r2") as (two, _):
        give(store, one, spec("door"))
        feed_one(one, cameras, "door")
        first = cameras["door"]
        give(store, two, spec("door"))
        wait(lambda: "door" not in one.sessions)
        wait(lambda: first.stopped)
        first.feed(picture("door", 99))  # a late frame harms nobody
        wait(lambda: (s := store.status("door")) is not None and s.worker == "r2")
        time.sleep(0.1)
        assert store.status("door").worker == "r2"  # type: ignore[union-attr]
        assert one.served[MODEL].arena.used == 0


def test_a_changed_specification_keeps_state_and_numbers():
    store = MemoryStore()
    with running(store) as (engine, cameras):
        give(store, engine, spec("door"))
        for _ in range(10):
            feed_one(engine, cameras, "door")
        before = engine.sessions["door"]
        store.put_stream(spec("door", revision=2, max_fps=5.0), create=False)
        wait(lambda: engine.sessions.get("door") not in (None, before) and engine.sessions["door"].source is not None)
        assert engine.sessions["door"].restored.mode == "checkpoint"
        assert feed_one(engine, cameras, "door") == 10
        wait(lambda: engine.served[MODEL].arena.used == 1)


def test_overload_keeps_latency_bounded_and_counts_what_it_drops():
    model = Wrapped(lambda frames, slots: time.sleep(0.05))  # 20 steps a second, two streams of 100 fps
    store = MemoryStore()
    with running(store, model=model, using=settings(max_batch=1, max_frame_age_s=0.3)) as (engine, cameras):
        give(store, engine, spec("a"), spec("b"))
        images = [picture("a", n) for n in range(8)]
        for n in range(150):
            for name in ("a", "b"):
                cameras[name].feed(images[n % 8])
                books(engine, name)
            time.sleep(0.01)
        wait(lambda: not any(session.queue.waiting for session in engine.sessions.values()))
        counts = {name: engine.sessions[name].queue.counts() for name in ("a", "b")}
        for name, (received, done, dropped, waiting) in counts.items():
            books(engine, name)
            assert (received, waiting) == (150, 0)
            assert done >= 5
            assert set(dropped) <= {"queue", "age"}
            assert dropped["queue"] > 50
        assert abs(counts["a"][1] - counts["b"][1]) <= 3  # fair
        wait(lambda: all((s := store.status(n)) and s.processed == counts[n][1] and s.latency_ms for n in ("a", "b")))
        for name in ("a", "b"):
            assert store.status(name).latency_ms.p99 < 1000  # type: ignore[union-attr]  # waits for two steps, not for a queue


def test_a_fault_in_one_stream_drops_no_frame_of_another():
    guilty = torch.full((3, 48, 64), 255, dtype=torch.uint8)

    def throw(frames: torch.Tensor, slots: Sequence[Slot]) -> None:
        if (frames.amin(dim=(1, 2, 3)) > 2.0).any():
            raise ValueError("a white frame")

    store = MemoryStore()
    with running(store, model=Wrapped(throw), using=settings(max_wait_ms=20.0)) as (engine, cameras):
        give(store, engine, spec("good"), spec("bad"), spec("fine"))
        for n in range(20):
            cameras["bad"].feed(guilty if n == 5 else picture("bad", n))
            for name in ("good", "fine"):
                cameras[name].feed(picture(name, n))
            wait(lambda n=n: processed(engine, "good") == n + 1 == processed(engine, "fine"))
            if n < 5:
                wait(lambda n=n: processed(engine, "bad") == n + 1)
        wait(lambda: (s := store.status("bad")) is not None and s.dropped.get("failed"))
        status = store.status("bad")
        assert status is not None
        assert (status.state, status.error_code) == ("FAILED", "STEP_FAILED")
        assert "a white frame" in status.status_message
        assert status.processed == 5
        assert status.dropped["failed"] == 1
        wait(lambda: cameras["bad"].stopped)
        for name in ("good", "fine"):
            assert engine.sessions[name].queue.counts() == (20, 20, {}, 0)
        books(engine, "bad")
        engine.healthy()


def test_analytics_that_throw_fail_their_stream_alone():
    store = MemoryStore()
    with running(store) as (engine, cameras):
        give(store, engine, spec("good"), spec("bad"))
        engine.sessions["bad"].analytics[MODEL].smoother.labels = ("only",)
        cameras["bad"].feed(picture("bad", 0))
        for _ in range(3):
            feed_one(engine, cameras, "good")
        wait(lambda: (s := store.status("bad")) is not None and s.error_code == "ANALYTICS_FAILED")
        assert engine.sessions["good"].queue.counts() == (3, 3, {}, 0)
        engine.healthy()


def test_an_unknown_model_fails_the_stream_with_its_name():
    store = MemoryStore()
    with running(store) as (engine, _):
        store.put_stream(spec("door", models=(StreamModel(name="nope"),)), create=True)
        store.assign("door", engine.id)
        wait(lambda: (s := store.status("door")) is not None and s.error_code == "MODEL_NOT_LOADED")
        assert "nope" in store.status("door").status_message  # type: ignore[union-attr]
        assert engine.served[MODEL].arena.used <= 1
        store.delete_stream("door")
        wait(lambda: not engine.sessions)
        assert engine.served[MODEL].arena.used == 0


def test_a_file_that_is_over_ends_after_its_last_frame():
    store = MemoryStore()
    with running(store) as (engine, cameras):
        give(store, engine, spec("door", models=(StreamModel(name=MODEL, threshold=0.01, off_threshold=0.0),)))
        source = cameras["door"]
        for n in range(10):
            source.feed(picture("door", 0), n / 15)
            wait(lambda n=n: processed(engine, "door") == n + 1)
        source.tell(SourceState("ENDED", message="the file is over"))
        wait(lambda: (s := store.status("door")) is not None and s.state == "ENDED")
        kinds = [event["type"].removeprefix("tsm.v1.") for event in store.events("door")]
        assert kinds[-2:] == ["action.end", "stream.state"]
        store.unassign("door")  # what a controller does with a stream that ended
        wait(lambda: not engine.sessions)
        time.sleep(0.1)
        assert store.status("door").state == "ENDED"  # type: ignore[union-attr]


class Faulty(MemoryStore):
    """A store that can be down."""

    down = False

    def publish_many(self, publications):
        self._up()
        return super().publish_many(publications)

    def leases(self) -> dict[str, Lease]:
        self._up()
        return super().leases()

    def save(self, lease: Lease, blob: bytes) -> None:
        self._up()
        super().save(lease, blob)

    def _up(self) -> None:
        if self.down:
            raise StoreDown("the store is down")


def test_while_the_store_is_down_frames_go_on_and_no_event_is_lost():
    store = Faulty()
    with running(store, using=settings(checkpoint_interval_s=0.05)) as (engine, cameras):
        give(store, engine, spec("door"))
        cameras["door"].tell(SourceState("RUNNING"))
        feed_one(engine, cameras, "door")
        store.down = True
        cameras["door"].tell(SourceState("RESTARTING", "STREAM_STALLED", "silent"))
        cameras["door"].tell(SourceState("RUNNING"))
        for _ in range(10):
            feed_one(engine, cameras, "door")
        engine.healthy()
        time.sleep(0.1)
        store.down = False
        wait(lambda: len(store.scores("door")) == 11)
        states = [e["data"]["after"] for e in store.events("door")]
        assert states == ["STARTING", "RUNNING", "RESTARTING", "RUNNING"]
        assert engine.publisher.events_lost == 0
        wait(lambda: store.load("door"))


def test_the_byte_budget_stretches_the_interval_of_the_snapshots():
    store = MemoryStore()
    names = ("a", "b", "c")
    using = settings(checkpoint_interval_s=0.05, checkpoint_bytes_per_s=3e5)  # about ten states a second
    with running(store, using=using) as (engine, cameras):
        give(store, engine, *map(spec, names))
        start = time.monotonic()
        while time.monotonic() - start < 1.0:
            for name in names:
                feed_one(engine, cameras, name)
        saves = 0.0
        for line in engine.telemetry.text().splitlines():
            if line.startswith('state_checkpoint_total{result="saved"}'):
                saves = float(line.split()[1])
        assert 3 <= saves <= 14  # without the budget it would be 60
        assert all(store.load(name) for name in names)


def test_metrics_and_previews_reach_the_store():
    store = MemoryStore()
    with running(store) as (engine, cameras):
        give(store, engine, spec("door"))
        store.watch("door", 10)
        for _ in range(3):
            feed_one(engine, cameras, "door")
        wait(lambda: (p := store.preview("door")) is not None and p[0] == 2)
        number, jpeg = store.preview("door")  # type: ignore[misc]
        assert number == 2
        assert jpeg[:2] == b"\xff\xd8"
        wait(lambda: 'stream_frame_counter_total{stream="door"} 3.0' in store.metrics().get("r1", ""))
        store.unassign("door")
        wait(lambda: not engine.sessions)
        wait(lambda: 'stream="door"' not in engine.telemetry.text())


def test_stop_leaves_no_thread_and_says_goodbye():
    store = MemoryStore()
    before = set(threading.enumerate())
    with running(store) as (engine, cameras):
        give(store, engine, spec("door"))
        feed_one(engine, cameras, "door")
        start = time.monotonic()
        engine.drain()
        assert time.monotonic() - start < 1.0
    assert store.replicas() == []
    assert store.leases() == {}
    wait(lambda: set(threading.enumerate()) <= before)
    assert engine.served[MODEL].arena.used == 0


def test_a_stuck_loop_is_unhealthy(monkeypatch):
    monkeypatch.setattr("services.engine.STUCK_S", 0.2)
    let_go = threading.Event()
    store, model = MemoryStore(), Wrapped()
    with running(store, model=model) as (engine, cameras):
        give(store, engine, spec("a"), spec("b"))
        time.sleep(0.3)
        engine.healthy()  # idle is no fault
        model.before = lambda frames, slots: let_go.wait(10) and None
        cameras["a"].feed(picture("a", 0))
        wait(lambda: engine.sessions["a"].queue.queued == 0)
        cameras["b"].feed(picture("b", 0))
        time.sleep(0.4)
        with pytest.raises(EngineUnhealthy, match="no progress"):
            engine.healthy()
        let_go.set()
        wait(lambda: processed(engine, "b") == 1)
        engine.healthy()


def test_a_model_that_fails_every_stream_is_the_engines_fault(caplog):
    def broken(frames: torch.Tensor, slots: Sequence[Slot]) -> None:
        raise RuntimeError("device lost")

    store, model = MemoryStore(), Wrapped()
    with running(store, model=model, using=settings(max_wait_ms=500.0)) as (engine, cameras):
        give(store, engine, spec("a"), spec("b"))
        model.before = broken
        for name in ("a", "b"):
            cameras[name].feed(picture(name, 0))
        wait(lambda: engine._died)
        with pytest.raises(EngineUnhealthy, match="device lost"):
            engine.healthy()


def test_the_step_lock_lets_others_go_first():
    lock, order = StepLock(), []

    def guest() -> None:
        with lock.between():
            order.append("guest")

    with lock.step():
        thread = threading.Thread(target=guest)
        thread.start()
        wait(lambda: lock._guests == 1)
        order.append("step")
    with lock.step():
        order.append("step")
    thread.join()
    assert order == ["step", "guest", "step"]
