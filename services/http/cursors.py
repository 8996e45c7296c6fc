"""Where a list goes on: opaque to clients, checked when it comes back."""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any

from fastapi import Query

from tsm_core.errors import CallerError

Cursor = Annotated[
    str | None, Query(max_length=500, description="`next_cursor` of the answer before, with the same filters")
]


class BadCursor(CallerError):
    """A cursor that this list did not give."""

    reason = "bad_cursor"


def encode_cursor(place: str, *values: str | int | float) -> str:
    """The cursor that says: in list `place`, go on behind `values`."""
    return base64.urlsafe_b64encode(json.dumps([place, *values]).encode()).decode().rstrip("=")


def decode_cursor(place: str, text: str, *kinds: type) -> list[Any]:
    """The values of a cursor of this list. Raises BadCursor."""
    try:
        found = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        if [type(value) for value in found] == [str, *kinds] and found[0] == place:
            return list(found[1:])
    except (ValueError, TypeError, RecursionError):
        pass
    raise BadCursor(f"{text[:60]!r} is no cursor of this list: give next_cursor as it came, or leave it out")
