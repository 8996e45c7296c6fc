"""The tsm command against the real HTTP door over a memory store."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from typer.testing import CliRunner, Result

from pipelines.scenes import Scene
from services.cli import app
from services.manager import StreamManager
from services.schemas import SourceSpec, StreamSpec, StreamStatus, state_event
from services.settings import Settings, SourceSettings, StoreSettings
from services.store import MemoryStore
from services.stream_models import Region
from tests.unit.services.http_kit import CANARY, MODELS, serving


@pytest.fixture(scope="module")
def manager() -> StreamManager:
    return StreamManager(
        MemoryStore(StoreSettings()), Settings(source=SourceSettings(probe_timeout_s=1.0)), models=MODELS
    )


@pytest.fixture(scope="module")
def server(manager: StreamManager) -> Iterator[str]:
    with serving(manager) as address:
        yield address


@pytest.fixture(autouse=True)
def empty(manager: StreamManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSM_STREAM_PASSWORD", raising=False)
    for spec in manager.store.list_streams():
        manager.delete(spec.id)


def tsm(server: str, *arguments: str, **options: object) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"TSM_SERVER": server}, **options)
    assert CANARY not in result.output
    return result


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_stream_goes_through_its_life(server: str):
    added = tsm(server, "streams", "add", "--uri", "rtsp://127.0.0.1/x", "--id", "a", "--no-probe", "--json")
    assert added.exit_code == 0, added.output
    assert json.loads(added.stdout)["id"] == "a"
    assert [one["id"] for one in json.loads(tsm(server, "streams", "list", "--json").stdout)] == ["a"]
    assert "STARTING" in tsm(server, "streams", "list").stdout
    assert "STOPPED" in tsm(server, "streams", "stop", "a").stdout
    assert "STARTING" in tsm(server, "streams", "start", "a").stdout
    assert "rtsp://127.0.0.1/x" in tsm(server, "streams", "get", "a").stdout
    assert json.loads(tsm(server, "streams", "get", "a", "--json").stdout)["revision"] == 3
    watched = tsm(server, "streams", "watch", "a", "--count", "2", "--every-s", "0.1", "--json").stdout
    assert [json.loads(line)["state"] for line in watched.splitlines()] == ["STARTING", "STARTING"]
    assert "rtsp://127.0.0.1/x" in tsm(server, "streams", "update", "a", "--name", "Door", "--max-fps", "5").stdout
    updated = json.loads(tsm(server, "streams", "get", "a", "--json").stdout)
    assert (updated["name"], updated["max_fps"], updated["revision"]) == ("Door", 5.0, 4)
    assert "(reason: nothing_to_change)" in tsm(server, "streams", "update", "a").stderr
    assert tsm(server, "streams", "remove", "a").exit_code == 0


@pytest.mark.parametrize("way", ["stdin", "environment", "address"])
def test_password_needs_no_command_line(server: str, manager: StreamManager, monkeypatch: pytest.MonkeyPatch, way: str):
    arguments = ["streams", "add", "--uri", "rtsp://127.0.0.1/x", "--id", "p", "--username", "eye", "--no-probe"]
    if way == "stdin":
        result = tsm(server, *arguments, "--password-stdin", input=f"{CANARY}\n")
    elif way == "environment":
        monkeypatch.setenv("TSM_STREAM_PASSWORD", CANARY)
        result = tsm(server, *arguments)
    else:
        arguments[3] = f"rtsp://eye:{CANARY}@127.0.0.1/x"
        result = tsm(server, *arguments)
    assert result.exit_code == 0, result.output
    password = manager.store.get_stream("p").source.password
    assert password is not None
    assert password.get_secret_value() == CANARY


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["streams", "get", "nope"], 2, "stream_not_found"),
        (["streams", "remove", "../models"], 2, "unknown_route"),
        (["streams", "add", "--uri", "file:///etc/passwd"], 2, "source_not_allowed"),
        (["streams", "add", "--uri", "http://127.0.0.1/x"], 2, "invalid_request"),
        (["streams", "add", "--uri", "rtsp://no-such-host.invalid/x"], 2, "stream_dns_failed"),
        (["streams", "add", "--uri", "rtsp://127.0.0.1/x", "--model", "gpt", "--no-probe"], 2, "unknown_model"),
        (["streams", "add", "--uri", "rtsp://127.0.0.1:{port}/x"], 3, "stream_connection_failed"),
        (["streams", "probe", "--uri", "rtsp://127.0.0.1:{port}/x"], 2, "stream_connection_failed"),
        (["streams", "list", "--server", "http://127.0.0.1:{port}"], 3, "server_unreachable"),
        (["events", "tail", "--stream", "nope"], 2, "stream_not_found"),
        (["serve", "--config", "nowhere.yaml"], 2, "invalid_settings"),
    ],
)
def test_errors_are_one_line_with_reason_and_exit_code(server: str, arguments: list[str], code: int, reason: str):
    port = closed_port()
    result = tsm(server, *(argument.format(port=port) for argument in arguments))
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith(f"(reason: {reason})\n")
    assert result.stderr.count("\n") == 1


def test_duplicate_is_refused(server: str):
    arguments = ["streams", "add", "--uri", "rtsp://127.0.0.1/x", "--id", "twice", "--no-probe"]
    assert tsm(server, *arguments).exit_code == 0
    assert "(reason: stream_exists)" in tsm(server, *arguments).stderr


def test_models_may_come_from_a_file(server: str, manager: StreamManager, tmp_path: Path):
    file = tmp_path / "models.yaml"
    file.write_text("- name: motion9\n  where: {region: left, box: [0, 0, 0.5, 1]}\n")
    add = ["streams", "add", "--uri", "rtsp://127.0.0.1/x", "--id", "m", "--no-probe", "--models", str(file)]
    assert tsm(server, *add).exit_code == 0
    (model,) = manager.store.get_stream("m").models
    assert model.where == Region(region="left", box=(0, 0, 0.5, 1))
    file.write_text("- name: motion9\n  threshold: 0.7\n")
    assert tsm(server, "streams", "update", "m", "--models", str(file)).exit_code == 0
    assert manager.store.get_stream("m").models[0].threshold == 0.7
    for text, more in (("name: motion9", []), ("- [", []), ("- name: motion9", ["--model", "motion9"])):
        file.write_text(text)
        assert "(reason: bad_models_file)" in tsm(server, *add, *more).stderr


def test_waiting_for_a_stream_that_does_not_run(server: str):
    arguments = ["streams", "add", "--uri", "rtsp://127.0.0.1/x", "--id", "w", "--no-probe"]
    result = tsm(server, *arguments, "--wait", "--wait-s", "0.3")
    assert result.exit_code == 3
    assert "(reason: stream_not_running)" in result.stderr


def test_waiting_ends_when_the_stream_runs(server: str, manager: StreamManager):
    def serve_it() -> None:
        while not manager.store.list_streams():
            time.sleep(0.01)
        manager.store.publish(manager.store.assign("w", "r1"), status=StreamStatus(state="RUNNING", since=1.0))

    thread = threading.Thread(target=serve_it)
    thread.start()
    result = tsm(server, "streams", "add", "--uri", "rtsp://127.0.0.1/x", "--id", "w", "--no-probe", "--wait")
    thread.join()
    assert "RUNNING" in result.stdout, result.output


@pytest.mark.parametrize("only", [True, False])
def test_events_are_followed(server: str, manager: StreamManager, only: bool):
    manager.store.put_stream(StreamSpec(id="e", source=SourceSpec(uri="rtsp://127.0.0.1/x")), create=True)
    lease = manager.store.assign("e", "r1")
    over = threading.Event()

    def happen() -> None:
        while not over.wait(0.1):
            manager.store.publish(lease, events=[state_event("e", None, "RUNNING", "", 1.0)])

    thread = threading.Thread(target=happen)
    thread.start()
    try:
        arguments = ["--stream", "e", "--after", "0"] if only else []
        result = tsm(server, "events", "tail", *arguments, "--count", "3", "--json")
    finally:
        over.set()
        thread.join()
    sequences = [json.loads(line)["sequence"] for line in result.stdout.splitlines()]
    assert sequences == list(range(sequences[0], sequences[0] + 3))
    assert not only or sequences[0] == 1


def test_models_and_help_need_no_service():
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)
    assert "motion9" in [model["name"] for model in found]
    assert "motion9" in runner.invoke(app, ["models", "list"]).stdout
    for command in ("serve", "demo", "infer", "streams", "events", "models", "doctor"):
        assert command in runner.invoke(app, ["--help"]).stdout


def test_doctor_says_what_is_there_and_what_is_not(tmp_path: Path):
    config = tmp_path / "tsm.yaml"
    config.write_text("server: {port: 0}\n")
    result = CliRunner().invoke(app, ["doctor", "--json", "--config", str(config)])
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert result.exit_code == 0, result.stdout
    assert set(findings) == {"python", "packages", "ffmpeg", "store", "torch", "models", "port", "memory"}
    assert all(finding["verdict"] in ("ok", "warn") for finding in findings.values())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config.write_text(
            f"server: {{port: {taken.getsockname()[1]}}}\nengine: {{models: [{{name: nothing}}]}}\n"
            f"store: {{url: 'redis://:{CANARY}@127.0.0.1:{closed_port()}'}}\n"
        )
        result = CliRunner().invoke(app, ["doctor", "--config", str(config)])
    assert result.exit_code == 1
    failed = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("FAIL")}
    assert failed == {"models", "port", "store"}
    assert CANARY not in result.output


def write_film(path: Path, scene: Scene, frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15)
        stream.width = stream.height = 320
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene.frame(number), format="rgb24")))
        container.mux(stream.encode())
    return path


def test_infer_tells_a_film_without_a_service(tmp_path: Path):
    film, shown = write_film(tmp_path / "film.mp4", Scene(3, fps=15), 60), tmp_path / "shown.mp4"
    runner = CliRunner()
    result = runner.invoke(app, ["infer", str(film), "--json", "--annotate", str(shown)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["score"]["frame_number"] for line in lines if line["type"] == "score"] == list(range(60))
    assert shown.stat().st_size > 10_000
    assert "60 frames" in runner.invoke(app, ["infer", str(film)]).stdout
    missing = runner.invoke(app, ["infer", str(tmp_path / "none.mp4")])
    assert (missing.exit_code, "(reason: " in missing.stderr) == (2, True)


def test_infer_tells_objects_as_the_service_does(tmp_path: Path):
    film, shown = write_film(tmp_path / "film.mp4", Scene(80_000, fps=15), 20), tmp_path / "shown.mp4"
    runner = CliRunner()
    command = ["infer", str(film), "--model", "scenes_detector"]
    result = runner.invoke(app, [*command, "--json", "--annotate", str(shown)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    records = [line["score"] for line in lines if line["type"] == "score"]
    assert [record["frame_number"] for record in records] == list(range(20))
    assert all(record["size"] == [320, 320] for record in records)
    (found,) = records[-1]["objects"]
    assert (found["track_id"], found["label"], len(found["box"])) == ("file:1", "badge", 4)
    events = [line["event"] for line in lines if line["type"] == "event"]
    assert (events[0]["type"], events[-1]["type"]) == ("tsm.v1.detection.new", "tsm.v1.detection.end")
    assert {event["subject"] for event in events} == {"file:1"}
    assert events[-1]["data"]["box"] == found["box"]
    assert shown.stat().st_size > 10_000
    said = runner.invoke(app, command).stdout.splitlines()
    assert "badge #1" in said[0]
    assert said[-1] == "20 frames, 1 objects"
