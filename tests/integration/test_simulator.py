"""The simulator, played by clients that know nothing of it: ffmpeg's command, PyAV, and bare sockets."""

import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import psutil
import pytest

import pipelines.rtsp_server
from pipelines.simulator import (
    Camera,
    ControlRefused,
    FileSource,
    RtspServer,
    SceneSource,
    SimulatorClient,
    SimulatorDown,
    burn_frame_number,
    frame_number,
    read_frame_number,
    start_simulator,
)

FPS = 15.0
FFMPEGS = list(dict.fromkeys(filter(None, [imageio_ffmpeg.get_ffmpeg_exe(), shutil.which("ffmpeg")])))


class Plain:
    """Grey pictures: cheap, and small when encoded."""

    def __init__(self, fps=FPS, width=160, height=128):
        self.fps, self.shape = fps, (height, width, 3)

    def frame(self, number):
        return np.full(self.shape, 60 + number % 120, np.uint8)


class Noise(Plain):
    """Pictures that do not compress."""

    def frame(self, number):
        return np.random.default_rng(number).integers(0, 256, self.shape, np.uint8)


@pytest.fixture
def server():
    with RtspServer() as running:
        yield running


class Playing:
    """A PyAV client."""

    def __init__(self, url, transport="tcp"):
        options = {"rtsp_transport": transport, "fpsprobesize": "0", "analyzeduration": "300000"}
        self.container = av.open(url, options=options, timeout=5)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def pictures(self, count):
        """(number read, pts in seconds or None, width) of the next pictures."""
        out = []
        for picture in self.container.decode(video=0):
            out.append((read_frame_number(picture.to_ndarray(format="rgb24")), picture.time, picture.width))
            if len(out) == count:
                break
        return out

    def numbers(self, count):
        return [number for number, _, _ in self.pictures(count)]


def ffmpeg(exe, url, *before_input, transport="tcp", frames=None):
    """A running ffmpeg that writes NUT to its stdout."""
    command = [exe, "-nostdin", "-loglevel", "error", "-rtsp_transport", transport, "-timeout", "4000000"]
    command += ["-fpsprobesize", "0", "-analyzeduration", "300000", "-flags", "low_delay", "-threads", "1"]
    command += [*before_input, "-i", url, "-an", *(["-frames:v", str(frames)] if frames else [])]
    command += ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-c:v", "rawvideo", "-f", "nut", "pipe:1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def nut_pictures(data):
    """(number read, pts in seconds) of every picture."""
    with av.open(io.BytesIO(data)) as container:
        return [(read_frame_number(p.to_ndarray(format="rgb24")), p.time) for p in container.decode(video=0)]


