"""Every knob, once. Read by cli.py and app.py, passed inward as values.

Sources, strongest first: values given in code, environment (`TSM_ENGINE__SLOTS=128`), `tsm.yaml`, the defaults here.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pipelines.addresses import NETWORKS, Network
from tsm_core.errors import CallerError


class SettingsError(CallerError):
    """The configuration cannot be used."""

    reason = "invalid_settings"


class Section(BaseModel):
    """Base of every section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def key_bytes(key: SecretStr) -> bytes:
    """The 32 bytes of a key in base64. Raises ValueError that does not show it."""
    try:
        found = base64.b64decode(key.get_secret_value().strip(), validate=True)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise ValueError("a key is 32 bytes in base64, as `openssl rand -base64 32` prints them")
    return found


class ServerSettings(Section):
    """The doors: HTTP and gRPC."""

    host: str = Field("127.0.0.1", description="address to listen on; loopback unless you say otherwise")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    grpc_port: int | None = Field(
        9000, ge=0, le=65535, description="gRPC port; 0 takes a free one, null leaves that door shut"
    )
    grpc_reflection: bool = Field(False, description="tell everybody who asks which gRPC methods there are")
    max_body_bytes: int = Field(1 << 20, gt=0, description="largest request body")
    max_infer_bytes: int = Field(
        64 << 20, gt=0, description="largest inference request, over HTTP also when it is unpacked"
    )


class AuthSettings(Section):
    """Who may call, and how often."""

    required: Literal["auto", "always"] = Field(
        "auto", description="auto: a token is needed on a cluster and wherever server.host is not loopback"
    )
    admin_token: SecretStr | None = Field(
        None,
        min_length=32,
        description="a token that may do everything; empty: the first start makes one and says where",
    )
    viewer_token: SecretStr | None = Field(
        None, min_length=32, description="a token that may look at everything: Prometheus's, for instance"
    )
    session_s: float = Field(12 * 3600.0, gt=0, description="how long a login of the page lasts")
    requests_per_s: float = Field(1000.0, gt=0, description="calls a second that one caller may make for long")
    requests_burst: int = Field(2000, gt=0, description="calls that one caller may make at once")
    failures_per_min: float = Field(10.0, gt=0, description="wrong tokens a minute from one address; more must wait")
    feeds: int = Field(64, gt=0, description="feeds (events, pictures, WebSockets) that one caller may follow at once")
    allowed_hosts: tuple[str, ...] = Field(
        (), description="host names that may stand in a request; empty: loopback's on loopback, elsewhere any"
    )
    https: bool = Field(False, description="callers come over https: cookies are Secure, browsers are told to stay")


class StoreSettings(Section):
    """Redis or Valkey: registry, leases, shift states, events."""

    url: SecretStr | None = Field(None, description="redis://...; empty: an embedded Valkey on loopback")
    state_url: SecretStr | None = Field(None, description="second Redis for shift states; empty: the same")
    data_dir: Path = Field(Path(".tsm"), description="where the embedded Valkey keeps the registry")
    prefix: str = Field("tsm:", min_length=1, description="first letters of every key")
    events_kept: int = Field(10_000, gt=0, description="events kept per stream")
    scores_kept: int = Field(600, gt=0, description="score records kept per stream")
    state_ttl_s: float = Field(3600.0, gt=0, description="how long a saved shift state outlives its stream")
    encryption_key: SecretStr | None = Field(
        None, description="32 bytes in base64 that seal cameras' passwords; empty: made once in data_dir/secret.key"
    )
    encryption_key_file: Path | None = Field(None, description="file with this key")
    encryption_keys_old: tuple[SecretStr, ...] = Field(
        (), description="earlier keys, which still open what they sealed"
    )

    @field_validator("encryption_key", "encryption_keys_old")
    @classmethod
    def check_keys(cls, given: SecretStr | tuple[SecretStr, ...] | None) -> SecretStr | tuple[SecretStr, ...] | None:
        """Every key is one; an empty text is none."""
        if isinstance(given, SecretStr) and not given.get_secret_value():
            return None
        for key in (given,) if isinstance(given, SecretStr) else given or ():
            key_bytes(key)
        return given


