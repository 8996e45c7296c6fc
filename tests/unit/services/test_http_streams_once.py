"""Idempotency-Key: a request that is sent again is carried out once."""

import base64
import threading
from collections.abc import Iterator

import httpx
import pytest
from fastapi import Request, Response
from pydantic import SecretStr

from services.http import idempotency
from services.http.idempotency import KIND, KeyInFlight, Once
from services.manager import StreamManager
from services.settings import Settings, StoreSettings
from services.store import RedisStore
from tests.unit.services.http_kit import CANARY, MODELS, serving

CAMERA = {"source": {"uri": "rtsp://127.0.0.1:9/cam", "username": "eye", "password": CANARY}}
KEY = SecretStr(base64.b64encode(bytes(32)).decode())


@pytest.fixture
def manager(valkey_url: str, request: pytest.FixtureRequest) -> Iterator[StreamManager]:
    store = RedisStore(StoreSettings(url=valkey_url, prefix=f"{request.node.name}:", encryption_key=KEY))
    yield StreamManager(store, Settings(), models=MODELS)
    store.close()


@pytest.fixture
def client(manager: StreamManager) -> Iterator[httpx.Client]:
    with serving(manager) as address, httpx.Client(base_url=address, trust_env=False) as client:
        yield client


def post(client: httpx.Client, key: str, body: dict = CAMERA, probe: str = "false") -> httpx.Response:
    return client.post(f"/v1/streams?probe={probe}", json=body, headers={"Idempotency-Key": key})


def test_the_second_time_the_first_answer_comes_back(client: httpx.Client):
    first, again = post(client, "k1"), post(client, "k1")
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json(), "the id was made up once"
    assert again.headers["etag"] == first.headers["etag"]
    assert again.headers["content-type"] == first.headers["content-type"]
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (None, "true")
    assert post(client, "k2").json()["id"] != first.json()["id"]
    assert len(client.get("/v1/streams").json()["streams"]) == 2


def test_a_key_belongs_to_one_request(client: httpx.Client):
    post(client, "k1")
    other = {"source": CAMERA["source"] | {"password": "another"}}
    refused = post(client, "k1", other)
    assert (refused.status_code, refused.json()["reason"]) == (422, "idempotency_key_reused")
    assert post(client, "k1", probe="no").status_code == 201, "no is false: the same request"
    assert len(client.get("/v1/streams").json()["streams"]) == 1


def test_an_error_changed_nothing_and_is_not_kept(client: httpx.Client):
    refused = post(client, "k1", CAMERA | {"models": [{"name": "gpt"}]})
    assert refused.status_code == 422
    assert post(client, "k1").status_code == 201
    assert post(client, "").status_code == 422
    assert post(client, "k" * 300).status_code == 422


def test_while_the_first_is_not_answered_the_second_waits_its_turn(manager: StreamManager):
    once, entered, go = Once(manager.store), threading.Event(), threading.Event()
    request = Request({"type": "http", "path": "/v1/x", "headers": [], "server": ("h", 1), "query_string": b""})

    def slow() -> Response:
        entered.set()
        assert go.wait(20)
        return Response("done", 202)

    thread = threading.Thread(target=once.answer, args=(request, "k", 1, slow))
    thread.start()
    assert entered.wait(20)
    with pytest.raises(KeyInFlight):
        once.answer(request, "k", 1, slow)
    go.set()
    thread.join(20)
    assert once.answer(request, "k", 1, slow).status_code == 202


def test_what_is_kept_is_bounded_and_holds_no_secret(
    client: httpx.Client, manager: StreamManager, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(idempotency, "KEPT", 3)
    first = [post(client, f"key-{number}") for number in range(5)]
    held = manager.store.documents(KIND)
    assert len(held) == 3
    assert CANARY not in str(held)
    assert "key-" not in str(held)
    assert post(client, "key-4").json() == first[4].json()
    assert post(client, "key-0").json() != first[0].json(), "the oldest went"
