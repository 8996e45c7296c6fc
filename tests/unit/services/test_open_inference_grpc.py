"""The Open Inference Protocol over gRPC: messages, streams of several sequences, and messages that are none."""

import io
import logging
import pickle
import queue
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from services.locks.callers import Locks
from services.manager import StreamManager
from services.rpc import open_inference as pb
from services.rpc.open_inference import IN_FLIGHT, POOL, SERVICE, inference_service
from services.rpc.server import GrpcDoor
from services.settings import Settings, StoreSettings
from services.store import MemoryStore
from services.tensors import to_raw
from tests.unit.services.http_kit import MODELS
from tests.unit.services.inference_kit import ColourInference

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
COLOURS = (FRAMES.mean((1, 2)) / 255).astype("f4")
METHODS = POOL.FindServiceByName(SERVICE).methods
FUZZED = 10_000
WAIT_S = 30


class Client:
    """Calls methods of the protocol over a channel, with this project's messages."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def __getattr__(self, method: str) -> Callable[..., Any]:
        about = next(one for one in METHODS if one.name == method)
        kind = "stream_stream" if about.client_streaming else "unary_unary"
        return getattr(self._channel, kind)(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=getattr(pb, about.output_type.name).FromString,
        )

    def raw(self, method: str) -> Callable[..., Any]:
        """The method with bytes for messages."""
        return self._channel.unary_unary(f"/{SERVICE}/{method}")


@pytest.fixture(scope="module")
def shared() -> ColourInference:
    return ColourInference()


@pytest.fixture
def inference(shared: ColourInference) -> ColourInference:
    shared.reset()
    return shared


@pytest.fixture(scope="module")
def channel(shared: ColourInference) -> Iterator[grpc.Channel]:
    store, settings = MemoryStore(StoreSettings()), Settings()
    StreamManager(store, settings, models=MODELS)
    door = GrpcDoor("127.0.0.1", 0, [inference_service(shared)], Locks(store, settings), max_message_bytes=16 << 20)
    with grpc.insecure_channel(f"127.0.0.1:{door.port}") as channel:
        yield channel
    door.stop()


@pytest.fixture
def client(channel: grpc.Channel, inference: ColourInference) -> Client:
    return Client(channel)


def raw_request(frames: np.ndarray = FRAMES, **parameters: Any) -> Any:
    request = pb.ModelInferRequest(model_name="colours", id="r1")
    request.inputs.add(name="frame", datatype="UINT8", shape=frames.shape)
    request.raw_input_contents.append(to_raw(frames))
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "uint64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def grey(value: int, sequence: Any, request_id: str = "", **parameters: Any) -> Any:
    request = raw_request(np.full((1, 1, 1, 3), value, np.uint8), sequence_id=sequence, **parameters)
    request.id = request_id
    return request


def tensor(reply: Any, at: int) -> np.ndarray:
    return np.frombuffer(reply.raw_output_contents[at], "f4").reshape(reply.outputs[at].shape)


def refused(call: Callable[[], Any], code: grpc.StatusCode, reason: str, told: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is code, caught.value.details()
    assert dict(caught.value.trailing_metadata())["reason"] == reason
    assert told in caught.value.details()


def test_what_the_service_and_the_model_are(client: Client):
    assert client.ServerLive(pb.ServerLiveRequest()).live
    assert client.ServerReady(pb.ServerReadyRequest()).ready
    assert "sequence(string_id)" in client.ServerMetadata(pb.ServerMetadataRequest()).extensions
    for version in ("", "1"):
        assert client.ModelReady(pb.ModelReadyRequest(name="colours", version=version)).ready
        about = client.ModelMetadata(pb.ModelMetadataRequest(name="colours", version=version))
        assert [(one.name, one.datatype, list(one.shape)) for one in about.inputs][1] == (
            "frame",
            "UINT8",
            [-1, -1, -1, 3],
        )
        config = client.ModelConfig(pb.ModelConfigRequest(name="colours", version=version)).config
        assert (config.max_batch_size, config.HasField("sequence_batching")) == (0, True)
        assert [one.data_type for one in config.input] == [11, 2, 13]
        assert config.parameters["labels"].string_value == '["red", "green", "blue"]'
    client.ModelInfer(raw_request())
    (counted,) = client.ModelStatistics(pb.ModelStatisticsRequest()).model_stats
    assert (counted.inference_count, counted.inference_stats.success.ns) == (1, 1_000_000)


def test_tensors_travel_raw_or_in_lists_of_their_type(client: Client):
    raw = client.ModelInfer(raw_request())
    assert (raw.id, raw.model_name, raw.model_version) == ("r1", "colours", "1")
    assert raw.parameters["warmup"].string_param == "1/1"
    assert [one.datatype for one in raw.outputs] == ["FP32", "BYTES", "INT64"]
    assert tensor(raw, 0).tobytes() == COLOURS.tobytes()
    request = pb.ModelInferRequest(model_name="colours")
    request.inputs.add(name="frame", datatype="UINT8", shape=FRAMES.shape).contents.uint_contents.extend(
        FRAMES.ravel().tolist()
    )
    typed = client.ModelInfer(request)
    assert not typed.raw_output_contents
    assert np.array(typed.outputs[0].contents.fp32_contents, "f4").tobytes() == COLOURS.tobytes()
    assert list(typed.outputs[2].contents.int64_contents) == [0, 1]
    assert typed.outputs[1].contents.bytes_contents[0] in (b"red", b"green", b"blue")


def test_an_encoded_picture_and_its_best_class(client: Client):
    png = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(png, "PNG")
    request = pb.ModelInferRequest(model_name="colours")
    request.inputs.add(name="image", datatype="BYTES", shape=[1]).contents.bytes_contents.append(png.getvalue())
    request.outputs.add(name="logits").parameters["classification"].int64_param = 1
    best = int(COLOURS[0].argmax())
    told = client.ModelInfer(request).outputs[0]
    name = ("red", "green", "blue")[best]
    assert list(told.contents.bytes_contents) == [f"{COLOURS[0, best]:f}:{best}:{name}".encode()]


def changed(change: Callable[[Any], Any]) -> Any:
    request = raw_request()
    change(request)
    return request


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (changed(lambda r: r.raw_input_contents.append(b"x")), "1 inputs and 2 raw_input_contents"),
        (changed(lambda r: r.inputs[0].contents.uint_contents.append(1)), "has contents, and there are"),
        (changed(lambda r: r.inputs[0].shape.append(2)), "bytes"),
        (changed(lambda r: r.inputs[0].shape.__setitem__(0, -1)), "cannot have the shape"),
        (changed(lambda r: (r.inputs.add(name="frame"), r.raw_input_contents.append(b""))), "came twice"),
        (changed(lambda r: r.outputs.add(name="boxes")), "gives no boxes"),
        (changed(lambda r: r.parameters["x"].Clear()), "has no value"),
        (changed(lambda r: r.parameters["sequence_id"].__setattr__("int64_param", -4)), "sequence_id must be"),
        (changed(lambda r: r.parameters["timestamp"].__setattr__("double_param", float("nan"))), "finite number"),
        (
            pb.ModelInferRequest(model_name="colours", inputs=[{"name": "frame", "datatype": "FP16", "shape": [1]}]),
            "only raw_input_contents can carry",
        ),
        (
            pb.ModelInferRequest(
                model_name="colours",
                inputs=[{"name": "f", "datatype": "INT8", "shape": [1], "contents": {"int_contents": [300]}}],
            ),
            "no INT8",
        ),
    ],
)
def test_a_request_that_makes_no_sense(client: Client, request_: Any, told: str):
    refused(lambda: client.ModelInfer(request_), grpc.StatusCode.INVALID_ARGUMENT, "bad_input", told)


def test_names_that_lead_nowhere(client: Client):
    nowhere = grpc.StatusCode.NOT_FOUND
    for method in ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"):
        request = getattr(pb, f"{method}Request")
        refused(lambda m=method, r=request: getattr(client, m)(r(name="nope")), nowhere, "unknown_model", "nope")
        refused(
            lambda m=method, r=request: getattr(client, m)(r(name="colours", version="7")),
            nowhere,
            "unknown_model",
            "has no version '7'",
        )
    request = changed(lambda r: r.__setattr__("model_name", "nope"))
    refused(lambda: client.ModelInfer(request), nowhere, "unknown_model", "nope")


def test_the_repository(client: Client):
    assert [one.name for one in client.RepositoryIndex(pb.RepositoryIndexRequest()).models] == ["colours", "shapes"]
    assert [one.name for one in client.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models] == ["colours"]
    client.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="colours"))
    assert not client.ServerReady(pb.ServerReadyRequest()).ready
    load = pb.RepositoryModelLoadRequest(model_name="colours")
    client.RepositoryModelLoad(load)
    assert client.ServerReady(pb.ServerReadyRequest()).ready
    load.parameters["config"].string_param = "{}"
    refused(lambda: client.RepositoryModelLoad(load), grpc.StatusCode.INVALID_ARGUMENT, "bad_input", "models.dir")


def test_sequences_interleave_on_one_stream(client: Client):
    values = np.random.default_rng(1).integers(0, 256, (12, 20))
    requests = [
        grey(int(values[s, n]), f"s{s}" if s % 2 else s + 1, f"{s}/{n}", sequence_start=n == 0)
        for n in range(20)
        for s in range(12)
    ]
    answers = list(client.ModelStreamInfer(iter(requests), timeout=WAIT_S))
    assert not [one.error_message for one in answers if one.error_message]
    assert answers[0].infer_response.parameters["triton_final_response"].bool_param
    told: dict[int, list[float]] = {s: [] for s in range(12)}
    for one in answers:
        s, n = map(int, one.infer_response.id.split("/"))
        assert n == len(told[s]), "the order of a sequence is kept"
        told[s].append(float(tensor(one.infer_response, 0)[0, 0]))
    for s, numbers in told.items():
        held = None
        for value, number in zip(values[s], numbers, strict=True):
            row = np.float32(value / 255)
            held = row if held is None else np.float32((held + row) / 2)
            assert number == pytest.approx(held, abs=1e-6)


def test_a_failed_frame_does_not_break_the_stream(client: Client):
    requests = [grey(255, 5, "a"), grey(0, 5, "b", sequence_end=True), grey(0, 5, "late"), raw_request(timeout="soon")]
    requests += [grey(8, 5, "c", sequence_start=True)]
    answers = {one.infer_response.id: one for one in client.ModelStreamInfer(iter(requests), timeout=WAIT_S)}
    assert "begin anew with sequence_start" in answers["late"].error_message
    assert not answers["late"].infer_response.outputs
    assert "timeout must be" in answers["r1"].error_message
    assert [answers[name].error_message for name in "abc"] == ["", "", ""]


def test_a_slow_sequence_holds_up_no_other(client: Client, inference: ColourInference):
    inference.gates["slow"] = threading.Event()
    sent: queue.Queue[Any] = queue.Queue()
    answers = client.ModelStreamInfer(iter(sent.get, None), timeout=WAIT_S)
    for request in (grey(1, "slow", "slow"), grey(1, "fast", "fast"), raw_request()):
        sent.put(request)
    assert {next(answers).infer_response.id, next(answers).infer_response.id} == {"fast", "r1"}
    inference.gates["slow"].set()
    assert next(answers).infer_response.id == "slow"
    sent.put(None)
    assert list(answers) == []


def test_a_stream_has_so_many_requests_under_way_and_no_more(client: Client, inference: ColourInference):
    inference.gates |= {f"s{n}": threading.Event() for n in range(IN_FLIGHT + 40)}
    most = 0
    requests = iter([grey(1, name, name) for name in inference.gates])
    answers = client.ModelStreamInfer(requests, timeout=WAIT_S)
    for gate in inference.gates.values():
        gate.set()
        most = max(most, inference.at_once)
        next(answers)
    assert 1 < most <= IN_FLIGHT
    assert list(answers) == []


def test_a_caller_who_goes_ends_the_work(client: Client, inference: ColourInference):
    inference.gates["held"] = threading.Event()
    answers = client.ModelStreamInfer(iter([grey(1, "held")]))
    until(lambda: inference.at_once == 1)
    answers.cancel()
    until(lambda: inference.at_once == 0)


def until(true: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(WAIT_S * 100):
        if true():
            return
        waited.wait(0.01)
    raise AssertionError("not in time")


def test_messages_can_be_sent_by_ray():
    request = raw_request(sequence_id="x")
    assert pickle.loads(pickle.dumps(request)) == request


def test_every_method_has_a_role():
    service = inference_service(ColourInference())
    assert set(service.roles) == {one.name for one in METHODS}
    assert {name for name, role in service.roles.items() if role == "admin"} == {
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    }


# ---- messages that are none


def mutated(message: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """The message with bytes changed, cut, doubled, moved, or with a piece of another one."""
    data = bytearray(message)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at, to = sorted(chance.choices(range(len(data) + 1), k=2))
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind == 2:
            del data[at:to]
        elif kind == 3:
            data[to:to] = data[at:to]
        elif kind == 4:
            del data[at:]
        else:
            other = chance.choice(others)
            data[at:to] = other[chance.randrange(len(other) + 1) :][: to - at + 8]
    return bytes(data)


def test_ten_thousand_broken_messages_change_nothing(client: Client, inference: ColourInference, caplog):
    typed = pb.ModelInferRequest(model_name="colours", id="t")
    typed.inputs.add(name="frame", datatype="FP32", shape=[1, 3, 1, 1]).contents.fp32_contents.extend([0.1, 0.2, 0.3])
    picture = pb.ModelInferRequest(model_name="colours")
    picture.inputs.add(name="image", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"\xff\xd8", b""])
    classes = raw_request(FRAMES[:, :1, :1])
    classes.outputs.add(name="logits").parameters["classification"].int64_param = 2
    whole = [
        one.SerializeToString()
        for one in (
            typed, picture, classes, grey(3, 9, sequence_start=True), grey(3, "name", sequence_end=True),
            raw_request(FRAMES[:, :1, :1], timestamp=1.5, timeout=1_000_000, priority=1),
        )
    ]  # fmt: skip
    chance = random.Random(6)
    caplog.set_level(logging.CRITICAL, "grpc._cython.cygrpc")  # it tells of every message that it cannot read
    infer = client.raw("ModelInfer")
    codes: dict[Any, int] = {}
    batch: list[Any] = []
    for _ in range(FUZZED // 100):
        batch = [infer.future(mutated(chance.choice(whole), whole, chance), timeout=WAIT_S) for _ in range(100)]
        for call in batch:
            code = call.code()
            codes[code] = codes.get(code, 0) + 1
            assert "its log says more" not in (call.details() or ""), "a bug"
    assert {code.name for code in codes} == {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
    assert codes[grpc.StatusCode.OK] > 100, "some are still valid"
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 1000, "some are understood and refused"
    assert tensor(client.ModelInfer(raw_request()), 0).tobytes() == COLOURS.tobytes()
    assert inference.at_once == 0
