"""A whole file down the same road as a stream, without a server: decode, preprocess, step, smooth or track, tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import av
import torch
from PIL import Image, ImageDraw, ImageFont

from pipelines.addresses import FILE_FORMATS
from pipelines.objects import ObjectAnalytics, ObjectFilter, ObjectRules
from pipelines.sources import CLOCK_HZ, iter_file
from tsm_core.boxes import detections_on
from tsm_core.checkpoints import AnyModel, load_model
from tsm_core.detector import TSMDetector
from tsm_core.errors import CallerError
from tsm_core.events import ActionDetector
from tsm_core.frame import Frame
from tsm_core.model import TSM, WindowTSM
from tsm_core.postprocess import Smoother
from tsm_core.types import ActionEvent, ObjectEvent, Scores, Track
from tsm_core.zoo import find_model

Event = ActionEvent | ObjectEvent
Progress = Callable[[float, float | None], None]  # seconds of video done, seconds in all if known

SHOWN_S = 3.0  # an event stays on the picture so long
LEAST_SIDE_PX = 480  # smaller pictures are enlarged, so that the text is readable
TRACK_COLOURS = ("#5c9dff", "#ffb454", "#45d0a2", "#f47c8a", "#b794ff", "#e8d95a", "#4fc9ea", "#ff8fd0")


class BadOutput(CallerError):
    """The annotated video cannot be written there."""

    reason = "bad_output"


class NotForDetectors(CallerError):
    """An option that a detector does not have."""

    reason = "model_option"


@dataclass(frozen=True, slots=True)
class FrameObjects:
    """What a detector says of one frame: the objects with a box on it, in pixels of a source of (width, height).

    warmup (k, L): frames that the shift state has seen, of those that matter.
    """

    tracks: tuple[Track, ...]
    source_size: tuple[int, int]
    warmup: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FrameResult:
    """What one frame gave: scores of a recogniser, or objects of a detector, and what there is to tell.

    A recogniser's scores are None where window mode had no result due; logits are what they were made of. A detector's
    objects are never None.
    """

    frame_number: int
    pts_s: float
    time_s: float
    scores: Scores | None
    events: tuple[Event, ...]
    objects: FrameObjects | None = None
    logits: tuple[float, ...] | None = None


class _Findings(Protocol):
    """What one model finds in a file."""

    @property
    def needed_px(self) -> int:
        """Short side in pixels below which a picture would have to be enlarged."""

    def of(self, frame: Frame) -> FrameResult:
        """What the next frame gives."""

    def ends(self) -> Sequence[Event]:
        """Ends of all that is still open after the last frame."""


class _Actions:
    """A recogniser's findings."""

    def __init__(
        self, model: TSM | WindowTSM, name: str, stream_id: str, threshold: float | None, off_threshold: float | None
    ) -> None:
        recipe = model.recipe
        self.model, self.recipe = model, recipe
        self.smoother = Smoother(recipe.labels, recipe.smoothing_s)
        self.detector = ActionDetector(stream_id, name, recipe, threshold=threshold, off_threshold=off_threshold)
        self.arena: Any = model.new_arena(1)
        self.slot = self.arena.allocate()

    @property
    def needed_px(self) -> int:
        spec = self.recipe.preprocess
        return spec.resize_px if spec.resize == "short" else spec.input_px

    def of(self, frame: Frame) -> FrameResult:
        at = frame.number, frame.pts_s, frame.time_s
        with torch.inference_mode():
            pixels = self.model.preprocess([frame.image])
            row = self.model.step(pixels, self.arena, [self.slot], [frame.time_s])[0]
        if torch.isnan(row).any():
            return FrameResult(*at, None, ())
        seen, of = self.model.warmup(self.arena, self.slot)
        scores = Scores(self.recipe.labels, self.smoother.update(row, frame.time_s), seen, of)
        return FrameResult(*at, scores, tuple(self.detector.update(scores, *at)), logits=tuple(row.tolist()))

    def ends(self) -> Sequence[Event]:
        return self.detector.close()


class _Objects:
    """A detector's findings, followed over time."""

    def __init__(self, model: TSMDetector, name: str, stream_id: str, threshold: float | None) -> None:
        self.model = model
        told = ObjectFilter() if threshold is None else ObjectFilter(threshold=threshold)
        self.objects = ObjectAnalytics(stream_id, name, ObjectRules(filter=told))
        self.arena = model.new_arena(1)
        self.slot = self.arena.allocate()

    @property
    def needed_px(self) -> int:
        return min(self.model.input_size)

    def of(self, frame: Frame) -> FrameResult:
        at = frame.number, frame.pts_s, frame.time_s
        dense = self.model.step(self.model.preprocess([frame.image]), self.arena, [self.slot])
        found = detections_on(frame, self.model.detect(dense)[0], self.model.labels, self.model.input_size)
        tracks, events = self.objects.update(found, *at, frame.source_size)
        objects = FrameObjects(tuple(tracks), frame.source_size, self.model.warmup(self.arena, self.slot))
        return FrameResult(*at, None, tuple(events), objects)

    def ends(self) -> Sequence[Event]:
        return self.objects.close()


