"""The HTTP door: thin over StreamManager; errors are RFC 9457 problems with a stable `reason`."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from services.feed import Hub
from services.http.guard import Guard
from services.http.jobs import FORM_BYTES, JOBS_PATH, jobs_router
from services.http.login import login_router
from services.http.observe import Observed, known_routes
from services.http.open_inference import INFER_PATH, InferenceErrors, open_inference_router
from services.http.problems import ERRORS, BodyLimit, add_problems
from services.http.service import WEB, service_router
from services.http.sinks import sinks_router
from services.http.streams import streams_router
from services.inference import Inference
from services.jobs import JobsDoor
from services.locks.callers import Locks
from services.manager import StreamManager
from services.settings import Settings
from services.telemetry import DoorTelemetry


def http_app(
    manager: StreamManager,
    settings: Settings | None = None,
    inference: Inference | None = None,
    gateway_id: str = "gateway",
    jobs: JobsDoor | None = None,
) -> FastAPI:
    """The application with every route of the contract, the page at `/` and problem+json for every error.

    gateway_id: what its metrics call it, as `replica`.
    """
    settings = settings or manager.settings
    hub = Hub(manager)
    locks = Locks(manager.store, settings)
    telemetry = DoorTelemetry(gateway_id)
    app = FastAPI(
        title="tsm-live",
        version="1",
        summary="Live video analytics around the Temporal Shift Module.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.hub = hub
    app.state.locks = locks
    app.state.telemetry = telemetry
    app.add_middleware(
        BodyLimit,
        limit=settings.server.max_body_bytes,
        larger={
            INFER_PATH: (settings.server.max_infer_bytes, "server.max_infer_bytes"),
            JOBS_PATH: (settings.limits.video_bytes + FORM_BYTES, "limits.video_bytes"),
        },
    )
    app.add_middleware(Guard, api=app, locks=locks, settings=settings)
    app.add_middleware(InferenceErrors)
    app.add_middleware(Observed, api=app, telemetry=telemetry)
    add_problems(app)
    app.include_router(streams_router(manager, hub))
    app.include_router(sinks_router(manager.store, settings))
    app.include_router(service_router(manager, hub, settings, telemetry))
    app.include_router(login_router(locks, settings))
    if jobs is not None:
        app.include_router(jobs_router(manager, jobs))
    if inference is not None:
        app.include_router(open_inference_router(inference, settings.server.max_infer_bytes))
    app.mount("/static", StaticFiles(directory=WEB), name="static")
    telemetry.routes(known_routes(app))
    return app
