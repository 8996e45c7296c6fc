"""Every route under generated requests, good and bad: no crash, and every answer as OpenAPI tells it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from services.http.app import http_app
from services.jobs import JobRunner, local_jobs
from services.locks.tokens import Tokens
from services.manager import StreamManager
from services.schemas import ReplicaInfo
from services.settings import AuthSettings, JobsSettings, Settings, SourceSettings, StoreSettings
from services.store import MemoryStore
from tests.unit.services.http_kit import MODELS, serving
from tests.unit.services.inference_kit import ColourInference

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(address, OpenAPI document, an admin's token) of a door with everything behind it."""
    found = Settings(
        auth=AuthSettings(required="always", requests_per_s=1e6, requests_burst=1_000_000, failures_per_min=1e6),
        jobs=JobsSettings(dir=tmp_path_factory.mktemp("jobs")),
        source=SourceSettings(probe_timeout_s=0.05),
    )
    store = MemoryStore(StoreSettings())
    store.heartbeat(ReplicaInfo(id="engine-1", pid=1, slots_total=1000, slots_used=0, models=("motion9",)), 10**8)
    manager = StreamManager(store, found, models=MODELS)
    behind: dict[str, Any] = {"inference": ColourInference(), "jobs": local_jobs(JobRunner(store, found, "runner-1"))}
    _, token = Tokens(store).create("fuzz", "admin")
    document = http_app(manager, **behind).openapi()
    with serving(manager, **behind) as url:
        yield url, document, token


def fuzz(door: tuple[str, dict[str, Any], str], examples: int) -> list[str]:
    """What was wrong, as `METHOD path: what`; after so many requests of either kind per operation."""
    url, document, token = door
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    headers = {"Authorization": f"Bearer {token}"}
    wrong = []
    for found in schema.get_all_operations():
        operation = found.ok()
        # a path alone cannot be wrong: it is another path then
        bad = operation.query or operation.body
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if bad else (GenerationMode.POSITIVE,):

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
                derandomize=True,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                case.call_and_validate(headers=headers, checks=CHECKS, timeout=60)

            try:
                ask()
            except Unsatisfiable:
                continue  # nothing in this request can be wrong
            except (Exception, BaseExceptionGroup) as errors:  # noqa: BLE001  all that is wrong is listed
                wrong.append(f"{operation.method.upper()} {operation.path} {mode.value}: {errors}"[:900])
    return wrong


def test_nothing_breaks_and_openapi_is_kept(door: tuple[str, dict[str, Any], str]) -> None:
    assert fuzz(door, 4) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_breaks_under_many_requests(door: tuple[str, dict[str, Any], str]) -> None:
    assert fuzz(door, 100) == []
