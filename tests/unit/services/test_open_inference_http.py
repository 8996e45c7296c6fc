"""The Open Inference Protocol over HTTP: what travels, what is refused, and how errors look."""

import asyncio
import gzip
import json
import threading
import zlib
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from services import oip
from services.http.open_inference import MAX_JSON_BYTES
from services.locks.callers import Caller, Forbidden
from services.manager import StreamManager
from services.settings import ServerSettings, Settings, StoreSettings
from services.store import MemoryStore
from services.tensors import to_raw
from tests.unit.services.http_kit import MODELS, serving
from tests.unit.services.inference_kit import ColourInference

INFER = "/v2/models/colours/infer"
LIMIT = 1 << 20
FRAMES = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
COLOURS = (FRAMES.mean((1, 2)) / 255).astype("f4")
TENSOR = {"name": "frame", "shape": list(FRAMES.shape), "datatype": "UINT8"}


@pytest.fixture(scope="module")
def shared() -> ColourInference:
    return ColourInference()


@pytest.fixture
def inference(shared: ColourInference) -> ColourInference:
    shared.reset()
    return shared


@pytest.fixture(scope="module")
def address(shared: ColourInference) -> Iterator[str]:
    settings = Settings(server=ServerSettings(max_infer_bytes=LIMIT, max_body_bytes=1 << 16))
    manager = StreamManager(MemoryStore(StoreSettings()), settings, models=MODELS)
    with serving(manager, shared) as address:
        yield address


@pytest.fixture
def client(address: str, inference: ColourInference) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, trust_env=False) as client:
        yield client


def ask(**more: object) -> dict:
    return {"inputs": [TENSOR | {"data": FRAMES.tolist()}], **more}


def binary(head: dict, *tensors: np.ndarray) -> dict:
    text = json.dumps(head).encode()
    return {
        "content": text + b"".join(map(to_raw, tensors)),
        "headers": {"Inference-Header-Content-Length": str(len(text))},
    }


def refused(answer: httpx.Response, status: int, reason: str, told: str = "") -> None:
    assert (answer.status_code, answer.headers.get("tsm-reason")) == (status, reason), answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    assert told in answer.json()["error"]


def test_what_the_service_and_the_model_are(client: httpx.Client):
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    server = client.get("/v2").json()
    assert server["name"] == "tsm-live"
    assert {"binary_tensor_data", "classification", "sequence(string_id)", "statistics"} <= set(server["extensions"])
    for path in ("/v2/models/colours", "/v2/models/colours/versions/1"):
        about = client.get(path).json()
        assert about["inputs"][1] == {"name": "frame", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}
        assert client.get(f"{path}/ready").json() == {"name": "colours", "ready": True}
        config = client.get(f"{path}/config").json()
        assert config["input"][2] == {"name": "image", "data_type": "TYPE_STRING", "dims": [-1], "optional": True}
        assert (config["max_batch_size"], config["sequence_batching"]) == (0, {})
        assert json.loads(config["parameters"]["labels"]["string_value"]) == ["red", "green", "blue"]
        assert client.get(f"{path}/stats").json()["model_stats"][0]["inference_stats"]["fail"] == {"count": 0, "ns": 0}


def test_json_in_json_out_is_exact(client: httpx.Client):
    answer = client.post(INFER, json=ask(id="a7")).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a7", "colours", "1")
    assert answer["parameters"] == {"warmup": "1/1"}
    logits, label, index = answer["outputs"]
    assert (logits["datatype"], logits["shape"]) == ("FP32", [2, 3])
    assert np.array(logits["data"], "f4").tobytes() == COLOURS.tobytes()
    assert label["data"] == [("red", "green", "blue")[row.argmax()] for row in COLOURS]
    assert index == {"name": "frame_index", "datatype": "INT64", "shape": [2], "data": [0, 1]}
    flat = client.post(INFER, json={"inputs": [TENSOR | {"data": FRAMES.ravel().tolist()}]}).json()
    assert flat["outputs"] == answer["outputs"]
    assert "id" not in flat


