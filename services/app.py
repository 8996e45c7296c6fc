"""Settings become a Ray Serve application: engine replicas, the controller and the gateway. Wiring, no logic."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any, cast

from pipelines.ray_local import ENVIRONMENT, LEAST_CPUS, ray_session

os.environ.update(ENVIRONMENT)  # read by ray as it is imported

from pydantic import SecretStr
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from services import logs
from services.actors.controller import ControllerReplica
from services.actors.engine import EngineReplica
from services.actors.gateway import ClusterGateway, Gateway
from services.actors.jobs import JobsReplica
from services.couriers.office import check_sinks
from services.embedded import EmbeddedValkey
from services.jobs import jobs_dir
from services.locks.first import first_admin_token
from services.locks.vault import HOW, vault_of, with_key
from services.manager import served_models
from services.ports import listen, shown_host
from services.replicas import MAX_CALLS, OwnerRouter
from services.settings import Settings, SettingsError, StoreSettings, load_settings
from services.store import open_store
from tsm_core.errors import WorldError

APPLICATION = "tsm"
JOB_CALLS = 64  # pieces of uploads and results under way at once
VIEWERS = 1000  # feeds that one gateway of a cluster serves at once: each is a request that does not end


class ServiceNotStarted(WorldError):
    """Ray or one of the deployments did not come up."""

    reason = "service_not_started"


def application(settings: Settings, port: int) -> serve.Application:
    """The graph that one `serve.run` deploys, with its HTTP door on `port`. `settings.store.url` must be set."""
    folder = jobs_dir(settings).absolute()  # actors have a working directory of their own
    settings = settings.model_copy(update={"jobs": settings.jobs.model_copy(update={"dir": folder})})
    graph: serve.Application = _door(Gateway).bind(settings, settings.server.host, port, *_workers(settings, settings))
    return graph


def cluster_application(args: dict[str, Any]) -> serve.Application:
    """The graph that `serve deploy` and KubeRay build, with Serve's own proxy as its HTTP door.

    args: sections as in `tsm.yaml`; `store.url` comes from the environment. Raises SettingsError.
    """
    settings = load_settings(data=args)
    if settings.store.url is None:
        raise SettingsError("store.url is empty, and a cluster embeds no store: set TSM_STORE__URL on every node")
    if vault_of(settings.store) is None:
        raise SettingsError(
            "a cluster needs a key that seals cameras' passwords: set TSM_STORE__ENCRYPTION_KEY on every node to the "
            f"same 32 bytes in base64; {HOW}"
        )
    if settings.auth.admin_token is None:
        raise SettingsError(
            "a cluster's doors want tokens, and nothing here keeps a first one: set TSM_AUTH__ADMIN_TOKEN on every "
            "node to the same 32 letters or more; `openssl rand -hex 32` makes them"
        )
    door = _door(ClusterGateway).options(max_ongoing_requests=VIEWERS)
    graph: serve.Application = door.bind(args, *_workers(settings, args))
    return graph


def _workers(settings: Settings, given: Settings | dict[str, Any]) -> tuple[Any, Any, Any]:
    """Engine, jobs and controller, bound to what their actors are given."""
    deployment: Any = serve.deployment
    engine = deployment(
        EngineReplica,
        name="Engine",
        num_replicas=settings.engine.replicas,
        ray_actor_options={"num_cpus": settings.engine.num_cpus, "num_gpus": settings.engine.num_gpus},
        max_ongoing_requests=MAX_CALLS,
        request_router_config=RequestRouterConfig(request_router_class=cast(Any, OwnerRouter)),
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
    jobs = deployment(
        JobsReplica,
        name="Jobs",
        num_replicas=1,  # uploads and results lie on its disk
        ray_actor_options={"num_cpus": settings.jobs.num_cpus, "num_gpus": settings.jobs.num_gpus},
        max_ongoing_requests=JOB_CALLS,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=8.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
    return engine.bind(given), jobs.bind(given), controller.bind(given)


def _door(gateway: Any) -> Any:
    deployment: Any = serve.deployment
    return deployment(
        gateway,
        name="Gateway",
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=2.0,
        health_check_timeout_s=5.0,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
    )


class Service:
    """A running service on this machine: `url` and `grpc` for its users, `store_url` for those who look behind.

    grpc: HOST:PORT; None when that door is shut. admin_token_file: where a token that may do everything is; None when
    none is wanted, or it was brought along.
    """

    def __init__(self, settings: Settings) -> None:
        host = settings.server.host
        served_models(settings)  # a model that is not there is told now, in few words
        check_sinks(settings)
        with listen(host, settings.server.port) as listener:  # and so is a port that is taken
            port = int(listener.getsockname()[1])
        self.url = f"http://{shown_host(host)}:{port}"
        self.grpc = None
        if settings.server.grpc_port is not None:
            with listen(host, settings.server.grpc_port, "--grpc-port") as listener:
                grpc_port = int(listener.getsockname()[1])
            self.grpc = f"{shown_host(host)}:{grpc_port}"
            server = settings.server.model_copy(update={"grpc_port": grpc_port})
            settings = settings.model_copy(update={"server": server})
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            store = with_key(settings.store)
            if store.url is None:
                store = _embedded_store(store, stack)
            settings = settings.model_copy(update={"store": store})
            self.settings = settings
            with contextlib.closing(open_store(settings.store)) as opened:
                self.admin_token_file = first_admin_token(opened, settings)
            self._start_ray(settings, stack, port)
            self._stack = stack.pop_all()

    @property
    def store_url(self) -> SecretStr:
        """Address of the store, with its password."""
        assert self.settings.store.url is not None
        return self.settings.store.url

    def stop(self) -> None:
        """Save states, hand over, end every process that was started."""
        with contextlib.redirect_stdout(None):  # Ray reports its own orderly end as failed tasks
            self._stack.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_ray(self, settings: Settings, stack: contextlib.ExitStack, port: int) -> None:
        asked = settings.engine.replicas * settings.engine.num_cpus + settings.jobs.num_cpus
        cpus = max(LEAST_CPUS, int(asked) + 1)
        on_gpu = settings.engine.num_gpus or settings.jobs.num_gpus
        quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
        relay = logs.Relay()
        stack.callback(relay.stop)
        os.environ[logs.RELAY_VARIABLE] = relay.path  # Ray's workers inherit it
        stack.callback(os.environ.pop, logs.RELAY_VARIABLE, None)
        try:
            stack.enter_context(ray_session("local", cpus=cpus, gpus=None if on_gpu else 0))
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(proxy_location="Disabled", logging_config=quiet)
            stack.callback(serve.shutdown)
            serve.run(application(settings, port), name=APPLICATION, route_prefix="/", logging_config=quiet)
        except Exception as error:  # noqa: BLE001  ray raises the bare class when a part of it does not come up
            raise ServiceNotStarted(f"the service does not start: {str(error).strip()[-600:]}") from None


def _embedded_store(settings: StoreSettings, stack: contextlib.ExitStack) -> StoreSettings:
    """Two servers of our own: one keeps the registry on disk, the other states and pictures in memory alone."""
    urls = {}
    for name, folder, persistent in (
        ("url", settings.data_dir, True),
        ("state_url", settings.data_dir / "state", False),
    ):
        if name == "state_url" and settings.state_url is not None:
            continue
        valkey = EmbeddedValkey(folder, persistent=persistent)
        stack.callback(valkey.stop)
        valkey.start()
        urls[name] = SecretStr(valkey.url)
    return settings.model_copy(update=urls)


def run_service(settings: Settings) -> Service:
    """The whole service on this machine, ready to serve; end it with `stop()`.

    Raises PortTaken, UnknownModel, ModelFileError, EmbeddedError, DataDirInUseError, ServiceNotStarted.
    """
    return Service(settings)
