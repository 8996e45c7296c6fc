"""The job runner as a deployment."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from ray import serve

from services.actors.enter import enter_actor
from services.jobs import JobRunner
from services.replicas import answer_or_refusal
from services.settings import Settings
from services.store import open_store
from tsm_core.errors import WorldError

JOBS_NICE = 10


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
