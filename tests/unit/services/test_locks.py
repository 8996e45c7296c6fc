"""Tokens, roles, limits and what browsers are told, over the real door on loopback."""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from services.cli import app
from services.http import guard
from services.http.app import http_app
from services.locks.callers import ADMIN, BadToken, Caller, Forbidden, Locks, NoToken
from services.locks.first import TokenFileError, first_admin_token
from services.locks.limits import Buckets, Feeds, TooManyFeeds, TooManyRequests
from services.locks.tokens import TokenExists, TokenNotFound, Tokens
from services.manager import StreamManager
from services.schemas import state_event
from services.settings import AuthSettings, ServerSettings, Settings, StoreSettings
from services.store import MemoryStore, StateStore, open_store
from tests.unit.services.http_kit import MODELS, serving

SHARED = "the-operator's-own-long-admin-token-1"
CAMERA = {"source": {"uri": "rtsp://127.0.0.1:9/cam"}}


def settings_of(**auth: object) -> Settings:
    return Settings(auth=AuthSettings.model_validate({"required": "always", "admin_token": SHARED, **auth}))


@pytest.fixture(params=["memory", "valkey"])
def store(request: pytest.FixtureRequest) -> Iterator[StateStore]:
    if request.param == "memory":
        yield MemoryStore(StoreSettings())
        return
    url = request.getfixturevalue("valkey_url")
    found = open_store(StoreSettings(url=SecretStr(url), prefix=f"{uuid.uuid4().hex}:"))
    yield found
    found.close()


