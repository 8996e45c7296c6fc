"""Changes of a stream over HTTP: entity tags, two who change at once, and what begins the source anew."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from services.manager import StreamManager
from services.schemas import StreamStatus
from services.settings import Settings, StoreSettings
from services.store import RedisStore
from tests.unit.services.http_kit import MODELS, serving

CAMERA = {"id": "door", "source": {"uri": "rtsp://127.0.0.1:9/cam"}}


@pytest.fixture
def manager(valkey_url: str, request: pytest.FixtureRequest) -> Iterator[StreamManager]:
    store = RedisStore(StoreSettings(url=valkey_url, prefix=f"{request.node.name}:"))
    yield StreamManager(store, Settings(), models=MODELS)
    store.close()


@pytest.fixture
def client(manager: StreamManager) -> Iterator[httpx.Client]:
    with serving(manager) as address, httpx.Client(base_url=address, trust_env=False) as client:
        yield client


def add(client: httpx.Client) -> httpx.Response:
    answer = client.post("/v1/streams?probe=false", json=CAMERA)
    assert answer.status_code == 201, answer.text
    return answer


def test_the_tag_follows_the_specification_and_not_the_status(client: httpx.Client, manager: StreamManager):
    tag = add(client).headers["etag"]
    assert tag.startswith('"')
    assert client.get("/v1/streams/door").headers["etag"] == tag
    manager.store.publish(manager.store.assign("door", "r1"), status=StreamStatus(state="RUNNING", since=1.0))
    assert client.get("/v1/streams/door").headers["etag"] == tag
    assert client.patch("/v1/streams/door", json={}).headers["etag"] == tag, "nothing was changed"
    renamed = client.patch("/v1/streams/door", json={"name": "Door"})
    assert renamed.headers["etag"] != tag
    assert renamed.headers["etag"] == client.get("/v1/streams/door").headers["etag"]
    client.post("/v1/streams/door/stop")
    assert client.get("/v1/streams/door").headers["etag"] != renamed.headers["etag"]


def test_a_change_of_what_another_has_changed_is_refused(client: httpx.Client):
    tag = add(client).headers["etag"]
    first = client.patch("/v1/streams/door", json={"name": "A"}, headers={"If-Match": f'"other", {tag}'})
    assert first.status_code == 200
    for refused in (
        client.patch("/v1/streams/door", json={"name": "B"}, headers={"If-Match": tag}),
        client.delete("/v1/streams/door", headers={"If-Match": tag}),
        client.patch("/v1/streams/door", json={"name": "B"}, headers={"If-Match": f"W/{first.headers['etag']}"}),
    ):
        assert (refused.status_code, refused.json()["reason"]) == (412, "stream_changed")
        assert "read it again" in refused.json()["detail"]
    assert client.get("/v1/streams/door").json()["name"] == "A"
    assert client.patch("/v1/streams/door", json={"name": "C"}, headers={"If-Match": "*"}).json()["name"] == "C"
    tag = client.get("/v1/streams/door").headers["etag"]
    assert client.delete("/v1/streams/door", headers={"If-Match": tag}).status_code == 204
    assert add(client).headers["etag"] != tag, "a stream of the same id is another one"


def test_of_changes_at_once_none_is_lost(client: httpx.Client, manager: StreamManager):
    tag = add(client).headers["etag"]

    def change(number: int, **headers: str) -> int:
        tags = {f"by-{number}": "x"} if headers else {}
        body = {"tags": tags} if headers else [{"name": "N"}, {"max_fps": 5}, {"tags": {"a": "b"}}][number % 3]
        with httpx.Client(base_url=client.base_url, trust_env=False) as own:
            return own.patch("/v1/streams/door", json=body, headers=headers).status_code

    with ThreadPoolExecutor(8) as pool:
        with_tag = list(pool.map(lambda number: change(number, **{"If-Match": tag}), range(8)))
        assert sorted(with_tag) == [200] + [412] * 7, "exactly one had what it changed"
        assert list(pool.map(change, range(9))) == [200] * 9
    spec = manager.store.get_stream("door")
    assert (spec.name, spec.max_fps, spec.tags) == ("N", 5.0, {"a": "b"})


@pytest.mark.parametrize(
    ("changes", "restarts"),
    [
        ({"name": "Door", "tags": {"floor": "1"}}, []),
        ({"name": "Door", "max_fps": 5}, ["max_fps"]),
        ({"source": {"uri": "rtsp://127.0.0.1:9/other"}, "enabled": False}, ["source", "enabled"]),
        ({"models": []}, []),  # the default model, which it has already
    ],
)
def test_the_answer_says_what_begins_anew(client: httpx.Client, changes: dict, restarts: list):
    before = add(client).json()
    after = client.patch("/v1/streams/door?probe=false", json=changes).json()
    assert after["restarts"] == restarts
    assert after["revision"] == before["revision"] + bool(restarts)
