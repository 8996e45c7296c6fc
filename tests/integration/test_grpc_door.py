"""The gRPC door of the whole service: a real camera, events over calls that break, and what it listens on."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from pipelines.simulator import SimulatorProcess, start_simulator
from services.rpc.tsm.v1 import streams_pb2 as pb
from services.rpc.tsm.v1.streams_pb2_grpc import StreamServiceStub
from tests.integration.conftest import RunningService

pytestmark = pytest.mark.timeout(420)
EVENTS = 6
DOCS = Path(__file__).resolve().parents[2] / "docs" / "grpc.md"


@pytest.fixture(scope="module")
def camera() -> Iterator[SimulatorProcess]:
    with start_simulator({"cam": "scene:1"}) as simulator:
        yield simulator


class Relay:
    """A way to the door that can be cut: both ends see their connection reset."""

    def __init__(self, target: str) -> None:
        command = [sys.executable, "-c", RELAY, target]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = f"127.0.0.1:{int(self.process.stdout.readline())}"

    def cut(self) -> None:
        """End it as a failing network does."""
        self.process.kill()
        self.process.wait()


RELAY = """
import socket, sys, threading
host, port = sys.argv[1].rsplit(":", 1)
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
def pump(a, b):
    while data := a.recv(65536):
        b.sendall(data)
while True:
    near, _ = server.accept()
    far = socket.create_connection((host, int(port)))
    for ends in ((near, far), (far, near)):
        threading.Thread(target=pump, args=ends, daemon=True).start()
"""


def test_events_of_a_camera_outlive_a_lost_connection(service: RunningService, camera: SimulatorProcess):
    with grpc.insecure_channel(service.grpc) as channel:
        streams = StreamServiceStub(channel)
        stream = pb.Stream(id="over-grpc", source=pb.Source(uri=camera.urls[0]), tags={"by": "grpc"})
        assert streams.CreateStream(pb.CreateStreamRequest(stream=stream), timeout=30).id == "over-grpc"
        try:
            watched = streams.WatchStreams(pb.WatchStreamsRequest(stream_ids=["over-grpc"]), timeout=60)
            assert any(one.stream.status.state == pb.STREAM_STATE_RUNNING for one in watched)
            watched.cancel()
            listed = streams.ListStreams(pb.ListStreamsRequest(tags={"by": "grpc"}), timeout=10)
            assert [one.id for one in listed.streams] == ["over-grpc"]
            assert listed.streams[0].status.processed >= 0

            seen = list(events_through(service.grpc, after=0, how_many=EVENTS))
            seen += events_through(service.grpc, after=seen[-1], how_many=EVENTS)
            kept = [event["sequence"] for event in service.store.events("over-grpc", limit=2 * EVENTS)]
            assert seen == kept == list(range(1, 2 * EVENTS + 1)), "nothing is lost, nothing comes twice"

            ending = streams.ReceiveEvents(pb.ReceiveEventsRequest(stream_ids=["over-grpc"]), timeout=60)
            assert next(ending).HasField("heartbeat")
        finally:
            streams.DeleteStream(pb.DeleteStreamRequest(stream_id="over-grpc"), timeout=30)
        assert list(ending)[-1].gone == "over-grpc"
        assert ending.code() == grpc.StatusCode.OK


def test_what_the_page_says_works(service: RunningService, capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("127.0.0.1:9000", service.grpc), names)
    assert re.fullmatch(r"door-1 STREAM_STATE_[A-Z]+\n", capsys.readouterr().out)
    with grpc.insecure_channel(service.grpc) as channel:
        streams = StreamServiceStub(channel)
        stream = pb.Stream(id="followed", source=pb.Source(uri="rtsp://127.0.0.1:9/x"))
        streams.CreateStream(pb.CreateStreamRequest(stream=stream, probe=False), timeout=30)
        try:
            first = next(event for event in names["follow"](streams, {}) if event.partitionkey == "followed")
            assert (first.type, first.sequence) == ("tsm.v1.stream.state", 1)
        finally:
            streams.DeleteStream(pb.DeleteStreamRequest(stream_id="followed"), timeout=30)


def events_through(target: str, after: int, how_many: int) -> Iterator[int]:
    """Sequences that come through a connection which is then cut under the call."""
    relay = Relay(target)
    try:
        with grpc.insecure_channel(relay.address) as channel:
            request = pb.ReceiveEventsRequest(stream_ids=["over-grpc"], after={"over-grpc": after})
            feed = StreamServiceStub(channel).ReceiveEvents(request, timeout=120)
            for answer in feed:
                if answer.HasField("event"):
                    yield answer.event.sequence
                    how_many -= 1
                if not how_many:
                    break
            relay.cut()
            with pytest.raises(grpc.RpcError) as lost:
                for _ in feed:
                    pass
            assert lost.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        relay.cut()


def test_it_listens_on_loopback_alone(service: RunningService):
    port = int(service.grpc.rpartition(":")[2])
    heard = set()
    for process in service.tree():
        with contextlib.suppress(psutil.NoSuchProcess):  # one of those that come and go
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                    heard.add(connection.laddr.ip.removeprefix("::ffff:"))
    assert heard == {"127.0.0.1"}


def test_a_taken_port_is_told_before_anything_starts(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "services.cli", "serve", "--port", "0", "--grpc-port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--grpc-port" in done.stderr
    assert done.stderr.strip().endswith("(reason: port_taken)")
    assert list(tmp_path.iterdir()) == []
