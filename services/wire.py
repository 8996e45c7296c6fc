"""What everything on the wire has in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

StreamId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$", examples=["door-1"])]


def list_of(count: int, **item: Any) -> WithJsonSchema:
    """How JSON schema says a tuple of like items: as a list, which makers of clients know, unlike `prefixItems`."""
    return WithJsonSchema({"type": "array", "items": item, "minItems": count, "maxItems": count})


Size = Annotated[tuple[int, int], list_of(2, type="integer")]  # width, height in pixels


class Wire(BaseModel):
    """Base of everything on the wire: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
