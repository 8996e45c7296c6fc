"""Sinks of events, for those who look after them."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field

from services.couriers.office import SinkView, order_redelivery, sink_views
from services.settings import Settings
from services.store import StateStore
from services.wire import Wire

ADMIN = {"x-tsm-role": "admin"}


class SinkList(Wire):
    """The sinks of the settings."""

    sinks: list[SinkView]


class Redelivery(Wire):
    """Dead letters that are tried again."""

    dead_letters: int = Field(description="how many there are; those that are refused again stay")


def sinks_router(store: StateStore, settings: Settings) -> APIRouter:
    """The routes below /v1/sinks."""
    router = APIRouter(prefix="/v1", tags=["events"])

    @router.get("/sinks", summary="Webhooks and broker: how far they are", openapi_extra=ADMIN)
    def sinks() -> SinkList:
        return SinkList(sinks=sink_views(store, settings))

    @router.post(
        "/sinks/{name}/redeliver", status_code=202, summary="Try a sink's dead letters again", openapi_extra=ADMIN
    )
    def redeliver(name: str) -> Redelivery:
        return Redelivery(dead_letters=order_redelivery(store, settings, name))

    return router
