"""The engine replicas as a gateway calls them through Ray Serve: any of them, or the owner of a sequence."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica
from typing_extensions import override

from services.inference import InferReply, InferRequest, ModelBusy, ModelNotReady, NotMine
from services.jobs import JobsDoor, JobsDown
from services.schemas import Lease
from services.sequences import Replicas
from tsm_core.errors import TSMError

MAX_CALLS = 4096  # at one replica at once: its own queues are what bounds the work
PREFIX = "engine-"


def replica_name(unique_id: str) -> str:
    """What the store calls the replica that Serve gave this id."""
    return PREFIX + unique_id


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error of ours on its way between two processes: Ray would wrap it, and forget its reason."""

    kind: type[TSMError]
    reason: str
    text: str


Answer = InferReply | Refusal
T = TypeVar("T")


async def answer_or_refusal(work: Awaitable[T]) -> T | Refusal:
    """The result of the work, or the error of ours that it raised."""
    try:
        return await work
    except TSMError as error:
        return Refusal(type(error), error.reason, str(error))


class OwnerRouter(FIFOMixin, RequestRouter):
    """Sends a call with the keyword `owner` to that replica, and others to whichever has fewest calls.

    An owner that is gone is answered for by another replica, who says that it does not own the stream.
    """

    @override
    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Serve."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        owner = pending_request.kwargs.get("owner")
        mine = [one for one in candidate_replicas if replica_name(one.replica_id.unique_id) == owner]
        return [mine or candidate_replicas]


class ServeReplicas(Replicas):
    """Replicas behind a Serve handle."""

    def __init__(self, engine: Any) -> None:
        """engine: the handle of the Engine deployment."""
        self._engine = engine.options(_by_reference=False)  # a frame by value takes a third of the time

    @override
    async def infer(self, request: InferRequest, owner: str | None = None) -> InferReply:
        try:
            return _reply(await self._engine.infer.remote(request, owner=owner))
        except (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError):
            raise ModelNotReady(f"the replica that worked on {request.model} is gone; try again") from None
        except BackPressureError:
            raise ModelBusy("every replica has as many requests as it takes; try again in a moment") from None

    @override
    async def push(self, lease: Lease, token: str, request: InferRequest) -> InferReply:
        try:
            return _reply(await self._engine.push.remote(lease, token, request, owner=lease.owner))
        except (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError, BackPressureError):
            raise NotMine(f"{lease.owner} is gone or does not answer") from None


def serve_jobs(handle: Any) -> JobsDoor:
    """The runner of jobs behind a Serve handle."""

    async def call(verb: str, *args: Any) -> Any:
        try:
            return _checked(await handle.call.remote(verb, *args))
        except (ActorDiedError, ActorUnavailableError, DeploymentUnavailableError, BackPressureError):
            raise JobsDown("the process that runs jobs does not answer; try again in a moment") from None

    return JobsDoor(call)


def _reply(answer: Answer) -> InferReply:
    reply: InferReply = _checked(answer)
    return reply


def _checked(answer: Any) -> Any:
    """An answer that is no refusal; raises the error that a refusal stands for."""
    if isinstance(answer, Refusal):
        raise answer.kind(answer.text, reason=answer.reason)
    return answer
