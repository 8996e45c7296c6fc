"""Inference over a store and replicas: what the doors are given, in a service or in a test."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from typing_extensions import override

from services.inference import (
    VERSION,
    Duration,
    Inference,
    InferReply,
    InferRequest,
    ModelDescription,
    ModelIndex,
    ModelInUse,
    ModelNotReady,
    ModelStatistics,
    RequestTimeout,
    UnknownModel,
)
from services.request_form import check_request, describe_model
from services.sequences import Replicas, Sequences
from services.settings import ModelSettings, Settings
from services.store import StateStore
from services.wanted import FAULTS, want, wanted_models
from tsm_core.detector_recipes import DetectorRecipe
from tsm_core.model_file import ModelFileError, read_card
from tsm_core.recipes import Recipe
from tsm_core.zoo import available_models, find_model

LOAD_S = 120.0
LOOK_S = 0.05
KNOWN_S = 0.5  # how long a gateway remembers which models are wanted


class StoreInference(Inference):
    """Inference by the replicas of a store; keeps nothing but memories, so any number may run."""

    def __init__(self, store: StateStore, settings: Settings, replicas: Replicas) -> None:
        self._store = store
        self._settings = settings
        self._replicas = replicas
        self._sequences = Sequences(store, replicas, self._check_request)
        self._wanted: Mapping[str, ModelSettings] = {}
        self._known_s = float("-inf")

    @override
    async def infer(self, request: InferRequest) -> InferReply:
        if request.sequence is not None:
            return await self._sequences.push(request)  # in the order they come: nothing is awaited before
        await self._known(request.model)
        try:
            async with asyncio.timeout(request.timeout_s):
                try:
                    return await self._replicas.infer(request)
                except ModelNotReady:  # others may hold it: it is being loaded, or unloaded, or that replica is gone
                    await asyncio.to_thread(self._check, request.model)
                    holding = await asyncio.to_thread(self._holding, request.model)
                    if not holding:
                        raise
                return await self._replicas.infer(request, random.choice(holding))
        except TimeoutError:
            raise RequestTimeout(
                f"{request.model} had no answer within {request.timeout_s:g} s; send less, or give it longer"
            ) from None

    @override
    async def models(self) -> Sequence[ModelDescription]:
        return await asyncio.to_thread(self._models)

    @override
    async def ready(self, name: str) -> bool:
        await self._known(name)
        return bool(await asyncio.to_thread(self._holding, name))

    @override
    async def statistics(self, name: str | None = None) -> Sequence[ModelStatistics]:
        if name is not None:
            await self._known(name)
        return await asyncio.to_thread(self._statistics, name)

    @override
    async def index(self) -> Sequence[ModelIndex]:
        return await asyncio.to_thread(self._index)

    @override
    async def load(self, name: str) -> None:
        await asyncio.to_thread(self._want, name)
        until_s = time.monotonic() + LOAD_S
        while not await asyncio.to_thread(self._holding, name):
            fault = await asyncio.to_thread(self._store.document, FAULTS, name)
            if fault is not None:
                raise ModelFileError(f"model {name!r} cannot be loaded: {fault}")
            if time.monotonic() > until_s:
                raise RequestTimeout(f"no replica has loaded model {name!r} within {LOAD_S:g} s; it goes on trying")
            await asyncio.sleep(LOOK_S)

    @override
    async def unload(self, name: str) -> None:
        await asyncio.to_thread(self._let_go, name)
        until_s = time.monotonic() + LOAD_S
        while await asyncio.to_thread(self._holding, name):
            if time.monotonic() > until_s:
                raise RequestTimeout(f"a replica still holds model {name!r} after {LOAD_S:g} s; it goes on trying")
            await asyncio.sleep(LOOK_S)

    # ---- what the store says

    async def _known(self, name: str) -> None:
        """Raises UnknownModel for a model that the replicas are not to hold."""
        if name not in self._wanted or time.monotonic() - self._known_s > KNOWN_S:
            await asyncio.to_thread(self._check, name)

    def _check(self, name: str) -> None:
        self._wanted = wanted_models(self._settings, self._store)
        self._known_s = time.monotonic()
        if name not in self._wanted:
            raise UnknownModel(f"model {name!r} is not served; served: {', '.join(sorted(self._wanted))}")

    def _check_request(self, request: InferRequest) -> None:
        self._check(request.model)
        check_request(request, self._describe(request.model, self._wanted[request.model], ready=True))

    def _held(self) -> set[str]:
        return {name for replica in self._store.replicas() if not replica.draining for name in replica.models}

    def _holding(self, name: str) -> list[str]:
        return [one.id for one in self._store.replicas() if not one.draining and name in one.models]

    def _models(self) -> list[ModelDescription]:
        held = self._held()
        return [
            self._describe(name, model, ready=name in held)
            for name, model in sorted(wanted_models(self._settings, self._store).items())
        ]

    def _describe(self, name: str, model: ModelSettings, *, ready: bool) -> ModelDescription:
        recipe = _recipe(find_model(name, model.path, [self._settings.models.folder]))
        window = isinstance(recipe, Recipe) and not recipe.steppable
        return describe_model(name, recipe, window=window, ready=ready)

    def _index(self) -> list[ModelIndex]:
        held, wanted = self._held(), wanted_models(self._settings, self._store)
        faults = self._store.documents(FAULTS)
        found = []
        for name in sorted({*available_models([self._settings.models.folder]), *wanted, *held}):
            if name in held:
                found.append(ModelIndex(name, VERSION, "READY"))
            elif name in faults:
                found.append(ModelIndex(name, VERSION, "UNAVAILABLE", faults[name]))
            elif name in wanted:
                found.append(ModelIndex(name, VERSION, "LOADING"))
            else:
                found.append(ModelIndex(name, VERSION, "UNAVAILABLE", "not loaded"))
        return found

    def _want(self, name: str) -> None:
        if name not in {model.name for model in self._settings.engine.models}:
            find_model(name, None, [self._settings.models.folder])
        want(self._store, name, wanted=True)

    def _let_go(self, name: str) -> None:
        wanted = wanted_models(self._settings, self._store)
        if name not in wanted:
            raise UnknownModel(f"model {name!r} is not served; served: {', '.join(sorted(wanted))}")
        if name == self._settings.engine.models[0].name:
            raise ModelInUse(f"model {name!r} is the one of streams that name none; it cannot be unloaded")
        using = [spec.id for spec in self._store.list_streams() if any(name == model.name for model in spec.models)]
        if using:
            more = f" and {len(using) - 3} more" if len(using) > 3 else ""
            raise ModelInUse(f"streams {', '.join(using[:3])}{more} name model {name!r}; delete or change them first")
        want(self._store, name, wanted=False)

    def _statistics(self, name: str | None) -> list[ModelStatistics]:
        names = [name] if name is not None else sorted(wanted_models(self._settings, self._store))
        sums = _sums(self._store.metrics())

        def duration(metric: str, model: str, **labels: str) -> Duration:
            key = (model, labels.get("result", ""))
            return Duration(round(sums[f"{metric}_count", *key]), sums[f"{metric}_sum", *key])

        return [
            ModelStatistics(
                name=model,
                version=VERSION,
                inference_count=round(sums["inference_count_total", model, ""]),
                execution_count=round(sums["inference_exec_count_total", model, ""]),
                success=duration("inference_request_duration_seconds", model, result="success"),
                fail=duration("inference_request_duration_seconds", model, result="failure"),
                queue=duration("inference_queue_duration_seconds", model),
                compute_input=duration("inference_compute_input_duration_seconds", model),
                compute_infer=duration("inference_compute_infer_duration_seconds", model),
                compute_output=duration("inference_compute_output_duration_seconds", model),
            )
            for model in names
        ]


def _sums(texts: Mapping[str, str]) -> Counter[tuple[str, str, str]]:
    """(metric, model, result) -> the sum over the expositions of all replicas."""
    sums: Counter[tuple[str, str, str]] = Counter()
    for text in texts.values():
        for family in text_string_to_metric_families(text):
            if not family.name.startswith("inference_"):
                continue
            for sample in family.samples:
                if "model" in sample.labels and "le" not in sample.labels:
                    key = (sample.name, sample.labels["model"], sample.labels.get("result", ""))
                    sums[key] += sample.value  # type: ignore[assignment]
    return sums


def _recipe(path: Path) -> Recipe | DetectorRecipe:
    return _card(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _card(path: Path, _: int) -> Recipe | DetectorRecipe:
    return read_card(path)[0]
