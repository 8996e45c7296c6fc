"""What was found on a frame, inside the frame's own JPEG: whoever shows the picture can draw its very boxes.

A comment segment holds it as JSON; programs that know nothing of it show the picture alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

MOST_BYTES = 60_000  # a segment of a JPEG holds 65,533


def overlay(number: int, records: Iterable[Mapping[str, Any]]) -> bytes | None:
    """The objects of one frame with what is recognised of each, best first; None when no detector looked at it.

    records: what the models of a stream said of frame `number`. {"number", "size": [width, height] that boxes are in,
    "objects": [{"model", "track_id", "label", "score", "box", "zones", "loitering", "actions": [{"model", "label",
    "score"}]}]}. Of more objects than fit into a JPEG the best are left.
    """
    size, objects, actions = None, [], dict[str, list[dict[str, Any]]]()
    for record in records:
        if "objects" in record:
            size = record["size"]
            objects += [{"model": record["model"], **found} for found in record["objects"]]
        elif "track_id" in record:
            said = {name: record[name] for name in ("model", "label", "score")}
            actions.setdefault(record["track_id"], []).append(said)
    if size is None:
        return None
    objects.sort(key=lambda found: -found["score"])
    for found in objects:
        found["actions"] = actions.get(found["track_id"], [])
    while True:
        text = json.dumps({"number": number, "size": size, "objects": objects}, separators=(",", ":")).encode()
        if len(text) <= MOST_BYTES:
            return text
        objects = objects[: len(objects) * MOST_BYTES // len(text)]
