"""The public tritonclient, unchanged, against the whole service: what it is told equals what `tsm infer` tells."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from google.protobuf.json_format import MessageToDict
from tritonclient.utils import InferenceServerException

from pipelines.infer import infer_file
from pipelines.sources import iter_file
from tests.integration.conftest import RunningService
from tests.unit.services.request_kit import blobs, film, png, texts, written
from tsm_core.checkpoints import load_recogniser
from tsm_core.zoo import find_model

DOCS = Path(__file__).resolve().parents[2] / "docs/inference.md"
MODEL, EYES = "motion9", "scenes_detector"
FRAMES = 20
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LOAD_S = 60.0


@dataclass
class Door:
    """One of the two clients, and how it names tensors."""

    kind: ModuleType
    client: Any

    def tensor(self, name: str, array: np.ndarray, **how: bool) -> Any:
        """An input."""
        datatype = {"uint8": "UINT8", "float32": "FP32", "object": "BYTES"}[array.dtype.name]
        tensor = self.kind.InferInput(name, array.shape, datatype)
        tensor.set_data_from_numpy(array, **how)
        return tensor

    def ask(self, name: str, array: np.ndarray, model: str = MODEL, **more: Any) -> Any:
        """The result of one request."""
        return self.client.infer(model, [self.tensor(name, array)], **more)

    def told(self, answer: Any) -> dict[str, Any]:
        """Metadata, configuration, statistics or index as JSON."""
        return answer


class GrpcDoor(Door):
    """gRPC's client tells messages, or JSON on request."""

    def told(self, answer: Any) -> dict[str, Any]:
        return MessageToDict(answer, preserving_proto_field_name=True)


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, service: RunningService) -> Iterator[Door]:
    if request.param == "http":
        address, kind, wrapped = service.url.removeprefix("http://"), tritonclient.http, Door
        options: dict[str, Any] = {"network_timeout": 120.0, "connection_timeout": 120.0}
    else:
        address, kind, wrapped, options = service.grpc, tritonclient.grpc, GrpcDoor, {}
    with kind.InferenceServerClient(address, **options) as client:
        yield wrapped(kind, client)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("video") / "film.mp4", film(FRAMES))


def test_what_is_there(door: Door):
    client = door.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert "sequence(string_id)" in door.told(client.get_server_metadata())["extensions"]
    about = door.told(client.get_model_metadata(MODEL))
    assert about["versions"] == ["1"]
    assert {one["name"] for one in about["inputs"]} == {"frame", "clip", "image", "video"}
    config = door.told(client.get_model_config(MODEL))
    config = config.get("config", config)
    assert "sequence_batching" in config
    index = door.told(client.get_model_repository_index())
    states = {one["name"]: one["state"] for one in (index["models"] if isinstance(index, dict) else index)}
    assert states[MODEL] == "READY"
    assert states[EYES] == "UNAVAILABLE"
    counted = door.told(client.get_inference_statistics(MODEL))["model_stats"]
    assert counted[0]["name"] == MODEL


def test_a_video_gives_what_tsm_infer_gives(door: Door, video: Path):
    result = door.ask("video", blobs(video.read_bytes()))
    told = list(infer_file(video, MODEL))
    np.testing.assert_allclose(result.as_numpy("scores"), [one.scores.values for one in told], **CLOSE)
    assert texts(result.as_numpy("label")) == [one.scores.top()[0][0] for one in told]
    assert result.as_numpy("time_s").tolist() == [one.time_s for one in told]


def test_clips_give_what_the_model_gives(door: Door):
    model = load_recogniser(find_model(MODEL)).for_inference()
    pixels = np.random.default_rng(3).normal(size=(2, 4, 3, model.input_px, model.input_px)).astype("f4")
    with torch.no_grad():
        wanted = model(torch.from_numpy(pixels)).numpy()
    wanted_outputs = [door.kind.InferRequestedOutput("logits")]
    result = door.ask("clip", pixels, outputs=wanted_outputs)
    np.testing.assert_allclose(result.as_numpy("logits"), wanted, **CLOSE)
    assert result.as_numpy("scores") is None
    best = door.ask("clip", pixels, outputs=[door.kind.InferRequestedOutput("logits", class_count=1)])
    told = [text.decode().split(":") for text in best.as_numpy("logits")[:, 0]]
    assert [int(index) for _, index, _ in told] == wanted.argmax(1).tolist()
    assert [name for _, _, name in told] == [model.labels[k] for k in wanted.argmax(1)]


def test_frames_of_a_sequence_give_what_tsm_infer_gives(door: Door, video: Path):
    told = list(infer_file(video, MODEL))
    frames = list(iter_file(video, 256))
    name = 77 if door.kind is tritonclient.http else "camera of a caller"
    for number, frame in enumerate(frames):
        image = np.ascontiguousarray(frame.image.permute(1, 2, 0).numpy())
        result = door.ask(
            *(("image", blobs(png(image))) if number % 2 else ("frame", image[None])),
            sequence_id=name,
            sequence_start=number == 0,
            sequence_end=number == len(frames) - 1,
            parameters={"timestamp": frame.time_s},
        )
        np.testing.assert_allclose(result.as_numpy("scores")[0], told[number].scores.values, **CLOSE)
    with pytest.raises(InferenceServerException, match="sequence_start"):
        door.ask("frame", image[None], sequence_id=name)


