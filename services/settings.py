"""Every knob, once. Read by cli.py and app.py, passed inward as values.

Sources, strongest first: values given in code, environment (`TSM_ENGINE__SLOTS=128`), `tsm.yaml`, the defaults here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tsm_core.errors import CallerError


class SettingsError(CallerError):
    """The configuration cannot be used."""

    reason = "invalid_settings"


class Section(BaseModel):
    """Base of every section: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(Section):
    """The HTTP door."""

    host: str = Field("127.0.0.1", description="address to listen on; loopback unless you say otherwise")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    max_body_bytes: int = Field(1 << 20, gt=0, description="largest request body")


class StoreSettings(Section):
    """Redis or Valkey: registry, leases, shift states, events."""

    url: SecretStr | None = Field(None, description="redis://...; empty: an embedded Valkey on loopback")
    state_url: SecretStr | None = Field(None, description="second Redis for shift states; empty: the same")
    data_dir: Path = Field(Path(".tsm"), description="where the embedded Valkey keeps the registry")
    prefix: str = Field("tsm:", min_length=1, description="first letters of every key")
    events_kept: int = Field(10_000, gt=0, description="events kept per stream")
    scores_kept: int = Field(600, gt=0, description="score records kept per stream")
    state_ttl_s: float = Field(3600.0, gt=0, description="how long a saved shift state outlives its stream")


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
    heartbeat_ttl_ms: int = Field(1000, ge=200, description="a replica silent for so long is dead")
    reconcile_s: float = Field(0.2, gt=0, description="seconds between two looks at the assignments")


class ControllerSettings(Section):
    """Who assigns streams to replicas."""

    tick_s: float = Field(0.1, gt=0, description="seconds between two looks at the registry")
    lease_ttl_ms: int = Field(1500, ge=200, description="a leader silent for so long is replaced")


class SourceSettings(Section):
    """Reading cameras and files."""

    file_roots: tuple[Path, ...] = Field((), description="folders that file:// sources may be read from; empty: none")
    min_side_px: int = Field(256, ge=32, description="decoded pictures keep at least this short side, for the page")
    stall_s: float = Field(3.0, gt=0, description="a camera silent for so long is lost")
    open_deadline_s: float = Field(15.0, gt=0, description="longest wait for the first frame")
    retry_first_s: float = Field(0.5, gt=0, description="first wait before a new attempt; doubled, with full jitter")
    retry_cap_s: float = Field(15.0, gt=0, description="longest such wait")
    retry_config_s: float = Field(60.0, gt=0, description="wait after a wrong password or path")
    healthy_s: float = Field(30.0, gt=0, description="so long without a fault begins the waits anew")
    probe_timeout_s: float = Field(4.0, gt=0, description="limit of each stage of the probe")


class PreviewSettings(Section):
    """Pictures for the page."""

    quality: int = Field(75, ge=10, le=95, description="JPEG quality")
    max_fps: float = Field(15.0, gt=0, description="pictures a second while somebody watches")
    idle_fps: float = Field(0.5, gt=0, description="pictures a second while nobody watches")


class LoggerSettings(Section):
    """Logs."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="least severe line that is shown")


class TelemetrySettings(Section):
    """Traces."""

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s@]+$",
        description="OpenTelemetry collector (OTLP over HTTP), such as http://collector:4318; empty: no traces",
    )
    request_sample: float = Field(
        1.0, ge=0, le=1, description="share of requests that are traced when their caller does not decide"
    )
    frame_sample: float = Field(0.001, ge=0, le=1, description="share of frames that are traced")


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(env_prefix="TSM_", env_nested_delimiter="__", extra="forbid", frozen=True)

    server: ServerSettings = ServerSettings()
    store: StoreSettings = StoreSettings()
    models: ModelsSettings = ModelsSettings()
    engine: EngineSettings = EngineSettings()
    controller: ControllerSettings = ControllerSettings()
    source: SourceSettings = SourceSettings()
    preview: PreviewSettings = PreviewSettings()
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