@contextlib.contextmanager
def door(settings: Settings) -> Iterator[tuple[httpx.Client, Tokens]]:
    """A client that sends no token, and the tokens of the service that it talks to."""
    store = MemoryStore(StoreSettings())
    with (
        serving(StreamManager(store, settings, models=MODELS)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        yield client, Tokens(store)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# tokens


def test_a_token_opens_until_it_is_revoked(store: StateStore) -> None:
    locks = Locks(store, settings_of())
    token, text = locks.tokens.create("dashboard", "viewer", ("yard-*",))
    assert re.fullmatch(r"tsm_[a-z0-9]{8}_[A-Za-z0-9]{43}", text)
    assert locks.caller(f"Bearer {text}") == Caller("dashboard", "viewer", ("yard-*",))
    assert locks.tokens.list()[0].last_used_at is not None
    for wrong in (text[:-1], text[:-1] + ("a" if text[-1] != "a" else "b"), text.upper(), f"tsm_{token.id}_", "\udcff"):
        with pytest.raises(BadToken):
            locks.caller(f"Bearer {wrong}", "elsewhere")
    assert locks.tokens.revoke("dashboard").id == token.id
    with pytest.raises(BadToken):
        locks.caller(f"Bearer {text}")
    with pytest.raises(TokenNotFound):
        locks.tokens.revoke("dashboard")


def test_only_a_digest_is_kept(store: StateStore) -> None:
    locks = Locks(store, settings_of())
    _, text = locks.tokens.create("dashboard", "admin")
    _, session = locks.log_in(text)
    kept = " ".join(key + value for kind in ("tokens", "sessions") for key, value in store.documents(kind).items())
    assert text.rpartition("_")[2] not in kept
    assert session not in kept
    assert SHARED not in kept


def test_a_token_expires(store: StateStore) -> None:
    locks = Locks(store, settings_of())
    _, text = locks.tokens.create("visitor", "viewer", expires_s=0.3)
    assert locks.caller(f"Bearer {text}").name == "visitor"
    time.sleep(0.35)
    with pytest.raises(BadToken):
        locks.caller(f"Bearer {text}")
    assert not locks.tokens.list()


def test_names_are_taken_once(store: StateStore) -> None:
    tokens = Tokens(store)
    tokens.create("dashboard", "viewer")
    for name in ("dashboard", "admin", "anyone"):
        with pytest.raises(TokenExists, match=name):
            tokens.create(name, "admin")


def test_the_shared_admin_token() -> None:
    locks = Locks(MemoryStore(), settings_of())
    assert locks.caller(f"Bearer {SHARED}") is ADMIN
    with pytest.raises(BadToken):
        locks.caller(f"Bearer {SHARED}x")
    assert SHARED not in repr(settings_of())


@pytest.mark.parametrize(
    ("host", "required", "asks"),
    [
        ("127.0.0.1", "auto", False),
        ("localhost", "auto", False),
        ("::1", "auto", False),
        ("0.0.0.0", "auto", True),
        ("192.168.1.5", "auto", True),
        ("my-machine", "auto", True),
        ("127.0.0.1", "always", True),
    ],
)
def test_a_token_is_wanted_beyond_loopback(host: str, required: str, asks: bool) -> None:
    settings = Settings(server=ServerSettings(host=host), auth=AuthSettings.model_validate({"required": required}))
    locks = Locks(MemoryStore(), settings)
    if not asks:
        assert locks.caller(None).role == "admin"
        with pytest.raises(BadToken):
            locks.caller("Bearer nonsense")  # a token that is sent is judged all the same
        return
    for header, error in ((None, NoToken), ("Basic dXNlcjpwYXNz", BadToken), ("Bearer", BadToken)):
        with pytest.raises(error):
            locks.caller(header)


@pytest.mark.parametrize(
    ("caller", "role", "stream_id", "refused"),
    [
        (Caller("a", "viewer"), "viewer", "x", None),
        (Caller("a", "viewer"), "operator", None, "needs the role operator"),
        (Caller("a", "operator"), "viewer", None, None),
        (Caller("a", "operator"), "admin", None, "needs the role admin"),
        (Caller("a", "admin"), "admin", "x", None),
        (Caller("a", "admin", ("door-1", "yard-*")), "admin", "yard-2", None),
        (Caller("a", "admin", ("door-1", "yard-*")), "viewer", "door-2", "door-1, yard-"),
        (Caller("a", "admin", ("door-?",)), "viewer", "door-12", "door-12"),
    ],
)
def test_roles_and_streams(caller: Caller, role, stream_id: str | None, refused: str | None) -> None:
    locks = Locks(MemoryStore(), settings_of())
    if refused is None:
        locks.allow(caller, role, stream_id)
        return
    with pytest.raises(Forbidden, match=refused):
        locks.allow(caller, role, stream_id)


# limits


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    now = 0.0
    buckets = Buckets(2.0, 3, clock=lambda: now)
    assert [buckets.take("a") for _ in range(3)] == [0.0] * 3
    assert buckets.take("a") == pytest.approx(0.5)
    assert buckets.take("b") == 0.0
    now = 0.5
    assert buckets.take("a") == 0.0
    assert buckets.wait_s("a") == pytest.approx(0.5)
    now = 100.0
    assert [buckets.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(0.5)]


def test_wrong_tokens_are_slowed_and_right_ones_are_not() -> None:
    locks = Locks(MemoryStore(), settings_of(failures_per_min=3))
    _, known = locks.tokens.create("known", "viewer")
    _, late = locks.tokens.create("late", "viewer")
    locks.caller(f"Bearer {known}", "10.0.0.1")
    for _ in range(3):
        with pytest.raises(BadToken):
            locks.caller("Bearer guess", "10.0.0.1")
    for guess in ("guess", late):  # whether it is right is not said now
        with pytest.raises(TooManyRequests):
            locks.caller(f"Bearer {guess}", "10.0.0.1")
    assert locks.caller(f"Bearer {known}", "10.0.0.1").name == "known"
    assert locks.caller(f"Bearer {late}", "10.0.0.2").name == "late"


def test_a_caller_who_calls_too_often_waits() -> None:
    with door(settings_of(requests_per_s=0.5, requests_burst=3)) as (client, tokens):
        _, text = tokens.create("busy", "viewer")
        answers = [client.get("/v1/streams", headers=bearer(text)) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert answers[3].json()["reason"] == "too_many_requests"
        assert 1 <= int(answers[3].headers["retry-after"]) <= 2
        assert client.get("/v1/streams", headers=bearer(SHARED)).status_code == 200
        assert client.get("/healthz").status_code == 503, "not limited, and no replica lives here"


def test_feeds_are_counted() -> None:
    feeds = Feeds(2)
    with feeds.taken("a"), feeds.taken("a"), feeds.taken("b"), pytest.raises(TooManyFeeds), feeds.taken("a"):
        pass
    with feeds.taken("a"), feeds.taken("a"):
        pass


def test_a_caller_follows_so_many_feeds_at_once() -> None:
    with door(settings_of(feeds=2)) as (client, _):
        client.headers.update(bearer(SHARED))
        url = str(client.base_url).replace("http", "ws") + "/v1/ws"
        listen = {"Accept": "text/event-stream"}
        with connect(url, additional_headers=bearer(SHARED)) as socket:
            socket.recv(10)
            with client.stream("GET", "/v1/events", headers=listen) as first:
                assert first.status_code == 200
                lines = first.iter_lines()  # kept: its end would close the feed
                assert next(lines) == ": open"
                third = client.get("/v1/events", headers=listen)
                assert (third.status_code, third.json()["reason"]) == (429, "too_many_feeds")
        until = time.monotonic() + 10
        while (status := _first_line(client, listen)) != 200:  # both are free again as soon as they are noticed
            assert (status, time.monotonic() < until) == (429, True)


def _first_line(client: httpx.Client, headers: dict[str, str]) -> int:
    with client.stream("GET", "/v1/events", headers=headers) as feed:
        return feed.status_code


# the page's login


def test_login_gives_a_cookie_that_scripts_cannot_read() -> None:
    with door(settings_of()) as (client, tokens):
        _, text = tokens.create("page", "operator")
        assert client.get("/v1/streams").status_code == 401
        answer = client.post("/v1/login", json={"token": text})
        assert answer.json() == {"name": "page", "role": "operator", "streams": None, "required": True}
        cookie = answer.headers["set-cookie"]
        assert text not in cookie
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
        assert "Secure" not in cookie
        assert client.get("/v1/streams").status_code == 200
        assert client.get("/v1/tokens").status_code == 403
        own = {"Origin": str(client.base_url).rstrip("/")}
        assert client.delete("/v1/login", headers=own).status_code == 204
        client.cookies.set("tsm_session", re.findall("tsm_session=([^;]*)", cookie)[0])
        assert client.get("/v1/streams").status_code == 401, "the session is over, not only its cookie"


def test_under_https_the_cookie_is_secure() -> None:
    with door(settings_of(https=True)) as (client, _):
        answer = client.post("/v1/login", json={"token": SHARED})
        assert "Secure" in answer.headers["set-cookie"]
        assert answer.headers["strict-transport-security"] == "max-age=31536000"


def test_a_session_ends_with_its_token() -> None:
    with door(settings_of()) as (client, tokens):
        _, text = tokens.create("page", "viewer")
        client.post("/v1/login", json={"token": text})
        assert client.get("/v1/login").json()["name"] == "page"
        tokens.revoke("page")
        assert client.get("/v1/login").status_code == 401


def test_a_wrong_login_says_nothing_of_the_token() -> None:
    with door(settings_of()) as (client, _):
        answer = client.post("/v1/login", json={"token": "tsm_abcdefgh_c4n4ry"})
        assert (answer.status_code, answer.json()["reason"]) == (401, "bad_token")
        assert "c4n4ry" not in answer.text
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"Origin": "{own}"}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({}, False),
    ],
)
def test_another_site_cannot_use_the_login(headers: dict[str, str], allowed: bool) -> None:
    with door(settings_of()) as (client, _):
        client.post("/v1/login", json={"token": SHARED})
        own = str(client.base_url).rstrip("/")
        sent = {name: value.format(own=own) for name, value in headers.items()}
        answer = client.post("/v1/streams?probe=false", json=CAMERA, headers=sent)
        assert (answer.status_code == 201) == allowed, answer.text
        if not allowed:
            assert (answer.status_code, answer.json()["reason"]) == (403, "cross_origin")


