"""Can this machine serve? One finding per thing that the service needs."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from pipelines.sources import find_ffmpeg
from services.embedded import find_server
from services.settings import Settings
from services.store import open_store
from tsm_core.checkpoints import load_model
from tsm_core.errors import CallerError, WorldError
from tsm_core.zoo import find_model

LEAST_SHM_BYTES = 200 << 20
LEAST_MEMORY_BYTES = 2 << 30

Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found: `FAIL` when the service cannot work without it."""

    name: str
    verdict: Verdict
    detail: str


def examine(settings: Settings) -> list[Finding]:
    """Every check, in order; none raises."""
    checks: dict[str, Callable[[Settings], tuple[Verdict, str]]] = {
        "python": _python,
        "packages": _packages,
        "ffmpeg": _ffmpeg,
        "store": _store,
        "torch": _torch,
        "models": _models,
        "port": _port,
        "memory": _memory,
    }
    found = []
    for name, check in checks.items():
        try:
            verdict, detail = check(settings)
        except (CallerError, WorldError, OSError) as error:
            verdict, detail = "FAIL", str(error)
        found.append(Finding(name, verdict, detail))
    return found


def _python(_: Settings) -> tuple[Verdict, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    return ("ok", version) if sys.version_info >= (3, 11) else ("FAIL", f"{version}; 3.11 or newer is needed")


def _packages(_: Settings) -> tuple[Verdict, str]:
    try:
        wanted = importlib.metadata.requires("tsm-live") or []
    except importlib.metadata.PackageNotFoundError:
        return "warn", "tsm-live is not installed as a package; pip install -e ."
    names = [re.split(r"[\s\[<>=!;~]", line)[0] for line in wanted if "extra ==" not in line]
    missing = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return ("FAIL", f"missing: {', '.join(missing)}") if missing else ("ok", f"all {len(names)} are installed")


def _ffmpeg(_: Settings) -> tuple[Verdict, str]:
    found = find_ffmpeg()
    return "ok", f"{found.path} {'.'.join(map(str, found.version))}"


def _store(settings: Settings) -> tuple[Verdict, str]:
    if settings.store.url is None:
        return "ok", f"embedded: {find_server()}, data in {settings.store.data_dir}"
    store = open_store(settings.store)
    store.ping()
    return "ok", f"{store!r} answers"


def _torch(settings: Settings) -> tuple[Verdict, str]:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return "ok", f"{torch.__version__}, {names}"
    wanted = settings.engine.num_gpus > 0 or settings.engine.device.startswith("cuda")
    return ("FAIL" if wanted else "ok"), f"{torch.__version__}, no CUDA device: models run on the CPU"


def _models(settings: Settings) -> tuple[Verdict, str]:
    loaded = []
    for model in settings.engine.models:
        load_model(find_model(model.name, model.path, [settings.models.folder]))
        loaded.append(model.name)
    return "ok", f"{', '.join(loaded)} can be loaded"


def _port(settings: Settings) -> tuple[Verdict, str]:
    host, port = settings.server.host, settings.server.port
    try:
        with socket.create_server((host, port)):
            return "ok", f"{host}:{port} is free"
    except OSError as error:
        return "FAIL", f"{host}:{port}: {error.strerror}; use another server.port, or 0 for any free one"


def _memory(_: Settings) -> tuple[Verdict, str]:
    free = psutil.virtual_memory().available
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else LEAST_SHM_BYTES  # noqa: S108
    detail = f"{free / 2**30:.1f} GiB free, {shm / 2**20:.0f} MiB shared"
    enough = free >= LEAST_MEMORY_BYTES and shm >= LEAST_SHM_BYTES
    return ("ok", detail) if enough else ("warn", f"{detail}; 2 GiB and 200 MiB are wanted")