def test_a_detector_is_loaded_asked_and_let_go(door: Door, video: Path, service: RunningService):
    door.client.load_model(EYES)
    service.wait(lambda: door.client.is_model_ready(EYES), LOAD_S, "loaded")
    result = door.ask("video", blobs(video.read_bytes()), EYES)
    told = [(index, track) for index, one in enumerate(infer_file(video, EYES)) for track in one.objects.tracks]
    assert len(told) > FRAMES / 2
    np.testing.assert_allclose(result.as_numpy("boxes"), np.float32([track.xyxy for _, track in told]), atol=0.01)
    np.testing.assert_allclose(result.as_numpy("box_scores"), [track.score for _, track in told], **CLOSE)
    assert texts(result.as_numpy("box_labels")) == [track.label for _, track in told]
    assert result.as_numpy("frame_index").tolist() == [index for index, _ in told]
    door.client.unload_model(EYES)
    with pytest.raises(InferenceServerException, match=EYES):
        door.ask("video", blobs(b"x"), EYES)


def shown(language: str, service: RunningService) -> list[str]:
    """What docs/inference.md shows, with this service's addresses."""
    text = DOCS.read_text().replace("127.0.0.1:8000", service.url.removeprefix("http://"))
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [block.replace("127.0.0.1:9000", service.grpc) for block in blocks]


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_documentation_runs(service: RunningService, video: Path, tmp_path: Path):
    shutil.copy(video, tmp_path / "film.mp4")
    labels, frames, models = [run(sys.executable, "-c", block, folder=tmp_path) for block in shown("python", service)]
    assert labels.count("b'") == FRAMES
    assert re.fullmatch(r"\(2, 9\) 0/\d+\n", frames)
    assert EYES in models


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_commands_of_the_documentation_run(service: RunningService, tmp_path: Path):
    (block,) = shown("sh", service)
    ready, reply = map(
        json.loads, run("bash", "-c", block.replace("\ncurl", "\necho; curl", 1), folder=tmp_path).split("\n")
    )
    assert ready == {"name": MODEL, "ready": True}
    assert re.fullmatch(r"0\.\d{6}:\d:.+", reply["outputs"][0]["data"][0])


def test_errors_have_their_text(door: Door):
    frame = film(1)
    for wrong, told in (
        (lambda: door.ask("frame", frame, "nope"), "'nope'"),
        (lambda: door.ask("frame", frame, model_version="4"), "has no version '4'"),
        (lambda: door.ask("frame", frame[..., :2]), r"needed is FP32"),
        (lambda: door.ask("image", blobs(b"x")), "neither JPEG nor PNG"),
        (lambda: door.ask("frame", frame, outputs=[door.kind.InferRequestedOutput("boxes")]), "boxes"),
    ):
        with pytest.raises(InferenceServerException, match=told):
            wrong()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_packed_requests_and_answers(door: Door, algorithm: str):
    frames = film(2)
    plain = door.ask("frame", frames).as_numpy("logits")
    if door.kind is tritonclient.http:
        more = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    else:
        more = {"compression_algorithm": algorithm}
    np.testing.assert_array_equal(door.ask("frame", frames, **more).as_numpy("logits"), plain)


def test_json_tells_the_same_as_bytes(service: RunningService):
    with tritonclient.http.InferenceServerClient(service.url.removeprefix("http://")) as client:
        door = Door(tritonclient.http, client)
        frames = film(2)
        outputs = [tritonclient.http.InferRequestedOutput(name, binary_data=False) for name in ("logits", "label")]
        told = client.infer(MODEL, [door.tensor("frame", frames, binary_data=False)], outputs=outputs)
        plain = door.ask("frame", frames)
        assert told.as_numpy("logits").tobytes() == plain.as_numpy("logits").tobytes()
        assert [text.encode() for text in told.as_numpy("label")] == plain.as_numpy("label").tolist()


def test_sequences_interleave_on_one_stream(service: RunningService, video: Path):
    told = [one.scores.values for one in infer_file(video, MODEL)]
    frames = [np.ascontiguousarray(one.image.permute(1, 2, 0).numpy())[None] for one in iter_file(video, 256)]
    times_s = [one.time_s for one in iter_file(video, 256)]
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    lags = {1001: 0, 1002: 3, 1003: 7}  # each sequence is that many frames behind the first
    with tritonclient.grpc.InferenceServerClient(service.grpc) as client:
        door = Door(tritonclient.grpc, client)
        client.start_stream(lambda result, error: answers.put((result, error)))
        for step in range(len(frames) + max(lags.values())):
            for sequence, lag in lags.items():
                if 0 <= (number := step - lag) < len(frames):
                    client.async_stream_infer(
                        MODEL,
                        [door.tensor("frame", frames[number])],
                        request_id=f"{sequence}/{number}",
                        sequence_id=sequence,
                        sequence_start=number == 0,
                        sequence_end=number == len(frames) - 1,
                        parameters={"timestamp": times_s[number]},
                    )
        client.stop_stream()
    came: dict[int, int] = dict.fromkeys(lags, 0)
    while not answers.empty():
        result, error = answers.get()
        assert error is None
        sequence, number = map(int, result.get_response().id.split("/"))
        assert number == came[sequence]
        came[sequence] += 1
        np.testing.assert_allclose(result.as_numpy("scores")[0], told[number], **CLOSE)
    assert came == dict.fromkeys(lags, len(frames))
