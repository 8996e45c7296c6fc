"""Jobs over HTTP with a runner in the same process: uploads, progress, results, limits, ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
import torch

from pipelines.infer import infer_file
from services import jobs as jobs_module
from services.http.jobs import jobs_router
from services.jobs import KIND, RUNNERS, Job, JobRunner, JobsFull, local_jobs
from services.manager import StreamManager, served_models
from services.settings import EngineSettings, JobsSettings, LimitsSettings, ModelSettings, Settings, StoreSettings
from services.store import MemoryStore, RedisStore, StateStore
from tests.unit.services.http_kit import serving

FRAMES, FPS = 45, 15


def film(path: Path, frames: int = FRAMES, size_px: int = 96) -> Path:
    """A film of noise that changes every third of a second."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = size_px, size_px, "yuv420p"
        for number in range(frames):
            image = np.random.default_rng(number // 5).integers(0, 255, (size_px, size_px, 3), np.uint8)
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return film(tmp_path_factory.mktemp("film") / "film.mp4").read_bytes()


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return film(tmp_path_factory.mktemp("film") / "long.mp4", frames=3000).read_bytes()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=StoreSettings(data_dir=tmp_path),
        jobs=JobsSettings(queue=3, kept=4),
        limits=LimitsSettings(video_bytes=64 << 20, check_s=120.0),
        engine=EngineSettings(models=(ModelSettings(name="motion9"), ModelSettings(name="scenes_detector"))),
    )


@pytest.fixture
def store(valkey_url: str, request: pytest.FixtureRequest) -> Iterator[StateStore]:
    store = RedisStore(StoreSettings(url=valkey_url, prefix=f"{request.node.name}:"))
    yield store
    store.close()


@pytest.fixture
def runner(store: StateStore, settings: Settings) -> Iterator[JobRunner]:
    before = torch.get_num_threads()
    runner = JobRunner(store, settings, "runner-1")
    runner.start()
    yield runner
    runner.stop()
    torch.set_num_threads(before)


@pytest.fixture
def client(store: StateStore, settings: Settings, runner: JobRunner) -> Iterator[httpx.Client]:
    manager = StreamManager(store, settings, models=served_models(settings))
    with (
        serving(manager, jobs=local_jobs(runner)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=120) as client,
    ):
        yield client


