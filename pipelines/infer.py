"""A whole file down the same road as a stream, without a server: decode, preprocess, step, smooth, tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import torch
from PIL import Image, ImageDraw, ImageFont

from pipelines.sources import CLOCK_HZ, FILE_FORMATS, iter_file
from tsm_core.checkpoints import load_recogniser
from tsm_core.errors import CallerError
from tsm_core.events import ActionDetector
from tsm_core.model import TSM, WindowTSM
from tsm_core.postprocess import Smoother
from tsm_core.types import ActionEvent, Frame, Scores
from tsm_core.zoo import find_model

Progress = Callable[[float, float | None], None]  # seconds of video done, seconds in all if known

SHOWN_S = 3.0  # an event stays on the picture so long
LEAST_SIDE_PX = 480  # smaller pictures are enlarged, so that the text is readable


class BadOutput(CallerError):
    """The annotated video cannot be written there."""

    reason = "bad_output"


@dataclass(frozen=True, slots=True)
class FrameResult:
    """What one frame gave. scores is None where window mode had no result due; events may be none, one or two."""

    frame_number: int
    pts_s: float
    time_s: float
    scores: Scores | None
    events: tuple[ActionEvent, ...]


def infer_file(
    path: Path | str,
    model: TSM | WindowTSM | str = "motion9",
    *,
    name: str | None = None,
    stream_id: str = "file",
    threshold: float | None = None,
    off_threshold: float | None = None,
    min_side_px: int = 256,
    annotate: Path | str | None = None,
    on_progress: Progress | None = None,
) -> Iterator[FrameResult]:
    """One result per frame of a video file, in order; the last one also ends the action that is still open.

    model: in eval mode, or the name of one that is shipped or pulled. Times are the file's pts. annotate: an MP4 that
    shows the labels, scores and events. Raises BadFile, UnknownModel, BadOutput.
    """
    if isinstance(model, str):
        name = name or model
        model = load_recogniser(find_model(model)).for_inference()
    recipe, spec = model.recipe, model.recipe.preprocess
    needed_px = spec.resize_px if spec.resize == "short" else spec.input_px
    smoother = Smoother(recipe.labels, recipe.smoothing_s)
    detector = ActionDetector(stream_id, name or recipe.name, recipe, threshold=threshold, off_threshold=off_threshold)
    arena: Any = model.new_arena(1)
    slot = arena.allocate()
    total_s = _duration_s(path) if on_progress else None
    if annotate is not None and Path(annotate).resolve() == Path(path).resolve():
        raise BadOutput(f"{annotate} is the file to be read; choose another name")
    writer: AnnotatedVideo | None = None
    held: FrameResult | None = None  # the last one waits for the end of its action
    try:
        for frame in iter_file(path, max(min_side_px, needed_px), stream_id):
            if held is not None:
                yield held
            with torch.inference_mode():
                row = model.step(model.preprocess([frame.image]), arena, [slot], [frame.time_s])[0]
            scores: Scores | None = None
            events: list[ActionEvent] = []
            if not torch.isnan(row).any():
                seen, of = model.warmup(arena, slot)
                scores = Scores(recipe.labels, smoother.update(row, frame.time_s), seen, of)
                events = detector.update(scores, frame.number, frame.pts_s, frame.time_s)
            held = FrameResult(frame.number, frame.pts_s, frame.time_s, scores, tuple(events))
            if annotate is not None:
                writer = writer or AnnotatedVideo(annotate)  # a bad file costs no older output
                writer.add(frame, held)
            if on_progress is not None:
                on_progress(frame.pts_s, total_s)
        if held is not None:
            ends = detector.close()
            yield FrameResult(held.frame_number, held.pts_s, held.time_s, held.scores, (*held.events, *ends))
    finally:
        if writer is not None:
            writer.close()
        arena.free(slot)


def annotate(path: Path | str, out: Path | str, model: TSM | WindowTSM | str = "motion9", **options: Any) -> int:
    """Write the annotated video; returns its number of frames. options as for infer_file, whose errors it raises."""
    return sum(1 for _ in infer_file(path, model, annotate=out, **options))


class AnnotatedVideo:
    """An MP4 (H.264) that shows each frame with its label, the score as a bar, and what has just happened."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in (".mp4", ".mkv", ".mov"):
            raise BadOutput(f"{path} must end in .mp4, .mkv or .mov")
        try:
            self.path.open("wb").close()
        except OSError as error:
            raise BadOutput(f"{path} cannot be written: {error.strerror}; choose another place") from None
        self._out: Any = av.open(str(self.path), "w")
        self._stream: Any = None
        self._last: tuple[str, float] | None = None
        self._told: list[ActionEvent] = []
        self._ticks = -1

    def add(self, frame: Frame, result: FrameResult) -> None:
        """Draw and write one frame."""
        _, height, width = frame.image.shape
        factor = max(1, round(LEAST_SIDE_PX / min(height, width)))
        picture = Image.fromarray(frame.image.permute(1, 2, 0).numpy())
        if factor > 1:
            picture = picture.resize((width * factor, height * factor), Image.Resampling.BILINEAR)
        if result.scores is not None:
            self._last = result.scores.top()[0]
        self._told = [e for e in (*self._told, *result.events) if result.time_s - e.frame_time_s <= SHOWN_S]
        self._draw(picture, result.time_s)
        if self._stream is None:
            self._stream = self._out.add_stream("libx264", rate=30, options={"crf": "20", "preset": "veryfast"})
            self._stream.width, self._stream.height = picture.size
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, CLOCK_HZ)
        written: Any = av.VideoFrame.from_image(picture)  # type: ignore[no-untyped-call]
        self._ticks = max(self._ticks + 1, round(frame.pts_s * CLOCK_HZ))
        written.pts, written.time_base = self._ticks, Fraction(1, CLOCK_HZ)
        self._out.mux(self._stream.encode(written))

    def _draw(self, picture: Image.Image, time_s: float) -> None:
        width, height = picture.size
        size_px = max(14, min(width, height) // 20)
        font, draw = ImageFont.load_default(size_px), ImageDraw.Draw(picture, "RGBA")
        margin = size_px // 2
        if self._last is not None:
            label, score = self._last
            top = height - 2 * size_px - margin
            draw.rectangle((0, top, width, height), fill=(0, 0, 0, 150))
            draw.text((margin, top + margin // 2), f"{label}  {score:.2f}", font=font, fill="white")
            draw.rectangle((margin, height - margin, margin + (width - 2 * margin) * score, height - 4), fill="#4ade80")
        draw.text((margin, margin), f"{time_s:.1f} s", font=font, fill="white", stroke_width=2, stroke_fill="black")
        lines = [f"{event.phase} {event.label}" for event in self._told if event.phase != "update"][-4:]
        for place, line in enumerate(lines, 1):
            at = (margin, margin + place * round(1.3 * size_px))
            draw.text(at, line, font=font, fill="#fde047", stroke_width=2, stroke_fill="black")

    def close(self) -> None:
        """Write what is left and end the file; one without a frame is removed."""
        if self._stream is None:
            self._out.close()
            self.path.unlink(missing_ok=True)
            return
        self._out.mux(self._stream.encode())
        self._out.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _duration_s(path: Path | str) -> float | None:
    """Seconds of video as the container states it."""
    options = {"protocol_whitelist": "file", "format_whitelist": FILE_FORMATS}
    try:
        with av.open(str(path), options=options) as container:
            return None if container.duration is None else container.duration / 1e6
    except (OSError, av.FFmpegError):
        return None  # iter_file says what is wrong
