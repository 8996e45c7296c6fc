"""Pictures and videos of strangers: what they ask for is judged before it is given."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.addresses import FILE_FORMATS
from pipelines.media_limits import BadMedia, MediaLimits, MediaTooLarge, VideoFacts, checked_video, decode_image

MOST_GROWTH_BYTES = 120 << 20  # of the process that decodes, and of the child that looks
BOMBS = {
    "square.png": "MediaTooLarge",
    "huge.jpg": "MediaTooLarge",
    "scans.jpg": "MediaTooLarge",
    "eight_k.mp4": "MediaTooLarge",
    "table.mp4": "MediaTooLarge",
    "cut.mp4": "BadMedia",
}

LOOKER = """
import json, resource, sys
from pathlib import Path
from pipelines.media_limits import MediaLimits, checked_video, decode_image
limits = MediaLimits()
decode_image(Path(sys.argv[1]).read_bytes(), limits)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
found = {}
for file in map(Path, sys.argv[2:]):
    try:
        decode_image(file.read_bytes(), limits) if file.suffix != ".mp4" else checked_video(file, limits)
        found[file.name] = "accepted"
    except Exception as error:
        found[file.name] = type(error).__name__
print(json.dumps([found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before]))
"""


def picture(size: tuple[int, int] = (6, 4), mode: str = "RGB", kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(out, kind, **options)
    return out.getvalue()


def video(path: Path, size: tuple[int, int] = (64, 48), frames: int = 10, repeated: int = 0) -> Path:
    """A still scene; `repeated` copies of its last packet, of a few bytes, follow."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"preset": "ultrafast", "bf": "0", "sc_threshold": "0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        grey = av.VideoFrame(*size, "yuv420p")
        for plane in grey.planes:
            plane.update(b"\x80" * plane.buffer_size)
        packets = []
        for number in range(frames):
            grey.pts, grey.time_base = number, Fraction(1, 30)
            packets += stream.encode(grey)
        packets += stream.encode(None)
        last = bytes(packets[-1])
        for packet in packets:
            out.mux(packet)
        for number in range(frames, frames + repeated):
            again = av.Packet(last)
            again.stream, again.pts, again.dts, again.time_base = stream, number, number, Fraction(1, 30)
            out.mux(again)
    return path


