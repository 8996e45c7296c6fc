"""Cameras and files as Frames, through one decoder child per stream, reconnecting.

The child is ffmpeg, or our own `decoder_child` for addresses that hold a password. It scales once and writes raw RGB
in NUT to a pipe. One thread always reads that pipe, so that nothing piles up inside the child; one thread starts,
watches, closes and restarts the child.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import av
import ffmpeg
import torch
from torch import Tensor

from pipelines.addresses import (
    FILE_FORMATS,
    NETWORKS,
    AddressNotAllowed,
    AddressNotFound,
    Network,
    check_url,
    pinned,
    reachable,
)
from pipelines.faults import Fault, classify, file_path, has_secret, redact, split_userinfo, with_userinfo
from tsm_core.errors import CallerError, WorldError
from tsm_core.frame import Frame

logger = logging.getLogger(__name__)

Timed = tuple[Tensor, float, float]  # image uint8 (3, H, W), pts in seconds, arrival in Unix time
State = Literal["STARTING", "RUNNING", "RESTARTING", "FAILED", "ENDED"]
CLOCK_HZ = 90_000  # of the NUT stream; RTP's own for video, so that a camera's pts stay exact
LOOP = "LOOP"  # no fault: a looped file whose decoder cannot go back begins again
STAYING_VERSION = (8, 0)  # of ffmpeg: from here on a redirect needs a protocol of the whitelist; 5.1 follows any
REDIRECTED = "Redirecting to"  # what it says before it does so
STOP_GRACE_S = 1.5  # a child that has not ended so long after SIGTERM is killed

# run by a bare Python that becomes the decoder: the child dies with the thread that started it. A fork with code of
# ours in it (preexec_fn) is not safe in a process with many threads; this is.
_LAUNCHER = (
    "import ctypes,os,resource as r,sys;ctypes.CDLL(None).prctl(1,9);"
    "os.getppid()==int(sys.argv[1]) or os._exit(1);hard=r.getrlimit(r.RLIMIT_AS)[1];most=int(sys.argv[2]);"
    "r.setrlimit(r.RLIMIT_AS,(most if hard<0 else min(most,hard),hard));os.execv(sys.argv[3],sys.argv[3:])"
)


class FFmpegMissing(WorldError):
    """No ffmpeg that could be used was found."""

    reason = "ffmpeg_missing"


class BadFile(CallerError):
    """The file does not exist, cannot be read or holds no video."""

    reason = "bad_file"


@dataclass(frozen=True, slots=True)
class FFmpeg:
    """An ffmpeg binary and its version (major, minor)."""

    path: str
    version: tuple[int, int]


def find_ffmpeg() -> FFmpeg:
    """The ffmpeg to use: `FFMPEG_BINARY`, else version 5 or newer on the path, else imageio-ffmpeg's.

    Raises FFmpegMissing that says what was tried.
    """
    return _find_ffmpeg(os.environ.get("FFMPEG_BINARY", ""), os.environ.get("PATH", ""))


def find_camera_ffmpeg() -> FFmpeg:
    """The ffmpeg for cameras: as `find_ffmpeg`, but imageio-ffmpeg's where that on the path follows redirects.

    Where there is no other, an old one is used, and ended as soon as it says that it follows one.
    """
    found = find_ffmpeg()
    if found.version >= STAYING_VERSION or os.environ.get("FFMPEG_BINARY"):
        return found
    try:
        bundled = _find_ffmpeg("", "")
    except FFmpegMissing:
        return found
    return max(found, bundled, key=lambda each: each.version)


@functools.lru_cache(maxsize=4)
def _find_ffmpeg(chosen: str, search_path: str) -> FFmpeg:
    if chosen:
        version = _ffmpeg_version(shutil.which(chosen) or chosen)
        if version is None or version < (5, 0):
            raise FFmpegMissing(f"FFMPEG_BINARY={chosen} is no ffmpeg 5 or newer; unset it to use another one")
        return FFmpeg(shutil.which(chosen) or chosen, version)
    tried = []
    on_path = shutil.which("ffmpeg", path=search_path)
    if on_path:
        version = _ffmpeg_version(on_path)
        if version and version >= (5, 0):
            return FFmpeg(on_path, version)
        tried.append(f"{on_path} is version {version}")
    try:
        import imageio_ffmpeg

        bundled = str(imageio_ffmpeg.get_ffmpeg_exe())
        version = _ffmpeg_version(bundled)
        if version and version >= (5, 0):
            return FFmpeg(bundled, version)
        tried.append(f"imageio-ffmpeg's is version {version}")
    except (ImportError, RuntimeError) as error:
        tried.append(f"imageio-ffmpeg: {error}")
    raise FFmpegMissing(
        f"no ffmpeg 5 or newer ({'; '.join(tried)}); install ffmpeg or imageio-ffmpeg, or set FFMPEG_BINARY"
    )


def _ffmpeg_version(path: str) -> tuple[int, int] | None:
    """(major, minor) as the binary states it; development builds without a number count as new."""
    try:
        run = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.match(r"ffmpeg version n?(\d+)\.(\d+)", run.stdout)
    if match:
        return int(match[1]), int(match[2])
    return (99, 0) if run.stdout.startswith("ffmpeg version") else None


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Where one stream's frames come from and how patient to be. Credentials in the uri are split off at birth.

    decoder: `auto` is ffmpeg, or pyav (our own child) for a source with credentials; those go through pyav whatever
    is asked for, because a command line is public. So does rtsps, because ffmpeg 5 does not check certificates;
    authorities beyond the system's are taken from SSL_CERT_FILE. min_side_px: the decoder keeps at least this short
    side, or the source's own if that is smaller. realtime and loop concern files. networks: a camera elsewhere is not
    opened. max_pixels: width x height of a picture; what is larger is not decoded. memory_bytes: address space of the
    decoder child. Raises BadSource.
    """

    stream_id: str
    uri: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    rtsp_transport: Literal["tcp", "udp"] = "tcp"
    decoder: Literal["auto", "ffmpeg", "pyav"] = "auto"
    min_side_px: int = 256
    loop: bool = False
    realtime: bool = True
    stall_s: float = 3.0
    open_deadline_s: float = 15.0
    io_timeout_s: float = 4.0
    retry_first_s: float = 0.5
    retry_cap_s: float = 15.0
    retry_config_s: float = 60.0
    healthy_s: float = 30.0
    networks: tuple[Network, ...] = NETWORKS
    max_pixels: int = 40_000_000
    memory_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        uri, username, password = split_userinfo(self.uri)
        object.__setattr__(self, "uri", uri)
        object.__setattr__(self, "username", self.username or username)
        object.__setattr__(self, "password", self.password or password)
        if self.is_file:
            file_path(uri)

    @property
    def is_file(self) -> bool:
        """True for file:// sources, whose time is their pts."""
        return self.uri.startswith("file:")

    @property
    def is_secret(self) -> bool:
        """True when the address must not be seen in a command line."""
        return self.username is not None or self.password is not None or has_secret(self.uri)

    @property
    def own_decoder(self) -> bool:
        """True when our own child decodes, not ffmpeg."""
        return self.decoder == "pyav" or self.is_secret or self.uri.startswith("rtsps:")

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be printed."""
        return (self.password,) if self.password else ()


@dataclass(frozen=True, slots=True)
class SourceState:
    """What a source does now.

    FAILED with `retry_at` (Unix time) tries again, slowly, because a person must change something; without it the
    source has given up. ENDED: a file is over. source_size: (width, height) of the camera's picture in pixels.
    connect_s: how long it took to RUNNING, from the decoder's start to the first picture.
    """

    state: State
    error_code: str | None = None
    message: str = ""
    retry_at: float | None = None
    at_s: float = 0.0
    source_size: tuple[int, int] | None = None
    connect_s: float | None = None


@dataclass(slots=True)
class SourceCounters:
    """Running totals of one source.

    received: frames given out. corrupt: frames that the decoder had to mend. lost: frames that the gaps in the pts
    tell of, in steps of the stream's own interval. clock_jumps: pts gaps that were no gaps in time. bytes: of decoded
    pictures. reconnects: attempts after a fault, by its code. stalls: times that the source went silent.
    packets_lost: RTP packets that the decoder missed. jitter_s: RFC 3550's measure over a camera's pictures, how
    unevenly they arrive, in seconds.
    """

    received: int = 0
    corrupt: int = 0
    lost: int = 0
    clock_jumps: int = 0
    bytes: int = 0
    reconnects: Counter[str] = field(default_factory=Counter)
    stalls: int = 0
    packets_lost: int = 0
    jitter_s: float = 0.0


def decoder_command(config: SourceConfig, camera: str | None = None) -> list[str]:
    """The ffmpeg command line that writes the source as NUT with raw RGB video to stdout. Holds no secret.

    camera: the address to connect to in place of the name in the URI.
    """
    binary = find_ffmpeg() if config.is_file else find_camera_ffmpeg()
    options: dict[str, str | int] = dict(_input_options(config)) | {"threads": 1, "max_pixels": config.max_pixels}
    if config.is_file:
        address = "file:" + file_path(config.uri)
        if config.loop:
            options["stream_loop"] = -1
    else:
        address = pinned(config.uri, camera) if camera else config.uri
        options["flags"] = "low_delay"
    side = f"min(1,{config.min_side_px}/min(iw,ih))"
    passthrough = {"fps_mode": "passthrough"} if binary.version >= (5, 1) else {"vsync": "passthrough"}
    graph = (
        ffmpeg.input(address, **options)
        .output(
            "pipe:1",
            map="0:v:0",
            vf=f"scale=w='2*round(iw*{side}/2)':h='2*round(ih*{side}/2)':flags=fast_bilinear",
            **passthrough,
            enc_time_base=f"1:{CLOCK_HZ}",
            vcodec="rawvideo",
            pix_fmt="rgb24",
            threads=1,  # more would make the raw "encoder" hold frames back, one per thread
            flush_packets=1,
            format="nut",
        )
        .global_args("-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+verbose", "-copyts")
    )
    return [str(word) for word in graph.compile(cmd=binary.path)]


def _input_options(config: SourceConfig) -> dict[str, str]:
    """Demuxer options for both decoders."""
    if config.is_file:
        return {"protocol_whitelist": "file", "format_whitelist": FILE_FORMATS}
    tls = {}
    if config.uri.startswith("rtsps:"):
        authorities = ssl.get_default_verify_paths()
        # the certificate is for the name, also when the connection goes to an address that was judged
        tls = {"tls_verify": "1", "verifyhost": urlsplit(config.uri).hostname or ""}
        tls |= {"ca_file": authorities.cafile} if authorities.cafile else {}
    return tls | {
        "protocol_whitelist": "tcp,udp,rtp,tls",
        "rtsp_transport": config.rtsp_transport,
        "timeout": str(round(config.io_timeout_s * 1e6)),
        "fpsprobesize": "0",
        "analyzeduration": "500000",
    }


class Decoder:
    """One decoder child: its process, what it says, and its frames.

    The child is killed by the kernel when the thread that made this object ends. A camera's name is resolved and judged
    here, once, and the child is given the address. Raises AddressNotAllowed, AddressNotFound.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.source_size: tuple[int, int] | None = None
        self.first_size: tuple[int, int] | None = None
        self.corrupt = 0
        self.packets_lost = 0
        self.lines: deque[str] = deque(maxlen=60)
        self.started_s = time.monotonic()
        self._sized = threading.Event()
        own = config.own_decoder
        camera = None if config.is_file else _judged(config)
        # our own settings may hold a store's password: no business of a decoder
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TSM_")}
        if own:
            command, job = _child_job(config, camera)
            environment |= {"PYTHONPATH": _python_path()}
        else:
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(config.memory_bytes)]
            command = launcher + decoder_command(config, camera)
            job = b""
        self.process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE if own else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        if self.process.stdin:
            with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
                stdin.write(job)
        self._listener = threading.Thread(target=self._listen, name=f"{config.stream_id}-stderr", daemon=True)
        self._listener.start()

    def frames(self) -> Generator[Timed, None, None]:
        """The pictures with their times until the child ends; a child that gives nothing gives no frame."""
        assert self.process.stdout is not None
        options = {"fpsprobesize": "0", "analyzeduration": "0", "probesize": "32"}
        try:
            container = av.open(f"pipe:{self.process.stdout.fileno()}", format="nut", options=options)
        except av.FFmpegError:
            return
        with container:
            video = container.streams.video[0]
            width, height, clock = video.width, video.height, float(video.time_base or 0)
            try:
                for packet in container.demux(video):
                    if packet.size == 3 * width * height and packet.pts is not None:
                        # the packet's own memory, (H, W, 3), seen as (3, H, W)
                        image = torch.frombuffer(packet, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
                        yield image, packet.pts * clock, time.time()
            except av.FFmpegError:
                return  # cut off in the middle of a frame

    def size(self) -> tuple[int, int] | None:
        """(width, height) of the source's picture; waits for the child's word of it, which comes before frame one."""
        self._sized.wait(1.0)
        return self.source_size

    @property
    def reshaped(self) -> bool:
        """True when the camera's picture changed its aspect, so that the child's fixed output size distorts it."""
        if self.first_size is None or self.source_size is None or self.first_size == self.source_size:
            return False
        (w0, h0), (w1, h1) = self.first_size, self.source_size
        return abs(w1 * h0 / (h1 * w0) - 1) > 0.02

    def close(self, reader: threading.Thread | None = None) -> int:
        """End the child and everything it holds; returns its exit code.

        SIGTERM first, while `reader` goes on emptying the pipe (a child that cannot write does not end); then SIGKILL.
        """
        self._signal(signal.SIGTERM)
        if reader is not None:
            reader.join(STOP_GRACE_S)
        try:
            code = self.process.wait(0.5 if reader is not None else 0.05)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            code = self.process.wait()
        if reader is not None:
            reader.join()
        self._listener.join(1.0)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        return code

    def ended(self) -> list[str]:
        """All that the child said, after its output is over."""
        self._listener.join(2.0)
        return list(self.lines)

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for raw in self.process.stderr:
            line = redact(raw.decode(errors="replace").rstrip(), self.config.secrets)
            match = re.search(r"\bw:(\d+) h:(\d+) .*-> ?w:\d+ h:\d+", line)
            if match:
                self.source_size = (int(match[1]), int(match[2]))
                self.first_size = self.first_size or self.source_size
                self._sized.set()
            elif "corrupt decoded frame" in line:
                self.corrupt += 1
            elif missed := re.search(r"RTP: missed (\d+) packets", line):
                self.packets_lost += int(missed[1])
            if REDIRECTED in line and not self.config.is_file:
                self._signal(signal.SIGKILL)
            if "[verbose]" not in line:
                self.lines.append(line)
                logger.debug("%s: %s", self.config.stream_id, line, extra={"stream": self.config.stream_id})
        self._sized.set()


def _judged(config: SourceConfig) -> str:
    """The address of the camera, allowed by the policy. Raises AddressNotAllowed, AddressNotFound."""
    found = check_url(config.uri, schemes=("rtsp", "rtsps"), networks=config.networks, timeout_s=config.io_timeout_s)
    return reachable(found.addresses, found.port, config.io_timeout_s)


def _child_job(config: SourceConfig, camera: str | None = None) -> tuple[list[str], bytes]:
    """(command line without secrets, what the child reads on stdin)."""
    if config.is_file:
        uri = file_path(config.uri)
    else:
        uri = with_userinfo(pinned(config.uri, camera) if camera else config.uri, config.username, config.password)
    job = {
        "uri": f"file:{uri}" if config.is_file else uri,
        "options": _input_options(config),
        "min_side_px": config.min_side_px,
        "low_delay": not config.is_file,
        "max_pixels": config.max_pixels,
        "memory_bytes": config.memory_bytes,
        "parent_pid": os.getpid(),
    }
    return [sys.executable, "-m", "pipelines.decoder_child"], json.dumps(job).encode()


def _python_path() -> str:
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))


