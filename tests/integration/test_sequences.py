"""Sequences whose frames are pushed, over a real Valkey: each as if it were alone, and none ends with its replica."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipelines.infer import infer_file
from pipelines.sources import iter_file
from services.controller import Controller
from services.engine import Engine
from services.inference import NoCapacity, OutOfStep, SequenceBusy, SequenceCall, UnknownSequence
from services.local_inference import LocalInference
from services.pushed import MAX_IN_FLIGHT
from services.request_form import MAX_SEQUENCE_FRAMES
from services.schemas import StreamSpec
from services.sequences import sequence_stream
from services.settings import StoreSettings
from services.store import RedisStore, StateStore
from tests.unit.services.engine_kit import MODEL, running, settings, small_model, wait
from tests.unit.services.request_kit import (
    FPS,
    blobs,
    film,
    inference,
    number_of,
    png,
    pushed,
    ran,
    request,
    texts,
    written,
)
from tsm_core.checkpoints import load_detector
from tsm_core.errors import CallerError
from tsm_core.zoo import find_model

EYES = "scenes_detector"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def store(valkey_url: str, tmp_path: Path) -> Iterator[StateStore]:
    store = RedisStore(StoreSettings(url=valkey_url, prefix=f"{tmp_path.name}:"))
    yield store
    store.close()


@pytest.fixture
def local(store: StateStore) -> Iterator[LocalInference]:
    with inference(store) as (local, _):
        yield local


def stepped(images: np.ndarray, times_s: list[float]) -> list[list[float]]:
    """What `tsm infer` says of pictures that are not coded: smoothed scores, frame by frame."""
    import torch

    from tsm_core.postprocess import new_smoother

    model = small_model()
    arena, smoother = model.new_arena(1), new_smoother(model.recipe)
    slot = arena.allocate()
    rows = []
    for image, time_s in zip(images, times_s, strict=True):
        pixels = model.preprocess([torch.from_numpy(image).permute(2, 0, 1)])
        rows.append(list(smoother.update(model.step(pixels, arena, [slot])[0], time_s)))
    return rows


def scores_of(local: LocalInference, images: np.ndarray, sequence_id: str) -> list[np.ndarray]:
    """Push all, one by one, with times."""
    last = len(images) - 1
    return [
        ran(
            local.infer(pushed(image, sequence_id, timestamp_s=index / FPS, start=index == 0, end=index == last))
        ).outputs["scores"][0]
        for index, image in enumerate(images)
    ]


def test_pushed_frames_give_what_tsm_infer_gives(store, tmp_path):
    eyes = load_detector(find_model(EYES)).for_inference()
    video = written(tmp_path / "film.mp4", film(20))
    frames = list(iter_file(video))
    with inference(store, {EYES: eyes}) as (local, _):
        for frame, told in zip(frames, infer_file(video, small_model()), strict=True):
            image = frame.image.permute(1, 2, 0).numpy()
            reply = ran(local.infer(pushed(image, "film", timestamp_s=frame.time_s)))
            assert told.scores is not None
            np.testing.assert_allclose(reply.outputs["scores"][0], told.scores.values, **CLOSE)
            seen = told.scores
            assert reply.parameters["warmup"] == f"{seen.warmup_frames}/{seen.warmup_total}"
            assert number_of(reply) == told.frame_number
        boxes = 0
        for frame, told in zip(frames, infer_file(video, eyes), strict=True):
            data = png(frame.image.permute(1, 2, 0).numpy())
            call = SequenceCall("film")
            reply = ran(local.infer(request(EYES, image=blobs(data), sequence=call, timestamp_s=frame.time_s)))
            assert told.objects is not None
            tracks = told.objects.tracks
            np.testing.assert_allclose(
                reply.outputs["boxes"], np.float32([track.xyxy for track in tracks]).reshape(-1, 4), atol=0.05
            )
            numbers = [track.track_id.rpartition(":")[2] for track in tracks]
            assert [text.rpartition(":")[2] for text in texts(reply.outputs["track_ids"])] == numbers
            boxes += len(tracks)
        assert boxes > 10


def test_interleaved_sequences_are_each_as_if_alone(store):
    films = [film(12, seed) for seed in range(6)]
    with inference(store) as (local, _), ThreadPoolExecutor(len(films)) as pool:
        told = list(pool.map(lambda k: scores_of(local, films[k], f"film-{k}"), range(len(films))))
    for images, scores in zip(films, told, strict=True):
        np.testing.assert_allclose(scores, stepped(images, [index / FPS for index in range(12)]), **CLOSE)


def test_several_frames_in_one_request_are_consecutive(local):
    images = film(MAX_SEQUENCE_FRAMES)
    at_once = ran(local.infer(request(frame=images, sequence=SequenceCall("a"), timestamp_s=100.0)))
    times_s = [100.0 - (MAX_SEQUENCE_FRAMES - 1 - index) / 15 for index in range(MAX_SEQUENCE_FRAMES)]
    np.testing.assert_allclose(at_once.outputs["scores"], stepped(images, times_s), **CLOSE)
    assert number_of(at_once) == MAX_SEQUENCE_FRAMES - 1
    with pytest.raises(CallerError, match="a request may have 16"):
        ran(local.infer(request(frame=film(17), sequence=SequenceCall("a"))))


def test_an_end_frees_the_slot_and_a_late_frame_is_told(store, local):
    image = film(1)[0]
    stream_id = sequence_stream(MODEL, "door")
    ran(local.infer(pushed(image, "door")))
    assert [spec.id for spec in store.list_streams()] == [stream_id]
    assert number_of(ran(local.infer(pushed(image, "door", end=True)))) == 1
    wait(lambda: not store.list_streams() and not store.leases())
    wait(lambda: store.replicas()[0].slots_used == 0)
    with pytest.raises(UnknownSequence, match=r"was ended by sequence_end; this frame is late\. Send sequence_start"):
        ran(local.infer(pushed(image, "door")))
    again = ran(local.infer(pushed(image, "door", start=True)))
    assert number_of(again) == 0
    assert again.parameters["warmup"] == f"0/{small_model().memory_frames}"
    assert again.parameters["restored"] == "cold"


def test_a_start_begins_a_living_sequence_anew(local):
    images = film(6)
    first = [ran(local.infer(pushed(image, "a", timestamp_s=index / FPS))) for index, image in enumerate(images)]
    second = scores_of(local, images, "a")
    np.testing.assert_allclose([reply.outputs["scores"][0] for reply in first], second, **CLOSE)


def test_an_idle_sequence_is_let_go(store):
    with inference(store, sequence_idle_s=0.3) as (local, engine):
        image = film(1)[0]
        ran(local.infer(pushed(image, "slow")))
        wait(lambda: not engine.sessions and not store.list_streams())
        with pytest.raises(UnknownSequence, match="stood still too long"):
            ran(local.infer(pushed(image, "slow")))
        assert number_of(ran(local.infer(pushed(image, "slow", start=True)))) == 0


def test_too_many_frames_at_once_are_refused_and_the_others_keep_their_order(local):
    images = film(MAX_IN_FLIGHT + 8)

    async def flood() -> list[object]:
        ran_ = [local.infer(pushed(image, "flood")) for image in images]
        return list(await asyncio.gather(*ran_, return_exceptions=True))

    answers = asyncio.run(flood())
    refused = [one for one in answers if isinstance(one, SequenceBusy)]
    counted = [number_of(one) for one in answers if not isinstance(one, Exception)]  # type: ignore[arg-type]
    assert len(refused) == len(images) - MAX_IN_FLIGHT - 1
    assert counted == list(range(MAX_IN_FLIGHT + 1))


def test_a_picture_that_cannot_be_read_is_told_and_the_sequence_goes_on(local):
    image = film(1)[0]
    ran(local.infer(pushed(image, "a")))
    with pytest.raises(CallerError, match="damaged or cut off"):
        ran(local.infer(request(image=blobs(png(image)[:200]), sequence=SequenceCall("a"))))
    assert number_of(ran(local.infer(pushed(image, "a")))) == 1


def test_no_more_sequences_than_slots(store):
    with inference(store, slots=2) as (local, _):
        image = film(1)[0]
        for name in ("a", "b"):
            ran(local.infer(pushed(image, name)))
        with pytest.raises(NoCapacity, match="all 2 slots of 1 replicas"):
            ran(local.infer(pushed(image, "c")))
        ran(local.infer(pushed(image, "a", end=True)))
        wait(lambda: len(store.leases()) == 1)
        ran(local.infer(pushed(image, "c")))


@contextmanager
def two_replicas(store: StateStore) -> Iterator[LocalInference]:
    """Two engines that save often and are soon missed, and a controller."""
    using = settings(heartbeat_ttl_ms=400, checkpoint_interval_s=0.1)
    controller = Controller(store, using.controller, "c1")
    with running(store, "r1", using=using) as (first, _), running(store, "r2", using=using) as (second, _):
        wait(lambda: len(store.replicas()) == 2)
        controller.start()
        yield LocalInference(first, second)
        controller.stop()


def owner_of(local: LocalInference, stream_id: str) -> Engine:
    owner = local._engines[0].store.leases()[stream_id].owner
    return next(engine for engine in local._engines if engine.id == owner)


@pytest.mark.parametrize("hard", [False, True], ids=["drained", "killed"])
def test_a_sequence_goes_on_when_its_replica_is_gone(store, hard):
    images, frames = film(40), 40
    with two_replicas(store) as local:
        stream_id = sequence_stream(MODEL, "long")
        numbers, epochs, restored = [], [], set()
        expected = stepped(images, [index / FPS for index in range(frames)])
        told = []
        for index, image in enumerate(images):
            if index == 20:
                _lose(owner_of(local, stream_id), stream_id, hard)
            reply = ran(local.infer(pushed(image, "long", timestamp_s=index / FPS)))
            numbers.append(number_of(reply))
            epochs.append(int(reply.parameters["epoch"]))
            restored.add(reply.parameters["restored"])
            told.append(reply.outputs["scores"][0])
    assert numbers == list(range(frames))  # none lost, none twice
    assert epochs[-1] > epochs[0]
    assert restored == {"cold", "checkpoint"}
    np.testing.assert_allclose(told, expected, atol=2e-3)  # the state travels as float16


def test_who_counts_frames_loses_none_with_a_killed_replica(store, monkeypatch):
    images, frames = film(40), 40
    with two_replicas(store) as local:
        stream_id = sequence_stream(MODEL, "counted")
        told: dict[int, np.ndarray] = {}
        number, back = 0, []
        while number < frames:
            if number == 20 and not back:
                owner = owner_of(local, stream_id)
                session = owner.sessions[stream_id]
                wait(lambda session=session: session.saved_number == 19)
                monkeypatch.setattr(owner, "_store_snapshot", lambda *_: None)  # what follows is lost with it
            if number == 25 and not back:
                _kill(owner)
            try:
                call = pushed(images[number], "counted", timestamp_s=number / FPS, frame_number=number)
                reply = ran(local.infer(call))
            except OutOfStep as error:
                number = int(re.search(r"goes on with frame (\d+)", str(error))[1])
                back.append(number)
                continue
            assert number_of(reply) == number
            told[number] = reply.outputs["scores"][0]
            number += 1
    assert back == [20]
    expected = stepped(images, [index / FPS for index in range(frames)])
    np.testing.assert_allclose([told[index] for index in range(frames)], expected, atol=2e-3)


def _lose(engine: Engine, stream_id: str, hard: bool) -> None:
    """Drain the engine; or, once the state is saved, stop it as if its process were gone."""
    wait(lambda: engine.sessions[stream_id].saved_number == 19)
    if hard:
        _kill(engine)
    else:
        threading.Thread(target=engine.drain).start()


def _kill(engine: Engine) -> None:
    """Stop it as if its process were gone."""
    for stopped in (engine._silent, engine._stopping, engine._look):
        stopped.set()
    engine.batcher.close()
    for session in engine.sessions.values():
        session.stop_source()  # no call is answered any more


def test_a_frame_that_was_counted_is_not_counted_again(store, local):
    (engine,) = local._engines
    image = film(1)[0]
    reply = ran(local.infer(pushed(image, "a")))
    stream_id = sequence_stream(MODEL, "a")
    lease = store.leases()[stream_id]
    one = engine.push(stream_id, lease.epoch, "token", pushed(image, "a")).result(5)
    again = engine.push(stream_id, lease.epoch, "token", pushed(image, "a")).result(5)
    assert number_of(one) == number_of(again) == number_of(reply) + 1
    np.testing.assert_array_equal(one.outputs["scores"], again.outputs["scores"])


def test_cameras_and_sequences_share_a_replica(store):
    from tests.unit.services.engine_kit import give, picture, processed, spec

    with running(store, "r1") as (engine, cameras):
        give(store, engine, spec("yard"))
        local = LocalInference(engine)
        for index, image in enumerate(film(5)):
            cameras["yard"].feed(picture("yard", index))
            ran(local.infer(pushed(image, "a")))
        wait(lambda: processed(engine, "yard") >= 1)
        assert engine.sessions["yard"].state in ("STARTING", "RUNNING")


def test_two_gateways_may_begin_one_sequence_at_once(store):
    with inference(store) as (one, engine):
        other = LocalInference(engine)
        image = film(1)[0]
        with ThreadPoolExecutor(8) as pool:
            replies = list(
                pool.map(lambda k: ran((one, other)[k % 2].infer(pushed(image, "shared", timeout_s=20))), range(8))
            )
        assert sorted(map(number_of, replies)) == list(range(8))
        assert len(store.list_streams()) == 1


def test_the_registry_keeps_no_more_than_what_is(store, local):
    began = time.time()
    ran(local.infer(pushed(film(1)[0], "named")))
    (spec,) = store.list_streams()
    assert isinstance(spec, StreamSpec)
    assert (spec.name, spec.source.uri, spec.models[0].name) == ("named", "push:", MODEL)
    assert spec.created_at.timestamp() >= began - 1