def send(client: httpx.Client, body: Any, kind: str = "video/mp4", key: str | None = None, **params: Any) -> dict:
    headers = {"Content-Type": kind, **({"Idempotency-Key": key} if key else {})}
    answer = client.post("/v1/jobs", content=body, params=params, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return answer.json()


def until(client: httpx.Client, job_id: str, true: Callable[[dict], bool], within_s: float = 60.0) -> dict:
    end_s = time.monotonic() + within_s
    while True:
        job = client.get(f"/v1/jobs/{job_id}").raise_for_status().json()
        if true(job):
            return job
        assert time.monotonic() < end_s, job
        time.sleep(0.02)


def over(job: dict) -> bool:
    return job["state"] not in ("QUEUED", "RUNNING")


def without_names(event: dict) -> dict:
    """An event without what tells one run from another."""
    data = {key: value for key, value in event["data"].items() if key not in ("stream_id", "before", "after")}
    return {"type": event["type"], "time": event["time"], "data": {**data, "track_id": None}}


@pytest.mark.parametrize("model", ["motion9", "scenes_detector"])
def test_a_job_tells_what_infer_tells(
    client: httpx.Client, runner: JobRunner, video: bytes, tmp_path: Path, model: str
):
    sent = send(client, iter([video[:1000], video[1000:]]), model=model, threshold=0.2, annotate=True, name="Film")
    assert (sent["model"], sent["name"], sent["size"]) == (model, "Film", [96, 96])
    assert sent["duration_s"] == pytest.approx(FRAMES / FPS, abs=0.1)
    job = until(client, sent["id"], over)
    assert (job["state"], job["progress"], job["frames"]) == ("DONE", 1.0, FRAMES), job
    assert job["fps"] > 0

    file = tmp_path / "film.mp4"
    file.write_bytes(video)
    results = list(infer_file(file, model, threshold=0.2, stream_id=job["id"]))
    expected = [event for result in results for event in jobs_module.events_of(result)]
    found = client.get(f"/v1/jobs/{job['id']}/events").json()
    assert found["next_after"] is None
    assert [without_names(event) for event in found["events"]] == [without_names(event) for event in expected]
    assert [event["sequence"] for event in found["events"]] == list(range(1, job["events"] + 1))
    if model == "motion9":
        assert found["events"], "noise is an action to it"
        page = client.get(f"/v1/jobs/{job['id']}/events?after=1&limit=1").json()
        assert (page["events"][0]["sequence"], page["next_after"]) == (2, 2)

    answer = client.get(f"/v1/jobs/{job['id']}/annotated.mp4")
    assert answer.headers["content-type"] == "video/mp4"
    assert len(answer.content) == job["annotated_bytes"]
    drawn = tmp_path / "drawn.mp4"
    drawn.write_bytes(answer.content)
    with av.open(str(drawn)) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    assert not (jobs_module.jobs_dir(runner._settings) / job["id"] / "upload").exists(), "the upload is not kept"


def test_a_form_does_too(client: httpx.Client, video: bytes):
    answer = client.post(
        "/v1/jobs", files={"file": ("cat.mp4", video, "video/mp4")}, data={"threshold": "0.9", "annotate": "false"}
    )
    assert answer.status_code == 202, answer.text
    assert (answer.json()["name"], answer.json()["threshold"], answer.json()["model"]) == ("cat.mp4", 0.9, "motion9")
    job = until(client, answer.json()["id"], over)
    assert job["state"] == "DONE"
    missing = client.get(f"/v1/jobs/{job['id']}/annotated.mp4")
    assert (missing.status_code, missing.json()["reason"]) == (404, "no_result")


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ({"content": b"no video", "headers": {"Content-Type": "video/mp4"}}, 422, "bad_media"),
        ({"content": b"", "headers": {"Content-Type": "video/mp4"}}, 422, "bad_media"),
        ({"json": {"model": "motion9"}}, 415, "unsupported_body"),
        ({"files": {"film": b"x"}}, 415, "unsupported_body"),
        ({"files": {"file": b"x"}, "data": {"colour": "red"}}, 422, "invalid_request"),
        ({"files": {"file": b"x"}, "data": {"threshold": "high"}}, 422, "invalid_request"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "invalid_request"),
        ({"content": b"x", "headers": {"Content-Type": "video/mp4"}, "params": {"model": "gpt"}}, 422, "unknown_model"),
        ({"content": b"x" * (65 << 20), "headers": {"Content-Type": "video/mp4"}}, 413, "body_too_large"),
    ],
)
def test_what_is_no_job_is_refused_and_leaves_nothing(
    client: httpx.Client, settings: Settings, request_: dict, status: int, reason: str
):
    answer = client.post("/v1/jobs", **request_)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason), answer.text
    assert client.get("/v1/jobs").json()["jobs"] == []
    assert list(jobs_module.jobs_dir(settings).iterdir()) == []
    for path in ("", "/events", "/annotated.mp4"):
        answer = client.get(f"/v1/jobs/job-1{path}")
        assert (answer.status_code, answer.json()["reason"]) == (404, "job_not_found")
    assert client.delete("/v1/jobs/job-1").status_code == 404


def test_a_job_shows_how_far_it_is_and_can_be_cancelled(
    client: httpx.Client, settings: Settings, video: bytes, long_video: bytes
):
    long, waiting = send(client, long_video)["id"], send(client, video)["id"]
    running = until(client, long, lambda job: job["progress"] > 0)
    assert running["state"] == "RUNNING"
    assert 0 < running["progress"] < 1
    assert client.get(f"/v1/jobs/{waiting}").json()["state"] == "QUEUED"
    assert [job["id"] for job in client.get("/v1/jobs").json()["jobs"]] == [waiting, long]
    assert [job["id"] for job in client.get("/v1/jobs?state=QUEUED").json()["jobs"]] == [waiting]
    assert client.delete(f"/v1/jobs/{long}").status_code == 204
    cancelled = client.get(f"/v1/jobs/{long}").json()
    assert cancelled["state"] == "CANCELLED"
    assert until(client, waiting, over)["state"] == "DONE", "the next one runs at once"
    assert client.get(f"/v1/jobs/{long}").json() == cancelled
    assert client.delete(f"/v1/jobs/{long}").status_code == 204
    assert client.get(f"/v1/jobs/{long}").status_code == 404
    folder = jobs_module.jobs_dir(settings) / long
    until_s = time.monotonic() + 30
    while folder.exists():
        assert time.monotonic() < until_s, "what is forgotten leaves the disk"
        time.sleep(0.05)


