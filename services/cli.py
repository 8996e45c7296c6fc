"""The tsm command: serve, look at streams, follow events, run a file, check the machine; more in cli_zoo.py."""

from __future__ import annotations

import getpass
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
import yaml
from typer.core import TyperGroup

from services.cli_jobs import jobs_app
from services.cli_tokens import tokens_app
from services.cli_zoo import PASSED_ON, data_app, evaluate, model_folders, models_app, recipes_app, train
from services.logs import set_up
from services.remote import LOCAL, Json, RemoteRefusal, Server, ask, check, read_token, unreachable, with_token
from services.settings import load_settings
from services.tables import print_table
from tsm_core.errors import CallerError, TSMError, WorldError
from tsm_core.types import ObjectEvent
from tsm_core.zoo import find_model

EXIT_CALLER, EXIT_WORLD, EXIT_INTERRUPTED = 2, 3, 130


class NothingToChange(CallerError):
    """An update that names no field."""

    reason = "nothing_to_change"


class BadModelsFile(CallerError):
    """A description of a stream's models that cannot be used."""

    reason = "bad_models_file"


class NotRunning(WorldError):
    """The stream did not run in time."""

    reason = "stream_not_running"


class Commands(TyperGroup):
    """Commands whose errors become one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run; 2 for what the caller must change, 3 for what may work later."""
        try:
            return super().invoke(ctx)
        except TSMError as error:
            typer.echo(f"error: {error} (reason: {error.reason})", err=True)
            raise typer.Exit(EXIT_WORLD if isinstance(error, WorldError) else EXIT_CALLER) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Live video analytics: streams in, actions out.",
)
streams_app = typer.Typer(no_args_is_help=True, help="Streams of a running service.")
events_app = typer.Typer(no_args_is_help=True, help="Events of a running service.")
app.add_typer(streams_app, name="streams")
app.add_typer(events_app, name="events")
app.add_typer(jobs_app, name="jobs")
app.add_typer(tokens_app, name="tokens")
app.add_typer(models_app, name="models")
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.command("evaluate")(evaluate)
app.command("train", context_settings=PASSED_ON, add_help_option=False)(train)

StreamArg = Annotated[str, typer.Argument(metavar="ID", help="id of the stream")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="tsm.yaml to read")]
UriOption = Annotated[str, typer.Option("--uri", help="rtsp://, rtsps:// or file:// address")]
UserOption = Annotated[str | None, typer.Option("--username", help="user name at the camera")]
PasswordPrompt = Annotated[bool, typer.Option("--password", help="ask for the camera's password")]
ModelsFile = Annotated[
    Path | None,
    typer.Option("--models", help="YAML or JSON file with the list of models: zones, lines and all that the API takes"),
]
PasswordStdin = Annotated[bool, typer.Option("--password-stdin", help="read the camera's password from stdin")]
Transport = Annotated[str, typer.Option("--transport", help="tcp or udp")]


def main() -> None:
    """Entry point of the `tsm` command."""
    app()


@app.callback()
def root(
    token_file: Annotated[Path | None, typer.Option("--token-file", help="file with the token; else TSM_TOKEN")] = None,
) -> None:
    """Live video analytics: streams in, actions out."""
    if token_file is not None:
        os.environ["TSM_TOKEN"] = read_token(token_file)


# the service


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on; default 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one")] = None,
    config: ConfigFile = None,
) -> None:
    """Serve streams until SIGINT or SIGTERM."""
    given = {"server.host": host, "server.port": port, "server.grpc_port": grpc_port}
    settings = load_settings(config, {name: value for name, value in given.items() if value is not None})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    set_up(settings, "service")
    from services.app import run_service

    try:
        service = run_service(settings)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    try:
        also = f" and gRPC on {service.grpc}" if service.grpc else ""
        typer.echo(f"tsm-live serves {service.url} (page, API and metrics){also}; Ctrl-C ends it")
        if service.admin_token_file is not None:
            typer.echo(f"it wants a token of its callers; an admin's is in {service.admin_token_file}")
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        typer.echo("stopping: shift states are saved first")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # once is enough
        service.stop()


@app.command()
def demo(
    seconds: Annotated[float | None, typer.Option(help="end after so long with a score; default: until Ctrl-C")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port; 0 takes a free one")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one")] = None,
    config: ConfigFile = None,
) -> None:
    """Serve simulated cameras, show their events, and score the results in a last line of JSON."""
    from services.demo import last_line, run

    given = {"server.port": port, "server.grpc_port": grpc_port}
    settings = load_settings(config, {name: value for name, value in given.items() if value is not None})
    typer.echo(last_line(run(settings, seconds, typer.echo)))


