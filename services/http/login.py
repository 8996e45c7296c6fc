"""Tokens, and the page's login: a token becomes a cookie that scripts cannot read."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import Field, SecretStr

from services.http.guard import COOKIE, ROLE_KEY, Calls, session_of
from services.locks.callers import Caller, Locks
from services.locks.tokens import Name, Pattern, Role, Token
from services.settings import Settings
from services.wire import Wire

ADMIN = {ROLE_KEY: "admin"}
PUBLIC = {ROLE_KEY: "public"}
YEAR_S = 366 * 86400.0


class Login(Wire):
    """What opens the door."""

    token: SecretStr = Field(max_length=256)


class Who(Wire):
    """Who calls, and what they may do."""

    name: str = Field(examples=["dashboard"])
    role: Role
    streams: tuple[str, ...] | None = Field(description="patterns of the streams that are reached; null: all")
    required: bool = Field(description="whether this service wants a token at all")


class NewToken(Wire):
    """A token to make."""

    name: Name
    role: Role
    streams: tuple[Pattern, ...] | None = Field(
        None, min_length=1, max_length=64, description="patterns of the streams it reaches; null: all"
    )
    expires_s: float | None = Field(None, ge=1, le=10 * YEAR_S, description="seconds it is good for; null: for ever")


class MadeToken(Token):
    """A new token; `token` is shown this once."""

    token: str


class TokenList(Wire):
    """The tokens that are neither revoked nor expired, by name."""

    tokens: list[Token]


def login_router(locks: Locks, settings: Settings) -> APIRouter:
    """The routes /v1/login and /v1/tokens."""
    router = APIRouter(prefix="/v1", tags=["access"])

    @router.post("/login", summary="Open the page: a token becomes a cookie", openapi_extra=PUBLIC)
    def log_in(login: Login, request: Request, response: Response) -> Who:
        address = request.client.host if request.client else ""
        caller, session = locks.log_in(login.token.get_secret_value(), address)
        response.set_cookie(
            COOKIE,
            session,
            max_age=int(settings.auth.session_s),
            httponly=True,
            samesite="strict",
            secure=settings.auth.https or request.url.scheme == "https",
        )
        return _who(caller)

    @router.get("/login", summary="Who calls")
    def who(caller: Calls) -> Who:
        return _who(caller)

    @router.delete("/login", status_code=204, summary="Close the page's login", openapi_extra=PUBLIC)
    def log_out(request: Request, response: Response) -> None:
        session = session_of(request.headers)
        if session is not None:
            locks.log_out(session)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")

    @router.post("/tokens", status_code=201, summary="Make a token", openapi_extra=ADMIN)
    def create_token(new: NewToken) -> MadeToken:
        token, text = locks.tokens.create(new.name, new.role, new.streams, new.expires_s)
        return MadeToken(**token.model_dump(), token=text)

    @router.get("/tokens", summary="All tokens", openapi_extra=ADMIN)
    def list_tokens() -> TokenList:
        return TokenList(tokens=locks.tokens.list())

    @router.delete("/tokens/{token}", status_code=204, summary="Revoke a token by id or name", openapi_extra=ADMIN)
    def revoke_token(token: str) -> None:
        locks.tokens.revoke(token)

    def _who(caller: Caller) -> Who:
        return Who(name=caller.name, role=caller.role, streams=caller.streams, required=locks.required)

    return router
