"""API tokens in the store: made, listed, revoked, found again by what a caller sends.

A token is `tsm_<id>_<random>`. The store keeps a SHA-256 of it: the random part has 256 bits, nothing slower is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
from typing import Annotated, Literal

from pydantic import Field

from services.store import StateStore
from services.wire import Wire
from tsm_core.errors import CallerError

Role = Literal["viewer", "operator", "admin"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", examples=["dashboard"])]
Pattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9*?_-]{1,63}$", examples=["yard-*"])]

KIND = "tokens"
FORM = re.compile(r"tsm_([a-z0-9]{8})_[A-Za-z0-9]{43}")
LETTERS = string.ascii_letters + string.digits  # 43 of them: 256 bits
USE_NOTED_S = 3600.0  # the last use is known to the hour
RESERVED = ("admin", "viewer", "anyone")


class TokenExists(CallerError):
    """A token of this name exists already."""

    reason = "token_exists"


class LimitedAdmin(CallerError):
    """An admin's token that is to reach some streams only."""

    reason = "limited_admin"


class TokenNotFound(CallerError):
    """There is no token of this id or name."""

    reason = "token_not_found"


class Token(Wire):
    """A token as it is shown: without what opens doors."""

    id: str = Field(examples=["k3v9x2ab"])
    name: Name
    role: Role
    streams: tuple[Pattern, ...] | None = Field(None, description="patterns of the streams it reaches; null: all")
    created_at: float = Field(description="Unix seconds")
    expires_at: float | None = Field(None, description="Unix seconds; null: never")
    last_used_at: float | None = Field(None, description="Unix seconds, to the hour; null: never used")


class Kept(Token):
    """A token as the store keeps it."""

    sha256: str

    def ttl_s(self) -> float | None:
        """Seconds until it expires; None: never."""
        return None if self.expires_at is None else max(0.001, self.expires_at - time.time())

    def shown(self) -> Token:
        """Without the digest."""
        return Token(**{name: getattr(self, name) for name in Token.model_fields})


def digest(text: str) -> str:
    """What is kept of a secret of 256 random bits."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Tokens:
    """The tokens of a store. Any verb may raise StoreDown."""

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def create(
        self, name: str, role: Role, streams: tuple[str, ...] | None = None, expires_s: float | None = None
    ) -> tuple[Token, str]:
        """A new token, and its text, which is not kept. Raises TokenExists, LimitedAdmin."""
        if role == "admin" and streams is not None:
            raise LimitedAdmin(
                "an admin makes tokens, and so reaches every stream: leave the streams out, or choose operator"
            )
        if name in RESERVED or any(token.name == name for token in self.list()):
            raise TokenExists(f"a token {name!r} exists already; choose another name, or revoke that one first")
        token_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
        text = f"tsm_{token_id}_{''.join(secrets.choice(LETTERS) for _ in range(43))}"
        now = time.time()
        kept = Kept(
            id=token_id,
            name=name,
            role=role,
            streams=streams,
            created_at=now,
            expires_at=None if expires_s is None else now + expires_s,
            sha256=digest(text),
        )
        self._store.put_document(KIND, token_id, kept.model_dump_json(), kept.ttl_s())
        return kept.shown(), text

    def list(self) -> list[Token]:
        """All tokens that are neither revoked nor expired, by name."""
        found = [Kept.model_validate_json(text).shown() for text in self._store.documents(KIND).values()]
        return sorted(found, key=lambda token: token.name)

    def revoke(self, which: str) -> Token:
        """Forget a token by id or name: it opens nothing from now on. Raises TokenNotFound."""
        token = next((token for token in self.list() if which in (token.id, token.name)), None)
        while token is not None:
            if (text := self._store.document(KIND, token.id)) is None:
                break
            if self._store.swap_document(KIND, token.id, text, None):
                return token
        raise TokenNotFound(f"there is no token {which!r}; `tsm tokens list` shows those there are")

    def find(self, text: str) -> Token | None:
        """The token that this text is; None when it is none, or revoked, or expired. Notes that it is used."""
        form = FORM.fullmatch(text)
        kept = self.get(form[1]) if form else None
        if kept is None or not hmac.compare_digest(kept.sha256, digest(text)):
            return None
        now = time.time()
        if now - (kept.last_used_at or 0.0) > USE_NOTED_S:
            used = kept.model_copy(update={"last_used_at": now // USE_NOTED_S * USE_NOTED_S})
            self._store.swap_document(KIND, kept.id, kept.model_dump_json(), used.model_dump_json(), kept.ttl_s())
        return kept.shown()

    def get(self, token_id: str) -> Kept | None:
        """The token of this id; None when it is revoked or expired."""
        text = self._store.document(KIND, token_id)
        kept = Kept.model_validate_json(text) if text is not None else None
        return None if kept is None or (kept.expires_at is not None and kept.expires_at <= time.time()) else kept
