"""The lock on the HTTP door: which host, who calls, may they; and the headers that browsers obey.

Denies by default. GET and HEAD need the role viewer, everything else operator, unless a route says otherwise with
`openapi_extra={"x-tsm-role": ...}` (viewer, operator, admin or public); what is no route of the API is the admin's.
A path parameter `stream_id` is the stream asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute, iter_route_contexts
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.http.problems import PRIVATE, problem_of
from services.locks.callers import (
    ANYONE,
    RECHECK_S,
    ROLES,
    BadToken,
    Caller,
    CrossOrigin,
    Locks,
    WrongHost,
    on_loopback,
)
from services.locks.tokens import Role
from services.settings import Settings
from tsm_core.errors import CallerError, TSMError

Policy = Role | Literal["public"]
ROLE_KEY = "x-tsm-role"
COOKIE = "tsm_session"
PLAIN: dict[str, Policy] = {"/openapi.json": "viewer", "/static": "public"}  # what is served without being an API route
SOCKETS: dict[str, Policy] = {"/v1/ws": "viewer"}
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def caller_of(connection: HTTPConnection) -> Caller:
    """Who calls, as the guard found out."""
    found: Caller = connection.state.caller
    return found


Calls = Annotated[Caller, Depends(caller_of)]
"""Who calls, as a parameter of a route."""


def policy_of(api: FastAPI, scope: Scope) -> tuple[Policy, str | None]:
    """What the matching route asks for, and the stream that the path names."""
    partial: tuple[Policy, str | None] | None = None
    for route in iter_route_contexts(api.routes):
        match, child = route.matches(scope)
        if match is Match.NONE:
            continue
        stream_id = child.get("path_params", {}).get("stream_id")
        if match is Match.FULL:
            return route_policy(route.original_route, route.path or "", scope.get("method", "")), stream_id
        partial = partial or ("viewer", stream_id)  # there is no such method: said to who may look
    return partial or ("viewer", None)  # there is nothing: likewise


def route_policy(route: object, path: str, method: str) -> Policy:
    """What a route asks for; `path` with its prefixes."""
    if isinstance(route, APIRoute):
        told = (route.openapi_extra or {}).get(ROLE_KEY, "viewer" if method in ("GET", "HEAD") else "operator")
        return told if told in (*ROLES, "public") else "admin"
    if isinstance(route, APIWebSocketRoute):
        return SOCKETS.get(path, "admin")
    return PLAIN.get(path, "admin")


class Guard:
    """ASGI middleware: lets through who may, and says why to who may not."""

    def __init__(self, app: ASGIApp, *, api: FastAPI, locks: Locks, settings: Settings) -> None:
        self._app = app
        self._api = api
        self._locks = locks
        auth = settings.auth
        self._hosts = tuple(name.lower() for name in auth.allowed_hosts)
        if not self._hosts and on_loopback(settings.server.host) and not locks.required:
            self._hosts = LOOPBACK_NAMES
        self._https = auth.https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = self._with_headers(scope, send)
        session = session_of(headers)
        policy, stream_id = policy_of(self._api, scope)
        try:
            self._check_host(headers)
            self._check_origin(scope, headers, by_cookie=session is not None)
            if policy == "public":
                caller = ANYONE
            else:
                caller = await self._identify(scope, headers, session)
                self._locks.allow(caller, policy, stream_id)
        except TSMError as error:
            await self._refuse(error, scope, receive, given)
            return
        scope.setdefault("state", {})["caller"] = caller
        if policy == "public" or caller is ANYONE:
            await self._app(scope, receive, given)
            return
        watched = _Watched(given, lambda: self._still(headers, session, policy, stream_id))
        try:
            await self._app(scope, receive, watched)
        except (ClientDisconnect, OSError):
            if not watched.ended:
                raise

    async def _identify(self, scope: Scope, headers: Headers, session: str | None) -> Caller:
        authorization = headers.get("authorization")
        address = (scope.get("client") or ("",))[0]
        if authorization is None and session is None:
            return self._locks.caller(None, address)
        if authorization is None:
            return await run_in_threadpool(self._locks.of_session, session or "")
        return await run_in_threadpool(self._locks.caller, authorization, address)

    async def _still(self, headers: Headers, session: str | None, policy: Role, stream_id: str | None) -> bool:
        """Whether a caller who was let in would be let in again."""
        try:
            self._locks.allow(await self._identify({}, headers, session), policy, stream_id)
        except CallerError:
            return False
        except TSMError:
            return True  # the store is away, or calls come too fast: not the moment to judge
        return True

    def _check_host(self, headers: Headers) -> None:
        """Refuse a name that is not ours: a page of another site may have made it lead here."""
        if not self._hosts:
            return
        host = _name(headers.get("host", ""))
        if host not in self._hosts:
            raise WrongHost(
                f"this service does not answer for the host {host!r}; name it in auth.allowed_hosts, "
                "and ask for tokens with auth.required=always if others reach it through a proxy"
            )

    @staticmethod
    def _check_origin(scope: Scope, headers: Headers, *, by_cookie: bool) -> None:
        """Refuse what another site's page sends with the browser's own rights: changes, and WebSockets."""
        changes = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if not changes or "authorization" in headers:
            return
        origin, fetch = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None:
            own = urlsplit(origin).netloc == headers.get("host")
        else:
            own = fetch in ("same-origin", "none") if fetch is not None else not by_cookie
        if not own:
            raise CrossOrigin("a page of another site may not do this; use this service's page, or a token")

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        """`send` that adds what browsers are to obey."""
        secure = self._https or scope["scheme"] in ("https", "wss")

        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if scope["path"].startswith("/static/"):
                    headers.setdefault("Cache-Control", "no-cache")  # asked again, by its ETag
                for name, value in PRIVATE.items():
                    headers.setdefault(name, value)
                if secure:
                    headers.setdefault("Strict-Transport-Security", "max-age=31536000")
            await send(message)

        return wrapped

    async def _refuse(self, error: TSMError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.reason})
            return
        await problem_of(error)(scope, receive, send)


class _Watched:
    """`send` that asks now and then whether the caller still may, and ends the feed if not."""

    def __init__(self, send: Send, still: Callable[[], Awaitable[bool]]) -> None:
        self.ended = False
        self._send = send
        self._still = still
        self._clock = asyncio.get_running_loop().time
        self._next = self._clock() + RECHECK_S

    async def __call__(self, message: Message) -> None:
        """ASGI's send. Raises an OSError, as for a caller who left, once the feed is ended."""
        if self._clock() >= self._next:
            self._next = self._clock() + RECHECK_S
            if not await self._still():
                self.ended = True
                if message["type"] == "websocket.send":
                    await self._send({"type": "websocket.close", "code": 1008, "reason": BadToken.reason})
                elif message["type"] == "http.response.body":
                    await self._send({"type": "http.response.body", "body": b""})
        if self.ended:
            raise OSError("the caller may not listen any more")
        await self._send(message)


def session_of(headers: Headers) -> str | None:
    """The secret of the page's login, if the browser sent one."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return found.value if found is not None and found.value else None


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
