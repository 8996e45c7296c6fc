"""The decoder for sources whose address holds a password: `python -m pipelines.decoder_child`.

Reads one JSON object from stdin (uri, options, min_side_px, limits), so that nothing secret is in a command line or
in the environment; decodes with PyAV; writes NUT with raw RGB video and the source's pts to stdout, as the ffmpeg
command does, and lines like ffmpeg's to stderr. Ends with its parent, on SIGTERM, and when nobody reads any more.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from fractions import Fraction
from typing import Any

import av
import av.error
import av.logging
from av.video.reformatter import Interpolation

from pipelines.faults import redact

PR_SET_PDEATHSIG = 1
GRACE_S = 0.5
CLOCK_HZ = 90_000
TICK = Fraction(1, CLOCK_HZ)

stopping = threading.Event()


class Redacting(logging.Formatter):
    """libav's own lines in the same manner."""

    def format(self, record: logging.LogRecord) -> str:
        """One line without secrets."""
        return redact(f"[{record.name}] [{record.levelname.lower()}] {record.getMessage().strip()}")


def say(level: str, text: str) -> None:
    """One line on stderr, in ffmpeg's manner and without secrets."""
    sys.stderr.write(f"[{level}] {redact(text)}\n")
    sys.stderr.flush()


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def limit_memory(memory_bytes: int) -> None:
    """Have allocations fail past so much address space of this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def stop_on_sigterm() -> None:
    """SIGTERM ends the loop at the next packet, and the process soon after when no packet comes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        stopping.set()
        threading.Event().wait(GRACE_S)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def scaled_size(width: int, height: int, min_side_px: int) -> tuple[int, int]:
    """(width, height), even, aspect kept, with the short side at most min_side_px."""
    factor = min(1.0, min_side_px / min(width, height))
    return max(2, 2 * round(width * factor / 2)), max(2, 2 * round(height * factor / 2))


def open_source(uri: str, options: dict[str, str]) -> Any:
    """The opened container. libavformat calls silence and nonsense by the same name: the clock tells them apart."""
    began = time.monotonic()
    try:
        return av.open(uri, options=options)
    except av.error.InvalidDataError:
        if "timeout" not in options:
            raise
        if time.monotonic() - began >= 0.9 * int(options["timeout"]) / 1e6:
            raise TimeoutError("no answer: Connection timed out") from None
        raise ValueError("no RTSP answer: Invalid data found") from None


def decode(job: dict[str, Any]) -> None:
    """Open, decode, scale and write until the source ends."""
    uri, min_side_px = str(job["uri"]), int(job["min_side_px"])
    source = open_source(uri, job["options"])
    if not source.streams.video:
        raise ValueError("no video stream")
    video = source.streams.video[0]
    if video.codec_context is None:
        raise ValueError("Decoder not found: unknown codec")
    video.thread_type = "NONE"
    video.codec_context.options = {"max_pixels": str(job["max_pixels"])}
    if job["low_delay"]:
        video.codec_context.flags |= av.codec.context.Flags.low_delay
    out: Any = None
    size = before = (0, 0)
    last = -1
    with source:
        for packet in source.demux(video):
            if stopping.is_set():
                break
            try:
                frames = packet.decode()
            except (av.error.InvalidDataError, av.error.UndefinedError) as error:
                say("error", f"error while decoding: {type(error).__name__}")
                continue
            for frame in frames:
                if (frame.width, frame.height) != before:
                    before = (frame.width, frame.height)
                    size = size if out else scaled_size(*before, min_side_px)
                    say("verbose", f"w:{before[0]} h:{before[1]} -> w:{size[0]} h:{size[1]}")
                if out is None:
                    out = av.open("pipe:1", "w", format="nut", options={"flush_packets": "1"})
                    stream = out.add_stream("rawvideo", rate=CLOCK_HZ)
                    stream.width, stream.height, stream.pix_fmt = *size, "rgb24"
                    stream.codec_context.time_base = stream.time_base = TICK
                if frame.is_corrupt:
                    say("warning", "corrupt decoded frame")
                picture = frame.reformat(*size, "rgb24", interpolation=Interpolation.FAST_BILINEAR)
                # NUT wants rising times; a camera whose clock jumps back keeps its frames, as with ffmpeg
                last = max(last + 1, round((frame.time or 0.0) * CLOCK_HZ))
                picture.pts, picture.time_base = last, TICK
                out.mux(stream.encode(picture))
    if out is not None:
        out.close()


def main() -> int:
    """Run one job; the exit code is 0 when the source ended by itself."""
    job = json.load(sys.stdin)
    die_with_parent(int(job["parent_pid"]))
    stop_on_sigterm()
    limit_memory(int(job["memory_bytes"]))
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting())
    handler.addFilter(lambda record: record.levelno >= logging.ERROR or "RTP: missed" in record.getMessage())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)  # packets that are missed are counted by their lines
    try:
        decode(job)
    except BrokenPipeError:
        return 0
    except av.error.FFmpegError as error:
        say("error", f"{type(error).__name__}: {error.strerror}")
    except (OSError, ValueError) as error:
        say("error", str(error))
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