class Raw:
    """A bare RTSP client over TCP."""

    def __init__(self, server, mount, receive_bytes=None):
        self.url = server.url(mount)
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(5)
        self.socket.connect((server.host, server.port))
        self.stream = self.socket.makefile("rb")
        self.cseq = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.socket.close()

    def ask(self, method, headers="", url=None):
        """Status, headers (lower case), body."""
        self.cseq += 1
        self.socket.sendall(f"{method} {url or self.url} RTSP/1.0\r\nCSeq: {self.cseq}\r\n{headers}\r\n".encode())
        while (first := self.stream.read(1)) == b"$":
            self.stream.read(struct.unpack(">BH", self.stream.read(3))[1])
        status = int((first + self.stream.readline()).split()[1])
        fields = {}
        while line := self.stream.readline().strip().decode():
            name, _, value = line.partition(":")
            fields[name.lower()] = value.strip()
        assert fields["cseq"] == str(self.cseq)
        return status, fields, self.stream.read(int(fields.get("content-length", 0)))

    def play(self):
        status, fields, _ = self.ask("SETUP", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n")
        assert (status, fields["transport"].split(";")[0]) == (200, "RTP/AVP/TCP")
        status, fields, _ = self.ask("PLAY")
        assert status == 200
        return fields

    def packets(self, count, channel=0):
        """The next packets of one channel: RTP (0) or RTCP (1)."""
        out = []
        while len(out) < count:
            assert self.stream.read(1) == b"$"
            on, length = struct.unpack(">BH", self.stream.read(3))
            packet = self.stream.read(length)
            if on == channel:
                out.append(packet)
        return out


def sequence(packet):
    return struct.unpack(">H", packet[2:4])[0]


def sent_numbers(camera, session=-1):
    info = camera.sessions()[session]
    return [entry.frame_number for entry in camera.log() if entry.session_id == info.session_id]


# --- pictures arrive, and are the ones the log names


@pytest.mark.parametrize("transport", ["tcp", "udp"])
@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_pyav_sees_what_the_log_says(server, codec, transport):
    camera = Camera(SceneSource(1), codec=codec)
    url = server.add("/cam1", camera)
    time.sleep(0.2)  # the clock is not at 0
    with Playing(url, transport) as client:
        assert client.container.streams.video[0].codec_context.name == {"h264": "h264", "h265": "hevc"}[codec]
        seen = client.pictures(20)
    sent = sent_numbers(camera)
    assert [number for number, _, _ in seen] == sent[:20]
    assert seen[0][1] is None  # libavformat's habit
    assert [frame_number(pts_s, FPS) for _, pts_s, _ in seen[1:]] == sent[1:20]
    info = camera.sessions()[0]
    assert (info.first_frame, info.transport) == (sent[0], transport)
    assert info.user_agent.startswith("Lavf")
    for entry in camera.log():
        assert 0 <= time.time() - entry.sent_unix_s < 60


@pytest.mark.parametrize("transport", ["tcp", "udp"])
@pytest.mark.parametrize("exe", FFMPEGS)
def test_ffmpeg_sees_what_the_log_says(server, exe, transport):
    camera = Camera(Plain())
    camera.set(sender_reports=transport == "tcp")
    url = server.add("/cam1", camera)
    data, errors = ffmpeg(exe, url, "-copyts", transport=transport, frames=15).communicate(timeout=20)
    seen = nut_pictures(data)
    sent = sent_numbers(camera)
    assert [number for number, _ in seen] == sent[:15], errors
    assert seen[0][1] == 0.0
    assert [frame_number(pts_s, FPS) for _, pts_s in seen[1:]] == sent[1:15]


def test_two_clients_share_one_encoder(server):
    camera = Camera(Plain())
    url = server.add("/cam1", camera)
    with Playing(url) as first:
        first.numbers(3)
        asked_at = camera.now()
        with Playing(url) as second:
            numbers = second.numbers(5)
            assert asked_at <= numbers[0] <= asked_at + FPS  # at once, by a key frame of its own
        again = first.numbers(20)
    assert again == list(range(again[0], again[0] + 20)) or again == sent_numbers(camera, 0)[3:23]
    assert len({entry.session_id for entry in camera.log()}) == 2


def test_a_file_is_served_without_encoding(server, tmp_path):
    path = tmp_path / "plain.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=15)
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        stream.codec_context.gop_size = 10
        stream.codec_context.time_base = Fraction(1, 15)
        stream.options = {"bf": "0", "preset": "ultrafast"}
        for n in range(20):
            image = burn_frame_number(np.full((128, 160, 3), 90, np.uint8), n)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    camera = Camera(str(path))
    assert isinstance(camera.source, FileSource)
    assert camera.source.encoded
    with Playing(server.add("/file", camera)) as client:
        numbers = client.numbers(30)
    assert numbers == [n % 20 for n in sent_numbers(camera)[:30]]


# --- passwords


@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_password_opens(server, auth):
    camera = Camera(Plain(), auth=auth, username="ann", password="p w@/1")
    url = server.add("/cam1", camera)
    assert "ann" not in url
    right, wrong = (url.replace("//", f"//ann:{word}@") for word in ("p%20w%40%2F1", "other"))
    for refused in (url, wrong):
        with pytest.raises(av.error.HTTPUnauthorizedError):
            Playing(refused)
    with Playing(right) as client:
        assert client.numbers(3)
    data, _ = ffmpeg(FFMPEGS[0], right, frames=3).communicate(timeout=20)
    assert len(nut_pictures(data)) == 3


# --- endings


def test_stop_delivers_all_that_was_sent_and_restart_goes_on():
    camera = Camera(Plain())
    server = RtspServer()
    url = server.add("/cam1", camera)
    server.start()
    url = server.url("/cam1")
    client = ffmpeg(FFMPEGS[0], url, "-copyts")
    deadline = time.monotonic() + 10
    while len(camera.log()) < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 1.5
    data, _ = client.communicate(timeout=5)
    before = sent_numbers(camera)
    assert [number for number, _ in nut_pictures(data)] == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    assert camera.sessions()[0].ended_unix_s is not None
    server.start()
    try:
        assert server.url("/cam1") == url
        with Playing(url) as again:
            pictures = again.pictures(3)
    finally:
        server.stop()
    assert pictures[0][0] > before[-1] + 1  # the camera's clock went on
    assert frame_number(pictures[1][1], FPS) == pictures[1][0]


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_clients_notice_a_stop(transport):
    server = RtspServer()
    server.add("/cam1", Camera(Plain()))
    server.start()
    with Playing(server.url("/cam1"), transport) as client:
        client.numbers(3)
        server.stop()
        started = time.monotonic()
        assert len(client.numbers(100)) < 100
        assert time.monotonic() - started < 2


def test_abort_resets():
    server = RtspServer()
    server.add("/cam1", Camera(Plain()))
    server.start()
    with Raw(server, "/cam1") as client:
        client.play()
        client.packets(3)
        server.abort()
        with pytest.raises(ConnectionResetError):
            client.stream.read()


def test_port_in_use_is_said():
    with RtspServer() as first, pytest.raises(OSError, match="in use"):
        RtspServer(port=first.port).start()


# --- protocol


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, av.error.HTTPUnauthorizedError),
        (403, av.error.HTTPForbiddenError),
        (404, av.error.HTTPNotFoundError),
        (454, av.error.HTTPOtherClientError),
        (500, av.error.HTTPServerError),
        (503, av.error.HTTPServerError),
    ],
)
def test_status_codes(server, status, error):
    camera = Camera(Plain())
    url = server.add("/cam1", camera)
    camera.set(status=status)
    with pytest.raises(error):
        Playing(url)
    with Raw(server, "/cam1") as client:
        assert client.ask("OPTIONS")[0] == 200


