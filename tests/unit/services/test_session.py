import time
from dataclasses import replace

import pytest
import torch

from pipelines.sources import SourceState
from services.schemas import Lease, StreamStatus
from services.served import ServedRecogniser
from services.session import Session
from services.snapshots import SnapshotError, decode_snapshot, encode_snapshot, sha256
from services.stream_models import StreamModel
from tests.unit.services.engine_kit import MODEL, HandSource, picture, settings, small_model, spec
from tsm_core.arena import ArenaFull
from tsm_core.frame import Frame

LEASE = Lease(stream_id="door", owner="r1", epoch=3)


@pytest.fixture
def served() -> dict[str, ServedRecogniser]:
    return {MODEL: ServedRecogniser(MODEL, small_model(), slots=4)}


def session_of(served, told=None, **more) -> Session:
    told = [] if told is None else told
    return Session(
        spec("door", **more),
        LEASE,
        served,
        settings(),
        on_ready=lambda queue: None,
        on_change=lambda session, event: told.append(event),
    )


def frame(number: int, time_s: float) -> Frame:
    return Frame("door", number, picture("door", number), time_s, time_s, (64, 48))


def step(served, session: Session, one: Frame) -> list[float]:
    """One frame down the road, without an engine."""
    session.on_frame(one)
    waiting = session.queue.take()
    assert waiting is not None
    (view,) = session.follow(MODEL, one).views
    model = served[MODEL]
    (row,) = model.step(model.preprocess([view.image]), [view.slot], [one.time_s])
    session.update(MODEL, view, row, one)
    session.done(waiting)
    return row


def test_a_moved_stream_goes_on_as_if_it_had_not_moved(served):
    now_s = time.time()
    stayed, moving = session_of(served), session_of(served)
    for n in range(12):
        step(served, stayed, frame(n, now_s + n / 15))
        step(served, moving, frame(n, now_s + n / 15))
    snapshot = moving.export()
    assert snapshot is not None
    blob = encode_snapshot(snapshot)
    moving.free()

    moved = session_of(served)
    moved.resume(blob, None, now_s + 1)
    assert moved.restored.mode == "checkpoint"
    assert (moved.restored.frame_number, moved.restored.blob_bytes) == (11, len(blob))
    assert moved.restored.blob_sha256 == sha256(blob)
    assert moved.first_number == 12
    assert moved.queue.counts()[:2] == (12, 12)
    for n in range(12, 20):
        there = step(served, stayed, frame(n, now_s + n / 15))
        here = step(served, moved, frame(n, now_s + n / 15))
        # the state travels as float16: 2^-11 relative; from L frames on not even that is left
        scale = max(map(abs, there))
        assert max(abs(a - b) for a, b in zip(here, there, strict=True)) <= 2e-3 * scale


def test_a_snapshot_survives_the_wire(served):
    session = session_of(served)
    step(served, session, frame(0, 100.0))
    before = session.export()
    assert before is not None
    after = decode_snapshot(encode_snapshot(before))
    assert replace(after, models=()) == replace(before, models=())
    assert torch.equal(after.models[0].state, before.models[0].state)
    assert after.models[0].memory == before.models[0].memory
    assert after.models[0].memory.keys() == {"smoother", "actions"}
    assert after.models[0].steps == 1


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:40], lambda b: b[:-1], lambda b: b"XXXX" + b[4:]])
def test_a_damaged_snapshot_is_refused_and_the_stream_starts_cold(served, damage):
    session = session_of(served)
    step(served, session, frame(0, time.time()))
    blob = damage(encode_snapshot(session.export()))  # type: ignore[arg-type]
    with pytest.raises(SnapshotError):
        decode_snapshot(blob)
    other = session_of(served)
    other.resume(blob, None)
    assert other.restored.mode == "cold"
    assert served[MODEL].warmup(other.analytics[MODEL].slot)[0] == 0


def test_a_state_of_other_weights_is_refused(served):
    session = session_of(served)
    step(served, session, frame(0, time.time()))
    blob = encode_snapshot(session.export())  # type: ignore[arg-type]
    other = session_of({MODEL: ServedRecogniser(MODEL, small_model(seed=1), slots=4)})
    other.resume(blob, None)
    assert other.restored.mode == "cold"
    assert "replica serves" in other.status().status_message
    assert other.first_number == 1  # the numbers go on all the same


