"""Asking a running service from the command line: its address, the token, and its problems as errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from tsm_core.errors import CallerError, WorldError

LOCAL = "http://127.0.0.1:8000"
PROBE_WAIT_S = 30.0

Server = Annotated[str, typer.Option("--server", envvar="TSM_SERVER", help="address of the service")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


class RemoteRefusal(CallerError):
    """The service refused the request; `reason` is the service's."""


class RemoteTrouble(WorldError):
    """The service could not do it now; `reason` is the service's."""


class NoServer(WorldError):
    """Nothing answers at the service's address."""

    reason = "server_unreachable"


class TokenUnreadable(CallerError):
    """The file with the token cannot be read, or what it holds is no token."""

    reason = "token_unreadable"


def read_token(file: Path) -> str:
    """The token that a file holds, for `TSM_TOKEN`. Raises TokenUnreadable."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenUnreadable(f"the token file {file} cannot be read: {type(error).__name__}") from None
    if not text or any(not letter.isprintable() or letter == " " for letter in text):
        raise TokenUnreadable(f"the token file {file} must hold one token and nothing else")
    return text


def with_token() -> dict[str, str]:
    """The header that shows the token of `TSM_TOKEN`; empty without one. Raises TokenUnreadable."""
    token = os.environ.get("TSM_TOKEN", "").strip()
    if not token:
        return {}
    if not token.isascii() or not token.isprintable():
        raise TokenUnreadable("TSM_TOKEN holds letters that no token has")
    return {"Authorization": f"Bearer {token}"}


def ask(server: str, method: str, path: str, **request: Any) -> Any:
    """The JSON answer of the service. Raises RemoteRefusal, RemoteTrouble, NoServer, TokenUnreadable."""
    headers = {**with_token(), **request.pop("headers", {})}
    try:
        with httpx.Client(base_url=server, timeout=PROBE_WAIT_S, trust_env=False, headers=headers) as client:
            answer = client.request(method, path, **request)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(server, error) from None
    check(answer)
    return answer.json() if answer.content else None


def check(answer: httpx.Response) -> None:
    """Return when the service did what it was asked. Raises RemoteRefusal, RemoteTrouble."""
    if answer.is_success:
        return
    try:
        problem: Mapping[str, Any] = answer.json()
        detail, reason = str(problem["detail"]), str(problem["reason"])
    except (ValueError, KeyError, TypeError):
        detail, reason = f"{answer.request.url.host} answered {answer.status_code}", "unexpected_answer"
    family = RemoteTrouble if answer.status_code == 429 or answer.status_code >= 500 else RemoteRefusal
    raise family(detail, reason=reason)


def unreachable(server: str, error: Exception) -> NoServer:
    """What to say when nothing answers."""
    return NoServer(f"no service answers at {server} ({error}); start one with `tsm serve`, or name it with --server")