def test_requests_out_of_place(server):
    camera = Camera(Plain(), transports=("udp",))
    server.add("/cam1", camera)
    with Raw(server, "/cam1") as client:
        assert client.ask("PLAY")[0] == 454
        assert client.ask("SETUP", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n")[0] == 461
        assert client.ask("SETUP", "Transport: RTP/AVP;multicast\r\n")[0] == 461
        assert client.ask("ANNOUNCE")[0] == 405
        assert client.ask("DESCRIBE", url=server.url("/other"))[0] == 404
    with Raw(server, "/cam1") as client:
        client.socket.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.stream.readline() == b"RTSP/1.0 400 Bad Request\r\n"
        assert client.stream.read().endswith(b"\r\n\r\n")  # and closed
    with Raw(server, "/cam1") as client:
        client.socket.sendall(b"A" * 200_000)  # a head without an end
        with suppress(ConnectionResetError):
            assert client.stream.read() == b""


def test_pause_and_teardown(server):
    camera = Camera(Plain())
    server.add("/cam1", camera)
    with Raw(server, "/cam1") as client:
        client.play()
        client.packets(2)
        assert client.ask("PAUSE")[0] == 200
        paused = len(camera.log())
        time.sleep(0.2)
        assert len(camera.log()) == paused
        client.ask("PLAY")
        client.packets(2)
        assert client.ask("TEARDOWN")[0] == 200
        assert client.ask("PLAY")[0] == 454
        assert client.ask("GET_PARAMETER")[0] == 200
    assert len(camera.sessions()) == 2


def test_announced_time_and_reports(server):
    camera = Camera(Plain())
    server.add("/cam1", camera)
    with Raw(server, "/cam1") as client:
        fields = client.play()
        assert "range" not in fields
        first = re.search(r"seq=(\d+);rtptime=(\d+)", fields["rtp-info"])
        report = client.packets(1, channel=1)[0]
        packet = client.packets(1)[0]
    assert int(first[2]) == camera.rtp_base
    assert sequence(packet) > int(first[1])
    kind, seconds, fraction, stamp = struct.unpack(">xBxxxxxxIII", report[:20])
    number = Fraction(stamp - camera.rtp_base, 90_000) * int(FPS)
    entry = next(entry for entry in camera.log() if entry.frame_number == number)
    assert kind == 200
    assert seconds - 2_208_988_800 + fraction / (1 << 32) == pytest.approx(entry.sent_unix_s, abs=1e-3)


# --- faults


def test_dark_keeps_the_connection(server):
    camera = Camera(Plain())
    with Playing(server.add("/cam1", camera)) as client:
        client.numbers(3)
        camera.set(dark=True)
        time.sleep(0.5)
        sent = len(camera.log())
        time.sleep(0.3)
        assert len(camera.log()) == sent
        camera.set(dark=False)
        client.numbers(sent - 3)
        assert client.numbers(3) == sent_numbers(camera)[sent : sent + 3]


def received_sequences(server, mount, count):
    with Raw(server, mount) as client:
        fields = client.play()
        first = int(re.search(r"seq=(\d+)", fields["rtp-info"])[1])
        return [sequence(packet) - first for packet in client.packets(count)]


def test_loss_is_seeded(server):
    for mount, seed in (("a", 4), ("b", 4), ("c", 5)):
        camera = Camera(Plain(fps=50.0), seed=seed)
        camera.set(loss_rate=0.3)
        server.add(mount, camera)
    a, b, c = (received_sequences(server, mount, 30) for mount in "abc")
    assert a == b != c
    assert a[-1] + 1 - len(a) == pytest.approx(0.3 * (a[-1] + 1), abs=9)


def test_garbage_and_bit_flips_spare_the_header(server):
    camera = Camera(Plain(fps=50.0))
    server.add("/cam1", camera)
    good = split_first(server)
    camera.set(bit_flip_rate=1.0)
    flipped = split_first(server)
    camera.set(garbage=True)
    garbage = split_first(server)
    assert (good[0][0] & 0x1F, len(good[0])) == (7, len(flipped[0]))
    wrong = [bin(a ^ b).count("1") for a, b in zip(good[0], flipped[0], strict=True)]
    assert sum(wrong) == 1
    assert garbage[0] != good[0]
    assert len(garbage[0]) == len(good[0])


def split_first(server):
    """Payloads of a play's first packets: SPS, PPS, and so on."""
    with Raw(server, "/cam1") as client:
        client.play()
        return [packet[12:] for packet in client.packets(3)]


def test_client_recovers_from_garbage(server):
    camera = Camera(Plain())
    with Playing(server.add("/cam1", camera)) as client:
        client.numbers(3)
        camera.set(garbage=True)
        time.sleep(0.3)
        camera.set(garbage=False)
        good_from = camera.now() + 1
        seen = []
        deadline = time.monotonic() + 6
        packets = client.container.demux(video=0)
        while time.monotonic() < deadline and not any(number >= good_from + FPS for number in seen):
            try:
                for picture in next(packets).decode():
                    number = read_frame_number(picture.to_ndarray(format="rgb24"))
                    seen += [number] if number is not None else []
            except av.error.InvalidDataError:
                continue
    assert max(seen) >= good_from + FPS


def test_size_changes_under_a_playing_client(server):
    camera = Camera(Plain())
    with Playing(server.add("/cam1", camera)) as client:
        assert client.pictures(3)[-1][2] == 160
        camera.set(size=(320, 256))
        pictures = client.pictures(25)
    assert (320, None) in {(width, None) for _, _, width in pictures}
    assert None not in {number for number, _, _ in pictures}


def test_silent_slow_and_strange_answers(server):
    camera = Camera(Plain())
    server.add("/cam1", camera)
    camera.set(reply_delay_s=0.3)
    with Raw(server, "/cam1") as client:
        started = time.monotonic()
        client.ask("OPTIONS")
        assert time.monotonic() - started >= 0.3
    camera.set(reply_delay_s=0, unknown_codec=True)
    with Raw(server, "/cam1") as client:
        assert b"X-UNKNOWN/90000" in client.ask("DESCRIBE")[2]
    camera.set(never_answer=True)
    with Raw(server, "/cam1") as client:
        client.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.ask("OPTIONS")


def test_a_client_that_does_not_read_harms_nobody(server, monkeypatch):
    monkeypatch.setattr(pipelines.rtsp_server, "UNREAD_BYTES", 100_000)
    camera = Camera(Noise(fps=30.0, width=320, height=256), bit_rate=20_000_000)
    url = server.add("/cam1", camera)
    with Raw(server, "/cam1", receive_bytes=20_000) as lazy:
        lazy.play()
        with Playing(url) as client:
            deadline = time.monotonic() + 15
            while not camera.sessions()[0].skipped and time.monotonic() < deadline:
                assert client.numbers(5)
    lazy_info, client_info = camera.sessions()
    assert lazy_info.skipped
    assert not client_info.skipped


# --- control


def test_control_from_outside(server):
    camera = Camera(SceneSource(2, size_px=64), auth="digest", username="ann", password="pw")
    url = server.add("/cam1", camera)
    control = SimulatorClient(url.replace("//", "//ann:pw@"))
    assert "pw" not in repr(control)
    with Playing(url.replace("//", "//ann:pw@")) as client:
        numbers = client.numbers(5)
        assert control.script(200) == camera.script(200)
        assert control.set(slow=2, size=[128, 128])["size"] == [128, 128]
        assert control.knobs()["slow"] == 2
        assert control.camera()["fps"] == FPS
        log = control.log()
        assert [entry.frame_number for entry in log][:5] == numbers
        assert log[0].user_agent.startswith("Lavf")
        assert control.log(after=3)[0] == log[3]
        assert control.sessions()[0].first_frame == numbers[0]
        control.disconnect()
        started = time.monotonic()
        client.numbers(1000)
        assert time.monotonic() - started < 2
    control.set(status=503, never_answer=True)  # the way back stays open
    assert control.set(status=None, never_answer=False)["status"] is None
    assert control.set(source="scene:9")
    for wrong in (
        {"darkness": 1},
        {"source": "/etc/passwd"},
        {"source": "scene:x"},
        {"disconnect": "now"},
        {"slow": "x"},
    ):
        with pytest.raises(ControlRefused):
            control.set(**wrong)
    for stranger in (SimulatorClient(url), SimulatorClient(url, "ann", "no")):
        with pytest.raises(ControlRefused, match="401"):
            stranger.log()


def test_server_goes_away_and_comes_back(server):
    camera = Camera(Plain())
    url = server.add("/cam1", camera)
    control = SimulatorClient(url)
    with Raw(server, "/cam1") as client:
        client.play()
        client.packets(2)
        control.away(0.6)
        while client.stream.read(1000):
            pass
    with pytest.raises(SimulatorDown):
        control.log()
    time.sleep(0.8)
    assert control.log()
    with Playing(url) as client:
        assert client.numbers(2)


# --- a process of its own


def test_simulator_process(tmp_path):
    with start_simulator(
        {"cam1": "scene:1", "cam2": "scene:2"}, size_px=128, username="ann", password="secret"
    ) as simulator:
        assert [url.rsplit("/", 1)[1] for url in simulator.urls] == ["cam1", "cam2"]
        assert "secret" not in " ".join(psutil.Process(simulator.pid).cmdline())
        with Playing(simulator.urls[1].replace("//", "//ann:secret@")) as client:
            numbers = client.numbers(5)
        control = SimulatorClient(simulator.urls[1], "ann", "secret")
        assert [entry.frame_number for entry in control.log()][:5] == numbers
    assert simulator.process.returncode == 0
    with pytest.raises(SimulatorDown):
        start_simulator({"cam1": str(tmp_path / "missing.mp4")})


def test_simulator_dies_with_its_parent():
    script = (
        "import json, time; from pipelines.simulator import start_simulator\n"
        "s = start_simulator({'cam1': 'scene:1'}, size_px=64)\nprint(json.dumps([s.pid]), flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    child = psutil.Process(json.loads(parent.stdout.readline())[0])
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    child.wait(5)
    assert not child.is_running()