def test_the_same_key_starts_one_job(client: httpx.Client, settings: Settings, video: bytes):
    first, again = send(client, video, key="k"), send(client, video, key="k")
    assert first == again
    assert len(client.get("/v1/jobs").json()["jobs"]) == 1
    assert len(list(jobs_module.jobs_dir(settings).iterdir())) == 1
    headers = {"Content-Type": "video/mp4", "Idempotency-Key": "k"}
    other = client.post("/v1/jobs?annotate=true", content=video, headers=headers)
    assert (other.status_code, other.json()["reason"]) == (422, "idempotency_key_reused")


def test_what_may_wait_is_bounded(store: StateStore, settings: Settings):
    runner = JobRunner(store, settings, "runner-1")
    jobs_module.jobs_dir(settings).mkdir(parents=True, exist_ok=True)
    uploads = [runner.open() for _ in range(3)]
    with pytest.raises(JobsFull, match=r"jobs\.queue"):
        runner.open()
    runner.abandon(uploads[0])
    runner.open()


def test_a_job_whose_process_died_has_failed(client: httpx.Client, store: StateStore, runner: JobRunner):
    job = Job(id="job-0", name="", model="motion9", state="RUNNING", created_at=1.0, runner="runner-0")
    store.put_document(RUNNERS, "runner-0", "1", 60.0)
    store.put_document(KIND, job.id, job.model_dump_json())
    assert client.get("/v1/jobs/job-0").json()["state"] == "RUNNING"
    store.swap_document(RUNNERS, "runner-0", "1", None)
    seen = client.get("/v1/jobs/job-0").json()
    assert (seen["state"], seen["reason"]) == ("FAILED", "runner_lost")
    until_s = time.monotonic() + 30
    while '"FAILED"' not in (store.document(KIND, "job-0") or ""):
        assert time.monotonic() < until_s, "the next runner writes it down"
        time.sleep(0.05)


def test_an_orderly_end_leaves_no_job_running(store: StateStore, settings: Settings, long_video: bytes):
    runner = JobRunner(store, settings, "runner-1")
    runner.start()
    ids = [runner.open() for _ in range(2)]
    for job_id in ids:
        runner.append(job_id, long_video)
        runner.submit(job_id, jobs_module.JobRequest(model="motion9"), "")
    until_s = time.monotonic() + 60
    while jobs_module.find_job(store, ids[0]).frames == 0:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    runner.stop()
    for job_id in ids:
        job = jobs_module.find_job(store, job_id)
        assert (job.state, job.reason) == ("FAILED", "runner_lost")
        assert "stopped" in (job.error or "")
    assert store.documents(RUNNERS) == {}
    assert not any(thread.name == "jobs" for thread in threading.enumerate())


def test_only_the_newest_are_kept(client: httpx.Client, store: StateStore, video: bytes):
    for number in range(7):
        job = Job(id=f"job-{number}", name="", model="m", state="DONE", created_at=number, ended_at=number)
        store.put_document(KIND, job.id, job.model_dump_json())
    until_s = time.monotonic() + 30
    while len(jobs := client.get("/v1/jobs").json()["jobs"]) > 4:
        assert time.monotonic() < until_s
        time.sleep(0.05)
    assert [job["id"] for job in jobs] == ["job-6", "job-5", "job-4", "job-3"]


def test_without_a_runner_the_door_says_so():
    async def gone(verb: str, *args: object) -> object:
        raise jobs_module.JobsDown("the process that runs jobs does not answer; try again")

    manager = StreamManager(MemoryStore(), Settings(), models=served_models(Settings()))
    assert jobs_router(manager, jobs_module.JobsDoor(gone)).routes
    with serving(manager, jobs=jobs_module.JobsDoor(gone)) as url:
        answer = httpx.post(f"{url}/v1/jobs", content=b"x", headers={"Content-Type": "video/mp4"}, trust_env=False)
    assert (answer.status_code, answer.json()["reason"]) == (503, "jobs_unavailable")
