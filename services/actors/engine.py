"""The engine as a deployment."""

from __future__ import annotations

from typing import Any

from ray import serve

from services.actors.enter import enter_actor
from services.inference import InferRequest
from services.local_inference import infer_here, push_when_open
from services.replicas import Answer, answer_or_refusal, replica_name
from services.schemas import Lease
from services.settings import Settings
from services.store import open_store


class EngineReplica:
    """Shell around one Engine."""

    def __init__(self, given: Settings | dict[str, Any]) -> None:
        from services.engine import Engine  # torch is slow to import, and who deploys this needs none of it

        settings = enter_actor(given)
        replica_id = replica_name(serve.get_replica_context().replica_id.unique_id)
        self._store = open_store(settings.store)
        self._engine = Engine(settings, self._store, replica_id)
        self._engine.start()

    async def infer(self, request: InferRequest, owner: str | None = None) -> Answer:
        """The answer to a request that stands alone; owner tells Serve which replica is meant, if one is."""
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
