"""A few frames of a video, by number: from a folder of JPEGs, or from a file without decoding all of it.

Frames count from 0 in the order in which they are shown; whoever reads folders says at which number their files start.
"""

from __future__ import annotations

import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import av
import numpy as np
import simplejpeg
import torch
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.addresses import FILE_FORMATS
from pipelines.datasets import TEMPLATE
from tsm_core.errors import CallerError

MOST_PIXELS = 1 << 26  # of a JPEG that says how large it is; what says more is for Pillow to refuse
HELD_BYTES = 64 << 20  # more compressed video than this is read a second time rather than held in memory
TIMED_CODECS = ("h264", "hevc", "mpeg4", "mpeg2video", "vp9", "av1", "mjpeg")  # one packet, one shown frame
SKIPPABLE_CODECS = ("h264", "mpeg4", "mpeg2video")  # the decoder leaves out what no other frame refers to

Pixels = NDArray[np.uint8]  # (H, W, 3), or many of them


class UnreadableVideo(CallerError):
    """A video, or a frame of it, cannot be had: missing, empty, cut off, damaged or no video."""

    reason = "unreadable_video"


@runtime_checkable
class FrameReader(Protocol):
    """One video, open. Close it, or use it in a `with`."""

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def frames(self, indices: Sequence[int]) -> Tensor:
        """uint8 (F, 3, H, W), RGB, colours side by side in memory; in the order of the indices, which may repeat.

        Raises UnreadableVideo, also where frames differ in size.
        """
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close."""
        ...


def open_frames(path: Path | str, template: str = TEMPLATE, start: int = 1) -> FrameReader:
    """The reader for a folder of JPEGs or for a video file. Raises UnreadableVideo."""
    return FolderReader(path, template, start) if Path(path).is_dir() else VideoReader(path)


class FolderReader:
    """Frames that lie in a folder, frame 0 in the file that `template` names with the number `start`.

    Raises UnreadableVideo when there is no such folder.
    """

    def __init__(self, path: Path | str, template: str = TEMPLATE, start: int = 1) -> None:
        self.path, self.template, self.start = Path(path), template, start
        if not self.path.is_dir():
            raise UnreadableVideo(f"{path} does not exist or is no folder of frames")

    def __len__(self) -> int:
        """Frames from the first to the last; UnreadableVideo if there are none, or one between them is missing."""
        head, tail = (re.escape(part) for part in re.split(r"\{.*?\}", self.template, maxsplit=1))
        pattern = re.compile(f"{head}([0-9]+){tail}")
        numbers = sorted(int(match[1]) for name in os.listdir(self.path) if (match := pattern.fullmatch(name)))
        if not numbers:
            raise UnreadableVideo(f"{self.path} holds no frame like {self.template.format(self.start)}")
        for expected, number in enumerate(numbers, self.start):
            if number != expected:
                raise UnreadableVideo(f"{self.path}: {self.template.format(expected)} is missing")
        return len(numbers)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """See FrameReader; each file is decoded once."""
        clip: Pixels = np.empty((0, 0, 0, 3), np.uint8)
        done: dict[int, int] = {}
        for place, index in enumerate(indices):
            if index in done:
                clip[place] = clip[done[index]]
                continue
            room = clip[place] if place else None
            picture = self._frame(index, room)
            if not place:
                clip = np.empty((len(indices), *picture.shape), np.uint8)
            if picture is not room:
                _check_sizes(self.path, (clip[place], picture))
                clip[place] = picture
            done[index] = place
        return _pictures(clip)

    def _frame(self, index: int, room: Pixels | None) -> Pixels:
        """One picture (H, W, 3); it is `room` where it is of that size."""
        path = f"{self.path}/{self.template.format(index + self.start)}"
        try:
            with open(path, "rb", buffering=0) as file:  # Path would take as long as all the rest around the decoder
                data = file.readall()
            try:
                # the same decoder as Pillow's, and the same pixels, in half the time
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
                if height * width <= MOST_PIXELS and colours in ("YCbCr", "Gray"):
                    picture = room
                    if picture is None or picture.shape != (height, width, 3):
                        picture = np.empty((height, width, 3), np.uint8)
                    simplejpeg.decode_jpeg(data, buffer=picture)
                    return picture
            except ValueError:
                pass  # Pillow knows odder files, and says what is wrong with the others
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except FileNotFoundError:
            raise UnreadableVideo(f"{path} is missing") from None
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise UnreadableVideo(f"{path} is no whole JPEG: {error}") from None

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VideoReader:
    """Frames of a video file; raises UnreadableVideo when it is missing, empty, cut off or no video.

    Opening reads the packets without decoding one: their times say how many frames there are, in which order they are
    shown, and where decoding can begin. For each wanted frame, decoding goes on or begins anew at the key frame before
    it, whichever is less, and leaves out what nobody refers to. The frames are those of a decode from start to end, to
    the bit. Where a file's times cannot be relied on (AVI holds none), its frames are counted as they are decoded.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._reformatter = VideoReformatter()
        self._held: list[Any] | None = []
        self._counted: int | None = None
        self._open()
        try:
            self._read_packets()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Number of frames that are shown."""
        if self.by_time:
            return len(self._rank)
        if self._counted is None:
            self._counted = sum(1 for _ in self._decode_all())
        return self._counted

    def frames(self, indices: Sequence[int]) -> Tensor:
        """See FrameReader."""
        wanted = sorted(set(indices))
        if wanted and (wanted[0] < 0 or (self.by_time and wanted[-1] >= len(self))):
            raise UnreadableVideo(f"{self.path} has {len(self)} frames; frame {wanted[-1]} was asked for")
        if self.by_time:
            found = self._find(wanted)
            if len(found) < len(wanted):  # a key frame that was none, or times out of order
                found = self._find(wanted, careful=True)
        else:
            asked = set(wanted)
            numbered = enumerate(islice(self._decode_all(), wanted[-1] + 1 if wanted else 0))
            found = {number: self._rgb(frame) for number, frame in numbered if number in asked}
        missing = [number for number in wanted if number not in found]
        if missing:
            fact = f"frame {missing[0]} cannot be decoded ({self._trouble or 'the file ends before it'})"
            raise UnreadableVideo(f"{self.path}: {fact}; it is damaged")
        _check_sizes(self.path, found.values())
        return _pictures(np.stack([found[index] for index in indices]) if wanted else np.empty((0, 0, 0, 3), np.uint8))

    def verify(self) -> int:
        """Decode everything; the number of frames. Raises UnreadableVideo when any packet or frame is damaged."""
        self._trouble, count = "", 0
        for frame in self._decode_all():
            if frame.is_corrupt:
                self._trouble = self._trouble or "a frame lacks what it refers to"
            count += 1
        told = len(self._rank) if self.by_time else count
        if self._trouble or count != told:
            trouble = self._trouble or "some give nothing"
            raise UnreadableVideo(f"{self.path}: {count} of {told} frames decode, not all of them whole: {trouble}")
        return count

    def close(self) -> None:
        """Close the file."""
        self._held = None
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- packets

    def _open(self) -> None:
        try:
            if not self.path.stat().st_size:
                raise UnreadableVideo(f"{self.path} is empty")
            options = {"protocol_whitelist": "file", "format_whitelist": FILE_FORMATS}
            self._container: Any = av.open(f"file:{self.path.absolute()}", options=options)
        except (FileNotFoundError, NotADirectoryError):
            raise UnreadableVideo(f"{self.path} does not exist") from None
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UnreadableVideo(f"{self.path} is no whole video: {_words(error)}") from None
        self._stream: Any = self._container.streams.best("video")  # not its cover picture
        if self._stream is None or self._stream.codec_context is None:
            self._container.close()
            raise UnreadableVideo(f"{self.path} holds no video that can be decoded")
        # many videos at a time, not one video by many; leaving frames out needs it too
        self._stream.codec_context.thread_type = "NONE"

    def _demux(self) -> Iterator[Any]:
        """Packets that hold something, in decoding order."""
        try:
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
        except av.FFmpegError as error:
            raise UnreadableVideo(f"{self.path} cannot be read to its end: {_words(error)}") from None

    def _read_packets(self) -> None:
        """Learn the times of all packets and the key frames among them, and hold the packets if they are few."""
        context = self._stream.codec_context
        held_bytes, packet = 0, None
        times: list[tuple[int | None, bool, bool]] = []  # pts, whether a key frame, whether shown
        for packet in self._demux():
            times.append((packet.pts, packet.is_keyframe, not packet.is_discard))
            held_bytes += packet.size
            if self._held is not None:
                self._held.append(packet)
                if held_bytes > HELD_BYTES:
                    self._held = None
        if packet is None:
            raise UnreadableVideo(f"{self.path} holds no picture")
        self._check_end(packet, len(times))
        shown = [pts for pts, _, is_shown in times if is_shown]
        self._rank = {pts: rank for rank, pts in enumerate(sorted({pts for pts in shown if pts is not None}))}
        guessed = "avi" in self._container.format.name and context.has_b_frames
        self.by_time = (
            len(self._rank) == len(shown)
            and context.codec.canonical_name in TIMED_CODECS
            and context.field_order in (0, 1)  # not two packets, a field each, to one frame
            and not guessed
        )
        # by packet: the number of its frame (None: it shows none)
        self._shown = [self._rank.get(pts) if is_shown and pts is not None else None for pts, _, is_shown in times]
        self._packet_of = {number: at for at, number in enumerate(self._shown) if number is not None}
        # (frame, packet) of the key frames, from which all frames that are shown later can be decoded
        keys = [(number, at) for number, at in self._packet_of.items() if times[at][1]]
        self._keys = keys if keys == sorted(keys) else []
        self._trouble = ""

    def _check_end(self, last: Any, count: int) -> None:
        """Raises UnreadableVideo when the file ends before its content does."""
        cut = last.is_corrupt  # half a packet
        if not cut and "matroska" in self._container.format.name:
            with self.path.open("rb") as file:
                end = matroska_end(file.read(64))
            cut = end is not None and end > self.path.stat().st_size
        if cut:
            raise UnreadableVideo(f"{self.path} is cut off after {count} frames; fetch it again")

    def _packets(self) -> Iterator[Any]:
        """All packets in decoding order, for a decoder that is empty."""
        if self._held is None:
            self._container.close()
            self._open()
            return self._demux()
        self._stream.codec_context.flush_buffers()
        return iter(self._held)

    # --- frames

    def _decode(self, packet: Any | None, *, skip: bool = False) -> list[Any]:
        """The frames that come out when `packet` goes in; None: those that were held back."""
        context = self._stream.codec_context
        context.skip_frame = "NONREF" if skip else "DEFAULT"
        try:
            return list(context.decode(packet))
        except av.FFmpegError as error:
            self._trouble = self._trouble or _words(error)
            return []

    def _decode_all(self) -> Iterator[Any]:
        for packet in self._packets():
            yield from self._decode(packet)
        yield from self._decode(None)

    def _runs(self, wanted: list[int]) -> list[tuple[int, int]]:
        """(key frame, last) packets of the runs of decoding that together give all wanted frames."""
        runs: list[tuple[int, int]] = []
        for number in wanted:
            place = bisect_right(self._keys, (number, len(self._shown)))
            key, last = self._keys[place - 1][1] if place else 0, self._packet_of[number]
            if runs and key <= runs[-1][1] + 1:
                key, last = runs[-1][0], max(runs.pop()[1], last)
            runs.append((key, last))
        return runs

    def _find(self, wanted: list[int], *, careful: bool = False) -> dict[int, Pixels]:
        """Frames by number, as many as are to be had; `careful`: from the start, leaving nothing out."""
        self._trouble = ""
        found: dict[int, Pixels] = {}
        asked: set[int | None] = {*wanted}
        packets, position = zip(self._packets(), self._shown, strict=False), 0
        context = self._stream.codec_context
        skippable = not careful and context.codec.canonical_name in SKIPPABLE_CODECS
        for key, last in [(0, len(self._shown) - 1)] if careful else self._runs(wanted):
            context.flush_buffers()
            run = islice(packets, key - position, last + 1 - position)
            position = last + 1
            first = self._shown[key] if key else None  # what is shown before it may refer to what was not decoded
            trusted = first is None
            for packet, number in chain(run, [(None, None)]):  # None: what is still inside comes out
                skip = skippable and packet is not None and not packet.is_keyframe and number not in asked
                for frame in self._decode(packet, skip=skip):
                    shown = self._rank.get(frame.pts, -1)
                    if first is not None and shown < first:
                        continue
                    if not trusted and not (shown == first and frame.key_frame):
                        return {}
                    trusted = True
                    if shown in asked:
                        found[shown] = self._rgb(frame)
        return found

    def _rgb(self, frame: Any) -> Pixels:
        picture = self._reformatter.reformat(frame, format="rgb24", threads=1)
        plane: Any = picture.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(picture.height, plane.line_size)
        pixels = rows[:, : 3 * picture.width].reshape(picture.height, picture.width, 3)
        return np.rot90(pixels, frame.rotation // 90).copy()


def matroska_end(head: bytes) -> int | None:
    """Size in bytes of a whole Matroska or WebM file, by its first bytes; None: they do not say."""
    at = 4  # past the id of the EBML header
    size, at = _vint(head, at)
    at += size
    if head[:4] != b"\x1a\x45\xdf\xa3" or head[at : at + 4] != b"\x18\x53\x80\x67":
        return None
    at += 4
    size, after = _vint(head, at)
    unknown = (1 << 7 * (after - at)) - 1
    return None if size == unknown else after + size


def _vint(data: bytes, at: int) -> tuple[int, int]:
    """Matroska's number of variable length at `at`, and where it ends."""
    first = data[at] if at < len(data) else 0x80
    length = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return value, at + length


def _pictures(pixels: Pixels) -> Tensor:
    """(F, H, W, 3) seen as (F, 3, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _check_sizes(path: Path, pictures: Iterable[Pixels]) -> None:
    sizes = sorted({each.shape[:2] for each in pictures})
    if len(sizes) > 1:
        raise UnreadableVideo(f"{path} changes its size: {', '.join(f'{w}x{h}' for h, w in sizes)}")


def _words(error: Exception) -> str:
    """What went wrong, without the path."""
    return str(getattr(error, "strerror", None) or error)
