"""Inference by engines of this process: a replica's own, or those of a test."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from typing_extensions import override

from services.inference import InferReply, InferRequest, ModelDescription, ModelNotReady, NotMine
from services.inferring import StoreInference
from services.request_form import description_of
from services.schemas import Lease
from services.sequences import Replicas
from services.settings import ModelSettings
from services.tracing import request_span

if TYPE_CHECKING:
    from services.engine import Engine

OPEN_S = 2.0  # a replica that was given a sequence has so long to open it
LOOK_S = 0.005


class LocalReplicas(Replicas):
    """Engines of this process."""

    def __init__(self, *engines: Engine) -> None:
        self._engines = {engine.id: engine for engine in engines}

    @override
    async def infer(self, request: InferRequest, owner: str | None = None) -> InferReply:
        engine = next(iter(self._engines.values())) if owner is None else self._engines.get(owner)
        if engine is None:
            raise ModelNotReady(f"there is no engine {owner} here")
        return await infer_here(engine, request)

    @override
    async def push(self, lease: Lease, token: str, request: InferRequest) -> InferReply:
        engine = self._engines.get(lease.owner)
        if engine is None:
            raise NotMine(f"there is no engine {lease.owner} here")
        return await push_when_open(engine, lease, token, request)


class LocalInference(StoreInference):
    """Inference by engines of this process, over their store: for tests, and where no Ray is wanted."""

    def __init__(self, *engines: Engine) -> None:
        super().__init__(engines[0].store, engines[0].settings, LocalReplicas(*engines))
        self._engines = engines

    @override
    def _describe(self, name: str, model: ModelSettings, *, ready: bool) -> ModelDescription:
        for engine in self._engines:
            if (served := engine.served.get(name)) is not None:
                return replace(description_of(served), ready=ready)
        return super()._describe(name, model, ready=ready)


async def infer_here(engine: Engine, request: InferRequest) -> InferReply:
    """The engine's answer to a request that stands alone. Raises what Engine.infer raises."""
    with request_span("infer", request.trace, model=request.model):
        return await asyncio.wrap_future(engine.infer(request))


async def push_when_open(engine: Engine, lease: Lease, token: str, request: InferRequest) -> InferReply:
    """The engine's answer to frames of a sequence; one that it was given just now may still have to be opened.

    Raises NotMine and what Engine.push raises.
    """
    until_s = time.monotonic() + OPEN_S
    while True:
        try:
            answer = engine.push(lease.stream_id, lease.epoch, token, request)
        except NotMine:
            if time.monotonic() > until_s or not engine.expects(lease):
                raise
            await asyncio.sleep(LOOK_S)
        else:
            with request_span("push", request.trace, model=request.model, stream=lease.stream_id):
                return await asyncio.wrap_future(answer)