def test_bytes_behind_the_json_both_ways(client: httpx.Client):
    tensor = TENSOR | {"parameters": {"binary_data_size": FRAMES.size}}
    for head in (
        {"inputs": [tensor], "parameters": {"binary_data_output": True}},
        {"inputs": [tensor], "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]},
    ):
        answer = client.post(INFER, **binary(head, FRAMES))
        assert answer.headers["content-type"] == "application/octet-stream"
        length = int(answer.headers["inference-header-content-length"])
        told = json.loads(answer.content[:length])["outputs"][0]
        assert (told["name"], told["parameters"]) == ("logits", {"binary_data_size": 24})
        assert answer.content[length : length + 24] == COLOURS.tobytes()
    mixed = {
        "inputs": [tensor],
        "outputs": [
            {"name": "label"},
            {"name": "logits", "parameters": {"binary_data": False}},
            {"name": "frame_index"},
        ],
        "parameters": {"binary_data_output": True},
    }
    answer = client.post(INFER, **binary(mixed, FRAMES))
    outputs = json.loads(answer.content[: int(answer.headers["inference-header-content-length"])])["outputs"]
    assert [(one["name"], "data" in one) for one in outputs] == [
        ("label", False),
        ("logits", True),
        ("frame_index", False),
    ]


def test_one_input_in_bytes_and_one_in_json(client: httpx.Client):
    head = {
        "inputs": [
            {"name": "frame", "shape": [2], "datatype": "BOOL", "data": [True, False]},
            {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}},
        ]
    }
    refused(
        client.post(INFER, **binary(head, np.array([b"ab"], object))), 400, "bad_input", "one input is needed, got 2"
    )


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_are_unpacked_and_answers_packed(client: httpx.Client, name: str, pack):
    frames = np.repeat(FRAMES, 40, axis=0)
    head = {"inputs": [{**TENSOR, "shape": list(frames.shape), "parameters": {"binary_data_size": frames.size}}]}
    sent = binary(head, frames)
    sent["content"] = pack(sent["content"])
    sent["headers"] |= {"Content-Encoding": name, "Accept-Encoding": name}
    answer = client.post(INFER, **sent)
    assert answer.headers["content-encoding"] == name
    assert np.array(answer.json()["outputs"][0]["data"], "f4").tobytes() == np.repeat(COLOURS, 40, axis=0).tobytes()
    sent["headers"]["Accept-Encoding"] = f"{name};q=0, identity"
    assert "content-encoding" not in client.post(INFER, **sent).headers


def test_a_packed_bomb_is_refused_while_it_is_small(client: httpx.Client):
    bomb = zlib.compress(bytes(200 * LIMIT), 9)
    assert len(bomb) < LIMIT
    answer = client.post(INFER, content=bomb, headers={"Content-Encoding": "deflate"})
    refused(answer, 413, "body_too_large", "server.max_infer_bytes")
    for broken in (zlib.compress(b"{}")[:-1], zlib.compress(b"{}") + b"x", b"{}"):
        answer = client.post(INFER, content=broken, headers={"Content-Encoding": "deflate"})
        refused(answer, 400, "bad_input", "deflate")
    answer = client.post(INFER, content=b"{}", headers={"Content-Encoding": "br"})
    refused(answer, 400, "bad_input", "gzip and deflate")


def test_the_limit_of_a_request_is_its_own(client: httpx.Client):
    frames = np.zeros((1, 300, 300, 3), np.uint8)
    head = {"inputs": [{**TENSOR, "shape": list(frames.shape), "parameters": {"binary_data_size": frames.size}}]}
    assert client.post(INFER, **binary(head, frames)).status_code == 200, "above max_body_bytes, below max_infer_bytes"
    refused(client.post(INFER, content=bytes(LIMIT + 1)), 413, "body_too_large", "server.max_infer_bytes")
    refused(client.post("/v2/repository/index", content=bytes(70_000)), 413, "body_too_large", "server.max_body_bytes")


