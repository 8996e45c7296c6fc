"""How many engine replicas a cluster needs: Serve counts requests, and an engine's load is its streams."""

from __future__ import annotations

import math
from typing import Any


class SlotsInUse:
    """Serve's autoscaling policy for the Engine: replicas so that a share `target` of their slots is taken.

    The rest is room for streams that are registered while a replica starts; a stream that finds no slot is refused.
    Delays and limits are Serve's own (`upscale_delay_s`, `min_replicas`, ...).
    """

    def __init__(self, target: float = 0.7) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target is a share of the slots, above 0 and at most 1, got {target}")
        self._target = target

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Called by Serve with what the replicas report: how many there should be, and nothing to remember."""
        used = sum(ctx.aggregated_metrics.get("slots_used", {}).values())
        totals = ctx.aggregated_metrics.get("slots_total", {}).values()
        if not totals:  # none has reported yet
            return ctx.target_num_replicas, {}
        return max(1, math.ceil(round(used / (max(totals) * self._target), 6))), {}
