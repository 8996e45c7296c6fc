"""Who may do what: every route of the HTTP door and every method of the gRPC door, for every kind of caller.

The tables below say who may in words of their own, not the code's; a route or method that they do not name fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from google.protobuf import message_factory
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from services.feed import Hub
from services.http.app import http_app
from services.jobs import JobRunner, local_jobs
from services.locks.callers import Locks
from services.locks.tokens import Tokens
from services.manager import StreamManager
from services.rpc.open_inference import inference_service
from services.rpc.server import GrpcDoor, RpcService
from services.rpc.streams import stream_service
from services.settings import AuthSettings, JobsSettings, Settings, StoreSettings
from services.store import MemoryStore
from tests.unit.services.http_kit import MODELS, serving
from tests.unit.services.inference_kit import ColourInference

# who may: everybody, or a token of at least this role. Then what a token of other streams may (`o`) or not (`-`).
HTTP = """
GET /                                              everybody o
MOUNT /static                                      everybody o
GET /openapi.json                                  viewer    o
HEAD /openapi.json                                 viewer    o
GET /healthz                                       everybody o
GET /metrics                                       viewer    -
SOCKET /v1/ws                                      viewer    o
POST /v1/login                                     everybody o
GET /v1/login                                      viewer    o
DELETE /v1/login                                   everybody o
POST /v1/tokens                                    admin     -
GET /v1/tokens                                     admin     -
DELETE /v1/tokens/{token}                          admin     -
POST /v1/streams                                   operator  -
GET /v1/streams                                    viewer    o
POST /v1/streams:probe                             operator  o
GET /v1/streams/{stream_id}                        viewer    -
PATCH /v1/streams/{stream_id}                      operator  -
DELETE /v1/streams/{stream_id}                     operator  -
POST /v1/streams/{stream_id}/start                 operator  -
POST /v1/streams/{stream_id}/stop                  operator  -
POST /v1/streams/{stream_id}/pause                 operator  -
POST /v1/streams/{stream_id}/resume                operator  -
POST /v1/streams/{stream_id}/restart               operator  -
GET /v1/streams/{stream_id}/status                 viewer    -
GET /v1/streams/{stream_id}/stats                  viewer    -
GET /v1/streams/{stream_id}/scores                 viewer    -
GET /v1/streams/{stream_id}/latest.jpg             viewer    -
GET /v1/streams/{stream_id}/mjpeg                  viewer    -
GET /v1/streams/{stream_id}/events                 viewer    -
GET /v1/sinks                                      admin     -
POST /v1/sinks/{name}/redeliver                    admin     -
GET /v1/events                                     viewer    o
GET /v1/events/{event_id}                          viewer    o
GET /v1/stats                                      viewer    o
GET /v1/models                                     viewer    o
GET /v1/replicas                                   viewer    o
GET /v1/config/schema.json                         viewer    o
POST /v1/jobs                                      operator  o
GET /v1/jobs                                       viewer    o
GET /v1/jobs/{job_id}                              viewer    o
DELETE /v1/jobs/{job_id}                           operator  o
GET /v1/jobs/{job_id}/events                       viewer    o
GET /v1/jobs/{job_id}/annotated.mp4                viewer    o
GET /v2                                            viewer    o
GET /v2/health/live                                everybody o
GET /v2/health/ready                               everybody o
GET /v2/models/stats                               viewer    o
GET /v2/models/{model}                             viewer    o
GET /v2/models/{model}/ready                       viewer    o
GET /v2/models/{model}/config                      viewer    o
GET /v2/models/{model}/stats                       viewer    o
POST /v2/models/{model}/infer                      operator  o
GET /v2/models/{model}/versions/{version}          viewer    o
GET /v2/models/{model}/versions/{version}/ready    viewer    o
GET /v2/models/{model}/versions/{version}/config   viewer    o
GET /v2/models/{model}/versions/{version}/stats    viewer    o
POST /v2/models/{model}/versions/{version}/infer   operator  o
POST /v2/repository/index                          viewer    o
POST /v2/repository/models/{model}/load            admin     -
POST /v2/repository/models/{model}/unload          admin     -
"""
RPC = """
tsm.v1.StreamService/CreateStream                          operator -
tsm.v1.StreamService/GetStream                             viewer   -
tsm.v1.StreamService/ListStreams                           viewer   o
tsm.v1.StreamService/UpdateStream                          operator -
tsm.v1.StreamService/DeleteStream                          operator -
tsm.v1.StreamService/StartStream                           operator -
tsm.v1.StreamService/StopStream                            operator -
tsm.v1.StreamService/PauseStream                           operator -
tsm.v1.StreamService/ResumeStream                          operator -
tsm.v1.StreamService/RestartStream                         operator -
tsm.v1.StreamService/WatchStreams                          viewer   -
tsm.v1.StreamService/ReceiveEvents                         viewer   -
inference.GRPCInferenceService/ServerLive                  viewer   o
inference.GRPCInferenceService/ServerReady                 viewer   o
inference.GRPCInferenceService/ModelReady                  viewer   o
inference.GRPCInferenceService/ServerMetadata              viewer   o
inference.GRPCInferenceService/ModelMetadata               viewer   o
inference.GRPCInferenceService/ModelConfig                 viewer   o
inference.GRPCInferenceService/ModelStatistics             viewer   o
inference.GRPCInferenceService/RepositoryIndex             viewer   o
inference.GRPCInferenceService/ModelInfer                  operator o
inference.GRPCInferenceService/ModelStreamInfer            operator o
inference.GRPCInferenceService/RepositoryModelLoad         admin    -
inference.GRPCInferenceService/RepositoryModelUnload       admin    -
"""
ROLES = ("everybody", "viewer", "operator", "admin")
CALLERS = ("nobody", "stranger", "viewer", "operator", "admin", "other viewer", "other operator")
STREAM = "door-1"
BODIES: dict[str, Any] = {"POST /v1/streams": {"id": STREAM, "source": {"uri": "rtsp://127.0.0.1:9/cam"}}}


def table(text: str, words: int) -> dict[str, tuple[str, bool]]:
    rows = [line.split() for line in text.strip().splitlines()]
    return {" ".join(row[:words]): (row[words], row[words + 1] == "o") for row in rows}


def may(policy: tuple[str, bool], caller: str) -> bool:
    """Whether the table lets the caller do it."""
    least, others = policy
    if least == "everybody":
        return True
    if caller in ("nobody", "stranger"):
        return False
    return ROLES.index(caller.split()[-1]) >= ROLES.index(least) and (others or not caller.startswith("other"))


HTTP_TABLE, RPC_TABLE = table(HTTP, 2), table(RPC, 1)


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> StreamManager:
    folder = tmp_path_factory.mktemp("jobs")
    settings = Settings(auth=AuthSettings(required="always", failures_per_min=1e6), jobs=JobsSettings(dir=folder))
    return StreamManager(MemoryStore(StoreSettings()), settings, models=MODELS)


@pytest.fixture(scope="module")
def headers(manager: StreamManager) -> dict[str, dict[str, str]]:
    """What every caller sends."""
    tokens = Tokens(manager.store)
    made: dict[str, dict[str, str]] = {"nobody": {}, "stranger": {"authorization": "Bearer tsm_strangers_own"}}
    for caller in CALLERS[2:]:
        streams = ("other-*",) if caller.startswith("other") else None
        _, text = tokens.create(caller.replace(" ", "-") + "-1", caller.split()[-1], streams)  # type: ignore[arg-type]
        made[caller] = {"authorization": f"Bearer {text}"}
    return made


@pytest.fixture(scope="module")
def behind(manager: StreamManager) -> dict[str, Any]:
    """All that can be behind the HTTP door."""
    runner = JobRunner(manager.store, manager.settings, "runner-1")
    return {"inference": ColourInference(), "jobs": local_jobs(runner)}


@pytest.fixture(scope="module")
def url(manager: StreamManager, behind: dict[str, Any]) -> Iterator[str]:
    with serving(manager, **behind) as url:
        yield url


def routes_of(app: FastAPI) -> set[str]:
    """All that the door answers to, as the table writes it."""
    found = set()
    for route in iter_route_contexts(app.routes):
        kind = "MOUNT" if type(route.original_route).__name__ == "Mount" else "SOCKET"
        found |= {f"{method} {route.path}" for method in route.methods or (kind,)}
    return found


def test_every_route_is_in_the_table(manager: StreamManager, behind: dict[str, Any]) -> None:
    app = http_app(manager, **behind)
    assert routes_of(app) == HTTP_TABLE.keys()
    told = app.openapi()["paths"]
    assert {f"{method.upper()} {path}" for path, methods in told.items() for method in methods} <= HTTP_TABLE.keys()


@pytest.mark.parametrize("caller", CALLERS)
def test_who_may_do_what_over_http(url: str, headers: dict[str, dict[str, str]], caller: str) -> None:
    wrong = []
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for route, policy in HTTP_TABLE.items():
            method, path = route.split()
            path = path.replace("{stream_id}", STREAM).replace("{", "").replace("}", "")
            if method == "SOCKET":
                status = _socket(url.replace("http", "ws") + path, headers[caller])
            else:
                path += "/app.js" if method == "MOUNT" else ""
                verb = "GET" if method == "MOUNT" else method
                answer = client.request(verb, path, headers=headers[caller], json=BODIES.get(route))
                status = answer.status_code
                if verb == "POST" and answer.status_code == 201:
                    client.delete(f"/v1/streams/{STREAM}", headers=headers["admin"])
            refused = {"nobody": 401, "stranger": 401}.get(caller, 403)
            if (status != refused) != may(policy, caller) or status in ({401, 403} - {refused}) or status == 500:
                wrong.append(f"{route}: {status}")
    assert not wrong


def _socket(url: str, headers: dict[str, str]) -> int:
    try:
        with connect(url, additional_headers=headers, open_timeout=60) as socket:
            socket.recv(60)
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


# gRPC


@pytest.fixture(scope="module")
def services(manager: StreamManager) -> list[RpcService]:
    return [stream_service(manager, Hub(manager)), inference_service(ColourInference())]


def test_every_method_is_in_the_table(services: list[RpcService]) -> None:
    found = {f"{each.descriptor.full_name}/{method.name}" for each in services for method in each.descriptor.methods}
    assert found == RPC_TABLE.keys()


@pytest.mark.parametrize("caller", CALLERS)
def test_who_may_do_what_over_grpc(
    manager: StreamManager, services: list[RpcService], headers: dict[str, dict[str, str]], caller: str
) -> None:
    wrong = []
    door = GrpcDoor("127.0.0.1", 0, services, Locks(manager.store, manager.settings))
    try:
        with grpc.insecure_channel(f"127.0.0.1:{door.port}") as channel:
            for service in services:
                for method in service.descriptor.methods:
                    name = f"{service.descriptor.full_name}/{method.name}"
                    code = _called(channel, name, method, tuple(headers[caller].items()))
                    refused = "PERMISSION_DENIED" if caller not in ("nobody", "stranger") else "UNAUTHENTICATED"
                    both = {"PERMISSION_DENIED", "UNAUTHENTICATED"}
                    if (code != refused) != may(RPC_TABLE[name], caller) or code in both - {refused}:
                        wrong.append(f"{name}: {code}")
    finally:
        door.stop()
    assert not wrong


def _called(channel: grpc.Channel, name: str, method: Any, metadata: tuple[tuple[str, str], ...]) -> str:
    """The code that a call ends with; about a stream of which there is none, so that it ends."""
    request = _about(method)
    kinds = ["stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming)]
    call = getattr(channel, "_".join(kinds))(f"/{name}")
    try:
        answer = call(iter(()) if method.client_streaming else request, metadata=metadata, timeout=10)
        if method.server_streaming:
            list(answer)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _about(method: Any) -> bytes:
    message = message_factory.GetMessageClass(method.input_type)()
    if hasattr(message, "stream_ids"):
        message.stream_ids.append(STREAM)
    elif hasattr(message, "stream_id"):
        message.stream_id = STREAM
    elif hasattr(message, "stream"):
        message.stream.id = STREAM
    found: bytes = message.SerializeToString()
    return found
