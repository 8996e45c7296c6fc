"""What travels on the wire and into the store, v1: streams, their status, scores and events."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from services.stream_models import StreamModels
from services.wire import Size, StreamId, Wire
from tsm_core.types import ActionEvent, ObjectEvent, Scores, Track

EVENT_PREFIX = "tsm.v1"
PUSHED = "push:"  # the source of a sequence
SEQUENCE_PREFIX = "seq-"  # ids of the streams that sequences are
SEQUENCES = "sequences"  # the kind of document that says what became of sequences that are over

StreamState = Literal["STARTING", "RUNNING", "RESTARTING", "PAUSED", "STOPPING", "STOPPED", "FAILED", "ENDED"]


class SourceSpec(Wire):
    """Where a stream's frames come from. The URI never holds a password: it is split off at birth."""

    uri: str = Field(
        min_length=1,
        max_length=2048,
        examples=["rtsp://192.168.1.20:554/stream1"],
        description="rtsp:// or rtsps:// camera, or file:// below one of `source.file_roots`",
    )
    username: str | None = Field(None, max_length=256)
    password: SecretStr | None = Field(None, max_length=256, exclude=True, description="write-only; never returned")
    rtsp_transport: Literal["tcp", "udp"] = "tcp"
    decoder: Literal["auto", "ffmpeg", "pyav"] = Field(
        "auto", description="`auto` is ffmpeg, or pyav for a source with a password"
    )
    loop: bool = Field(False, description="files only: begin again at the end")

    @model_validator(mode="before")
    @classmethod
    def split_userinfo(cls, data: Any) -> Any:
        """Move user:password of the URI into their own fields."""
        if not isinstance(data, dict) or not isinstance(data.get("uri"), str):
            return data
        scheme, found, rest = data["uri"].partition("://")
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        if not found or "@" not in authority:
            return data
        # a raw "@" in a password is common: the last one before the first slash ends the userinfo
        userinfo, _, host = authority.rpartition("@")
        user, _, password = userinfo.partition(":")
        clean = {**data, "uri": f"{scheme}://{host}{rest[len(authority) :]}"}
        clean["username"] = data.get("username") or unquote(user) or None
        clean["password"] = data.get("password") or unquote(password) or None
        return clean

    @field_validator("uri")
    @classmethod
    def check_uri(cls, uri: str) -> str:
        """Refuse what cannot be a source; which files and hosts may be opened is the service's policy."""
        if uri == PUSHED:
            return uri
        try:
            parts = urlsplit(uri)
            _ = parts.port
        except ValueError:  # its words would quote what may be a piece of a password
            raise ValueError(
                "the address cannot be read: use rtsp://HOST[:PORT]/PATH; in a password write / as %2F, ? as %3F, "
                "# as %23 and @ as %40, or give it as `password`"
            ) from None
        if parts.scheme.lower() not in ("rtsp", "rtsps", "file"):
            raise ValueError(f"scheme {parts.scheme!r} is not supported: use rtsp://, rtsps:// or file://")
        if parts.scheme.lower() != "file" and not parts.hostname:
            raise ValueError("the address has no host: use rtsp://HOST[:PORT]/PATH")
        return urlunsplit(parts._replace(scheme=parts.scheme.lower()))

    @property
    def is_pushed(self) -> bool:
        """True for a sequence, whose frames come in requests."""
        return self.uri == PUSHED

    @property
    def is_file(self) -> bool:
        """True for file:// sources, whose time is their pts."""
        return self.uri.startswith("file:")


class StreamSpec(Wire):
    """The desired state of one stream, as the registry keeps it."""

    id: StreamId
    name: str = Field("", max_length=200)
    enabled: bool = Field(True, description="false: registered but stopped")
    source: SourceSpec
    models: StreamModels = ()
    max_fps: float | None = Field(None, gt=0, le=240, description="recognise at most this many frames a second")
    tags: dict[str, str] = Field(default_factory=dict, max_length=32)
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    paused: bool = Field(False, description="it keeps its place and its state, and its source is closed")
    revision: int = Field(1, ge=1, description="counts the changes that begin the source anew")
    edition: int = Field(1, ge=1, description="counts all changes of the specification")

    @property
    def etag(self) -> str:
        """Strong entity tag of this specification, in its quotes; another after every change, whatever runs."""
        return f'"{int(1e6 * self.created_at.timestamp()):x}-{self.edition}"'


