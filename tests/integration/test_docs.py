"""The commands of the README, docs/streams-api.md and docs/jobs.md, as they stand there, against the real service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.simulator import start_simulator
from tests.integration.conftest import RunningService
from tests.unit.services.test_jobs import film

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMAND = f"{sys.executable} -m services.cli"
TSM = f'tsm() {{ case $1 in streams|events|jobs) set -- "$@" --server "$TSM";; esac; {COMMAND} "$@"; }}'
FETCH = ("models pull", "evaluate")  # from a model hub, and for a data set
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")


def blocks(page: str) -> list[str]:
    """The page's shell commands, block by block."""
    found: list[str] = re.findall(r"```sh\n(.*?)```", (DOCS.parent / page).read_text(), re.DOTALL)
    return found


def run(service: RunningService, commands: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{TSM}\n{commands}"],
        env={"TSM": service.url, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(DOCS.parent)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def door(service: RunningService) -> Iterator[None]:
    with start_simulator({"door": "scene:3"}) as cameras:
        service.add("door", cameras.urls[0])
        yield
        service.http.delete("/v1/streams/door")


def test_commands_of_the_streams_api(service: RunningService, door: None, tmp_path: Path) -> None:
    change, query = blocks("docs/streams-api.md")
    changed = json.loads(run(service, change, tmp_path))
    assert (changed["max_fps"], changed["restarts"]) == (5.0, ["max_fps"])
    assert run(service, query, tmp_path) == "", "no detector has seen a person in a zone that is not there"


def test_commands_of_jobs(service: RunningService, tmp_path: Path) -> None:
    film(tmp_path / "street.mp4", frames=40)
    (block,) = blocks("docs/jobs.md")
    submit, *look, form, body = [line for line in block.splitlines() if line]
    told = run(service, submit, tmp_path)
    job_id, state, *_ = told.split()
    assert (state, "40 frames" in told) == ("DONE", True), told
    events, got = run(service, "\n".join(look).replace("job-3f0c...", job_id), tmp_path).rsplit("\n", 2)[:2]
    assert f"{len(events.splitlines())} events" in got
    assert (tmp_path / "found.mp4").stat().st_size > 0
    sent = [json.loads(run(service, line, tmp_path)) for line in (form, body)]
    assert [job["annotate"] for job in sent] == [True, True]
    for job in (*sent, {"id": job_id}):
        assert service.http.delete(f"/v1/jobs/{job['id']}").is_success


@pytest.mark.timeout(300)
def test_commands_of_the_readme(service: RunningService, tmp_path: Path) -> None:
    film(tmp_path / "clip.mp4", frames=20)
    lines = [line for block in blocks("README.md") for line in block.splitlines() if not line.startswith("make ")]
    ran = [line for line in lines if not any(word in line for word in FETCH)]
    assert len(ran) >= 10
    with start_simulator({"stream1": "scene:3"}) as cameras:
        for line in ran:
            command = line.replace(".venv/bin/tsm", "tsm").replace("rtsp://192.168.1.20:554/stream1", cameras.urls[0])
            command = command.replace("http://127.0.0.1:8000", "$TSM").partition("  #")[0]
            if "tail" in command:  # these two do not end by themselves
                command += " --after 0 --count 1"
            if "curl -N" in command:
                command = command.replace("-N", "-N --max-time 5") + "?after=0 || [ $? = 28 ]"
            assert run(service, command, tmp_path).strip(), line
    assert (tmp_path / "out.mp4").stat().st_size > 0
    assert service.http.delete("/v1/streams/door").is_success
