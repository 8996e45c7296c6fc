"""The controller and the couriers as a deployment."""

from __future__ import annotations

from typing import Any

from ray import serve

from services.actors.enter import enter_actor
from services.controller import Controller
from services.couriers.office import Couriers
from services.settings import Settings
from services.store import open_store
from tsm_core.errors import WorldError


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