class Latency(Wire):
    """Milliseconds from a frame's arrival to the publication of its result, over the last minute."""

    p50: float
    p95: float
    p99: float


class Restored(Wire):
    """Where a session's first shift state came from."""

    mode: Literal["checkpoint", "cold"]
    frame_number: int = Field(0, description="last frame inside the restored state")
    blob_bytes: int = 0
    blob_sha256: str = ""


class ModelStatus(Wire):
    """One model at work on a stream, with the cost of one of its results on this replica."""

    name: str
    task: Literal["recognition", "detection"] = "recognition"
    mode: Literal["step", "window"]
    frames_per_result: int = Field(description="frames that go through the network for one result")
    window_s: float | None = Field(None, description="window mode: seconds of video one result sees")
    stride_s: float | None = Field(None, description="window mode: seconds between two results")
    region: str | None = Field(None, description="part of the picture that it looks at; empty: all of it")
    objects_of: str | None = Field(None, description="detector whose objects it looks at")
    objects: dict[str, int] | None = Field(
        None, description="objects in view by label: a detector's, or those that a recogniser looks at"
    )
    without_slot: int = Field(0, description="objects so far that found no free slot (engine.object_slots)")
    results: int = Field(0, description="results so far in this session")
    skipped: int = Field(0, description="window mode: results left out because the replica was behind")
    result_cost_ms: float | None = Field(None, description="compute time of one result: median of the last ones")


class StreamStatus(Wire):
    """What is, as the owning replica last wrote it."""

    state: StreamState
    status_message: str = ""
    error_code: str | None = Field(None, examples=["STREAM_AUTH_FAILED"])
    since: float = Field(description="Unix time of the last change of state")
    worker: str | None = Field(None, description="replica that owns the stream")
    epoch: int = 0
    fps: float = Field(0.0, description="frames a second that arrive")
    processed_fps: float = 0.0
    received: int = Field(0, description="frames decoded so far")
    processed: int = Field(0, description="frames that went through the model so far")
    dropped: dict[str, int] = Field(default_factory=dict, description="frames not processed, by reason")
    latency_ms: Latency | None = None
    reconnects: int = 0
    retry_at: float | None = Field(None, description="Unix time of the next attempt to connect")
    last_frame_time: float | None = None
    clock: Literal["local", "file"] = "local"
    source_size: Size | None = Field(None, description="width, height in pixels")
    label: str | None = None
    score: float | None = None
    warmup: str | None = Field(None, description="k/L while the shift state is still filling")
    checkpoint_age_s: float | None = None
    restored: Restored | None = None
    models: tuple[ModelStatus, ...] = ()
    updated_at: float = 0.0


class ReplicaInfo(Wire):
    """One engine replica's heartbeat."""

    id: str
    pid: int
    node: str = ""
    device: str = "cpu"
    slots_total: int
    slots_used: int = 0
    draining: bool = False
    started_at: float = 0.0
    models: tuple[str, ...] = Field((), description="models that it holds")
    gmac_per_result: dict[str, float] = Field({}, description="of each: thousand million multiply-adds of one result")


class Lease(Wire):
    """Who owns a stream. A write with an epoch that is no longer the newest is refused."""

    stream_id: str
    owner: str
    epoch: int = Field(ge=1)


