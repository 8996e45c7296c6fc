"""The real service, once for all integration tests: `tsm serve` with its own Valkey, Ray and two engine replicas."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pydantic import SecretStr

from pipelines.decoder_child import die_with_parent
from services.settings import StoreSettings
from services.store import RedisStore
from tests.sinks_kit import SECRETS, Receiver
from tests.unit.services.tracing_kit import Collector

HOOKED = "hooked-*"  # streams whose events the webhook is told
START_S = 240.0
STOP_S = 60.0


@dataclass
class RunningService:
    """A service in a process of its own, and what a test may want to look at."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    temp: Path
    store: RedisStore
    http: httpx.Client
    hook: Receiver
    traces: Collector

    @property
    def grpc(self) -> str:
        """HOST:PORT of the gRPC door."""
        found = re.search(r"gRPC on ([^\s;]+)", self.log.read_text())
        assert found
        return found[1]

    def tree(self) -> list[psutil.Process]:
        """The service's process and all below it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def add(self, stream_id: str, uri: str, **source: Any) -> dict[str, Any]:
        """Register a stream."""
        answer = self.http.post("/v1/streams", json={"id": stream_id, "source": {"uri": uri, **source}})
        assert answer.status_code == 201, answer.text
        view: dict[str, Any] = answer.json()
        return view

    def status(self, stream_id: str) -> dict[str, Any]:
        """What the stream does now."""
        status: dict[str, Any] = self.http.get(f"/v1/streams/{stream_id}/status").json()
        return status

    def wait(self, true: Callable[[], Any], within_s: float, what: str) -> float:
        """Seconds until `true`; fails with `what` otherwise."""
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < within_s, f"not within {within_s} s: {what}"
            time.sleep(0.02)
        return time.monotonic() - began


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the service come last: while it runs it takes a part of the machine from all others."""
    here = Path(__file__).parent
    items.sort(key=lambda item: here in item.path.parents and "service" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("service")
    hook, traces = Receiver(), Collector()
    hook.start()
    (folder / "tsm.yaml").write_text(
        json.dumps(
            {
                "server": {"port": 0, "grpc_port": 0},
                "store": {"data_dir": str(folder / "data")},
                "engine": {"replicas": 2},
                "couriers": {"retry_first_s": 0.2, "retry_cap_s": 1.0},
                "webhooks": {
                    "sinks": [
                        {"name": "hook", "url": hook.url, "secrets": SECRETS[:1], "streams": [HOOKED], "batch": 50}
                    ],
                    "networks": ["loopback"],
                },
                "telemetry": {"otlp_endpoint": traces.url, "frame_sample": 0.1},
            }
        )
    )
    temp = Path(f"/tmp/tsmtest{os.getpid()}")  # short: Ray's sockets are below
    temp.mkdir(mode=0o700)
    log = folder / "service.log"
    command = [sys.executable, "-m", "services.cli", "serve", "--config", str(folder / "tsm.yaml")]
    tests = os.getpid()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temp)},
            preexec_fn=lambda: die_with_parent(tests),  # a run that is killed leaves no service behind
        )
    try:
        url = _address(process, log)
        store = RedisStore(StoreSettings(url=_store_url(folder / "data"), state_url=_store_url(folder / "data/state")))
        with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as http:
            running = RunningService(url, process, log, temp, store, http, hook, traces)
            running.wait(lambda: http.get("/healthz").is_success, 10.0, "healthy")
            yield running
        store.close()
        family = running.tree()
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_S)
        _, alive = psutil.wait_procs(family, timeout=5)
        left = [(one.pid, one.cmdline()[:3]) for one in alive]
        assert (code, left) == (0, []), f"SIGTERM must end all: {log.read_text()[-2000:]}"
        assert not list(temp.glob("tsm-*")), "Ray's folder is removed"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        subprocess.run(["rm", "-rf", str(temp)], check=True)
        hook.stop()
        traces.stop()


def _store_url(data_dir: Path) -> SecretStr:
    """Where the embedded server of this folder listens, as its own configuration says."""
    config = dict(line.split(" ", 1) for line in (data_dir / "valkey/valkey.conf").read_text().splitlines())
    return SecretStr(f"redis://:{config['requirepass']}@127.0.0.1:{config['port']}/0")


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if found := re.search(r"serves (http://\S+)", log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"no address within {START_S} s: {log.read_text()[-3000:]}")
