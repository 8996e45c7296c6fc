"""A POST that is sent again, because its answer was not seen, is carried out once."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Header, Request, Response

from services.store import StateStore
from tsm_core.errors import CallerError

KIND = "idempotency"
KEPT_S = 24 * 3600.0
KEPT = 1000  # answers; beyond that the oldest go
PENDING_S = 120.0  # a gateway that died while it answered holds a key so long

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="sent again with the same key within a day: the first answer, and nothing is done twice",
    ),
]

REPLAYED = {
    "Idempotency-Replayed": {"description": "true: the answer to an earlier request", "schema": {"type": "string"}}
}


class KeyReused(CallerError):
    """The key came with another request before."""

    reason = "idempotency_key_reused"


class KeyInFlight(CallerError):
    """The first request with this key is not answered yet."""

    reason = "idempotency_key_in_flight"


class Once:
    """Answers by their Idempotency-Key, for a day. Only what succeeded is kept: an error changed nothing.

    Of the request a digest is kept, keyed by the Idempotency-Key, which itself is kept as a digest only: what stands
    in the store tells nothing about a password in the body. A key belongs to its caller.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store

    def answer(self, request: Request, key: str | None, asked: Any, act: Callable[[], Response]) -> Response:
        """What `act` answers; to a request that came before, what it answered then, with Idempotency-Replayed: true.

        asked: all that tells one request from another, as JSON. Raises KeyReused, KeyInFlight and what `act` raises.
        """
        if key is None:
            return act()
        caller = getattr(getattr(request.state, "caller", None), "name", "")
        name = hashlib.sha256(json.dumps([caller, request.url.path, key]).encode()).hexdigest()
        text = json.dumps(asked, sort_keys=True).encode()
        digest = hmac.new(key.encode(), text, hashlib.sha256).hexdigest()
        pending = json.dumps({"digest": digest, "at": time.time(), "answer": None})
        if not self._store.swap_document(KIND, name, None, pending, PENDING_S):
            return self._before(name, digest)
        try:
            response = act()
        except BaseException:
            self._store.swap_document(KIND, name, pending, None)
            raise
        headers = {title: value for title, value in response.headers.items() if title != "content-length"}
        answer = {"status": response.status_code, "body": bytes(response.body).decode(), "headers": headers}
        self._store.put_document(
            KIND, name, json.dumps({"digest": digest, "at": time.time(), "answer": answer}), KEPT_S
        )
        self._tidy()
        return response

    def _before(self, name: str, digest: str) -> Response:
        held = json.loads(self._store.document(KIND, name) or "{}")
        if held and held["digest"] != digest:
            raise KeyReused("this Idempotency-Key came with another request; take a new key for a new request")
        answer = held.get("answer")
        if answer is None:
            raise KeyInFlight("the first request with this Idempotency-Key is not answered yet; ask again in a moment")
        return Response(answer["body"], answer["status"], {**answer["headers"], "Idempotency-Replayed": "true"})

    def _tidy(self) -> None:
        held = self._store.documents(KIND)
        if len(held) <= KEPT:
            return
        at = {name: json.loads(text)["at"] for name, text in held.items()}
        for name in sorted(at, key=lambda name: at[name])[: len(held) - KEPT]:
            self._store.swap_document(KIND, name, held[name], None)
