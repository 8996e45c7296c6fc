"""Settings become a Ray Serve application: engine replicas, the controller and the gateway. Wiring, no logic."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

# Read by ray as it is imported, so they stand before it. Without the last one a single machine's Ray takes the
# address of its network card and listens to the world; with it, it knows only loopback.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_SERVE_LOG_TO_STDERR="0",
)

import ray
from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from services.controller import Controller
from services.embedded import EmbeddedValkey
from services.engine import Engine
from services.http_api import http_app
from services.manager import StreamManager, served_models
from services.settings import Settings
from services.store import open_store
from tsm_core.errors import CallerError, WorldError

APPLICATION = "tsm"
LEAST_CPUS = 4  # Ray counts CPUs to place actors; ours share what there is
OBJECT_STORE_BYTES = 100 << 20  # nothing large travels through Ray
MAX_REQUESTS = 1000  # every viewer of a feed is an open request
LONGEST_TEMP_PATH = 40  # a Unix socket's whole path holds 107 characters


class PortTaken(CallerError):  # noqa: N818
    """Another program listens on the port."""

    reason = "port_taken"


class ServiceNotStarted(WorldError):  # noqa: N818
    """Ray or one of the deployments did not come up."""

    reason = "service_not_started"


class EngineReplica:
    """Shell around one Engine."""

    def __init__(self, settings: Settings) -> None:
        enter_actor(settings)
        replica_id = f"engine-{serve.get_replica_context().replica_id.unique_id}"
        self._store = open_store(settings.store)
        self._engine = Engine(settings, self._store, replica_id)
        self._engine.start()

    def check_health(self) -> None:
        """Called by Serve: raises when the replica must be replaced."""
        self._engine.healthy()

    def __del__(self) -> None:
        """Called by Serve before it ends the replica: states are saved, streams handed over."""
        if hasattr(self, "_engine"):
            self._engine.stop()
            self._store.close()


class ControllerReplica:
    """Shell around the Controller."""

    def __init__(self, settings: Settings) -> None:
        enter_actor(settings)
        self._store = open_store(settings.store)
        owner = f"controller-{serve.get_replica_context().replica_id.unique_id}"
        self._controller = Controller(self._store, settings.controller, owner)
        self._controller.start()

    def check_health(self) -> None:
        """Called by Serve: raises when the replica must be replaced."""
        if not self._controller.healthy():
            raise WorldError("the controller's thread died or hangs")

    def __del__(self) -> None:
        """Called by Serve before it ends the replica: another may lead at once."""
        if hasattr(self, "_controller"):
            self._controller.stop()
            self._store.close()


@serve.ingress()
class Gateway:
    """Shell around the HTTP door; keeps nothing, so any number of them may run."""

    def __init__(self, settings: Settings, *_: Any) -> None:
        enter_actor(settings)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return http_app(StreamManager(open_store(self._settings.store), self._settings), self._settings)


def enter_actor(settings: Settings) -> None:
    """What every actor does first: log as the settings say, and listen on loopback only.

    Serve opens a port for calls between deployments on all interfaces, and what arrives there is unpickled: on a
    single machine it must not be reachable from outside. Serve has no option for it, so its helper is wrapped.
    """
    logging.basicConfig(level=settings.logger.level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel("WARNING")
    replica: Any = importlib.import_module("ray.serve._private.replica")
    original = replica.add_port_to_grpc_server
    if getattr(original, "only_loopback", False) or not _on_loopback():
        return

    def add_port(server: Any, address: str) -> int:
        return int(original(server, address.replace("[::]", "127.0.0.1")))

    add_port.only_loopback = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = add_port


def _on_loopback() -> bool:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address == "127.0.0.1"


def application(settings: Settings) -> serve.Application:
    """The graph that one `serve.run` deploys. `settings.store.url` must be set."""
    engine_options: dict[str, Any] = {"num_cpus": settings.engine.num_cpus, "num_gpus": settings.engine.num_gpus}
    deployment: Any = serve.deployment
    engine = deployment(
        EngineReplica,
        name="Engine",
        num_replicas=settings.engine.replicas,
        ray_actor_options=engine_options,
        health_check_period_s=1.0,
        health_check_timeout_s=5.0,
        graceful_shutdown_timeout_s=8.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
    controller = deployment(
        ControllerReplica,
        name="Controller",
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2.0,
        health_check_timeout_s=5.0,
        graceful_shutdown_timeout_s=3.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
    gateway = deployment(
        Gateway,
        name="Gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=MAX_REQUESTS,
        health_check_period_s=2.0,
        health_check_timeout_s=5.0,
        graceful_shutdown_timeout_s=1.0,  # feeds never end by themselves
        graceful_shutdown_wait_loop_s=0.1,
    )
    graph: serve.Application = gateway.bind(settings, engine.bind(settings), controller.bind(settings))
    return graph


class Service:
    """A running service on this machine: `url` for its users, `store_url` for those who look behind."""

    def __init__(self, settings: Settings) -> None:
        host = settings.server.host
        port = settings.server.port or _free_port(host)
        served_models(settings)  # a model that is not there is told now, in few words
        _check_port(host, port)
        self.url = f"http://{_shown_host(host)}:{port}"
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            if settings.store.url is None:
                valkey = EmbeddedValkey(settings.store.data_dir)
                stack.callback(valkey.stop)
                valkey.start()
                store = settings.store.model_copy(update={"url": SecretStr(valkey.url)})
                settings = settings.model_copy(update={"store": store})
            self.settings = settings
            self._start_ray(settings, stack, host, port)
            self._stack = stack.pop_all()

    @property
    def store_url(self) -> SecretStr:
        """Address of the store, with its password."""
        assert self.settings.store.url is not None
        return self.settings.store.url

    def stop(self) -> None:
        """Save states, hand over, end every process that was started."""
        self._stack.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_ray(self, settings: Settings, stack: contextlib.ExitStack, host: str, port: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="tsm-", dir=_temp_folder()))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cpus = max(LEAST_CPUS, os.cpu_count() or 1, int(settings.engine.replicas * settings.engine.num_cpus) + 1)
        quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=None if settings.engine.num_gpus else 0,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
            )
            stack.callback(ray.shutdown)
            serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
            stack.callback(serve.shutdown)
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.run(application(settings), name=APPLICATION, route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            raise ServiceNotStarted(f"the service does not start: {str(error).strip()[-600:]}") from None


def run_service(settings: Settings) -> Service:
    """The whole service on this machine, ready to serve; end it with `stop()`.

    Raises PortTaken, UnknownModel, ModelFileError, EmbeddedError, DataDirInUseError, ServiceNotStarted.
    """
    return Service(settings)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            return
    except OSError as error:
        raise PortTaken(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port (0 takes a free one)"
        ) from None


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def _shown_host(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if ":" in host else host


def _temp_folder() -> str:
    """A folder whose path is short enough for Ray's sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_TEMP_PATH else "/tmp"  # noqa: S108
