"""Jobs on the real service: an upload through Ray Serve, its results, and the death of the process that runs them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.infer import infer_file
from services.jobs import RUNNERS
from tests.integration.conftest import RunningService
from tests.unit.services.test_jobs import film


@pytest.fixture(scope="module")
def long_film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return film(tmp_path_factory.mktemp("film") / "film.mp4", frames=4000).read_bytes()


def job_of(service: RunningService, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = service.http.get(f"/v1/jobs/{job_id}").raise_for_status().json()
    return job


def until(service: RunningService, job_id: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    service.wait(lambda: true(job_of(service, job_id)), 120, "the job")
    return job_of(service, job_id)


def test_a_job_on_the_service(service: RunningService, tmp_path: Path):
    file = film(tmp_path / "film.mp4", frames=60)
    sent = service.http.post("/v1/jobs?annotate=true", files={"file": ("film.mp4", file.read_bytes(), "video/mp4")})
    assert sent.status_code == 202, sent.text
    job = until(service, sent.json()["id"], lambda job: job["state"] not in ("QUEUED", "RUNNING"))
    assert (job["state"], job["frames"], job["name"]) == ("DONE", 60, "film.mp4"), job
    found = service.http.get(f"/v1/jobs/{job['id']}/events").json()["events"]
    expected = [event for result in infer_file(file) for event in result.events]
    assert [event["data"]["pts_s"] for event in found] == [round(event.pts_s, 6) for event in expected]
    annotated = service.http.get(f"/v1/jobs/{job['id']}/annotated.mp4").content
    assert len(annotated) == job["annotated_bytes"] > 0
    refused = service.http.post("/v1/jobs", content=b"nothing", headers={"Content-Type": "video/mp4"})
    assert (refused.status_code, refused.json()["reason"]) == (422, "bad_media"), "an error of ours passes through Ray"
    assert service.http.delete(f"/v1/jobs/{job['id']}").status_code == 204


def test_a_job_whose_process_is_killed_fails_and_the_next_one_runs(service: RunningService, long_film: bytes):
    headers = {"Content-Type": "video/mp4"}
    lost = service.http.post("/v1/jobs", content=long_film, headers=headers).raise_for_status().json()
    running = until(service, lost["id"], lambda job: job["frames"] > 0)
    pid = int(service.store.documents(RUNNERS)[running["runner"]])
    threads = [thread.id for thread in psutil.Process(pid).threads()]
    assert max(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads) >= 10, "cameras go first"
    assert pid in {process.pid for process in service.tree()}
    os.kill(pid, signal.SIGKILL)
    failed = until(service, lost["id"], lambda job: job["state"] == "FAILED")
    assert failed["reason"] == "runner_lost"

    def sent() -> bool:
        answer = service.http.post("/v1/jobs", content=long_film, headers=headers)
        if answer.is_success:
            again.append(answer.json()["id"])
        else:
            assert (answer.status_code, answer.json()["reason"]) == (503, "jobs_unavailable"), answer.text
        return answer.is_success

    again: list[str] = []
    service.wait(sent, 120, "another process takes jobs")
    until(service, again[0], lambda job: job["frames"] > 0)
    began_s = time.monotonic()
    assert service.http.delete(f"/v1/jobs/{again[0]}").status_code == 204
    assert job_of(service, again[0])["state"] == "CANCELLED"
    assert time.monotonic() - began_s < 5
