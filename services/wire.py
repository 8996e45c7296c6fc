"""What everything on the wire has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

StreamId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$", examples=["door-1"])]


class Wire(BaseModel):
    """Base of everything on the wire: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
