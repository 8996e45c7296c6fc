"""`tsm jobs`: send a video to a running service, follow it, fetch what was found."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

from services.remote import LOCAL, Json, Server, ask, check, unreachable, with_token
from services.tables import print_table
from tsm_core.errors import CallerError, WorldError

jobs_app = typer.Typer(no_args_is_help=True, help="Videos sent to a running service.")
JobArg = Annotated[str, typer.Argument(metavar="ID", help="id of the job")]
PIECE_BYTES = 1 << 20
ANSWER_S = 180.0  # the service looks at the whole video before it answers
LOOK_S = 0.5
ACTIVE = ("QUEUED", "RUNNING")


class UnreadableVideo(CallerError):
    """The file to send cannot be read."""

    reason = "bad_file"


class UnwritableVideo(CallerError):
    """The annotated video cannot be written there."""

    reason = "bad_output"


class JobFailed(WorldError):
    """The job came to no end; `reason` is the service's."""


@jobs_app.command("submit")
def submit_job(
    file: Annotated[Path, typer.Argument(help="video file")],
    model: Annotated[str | None, typer.Option("--model", help="default: the service's first model")] = None,
    threshold: Annotated[float | None, typer.Option(help="score that makes something worth telling")] = None,
    annotate: Annotated[bool, typer.Option("--annotate", help="also make a video that shows what was found")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="return when it is done")] = False,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """Send a video to be looked at."""
    given = {"model": model, "threshold": threshold, "annotate": str(annotate).lower(), "name": file.name[:200]}
    params = {key: value for key, value in given.items() if value is not None}
    headers = {"Content-Type": "application/octet-stream", "Idempotency-Key": secrets.token_hex(16)}
    try:
        with file.open("rb") as video:
            job = ask(server, "POST", "/v1/jobs", content=video, params=params, headers=headers, timeout=ANSWER_S)
    except OSError as error:
        raise UnreadableVideo(f"{file} cannot be read: {error.strerror}; give the path of a video file") from None
    while wait and job["state"] in ACTIVE:
        time.sleep(LOOK_S)
        job = ask(server, "GET", _path(job["id"]))
    _show(job, as_json)
    if wait and job["state"] != "DONE":
        said = job["error"] or f"job {job['id']} is {job['state']}"
        raise JobFailed(said, reason=job["reason"] or job["state"].lower())


@jobs_app.command("list")
def list_jobs(as_json: Json = False, server: Server = LOCAL) -> None:
    """All jobs that are kept, the newest first."""
    found = ask(server, "GET", "/v1/jobs")["jobs"]
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [("ID", "STATE", "DONE", "FRAMES", "FPS", "EVENTS", "MODEL", "NAME")]
    rows += [
        (
            job["id"],
            job["state"],
            f"{job['progress']:.0%}",
            str(job["frames"]),
            f"{job['fps']:.1f}",
            str(job["events"]),
            job["model"],
            job["name"],
        )
        for job in found
    ]
    print_table(rows)


@jobs_app.command("get")
def get_job(
    job_id: JobArg,
    annotated: Annotated[Path | None, typer.Option(help="write the annotated video to this file")] = None,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """How far a job is, or how it ended."""
    job = ask(server, "GET", _path(job_id))
    if annotated is not None:
        _fetch(server, _path(job_id, "/annotated.mp4"), annotated)
    _show(job, as_json)


@jobs_app.command("events")
def job_events(job_id: JobArg, as_json: Json = False, server: Server = LOCAL) -> None:
    """What was found so far, with its times in the video."""
    for event in _events(server, job_id):
        if as_json:
            typer.echo(json.dumps(event))
        else:
            data = event["data"]
            what = f"{data['label']}{' ' + data['track_id'] if 'track_id' in data else ''}"
            typer.echo(
                f"{data['pts_s']:8.2f} s  {event['type'].removeprefix('tsm.v1.'):<18} {what} {data['score']:.2f}"
            )


@jobs_app.command("cancel")
def cancel_job(job_id: JobArg, server: Server = LOCAL) -> None:
    """Cancel a job; forget one that is over."""
    before = ask(server, "GET", _path(job_id))["state"]
    ask(server, "DELETE", _path(job_id))
    typer.echo(f"{job_id}  {'cancelled' if before in ACTIVE else 'forgotten'}")


def _events(server: str, job_id: str) -> Iterator[dict[str, Any]]:
    after: int | None = 0
    while after is not None:
        page = ask(server, "GET", _path(job_id, "/events"), params={"after": after})
        yield from page["events"]
        after = page["next_after"]


def _fetch(server: str, path: str, to: Path) -> None:
    """Write what the service has at `path` to a file. Raises RemoteRefusal, RemoteTrouble, NoServer."""
    try:
        with (
            httpx.Client(base_url=server, timeout=ANSWER_S, trust_env=False, headers=with_token()) as client,
            client.stream("GET", path) as answer,
        ):
            if not answer.is_success:
                answer.read()
            check(answer)
            with to.open("wb") as file:
                for piece in answer.iter_bytes(PIECE_BYTES):
                    file.write(piece)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(server, error) from None
    except OSError as error:
        raise UnwritableVideo(f"{to} cannot be written: {error.strerror}; choose another place") from None


def _path(job_id: str, rest: str = "") -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}{rest}"


def _show(job: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(job))
        return
    line = f"{job['id']}  {job['state']}  {job['progress']:.0%}  {job['frames']} frames  {job['events']} events"
    typer.echo(f"{line}  {job['error']}" if job["error"] else line)