def test_json_may_not_be_as_large_as_bytes(inference: ColourInference):
    settings = Settings(server=ServerSettings(max_infer_bytes=2 * MAX_JSON_BYTES))
    manager = StreamManager(MemoryStore(StoreSettings()), settings, models=MODELS)
    with serving(manager, inference) as address:
        answer = httpx.post(address + INFER, content=b"[" * (MAX_JSON_BYTES + 1), trust_env=False, timeout=30)
        refused(answer, 413, "body_too_large", "binary data")


def test_the_best_classes_of_an_output(client: httpx.Client):
    outputs = [{"name": "logits", "parameters": {"classification": 2}}]
    told = client.post(INFER, json=ask(outputs=outputs)).json()["outputs"][0]
    assert (told["datatype"], told["shape"]) == ("BYTES", [2, 2])
    order = np.argsort(-COLOURS, axis=1)[:, :2]
    names = ("red", "green", "blue")
    assert told["data"] == [f"{COLOURS[n, k]:f}:{k}:{names[k]}" for n in range(2) for k in order[n]]
    outputs[0]["parameters"]["classification"] = 99
    assert client.post(INFER, json=ask(outputs=outputs)).json()["outputs"][0]["shape"] == [2, 3]
    outputs[0]["name"] = "label"
    refused(client.post(INFER, json=ask(outputs=outputs)), 400, "bad_input", "those that have are logits")