def infer_file(
    path: Path | str,
    model: AnyModel | str = "motion9",
    *,
    name: str | None = None,
    stream_id: str = "file",
    threshold: float | None = None,
    off_threshold: float | None = None,
    min_side_px: int = 256,
    annotate: Path | str | None = None,
    on_progress: Progress | None = None,
) -> Iterator[FrameResult]:
    """One result per frame of a video file, in order; the last one also ends what is still open.

    model: in eval mode, or the name of one that is shipped or pulled. threshold: of an action's score, or of the median
    of an object's; off_threshold is a recogniser's. Times are the file's pts. annotate: an MP4 that shows labels,
    scores, boxes and events. Raises BadFile, UnknownModel, BadOutput, NotForDetectors.
    """
    if isinstance(model, str):
        name = name or model
        model = load_model(find_model(model)).for_inference()
    findings = _findings(model, name or model.recipe.name, stream_id, threshold, off_threshold)
    total_s = _duration_s(path) if on_progress else None
    if annotate is not None and Path(annotate).resolve() == Path(path).resolve():
        raise BadOutput(f"{annotate} is the file to be read; choose another name")
    writer: AnnotatedVideo | None = None
    held: FrameResult | None = None  # the last one waits for the end of what is open
    try:
        for frame in iter_file(path, max(min_side_px, findings.needed_px), stream_id):
            if held is not None:
                yield held
            held = findings.of(frame)
            if annotate is not None:
                writer = writer or AnnotatedVideo(annotate)  # a bad file costs no older output
                writer.add(frame, held)
            if on_progress is not None:
                on_progress(frame.pts_s, total_s)
        if held is not None:
            yield replace(held, events=(*held.events, *findings.ends()))
    finally:
        if writer is not None:
            writer.close()


def _findings(
    model: AnyModel, name: str, stream_id: str, threshold: float | None, off_threshold: float | None
) -> _Findings:
    if not isinstance(model, TSMDetector):
        return _Actions(model, name, stream_id, threshold, off_threshold)
    if off_threshold is not None:
        raise NotForDetectors(f"{name} is a detector, whose objects have no off_threshold; leave it out")
    return _Objects(model, name, stream_id, threshold)


def annotate(path: Path | str, out: Path | str, model: AnyModel | str = "motion9", **options: Any) -> int:
    """Write the annotated video; returns its number of frames. options as for infer_file, whose errors it raises."""
    return sum(1 for _ in infer_file(path, model, annotate=out, **options))


def title_of(event: Event) -> str:
    """What an event is about, in few words: the action's label, or the object's with its number."""
    return event.label if isinstance(event, ActionEvent) else f"{event.after.label} #{_number(event.after)}"


def _number(track: Track) -> int:
    return int(track.track_id.rpartition(":")[2])


class AnnotatedVideo:
    """An MP4 (H.264) that shows each frame with what was found on it and what has just happened.

    A recogniser's label stands below, its score as a bar; a detector's objects have boxes.
    """

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
        self._told: list[Event] = []
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
        self._draw(picture, result)
        if self._stream is None:
            self._stream = self._out.add_stream("libx264", rate=30, options={"crf": "20", "preset": "veryfast"})
            self._stream.width, self._stream.height = picture.size
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, CLOCK_HZ)
        written: Any = av.VideoFrame.from_image(picture)  # type: ignore[no-untyped-call]
        self._ticks = max(self._ticks + 1, round(frame.pts_s * CLOCK_HZ))
        written.pts, written.time_base = self._ticks, Fraction(1, CLOCK_HZ)
        self._out.mux(self._stream.encode(written))

    def _draw(self, picture: Image.Image, result: FrameResult) -> None:
        width, height = picture.size
        size_px = max(14, min(width, height) // 20)
        font, draw = ImageFont.load_default(size_px), ImageDraw.Draw(picture, "RGBA")
        margin = size_px // 2
        if result.objects is not None:
            _draw_boxes(draw, font, size_px, picture.size, result.objects)
        if self._last is not None:
            label, score = self._last
            top = height - 2 * size_px - margin
            draw.rectangle((0, top, width, height), fill=(0, 0, 0, 150))
            draw.text((margin, top + margin // 2), f"{label}  {score:.2f}", font=font, fill="white")
            draw.rectangle((margin, height - margin, margin + (width - 2 * margin) * score, height - 4), fill="#4ade80")
        draw.text(
            (margin, margin), f"{result.time_s:.1f} s", font=font, fill="white", stroke_width=2, stroke_fill="black"
        )
        lines = [f"{event.phase} {title_of(event)}" for event in self._told if event.phase != "update"][-4:]
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


def _draw_boxes(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    font_px: int,
    size: tuple[int, int],
    objects: FrameObjects,
) -> None:
    across, down = size[0] / objects.source_size[0], size[1] / objects.source_size[1]
    line_px = 1.3 * font_px
    for track in objects.tracks:
        left, right = track.xyxy[0] * across, track.xyxy[2] * across
        top, bottom = track.xyxy[1] * down, track.xyxy[3] * down
        colour = TRACK_COLOURS[_number(track) % len(TRACK_COLOURS)]
        draw.rectangle((left, top, right, bottom), outline=colour, width=max(2, font_px // 8))
        words = f"{track.label} #{_number(track)} {track.score:.2f}"
        x = max(0.0, min(left, size[0] - draw.textlength(words, font)))
        y = bottom if bottom + line_px < size[1] else bottom - line_px  # inside where there is no room below
        draw.text((x, y), words, font=font, fill=colour, stroke_width=2, stroke_fill="black")


def _duration_s(path: Path | str) -> float | None:
    """Seconds of video as the container states it."""
    options = {"protocol_whitelist": "file", "format_whitelist": FILE_FORMATS}
    try:
        with av.open(str(path), options=options) as container:
            return None if container.duration is None else container.duration / 1e6
    except (OSError, av.FFmpegError):
        return None  # iter_file says what is wrong