class ModelsSettings(Section):
    """Model files beside those that are shipped."""

    dir: Path = Field(
        Path("~/.cache/tsm-live"), description="where pulled and imported models are kept, and looked for by name"
    )

    @property
    def folder(self) -> Path:
        """`dir` with the home directory filled in."""
        return self.dir.expanduser()


class ModelSettings(Section):
    """One model that every replica loads."""

    name: str = Field(description="name that streams use")
    path: Path | None = Field(
        None, description="model file (safetensors); empty: a shipped or pulled model of this name"
    )


class EngineSettings(Section):
    """The replicas that step the models."""

    replicas: int = Field(2, gt=0, description="engine replicas")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of one replica; 0: CPU")
    num_cpus: float = Field(0.5, ge=0, description="CPU share of one replica, for placement")
    threads: int = Field(1, gt=0, description="CPU threads of one model step")
    device: str = Field("auto", description="auto, cpu or cuda")
    slots: int = Field(64, gt=0, description="streams one replica can hold")
    object_slots: int = Field(
        32, ge=0, description="tracked objects that one replica can recognise beside the streams, per recogniser"
    )
    max_batch: int = Field(16, gt=0, description="frames, or crops of tracked objects, in one step")
    max_wait_ms: float = Field(4.0, ge=0, description="longest a ready frame waits for company")
    max_frame_age_s: float = Field(
        1.0, gt=0, description="older camera frames are dropped before work is spent on them"
    )
    models: tuple[ModelSettings, ...] = Field(
        (ModelSettings(name="motion9"),), min_length=1, description="models to load"
    )
    checkpoint_interval_s: float = Field(2.0, gt=0, description="seconds between two saves of a stream's shift state")
    checkpoint_bytes_per_s: float = Field(64e6, gt=0, description="most bytes a second one replica saves")
    state_max_gap_s: float = Field(10.0, gt=0, description="longer without a frame: the shift state starts anew")
    sequence_idle_s: float = Field(
        60.0, gt=0, description="a sequence whose frames are pushed is let go after so long without one"
    )
    heartbeat_ttl_ms: int = Field(1000, ge=200, description="a replica silent for so long is dead")
    reconcile_s: float = Field(0.2, gt=0, description="seconds between two looks at the assignments")


class ControllerSettings(Section):
    """Who assigns streams to replicas."""

    tick_s: float = Field(0.1, gt=0, description="seconds between two looks at the registry")
    lease_ttl_ms: int = Field(1500, ge=200, description="a leader silent for so long is replaced")


class SourceSettings(Section):
    """Reading cameras and files."""

    file_roots: tuple[Path, ...] = Field((), description="folders that file:// sources may be read from; empty: none")
    networks: tuple[Network, ...] = Field(
        NETWORKS,
        min_length=1,
        description="where cameras may be: loopback, private, public; link-local and metadata addresses never",
    )
    min_side_px: int = Field(256, ge=32, description="decoded pictures keep at least this short side, for the page")
    stall_s: float = Field(3.0, gt=0, description="a camera silent for so long is lost")
    open_deadline_s: float = Field(15.0, gt=0, description="longest wait for the first frame")
    retry_first_s: float = Field(0.5, gt=0, description="first wait before a new attempt; doubled, with full jitter")
    retry_cap_s: float = Field(15.0, gt=0, description="longest such wait")
    retry_config_s: float = Field(60.0, gt=0, description="wait after a wrong password or path")
    healthy_s: float = Field(30.0, gt=0, description="so long without a fault begins the waits anew")
    probe_timeout_s: float = Field(4.0, gt=0, description="limit of each stage of the probe")


