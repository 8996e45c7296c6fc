"""Real decoders on real streams: everything sent comes out, faults are named, sources come back, nothing is left."""

import contextlib
import http.server
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import psutil
import pytest

from pipelines.faults import probe
from pipelines.simulator import Camera, RtspServer, read_frame_number
from pipelines.sources import BadFile, Source, SourceConfig, find_ffmpeg, iter_file

DECODERS = ["ffmpeg", "bundled ffmpeg", "pyav"]
PASSWORD = "canary/p@ss w%rd"
FILM_FRAMES, FILM_FPS = 48, 24


@pytest.fixture(params=DECODERS)
def decoder(request, monkeypatch):
    if request.param == "bundled ffmpeg":
        monkeypatch.setenv("FFMPEG_BINARY", imageio_ffmpeg.get_ffmpeg_exe())
        return "ffmpeg"
    return request.param


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """48 pictures of 160x120 at 24 fps with B-frames; picture n is n grey levels bright."""
    path = tmp_path_factory.mktemp("film") / "film ä.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FILM_FPS, options={"bf": "2", "crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(FILM_FRAMES):
            picture = av.VideoFrame.from_ndarray(np.full((120, 160, 3), 4 * number, np.uint8), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FILM_FPS)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


class Seen:
    """Collects what a source gives out."""

    def __init__(self, uri, **fields):
        fields = {"retry_first_s": 0.05, "retry_cap_s": 0.3, "io_timeout_s": 2.0} | fields
        self.frames, self.states, self.news = [], [], threading.Condition()
        self.source = Source(SourceConfig("cam", uri, **fields), self.on_frame, self.on_state)

    def on_frame(self, frame):
        with self.news:
            self.frames.append(frame)
            self.news.notify_all()

    def on_state(self, state):
        with self.news:
            self.states.append(state)
            self.news.notify_all()

    def wait(self, condition, limit_s=20.0):
        with self.news:
            assert self.news.wait_for(condition, limit_s), self.states
        return self

    def wait_state(self, state, code=None, limit_s=20.0):
        def found():
            return any(s.state == state and (code is None or s.error_code == code) for s in self.states)

        self.wait(found, limit_s)
        return next(s for s in self.states if s.state == state and (code is None or s.error_code == code))

    def wait_frames(self, count, limit_s=20.0):
        return self.wait(lambda: len(self.frames) >= count, limit_s)

    def __enter__(self):
        self.source.start()
        return self

    def __exit__(self, *exc):
        assert self.source.stop()


@pytest.fixture
def server():
    with RtspServer() as running:
        yield running


@pytest.fixture(params=["ffmpeg", "pyav"])
def either(request):
    """One ffmpeg will do where its version makes no difference."""
    return request.param


def numbers(frames, fps):
    return [round(frame.pts_s * fps) for frame in frames]


# -- cameras