def one_bit_png(side_px: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    squeezed = zlib.compress(bytes((side_px + 7) // 8 + 1) * side_px, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", squeezed) + chunk(b"IEND", b"")


def endless_table(data: bytes) -> bytes:
    """The MP4 whose table says: 170 million samples of one byte each, all of them in the first chunk."""
    at = data.index(b"stsz") + 4
    data = data[:at] + struct.pack(">III", 0, 1, 170_000_000) + data[at + 12 :]
    at = data.index(b"stts") + 12
    data = data[:at] + struct.pack(">I", 170_000_000) + data[at + 4 :]
    at = data.index(b"stsc") + 16
    return data[:at] + struct.pack(">I", 170_000_000) + data[at + 4 :]


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "small.jpg").write_bytes(picture(kind="JPEG"))
    (folder / "square.png").write_bytes(one_bit_png(30_000))
    jpeg = bytearray(picture((64, 64), kind="JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    (folder / "huge.jpg").write_bytes(jpeg)
    progressive = picture((64, 64), kind="JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    (folder / "scans.jpg").write_bytes(progressive[:-2] + scan * 2000 + progressive[-2:])
    video(folder / "eight_k.mp4", (7680, 4320), frames=3, repeated=9_997)
    whole = video(folder / "whole.mp4").read_bytes()
    (folder / "table.mp4").write_bytes(endless_table(whole))
    (folder / "cut.mp4").write_bytes(whole[: whole.index(b"moov") + 40])
    return folder


def test_bombs_are_refused_and_cost_no_memory(bombs: Path) -> None:
    assert all((bombs / name).stat().st_size < 500_000 for name in BOMBS)
    files = [str(bombs / name) for name in ("small.jpg", *BOMBS)]
    run = subprocess.run([sys.executable, "-c", LOOKER, *files], capture_output=True, text=True, timeout=170)
    assert not run.returncode, run.stderr
    found, grown_bytes = json.loads(run.stdout)
    assert found == BOMBS
    assert grown_bytes < MOST_GROWTH_BYTES


CHILD = """
import json, os, resource, subprocess, sys
job = json.dumps(json.load(sys.stdin) | {"parent_pid": os.getpid()}).encode()
run = subprocess.run([sys.executable, "-m", "pipelines.media_child"], input=job, capture_output=True)
print(run.stdout, run.stderr, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
"""


@pytest.mark.parametrize("name", ["eight_k.mp4", "table.mp4", "cut.mp4"])
def test_the_child_that_looks_stays_small(bombs: Path, name: str) -> None:
    """Started by a small process: the peak of a child counts the memory of whoever forked it."""
    command = [sys.executable, "-c", CHILD]
    job = {"path": str(bombs / name), "formats": FILE_FORMATS, **asdict(MediaLimits())}
    run = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=60)
    assert int(run.stdout.split()[-1]) < MOST_GROWTH_BYTES


def test_a_decoder_that_asks_for_more_meets_the_limit_on_memory(bombs: Path) -> None:
    with pytest.raises((BadMedia, MediaTooLarge), match=r"memory_bytes|none of its pictures"):
        checked_video(bombs / "eight_k.mp4", MediaLimits(video_pixels=40_000_000, memory_bytes=150 << 20))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_comes_as_pillow_sees_it(kind: str, mode: str) -> None:
    data = picture((31, 17), mode, kind)
    image = decode_image(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 17, 31)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1")]
)
def test_other_kinds_of_colour_become_rgb(kind: str, mode: str) -> None:
    image = decode_image(picture((8, 256), mode, kind))
    assert image.shape == (3, 256, 8)
    assert int(image[:, 0].max()) <= 8
    assert int(image[:, -1].min()) >= 247


def test_sixteen_bits_keep_their_upper_half() -> None:
    out = io.BytesIO()
    Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16)).save(out, "PNG")
    assert decode_image(out.getvalue())[:, 0].tolist() == [[0, 0x12, 0xFF]] * 3


def test_a_picture_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    assert decode_image(picture((40, 20), kind="JPEG", exif=exif)).shape == (3, 40, 20)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"GIF89a" + bytes(40), "neither JPEG nor PNG"),
        (b"#EXTM3U\n#EXTINF:1\nfile:///etc/passwd", "neither JPEG nor PNG"),
        (b"\x89PNG\r\n\x1a\n", "cut off in its header"),
        (picture()[:-30], "damaged or cut off"),
        (picture((64, 64), kind="JPEG")[:-200], "damaged or cut off"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "no usable header"),
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(100), "0x0 pixels"),
    ],
)
def test_what_is_no_whole_picture_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadMedia, match=words):
        decode_image(data)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (MediaLimits(image_bytes=20), "image_bytes"),
        (MediaLimits(pixels=99), "limits.pixels"),
        (MediaLimits(side_px=19), "side_px"),
    ],
)
def test_each_limit_of_a_picture_is_named(limits: MediaLimits, words: str) -> None:
    with pytest.raises(MediaTooLarge, match=words):
        decode_image(picture((20, 5)), limits)
    decode_image(picture((20, 5)), MediaLimits(pixels=100, side_px=20))


def test_a_video_tells_what_it_holds(tmp_path: Path) -> None:
    assert checked_video(video(tmp_path / "a.mp4", frames=12)) == VideoFacts(64, 48, 12, 0.4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"video_bytes": 100}, "video_bytes"),
        ({"side_px": 63}, "side_px"),
        ({"video_pixels": 3071}, "video_pixels"),
        ({"frames": 11}, "limits.frames"),
        ({"duration_s": 0.3}, "duration_s"),
    ],
)
def test_each_limit_of_a_video_is_named(tmp_path: Path, change: dict[str, float], words: str) -> None:
    with pytest.raises(MediaTooLarge, match=words):
        checked_video(video(tmp_path / "a.mp4", frames=12), replace(MediaLimits(), **change))


def test_frames_beyond_the_header_are_counted(tmp_path: Path) -> None:
    """MPEG-TS states no number of frames: an endless one is left at the limit, not read to its end."""
    endless = video(tmp_path / "a.ts", frames=3, repeated=3000)
    with pytest.raises(MediaTooLarge, match=r"limits\.frames"):
        checked_video(endless, MediaLimits(frames=100, duration_s=1e6))


def test_what_has_no_end_is_no_video(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path / "none.mp4", tmp_path):
        with pytest.raises(BadMedia, match="no regular file"):
            checked_video(path)


def test_a_slow_look_ends(tmp_path: Path) -> None:
    with pytest.raises(MediaTooLarge, match="check_s"):
        checked_video(video(tmp_path / "a.mp4"), MediaLimits(check_s=0.01))


PLAYLISTS = {
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{video}\n#EXT-X-ENDLIST\n",
    "concat.mp4": "ffconcat version 1.0\nfile '{video}'\n",
    "session.mp4": "v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash.mp4": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{video}</BaseURL></MPD>',
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_are_no_videos(tmp_path: Path, name: str) -> None:
    inner = video(tmp_path / "inner.ts")
    (tmp_path / name).write_text(PLAYLISTS[name].format(video=inner))
    with pytest.raises(BadMedia, match="cannot be read"):
        checked_video(tmp_path / name)
