"""RTSP cameras that serve scenes or files, and misbehave on request.

In process: `server = RtspServer(); server.add("/cam1", Camera("scene:1")); server.start()`. In a process of its own:
`python -m pipelines.simulator --mount cam1=scene:1`, or `start_simulator({"cam1": "scene:1"})`. `SimulatorClient(url)`
reads truth and turns knobs from anywhere.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from pipelines.camera import (
    Camera,
    CameraError,
    FileSource,
    Knobs,
    LogEntry,
    SceneSource,
    SessionInfo,
    burn_frame_number,
    frame_number,
    open_source,
    read_frame_number,
)
from pipelines.rtsp_server import CONTROL_TYPE, REASONS, RtspServer
from tsm_core.errors import CallerError, WorldError

__all__ = [
    "Camera",
    "CameraError",
    "FileSource",
    "Knobs",
    "LogEntry",
    "RtspServer",
    "SceneSource",
    "SessionInfo",
    "SimulatorClient",
    "SimulatorDown",
    "SimulatorProcess",
    "burn_frame_number",
    "frame_number",
    "read_frame_number",
    "start_simulator",
]


class SimulatorDown(WorldError):
    """The simulator cannot be reached, or ended."""

    reason = "simulator_down"


class ControlRefused(CallerError):
    """The simulator refused a control request: a wrong knob, value or password."""

    reason = "control_refused"


class SimulatorClient:
    """Truth and knobs of one simulated camera, over the network. Each call is a connection of its own.

    Raises SimulatorDown when nobody answers, ControlRefused when the camera refuses.
    """

    def __init__(self, url: str, username: str = "", password: str = "", timeout_s: float = 5.0) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 554
        self.url = f"rtsp://{self.host}:{self.port}{parts.path}"
        username, password = username or unquote(parts.username or ""), password or unquote(parts.password or "")
        self._login = base64.b64encode(f"{username}:{password}".encode()).decode() if username else ""
        self.timeout_s = timeout_s

    def __repr__(self) -> str:
        return f"SimulatorClient({self.url})"

    def _ask(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        head = f"{method} {self.url} RTSP/1.0\r\nCSeq: 1\r\nContent-Type: {CONTROL_TYPE}\r\n"
        if self._login:
            head += f"Authorization: Basic {self._login}\r\n"
        try:
            with socket.create_connection((self.host, self.port), timeout=self.timeout_s) as link:
                link.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                stream = link.makefile("rb")
                status = int(stream.readline().split()[1])
                length = 0
                while line := stream.readline().strip():
                    name, _, value = line.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                answer = stream.read(length)
        except (OSError, IndexError, ValueError) as error:
            raise SimulatorDown(f"no answer from the simulator at {self.url}: {error}") from None
        if status != 200:
            said = json.loads(answer)["error"] if answer else REASONS.get(status, "")
            raise ControlRefused(f"{self.url} answered {status}: {said}")
        result: dict[str, Any] = json.loads(answer)
        return result

    def script(self, until_frame: int | None = None) -> list[dict[str, Any]]:
        """Label, start_frame, end_frame of what happens from frame 0 on; default: until one minute from now."""
        answer = self._ask("GET_PARAMETER", {"names": ["script"], "until_frame": until_frame})
        return list(answer["script"])

    def log(self, after: int = 0) -> list[LogEntry]:
        """Every picture sent, oldest first, without the first `after` ever logged."""
        entries: list[LogEntry] = []
        while page := self._ask("GET_PARAMETER", {"names": ["log"], "after": after + len(entries)})["log"]:
            entries += [LogEntry(*entry) for entry in page]
        return entries

    def sessions(self) -> list[SessionInfo]:
        """Every play so far, oldest first."""
        return [SessionInfo(**info) for info in self._ask("GET_PARAMETER", {"names": ["sessions"]})["sessions"]]

    def camera(self) -> dict[str, Any]:
        """Its fps, codec, newest frame number (now) and rtp_base."""
        return dict(self._ask("GET_PARAMETER", {"names": ["camera"]})["camera"])

    def knobs(self) -> dict[str, Any]:
        """All knobs; see camera.Knobs."""
        return dict(self._ask("GET_PARAMETER", {"names": ["knobs"]})["knobs"])

    def set(self, **knobs: Any) -> dict[str, Any]:
        """Turn knobs, or `source="scene:7"`; returns all knobs."""
        return self._ask("SET_PARAMETER", knobs)

    def disconnect(self, *, reset: bool = False) -> None:
        """End the camera's connections: FIN after all that was sent, or RST at once. The server goes on."""
        self._ask("SET_PARAMETER", {"disconnect": "rst" if reset else "fin"})

    def away(self, seconds: float, *, reset: bool = False) -> None:
        """Take the whole server away, all cameras, and bring it back on the same port after so many seconds."""
        self._ask("SET_PARAMETER", {"away_s": seconds, "reset": reset})


