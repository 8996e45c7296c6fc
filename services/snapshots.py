"""A stream's shift state and all that belongs to it, as bytes that another replica can go on from.

Layout, little endian: `TSMS`, version (u8), length of the header (u32), header (JSON), then one run of fp16 values per
slot in the header's order. Nothing in it can execute code.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tsm_core.errors import WorldError

MAGIC = b"TSMS"
VERSION = 2
_PREFIX = struct.Struct("<4sBI")


class SnapshotError(WorldError):
    """Saved bytes are no snapshot that this version can read; the stream starts cold."""

    reason = "snapshot_unreadable"


@dataclass(frozen=True, slots=True)
class ModelState:
    """What one model remembers of a stream in one slot.

    schema names the weights and the layout of the state: it fits that very model only. state fp16 (values,), on the
    CPU. steps counts the frames it has seen. memory is what is known beside the state, JSON values. subject is the
    tracked object that the slot belongs to; empty: the stream itself.
    """

    name: str
    schema: str
    steps: int
    state: Tensor
    memory: Mapping[str, Any] = field(default_factory=dict)
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stream at one frame, the last one inside the state. source tells one camera from another.

    memory is what is known beside the models' states, JSON values.
    """

    stream_id: str
    epoch: int
    source: str
    frame_number: int
    time_s: float
    pts_s: float
    received: int
    processed: int
    dropped: Mapping[str, int]
    models: tuple[ModelState, ...]
    memory: Mapping[str, Any] = field(default_factory=dict)


def sha256(blob: bytes) -> str:
    """Hex digest by which a saved and a restored blob are compared."""
    return hashlib.sha256(blob).hexdigest()


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Bytes for the store."""
    header = {
        "stream_id": snapshot.stream_id,
        "epoch": snapshot.epoch,
        "source": snapshot.source,
        "frame_number": snapshot.frame_number,
        "time_s": snapshot.time_s,
        "pts_s": snapshot.pts_s,
        "received": snapshot.received,
        "processed": snapshot.processed,
        "dropped": dict(snapshot.dropped),
        "memory": dict(snapshot.memory),
        "models": [
            {
                "name": model.name,
                "schema": model.schema,
                "steps": model.steps,
                "values": model.state.numel(),
                "memory": model.memory,
                "subject": model.subject,
            }
            for model in snapshot.models
        ],
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    states = [model.state.to("cpu", torch.float16).contiguous().numpy().tobytes() for model in snapshot.models]
    return b"".join([_PREFIX.pack(MAGIC, VERSION, len(head)), head, *states])


def decode_snapshot(blob: bytes) -> Snapshot:
    """The snapshot in these bytes. Raises SnapshotError when they are cut off, garbage or of another version."""
    try:
        magic, version, length = _PREFIX.unpack_from(blob)
        if magic != MAGIC or version != VERSION:
            raise SnapshotError(f"saved state begins with {magic!r} version {version}, expected {MAGIC!r} {VERSION}")
        start = _PREFIX.size + length
        header = json.loads(blob[_PREFIX.size : start])
        sizes = [int(model["values"]) for model in header["models"]]
        if len(blob) != start + 2 * sum(sizes):
            raise SnapshotError(f"saved state has {len(blob)} bytes, expected {start + 2 * sum(sizes)}")
        models = []
        for model, values in zip(header["models"], sizes, strict=True):
            state = torch.empty(values, dtype=torch.float16)
            if values:
                state = torch.frombuffer(bytearray(blob[start : start + 2 * values]), dtype=torch.float16)
            start += 2 * values
            models.append(
                ModelState(
                    str(model["name"]),
                    str(model["schema"]),
                    int(model["steps"]),
                    state,
                    model["memory"],
                    str(model["subject"]),
                )
            )
        return Snapshot(
            stream_id=str(header["stream_id"]),
            epoch=int(header["epoch"]),
            source=str(header["source"]),
            frame_number=int(header["frame_number"]),
            time_s=float(header["time_s"]),
            pts_s=float(header["pts_s"]),
            received=int(header["received"]),
            processed=int(header["processed"]),
            dropped={str(reason): int(count) for reason, count in header["dropped"].items()},
            models=tuple(models),
            memory=dict(header.get("memory", {})),
        )
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"saved state is damaged: {type(error).__name__}: {error}") from None