def test_frames_of_a_sequence(client: httpx.Client, inference: ColourInference):
    frames = [np.full((1, 1, 1, 3), value, np.uint8) for value in (255, 0, 0)]

    def push(frame: np.ndarray, **parameters: object) -> list:
        tensor = {"name": "frame", "shape": [1, 1, 1, 3], "datatype": "UINT8", "data": frame.tolist()}
        answer = client.post(INFER, json={"inputs": [tensor], "parameters": parameters})
        assert answer.status_code == 200, answer.text
        return answer.json()["outputs"][0]["data"]

    for name in (2**64 - 1, "door 1"):
        assert (
            push(frames[0], sequence_id=name, sequence_start=True, timestamp=1.5, frame_number=0, timeout=2_000_000)[0]
            == 1.0
        )
        assert push(frames[1], sequence_id=name, priority=3, mine="ignored")[0] == 0.5
        assert push(frames[2], sequence_id=name, sequence_end=True)[0] == 0.25
    assert push(frames[0], sequence_id=0) == push(frames[0], sequence_id="") == [1.0, 1.0, 1.0]
    first, second = inference.seen[:2]
    assert first.sequence is not None
    assert (first.sequence.id, first.sequence.start, first.sequence.end) == (str(2**64 - 1), True, False)
    assert (first.timestamp_s, first.frame_number, first.timeout_s) == (1.5, 0, 2.0)
    assert (second.timestamp_s, second.frame_number, second.timeout_s) == (None, None, 30.0)
    late = {"inputs": ask()["inputs"], "parameters": {"sequence_id": "door 1"}}
    refused(client.post(INFER, json=late), 404, "unknown_sequence", "sequence_start")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"parameters": {"sequence_id": -1}}, "sequence_id must be"),
        ({"parameters": {"sequence_id": 2**64}}, "sequence_id must be"),
        ({"parameters": {"sequence_id": True}}, "sequence_id must be"),
        ({"parameters": {"sequence_id": "x" * 129}}, "at most 128 bytes"),
        ({"parameters": {"sequence_id": "a\nb"}}, "printable"),
        ({"parameters": {"sequence_start": True}}, "need a sequence_id"),
        ({"parameters": {"sequence_id": 1, "sequence_end": "yes"}}, "must be true or false"),
        ({"parameters": {"frame_number": -1}}, "frame_number must be"),
        ({"parameters": {"timeout": -5}}, "timeout must be"),
        ({"parameters": {"priority": 1.5}}, "priority must be"),
        ({"parameters": {"timestamp": "noon"}}, "finite number of seconds"),
        ({"parameters": {"timestamp": 10**400}}, "finite number of seconds"),
        ({"parameters": {"binary_data_output": 1}}, "must be true or false"),
        ({"parameters": {"x": None}}, "parameters.x"),
        ({"parameters": []}, "parameters"),
        ({"id": 7}, "id: "),
        ({"inputs": []}, "one input is needed, got 0"),
        ({"inputs": [TENSOR]}, "shared memory is not offered"),
        ({"inputs": [TENSOR | {"data": []}]}, "0 elements"),
        ({"inputs": [TENSOR | {"data": FRAMES.tolist(), "parameters": {"binary_data_size": 0}}]}, "has data and"),
        ({"inputs": [TENSOR | {"parameters": {"binary_data_size": 1}}]}, "not within the 0 bytes"),
        ({"inputs": [TENSOR | {"parameters": {"binary_data_size": True}}]}, "not within"),
        ({"inputs": [TENSOR | {"data": FRAMES.tolist()}] * 2}, "came twice"),
        ({"inputs": [TENSOR | {"data": 1}]}, "inputs.0.data"),
        ({"inputs": [TENSOR | {"shape": ["2"], "data": []}]}, "inputs.0.shape.0"),
        ({"inputs": [TENSOR | {"name": "\ud800", "data": []}]}, "inputs.0.name"),
        ({"outputs": [{"name": "logits"}, {"name": "logits"}]}, "asked for twice"),
        ({"outputs": [{"name": "boxes"}]}, "gives no boxes"),
        ({"outputs": [{"name": "logits", "parameters": {"classification": 0}}]}, "1 or more"),
    ],
)
def test_a_request_that_makes_no_sense(client: httpx.Client, change: dict, told: str):
    body = json.dumps(ask() | change).encode()
    refused(client.post(INFER, content=body), 400, "bad_input", told)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "inputs: Field required"),
        (b"[]", "does not fit"),
        (b"nothing", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "not JSON"),
        (json.dumps({"inputs": [{"name": "frame", "shape": [1], "datatype": "FP32", "data": [float("nan")]}]}).encode(),
         "NaN is no JSON number"),
        (b'{"inputs": [{"name": "frame", "shape": [1], "datatype": "FP32", "data": [1e999]}]}', "not finite"),
    ],
)  # fmt: skip
def test_a_body_that_is_none(client: httpx.Client, body: bytes, told: str):
    refused(client.post(INFER, content=body), 400, "bad_input", told)


@pytest.mark.parametrize("length", ["-1", "x", "3.0", "99", "9" * 5000, "²"])
def test_a_wrong_length_of_the_json(client: httpx.Client, length: str):
    headers = {"Inference-Header-Content-Length": length.encode()}
    refused(client.post(INFER, content=b"{}", headers=headers), 400, "bad_input")


def test_bytes_that_belong_to_nothing(client: httpx.Client):
    sent = binary({"inputs": [TENSOR | {"parameters": {"binary_data_size": FRAMES.size}}]}, FRAMES)
    sent["content"] += b"x"
    refused(client.post(INFER, **sent), 400, "bad_input", "1 bytes behind the JSON")


def test_addresses_that_lead_nowhere(client: httpx.Client):
    for path in ("/v2/models/nope", "/v2/models/nope/ready", "/v2/models/nope/config", "/v2/models/nope/stats"):
        refused(client.get(path), 404, "unknown_model", "colours")
    for path in ("", "/ready", "/config", "/stats"):
        refused(client.get(f"/v2/models/colours/versions/2{path}"), 404, "unknown_model", "has no version '2'")
    refused(client.post("/v2/models/nope/infer", json=ask()), 404, "unknown_model")
    refused(client.get("/v2/nope"), 404, "unknown_route")
    refused(client.delete("/v2"), 405, "method_not_allowed")
    assert client.get("/v1/nope").json()["type"] == "urn:tsm:problem:unknown_route", "/v1 keeps its own"


