"""A real H.264 clip as a camera: it runs in five seconds, every frame is accounted for, and it outlives its camera."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.simulator import SimulatorClient, start_simulator
from tests.integration.conftest import RunningService

CLIPS = Path(os.environ.get("TSM_VIDEOS_DIR", Path(__file__).resolve().parents[3] / "shared" / "videos"))
CLIP = CLIPS / "k400_cleaning_pool.mp4"


def settled(service: RunningService, stream: str) -> dict:
    """The status once its counters have stood still for a second."""
    before, since = None, time.monotonic()
    while time.monotonic() - since < 1.2:
        status = service.status(stream)
        if status["received"] != before:
            before, since = status["received"], time.monotonic()
        time.sleep(0.1)
    return service.status(stream)


@pytest.mark.skipif(not CLIP.exists(), reason=f"sample clip {CLIP.name} is not on this machine (TSM_VIDEOS_DIR)")
def test_a_real_clip_runs_is_accounted_for_and_survives_its_camera(service: RunningService):
    with start_simulator({"clip": str(CLIP)}) as simulator:
        camera = SimulatorClient(simulator.urls[0])
        began = time.monotonic()
        command = ["streams", "add", "--uri", simulator.urls[0], "--id", "clip", "--wait", "--server", service.url]
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", *command], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        status = service.status("clip")
        assert status["state"] == "RUNNING"
        began_s = camera.sessions()[0].started_unix_s
        assert status["since"] - began_s <= 5.0
        assert time.monotonic() - began < 30.0  # the command's own start included
        time.sleep(4.0)

        camera.set(dark=True)
        time.sleep(0.5)
        sent = len(camera.log())
        camera.away(2.0)
        service.wait(lambda: service.status("clip")["state"] == "RESTARTING", 5.0, "RESTARTING")
        status = settled(service, "clip")
        accounted = status["processed"] + sum(status["dropped"].values())
        assert accounted == sent, status

        time.sleep(1.0)
        camera.set(dark=False)
        service.wait(lambda: service.status("clip")["state"] == "RUNNING", 20.0, "RUNNING again by itself")
        seen = service.status("clip")["processed"]
        service.wait(lambda: service.status("clip")["processed"] > seen + 5, 10.0, "frames again")
        assert service.status("clip")["reconnects"] >= 1
    service.http.delete("/v1/streams/clip").raise_for_status()
