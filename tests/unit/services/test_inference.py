"""Inference without a service: what stands alone equals `tsm infer` and the model itself, and bad requests are told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.infer import infer_file
from services.engine import Engine
from services.inference import BadInput, ModelBusy, ModelInUse, ModelNotReady, SequenceCall, UnknownModel
from services.local_inference import LocalInference
from services.manager import SourceNotAllowed, StreamManager
from services.request_form import MAX_FRAMES
from services.requests import MAX_WAITING
from services.schemas import SourceSpec, StreamSpec
from services.settings import ModelsSettings
from services.store import MemoryStore
from services.stream_models import StreamModel
from services.wanted import want
from tests.unit.services.engine_kit import MODEL, give, settings, small_model, spec, wait
from tests.unit.services.request_kit import (
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
from tsm_core.checkpoints import load_detector, save_model
from tsm_core.errors import CallerError
from tsm_core.model import WindowTSM, build
from tsm_core.model_file import ModelFileError
from tsm_core.postprocess import new_smoother
from tsm_core.recipes import MOTION9
from tsm_core.zoo import find_model

FRAMES = 24
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WINDOW = "window9"
EYES = "scenes_detector"


@pytest.fixture(scope="module")
def window():
    torch.manual_seed(1)
    return WindowTSM(build(replace(MOTION9, name=WINDOW, shift="bi", frames=4)), window_s=0.4, stride_s=0.2).eval()


@pytest.fixture(scope="module")
def eyes():
    return load_detector(find_model(EYES)).for_inference()


@pytest.fixture(scope="module")
def served(window, eyes):
    with inference(MemoryStore(), {WINDOW: window, EYES: eyes}) as (local, _):
        yield local


@pytest.fixture(scope="module")
def images():
    return film(FRAMES)


@pytest.fixture(scope="module")
def video(images, tmp_path_factory):
    return written(tmp_path_factory.mktemp("video") / "film.mp4", images)


def test_a_video_gives_what_tsm_infer_gives(served, video):
    reply = ran(served.infer(request(video=blobs(video.read_bytes()))))
    told = list(infer_file(video, small_model()))
    assert reply.outputs["scores"].shape == (FRAMES, 9)
    np.testing.assert_array_equal(reply.outputs["scores"], np.float32([one.scores.values for one in told]))
    np.testing.assert_array_equal(reply.outputs["logits"], np.float32([one.logits for one in told]))
    assert texts(reply.outputs["label"]) == [one.scores.top()[0][0] for one in told]
    assert reply.outputs["time_s"].tolist() == [one.time_s for one in told]
    last = told[-1].scores
    assert reply.parameters == {"warmup": f"{last.warmup_frames}/{last.warmup_total}"}


def test_a_video_in_window_mode_has_rows_where_results_are_due(served, video, window):
    reply = ran(served.infer(request(WINDOW, video=blobs(video.read_bytes()))))
    told = [one for one in infer_file(video, window) if one.scores is not None]
    assert 1 < len(told) < FRAMES
    np.testing.assert_array_equal(reply.outputs["scores"], np.float32([one.scores.values for one in told]))
    assert reply.outputs["time_s"].tolist() == [one.time_s for one in told]


def test_a_detectors_video_gives_the_tracks_of_tsm_infer(served, video, eyes):
    reply = ran(served.infer(request(EYES, video=blobs(video.read_bytes()))))
    told = [(index, track) for index, one in enumerate(infer_file(video, eyes)) for track in one.objects.tracks]
    assert len(told) > FRAMES / 2
    np.testing.assert_array_equal(reply.outputs["boxes"], np.float32([track.xyxy for _, track in told]))
    np.testing.assert_array_equal(reply.outputs["box_scores"], np.float32([track.score for _, track in told]))
    assert texts(reply.outputs["track_ids"]) == [track.track_id for _, track in told]
    assert texts(reply.outputs["box_labels"]) == [track.label for _, track in told]
    assert reply.outputs["frame_index"].tolist() == [index for index, _ in told]


def test_pictures_stand_alone_in_every_form(served, images):
    model, frames = small_model(), images[:20:2]
    pixels = model.preprocess([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames])
    with torch.no_grad():
        logits = model(pixels[:, None]).numpy()
    forms = (
        {"frame": frames},
        {"frame": pixels.numpy()},
        {"image": blobs(*map(png, frames))},
    )
    for form in forms:
        reply = ran(served.infer(request(**form)))
        np.testing.assert_allclose(reply.outputs["logits"], logits, **CLOSE)
        scores = [new_smoother(model.recipe).update(row, 0.0) for row in torch.from_numpy(logits)]
        np.testing.assert_allclose(reply.outputs["scores"], scores, **CLOSE)
        assert reply.parameters["warmup"] == f"0/{model.memory_frames}"


def test_clips_go_through_as_a_whole(served, images, window):
    for name, model in ((MODEL, small_model()), (WINDOW, window)):
        clip = images[:4]
        pixels = model.preprocess([torch.from_numpy(frame).permute(2, 0, 1) for frame in clip])[None]
        with torch.no_grad():
            logits = model(pixels).numpy()
        for form in (np.stack([clip, clip]), np.concatenate([pixels.numpy()] * 2)):
            reply = ran(served.infer(request(name, clip=form)))
            np.testing.assert_allclose(reply.outputs["logits"], np.concatenate([logits] * 2), **CLOSE)


def test_a_frame_alone_is_a_still_clip_in_window_mode(served, images, window):
    alone = ran(served.infer(request(WINDOW, frame=images[:1])))
    still = ran(served.infer(request(WINDOW, clip=np.repeat(images[None, :1], 4, axis=1))))
    np.testing.assert_allclose(alone.outputs["logits"], still.outputs["logits"], **CLOSE)
    assert alone.parameters["warmup"] == "1/4"


def test_a_detector_finds_boxes_in_pixels_of_the_picture_that_came(served, images, eyes):
    wide = np.repeat(np.repeat(images[:3], 2, axis=1), 2, axis=2)
    small = ran(served.infer(request(EYES, frame=images[:3])))
    large = ran(served.infer(request(EYES, image=blobs(*map(png, wide)))))
    assert len(small.outputs["boxes"]) >= 3
    assert set(small.outputs) == {"boxes", "box_scores", "box_labels", "frame_index"}
    best = [int(np.flatnonzero(one.outputs["frame_index"] == 0)[0]) for one in (small, large)]
    boxes = small.outputs["boxes"][best[0]] * 2, large.outputs["boxes"][best[1]]
    np.testing.assert_allclose(*boxes, atol=8)
    pixels = eyes.preprocess([torch.from_numpy(images[0]).permute(2, 0, 1)]).numpy()
    ready = ran(served.infer(request(EYES, frame=pixels))).outputs
    assert ready["boxes"].max() <= max(eyes.input_size)
    np.testing.assert_allclose(ready["box_scores"][0], small.outputs["box_scores"][best[0]], **CLOSE)


def test_only_wanted_outputs_come(served, images):
    reply = ran(served.infer(request(frame=images[:2], outputs=("label",))))
    assert list(reply.outputs) == ["label"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"frame": np.zeros((1, 8, 8, 4), np.uint8)}, r"UINT8 \[1, 8, 8, 4\], needed is FP32 .* or UINT8"),
        ({"frame": np.zeros((1, 3, 7, 7), np.float32)}, r"FP32 \[1, 3, 7, 7\], needed"),
        ({"frame": np.zeros((1, 8, 8, 3), np.int64)}, "int64"),
        ({"frame": np.zeros((0, 8, 8, 3), np.uint8)}, "empty"),
        ({"frame": np.full((1, 3, 64, 64), np.nan, np.float32)}, "not finite"),
        ({"frame": np.zeros((MAX_FRAMES + 1, 8, 8, 3), np.uint8)}, "send several"),
        ({"clip": np.zeros((9, 8, 4, 4, 3), np.uint8)}, "72 frames"),
        ({"sound": np.zeros((1,), np.uint8)}, "no input 'sound'; it takes frame, clip, image, video"),
        ({}, "one input is needed, got 0"),
        ({"frame": np.zeros((1, 8, 8, 3), np.uint8), "image": blobs(b"x")}, "got 2"),
        ({"frame": np.zeros((1, 8, 8, 3), np.uint8), "outputs": ("boxes",)}, "no output boxes; it gives logits"),
        ({"frame": np.zeros((1, 1, 16_000, 3), np.uint8)}, "16000x1 is too long"),
        ({"image": blobs(png(np.zeros((16_000, 1, 3), np.uint8)))}, "1x16000 is too long"),
        ({"image": blobs(b"GIF89a")}, "neither JPEG nor PNG"),
        ({"video": blobs(b"not a video")}, "cannot be read"),
    ],
)
def test_what_cannot_be_taken_is_told(served, wrong, says):
    with pytest.raises(CallerError, match=says):
        ran(served.infer(request(**wrong)))


def test_unknown_models_versions_and_sequences_of_clips_are_told(served, images):
    with pytest.raises(UnknownModel, match="'nine' is not served; served: motion9, scenes_detector, window9"):
        ran(served.infer(request("nine", frame=images[:1])))
    with pytest.raises(UnknownModel, match="no version '2'"):
        ran(served.infer(request(frame=images[:1], version="2")))


def test_requests_beyond_the_queue_are_refused_and_none_is_lost(images):
    with inference(MemoryStore()) as (_, engine):
        video = blobs(b"x" * 1000)  # takes its lane long enough: a child looks at it
        answers, busy = [], 0
        for _ in range(MAX_WAITING + 10):
            try:
                answers.append(engine.infer(request(video=video)))
            except ModelBusy:
                busy += 1
        assert busy >= 9
        engine.infer(request(frame=images[:1])).result(10)  # the other lane goes on
        for answer in answers[1:]:
            answer.cancel()
        wait(lambda: all(answer.done() for answer in answers), 20)


def test_two_threads_of_one_model_do_not_meet(served, images):
    alone = [ran(served.infer(request(frame=images[index : index + 1]))).outputs["logits"] for index in range(8)]

    def again(index: int) -> np.ndarray:
        return ran(served.infer(request(frame=images[index : index + 1]))).outputs["logits"]

    with ThreadPoolExecutor(4) as pool:
        for index, logits in enumerate(pool.map(again, list(range(8)) * 4)):
            np.testing.assert_array_equal(logits, alone[index % 8])


def test_models_are_described(served):
    about = {one.name: one for one in ran(served.models())}
    assert {name: one.sequences for name, one in about.items()} == {MODEL: True, WINDOW: False, EYES: True}
    assert (about[WINDOW].mode, about[EYES].task) == ("window", "detection")
    mine = about[MODEL]
    assert mine.ready
    assert mine.sequences
    assert mine.task == "recognition"
    assert [spec.shape for spec in mine.inputs if spec.name == "frame"] == [(-1, 3, 64, 64), (-1, -1, -1, 3)]
    assert {spec.name for spec in mine.outputs} == {"logits", "scores", "label", "time_s"}
    assert ran(served.ready(MODEL))


def test_statistics_are_those_of_the_replicas(images):
    with inference(MemoryStore()) as (local, engine):
        for count in (1, 3):
            ran(local.infer(request(frame=images[:count])))
        with pytest.raises(BadInput):
            ran(local.infer(request(sound=images[:1])))
        engine.store.put_metrics("r1", engine.telemetry.text(), 10)
        (mine,) = ran(local.statistics(MODEL))
        assert (mine.success.count, mine.fail.count) == (2, 1)
        assert (mine.inference_count, mine.execution_count) == (4, 2)
        assert mine.compute_infer.count == 2
        assert 0 < mine.compute_infer.total_s <= mine.success.total_s


def test_a_request_that_waited_too_long_is_not_worked_on(images):
    with inference(MemoryStore()) as (_, engine):
        answer = engine.infer(request(frame=images[:1], timeout_s=0.0))
        error = answer.exception(10)
        assert getattr(error, "reason", "") == "timeout"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": WINDOW, "frame": film(1)}, "sees whole clips and has no sequences"),
        ({"clip": film(4)[None]}, "a sequence is made of `frame` or `image`, not of 'clip'"),
        ({"frame": film(1), "sequence": SequenceCall("")}, "must have 1 to 128"),
        ({"frame": film(1), "timestamp_s": -1.0}, "timestamp -1.0 s"),
        ({"frame": film(17)}, "17 frames, a request may have 16"),
        ({"model": "nine", "frame": film(1)}, "'nine' is not served"),
    ],
)
def test_what_can_begin_no_sequence_is_told_and_takes_no_slot(served, wrong, says):
    (engine,) = served._engines
    with pytest.raises(CallerError, match=says):
        ran(served.infer(request(**{"sequence": SequenceCall("a"), **wrong})))
    assert engine.store.list_streams() == []


@pytest.fixture
def service(tmp_path):
    """An engine that loads its models from files, as a service does."""
    save_model(tmp_path / f"{MODEL}.safetensors", small_model())
    save_model(tmp_path / "other.safetensors", small_model(1))
    (tmp_path / "broken.safetensors").write_bytes(b"no model")
    using = settings().model_copy(update={"models": ModelsSettings(dir=tmp_path)})
    engine = Engine(using, MemoryStore(), "r1")
    engine.start()
    wait(lambda: engine.store.replicas())
    yield LocalInference(engine)
    engine.stop()


def test_models_are_loaded_and_unloaded_while_streams_go_on(service, images):
    (engine,) = service._engines
    manager = StreamManager(engine.store, engine.settings)
    ran(service.infer(pushed(images[0], "live")))
    ran(service.load("other"))
    assert [model.name for model in manager.models()] == [MODEL, "other"]
    assert ran(service.ready("other"))
    assert ran(service.infer(request("other", frame=images[:1]))).model == "other"
    ran(service.infer(pushed(images[0], "second", "other")))
    with pytest.raises(ModelInUse, match="name model 'other'"):
        ran(service.unload("other"))
    ran(service.infer(pushed(images[0], "second", "other", end=True)))
    wait(lambda: len(engine.store.list_streams()) == 1)
    ran(service.unload("other"))
    with pytest.raises(UnknownModel):
        ran(service.infer(request("other", frame=images[:1])))
    assert number_of(ran(service.infer(pushed(images[1], "live")))) == 1
    engine.healthy()
    states = {one.name: one.state for one in ran(service.index())}
    assert (states[MODEL], states["other"], states["broken"]) == ("READY", "UNAVAILABLE", "UNAVAILABLE")


def test_a_request_goes_on_to_a_replica_that_holds_the_model(tmp_path, images):
    save_model(tmp_path / f"{MODEL}.safetensors", small_model())
    save_model(tmp_path / "other.safetensors", small_model(1))
    using = settings().model_copy(update={"models": ModelsSettings(dir=tmp_path)})
    store = MemoryStore()
    first, second = (Engine(using, store, name) for name in ("r1", "r2"))
    second.start()
    wait(lambda: len(store.replicas()) == 1)
    local = LocalInference(first, second)  # the first has not begun: it holds nothing yet
    ran(local.load("other"))
    assert ran(local.ready("other"))
    assert ran(local.infer(request("other", frame=images[:1]))).model == "other"
    second.stop()
    with pytest.raises(ModelNotReady, match="at the moment"):
        ran(local.infer(request("other", frame=images[:1])))
    first.stop()


def test_what_cannot_be_loaded_or_unloaded_is_told(service):
    with pytest.raises(UnknownModel, match="'nine' does not exist here"):
        ran(service.load("nine"))
    with pytest.raises(UnknownModel):
        ran(service.load("../other"))
    with pytest.raises(ModelFileError, match="'broken' cannot be loaded"):
        ran(service.load("broken"))
    assert "broken" in {one.name: one for one in ran(service.index()) if one.reason not in ("", "not loaded")}
    with pytest.raises(ModelInUse, match="the one of streams that name none"):
        ran(service.unload(MODEL))
    with pytest.raises(UnknownModel):
        ran(service.unload("nine"))


def test_a_stream_waits_for_a_model_that_is_being_loaded(service):
    (engine,) = service._engines
    want(engine.store, "other", wanted=True)
    give(engine.store, engine, spec("yard", models=(StreamModel(name="other"),)))
    assert engine.sessions["yard"].state != "FAILED"


def test_sequences_are_not_listed_unless_asked_for_and_not_made_by_hand(service, images):
    (engine,) = service._engines
    manager = StreamManager(engine.store, engine.settings)
    ran(service.infer(pushed(images[0], "live")))
    assert manager.streams() == []
    (view,) = manager.streams(sequences=True)
    assert view.name == "live"
    with pytest.raises(SourceNotAllowed, match="begins with its first frame"):
        manager.create(StreamSpec(id="mine", source=SourceSpec(uri="push:")))
