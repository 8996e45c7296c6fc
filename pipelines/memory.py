"""Memory that is used again instead of given back to the system and fetched anew, page by page."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MOST_BYTES = (1 << 31) - 1  # as far as an int goes: never


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for its next allocations; whether its C library can (glibc's can).

    A training step frees and asks again for gigabytes; by default each of its large blocks comes from the system as
    pages that are cleared and mapped one by one, a fifth of the step.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MOST_BYTES) and mallopt(M_TRIM_THRESHOLD, MOST_BYTES))
