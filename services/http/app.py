"""The HTTP door: thin over StreamManager; errors are RFC 9457 problems with a stable `reason`."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from services.feed import Hub
from services.http.problems import ERRORS, BodyLimit, add_problems
from services.http.service import WEB, service_router
from services.http.sinks import sinks_router
from services.http.streams import streams_router
from services.manager import StreamManager
from services.settings import Settings


def http_app(manager: StreamManager, settings: Settings | None = None) -> FastAPI:
    """The application with every route of the contract, the page at `/` and problem+json for every error."""
    settings = settings or manager.settings
    hub = Hub(manager)
    app = FastAPI(
        title="tsm-live",
        version="1",
        summary="Live video analytics around the Temporal Shift Module.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.hub = hub
    app.add_middleware(BodyLimit, limit=settings.server.max_body_bytes)
    add_problems(app)
    app.include_router(streams_router(manager, hub))
    app.include_router(sinks_router(manager.store, settings))
    app.include_router(service_router(manager, hub, settings))
    app.mount("/static", StaticFiles(directory=WEB), name="static")
    return app
