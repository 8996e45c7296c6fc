"""A simulated camera: pictures paced by a clock, encoded once for all viewers, with its truth and its faults.

The camera's clock starts when the camera is made and never stops: frame n is due `n / fps` seconds later, watched or
not. Its RTP timestamps are `rtp_base + n * 90000 / fps` (modulo 2^32: 13 hours), and a viewer is told `rtp_base` as the
timestamp of time 0. A client that believes this (PyAV; ffmpeg with `-copyts`) sees `pts_s = n / fps`, with and without
RTCP sender reports, on every picture but a session's first: libavformat's parser gives that one no pts (PyAV: None;
ffmpeg: 0; seen in 5.1, 8.1 and 9.0). ffmpeg without `-copyts` is of no use here: it counts from the session's second
picture, or from time 0 when it had not seen that one before it began.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from pipelines.rtp import CLOCK_HZ, Codec, ParameterSets, is_key, payloads, split_nals
from pipelines.scenes import Scene
from tsm_core.errors import CallerError

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Auth = Literal["none", "basic", "digest"]

NUMBER_BITS = 20
CHECK_BITS = 4
BLOCKS_PER_WIDTH = 40  # a block is 1/40 of the picture wide and high: 8 px at 320 px
CATCH_UP_FRAMES = 3
BIT_RATE = 1_000_000
LONGEST_KEY_GAP_S = 2.0
SEEK_FRAMES = 60  # farther ahead, a file is sought rather than decoded through


class CameraError(CallerError):
    """A simulated camera cannot be made or set as asked."""

    reason = "invalid_camera"


class UnusableVideo(CameraError):
    """The file holds no video that a camera could show."""

    reason = "unusable_video"


# --- the number in the picture ------------------------------------------------------------------------------------


def _blocks(height: int, width: int) -> list[tuple[slice, slice]]:
    rows = slice(height - max(1, round(height / BLOCKS_PER_WIDTH)), height)
    edges = [round(i * width / BLOCKS_PER_WIDTH) for i in range(NUMBER_BITS + CHECK_BITS + 1)]
    return [(rows, slice(left, right)) for left, right in pairwise(edges)]


def _code(number: int) -> int:
    """The number with four parity bits, each over every fourth bit; the last inverted, so that black is no number."""
    parity = 0b1000
    for nibble in range(0, NUMBER_BITS, CHECK_BITS):
        parity ^= (number >> nibble) & 0xF
    return number << CHECK_BITS | parity


def burn_frame_number(image: Pixels, number: int) -> Pixels:
    """A copy of image (H, W, 3) with `number` modulo 2^20 as black and white blocks at the left of its bottom edge."""
    out = image.copy()
    code = _code(number % (1 << NUMBER_BITS))
    for i, (rows, columns) in enumerate(_blocks(*image.shape[:2])):
        out[rows, columns] = 255 if code >> (NUMBER_BITS + CHECK_BITS - 1 - i) & 1 else 0
    return out


def read_frame_number(image: Pixels) -> int | None:
    """The number burnt into image (H, W, 3) uint8; None when unreadable. A block must still be two pixels."""
    code = 0
    for rows, columns in _blocks(*image.shape[:2]):
        block = image[rows, columns]
        high, wide = block.shape[:2]
        light = float(block[high // 4 : high - high // 4, wide // 4 : wide - wide // 4].mean())
        if 100 < light < 155:
            return None
        code = code << 1 | (light > 127)
    number = code >> CHECK_BITS
    return number if _code(number) == code else None


def frame_number(pts_s: float, fps: float) -> int:
    """The camera's number of a picture with presentation time `pts_s`, for clients that keep the camera's time.

    Clock jumps are part of `pts_s` and are not undone; nor is the first picture of a session, which has no pts.
    """
    return round(pts_s * fps)


# --- what the camera looks at -------------------------------------------------------------------------------------


class Source(Protocol):
    """Anything that gives pictures by number: frame(n) is uint8 (H, W, 3), the same for every call with n."""

    fps: float

    def frame(self, number: int) -> Pixels:
        """The picture `number`, RGB."""


@runtime_checkable
class Scripted(Protocol):
    """A source that knows what happens when."""

    def script(self, until_frame: int) -> list[Any]:
        """What happens from frame 0 on: label, start_frame and end_frame (exclusive) of each interval."""


class SceneSource:
    """A procedural scene with its script."""

    def __init__(self, seed: int, size_px: int = 320, fps: float = 15.0) -> None:
        if size_px < 64 or size_px % 2:
            raise CameraError(f"size_px is {size_px}: give an even number of at least 64")
        self.fps = fps
        self.scene = Scene(seed, size_px, fps)

    def frame(self, number: int) -> Pixels:
        """The picture `number`, uint8 (size_px, size_px, 3), RGB."""
        return self.scene.frame(number)

    def script(self, until_frame: int) -> list[Any]:
        """Label, start_frame and end_frame of every interval that begins before `until_frame`."""
        return list(self.scene.script(until_frame))


class FileSource:
    """A video file in a loop: picture n is the file's picture n modulo `frames`, at the file's mean rate.

    `encoded` is True when the file can go out as it is: H.264 or H.265 without B-frames, evenly timed, a key frame at
    least every two seconds. The file is then held in memory. `reencode=True` forbids it. Raises UnusableVideo.
    """

    def __init__(self, path: str | Path, *, reencode: bool = False) -> None:
        self.path = Path(path)
        self._container: Any = None
        self._pictures: Any = None
        self._next = 0
        self._units: list[tuple[bytes, bool]] = []
        try:
            with av.open(str(self.path)) as container:
                self._survey(container, reencode)
        except (OSError, av.error.FFmpegError, IndexError) as error:
            raise UnusableVideo(f"{self.path.name} cannot be read as a video: {type(error).__name__}") from None

    def _survey(self, container: Any, reencode: bool) -> None:
        stream = container.streams.video[0]
        name = {"h264": "h264", "hevc": "h265"}.get(stream.codec_context.name)
        self.codec: Codec = "h265" if name == "h265" else "h264"
        to_annexb = None
        if name and not reencode:
            to_annexb = av.BitStreamFilterContext(f"{stream.codec_context.name}_mp4toannexb", stream)
        keys: list[int] = []
        stamps: list[float | None] = []
        units: list[bytes] = []
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_keyframe:
                keys.append(len(stamps))
            stamps.append(None if packet.pts is None else float(packet.pts * packet.time_base))
            if to_annexb:
                units.extend(bytes(filtered) for filtered in to_annexb.filter(packet))
        if not stamps:
            raise UnusableVideo(f"{self.path.name} holds no pictures")
        self.frames = len(stamps)
        times = sorted(stamp for stamp in stamps if stamp is not None)
        span_s = times[-1] - times[0] if times else 0.0
        self.fps = (len(times) - 1) / span_s if span_s > 0 else float(stream.average_rate or 25)
        self._start_s = times[0] if times else 0.0
        self._steady = len(times) == self.frames and all(
            abs(stamp - self._start_s - i / self.fps) < 0.5 / self.fps for i, stamp in enumerate(times)
        )
        gaps = [after - before for before, after in zip(keys, [*keys[1:], self.frames], strict=True)]
        joinable = bool(keys) and keys[0] == 0 and max(gaps) <= LONGEST_KEY_GAP_S * self.fps
        if to_annexb and self._steady and stamps == times and joinable and len(units) == self.frames:
            key_set = set(keys)
            self._units = [(unit, i in key_set) for i, unit in enumerate(units)]

    @property
    def encoded(self) -> bool:
        """True when `unit` gives the file's own compressed pictures."""
        return bool(self._units)

    def unit(self, number: int) -> tuple[bytes, bool]:
        """Picture `number` as an Annex B access unit, and whether decoding can begin there."""
        return self._units[number % self.frames]

    def frame(self, number: int) -> Pixels:
        """The picture `number`, uint8 (H, W, 3), RGB. Asking in order is quick."""
        return _rgb(self.picture(number))

    def picture(self, number: int) -> av.VideoFrame:
        """The picture `number` as the file's decoder gives it."""
        for _ in range(2):  # a file may decode to fewer pictures than its packets promise: then begin again
            wanted = number % self.frames
            if self._pictures is None or not self._next <= wanted <= self._next + SEEK_FRAMES:
                self._move(wanted)
            for picture in self._pictures:
                self._next += 1
                if self._next > wanted:
                    found: av.VideoFrame = picture
                    return found
            self.frames = max(1, self._next)
            self.close()
        raise UnusableVideo(f"{self.path.name} decodes to no pictures")

    def _move(self, wanted: int) -> None:
        """Open the file at picture `wanted` or somewhat before."""
        for seek in (True, False) if self._steady and wanted > SEEK_FRAMES else (False,):
            self.close()
            self._container = av.open(str(self.path))
            stream = self._container.streams.video[0]
            stream.codec_context.thread_count = 1
            self._pictures, self._next = self._container.decode(stream), 0
            if not seek:
                return
            with suppress(av.error.FFmpegError, StopIteration):
                self._container.seek(int((self._start_s + (wanted - 0.5) / self.fps) / stream.time_base), stream=stream)
                first = next(self._pictures)
                self._next = round((first.time - self._start_s) * self.fps)
                if self._next <= wanted:
                    self._pictures = chain([first], self._pictures)
                    return

    def peek(self) -> av.VideoFrame:
        """The file's first picture, without moving `frame`'s place."""
        with av.open(str(self.path)) as container:
            for picture in container.decode(video=0):
                return picture
        raise UnusableVideo(f"{self.path.name} decodes to no pictures")

    def close(self) -> None:
        """Let go of the file; the next `frame` opens it again."""
        if self._container is not None:
            self._container.close()
        self._container = self._pictures = None


