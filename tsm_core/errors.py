"""Two families of errors a caller can catch as one."""

from __future__ import annotations


class TSMError(Exception):
    """Anything this project raises on purpose.

    `reason` is a stable snake_case name that programs may match on; the text is for people: what happened,
    with which value, and what would work.
    """

    reason: str = "error"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class CallerError(TSMError):
    """The request is wrong; sending it again will not help (4xx, INVALID_ARGUMENT)."""

    reason = "invalid_request"


class WorldError(TSMError):
    """A camera, a store or a device failed; trying again may help (503, UNAVAILABLE)."""

    reason = "unavailable"


class ShapeError(CallerError):
    """A tensor has the wrong shape or type."""

    reason = "wrong_shape"