class SimulatorProcess:
    """A running simulator in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, urls: list[str]) -> None:
        self.process, self.port, self.urls = process, port, urls

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def stop(self, timeout_s: float = 5.0) -> None:
        """End it in order; kill it when that takes longer than `timeout_s`."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_simulator(
    mounts: Mapping[str, str],
    port: int = 0,
    *,
    fps: float = 15.0,
    size_px: int = 320,
    codec: str = "h264",
    auth: str = "digest",
    username: str = "",
    password: str = "",
    timeout_s: float = 30.0,
) -> SimulatorProcess:
    """Start a simulator as a child that ends with this process; returns when it listens.

    mounts: name -> `scene:SEED` or path of a video file. auth counts when a username is given.
    Raises SimulatorDown when it ends instead or takes longer than `timeout_s`.
    """
    command = [sys.executable, "-m", "pipelines.simulator", "--port", str(port), "--parent-pid", str(os.getpid())]
    command += ["--fps", str(fps), "--size", str(size_px), "--codec", codec]
    for name, text in mounts.items():
        command += ["--mount", f"{name}={text if text.startswith('scene:') else Path(text).resolve()}"]
    environment = dict(os.environ)
    if username:
        command += ["--user", username, "--auth", auth, "--password-env", "SIMULATOR_PASSWORD"]
        environment["SIMULATOR_PASSWORD"] = password
    process = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert process.stdout
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    if not line:
        process.stdout.close()
        raise SimulatorDown(f"the simulator ended with code {process.wait()} before it listened; see its stderr")
    told = json.loads(line)
    return SimulatorProcess(process, told["port"], told["urls"])


def main(arguments: list[str] | None = None) -> int:
    """Serve cameras until SIGTERM or SIGINT; prints one JSON line with port and urls once it listens."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.simulator", description="Simulated RTSP cameras.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--mount", action="append", default=[], metavar="NAME=scene:SEED|NAME=FILE", required=True)
    parser.add_argument("--fps", type=float, default=15.0, help="of scenes; files keep theirs")
    parser.add_argument("--size", type=int, default=320, help="pixels a side of scenes")
    parser.add_argument("--codec", choices=["h264", "h265"], default="h264")
    parser.add_argument("--auth", choices=["basic", "digest"], default="digest", help="with --user")
    parser.add_argument("--user", default="")
    parser.add_argument("--password-env", default="", metavar="NAME", help="environment variable with the password")
    parser.add_argument("--parent-pid", type=int, default=0, help="end when this process is no longer the parent")
    options = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = RtspServer(options.host, options.port)
    try:
        for mount in options.mount:
            name, _, text = mount.partition("=")
            camera = Camera(
                open_source(text, size_px=options.size, fps=options.fps),
                codec=options.codec,
                auth=options.auth if options.user else "none",
                username=options.user,
                password=os.environ.get(options.password_env, ""),
            )
            server.add(name, camera)
        server.start()
    except (CameraError, OSError) as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"port": server.port, "urls": server.urls()}), flush=True)
    while not ended.wait(0.25):
        if options.parent_pid and os.getppid() != options.parent_pid:
            break
    server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