def test_every_picture_sent_comes_out(server, decoder):
    camera = Camera("scene:3")
    url = server.add("cam", camera)
    with Seen(url, decoder=decoder) as seen:
        seen.wait_frames(25)
        server.stop()
        seen.wait_state("RESTARTING", "STREAM_DISCONNECTED", 2.0)
    sent = [entry.frame_number for entry in camera.log()]
    burnt = [read_frame_number(frame.image.permute(1, 2, 0).numpy()) for frame in seen.frames]
    assert burnt == sent
    assert numbers(seen.frames[1:], camera.fps) == sent[1:]
    assert [frame.number for frame in seen.frames] == list(range(len(sent)))
    assert seen.source.counters.received == len(sent)
    assert {tuple(frame.image.shape) for frame in seen.frames} == {(3, 256, 256)}
    assert {frame.source_size for frame in seen.frames} == {(320, 320)}
    sent_s = {entry.frame_number: entry.sent_unix_s for entry in camera.log()}
    delays = sorted(f.time_s - sent_s[n] for f, n in zip(seen.frames, burnt, strict=True))
    assert delays[len(delays) // 2] < 3.5 / camera.fps


def test_udp_and_h265(server, either):
    camera = Camera("scene:3", codec="h265")
    url = server.add("cam", camera)
    with Seen(url, decoder=either, rtsp_transport="udp") as seen:
        seen.wait_frames(8)
    burnt = [read_frame_number(frame.image.permute(1, 2, 0).numpy()) for frame in seen.frames]
    assert burnt == [entry.frame_number for entry in camera.log()][: len(burnt)]
    assert seen.source.counters.packets_lost == 0


def test_missing_packets_are_counted(server, either):
    camera = Camera("scene:3")
    url = server.add("cam", camera)
    with Seen(url, decoder=either, rtsp_transport="udp") as seen:
        seen.wait_frames(3)
        camera.set(loss_rate=0.2)
        seen.wait(lambda: seen.source.counters.packets_lost > 3)


def test_a_camera_that_goes_and_comes_back_is_found_again(server, decoder):
    url = server.add("cam", Camera("scene:4"))
    with Seen(url, decoder=decoder) as seen:
        seen.wait_frames(3)
        server.abort()
        lost = seen.wait_state("RESTARTING", "STREAM_DISCONNECTED", 2.0)
        assert lost.retry_at is not None
        seen.wait_state("RESTARTING", "STREAM_CONNECTION_FAILED")
        before = len(seen.frames)
        server.start()
        seen.wait_frames(before + 3)
        assert seen.states[-1].state == "RUNNING"
        assert seen.source.counters.reconnects["STREAM_DISCONNECTED"] == 1
    assert [frame.number for frame in seen.frames] == list(range(len(seen.frames)))


def test_a_dark_camera_is_noticed_in_time(server, decoder):
    camera = Camera("scene:4")
    url = server.add("cam", camera)
    with Seen(url, decoder=decoder, stall_s=1.0) as seen:
        seen.wait_frames(3)
        camera.set(dark=True)
        running = seen.wait_state("RUNNING")
        assert running.connect_s is not None
        assert 0 < running.connect_s < 15
        stalled = seen.wait_state("RESTARTING", "STREAM_STALLED", 3.0)
        assert seen.source.counters.stalls == 1
        last = [frame for frame in seen.frames if frame.time_s < stalled.at_s][-1]
        assert 0.9 <= stalled.at_s - last.time_s < 1.6
        camera.set(dark=False)
        before = len(seen.frames)
        seen.wait_frames(before + 3)


@pytest.mark.parametrize(
    ("knobs", "state", "code"),
    [
        ({"status": 403}, "FAILED", "STREAM_AUTH_FAILED"),
        ({"status": 404}, "FAILED", "STREAM_NOT_FOUND"),
        ({"status": 454}, "RESTARTING", "STREAM_PROTOCOL"),
        ({"status": 503}, "RESTARTING", "STREAM_SERVER_BUSY"),
        ({"never_answer": True}, "RESTARTING", "STREAM_TIMEOUT"),
        ({"dark": True}, "RESTARTING", "STREAM_NO_DATA"),
        ({"reply_delay_s": 1.2}, "RESTARTING", "STREAM_TIMEOUT"),
    ],
)
def test_a_camera_that_refuses_is_named(server, either, knobs, state, code):
    camera = Camera("scene:4")
    url = server.add("cam", camera)
    camera.set(**knobs)
    deadline_s = 3.0 if "reply_delay_s" in knobs else 8.0  # too slow as a whole, though no reply is late
    with Seen(url, decoder=either, io_timeout_s=1.5, open_deadline_s=deadline_s) as seen:
        told = seen.wait_state(state, code, 10.0)
        assert seen.states[1] == told
        assert told.retry_at - told.at_s > 50 if state == "FAILED" else told.retry_at - told.at_s < 1


def test_an_unknown_codec_is_named_by_the_deadline_at_the_latest(server, either):
    camera = Camera("scene:4")
    url = server.add("cam", camera)
    camera.set(unknown_codec=True)
    with Seen(url, decoder=either, open_deadline_s=3.0) as seen:
        told = seen.wait(lambda: len(seen.states) > 1, 8.0).states[1]
        assert told.error_code in ("STREAM_CODEC_UNSUPPORTED", "STREAM_TIMEOUT", "STREAM_NO_DATA")


def test_refused_silent_and_foreign_servers_are_told_apart(decoder):
    handler = http.server.SimpleHTTPRequestHandler
    with (
        http.server.HTTPServer(("127.0.0.1", 0), handler) as foreign,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        threading.Thread(target=foreign.serve_forever, args=(0.05,)).start()
        try:
            with socket.create_server(("127.0.0.1", 0)) as closed:
                closed_port = closed.getsockname()[1]
            for port, code in (
                (closed_port, "STREAM_CONNECTION_FAILED"),
                (silent.getsockname()[1], "STREAM_TIMEOUT"),
                (foreign.server_port, "STREAM_NOT_RTSP"),
            ):
                with Seen(f"rtsp://127.0.0.1:{port}/x", decoder=decoder, io_timeout_s=1.0) as seen:
                    seen.wait(lambda seen=seen: len(seen.states) > 1, 8.0)
                    assert seen.states[1].error_code == code, (port, seen.states)
        finally:
            foreign.shutdown()


def test_an_unknown_host_is_named(either):
    with Seen("rtsp://camera.invalid/x", decoder=either) as seen:
        seen.wait_state("RESTARTING", "STREAM_DNS_FAILED")


@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_a_password_opens_the_camera_and_is_seen_nowhere(server, auth, caplog):
    caplog.set_level(logging.DEBUG)
    url = server.add("cam", Camera("scene:5", auth=auth, username="me", password=PASSWORD))
    with Seen(url, username="me", password=PASSWORD) as seen, Seen(url, username="me", password="canary2") as wrong:
        seen.wait_frames(3)
        told = wrong.wait_state("FAILED", "STREAM_AUTH_FAILED")
        assert 50 < told.retry_at - told.at_s < 70
        children = psutil.Process().children(recursive=True)
        assert any("pipelines.decoder_child" in " ".join(child.cmdline()) for child in children)
        public = b""
        for child in children:
            public += Path(f"/proc/{child.pid}/cmdline").read_bytes() + Path(f"/proc/{child.pid}/environ").read_bytes()
        assert b"canary" not in public
        server.stop()
        seen.wait_state("RESTARTING", "STREAM_CONNECTION_FAILED")
    told = caplog.text + repr(seen.states) + repr(wrong.states) + repr(seen.source.config)
    assert "canary" not in told
    assert "STREAM_AUTH_FAILED" in told


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_an_untrusted_certificate_is_refused(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(words.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def answer():
        with contextlib.suppress(OSError):
            while True:
                link, _ = listener.accept()
                with contextlib.suppress(OSError), link:
                    context.wrap_socket(link, server_side=True).recv(100)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        uri = f"rtsps://127.0.0.1:{listener.getsockname()[1]}/x"
        report = probe(uri)
        with Seen(uri) as seen:
            seen.wait_state("FAILED", "STREAM_TLS_CERTIFICATE")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert (report.stages[-1].name, report.fault.code) == ("tls", "STREAM_TLS_CERTIFICATE")


def test_a_new_shape_of_the_picture_is_followed(server, either):
    camera = Camera("scene:6")
    url = server.add("cam", camera)
    with Seen(url, decoder=either) as seen:
        seen.wait_frames(3)
        camera.set(size=(640, 360))
        seen.wait_state("RESTARTING", "STREAM_RECONFIGURED")
        seen.wait(lambda: seen.frames[-1].source_size == (640, 360) and seen.frames[-1].image.shape[2] == 456)


def test_a_clock_jump_costs_no_picture(server, decoder):
    camera = Camera("scene:6")
    url = server.add("cam", camera)
    with Seen(url, decoder=decoder) as seen:
        seen.wait_frames(8)
        camera.set(clock_offset_s=3600)
        seen.wait(lambda: seen.frames[-1].pts_s > 3600)
        camera.set(clock_offset_s=0)
        seen.wait_frames(len(seen.frames) + 8)
        server.stop()
        seen.wait_state("RESTARTING", "STREAM_DISCONNECTED")
    burnt = [read_frame_number(frame.image.permute(1, 2, 0).numpy()) for frame in seen.frames]
    assert burnt == [entry.frame_number for entry in camera.log()]
    assert all(b.time_s >= a.time_s for a, b in zip(seen.frames, seen.frames[1:], strict=False))
    assert seen.source.counters.clock_jumps >= 1


def test_damaged_pictures_are_counted_and_survived(server, either):
    camera = Camera("scene:6")
    url = server.add("cam", camera)
    with Seen(url, decoder=either) as seen:
        seen.wait_frames(3)
        camera.set(bit_flip_rate=0.2)
        seen.wait(lambda: seen.source.counters.corrupt >= 2)
        camera.set(bit_flip_rate=0)
        seen.wait_frames(len(seen.frames) + 20)
        assert [s.state for s in seen.states] == ["STARTING", "RUNNING"]


# -- files


def test_a_file_gives_every_picture_at_its_pace(film, decoder):
    began = time.monotonic()
    with Seen(film.as_uri(), decoder=decoder) as seen:
        seen.wait_state("ENDED")
    assert time.monotonic() - began > (FILM_FRAMES - 2) / FILM_FPS
    assert numbers(seen.frames, FILM_FPS) == list(range(FILM_FRAMES))
    assert all(frame.time_s == frame.pts_s for frame in seen.frames)
    brightness = [round(float(frame.image.float().mean()) / 4) for frame in seen.frames]
    assert brightness == pytest.approx(range(FILM_FRAMES), abs=1)


def test_a_looped_file_goes_on_and_on(film, either):
    with Seen(film.as_uri(), decoder=either, loop=True, realtime=False) as seen:
        seen.wait_frames(2 * FILM_FRAMES + 10)
    times = [frame.pts_s for frame in seen.frames[: 2 * FILM_FRAMES + 10]]
    steps = np.diff(times)
    assert steps.min() > 0
    assert steps.max() < 2.5 / FILM_FPS
    assert [s.state for s in seen.states] == ["STARTING", "RUNNING"]


def test_iter_file_waits_for_a_slow_caller_and_drops_nothing(film):
    frames = []
    for frame in iter_file(film, min_side_px=60):
        time.sleep(0.005)
        frames.append(frame)
    assert numbers(frames, FILM_FPS) == list(range(FILM_FRAMES))
    assert frames[0].image.shape == (3, 60, 80)
    assert frames[0].source_size == (160, 120)


def test_leaving_iter_file_early_ends_its_child(film):
    me = psutil.Process()
    before = set(me.children())
    frames = iter_file(film)
    next(frames)
    frames.close()
    assert set(me.children()) <= before


@pytest.mark.parametrize("content", [None, b"", b"no film at all\n" * 100])
def test_a_bad_file_is_named(tmp_path, content, either):
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadFile, match=r"bad\.mp4"):
        list(iter_file(path))
    with Seen(path.as_uri(), decoder=either) as seen:
        told = seen.wait_state("FAILED")
        assert told.error_code == ("STREAM_FILE_NOT_FOUND" if content is None else "STREAM_FILE_INVALID")
        assert told.retry_at is None


def test_a_playlist_opens_no_other_file(tmp_path, film, either):
    path = tmp_path / "list.m3u8"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n")
    with Seen(path.as_uri(), decoder=either) as seen:
        seen.wait_state("FAILED", "STREAM_FILE_INVALID")
    assert seen.frames == []


# -- nothing is left


def test_nothing_is_left_after_ten_sources(server, either):
    url = server.add("cam", Camera("scene:7", always=True))
    me = psutil.Process()

    def held():
        pipes = 0  # the server's sockets come and go with its clients
        for descriptor in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                pipes += os.readlink(descriptor).startswith("pipe:")
        return pipes, len([t for t in threading.enumerate() if t.name.startswith("cam-")])

    before, children = held(), set(me.children())
    stops = []
    for i in range(10):
        seen = Seen(url, decoder=either)
        seen.source.start()
        if i % 2:  # half of them are stopped before they have opened
            seen.wait_frames(1)
        began = time.monotonic()
        assert seen.source.stop()
        stops.append(time.monotonic() - began)
    assert held() == before
    assert set(me.children()) <= children
    assert sorted(stops)[5] < 1.0
    assert max(stops) < 2.5


ORPHAN = """
import sys, time
from pipelines.sources import Source, SourceConfig
for decoder in ("ffmpeg", "pyav"):
    config = SourceConfig("film", sys.argv[1], decoder=decoder, loop=True)
    Source(config, lambda frame, decoder=decoder: print(decoder, flush=True), lambda state: None).start()
time.sleep(60)
"""


def test_the_decoders_die_with_a_killed_parent(film):
    command = [sys.executable, "-c", ORPHAN, film.as_uri()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as parent:
        missing = {"ffmpeg\n", "pyav\n"}
        while missing:
            missing.discard(parent.stdout.readline())
            assert parent.poll() is None
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 2
        parent.kill()
    deadline = time.monotonic() + 2.0
    # an orphan stays in the table as a zombie where nobody reaps it
    while alive := [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


# -- the probe


def stages(report):
    return [stage.name for stage in report.stages]


@pytest.mark.parametrize("auth", ["none", "basic", "digest"])
def test_a_probe_of_a_good_camera(server, auth):
    secret = {} if auth == "none" else {"username": "me", "password": PASSWORD}
    url = server.add("cam", Camera("scene:8", auth=auth, **secret))
    probe(url, **secret, depth="describe")  # the camera's first answer takes an encoded picture
    began = time.monotonic()
    quick = probe(url, **secret, depth="describe")
    assert time.monotonic() - began < 0.2
    assert quick.ok
    assert stages(quick) == ["address", "dns", "tcp", "rtsp", "auth", "sdp"]
    assert (quick.codec, quick.fps) == ("H264", 15.0)
    full = probe(url, **secret)
    assert full.ok, full
    assert stages(full)[-2:] == ["key_frame", "decode"]
    assert (full.width, full.height) == (320, 320)
    assert full.snapshot_jpeg is not None
    assert full.snapshot_jpeg[:2] == b"\xff\xd8"
    assert "canary" not in repr((quick, full))


@pytest.mark.parametrize(
    ("knobs", "stage", "code"),
    [
        ({"status": 404}, "sdp", "STREAM_NOT_FOUND"),
        ({"status": 503}, "sdp", "STREAM_SERVER_BUSY"),
        ({"status": 403}, "auth", "STREAM_AUTH_FAILED"),
        ({"never_answer": True}, "rtsp", "STREAM_TIMEOUT"),
        ({"unknown_codec": True}, "sdp", "STREAM_CODEC_UNSUPPORTED"),
        ({"dark": True}, "key_frame", "STREAM_NO_DATA"),
    ],
)
def test_a_probe_stops_at_what_fails(server, knobs, stage, code):
    camera = Camera("scene:8")
    url = server.add("cam", camera)
    camera.set(**knobs)
    report = probe(url, timeout_s=1.0)
    assert not report.ok
    assert report.fault.code == code
    assert report.stages[-1].name == stage
    assert report.stages[-1].hint
    assert all(earlier.ok for earlier in report.stages[:-1])


def test_a_probe_with_a_wrong_password_does_not_repeat_it(server):
    url = server.add("cam", Camera("scene:8", auth="digest", username="me", password=PASSWORD))
    for report in (
        probe(url.replace("rtsp://", "rtsp://me:canary@")),
        probe(url, "me", "canary"),
        probe(url),
    ):
        assert report.fault.code == "STREAM_AUTH_FAILED"
        assert "canary" not in repr(report)


@pytest.mark.parametrize(
    ("uri", "stage", "code"),
    [
        ("http://cam/x", "address", "STREAM_ADDRESS_INVALID"),
        ("rtsp:///x", "address", "STREAM_ADDRESS_INVALID"),
        ("rtsp://camera.invalid/x", "dns", "STREAM_DNS_FAILED"),
        ("file:///nowhere.mp4", "file", "STREAM_FILE_NOT_FOUND"),
        (Path(__file__).as_uri(), "key_frame", "STREAM_FILE_INVALID"),
    ],
)
def test_a_probe_of_what_is_no_source(uri, stage, code):
    report = probe(uri)
    assert (report.stages[-1].name, report.fault.code) == (stage, code)


@pytest.mark.parametrize("banner", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"", b"RTSP/" * 20_000])
def test_a_probe_of_another_protocol(banner):
    def answer(listener):
        link, _ = listener.accept()
        with link:
            link.recv(1000)
            link.sendall(banner)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        report = probe(f"rtsp://127.0.0.1:{listener.getsockname()[1]}/x", timeout_s=1.0)
        thread.join()
    assert (report.stages[-1].name, report.fault.code) == ("rtsp", "STREAM_NOT_RTSP")


def test_a_probe_of_a_file_shows_a_picture(film):
    report = probe(film.as_uri())
    assert report.ok
    assert (report.width, report.height, report.fps) == (160, 120, float(FILM_FPS))
    assert report.snapshot_jpeg is not None


def test_find_ffmpeg_finds_one():
    assert find_ffmpeg().version >= (5, 0)
