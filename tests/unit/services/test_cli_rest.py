"""The verbs of `tsm streams`, `tsm events` and `tsm jobs` that look back, pause and send videos."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import torch
from typer.testing import CliRunner, Result

from services.cli import app
from services.jobs import JobRunner, local_jobs
from services.manager import StreamManager, served_models
from services.schemas import SourceSpec, StreamSpec, state_event
from services.settings import JobsSettings, Settings, StoreSettings
from services.store import MemoryStore
from tests.unit.services.http_kit import serving
from tests.unit.services.test_jobs import film


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> StreamManager:
    settings = Settings(jobs=JobsSettings(dir=tmp_path_factory.mktemp("jobs")))
    manager = StreamManager(MemoryStore(StoreSettings()), settings, models=served_models(settings))
    for name, floor in (("a", "1"), ("b", "2")):
        spec = StreamSpec(id=name, source=SourceSpec(uri="rtsp://127.0.0.1/x"), tags={"floor": floor})
        manager.store.put_stream(spec, create=True)
        lease = manager.store.assign(name, "r1")
        for number in range(3):
            event = state_event(name, "STARTING", "RUNNING", f"number {number}", time.time())
            manager.store.publish(lease, events=[event])
    return manager


@pytest.fixture(scope="module")
def server(manager: StreamManager) -> Iterator[str]:
    before = torch.get_num_threads()
    runner = JobRunner(manager.store, manager.settings, "runner-1")
    runner.start()
    with serving(manager, jobs=local_jobs(runner)) as address:
        yield address
    runner.stop()
    torch.set_num_threads(before)


def tsm(server: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"TSM_SERVER": server})


def test_lists_can_be_narrowed(server: str):
    def ids(*more: str) -> list[str]:
        return [one["id"] for one in json.loads(tsm(server, "streams", "list", "--json", *more).stdout)]

    assert ids() == ["a", "b"]
    assert ids("--tag", "floor:2") == ["b"]
    assert ids("--state", "starting", "--tag", "floor:1") == ["a"]
    assert ids("--state", "paused") == []
    assert "(reason: invalid_request)" in tsm(server, "streams", "list", "--state", "asleep").stderr


def test_events_of_the_past(server: str):
    lines = tsm(server, "events", "query", "--stream", "a").stdout.splitlines()
    assert [line.split("#")[1].split()[0] for line in lines] == ["3", "2", "1"]
    found = tsm(server, "events", "query", "--json", "--count", "4", "--type", "stream", "--after", "2020-01-01T00:00Z")
    assert len(found.stdout.splitlines()) == 4
    assert json.loads(found.stdout.splitlines()[0])["type"] == "tsm.v1.stream.state"
    assert len(tsm(server, "events", "query", "--count", "0").stdout.splitlines()) == 6
    assert tsm(server, "events", "query", "--label", "cat").stdout == ""
    refused = tsm(server, "events", "query", "--before", "2020-01-01T00:00")
    assert refused.exit_code == 2
    assert "no time zone" in refused.stderr


def test_pause_resume_and_restart(server: str, manager: StreamManager):
    assert tsm(server, "streams", "pause", "a").exit_code == 0
    assert manager.store.get_stream("a").paused
    assert tsm(server, "streams", "resume", "a").exit_code == 0
    assert json.loads(tsm(server, "streams", "restart", "a", "--json").stdout)["revision"] == 2
    manager.stop("a")
    refused = tsm(server, "streams", "pause", "a")
    assert (refused.exit_code, "(reason: stream_not_served)" in refused.stderr) == (2, True)


def test_a_video_goes_and_its_results_come_back(server: str, tmp_path: Path):
    file = film(tmp_path / "film.mp4", frames=30)
    sent = tsm(server, "jobs", "submit", str(file), "--annotate", "--threshold", "0.2", "--wait", "--json")
    assert sent.exit_code == 0, sent.output
    job = json.loads(sent.stdout)
    assert (job["state"], job["name"], job["frames"]) == ("DONE", "film.mp4", 30)
    assert "DONE" in tsm(server, "jobs", "list").stdout
    assert [one["id"] for one in json.loads(tsm(server, "jobs", "list", "--json").stdout)] == [job["id"]]
    events = tsm(server, "jobs", "events", job["id"], "--json").stdout.splitlines()
    assert len(events) == job["events"] > 0
    assert len(tsm(server, "jobs", "events", job["id"]).stdout.splitlines()) == len(events)
    out = tmp_path / "drawn.mp4"
    assert "30 frames" in tsm(server, "jobs", "get", job["id"], "--annotated", str(out)).stdout
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 30
    assert "forgotten" in tsm(server, "jobs", "cancel", job["id"]).stdout
    assert "(reason: job_not_found)" in tsm(server, "jobs", "get", job["id"]).stderr


def test_what_cannot_be_sent_is_told(server: str, tmp_path: Path):
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    refused = tsm(server, "jobs", "submit", str(text))
    assert (refused.exit_code, "(reason: bad_media)" in refused.stderr) == (2, True), refused.output
    missing = tsm(server, "jobs", "submit", str(tmp_path / "none.mp4"))
    assert (missing.exit_code, "(reason: bad_file)" in missing.stderr) == (2, True)
