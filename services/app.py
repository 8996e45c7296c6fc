"""Settings become a Ray Serve application: engine replicas, the controller and the gateway. Wiring, no logic."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import threading
from typing import Any, cast

from pipelines.ray_local import ENVIRONMENT, LEAST_CPUS, ray_session

os.environ.update(ENVIRONMENT)  # read by ray as it is imported

import ray
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from services import logs, tracing
from services.controller import Controller
from services.couriers.office import Couriers, check_sinks
from services.embedded import EmbeddedValkey
from services.engine import Engine
from services.http.app import http_app
from services.http.observe import Reporter
from services.inference import Inference, InferRequest
from services.inferring import StoreInference, infer_here, push_when_open
from services.jobs import JobRunner, jobs_dir
from services.locks.first import first_admin_token
from services.locks.vault import HOW, vault_of, with_key
from services.manager import StreamManager, served_models
from services.ports import listen, shown_host
from services.replicas import MAX_CALLS, Answer, OwnerRouter, ServeReplicas, answer_or_refusal, replica_name, serve_jobs
from services.rpc.cluster import grpc_ingress
from services.rpc.open_inference import inference_service
from services.rpc.server import GrpcDoor, RpcService
from services.rpc.streams import stream_service
from services.schemas import Lease
from services.settings import Settings, SettingsError, StoreSettings, load_settings
from services.store import open_store
from tsm_core.errors import WorldError

APPLICATION = "tsm"
JOBS_NICE = 10
JOB_CALLS = 64  # pieces of uploads and results under way at once
VIEWERS = 1000  # feeds that one gateway of a cluster serves at once: each is a request that does not end


class ServiceNotStarted(WorldError):
    """Ray or one of the deployments did not come up."""

    reason = "service_not_started"


class EngineReplica:
    """Shell around one Engine."""

    def __init__(self, given: Settings | dict[str, Any]) -> None:
        settings = enter_actor(given)
        replica_id = replica_name(serve.get_replica_context().replica_id.unique_id)
        self._store = open_store(settings.store)
        self._engine = Engine(settings, self._store, replica_id)
        self._engine.start()

    async def infer(self, request: InferRequest) -> Answer:
        """The answer to a request that stands alone."""
        return await answer_or_refusal(infer_here(self._engine, request))

    async def push(self, lease: Lease, token: str, request: InferRequest, owner: str) -> Answer:
        """The answer to frames of a sequence; owner tells Serve which replica has it."""
        return await answer_or_refusal(push_when_open(self._engine, lease, token, request))

    def check_health(self) -> None:
        """Called by Serve: raises when the replica must be replaced."""
        self._engine.healthy()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Read by Serve for the policy in `services/scaling.py`."""
        now = self._engine.figures()
        return {"slots_used": now.slots_used, "slots_total": now.slots_total}

    def __del__(self) -> None:
        """Called by Serve before it ends the replica: states are saved, streams handed over."""
        if hasattr(self, "_engine"):
            self._engine.stop()
            self._store.close()


class ControllerReplica:
    """Shell around the Controller."""

    def __init__(self, given: Settings | dict[str, Any]) -> None:
        settings = enter_actor(given)
        self._store = open_store(settings.store)
        owner = f"controller-{serve.get_replica_context().replica_id.unique_id}"
        self._controller = Controller(self._store, settings.controller, owner)
        self._couriers = Couriers(self._store, settings, lambda: self._controller.leading)
        self._controller.start()
        self._couriers.start()

    def check_health(self) -> None:
        """Called by Serve: raises when the replica must be replaced."""
        if not self._controller.healthy():
            raise WorldError("the controller's thread died or hangs")

    def __del__(self) -> None:
        """Called by Serve before it ends the replica: another may lead at once."""
        if hasattr(self, "_couriers"):
            self._controller.stop()
            self._couriers.stop()
            self._store.close()


class JobsReplica:
    """Shell around the JobRunner, at a low priority: cameras go first."""

    def __init__(self, given: Settings | dict[str, Any]) -> None:
        settings = enter_actor(given)
        os.nice(JOBS_NICE)  # of this thread and those that it starts
        self._store = open_store(settings.store)
        runner_id = f"jobs-{serve.get_replica_context().replica_id.unique_id}"
        self._runner = JobRunner(self._store, settings, runner_id)
        self._runner.start()

    async def call(self, verb: str, *args: Any) -> Any:
        """What a verb of the runner answers, or the error of ours that it raised."""
        return await answer_or_refusal(asyncio.to_thread(getattr(self._runner, verb), *args))

    def check_health(self) -> None:
        """Called by Serve: raises when the replica must be replaced."""
        if not self._runner.alive:
            raise WorldError("a thread of the job runner ended")

    def __del__(self) -> None:
        """Called by Serve before it ends the replica: jobs that are not done say so."""
        if hasattr(self, "_runner"):
            self._runner.stop()
            self._store.close()


