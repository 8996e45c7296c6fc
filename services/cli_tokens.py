"""`tsm tokens`: who may call a running service."""

from __future__ import annotations

import json
import re
import time
from typing import Annotated, Any
from urllib.parse import quote

import typer

from services.remote import LOCAL, Json, Server, ask
from services.tables import print_table
from tsm_core.errors import CallerError

tokens_app = typer.Typer(no_args_is_help=True, help="Tokens of a running service: who may call, and do what.")
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class BadDuration(CallerError):
    """A length of time that cannot be read."""

    reason = "bad_duration"


@tokens_app.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="who or what it is for")],
    role: Annotated[str, typer.Option("--role", help="viewer: look; operator: streams and inference; admin: all")],
    streams: Annotated[
        list[str] | None, typer.Option("--streams", help="reach these alone: an id or `yard-*`; again for more")
    ] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="such as 90s, 12h or 30d; default: never")] = None,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """Make a token and print it, this once."""
    body: dict[str, Any] = {"name": name, "role": role, "streams": streams or None}
    if expires is not None:
        body["expires_s"] = seconds_of(expires)
    made = ask(server, "POST", "/v1/tokens", json=body)
    if as_json:
        typer.echo(json.dumps(made))
        return
    typer.echo(made["token"])
    typer.echo(
        f"{made['id']}  {made['name']}  {made['role']}; it is not shown again, and goes into TSM_TOKEN", err=True
    )


@tokens_app.command("list")
def list_tokens(as_json: Json = False, server: Server = LOCAL) -> None:
    """The tokens that are neither revoked nor expired."""
    found = ask(server, "GET", "/v1/tokens")["tokens"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [("ID", "NAME", "ROLE", "STREAMS", "EXPIRES", "LAST USED")]
    for token in found:
        streams = ", ".join(token["streams"]) if token["streams"] is not None else "all"
        when = [_day(token[name]) for name in ("expires_at", "last_used_at")]
        rows.append((token["id"], token["name"], token["role"], streams, *when))
    print_table(rows)


@tokens_app.command("revoke")
def revoke_token(
    which: Annotated[str, typer.Argument(metavar="ID|NAME", help="id or name of the token")], server: Server = LOCAL
) -> None:
    """Forget a token: it opens nothing from now on."""
    ask(server, "DELETE", f"/v1/tokens/{quote(which, safe='')}")
    typer.echo(f"{which}  revoked")


def seconds_of(text: str) -> float:
    """The seconds of `90s`, `15m`, `12h` or `30d`. Raises BadDuration."""
    found = re.fullmatch(r"(\d+)([smhd])", text)
    if found is None:
        raise BadDuration(f"{text!r} is no length of time; write it as 90s, 15m, 12h or 30d")
    return float(found[1]) * UNITS_S[found[2]]


def _day(at: float | None) -> str:
    return "never" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