def _rgb(picture: av.VideoFrame) -> Pixels:
    return picture.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


def open_source(text: str, *, size_px: int = 320, fps: float = 15.0) -> Source:
    """The source that a mount names: `scene:SEED`, or the path of a video file."""
    if text.startswith("scene:"):
        seed = text.removeprefix("scene:")
        if not seed.isdecimal():
            raise CameraError(f"{text!r} names no scene: write scene:SEED with a whole number")
        return SceneSource(int(seed), size_px, fps)
    if not Path(text).is_file():
        raise CameraError(f"{text!r} is neither scene:SEED nor a file")
    return FileSource(text)


# --- compression --------------------------------------------------------------------------------------------------


class Encoder:
    """H.264 or H.265 without delay: one picture in, one access unit out."""

    def __init__(self, codec: Codec, width: int, height: int, fps: float, bit_rate: int) -> None:
        library = {"h264": "libx264", "h265": "libx265"}[codec]
        context: Any = av.CodecContext.create(library, "w")
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.framerate = Fraction(fps).limit_denominator(1001)
        context.time_base = Fraction(1, CLOCK_HZ)
        context.bit_rate = bit_rate
        context.thread_count = 1
        # key frames are asked for, one by one
        params = "scenecut=0:keyint=100000:min-keyint=1"
        if codec == "h265":
            params += ":log-level=none:pools=none:frame-threads=1:bframes=0:open-gop=0:repeat-headers=1"
        context.options = {
            "preset": "ultrafast",
            "tune": "zerolatency",
            "forced-idr": "1",
            f"{library[3:]}-params": params,
        }
        context.open()
        self.codec = codec
        self.size = (width, height)
        self._context = context
        self._reformatter = VideoReformatter()

    def encode(self, picture: av.VideoFrame | Pixels, pts: int, *, key: bool) -> list[bytes]:
        """The NAL units of a picture (arrays: uint8 (H, W, 3), RGB), scaled where the encoder has another size."""
        if isinstance(picture, np.ndarray):
            picture = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame: Any = self._reformatter.reformat(picture, *self.size, "yuv420p", threads=1)
        frame.pts = pts
        frame.pict_type = PictureType.I if key else PictureType.NONE
        return split_nals(b"".join(bytes(packet) for packet in self._context.encode(frame)))