class Gateway:
    """Shell around the HTTP door; keeps nothing.

    It listens by itself: Serve's proxy reads a feed as fast as it comes and keeps what a slow viewer does not take,
    without bound (measured: 56 MB in 15 s for one viewer who reads nothing).
    """

    def __init__(self, settings: Settings, host: str, port: int, engine: Any, jobs: Any, *_: Any) -> None:
        enter_actor(settings)
        self._store = open_store(settings.store)
        manager = StreamManager(self._store, settings)
        inference = StoreInference(self._store, settings, ServeReplicas(engine))
        app = http_app(manager, settings, inference, jobs=serve_jobs(jobs))
        self._grpc = _open_grpc(settings, host, manager, app, inference)
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,  # ours
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="websockets-sansio",
            timeout_graceful_shutdown=1,
        )
        listener = listen(host, port)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="http", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Called by Serve: raises when the replica must be replaced."""
        if not self._thread.is_alive():
            raise WorldError("the HTTP server ended")
        if self._grpc is not None and not self._grpc.alive():
            raise WorldError("the gRPC server ended")

    def __del__(self) -> None:
        """Called by Serve before it ends the replica: feeds are ended."""
        if hasattr(self, "_thread"):
            self._server.should_exit = True
            if self._grpc is not None:
                self._grpc.stop()
            self._thread.join(3.0)
            self._store.close()


def _open_grpc(
    settings: Settings, host: str, manager: StreamManager, app: FastAPI, inference: Inference
) -> GrpcDoor | None:
    """The gRPC door beside the HTTP door `app`, which has the hub and the locks. Raises PortTaken."""
    server = settings.server
    if server.grpc_port is None:
        return None
    return GrpcDoor(
        host,
        server.grpc_port,
        _rpc_services(manager, app, inference),
        app.state.locks,
        with_reflection=server.grpc_reflection,
        max_message_bytes=server.max_infer_bytes,
        telemetry=app.state.telemetry,
    )


def _rpc_services(manager: StreamManager, app: FastAPI, inference: Inference) -> list[RpcService]:
    return [stream_service(manager, app.state.hub), inference_service(inference)]


@serve.ingress()
@grpc_ingress
class ClusterGateway:
    """Shell around both doors on a cluster, where Serve's proxy on every node leads to it; keeps nothing."""

    def __init__(self, given: Settings | dict[str, Any], engine: Any, jobs: Any, *_: Any) -> None:
        settings = enter_actor(given)
        always = settings.auth.model_copy(update={"required": "always"})
        settings = settings.model_copy(update={"auth": always})
        self._store = open_store(settings.store)
        inference = StoreInference(self._store, settings, ServeReplicas(engine))
        gateway_id = f"gateway-{serve.get_replica_context().replica_id.unique_id}"
        manager = StreamManager(self._store, settings)
        self._http = http_app(manager, settings, inference, gateway_id, serve_jobs(jobs))
        state = self._http.state
        self.rpc: dict[str, Any] = {}
        for service in _rpc_services(manager, self._http, inference):
            state.telemetry.calls(service.paths())
            self.rpc |= service.guarded(state.locks, state.telemetry)
        self._reporter = Reporter(self._store, self._http.state.telemetry)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve once per replica."""
        return self._http

    def __del__(self) -> None:
        """Called by Serve before it ends the replica."""
        if hasattr(self, "_reporter"):
            self._reporter.stop()
            self._store.close()


def enter_actor(given: Settings | dict[str, Any]) -> Settings:
    """What every actor does first: know its settings, log as they say, and listen on loopback only.

    given: on a cluster sections as in `tsm.yaml`, completed here by the pod's environment: what Ray passes on it also
    keeps, and the store's password is none of its business. Raises SettingsError.

    Serve opens a port for calls between deployments on all interfaces, and what arrives there is unpickled: on a
    single machine it must not be reachable from outside. Serve has no option for it, so its helper is wrapped.
    """
    settings = given if isinstance(given, Settings) else load_settings(data=given)
    context = serve.get_replica_context()
    replica_id = f"{context.deployment.lower()}-{context.replica_id.unique_id}"
    logs.set_up(settings, replica_id)
    tracing.configure(settings.telemetry, replica_id)
    replica: Any = importlib.import_module("ray.serve._private.replica")
    original = replica.add_port_to_grpc_server
    if getattr(original, "only_loopback", False) or not _on_loopback():
        return settings

    def add_port(server: Any, address: str) -> int:
        return int(original(server, address.replace("[::]", "127.0.0.1")))

    add_port.only_loopback = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = add_port
    return settings


def _on_loopback() -> bool:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address == "127.0.0.1"


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