def test_a_state_too_old_is_not_used(served):
    session = session_of(served)
    step(served, session, frame(0, 1000.0))
    blob = encode_snapshot(session.export())  # type: ignore[arg-type]
    late, early = session_of(served), session_of(served)
    late.resume(blob, None, 1011.0)
    early.resume(blob, None, 1009.0)
    assert late.restored.mode == "cold"
    assert early.restored.mode == "checkpoint"


def test_a_state_of_another_camera_is_not_used(served):
    session = session_of(served)
    step(served, session, frame(0, 1000.0))
    blob = encode_snapshot(session.export())  # type: ignore[arg-type]
    source = session.spec.source.model_copy(update={"uri": "rtsp://127.0.0.1/garden"})
    other = Session(
        session.spec.model_copy(update={"source": source}),
        LEASE,
        served,
        settings(),
        on_ready=lambda queue: None,
        on_change=lambda session, event: None,
    )
    other.resume(blob, None, 1001.0)
    assert other.restored.mode == "cold"
    assert "another source" in other.note


def test_newer_counters_of_the_status_win_over_the_snapshots(served):
    session = session_of(served)
    step(served, session, frame(0, time.time()))
    blob = encode_snapshot(session.export())  # type: ignore[arg-type]
    status = StreamStatus(
        state="RUNNING", since=0, received=40, processed=37, dropped={"queue": 2, "lost": 5}, reconnects=3
    )
    other = session_of(served)
    other.resume(blob, status)
    assert other.first_number == 40
    assert other.queue.counts() == (40, 37, {"queue": 2, "closed": 1}, 0)
    assert other.status().dropped == {"queue": 2, "closed": 1, "lost": 5}
    assert other.status().reconnects == 3


@pytest.mark.parametrize(("pause_s", "fresh"), [(9.0, False), (11.0, True), (-5.0, True), (-0.2, False)])
def test_a_gap_in_time_begins_the_state_anew(served, pause_s, fresh):
    session = session_of(served)
    for n in range(3):
        step(served, session, frame(n, 100.0 + n / 15))
    step(served, session, frame(3, 100.0 + 2 / 15 + pause_s))
    assert served[MODEL].arena.steps(session.analytics[MODEL].slot) == (1 if fresh else 4)


def test_slots_are_given_back_even_when_a_session_cannot_begin(served):
    arena = served[MODEL].arena
    sessions = [session_of(served) for _ in range(4)]
    with pytest.raises(ArenaFull):
        session_of(served)
    for session in sessions:
        session.free()
        session.free()  # twice is once
    assert arena.used == 0
    with pytest.raises(Exception, match="not loaded"):
        session_of(served, models=(StreamModel(name=MODEL), StreamModel(name="nope")))
    assert arena.used == 0


def test_states_are_told_once_and_in_order(served):
    told: list[dict] = []
    session = session_of(served, told)
    session.start(lambda *args: HandSource(*args))
    session.on_state(SourceState("RUNNING", source_size=(64, 48)))
    session.on_state(SourceState("RUNNING", source_size=(64, 48)))
    session.on_state(SourceState("RESTARTING", "STREAM_STALLED", "the camera went silent", retry_at=5.0))
    assert [(e["data"]["before"], e["data"]["after"]) for e in told] == [
        (None, "STARTING"),
        ("STARTING", "RUNNING"),
        ("RUNNING", "RESTARTING"),
    ]
    status = session.status()
    assert (status.state, status.error_code, status.retry_at) == ("RESTARTING", "STREAM_STALLED", 5.0)
    session.fail("STEP_FAILED", "no")
    session.on_state(SourceState("RUNNING"))
    assert session.status().state == "FAILED"
    assert session.status().error_code == "STEP_FAILED"


def test_status_reports_latency_rates_and_warmup(served):
    session = session_of(served)
    session.status()
    step(served, session, frame(0, time.time()))
    for ms in range(1, 101):
        session.published(ms / 1000)
    time.sleep(0.25)
    status = session.status()
    assert status.latency_ms is not None
    assert status.latency_ms.p50 == pytest.approx(50, abs=1)
    assert status.latency_ms.p99 == pytest.approx(99, abs=1)
    assert 0 < status.fps < 5
    assert status.warmup == f"0/{served[MODEL].model.memory_frames}"
    assert status.label in served[MODEL].recipe.labels
