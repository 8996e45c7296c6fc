"""How much a picture or a video that a caller sends may ask of us, judged before its pixels are decoded.

A few bytes can ask for gigabytes: 30,000 x 30,000 pixels of one colour are 100 KiB as PNG, ten thousand frames of 8K
in which nothing moves are 400 KiB as MP4. The sizes are read from the headers and judged first. A video is looked at
by a child with limits of its own on memory and time, because reading the tables of a hostile file can cost as much.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from pipelines.addresses import FILE_FORMATS
from tsm_core.errors import CallerError, WorldError

if TYPE_CHECKING:
    from torch import Tensor

PNG_HEAD = b"\x89PNG\r\n\x1a\n"
JPEG_HEAD = b"\xff\xd8\xff"
MOST_SCANS = 100  # of a progressive JPEG, which has about ten; each costs a walk over all of the picture
MEMORY_BYTES = 4 << 30  # address space of a decoder child: twice what an 8K camera needs


class BadMedia(CallerError):
    """What came is no picture or video that can be decoded."""

    reason = "bad_media"


class MediaTooLarge(CallerError):
    """The picture or video asks for more than the service gives."""

    reason = "media_too_large"


class MediaCheckFailed(WorldError):
    """The child that looks at videos could not do its work."""

    reason = "media_check_failed"


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """The most that one picture or one video may have; the names are those of the settings section `limits`.

    image_bytes, video_bytes: as it came. pixels: width x height of a picture. side_px: longest side of a picture or a
    frame. video_pixels: width x height of a frame. frames, duration_s: of a video. check_s: how long a look at a video
    may take. memory_bytes: address space of a child that reads or decodes a video.
    """

    image_bytes: int = 32 << 20
    pixels: int = 40_000_000
    side_px: int = 16_384
    video_bytes: int = 2 << 30
    video_pixels: int = 9_437_184
    frames: int = 120_000
    duration_s: float = 3_600.0
    check_s: float = 30.0
    memory_bytes: int = MEMORY_BYTES


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What a look at a video told: size of a frame in pixels, number of packets of its video, seconds."""

    width: int
    height: int
    frames: int
    duration_s: float


DEFAULT_LIMITS = MediaLimits()


# --- pictures


def decode_image(data: bytes, limits: MediaLimits = DEFAULT_LIMITS) -> Tensor:
    """A JPEG or PNG as uint8 (3, H, W), RGB, upright by its EXIF orientation; transparency is left out.

    16-bit pictures keep their upper 8 bits. Raises MediaTooLarge before the pixels are decoded, and BadMedia for
    another format and for one that is damaged or cut off.
    """
    import torch  # slow to import, and who judges videos alone needs none of it

    if len(data) > limits.image_bytes:
        raise MediaTooLarge(
            f"the picture has {len(data)} bytes, at most {limits.image_bytes} are taken (limits.image_bytes)"
        )
    kind, width, height = _picture_size(data)
    _judge_size("picture", width, height, limits.pixels, "pixels", limits)
    if kind == "JPEG" and data.count(b"\xff\xda") > MOST_SCANS:
        raise MediaTooLarge(f"the JPEG has more than {MOST_SCANS} scans; save it again without them")
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits of grey
            grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
            image = Image.fromarray(grey)
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # noqa: BLE001 - the bytes are a stranger's: whatever a decoder says of them
        raise BadMedia(f"the {kind} is damaged or cut off: {error}; send a whole one") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _picture_size(data: bytes) -> tuple[str, int, int]:
    """(format, width, height in pixels) as the header states it."""
    if data.startswith(PNG_HEAD):
        if len(data) < 24 or data[12:16] != b"IHDR":
            raise BadMedia("the PNG is cut off in its header; send a whole one")
        return ("PNG", *struct.unpack(">II", data[16:24]))
    if data.startswith(JPEG_HEAD):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise BadMedia(f"the JPEG has no usable header: {error}; send a whole one") from None
        return "JPEG", int(width), int(height)
    raise BadMedia(f"the picture begins with {data[:8]!r}, which is neither JPEG nor PNG; send one of these")


def _judge_size(what: str, width: int, height: int, pixels: int, name: str, limits: MediaLimits) -> None:
    if min(width, height) < 1:
        raise BadMedia(f"the {what} says that it has {width}x{height} pixels; send one that has some")
    if max(width, height) > limits.side_px:
        raise MediaTooLarge(
            f"the {what} is {width}x{height}, its longest side may have {limits.side_px} pixels (limits.side_px); "
            "make it smaller"
        )
    if width * height > pixels:
        raise MediaTooLarge(
            f"the {what} is {width}x{height}, it may have {pixels} pixels (limits.{name}); make it smaller"
        )


# --- videos


def checked_video(path: Path | str, limits: MediaLimits = DEFAULT_LIMITS) -> VideoFacts:
    """What a video file holds, judged without decoding it: nothing of it but its first picture.

    The file may hold its own video only: no playlist, no address of another file or host. Blocks for at most
    `limits.check_s`. Raises BadMedia, MediaTooLarge, MediaCheckFailed.
    """
    file = Path(path).absolute()
    try:
        size_bytes = file.stat().st_size if file.is_file() else None
    except OSError:
        size_bytes = None
    if size_bytes is None:
        raise BadMedia(f"{file.name} does not exist or is no regular file")
    if size_bytes > limits.video_bytes:
        raise MediaTooLarge(
            f"the video has {size_bytes} bytes, at most {limits.video_bytes} are taken (limits.video_bytes)"
        )
    found = _look(file, limits)
    if "error" in found:
        raise BadMedia(f"the video cannot be read: {found['error']}; send a whole one, such as MP4")
    facts = VideoFacts(
        int(found["width"]), int(found["height"]), int(found["frames"]), round(float(found["duration_s"]), 3)
    )
    _judge_size("video", facts.width, facts.height, limits.video_pixels, "video_pixels", limits)
    if facts.frames > limits.frames:
        raise MediaTooLarge(f"the video has more than {limits.frames} frames (limits.frames); cut it into parts")
    if facts.duration_s > limits.duration_s:
        raise MediaTooLarge(
            f"the video lasts {facts.duration_s:g} s, at most {limits.duration_s:g} s are taken (limits.duration_s); "
            "cut it into parts"
        )
    return facts


def _look(file: Path, limits: MediaLimits) -> dict[str, Any]:
    """What `media_child` says of the file."""
    job = {"path": str(file), "formats": FILE_FORMATS, "parent_pid": os.getpid(), **asdict(limits)}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TSM_")}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    child = subprocess.Popen(
        [sys.executable, "-m", "pipelines.media_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        out, words = child.communicate(json.dumps(job).encode(), timeout=limits.check_s)
    except subprocess.TimeoutExpired:
        _too_long(limits)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        _too_long(limits)
    if b"MemoryError" in words:
        raise MediaTooLarge(
            f"reading the video takes more than {limits.memory_bytes} bytes of memory (limits.memory_bytes)"
        )
    try:
        found = json.loads(out)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        if child.returncode < 0:  # a decoder that fell over a hostile file
            raise BadMedia(f"the video cannot be read: its decoder ended by signal {-child.returncode}")
        last = words.decode(errors="replace").strip().rpartition("\n")[2]
        raise MediaCheckFailed(f"the look at a video ended with {child.returncode}: {last[:200]}")
    return found


def _too_long(limits: MediaLimits) -> NoReturn:
    raise MediaTooLarge(
        f"reading the video takes longer than {limits.check_s:g} s (limits.check_s); send a smaller one"
    )
