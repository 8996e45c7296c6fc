"""Who calls, and what they may do: a token becomes a caller with a role and perhaps only some streams."""

from __future__ import annotations

import fnmatch
import ipaddress
import secrets
from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import get_args

from services.locks.limits import KEPT, Buckets, Feeds, TooManyRequests
from services.locks.tokens import Role, Token, Tokens, digest
from services.settings import Settings
from services.store import StateStore
from tsm_core.errors import CallerError

ROLES: tuple[Role, ...] = get_args(Role)
"""Weakest first; each may do what those before it may."""
SESSIONS = "sessions"
RECHECK_S = 5.0  # a feed of a token that is revoked ends with the first message after so long


class NoToken(CallerError):
    """A token is needed and none came."""

    reason = "token_required"


class BadToken(CallerError):
    """The token is unknown, revoked or expired."""

    reason = "bad_token"


class Forbidden(CallerError):
    """The caller's role or streams do not reach so far."""

    reason = "forbidden"


class WrongHost(CallerError):
    """The request was meant for a host that this service does not answer for."""

    reason = "wrong_host"


class CrossOrigin(CallerError):
    """Another site's page sent this."""

    reason = "cross_origin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `streams`: patterns of the ids that may be seen and touched (`yard-*`); None: all."""

    name: str
    role: Role
    streams: tuple[str, ...] | None = None

    def sees(self, stream_id: str) -> bool:
        """Whether the stream is one of the caller's."""
        return self.streams is None or any(fnmatch.fnmatchcase(stream_id, pattern) for pattern in self.streams)

    def may(self, role: Role) -> bool:
        """Whether the caller's role is `role` or above."""
        return ROLES.index(self.role) >= ROLES.index(role)


ANYONE = Caller("anyone", "admin")
"""Who comes without a token where none is needed: the people of this machine."""
ADMIN, VIEWER = Caller("admin", "admin"), Caller("viewer", "viewer")
"""Who comes with `auth.admin_token`, and with `auth.viewer_token`."""


class Locks:
    """What every door asks before it opens. Thread-safe.

    `caller`, `log_in` and `of_session` read the store: call them off an event loop. They raise StoreDown.
    """

    def __init__(self, store: StateStore, settings: Settings) -> None:
        self.required = settings.auth.required == "always" or not on_loopback(settings.server.host)
        self.tokens = Tokens(store)
        self._store = store
        self._settings = settings.auth
        brought = ((self._settings.admin_token, ADMIN), (self._settings.viewer_token, VIEWER))
        self._brought = {digest(text.get_secret_value()): caller for text, caller in brought if text is not None}
        self._requests = Buckets(self._settings.requests_per_s, self._settings.requests_burst)
        self._failures = Buckets(self._settings.failures_per_min / 60, self._settings.failures_per_min)
        self._feeds = Feeds(self._settings.feeds)
        self._known: OrderedDict[str, None] = OrderedDict()  # digests of secrets that were right a while ago

    def caller(self, authorization: str | None, address: str = "") -> Caller:
        """Who sent this `Authorization` header (`Bearer tsm_...`) from this address.

        Raises NoToken, BadToken, TooManyRequests.
        """
        if authorization is None:
            if self.required:
                raise NoToken("this service wants a token: send it as `Authorization: Bearer ...` (tsm: TSM_TOKEN)")
            return self._paced(ANYONE, f"{ANYONE.name} {address}")
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise BadToken("the Authorization header holds no bearer token; send `Authorization: Bearer ...`")
        return self._paced(self._judge(text.strip(), address))

    def allow(self, caller: Caller, role: Role, stream_id: str | None = None) -> None:
        """Return when the caller has the role and sees the stream, if one is named. Raises Forbidden."""
        if not caller.may(role):
            raise Forbidden(f"this needs the role {role}, and {caller.name!r} is {caller.role}")
        if stream_id is not None and not caller.sees(stream_id):
            own = ", ".join(caller.streams or ()) or "none"
            raise Forbidden(f"{caller.name!r} reaches these streams alone: {own}; not {stream_id!r}")

    def feed(self, caller: Caller) -> AbstractContextManager[None]:
        """One feed of the caller while it lasts. Raises TooManyFeeds when entered."""
        return self._feeds.taken(caller.name)

    def log_in(self, token: str, address: str = "") -> tuple[Caller, str]:
        """Who has this token, and the secret of a new session in a browser. Raises BadToken, TooManyRequests."""
        caller = self._judge(token.strip(), address)
        session, mark = secrets.token_urlsafe(32), digest(token.strip())
        of = mark if mark in self._brought else token.strip().split("_")[1]
        self._store.put_document(SESSIONS, digest(session), of, self._settings.session_s)
        return caller, session

    def of_session(self, session: str) -> Caller:
        """Whose session this is. Raises BadToken when it is over or its token is, TooManyRequests."""
        of = self._store.document(SESSIONS, digest(session)) or ""
        if of in self._brought:
            return self._paced(self._brought[of])
        token = self.tokens.get(of)
        if token is None:
            raise BadToken("the login is over; log in again")
        return self._paced(_caller(token))

    def log_out(self, session: str) -> None:
        """Forget a session."""
        text = self._store.document(SESSIONS, digest(session))
        if text is not None:
            self._store.swap_document(SESSIONS, digest(session), text, None)

    def _judge(self, text: str, address: str) -> Caller:
        mark = digest(text)
        if mark not in self._known and (wait_s := self._failures.wait_s(address)):
            raise TooManyRequests(f"too many wrong tokens from {address}; wait {wait_s:.0f} s", wait_s)
        caller = self._find(text)
        if caller is None:
            self._known.pop(mark, None)
            self._failures.take(address)
            raise BadToken("the token is unknown, revoked or expired; `tsm tokens list` shows those there are")
        self._known[mark] = None
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        return caller

    def _find(self, text: str) -> Caller | None:
        if found := self._brought.get(digest(text)):
            return found
        token = self.tokens.find(text)
        return None if token is None else _caller(token)

    def _paced(self, caller: Caller, name: str = "") -> Caller:
        if wait_s := self._requests.take(name or caller.name):
            raise TooManyRequests(f"{caller.name!r} calls too often (auth.requests_per_s); wait {wait_s:.1f} s", wait_s)
        return caller


def on_loopback(host: str) -> bool:
    """Whether only this machine's own programs reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _caller(token: Token) -> Caller:
    return Caller(token.name, token.role, token.streams)