def test_another_site_cannot_use_a_service_without_a_lock() -> None:
    with door(Settings()) as (client, _):
        evil = {"Origin": "https://evil.example"}
        assert client.post("/v1/streams?probe=false", json=CAMERA, headers=evil).status_code == 403
        assert client.post("/v1/streams?probe=false", json=CAMERA).status_code == 201
        with pytest.raises(InvalidStatus) as refused:
            connect(str(client.base_url).replace("http", "ws") + "/v1/ws", additional_headers=evil)
        assert refused.value.response.status_code == 403


# what browsers are told


@pytest.mark.parametrize(
    ("hosts", "sent", "allowed"),
    [
        ((), "localhost:8000", True),
        ((), "[::1]:8000", True),
        ((), "LOCALHOST", True),
        ((), "evil.example", False),
        ((), "evil.example:8000", False),
        ((), "[", False),
        (("tsm.example.com",), "tsm.example.com", True),
        (("tsm.example.com",), "localhost", False),
    ],
)
def test_a_name_that_leads_here_is_not_enough(hosts: tuple[str, ...], sent: str, allowed: bool) -> None:
    with door(Settings(auth=AuthSettings(allowed_hosts=hosts))) as (client, _):
        answer = client.get("/v1/streams", headers={"Host": sent})
        assert answer.status_code == (200 if allowed else 421)
        if not allowed:
            assert answer.json()["reason"] == "wrong_host"


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/v1/streams", "/nothing", "/healthz", "/openapi.json"])
def test_every_answer_tells_browsers_to_be_careful(path: str) -> None:
    with door(Settings()) as (client, _):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "camera=()" in headers["permissions-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == ("no-cache" if path.startswith("/static") else "no-store")
        assert "strict-transport-security" not in headers


def test_openapi_tells_problems_by_their_media_type() -> None:
    document = http_app(StreamManager(MemoryStore(), models=MODELS)).openapi()
    answers = document["paths"]["/v1/tokens"]["post"]["responses"]
    assert answers["4XX"]["content"].keys() == {"application/problem+json"}
    assert answers["201"]["content"].keys() == {"application/json"}


# feeds


def test_a_feed_ends_when_its_token_is_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "RECHECK_S", 0.2)
    monkeypatch.setattr("services.http.feeds.HEARTBEAT_S", 0.2)
    with door(settings_of()) as (client, tokens):
        _, text = tokens.create("listener", "viewer")
        url = str(client.base_url).replace("http", "ws") + "/v1/ws"
        headers = bearer(text)
        with (
            connect(url, additional_headers=headers) as socket,
            client.stream("GET", "/v1/events", headers=headers | {"Accept": "text/event-stream"}) as feed,
        ):
            lines = feed.iter_lines()
            assert next(lines) == ": open"
            socket.recv(10)
            tokens.revoke("listener")
            assert "data" not in "".join(lines), "ended by the service"
            with pytest.raises(ConnectionClosed) as closed:
                list(iter(lambda: socket.recv(10), None))
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "bad_token")


