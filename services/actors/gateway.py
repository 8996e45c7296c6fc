"""The doors as a deployment: on one machine with ports of their own, on a cluster behind Serve's proxy."""

from __future__ import annotations

import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from ray import serve

from services.actors.enter import enter_actor
from services.http.app import http_app
from services.http.observe import Reporter
from services.inference import Inference
from services.inferring import StoreInference
from services.manager import StreamManager
from services.ports import listen
from services.replicas import ServeReplicas, serve_jobs
from services.rpc.cluster import grpc_ingress
from services.rpc.open_inference import inference_service
from services.rpc.server import GrpcDoor, RpcService
from services.rpc.streams import stream_service
from services.settings import Settings
from services.store import open_store
from tsm_core.errors import WorldError


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