def test_the_repository(client: httpx.Client, inference: ColourInference):
    names = {"colours": "READY", "shapes": "UNAVAILABLE"}
    assert {one["name"]: one["state"] for one in client.post("/v2/repository/index").json()} == names
    assert [one["name"] for one in client.post("/v2/repository/index", json={"ready": True}).json()] == ["colours"]
    refused(client.post("/v2/repository/index", json={"ready": 1}), 400, "bad_input", "ready")
    load = "/v2/repository/models/colours/load"
    refused(client.post(load, json={"parameters": {"config": "{}"}}), 400, "bad_input", "models.dir")
    refused(client.post(load, json={"parameters": {"file:1/model": "x"}}), 400, "bad_input", "models.dir")
    refused(client.post("/v2/repository/models/nope/load"), 404, "unknown_model")
    inference.held["1"] = np.zeros(3)
    refused(client.post("/v2/repository/models/colours/unload"), 409, "model_in_use")
    inference.held.clear()
    unloaded = client.post("/v2/repository/models/colours/unload", json={"parameters": {"unload_dependents": True}})
    assert (unloaded.status_code, unloaded.json()) == (200, {})
    refused(client.get("/v2/health/ready"), 503, "model_not_ready")
    refused(client.get("/v2/models/colours/ready"), 404, "unknown_model")
    assert client.post(load).status_code == 200
    assert client.get("/v2/health/ready").status_code == 200


def test_statistics_count(client: httpx.Client):
    client.post(INFER, json=ask())
    (one,) = client.get("/v2/models/stats").json()["model_stats"]
    assert (one["name"], one["inference_count"], one["inference_stats"]["success"]) == (
        "colours",
        1,
        {"count": 1, "ns": 1_000_000},
    )


def test_a_limited_caller_pushes_to_its_own_sequences_alone(inference: ColourInference):
    caller = Caller("yard", "operator", ("yard-*",))

    async def push(sequence: str) -> None:
        call = oip.Call("colours", "", "", {"frame": FRAMES}, {"sequence_id": sequence})
        await oip.infer(inference, call, caller)

    asyncio.run(push("yard-1"))
    asyncio.run(push(""))
    with pytest.raises(Forbidden, match="not to 'door-1'"):
        asyncio.run(push("door-1"))
    assert len(inference.seen) == 2


def test_a_bug_is_told_without_its_text(client: httpx.Client, inference: ColourInference, caplog):
    inference.held["x"] = np.zeros(5, "f4")  # of another shape than a row
    answer = client.post(INFER, json=ask(parameters={"sequence_id": "x"}))
    refused(answer, 500, "internal_error", "its log says more")
    assert "broadcast" not in answer.text


def test_requests_run_side_by_side(client: httpx.Client, inference: ColourInference):
    inference.gates["slow"] = threading.Event()
    answers: list[int] = []
    slow = threading.Thread(
        target=lambda: answers.append(
            client.post(INFER, json=ask(parameters={"sequence_id": "slow"}), timeout=30).status_code
        )
    )
    slow.start()
    assert client.post(INFER, json=ask(parameters={"sequence_id": "fast"})).status_code == 200
    assert not answers
    inference.gates["slow"].set()
    slow.join(20)
    assert answers == [200]


def test_the_schema_has_every_route(client: httpx.Client):
    paths = client.get("/openapi.json").json()["paths"]
    body = paths[INFER.replace("colours", "{model}")]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/octet-stream"}
    assert "$ref" not in json.dumps(body)
    answers = paths[INFER.replace("colours", "{model}")]["post"]["responses"]
    assert set(answers["200"]["content"]) == set(body)
    assert answers["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/InferenceError")
    assert paths["/v2/repository/models/{model}/load"]["post"]["x-tsm-role"] == "admin"
    assert {"model", "version"} == {
        one["name"] for one in paths["/v2/models/{model}/versions/{version}"]["get"]["parameters"]
    }