# tokens of some streams


def test_a_limited_token_sees_its_streams_alone() -> None:
    settings = settings_of()
    store = MemoryStore(StoreSettings())
    with (
        serving(StreamManager(store, settings, models=MODELS)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        _, text = Tokens(store).create("yard", "operator", ("yard-*",))
        client.headers.update(bearer(text))
        for name, token in (("door-1", SHARED), ("yard-1", text)):
            body = {"id": name, "enabled": False, **CAMERA}
            made = client.post("/v1/streams?probe=false", json=body, headers=bearer(token))
            assert made.status_code == 201, made.text
        assert client.post("/v1/streams?probe=false", json={"id": "door-2", **CAMERA}).status_code == 403
        assert [one["id"] for one in client.get("/v1/streams").json()["streams"]] == ["yard-1"]
        assert client.get("/v1/stats").json()["streams"] == 1
        assert client.get("/v1/stats", headers=bearer(SHARED)).json()["streams"] == 2
        assert client.get("/v1/events?stream=door-1").status_code == 403
        listen = {"Accept": "text/event-stream"}
        with (
            connect(url.replace("http", "ws") + "/v1/ws", additional_headers=bearer(text)) as socket,
            client.stream("GET", "/v1/events", headers=listen) as feed,
        ):
            lines = feed.iter_lines()
            assert next(lines) == ": open"
            told = [json.loads(socket.recv(10))]
            for name in ("door-1", "yard-1"):
                lease = store.assign(name, "engine-1")
                event = state_event(name, "STARTING", "RUNNING", "", time.time())
                store.publish(lease, events=[event], scores=[{"model": "motion9", "stream_id": name}])
            assert next(line for line in lines if line.startswith("id: ")) == "id: yard-1:1"
            kinds = set()
            while kinds < {"streams", "status", "event"}:
                told.append(json.loads(socket.recv(10)))
                kinds.add(told[-1]["type"])
        assert "door-1" not in json.dumps(told)
        found = client.get("/v1/events").json()["events"]
        assert [event["partitionkey"] for event in found] == ["yard-1"]
        assert len(client.get("/v1/events", headers=bearer(SHARED)).json()["events"]) == 2


def test_an_admins_token_cannot_be_limited() -> None:
    with door(settings_of()) as (client, _):
        body = {"name": "chief", "role": "admin", "streams": ["yard-*"]}
        answer = client.post("/v1/tokens", json=body, headers=bearer(SHARED))
        assert (answer.status_code, answer.json()["reason"]) == (422, "limited_admin")


# the first token


def test_the_first_start_makes_a_token_and_says_where(tmp_path: Path) -> None:
    store = MemoryStore(StoreSettings())
    settings = settings_of(admin_token=None).model_copy(update={"store": StoreSettings(data_dir=tmp_path / "data")})
    file = first_admin_token(store, settings)
    assert file == tmp_path / "data" / "admin-token"
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text().strip()
    assert Locks(store, settings).caller(f"Bearer {text}").role == "admin"
    assert first_admin_token(store, settings) == file
    assert file.read_text().strip() == text, "made once"
    file.unlink()
    assert first_admin_token(store, settings) is None, "somebody has it"
    (token,) = Tokens(store).list()
    Tokens(store).revoke(token.id)
    again = first_admin_token(store, settings)
    assert again is not None
    assert again.read_text().strip() != text


def test_no_first_token_where_none_is_wanted_or_one_was_brought(tmp_path: Path) -> None:
    for settings in (Settings(), settings_of()):
        settings = settings.model_copy(update={"store": StoreSettings(data_dir=tmp_path / "data")})
        assert first_admin_token(MemoryStore(), settings) is None
    assert not (tmp_path / "data").exists()


def test_a_first_token_that_cannot_be_kept_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    store = MemoryStore(StoreSettings())
    settings = settings_of(admin_token=None).model_copy(update={"store": StoreSettings(data_dir=tmp_path / "data")})
    with pytest.raises(TokenFileError, match="TSM_AUTH__ADMIN_TOKEN"):
        first_admin_token(store, settings)
    assert not Tokens(store).list()


# the command line


def test_the_command_line_makes_lists_and_revokes_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(StoreSettings())
    run = CliRunner().invoke
    with serving(StreamManager(store, settings_of(), models=MODELS)) as url:
        monkeypatch.setenv("TSM_SERVER", url)
        nobody = run(app, ["streams", "list"])
        assert (nobody.exit_code, "reason: token_required" in nobody.stderr) == (2, True)
        monkeypatch.setenv("TSM_TOKEN", SHARED)
        made = run(app, ["tokens", "create", "yard", "--role", "operator", "--streams", "yard-*", "--expires", "30d"])
        assert made.exit_code == 0, made.stderr
        text = made.stdout.strip()
        assert re.fullmatch(r"tsm_\w+", text)
        (token,) = json.loads(run(app, ["tokens", "list", "--json"]).stdout)
        assert (token["name"], token["streams"]) == ("yard", ["yard-*"])
        assert token["expires_at"] == pytest.approx(time.time() + 30 * 86400, abs=60)
        assert "yard-*" in run(app, ["tokens", "list"]).stdout
        monkeypatch.delenv("TSM_TOKEN")
        file = tmp_path / "token"
        file.write_text(f"{text}\n")
        assert run(app, ["--token-file", str(file), "streams", "list", "--json"]).stdout.strip() == "[]"
        monkeypatch.setenv("TSM_TOKEN", SHARED)
        assert run(app, ["tokens", "revoke", "yard"]).exit_code == 0
        monkeypatch.setenv("TSM_TOKEN", text)
        late = run(app, ["streams", "list"])
        assert (late.exit_code, "reason: bad_token" in late.stderr) == (2, True)
        assert text not in late.stderr


@pytest.mark.parametrize(
    ("args", "token", "reason"),
    [
        (["--token-file", "{file}.none", "streams", "list"], "", "token_unreadable"),
        (["--token-file", "{file}", "streams", "list"], "", "token_unreadable"),
        (["streams", "list"], "tök", "token_unreadable"),
        (["tokens", "create", "a", "--role", "viewer", "--expires", "soon"], SHARED, "bad_duration"),
    ],
)
def test_tokens_that_cannot_be_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], token: str, reason: str
) -> None:
    file = tmp_path / "token"
    file.write_text("two words")
    monkeypatch.setenv("TSM_TOKEN", token)
    done = CliRunner().invoke(app, [word.format(file=file) for word in args])
    assert (done.exit_code, f"reason: {reason}" in done.stderr) == (2, True), done.output
