"""What every actor of the service does first."""

from __future__ import annotations

import importlib
from typing import Any

import ray
from ray import serve

from services import logs, tracing
from services.settings import Settings, load_settings


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
