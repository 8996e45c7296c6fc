"""The child that looks at a video file for `media_limits.checked_video`: `python -m pipelines.media_child`.

Reads one JSON object from stdin: path, formats, the limits, parent_pid. Writes one to stdout: width, height, frames,
duration_s, or `error`. Stops counting one past a limit. Its address space and its time are limited by the kernel.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from typing import Any

import av
import av.error
import av.logging

from pipelines.decoder_child import die_with_parent, limit_memory

TRIED_PACKETS = 300  # a picture that can be decoded comes among these, or the file is damaged


def look(job: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or the first limit that it breaks."""
    options = {"protocol_whitelist": "file", "format_whitelist": job["formats"]}
    with av.open(f"file:{job['path']}", options=options) as container:
        video: Any = container.streams.best("video")
        if video is None or video.codec_context is None:
            return {"error": "it holds no video that can be decoded"}
        width, height = video.codec_context.width, video.codec_context.height
        seconds = float(container.duration or 0) / 1e6
        found = {"width": width, "height": height, "frames": video.frames, "duration_s": seconds}
        if _is_much(found, job):
            return found
        video.codec_context.thread_type = "NONE"
        video.codec_context.options = {"max_pixels": str(job["video_pixels"])}
        frames, first, last, decoded = 0, math.inf, -math.inf, False
        for packet in container.demux(video):
            if packet.size == 0:
                continue
            frames += 1
            if packet.pts is not None and packet.time_base is not None:
                at_s = float(packet.pts * packet.time_base)
                first, last = min(first, at_s), max(last, at_s)
            found |= {"frames": frames, "duration_s": max(seconds, last - first)}
            if _is_much(found, job):
                return found
            decoded = decoded or (frames <= TRIED_PACKETS and _decodes(packet))
        if not frames:
            return {"error": "it holds no picture"}
        if not (decoded or video.codec_context.decode(None)):
            return {"error": "none of its pictures can be decoded"}
        return found


def _decodes(packet: Any) -> bool:
    try:
        return bool(packet.decode())
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return False


def _is_much(found: dict[str, Any], job: dict[str, Any]) -> bool:
    pixels = found["width"] * found["height"]
    return bool(
        max(found["width"], found["height"]) > job["side_px"]
        or pixels > job["video_pixels"]
        or found["frames"] > job["frames"]
        or found["duration_s"] > job["duration_s"]
    )


def main() -> int:
    """Look at one file."""
    job = json.load(sys.stdin)
    die_with_parent(int(job["parent_pid"]))
    seconds = math.ceil(job["check_s"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    limit_memory(int(job["memory_bytes"]))
    av.logging.set_level(av.logging.PANIC)
    try:
        found = look(job)
    except MemoryError:
        sys.stderr.write("MemoryError\n")
        return 1
    except (av.error.FFmpegError, OSError, ValueError) as error:
        found = {"error": str(getattr(error, "strerror", None) or error)}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