class LimitsSettings(Section):
    """What one picture or video may ask for; judged before its pixels are decoded."""

    image_bytes: int = Field(32 << 20, gt=0, description="largest JPEG or PNG of a request")
    pixels: int = Field(40_000_000, gt=0, description="width x height of a picture, and of a camera's frame")
    side_px: int = Field(16_384, gt=0, description="longest side of a picture, or of a frame of a video file")
    video_bytes: int = Field(2 << 30, gt=0, description="largest video file")
    video_pixels: int = Field(9_437_184, gt=0, le=40_000_000, description="width x height of a frame of a video file")
    frames: int = Field(120_000, gt=0, description="frames of a video file")
    duration_s: float = Field(3_600.0, gt=0, description="seconds of a video file")
    check_s: float = Field(30.0, gt=0, description="longest time that a look at a video file may take")
    memory_bytes: int = Field(4 << 30, ge=256 << 20, description="address space of a process that decodes")


class PreviewSettings(Section):
    """Pictures for the page."""

    quality: int = Field(75, ge=10, le=95, description="JPEG quality")
    max_fps: float = Field(15.0, gt=0, description="pictures a second while somebody watches")
    idle_fps: float = Field(0.5, gt=0, description="pictures a second while nobody watches")


class JobsSettings(Section):
    """Uploaded videos, one after another, in a process of their own; `limits` says how large they may be."""

    dir: Path | None = Field(None, description="where uploads and results are kept; empty: below store.data_dir")
    num_gpus: float = Field(0.0, ge=0, description="GPUs of the process; 0: CPU")
    num_cpus: float = Field(0.5, ge=0, description="its CPU share, for placement; it also runs at a low priority")
    queue: int = Field(16, gt=0, description="jobs that may wait, uploads included")
    kept: int = Field(100, gt=0, description="jobs that are over and kept; the oldest make room")
    kept_s: float = Field(24 * 3600.0, gt=0, description="how long they are kept")


class CourierSettings(Section):
    """How events are brought to webhooks and brokers."""

    retry_first_s: float = Field(0.5, gt=0, description="first wait after a failed delivery; doubled, with jitter")
    retry_cap_s: float = Field(60.0, gt=0, description="longest such wait, unless the sink asks for more")
    attempts: int = Field(
        20, gt=0, description="answers of `later` (5xx, 429) that make a dead letter; a sink that is away is waited for"
    )
    dead_letters: int = Field(1000, gt=0, description="dead letters kept per sink; the oldest make room")


class SinkFilter(Section):
    """Which events a sink is told; patterns are those of a shell."""

    streams: tuple[str, ...] = Field((), description="ids or patterns, such as `door-*`; empty: all")
    types: tuple[str, ...] = Field((), description="types or patterns, such as `action.*`; empty: all")
    labels: tuple[str, ...] = Field((), description="labels or patterns, such as `person`; empty: all")


class WebhookSettings(SinkFilter):
    """One receiver of events by HTTP."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="name of the sink")
    url: SecretStr = Field(description="http:// or https:// address that events are posted to")
    secrets: tuple[SecretStr, ...] = Field(
        (), max_length=2, description="whsec_ and a key in base64; a second one while the receiver changes over"
    )
    secret_file: Path | None = Field(None, description="file with these secrets, one a line")
    batch: int = Field(1, ge=1, le=1000, description="most events of one request; above 1 in CloudEvents' batch mode")


class WebhooksSettings(Section):
    """Receivers of events by HTTP."""

    sinks: tuple[WebhookSettings, ...] = Field((), description="the receivers: name, url, secrets, ...")
    timeout_s: float = Field(10.0, gt=0, description="longest wait for a receiver's answer")
    networks: tuple[Network, ...] = Field(
        ("private", "public"), min_length=1, description="where receivers may be: loopback, private, public"
    )

    @field_validator("sinks")
    @classmethod
    def check_names(cls, sinks: tuple[WebhookSettings, ...]) -> tuple[WebhookSettings, ...]:
        """Every sink has a name of its own, and `mqtt` is the broker's."""
        names = [sink.name for sink in sinks]
        if len({*names, "mqtt"}) <= len(names):
            raise ValueError(f"names of sinks must differ, and `mqtt` is taken: {', '.join(names)}")
        return sinks


