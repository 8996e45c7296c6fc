"""What travels on the wire and into the store, v1: streams, their status, scores and events."""

from __future__ import annotations

import json
import re
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from tsm_core.recipes import SmootherName
from tsm_core.types import ActionEvent, Scores

EVENT_PREFIX = "tsm.v1"

StreamState = Literal["STARTING", "RUNNING", "RESTARTING", "STOPPING", "STOPPED", "FAILED", "ENDED"]
StreamId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$", examples=["door-1"])]


class Wire(BaseModel):
    """Base of everything on the wire: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSpec(Wire):
    """Where a stream's frames come from. The URI never holds a password: it is split off at birth."""

    uri: str = Field(
        min_length=1,
        max_length=2048,
        examples=["rtsp://192.168.1.20:554/stream1"],
        description="rtsp:// or rtsps:// camera, or file:// below one of `source.file_roots`",
    )
    username: str | None = Field(None, max_length=256)
    password: SecretStr | None = Field(None, max_length=256, description="write-only; never returned")
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
    def is_file(self) -> bool:
        """True for file:// sources, whose time is their pts."""
        return self.uri.startswith("file:")


class StreamModel(Wire):
    """One model on a stream, and when its scores become actions."""

    name: str = Field(min_length=1, max_length=128, examples=["motion9"])
    threshold: float | None = Field(None, gt=0, le=1, description="score that begins an action; default: the model's")
    off_threshold: float | None = Field(None, ge=0, le=1, description="score that ends it; default: the model's")
    window_s: float | None = Field(None, gt=0, le=600, description="window mode: seconds of video one result sees")
    stride_s: float | None = Field(None, gt=0, le=600, description="window mode: seconds between two results")
    smoother: SmootherName | None = Field(
        None,
        description="exponential, or gesture: mit-han-lab's rules for the online Jester labels; default: the model's",
    )

    @model_validator(mode="after")
    def check_thresholds(self) -> StreamModel:
        """An action must not end above the score that begins it."""
        if self.threshold is not None and self.off_threshold is not None and self.off_threshold > self.threshold:
            raise ValueError(f"off_threshold {self.off_threshold} is above threshold {self.threshold}")
        return self


class StreamSpec(Wire):
    """The desired state of one stream, as the registry keeps it."""

    id: StreamId
    name: str = Field("", max_length=200)
    enabled: bool = Field(True, description="false: registered but stopped")
    source: SourceSpec
    models: tuple[StreamModel, ...] = Field((), max_length=8, description="empty: the service's default model")
    max_fps: float | None = Field(None, gt=0, le=240, description="recognise at most this many frames a second")
    tags: dict[str, str] = Field(default_factory=dict, max_length=32)
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    revision: int = Field(1, ge=1, description="counts changes of the specification")

    def secret_json(self) -> str:
        """JSON for the store alone: the password in clear. Everything else prints `**********`."""
        data = self.model_dump(mode="json")
        password = self.source.password
        data["source"]["password"] = password.get_secret_value() if password else None
        return json.dumps(data, separators=(",", ":"))


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
    source_size: tuple[int, int] | None = Field(None, description="width, height in pixels")
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


class Lease(Wire):
    """Who owns a stream. A write with an epoch that is no longer the newest is refused."""

    stream_id: str
    owner: str
    epoch: int = Field(ge=1)


def score_record(
    stream_id: str, model: str, number: int, pts_s: float, time_s: float, scores: Scores, top_k: int = 5
) -> dict[str, Any]:
    """One line of a stream's score feed; the store adds `published_s` as it writes it."""
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
        "warmup": f"{scores.warmup_frames}/{scores.warmup_total}"
        if scores.warmup_frames < scores.warmup_total
        else None,
    }


def cloud_event(event: ActionEvent) -> dict[str, Any]:
    """The event as CloudEvents 1.0 structured JSON; the store adds `sequence` and `published_s` as it writes it."""
    return {
        "specversion": "1.0",
        "id": str(uuid.uuid4()),
        "source": f"/streams/{event.stream_id}",
        "type": f"{EVENT_PREFIX}.action.{event.phase}",
        "subject": event.action_id,
        "time": datetime.fromtimestamp(event.frame_time_s, UTC).isoformat(timespec="milliseconds"),
        "datacontenttype": "application/json",
        "partitionkey": event.stream_id,
        "data": {
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
        },
    }


def state_event(
    stream_id: str, before: StreamState | None, after: StreamState, why: str, at_s: float
) -> dict[str, Any]:
    """A change of a stream's state as CloudEvents 1.0."""
    return {
        "specversion": "1.0",
        "id": str(uuid.uuid4()),
        "source": f"/streams/{stream_id}",
        "type": f"{EVENT_PREFIX}.stream.state",
        "subject": stream_id,
        "time": datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds"),
        "datacontenttype": "application/json",
        "partitionkey": stream_id,
        "data": {"stream_id": stream_id, "before": before, "after": after, "status_message": why},
    }