def score_record(
    stream_id: str,
    model: str,
    number: int,
    pts_s: float,
    time_s: float,
    scores: Scores,
    top_k: int = 5,
    about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One line of a stream's score feed; the store adds `published_s` as it writes it.

    about: what of the frame the scores are of, such as `track_id` or `region`; nothing for all of it.
    """
    top = scores.top(top_k)
    return {
        "stream_id": stream_id,
        "model": model,
        "frame_number": number,
        "pts_s": round(pts_s, 6),
        "time_s": round(time_s, 6),
        "label": top[0][0],
        "score": round(top[0][1], 4),
        "top_k": [{"label": label, "score": round(score, 4)} for label, score in top],
        "warmup": _warmup(scores.warmup_frames, scores.warmup_total),
        **(about or {}),
    }


def cloud_event(event: ActionEvent, about: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The action as CloudEvents 1.0 structured JSON; the store adds `sequence` and `published_s` as it writes it.

    about: as in `score_record`.
    """
    data = {
        "type": event.phase,
        "stream_id": event.stream_id,
        "label": event.label,
        "score": round(event.score, 4),
        "top_score": round(event.top_score, 4),
        "top_k": [{"label": label, "score": round(score, 4)} for label, score in event.top_k],
        "model": event.model,
        "frame_number": event.frame_number,
        "pts_s": round(event.pts_s, 6),
        "frame_time": event.frame_time_s,
        "start_time": event.start_time_s,
        "start_pts_s": round(event.start_pts_s, 6),
        "end_time": event.end_time_s,
        **(about or {}),
    }
    return _envelope(event.stream_id, f"action.{event.phase}", event.action_id, event.frame_time_s, data)


def _envelope(stream_id: str, kind: str, subject: str, time_s: float, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": f"{stream_id}.{uuid.uuid4().hex}",  # tells where to look for it
        "source": f"/streams/{stream_id}",
        "type": f"{EVENT_PREFIX}.{kind}",
        "subject": subject,
        "time": datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds"),
        "datacontenttype": "application/json",
        "partitionkey": stream_id,
        "data": data,
    }


def _warmup(frames: int, total: int) -> str | None:
    """k/L while the shift state is still filling."""
    return f"{frames}/{total}" if frames < total else None


def objects_record(
    stream_id: str,
    model: str,
    number: int,
    pts_s: float,
    time_s: float,
    source_size: tuple[int, int],
    tracks: Sequence[Track],
    warmup: tuple[int, int],
) -> dict[str, Any]:
    """One line of a stream's score feed that a detector wrote: the objects with a box on this very frame.

    size is the (width, height) in source pixels that the boxes are in. warmup is (k, L): frames that the shift state
    has seen, of those that matter.
    """
    return {
        "stream_id": stream_id,
        "model": model,
        "frame_number": number,
        "pts_s": round(pts_s, 6),
        "time_s": round(time_s, 6),
        "size": list(source_size),
        "warmup": _warmup(*warmup),
        "objects": [
            {
                "track_id": track.track_id,
                "label": track.label,
                "score": round(track.score, 4),
                "detection_score": round(track.detection_score, 4),
                "box": [round(side, 1) for side in track.xyxy],
                "zones": list(track.zones),
                "loitering": list(track.loitering),
                "stationary": track.stationary,
            }
            for track in tracks
        ],
    }


def object_event(event: ObjectEvent) -> dict[str, Any]:
    """What became of an object as CloudEvents 1.0; its subject is the track's id."""
    track = event.after
    data = {
        "type": event.phase,
        "stream_id": event.stream_id,
        "model": event.model,
        **_snapshot(track, event.source_size),
        "before": _snapshot(event.before, event.source_size) if event.before else None,
        "after": _snapshot(track, event.source_size),
        "crossings": [{"line": crossing.line, "direction": crossing.direction} for crossing in event.crossings],
        "frame_number": event.frame_number,
        "pts_s": round(event.pts_s, 6),
        "frame_time": event.frame_time_s,
        "start_time": track.start_time_s,
        "start_pts_s": round(track.start_pts_s, 6),
        "end_time": event.end_time_s,
    }
    return _envelope(event.stream_id, f"detection.{event.phase}", event.track_id, event.frame_time_s, data)


def _snapshot(track: Track, size: tuple[int, int]) -> dict[str, Any]:
    """A track as its events tell it; box in source pixels, box_norm as shares of the picture."""
    sides = zip(track.xyxy, (*size, *size), strict=True)
    return {
        "track_id": track.track_id,
        "label": track.label,
        "score": round(track.score, 4),
        "top_score": round(track.top_score, 4),
        "box": [round(side, 1) for side in track.xyxy],
        "box_norm": [round(side / whole, 4) for side, whole in sides],
        "current_zones": list(track.zones),
        "entered_zones": list(track.entered_zones),
        "loitering": list(track.loitering),
        "stationary": track.stationary,
    }


def state_event(
    stream_id: str, before: StreamState | None, after: StreamState, why: str, at_s: float
) -> dict[str, Any]:
    """A change of a stream's state as CloudEvents 1.0."""
    data = {"stream_id": stream_id, "before": before, "after": after, "status_message": why}
    return _envelope(stream_id, "stream.state", stream_id, at_s, data)