def _mend_first_pts(frames: Iterator[Timed]) -> Iterator[Timed]:
    """The same frames, where a first pts of 0 is replaced by what the next two frames tell.

    libavformat knows no time for the first picture of an RTSP session, and the decoders then say 0.
    """
    first = list(itertools.islice(frames, 1))
    if first and first[0][1] == 0.0:
        first += itertools.islice(frames, 2)
    if len(first) == 3:
        (image, _, arrival_s), (_, second_s, _), (_, third_s, _) = first
        first[0] = (image, max(0.0, 2 * second_s - third_s), arrival_s)
    yield from first
    yield from frames


class _Gaps:
    """Frames missing between two, told by the pts in steps of the stream's own interval; how unevenly they arrive."""

    def __init__(self) -> None:
        self.jitter_s = 0.0
        self._deltas: deque[float] = deque(maxlen=31)
        self._last: tuple[float, float] | None = None

    def update(self, pts_s: float, arrival_s: float) -> tuple[int, bool]:
        """(frames missing before this one, the camera's clock jumped)."""
        last, self._last = self._last, (pts_s, arrival_s)
        if last is None:
            return 0, False
        delta, waited = pts_s - last[0], arrival_s - last[1]
        usual = sorted(self._deltas)[len(self._deltas) // 2] if len(self._deltas) >= 5 else None
        if delta < 0 or delta > waited + 2.0:
            return 0, True
        self.jitter_s += (abs(waited - delta) - self.jitter_s) / 16  # RFC 3550, section 6.4.1
        if 1 / 240 <= delta <= 2.0:
            self._deltas.append(delta)
        if usual is None or delta < 1.6 * usual:
            return 0, False
        return round(delta / usual) - 1, False


class Source:
    """Frames of one camera or file, until stopped, over every fault that may pass.

    on_frame gets each Frame from the reading thread and must not block: whoever is slow keeps the newest frame and
    counts the rest. on_state gets each SourceState. Frame numbers go on over reconnections from `first_number`;
    pts_s is the container's and starts anew with each connection if the camera's does; time_s is the arrival of the
    whole picture for cameras and pts_s for files. No frame is given out before RUNNING nor after stop().
    """

    def __init__(
        self,
        config: SourceConfig,
        on_frame: Callable[[Frame], None],
        on_state: Callable[[SourceState], None],
        first_number: int = 0,
    ) -> None:
        self.config = config
        self.counters = SourceCounters()
        self.state = SourceState("STARTING", at_s=time.time())
        self._on_frame, self._on_state = on_frame, on_state
        self._number = first_number
        self._wake = threading.Condition()
        self._telling = threading.Lock()  # states in the order of what happened
        self._current: Decoder | None = None  # whose frames count; guarded by _telling
        self._size: tuple[int, int] | None = None
        self._over = False  # the current decoder's output has ended
        self._last_frame_s = 0.0
        self._frames = 0  # of this connection
        self._stopping = threading.Event()
        self._pts_end_s = 0.0  # a looped file that is opened anew goes on here
        self._thread = threading.Thread(target=self._run, name=f"{config.stream_id}-source", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._tell("STARTING")
        self._thread.start()

    def stop(self, timeout_s: float = 3.0) -> bool:
        """End the decoder child and the threads; True when all of it is gone within timeout_s."""
        self._stopping.set()
        with self._wake:
            self._wake.notify_all()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        """Connect, watch, wait, again: until stopped, ended or failed for good."""
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                fault = self._connect()
            except (OSError, WorldError) as error:  # no ffmpeg, no process, no memory
                fault = Fault.of("STREAM_DECODER_FAILED", redact(str(error), self.config.secrets))
            if fault is None:
                return
            if self._frames and time.monotonic() - began >= self.config.healthy_s:
                failures = 0
            delay = self._delay(fault, failures)
            failures += fault.code != LOOP
            self._lose(fault, delay)
            if delay is None or self._stopping.wait(max(0.0, delay)):
                return
            if fault.code != LOOP:
                self.counters.reconnects[fault.code] += 1

    def _delay(self, fault: Fault, failures: int) -> float | None:
        """Seconds until the next attempt; None: never. Full jitter, so that cameras do not come back in step."""
        config = self.config
        if fault.retry == "never":
            return None
        if fault.code == LOOP or (fault.retry == "now" and not failures):
            return 0.0
        if fault.retry == "slow":
            return config.retry_config_s * random.uniform(0.9, 1.1)
        return random.uniform(0.0, min(config.retry_cap_s, config.retry_first_s * 2 ** min(failures, 16)))

    def _connect(self) -> Fault | None:
        """One connection from start to end: its fault, or None when stopped or when a file is over."""
        self._frames, self._over = 0, False
        try:
            decoder = Decoder(self.config)
        except AddressNotAllowed as error:
            return Fault.of("STREAM_ADDRESS_FORBIDDEN", str(error))
        except AddressNotFound as error:
            return Fault.of("STREAM_DNS_FAILED", str(error))
        self._reader = threading.Thread(
            target=self._read, args=(decoder,), name=f"{self.config.stream_id}-reader", daemon=True
        )
        with self._telling:
            self._current = decoder
        self._reader.start()
        fault = self._watch(decoder)
        if self._stopping.is_set():
            self._close()
            return None
        if fault is None:
            lines, elapsed_s = decoder.ended(), time.monotonic() - decoder.started_s
            if self.config.is_file and self._frames:
                self._close()
                if self.config.loop:
                    return Fault(LOOP, "now", "the file begins again", "")
                self._tell("ENDED", "the file is over")
                return None
            fault = classify(
                lines,
                elapsed_s=elapsed_s,
                io_timeout_s=self.config.io_timeout_s,
                frames=self._frames,
                is_file=self.config.is_file,
            )
        return fault

    def _watch(self, decoder: Decoder) -> Fault | None:
        """Wait for the end of the output (None), or find that it is late or changed its shape."""
        config = self.config
        while not self._stopping.is_set():
            with self._wake:
                if self._over:
                    return None
                now = time.monotonic()
                if not self._frames:
                    left_s = decoder.started_s + config.open_deadline_s - now
                    late = Fault.of("STREAM_TIMEOUT", f"no picture within {config.open_deadline_s:g} s")
                elif config.is_file:
                    left_s, late = 60.0, None  # paced by us; its pts may well hold pauses
                else:
                    left_s = self._last_frame_s + config.stall_s - now
                    late = Fault.of("STREAM_STALLED", f"no picture for {config.stall_s:g} s")
                if decoder.reshaped:
                    return Fault.of("STREAM_RECONFIGURED")
                if left_s <= 0 and late is not None:
                    return late
                self._wake.wait(min(left_s, 1.0))
        return None

    def _lose(self, fault: Fault, delay_s: float | None) -> None:
        """Tell of a fault at once, then end the child."""
        state: State = "RESTARTING" if fault.retry in ("now", "soon") else "FAILED"
        message = f"{fault.message}; {fault.hint}" if fault.hint else fault.message
        self.counters.stalls += fault.code == "STREAM_STALLED"
        with self._telling:
            decoder, self._current = self._current, None
            if fault.code != LOOP:
                logger.warning(
                    "%s: %s: %s", self.config.stream_id, fault.code, message, extra={"stream": self.config.stream_id}
                )
                retry_at = None if delay_s is None else time.time() + delay_s
                self._tell(state, message, error_code=fault.code, retry_at=retry_at)
        if decoder is not None:
            decoder.close(self._reader)

    def _close(self) -> None:
        """End the child without a word."""
        with self._telling:
            decoder, self._current = self._current, None
        if decoder is not None:
            decoder.close(self._reader)

    def _read(self, decoder: Decoder) -> None:
        """The reading thread: every frame of one connection, in order."""
        gaps, corrupt_seen, packets_seen, offset_s, first_pts_s = _Gaps(), 0, 0, 0.0, None
        began = time.monotonic()
        config = self.config
        try:
            frames = decoder.frames()
            for image, pts_s, arrival_s in frames if config.is_file else _mend_first_pts(frames):
                if first_pts_s is None:
                    first_pts_s = pts_s
                    offset_s = self._pts_end_s - pts_s if config.is_file and self._pts_end_s else 0.0
                    size = decoder.size() or (image.shape[2], image.shape[1])
                    connect_s = time.monotonic() - decoder.started_s
                    with self._telling:
                        if self._is_current(decoder) and (self.state.state != "RUNNING" or size != self._size):
                            self._size = size
                            self._tell("RUNNING", f"{size[0]}x{size[1]} px", connect_s=connect_s)
                if config.is_file and config.realtime:
                    self._stopping.wait(max(0.0, began + (pts_s - first_pts_s) - time.monotonic()))
                if not self._is_current(decoder):
                    continue  # being closed: empty the pipe
                lost, jumped = (0, False) if config.is_file else gaps.update(pts_s, arrival_s)
                corrupt, corrupt_seen = decoder.corrupt > corrupt_seen, decoder.corrupt
                pts_s += offset_s
                counters = self.counters
                counters.received += 1
                counters.bytes += image.numel()
                counters.corrupt += corrupt
                counters.lost += lost
                counters.clock_jumps += jumped
                counters.packets_lost += decoder.packets_lost - packets_seen
                counters.jitter_s, packets_seen = gaps.jitter_s, decoder.packets_lost
                frame = Frame(
                    stream_id=config.stream_id,
                    number=self._number,
                    image=image,
                    pts_s=pts_s,
                    time_s=pts_s if config.is_file else arrival_s,
                    source_size=decoder.source_size or (image.shape[2], image.shape[1]),
                    corrupt=corrupt,
                )
                self._number += 1
                self._frames += 1
                self._last_frame_s = time.monotonic()
                self._on_frame(frame)
                if config.is_file:
                    self._pts_end_s = max(self._pts_end_s, pts_s + 1 / 25)
        finally:
            with self._wake:
                self._over = True
                self._wake.notify_all()

    def _is_current(self, decoder: Decoder) -> bool:
        return self._current is decoder and not self._stopping.is_set()

    def _tell(
        self,
        state: State,
        message: str = "",
        *,
        error_code: str | None = None,
        retry_at: float | None = None,
        connect_s: float | None = None,
    ) -> None:
        self.state = SourceState(state, error_code, message, retry_at, time.time(), self._size, connect_s)
        self._on_state(self.state)


def iter_file(path: str | Path, min_side_px: int = 256, stream_id: str = "file") -> Iterator[Frame]:
    """Every frame of a video file in order, as fast as the caller takes them. time_s is pts_s.

    Raises BadFile, which names the file, when it cannot be read or holds no video.
    """
    file = Path(path).resolve()
    config = SourceConfig(stream_id, f"file://{file}", min_side_px=min_side_px)
    if not file.is_file():
        raise BadFile(f"{path} does not exist or is no file; give the path of a video file")
    decoder = Decoder(config)
    number = 0
    try:
        with contextlib.closing(decoder.frames()) as frames:
            for image, pts_s, _ in frames:
                size = decoder.size() or (image.shape[2], image.shape[1])
                yield Frame(stream_id, number, image, pts_s, pts_s, size)
                number += 1
        if not number:
            fault = classify(decoder.ended(), elapsed_s=0.0, io_timeout_s=1.0, frames=0, is_file=True)
            raise BadFile(f"{path}: {fault.message}; {fault.hint}")
    finally:
        decoder.close()