def viewed_pictures(
    source: Source, frames: int, bit_rate: int = BIT_RATE, size: tuple[int, int] | None = None
) -> Iterator[Pixels]:
    """The first pictures of a source as a viewer decodes them: number burnt in, H.264, a key frame every second.

    size: width and height that they are scaled to, as the service's decoders do it.
    """
    encoder: Encoder | None = None
    decoder: Any = av.CodecContext.create("h264", "r")
    for number in range(frames):
        image = burn_frame_number(source.frame(number), number)
        if encoder is None:
            encoder = Encoder("h264", image.shape[1], image.shape[0], source.fps, bit_rate)
        nals = encoder.encode(image, round(number * CLOCK_HZ / source.fps), key=number % round(source.fps) == 0)
        packet = av.Packet(b"".join(b"\0\0\0\1" + nal for nal in nals))
        for picture in [*decoder.decode(packet), *(decoder.decode(None) if number == frames - 1 else ())]:
            if size:
                picture = picture.reformat(*size, "rgb24", interpolation=Interpolation.FAST_BILINEAR)
            yield _rgb(picture)


class AccessUnit(NamedTuple):
    """One compressed picture, cut for RTP."""

    number: int
    timestamp: int
    key: bool
    payloads: list[bytes]


# --- faults -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knobs:
    """How the camera misbehaves. All at rest by default; each may be turned while clients play."""

    dark: bool = False
    """No pictures are sent; the connection stays."""
    garbage: bool = False
    """Every payload is replaced by random bytes."""
    bit_flip_rate: float = 0.0
    """Share of packets with one flipped bit."""
    loss_rate: float = 0.0
    """Share of packets that are never sent."""
    clock_offset_s: float = 0.0
    """Added to every timestamp: turning it makes the camera's clock jump."""
    slow: float = 1.0
    """The camera's time runs so many times slower: 4 gives a quarter of the pictures per second."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, instead of the source's own."""
    status: int | None = None
    """Answer to everything but OPTIONS, e.g. 401, 404, 454, 503."""
    reply_delay_s: float = 0.0
    """Wait before each reply."""
    never_answer: bool = False
    """Requests are read and left without a reply."""
    unknown_codec: bool = False
    """The session description names a codec that nobody knows."""
    sender_reports: bool = True
    """RTCP sender reports every few seconds."""

    def turned(self, **changes: Any) -> Knobs:
        """A copy with `changes`. Raises CameraError for an unknown name or a value out of range."""
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise CameraError(f"no knob named {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        if isinstance(changes.get("size"), list):
            changes["size"] = tuple(changes["size"])
        new = replace(self, **changes)
        for name in ("bit_flip_rate", "loss_rate"):
            if not 0 <= getattr(new, name) <= 1:
                raise CameraError(f"{name} is {getattr(new, name)}: give a share from 0 to 1")
        if not 0.01 <= new.slow <= 1000:
            raise CameraError(f"slow is {new.slow}: give a factor from 0.01 to 1000")
        if new.size and (len(new.size) != 2 or any(side < 64 or side % 2 for side in new.size)):
            raise CameraError(f"size is {new.size}: give even width and height of at least 64 px")
        if new.status is not None and not 400 <= new.status <= 599:
            raise CameraError(f"status is {new.status}: give 400 to 599, or null")
        return new


# --- the camera ---------------------------------------------------------------------------------------------------


class LogEntry(NamedTuple):
    """One picture sent to one client."""

    frame_number: int
    sent_unix_s: float
    session_id: str
    user_agent: str


@dataclass
class SessionInfo:
    """One client's play, as the camera saw it. `first_frame` is the number of the first picture it was sent."""

    session_id: str
    user_agent: str
    transport: str
    started_unix_s: float
    ended_unix_s: float | None = None
    first_frame: int | None = None
    last_frame: int | None = None
    frames: int = 0
    skipped: int = 0
    packets_lost: int = 0


class Viewer(Protocol):
    """Who gets the access units; called in the camera's thread."""

    def post(self, unit: AccessUnit, *, gap: bool) -> None:
        """Take one picture; gap: pictures are missing before it, decode from the next key."""


class Camera:
    """One camera: a source, an encoder shared by all viewers, knobs, the script and the log.

    codec applies where pictures are encoded; a file that is served as it is keeps its own. burn puts the frame number
    into encoded pictures (default: scenes yes, files no). auth other than "none" needs username and password.
    `always` keeps encoding while nobody plays. `seed` fixes the faults' dice and the RTP base.
    """

    def __init__(
        self,
        source: Source | str,
        *,
        codec: Codec = "h264",
        auth: Auth = "none",
        username: str = "",
        password: str = "",
        bit_rate: int = BIT_RATE,
        burn: bool | None = None,
        always: bool = False,
        transports: tuple[str, ...] = ("tcp", "udp"),
        seed: int = 0,
        log_size: int = 200_000,
    ) -> None:
        if auth not in ("none", "basic", "digest"):
            raise CameraError(f"auth is {auth!r}: give none, basic or digest")
        if codec not in ("h264", "h265"):
            raise CameraError(f"codec is {codec!r}: give h264 or h265")
        if auth != "none" and not (username and password):
            raise CameraError(f"auth {auth} needs a username and a password")
        self.auth, self.username, self._password = auth, username, password
        self.bit_rate, self.always, self.transports, self.seed = bit_rate, always, transports, seed
        self.knobs = Knobs()
        self.rtp_base = random.Random(seed).randrange(1, 1 << 20)
        self._codec: Codec = codec
        self._burn = burn
        self._lock = threading.Lock()
        self._viewers: list[Viewer] = []
        self._thread: threading.Thread | None = None
        self._open = False
        self._key_wanted = False
        self._log: deque[LogEntry] = deque(maxlen=log_size)
        self._logged = 0
        self._sessions: deque[SessionInfo] = deque(maxlen=10_000)
        self._sets: tuple[Source, tuple[int, int] | None, ParameterSets] | None = None
        self._sent: Source | None = None  # whose pictures went out last, as they were
        self._source = open_source(source) if isinstance(source, str) else source
        self._anchor = (time.monotonic(), 0.0)  # at this moment the camera's clock showed this frame
        self.fps = float(self._source.fps)

    def __repr__(self) -> str:
        return f"Camera({type(self._source).__name__}, {self.codec}, {self.fps:g} fps, auth {self.auth})"

    # -- what it shows

    @property
    def source(self) -> Source:
        """What the camera looks at."""
        return self._source

    @property
    def codec(self) -> Codec:
        """The codec of what it sends now."""
        source = self._passthrough()
        return source.codec if source else self._codec

    def switch(self, source: Source | str) -> None:
        """Look at something else from the next picture on, of the same rate and codec: time and session go on."""
        new = open_source(source, fps=self.fps) if isinstance(source, str) else source
        if abs(new.fps - self.fps) > 0.01 * self.fps:
            raise CameraError(f"the camera runs at {self.fps:g} fps, the new source at {new.fps:g}: they must be equal")
        if isinstance(new, FileSource) and new.encoded and new.codec != self.codec:
            raise CameraError(
                f"the camera sends {self.codec}, {new.path.name} is {new.codec}: open it with reencode=True"
            )
        with self._lock:
            self._source = new
            self._key_wanted = True

    def script(self, until_frame: int | None = None) -> list[Any]:
        """What happens when, from frame 0 on; [] for sources that know no script.

        until_frame defaults to one minute ahead of now.
        """
        if not isinstance(self._source, Scripted):
            return []
        ahead = self.now() + round(60 * self.fps)
        return self._source.script(ahead if until_frame is None else until_frame)

    def now(self) -> int:
        """The number of the newest frame by the camera's clock."""
        return math.floor(self._position(time.monotonic()))

    def _position(self, at: float) -> float:
        moment, frame = self._anchor
        return frame + (at - moment) * self.fps / self.knobs.slow

    def _due(self, number: int) -> float:
        moment, frame = self._anchor
        return moment + (number - frame) * self.knobs.slow / self.fps

    def timestamp(self, number: int) -> int:
        """The RTP timestamp of frame `number`, clock jumps included."""
        ticks = round(number * CLOCK_HZ / self.fps + self.knobs.clock_offset_s * CLOCK_HZ)
        return (self.rtp_base + ticks) & 0xFFFFFFFF

    # -- its truth

    def log(self, after: int = 0, limit: int | None = None) -> list[LogEntry]:
        """Every picture sent to every client, oldest first: at most `limit`, without the first `after` ever logged."""
        with self._lock:
            start = max(0, after - (self._logged - len(self._log)))
            return list(islice(self._log, start, None if limit is None else start + limit))

    def sessions(self) -> list[SessionInfo]:
        """Every play so far, oldest first."""
        with self._lock:
            return [replace(info) for info in self._sessions]

    def began(self, info: SessionInfo) -> None:
        """Note a new play (called by the server)."""
        with self._lock:
            self._sessions.append(info)

    def sent(self, entry: LogEntry) -> None:
        """Note a picture sent (called by the server)."""
        with self._lock:
            self._log.append(entry)
            self._logged += 1

    # -- its faults

    def set(self, **changes: Any) -> Knobs:
        """Turn knobs (see Knobs); returns all of them. Raises CameraError for an unknown one or a bad value."""
        with self._lock:
            new = self.knobs.turned(**changes)
            at = time.monotonic()
            self._anchor = (at, self._position(at))
            if (self.knobs.dark, self.knobs.size) != (new.dark, new.size):
                self._key_wanted = True
            self.knobs = new
        return new

    def knob_values(self) -> dict[str, Any]:
        """The knobs as JSON-able values."""
        return asdict(self.knobs)

    # -- its viewers

    def check_password(self, username: str, password: str) -> bool:
        """True when these are the camera's credentials, or it has none."""
        return self.auth == "none" or (username == self.username and password == self._password)

    def credentials(self) -> tuple[str, str]:
        """Username and password, for the digest."""
        return self.username, self._password

    def open(self) -> None:
        """Let viewers in (called by the server)."""
        with self._lock:
            self._open = True
            self._wake()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop the encoder; the clock goes on (called by the server)."""
        with self._lock:
            self._open = False
            self._viewers.clear()
            thread = self._thread
        if thread:
            thread.join(timeout_s)

    def join(self, viewer: Viewer) -> None:
        """Begin to feed a viewer, from a key frame on."""
        with self._lock:
            self._viewers.append(viewer)
            self._key_wanted = True
            self._wake()

    def leave(self, viewer: Viewer) -> None:
        """Feed a viewer no more."""
        with self._lock, suppress(ValueError):
            self._viewers.remove(viewer)

    def want_key(self) -> None:
        """Make the next encoded picture a key frame."""
        with self._lock:
            self._key_wanted = True

    def _wake(self) -> None:
        if self._thread is None and self._open and (self._viewers or self.always):
            self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
            self._thread.start()

    # -- its encoder

    def _passthrough(self) -> FileSource | None:
        source = self._source
        return source if isinstance(source, FileSource) and source.encoded and not self.knobs.size else None

    def _picture(self, source: Source, number: int, peek: bool = False) -> av.VideoFrame:
        """What is to be encoded: the source's picture, with its number where numbers are burnt."""
        if isinstance(source, FileSource):
            picture = source.peek() if peek else source.picture(number)
        else:
            picture = av.VideoFrame.from_ndarray(source.frame(number), format="rgb24")
        if self._burn if self._burn is not None else not isinstance(source, FileSource):
            width, height = self._size_of(picture)
            image = burn_frame_number(_rgb(picture.reformat(width, height, "rgb24", threads=1)), number)
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
        return picture

    def _size_of(self, picture: av.VideoFrame) -> tuple[int, int]:
        return self.knobs.size or (picture.width // 2 * 2, picture.height // 2 * 2)

    def _encoder(self, picture: av.VideoFrame) -> Encoder:
        return Encoder(self._codec, *self._size_of(picture), self.fps, self.bit_rate)

    def parameter_sets(self) -> ParameterSets:
        """SPS, PPS (and VPS) of what is sent now. Slow the first time: it encodes one picture."""
        source, size = self._source, self.knobs.size
        if self._sets and self._sets[0] is source and self._sets[1] == size:
            return self._sets[2]
        if file := self._passthrough():
            codec, nals = file.codec, split_nals(file.unit(0)[0])
        else:
            # peek: a file's decoder belongs to the encoding thread
            picture = self._picture(source, 0, peek=True)
            codec, nals = self._codec, self._encoder(picture).encode(picture, 0, key=True)
        sets = ParameterSets.find(nals, codec)
        self._sets = (source, size, sets)
        return sets

    def _run(self) -> None:
        try:
            self._stream()
        except Exception:
            logger.exception("%r stopped: its source or encoder failed", self)
            with self._lock:
                self._thread = None

    def _stream(self) -> None:
        """Encode and hand out pictures until nobody is left."""
        encoder: Encoder | None = None
        number, last = math.ceil(self._position(time.monotonic())), -1
        while True:
            with self._lock:
                if not self._open or not (self._viewers or self.always):
                    self._thread = None
                    return
            if (wait_s := self._due(number) - time.monotonic()) > 0:
                time.sleep(min(wait_s, 0.1))
                continue
            late = self.now() - number
            if late > CATCH_UP_FRAMES:
                number += late
            if not self.knobs.dark:
                encoder = self._send(number, last, encoder)
                last = number
            number += 1

    def _send(self, number: int, last: int, encoder: Encoder | None) -> Encoder | None:
        source, file = self._source, self._passthrough()
        gap = False
        if file:
            encoder = None
            data, key = file.unit(number)
            codec, nals = file.codec, split_nals(data)
            gap = number != last + 1 or self._sent is not file
            if key and not ParameterSets.find(nals, codec).sps:
                sets = self.parameter_sets()
                nals = [*sets.vps, *sets.sps, *sets.pps, *nals]
        else:
            picture = self._picture(source, number)
            if encoder is None or encoder.size != self._size_of(picture):
                encoder, last = self._encoder(picture), -1
            with self._lock:
                asked, self._key_wanted = self._key_wanted, False
            group = max(1, round(self.fps))
            # an encoder refers to what it sent last, whatever its number: skipped numbers are no gap
            nals = encoder.encode(picture, number, key=asked or last < 0 or number // group != last // group)
            codec, key = self._codec, is_key(nals, self._codec)
        self._sent = file
        unit = AccessUnit(number, self.timestamp(number), key, payloads(nals, codec))
        with self._lock:
            viewers = list(self._viewers)
        for viewer in viewers:
            viewer.post(unit, gap=gap)
        return encoder
