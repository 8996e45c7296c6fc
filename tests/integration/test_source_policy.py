"""Cameras under the policy of addresses: judged, pinned, not redirected, not too large."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg
import pytest

from pipelines.camera import Camera
from pipelines.faults import probe
from pipelines.rtsp_server import RtspServer
from pipelines.sources import Source, SourceConfig, SourceState, decoder_command, find_camera_ffmpeg, find_ffmpeg
from tsm_core.frame import Frame

DECODERS = ["ffmpeg", "bundled ffmpeg", "pyav"]


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "bundled ffmpeg":
        monkeypatch.setenv("FFMPEG_BINARY", imageio_ffmpeg.get_ffmpeg_exe())
    return str(request.param.split()[-1])


@contextlib.contextmanager
def states_of(uri: str, **fields: object) -> Iterator[tuple[Callable[..., SourceState], list[Frame]]]:
    """(a function that waits for a state or an error code, the frames)."""
    states: list[SourceState] = []
    frames: list[Frame] = []
    news = threading.Condition()

    def tell(state: SourceState) -> None:
        with news:
            states.append(state)
            news.notify_all()

    def wait(*what: str) -> SourceState:
        def found() -> list[SourceState]:
            return [state for state in states if {state.state, state.error_code} & {*what}]

        with news:
            assert news.wait_for(found, 30.0), states
            return found()[0]

    source = Source(SourceConfig("cam", uri, **fields), frames.append, tell)  # type: ignore[arg-type]
    source.start()
    try:
        yield wait, frames
    finally:
        assert source.stop()


@contextlib.contextmanager
def answering(reply: Callable[[int], str]) -> Iterator[int]:
    """The port of a server that answers the nth request of a connection, from 0, with these lines."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                with contextlib.suppress(OSError), link:
                    number = 0
                    while asked := link.recv(4096).decode():
                        sequence = next(line for line in asked.split("\r\n") if line.startswith("CSeq"))
                        link.sendall(f"RTSP/1.0 {reply(number)}\r\n{sequence}\r\n\r\n".encode())
                        number += 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextlib.contextmanager
def unvisited() -> Iterator[int]:
    """The port of a listener that nobody connects to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("scheme", ["rtsp", "rtsps", "tcp"])
@pytest.mark.parametrize("at", [0, 1], ids=["options", "describe"])
def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch, scheme: str, at: int) -> None:
    monkeypatch.delenv("FFMPEG_BINARY", raising=False)
    with unvisited() as elsewhere:
        away = f"302 Found\r\nLocation: {scheme}://127.0.0.1:{elsewhere}/latest"
        with answering(lambda number: away if number == at else "200 OK\r\nPublic: DESCRIBE") as port:
            uri = f"rtsp://127.0.0.1:{port}/x"
            report = probe(uri)
            assert report.fault is not None
            assert report.fault.code == "STREAM_REDIRECTED"
            for decoder in ("ffmpeg", "pyav"):
                with states_of(uri, decoder=decoder) as (wait, _):
                    wait("STREAM_REDIRECTED" if (scheme, decoder) != ("tcp", "pyav") else "STREAM_NOT_RTSP")


def test_an_ffmpeg_that_follows_redirects_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no newer one: the address learns that somebody connected, and the caller learns nothing of it."""
    old = find_ffmpeg()
    monkeypatch.setenv("FFMPEG_BINARY", old.path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        away = f"302 Found\r\nLocation: rtsp://127.0.0.1:{listener.getsockname()[1]}/latest"
        with answering(lambda _: away) as port, states_of(f"rtsp://127.0.0.1:{port}/x", decoder="ffmpeg") as (wait, _):
            began = time.monotonic()
            assert wait("FAILED").error_code == "STREAM_REDIRECTED"
            assert time.monotonic() - began < 4.0  # it did not wait for an answer from there


def test_cameras_get_an_ffmpeg_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FFMPEG_BINARY", raising=False)
    assert find_camera_ffmpeg().version >= max(find_ffmpeg().version, (8, 0))


def test_a_camera_outside_the_policy_is_not_connected_to() -> None:
    with unvisited() as port:
        uri = f"rtsp://localhost:{port}/x"
        with states_of(uri, networks=("public",)) as (wait, _):
            assert "a loopback address" in wait("STREAM_ADDRESS_FORBIDDEN").message
        report = probe(uri, networks=("private", "public"))
    assert (report.stages[-1].name, report.fault and report.fault.code) == ("dns", "STREAM_ADDRESS_FORBIDDEN")


def test_an_unknown_name_says_so() -> None:
    with states_of("rtsp://camera-9.invalid/x") as (wait, _):
        assert wait("STREAM_DNS_FAILED").state == "RESTARTING"


def test_the_decoder_gets_the_address_and_not_the_name(decoder: str) -> None:
    with RtspServer() as server:
        port = server.add("cam", Camera("scene:3")).split(":")[2].split("/")[0]
        with states_of(f"rtsp://localhost:{port}/cam", decoder=decoder) as (wait, _):
            assert wait("RUNNING").source_size == (320, 320)
    command = decoder_command(SourceConfig("cam", f"rtsp://camera.example:{port}/cam"), "10.0.0.7")
    assert f"rtsp://10.0.0.7:{port}/cam" in command
    assert not any("camera.example" in word for word in command)


def test_a_certificate_is_for_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    words = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 {subject} -keyout {key} -out {certificate}"
    subprocess.run(words.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    greeted = []

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                with contextlib.suppress(OSError), link, context.wrap_socket(link, server_side=True) as inside:
                    greeted.append(inside.recv(100))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        with states_of(f"rtsps://localhost:{port}/x") as (wait, _):
            wait("STREAM_NOT_RTSP", "STREAM_CONNECTION_FAILED")  # it closes after the greeting
        assert any(line.startswith(b"OPTIONS rtsps://127.0.0.1") for line in greeted)
        with states_of(f"rtsps://127.0.0.1:{port}/x") as (wait, _):
            assert wait("FAILED").error_code == "STREAM_TLS_CERTIFICATE"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_picture_beyond_the_limit_is_not_decoded(decoder: str) -> None:
    with RtspServer() as server:
        url = server.add("cam", Camera("scene:3"))
        with states_of(url, decoder=decoder, max_pixels=320 * 319) as (wait, frames):
            assert wait("FAILED").error_code == "STREAM_TOO_LARGE"
        assert not frames


def test_a_decoder_has_no_more_memory_than_allowed(decoder: str) -> None:
    with RtspServer() as server:
        url = server.add("cam", Camera("scene:3"))
        with states_of(url, decoder=decoder, memory_bytes=32 << 20) as (wait, frames):
            wait("STREAM_DECODER_FAILED")
        assert not frames
