"""Errors as RFC 9457 problems with a stable `reason`, and the limit of a body."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.media_limits import MediaTooLarge
from services.couriers.office import SinkNotFound
from services.event_query import EventNotFound
from services.http.idempotency import KeyInFlight
from services.inference import ModelBusy, ModelInUse, OutOfStep, RequestTimeout, SequenceBusy, UnknownSequence
from services.jobs import JobNotFound, JobsFull, NoResult, UnsupportedBody, UploadLost, UploadTooLarge
from services.locks.callers import BadToken, CrossOrigin, Forbidden, NoToken, WrongHost
from services.locks.limits import TooManyFeeds, TooManyRequests
from services.locks.tokens import TokenExists, TokenNotFound
from services.manager import NoCapacity, NoPicture, NotServed
from services.oip import ModelNotFound
from services.store import StreamChanged, StreamExists, StreamNotFound
from tsm_core.errors import CallerError, TSMError, WorldError

BUG = "an error of the service; its log says more"
RETRY_AFTER_S = 2
PRIVATE = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""What every answer tells browsers, unless it says otherwise itself."""


class BodyTooLarge(CallerError):
    """A body, or what it unpacks to, is above its limit."""

    reason = "body_too_large"


# errors that are not 422 (CallerError) or 503 (WorldError)
STATUS: dict[type[TSMError], int] = {
    StreamNotFound: 404,
    NoPicture: 404,
    EventNotFound: 404,
    JobNotFound: 404,
    NoResult: 404,
    UploadLost: 409,
    UploadTooLarge: 413,
    UnsupportedBody: 415,
    JobsFull: 429,
    NotServed: 409,
    SinkNotFound: 404,
    StreamExists: 409,
    NoToken: 401,
    BadToken: 401,
    Forbidden: 403,
    CrossOrigin: 403,
    WrongHost: 421,
    TokenExists: 409,
    TokenNotFound: 404,
    TooManyFeeds: 429,
    TooManyRequests: 429,
    KeyInFlight: 409,
    StreamChanged: 412,
    NoCapacity: 429,
    MediaTooLarge: 413,
    BodyTooLarge: 413,
    ModelNotFound: 404,
    ModelInUse: 409,
    ModelBusy: 429,
    UnknownSequence: 404,
    OutOfStep: 409,
    SequenceBusy: 429,
    RequestTimeout: 504,
}


class FieldError(BaseModel):
    """What is wrong with one field of the request."""

    field: str = Field(examples=["source.uri"])
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(examples=["urn:tsm:problem:stream_not_found"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["stream 'door-9' is not registered"])
    reason: str = Field(description="stable name of the error", examples=["stream_not_found"])
    errors: list[FieldError] | None = None


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "The request cannot be served; `reason` says why"},
    "5XX": {"model": Problem, "description": "A camera, the store or a device failed; try again"},
}


def told(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with problems under their own media type, which FastAPI cannot be told for a model."""
    for methods in document["paths"].values():
        for operation in methods.values():
            for response in operation["responses"].values():
                content = response.get("content", {})
                if content.get("application/json", {}).get("schema") == {"$ref": "#/components/schemas/Problem"}:
                    content["application/problem+json"] = content.pop("application/json")
    return document


def status_of(error: TSMError) -> int:
    """The HTTP status of an error: 4xx for callers, 503 for the world."""
    for family, status in STATUS.items():
        if isinstance(error, family):
            return status
    return 503 if isinstance(error, WorldError) else 422


def problem(
    status: int, reason: str, detail: str, errors: list[FieldError] | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An RFC 9457 answer."""
    body = Problem(
        type=f"urn:tsm:problem:{reason}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        reason=reason,
        errors=errors,
    )
    return JSONResponse(
        body.model_dump(exclude_none=True), status, media_type="application/problem+json", headers=headers
    )


def problem_of(error: TSMError) -> JSONResponse:
    """The answer to an error that was raised on purpose."""
    status = status_of(error)
    headers = {}
    if status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, TooManyRequests) else RETRY_AFTER_S
        headers["Retry-After"] = str(math.ceil(wait_s))
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="tsm-live"'
    return problem(status, error.reason, str(error), headers=headers)


def add_problems(app: FastAPI) -> None:
    """Make every error of the application a problem, in its OpenAPI document too."""
    described = app.openapi
    app.openapi = lambda: told(described())  # type: ignore[method-assign]

    @app.exception_handler(TSMError)
    async def ours(_: Request, error: TSMError) -> Response:
        return problem_of(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # pydantic's own text repeats the input, which may hold a password: only place and fact are passed on
        found = [
            FieldError(field=".".join(str(part) for part in e["loc"] if part != "body") or "body", message=_fact(e))
            for e in error.errors()
        ]
        if any(e["type"] == "json_invalid" for e in error.errors()):
            return problem(400, "invalid_json", "the body is not JSON", found)
        detail = "; ".join(f"{one.field}: {one.message}" for one in found[:3])
        return problem(422, "invalid_request", detail, found)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        reasons = {400: "invalid_request", 404: "unknown_route", 405: "method_not_allowed", 413: "body_too_large"}
        details = {
            404: f"there is nothing at {request.url.path}; /openapi.json lists what there is",
            405: f"{request.method} is not possible at {request.url.path}",
        }
        reason = reasons.get(error.status_code, "http_error")
        detail = details.get(error.status_code, str(error.detail))
        return problem(error.status_code, reason, detail, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(_: Request, error: Exception) -> Response:
        return problem(500, "internal_error", BUG, headers=PRIVATE)


def _fact(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


class BodyLimit:
    """Refuses bodies above `limit` bytes: at once by their announced length, else while they come in.

    larger: limits of the paths that match a regular expression as a whole, each with the setting it comes from.
    """

    def __init__(self, app: ASGIApp, limit: int, larger: Mapping[str, tuple[int, str]] | None = None) -> None:
        self._app = app
        self._limit = (limit, "server.max_body_bytes")
        self._larger = {re.compile(pattern): own for pattern, own in (larger or {}).items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        path = scope["path"]
        limit, setting = next((own for known, own in self._larger.items() if known.fullmatch(path)), self._limit)
        text = f"the body is larger than {limit} bytes ({setting})"
        if not said.isdigit() or int(said) > limit:
            await problem(413, "body_too_large", text, headers={"Connection": "close"})(scope, receive, send)
            return
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > limit:
                raise HTTPException(413, text, {"Connection": "close"})
            return message

        await self._app(scope, counted, send)