class MqttSettings(SinkFilter):
    """An MQTT 5 broker that is told of events."""

    url: str | None = Field(
        None, pattern=r"^mqtts?://[^@/?#\s]+$", description="mqtt://HOST:PORT, or mqtts:// with TLS; empty: none"
    )
    username: str = Field("", description="user at the broker")
    password: SecretStr | None = Field(None, description="password at the broker")
    password_file: Path | None = Field(None, description="file with this password")
    ca_file: Path | None = Field(None, description="certificates to trust with mqtts://; empty: the system's")
    client_id: str = Field("tsm-live", min_length=1, max_length=64, description="must differ between services")
    prefix: str = Field("tsm", pattern=r"^[^+#/$\s]+(/[^+#/\s]+)*$", description="first part of every topic")
    discovery: str = Field(
        "homeassistant", pattern=r"^[^+#$\s]*$", description="prefix of Home Assistant's discovery; empty: none"
    )
    stats_s: float = Field(30.0, gt=0, description="seconds between two messages of counters")


class LoggerSettings(Section):
    """Logs."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least severe line that is shown")
    format: Literal["text", "json"] = Field(
        "text", description="text for people; json, one object a line, for machines"
    )


class TelemetrySettings(Section):
    """Metrics and traces."""

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s@]+$",
        description="OpenTelemetry collector (OTLP over HTTP), such as http://collector:4318; empty: no traces",
    )
    request_sample: float = Field(
        1.0, ge=0, le=1, description="share of requests that are traced when their caller does not decide"
    )
    frame_sample: float = Field(0.001, ge=0, le=1, description="share of frames that are traced")
    stream_labels: int = Field(
        200, ge=0, description="most streams of one replica that metrics name; the others share the label `other`"
    )


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(env_prefix="TSM_", env_nested_delimiter="__", extra="forbid", frozen=True)

    server: ServerSettings = ServerSettings()
    auth: AuthSettings = AuthSettings()
    store: StoreSettings = StoreSettings()
    models: ModelsSettings = ModelsSettings()
    engine: EngineSettings = EngineSettings()
    controller: ControllerSettings = ControllerSettings()
    source: SourceSettings = SourceSettings()
    limits: LimitsSettings = LimitsSettings()
    preview: PreviewSettings = PreviewSettings()
    jobs: JobsSettings = JobsSettings()
    couriers: CourierSettings = CourierSettings()
    webhooks: WebhooksSettings = WebhooksSettings()
    mqtt: MqttSettings = MqttSettings()
    logger: LoggerSettings = LoggerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment is stronger than the file, which comes in as code."""
        return env_settings, init_settings


def load_settings(
    path: Path | None = None, overrides: dict[str, Any] | None = None, data: dict[str, Any] | None = None
) -> Settings:
    """Settings from `tsm.yaml` (or `path`, or `data`), the environment and `overrides` (dotted names, strongest).

    Raises SettingsError that names the key, the value and what is allowed; never prints a secret.
    """
    file = path or Path("tsm.yaml")
    if path is not None and not file.is_file():
        raise SettingsError(f"configuration file {file} does not exist")
    if data is None and file.is_file():
        try:
            loaded = yaml.safe_load(file.read_text()) or {}
        except yaml.YAMLError as error:
            raise SettingsError(f"{file} is not YAML: {error}") from None
        if not isinstance(loaded, dict):
            raise SettingsError(f"{file} must hold sections such as `engine:`, got {type(loaded).__name__}")
        data = loaded
    known = {f"TSM_{name.upper()}" for name in Settings.model_fields}
    for key in os.environ:
        if key.startswith("TSM_") and "__" in key and key.split("__")[0] not in known:
            raise SettingsError(f"environment variable {key} names no section; sections are {', '.join(sorted(known))}")
    try:
        settings = Settings(**(data or {}))
        if overrides:
            tree = settings.model_dump()
            for dotted, value in overrides.items():
                section, _, name = dotted.partition(".")
                tree[section][name] = value
            settings = Settings.model_construct(
                **{name: type(getattr(settings, name)).model_validate(tree[name]) for name in Settings.model_fields}
            )
        return settings
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)]
        raise SettingsError("; ".join(lines)) from None