@app.command()
def infer(
    file: Annotated[Path, typer.Argument(help="video file")],
    model: Annotated[str, typer.Option("--model", help="name of the model")] = "motion9",
    as_json: Annotated[
        bool, typer.Option("--json", help="print what each frame gave, and every event, as JSON lines")
    ] = False,
    annotate: Annotated[Path | None, typer.Option(help="write an MP4 with what was found drawn on it")] = None,
) -> None:
    """Recognise actions or follow objects in a file, the same way as on a stream, without a service."""
    import torch

    from pipelines.infer import infer_file, title_of
    from services.schemas import cloud_event, object_event, objects_record, score_record
    from tsm_core.checkpoints import load_model

    # threads that wait for one another cost minutes on a busy machine
    settings = load_settings()
    torch.set_num_threads(settings.engine.threads)
    network = load_model(find_model(model, None, model_folders(settings))).for_inference()
    frames, found, what = 0, 0, "actions"
    for result in infer_file(file, network, name=model, annotate=annotate):
        frames += 1
        found += sum(event.phase == "new" for event in result.events)
        at = (result.frame_number, result.pts_s, result.time_s)
        record: dict[str, Any] | None = None
        if result.scores is not None:
            record = score_record("file", model, *at, result.scores)
        if result.objects is not None:
            what, seen = "objects", result.objects
            record = objects_record("file", model, *at, seen.source_size, seen.tracks, seen.warmup)
        if as_json and record is not None:
            typer.echo(json.dumps({"type": "score", "score": record}))
        for event in result.events:
            if isinstance(event, ObjectEvent):
                told, score = object_event(event), event.after.top_score
                began_s, until_s = event.after.start_time_s, event.after.time_s  # it is gone some time later
            else:
                told, score = cloud_event(event), event.top_score
                began_s, until_s = event.start_time_s, event.frame_time_s
            if as_json:
                typer.echo(json.dumps({"type": "event", "event": told}))
            elif event.phase == "end":
                typer.echo(f"{began_s:8.2f} - {until_s:8.2f} s  {title_of(event):<18} {score:.2f}")
    if not as_json:
        typer.echo(f"{frames} frames, {found} {what}{f'; written to {annotate}' if annotate else ''}")


# streams


@streams_app.command("add")
def add_stream(
    uri: UriOption,
    stream_id: Annotated[str | None, typer.Option("--id", help="default: one is made up")] = None,
    name: Annotated[str, typer.Option(help="name to show")] = "",
    username: UserOption = None,
    password: PasswordPrompt = False,
    password_stdin: PasswordStdin = False,
    model: Annotated[list[str] | None, typer.Option("--model", help="default: the service's first model")] = None,
    models: ModelsFile = None,
    window_s: Annotated[float | None, typer.Option("--window-s", help="window mode: seconds one result sees")] = None,
    stride_s: Annotated[float | None, typer.Option("--stride-s", help="window mode: seconds between results")] = None,
    max_fps: Annotated[float | None, typer.Option(help="recognise at most so many frames a second")] = None,
    transport: Transport = "tcp",
    loop: Annotated[bool, typer.Option("--loop", help="files: begin again at the end")] = False,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="register it even if it does not answer")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="return when it runs")] = False,
    wait_s: Annotated[float, typer.Option("--wait-s", help="longest wait")] = 15.0,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """Register a stream. Its password comes from a prompt, stdin or TSM_STREAM_PASSWORD."""
    source = _source(uri, username, password, password_stdin, transport)
    body: dict[str, Any] = {"name": name, "source": {**source, "loop": loop}}
    if stream_id is not None:
        body["id"] = stream_id
    window = {key: value for key, value in (("window_s", window_s), ("stride_s", stride_s)) if value is not None}
    if window and not model:
        raise NothingToChange("--window-s and --stride-s belong to a model: name it with --model")
    if chosen := _models(model, models, **window):
        body["models"] = chosen
    if max_fps is not None:
        body["max_fps"] = max_fps
    began = time.monotonic()
    view = ask(server, "POST", "/v1/streams", json=body, params={"probe": str(not no_probe).lower()})
    while wait and view["status"]["state"] not in ("RUNNING", "ENDED"):
        status = view["status"]
        if status["state"] == "FAILED" or time.monotonic() - began > wait_s:
            said = f": {status['status_message']}" if status["status_message"] else ""
            raise NotRunning(f"stream {view['id']!r} is {status['state']} after {time.monotonic() - began:.1f} s{said}")
        time.sleep(0.1)
        view = ask(server, "GET", _path(view["id"]))
    _show(view, as_json, f"{view['id']}  {view['status']['state']}  {view['source']['uri']}")


