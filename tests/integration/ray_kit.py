"""A Ray cluster of one machine on loopback, as `ray start` makes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

from pipelines.ray_local import ENVIRONMENT


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Cluster:
    """A Ray cluster of one machine on loopback, and its job commands."""

    def __init__(self, folder: Path) -> None:
        self._folder, port = folder, free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(folder), "GLOO_SOCKET_IFNAME": "lo"}
        self._environment.pop("RAY_ADDRESS", None)
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            "--port",
            str(free_port()),
        ]
        command += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(port)]
        command += ["--num-cpus", "4", "--num-gpus", "0", "--object-store-memory", str(100 << 20)]
        command += ["--ray-client-server-port", str(free_port()), "--temp-dir", str(folder)]
        command += ["--dashboard-agent-listen-port", str(free_port())]  # there may be other clusters here
        with (folder / "head.log").open("wb") as log:
            self._head = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def ready(self) -> None:
        """Wait until the cluster takes jobs: its node's agent comes up after all else."""
        deadline_s = time.monotonic() + 90
        while self._head.poll() is None and time.monotonic() < deadline_s:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.post(f"{self.url}/api/jobs/", json={"entrypoint": "true"}).is_success:
                    return
            time.sleep(0.5)
        raise AssertionError((self._folder / "head.log").read_text())

    def job(self, *words: str, timeout_s: float = 150) -> subprocess.CompletedProcess[str]:
        """`ray job ...`, to its end."""
        return subprocess.run(
            self._command(words), env=self._environment, capture_output=True, text=True, timeout=timeout_s
        )

    def follow(self, name: str, until: Callable[[str], bool], timeout_s: float = 150) -> list[str]:
        """Lines of `ray job logs -f` until one of them is what was waited for."""
        lines: list[str] = []
        process = subprocess.Popen(
            self._command(("logs", "-f", name)), env=self._environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        killer = threading.Timer(timeout_s, process.kill)
        killer.start()
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if until(lines[-1]):
                    break
        finally:
            killer.cancel()
            process.kill()
            process.communicate()
        return lines

    def _command(self, words: tuple[str, ...]) -> list[str]:
        verb, *rest = words
        return [sys.executable, "-m", "ray.scripts.scripts", "job", verb, "--address", self.url, *rest]

    def stop(self) -> None:
        children = psutil.Process(self._head.pid).children(recursive=True) if self._head.poll() is None else []
        self._head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._head.wait(5)
        for process in (*children, self._head):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                process.kill()
        self._head.wait(10)


@contextlib.contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """A cluster that takes jobs, until the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="tsm-", dir="/tmp"))
    found = Cluster(folder)
    try:
        found.ready()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)
