"""Ray on this machine, reachable from nowhere else, or of a cluster that is there: the one way it is started."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsm_core.errors import WorldError

# Read by ray as it is imported, so they stand before it. Without RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 a single machine's
# Ray takes the address of its network card and listens to the world; with it, it knows only loopback.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",  # live pictures do not wait for whatever else the machine computes
}
LEAST_CPUS = 4  # Ray counts CPUs to place actors; ours share what there is
OBJECT_STORE_BYTES = 100 << 20  # nothing large travels through Ray
ANSWER_S = 10.0  # longest that a cluster may take to accept a connection
LONGEST_TEMP_PATH = 40  # a Unix socket's whole path holds 107 characters


class RayNotStarted(WorldError):
    """Ray does not come up on this machine, or no cluster answers."""

    reason = "ray_not_started"


@contextlib.contextmanager
def ray_session(address: str | None = None, *, cpus: int = LEAST_CPUS, gpus: int | None = None) -> Iterator[Any]:
    """The ray module, connected; what was started or joined here is left behind it.

    address: `auto` or that of a cluster to join (None: what RAY_ADDRESS says, else `local`); `local` starts Ray on this
    machine, with so many CPUs at least and GPUs (None: all there are). Inside a program that is connected already,
    that connection serves. Raises RayNotStarted.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _set_environment(address)
    ray: Any = importlib.import_module("ray")
    if ray.is_initialized():
        yield ray
        return
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)  # before the start: one that fails half-way is ended too
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            folder = Path(tempfile.mkdtemp(prefix="tsm-", dir=temp_folder()))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.callback(ray.shutdown)
            quiet |= {
                "num_cpus": max(cpus, LEAST_CPUS, os.cpu_count() or 1),
                "num_gpus": gpus,
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": False,
                "_temp_dir": str(folder),
                "_node_ip_address": "127.0.0.1",
            }
        else:
            _check_answers(address)
        with own_signals():
            # ray waits 30 s for its parts; a loaded machine may exceed that once
            for last in (False, True) if address == "local" else (True,):
                try:
                    ray.init(address=address, **quiet)
                    break
                except Exception as error:  # noqa: BLE001  ray raises the bare class when a part does not come up
                    ray.shutdown()
                    if last:
                        raise RayNotStarted(f"Ray ({address}) cannot be used: {str(error).strip()[-600:]}") from None
        yield ray


def _set_environment(address: str) -> None:
    if address == "local":
        os.environ.update(ENVIRONMENT)
        return
    # a cluster decides for itself, but one that is bound to loopback was started as here
    own = _host_and_port(address)[0] in ("127.0.0.1", "localhost", "::1")
    for name in ENVIRONMENT if own else ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        os.environ.setdefault(name, ENVIRONMENT[name])


def _check_answers(address: str) -> None:
    """Raises RayNotStarted when nobody is there: Ray itself would wait for minutes."""
    host, port = _host_and_port(address)
    if port is None:
        return  # `auto`, which Ray looks up
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError as error:
        raise RayNotStarted(f"no Ray cluster answers at {address} ({error.strerror or error})") from None


def _host_and_port(address: str) -> tuple[str, int | None]:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else None


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Ray puts handlers of its own on SIGTERM and others, which end the process without a stop: ours come back."""
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in ours.items():
                signal.signal(number, handler)


def temp_folder() -> str:
    """A folder whose path is short enough for Ray's sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_TEMP_PATH else "/tmp"  # noqa: S108