@streams_app.command("list")
def list_streams(
    state: Annotated[list[str] | None, typer.Option(help="only in this state; again for more of them")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="only with this tag, key:value; again for more of them")] = None,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """All streams, or those in a state or with a tag."""
    params = {"state": [name.upper() for name in state or ()], "tag": tag or []}
    found = list(_pages(server, "/v1/streams", "streams", params, 0))
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [("ID", "STATE", "FPS", "P50 MS", "SEES", "SOURCE")] + [_row(view) for view in found]
    print_table(rows)


@streams_app.command("get")
def get_stream(stream_id: StreamArg, as_json: Json = False, server: Server = LOCAL) -> None:
    """One stream: what should be, and what is."""
    view = ask(server, "GET", _path(stream_id))
    if as_json:
        typer.echo(json.dumps(view))
        return
    status = view.pop("status")
    for title, values in (("stream", view), ("status", status)):
        typer.echo(title)
        for key, value in values.items():
            if value not in (None, "", {}, []):
                typer.echo(f"  {key}: {value if isinstance(value, str) else json.dumps(value)}")


@streams_app.command("update")
def update_stream(
    stream_id: StreamArg,
    name: Annotated[str | None, typer.Option(help="name to show")] = None,
    uri: Annotated[str | None, typer.Option("--uri", help="new address; its password must be given again")] = None,
    username: UserOption = None,
    password: PasswordPrompt = False,
    password_stdin: PasswordStdin = False,
    model: Annotated[list[str] | None, typer.Option("--model", help="models from now on")] = None,
    models: ModelsFile = None,
    max_fps: Annotated[float | None, typer.Option(help="recognise at most so many frames a second")] = None,
    transport: Transport = "tcp",
    no_probe: Annotated[bool, typer.Option("--no-probe", help="take the address even if it does not answer")] = False,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """Change a stream; what is not named stays."""
    changes: dict[str, Any] = {"name": name, "max_fps": max_fps}
    changes["source"] = _source(uri, username, password, password_stdin, transport) if uri is not None else None
    changes["models"] = _models(model, models)
    body = {key: value for key, value in changes.items() if value is not None}
    if not body:
        raise NothingToChange("nothing to change: name at least one of --name --uri --model --models --max-fps")
    view = ask(server, "PATCH", _path(stream_id), json=body, params={"probe": str(not no_probe).lower()})
    _show(view, as_json, f"{view['id']}  {view['status']['state']}  {view['source']['uri']}")


@streams_app.command("remove")
def remove_stream(stream_id: StreamArg, server: Server = LOCAL) -> None:
    """Forget a stream."""
    ask(server, "DELETE", _path(stream_id))
    typer.echo(f"{stream_id}  removed")


@streams_app.command("start")
def start_stream(stream_id: StreamArg, as_json: Json = False, server: Server = LOCAL) -> None:
    """Serve a stopped stream again."""
    _order(server, stream_id, "start", as_json)


@streams_app.command("stop")
def stop_stream(stream_id: StreamArg, as_json: Json = False, server: Server = LOCAL) -> None:
    """Stop serving a stream; it stays registered."""
    _order(server, stream_id, "stop", as_json)


@streams_app.command("pause")
def pause_stream(stream_id: StreamArg, as_json: Json = False, server: Server = LOCAL) -> None:
    """Close a stream's source; it keeps its place and its shift state."""
    _order(server, stream_id, "pause", as_json)


@streams_app.command("resume")
def resume_stream(stream_id: StreamArg, as_json: Json = False, server: Server = LOCAL) -> None:
    """Open a paused stream's source again."""
    _order(server, stream_id, "resume", as_json)


@streams_app.command("restart")
def restart_stream(stream_id: StreamArg, as_json: Json = False, server: Server = LOCAL) -> None:
    """Close a stream's source and open it anew."""
    _order(server, stream_id, "restart", as_json)


@streams_app.command("watch")
def watch_stream(
    stream_id: StreamArg,
    count: Annotated[int, typer.Option(help="end after so many lines; 0: until Ctrl-C")] = 0,
    every_s: Annotated[float, typer.Option("--every-s", min=0.1, help="seconds between two lines")] = 1.0,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """Print a stream's status again and again."""
    lines = 0
    while True:
        status = ask(server, "GET", _path(stream_id, "/status"))
        if as_json:
            typer.echo(json.dumps(status))
        else:
            latency = status["latency_ms"]["p50"] if status["latency_ms"] else "-"
            typer.echo(
                f"{time.strftime('%H:%M:%S')}  {status['state']:<10}  {status['fps']:5.1f} fps  p50 {latency} ms  "
                f"processed {status['processed']}  dropped {sum(status['dropped'].values())}  "
                f"{status['label'] or ''}  {status['status_message']}".rstrip()
            )
        lines += 1
        if lines == count:
            return
        time.sleep(every_s)


@streams_app.command("probe")
def probe_stream(
    uri: UriOption,
    username: UserOption = None,
    password: PasswordPrompt = False,
    password_stdin: PasswordStdin = False,
    transport: Transport = "tcp",
    snapshot: Annotated[Path | None, typer.Option(help="write the picture to this file")] = None,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """Try a source, stage by stage, without registering it."""
    import base64

    source = _source(uri, username, password, password_stdin, transport)
    result = ask(server, "POST", "/v1/streams:probe", json={"source": source})
    if snapshot is not None and result["snapshot"]:
        snapshot.write_bytes(base64.b64decode(result["snapshot"]))
    if as_json:
        typer.echo(json.dumps(result))
    else:
        for stage in result["stages"]:
            typer.echo(
                f"{'ok  ' if stage['ok'] else 'FAIL'}  {stage['name']:<10} {stage['ms']:7.1f} ms  {stage['detail']}"
            )
        if result["ok"]:
            typer.echo(f"video: {result['codec']} {result['width']}x{result['height']} {result['fps'] or '?'} fps")
    if not result["ok"]:
        hint = f"; {result['hint']}" if result["hint"] else ""
        raise RemoteRefusal(f"{result['message']}{hint}", reason=(result["error_code"] or "probe_failed").lower())


# events


@events_app.command("tail")
def tail_events(
    stream: Annotated[str | None, typer.Option("--stream", help="only this stream's; survives interruptions")] = None,
    after: Annotated[int | None, typer.Option(help="with --stream: begin behind this sequence")] = None,
    count: Annotated[int, typer.Option(help="end after so many events; 0: until Ctrl-C")] = 0,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """Print events as they happen."""
    for number, event in enumerate(_events(server, stream, after), 1):
        if as_json:
            typer.echo(json.dumps(event))
        else:
            typer.echo(_event_line(event))
        if number == count:
            return


@events_app.command("query")
def query_events(
    stream: Annotated[str | None, typer.Option("--stream", help="only this stream's")] = None,
    label: Annotated[str | None, typer.Option(help="only of this label")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="action, action.new, detection, stream.state, ...")] = None,
    zone: Annotated[str | None, typer.Option(help="only in this zone or region")] = None,
    min_score: Annotated[float | None, typer.Option(help="only with at least this score")] = None,
    after: Annotated[str | None, typer.Option(help="published then or later: ISO 8601 with zone, or seconds")] = None,
    before: Annotated[str | None, typer.Option(help="published earlier")] = None,
    count: Annotated[int, typer.Option(help="at most so many; 0: all that are kept")] = 100,
    as_json: Json = False,
    server: Server = LOCAL,
) -> None:
    """Print events of the past, newest first."""
    given = {"stream": stream, "label": label, "type": kind, "zone": zone, "min_score": min_score}
    params = {key: value for key, value in (*given.items(), ("after", after), ("before", before)) if value is not None}
    for event in _pages(server, "/v1/events", "events", params, count):
        typer.echo(json.dumps(event) if as_json else _event_line(event))


@app.command()
def doctor(config: ConfigFile = None, as_json: Json = False) -> None:
    """Check that this machine can serve; exit code 1 when it cannot."""
    from services.doctor import examine

    findings = examine(load_settings(config))
    if as_json:
        typer.echo(json.dumps([{"name": f.name, "verdict": f.verdict, "detail": f.detail} for f in findings]))
    else:
        for finding in findings:
            typer.echo(f"{finding.verdict:<4}  {finding.name:<10} {finding.detail}")
    if any(finding.verdict == "FAIL" for finding in findings):
        raise typer.Exit(1)


# helpers


def _source(uri: str, username: str | None, ask: bool, stdin: bool, transport: str) -> dict[str, Any]:
    password: str | None = os.environ.get("TSM_STREAM_PASSWORD")
    if stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    elif ask:
        password = getpass.getpass("Password of the camera: ")
    return {"uri": uri, "username": username, "password": password or None, "rtsp_transport": transport}


def _models(names: list[str] | None, file: Path | None, **options: float) -> list[Any] | None:
    """The models of a stream, by name or as a file describes them. Raises BadModelsFile."""
    if file is None:
        return [{"name": name, **options} for name in names] if names else None
    if names:
        raise BadModelsFile("--model and --models both name the models: use one of them")
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadModelsFile(f"{file} cannot be read: {error}") from None
    if not isinstance(found, list):
        raise BadModelsFile(f"{file} must hold a list of models, such as `- name: motion9`, got {type(found).__name__}")
    return found


def _event_line(event: Mapping[str, Any]) -> str:
    stream_id = event["data"]["stream_id"]
    return f"{event['time']}  {stream_id:<12} #{event['sequence']:<5} {event['type']:<24} {_what(event)}"


def _pages(server: str, path: str, name: str, params: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """The first `count` of a list that comes in pages; 0: all."""
    cursor: dict[str, str] = {}
    given = 0
    while True:
        body = ask(
            server, "GET", path, params={**params, "limit": min(count - given, 1000) if count else 1000, **cursor}
        )
        yield from body[name]
        given += len(body[name])
        if body["next_cursor"] is None or given == count:
            return
        cursor = {"cursor": body["next_cursor"]}


def _what(event: Mapping[str, Any]) -> str:
    """What an event says, in few words."""
    data = event["data"]
    if "label" not in data:
        return f"{data.get('before')} -> {data.get('after')}"
    track = f" {data['track_id']}" if "track_id" in data else ""
    places = [f"in {zone}" for zone in data.get("current_zones", ())]
    places += [f"over {crossing['line']} ({crossing['direction']})" for crossing in data.get("crossings", ())]
    return f"{data['label']}{track} {data['score']:.2f} {', '.join(places)}".rstrip()


def _path(stream_id: str, rest: str = "") -> str:
    return f"/v1/streams/{quote(stream_id, safe='')}{rest}"


def _events(server: str, stream: str | None, after: int | None) -> Iterator[dict[str, Any]]:
    """Events as they come; those of one stream go on after an interruption where they stopped."""
    path = _path(stream, "/events") if stream else "/v1/events"
    trouble = 0
    while True:
        headers = {"Accept": "text/event-stream", **with_token()}
        params = {"after": str(after)} if stream and after is not None else {}
        try:
            with (
                httpx.Client(base_url=server, timeout=httpx.Timeout(5.0, read=30.0), trust_env=False) as client,
                client.stream("GET", path, headers=headers, params=params) as answer,
            ):
                if not answer.is_success:
                    answer.read()
                    check(answer)
                trouble = 0
                for line in answer.iter_lines():
                    if line.startswith("data:"):
                        event = json.loads(line[5:])
                        after = event["sequence"]
                        yield event
            if stream:
                return  # the service ends it when the stream is removed
        except httpx.HTTPError as error:
            trouble += 1
            if trouble > 5:
                raise unreachable(server, error) from None
        time.sleep(0.5)


def _row(view: Mapping[str, Any]) -> tuple[str, ...]:
    status = view["status"]
    latency = f"{status['latency_ms']['p50']:.0f}" if status["latency_ms"] else "-"
    counts = [
        f"{count} {label}"
        for model in status["models"]
        if model["task"] == "detection"
        for label, count in model["objects"].items()
    ]
    sees = ", ".join(filter(None, [status["label"], *counts])) or "-"
    return view["id"], status["state"], f"{status['fps']:.1f}", latency, sees, view["source"]["uri"]


def _order(server: str, stream_id: str, verb: str, as_json: bool) -> None:
    view = ask(server, "POST", _path(stream_id, f"/{verb}"))
    _show(view, as_json, f"{stream_id}  {view['status']['state']}")


def _show(view: Mapping[str, Any], as_json: bool, line: str) -> None:
    typer.echo(json.dumps(view) if as_json else line)


if __name__ == "__main__":
    main()
