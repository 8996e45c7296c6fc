"""Writes helm/tsm-live/values.schema.json: the chart's values, and under `config` the service's own settings.

`python helm/make_schema.py` writes, `--check` fails when it is out of date. A value's type is that of its default;
`{}` takes any keys, every other mapping only those it has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from services.settings import Settings

CHART = Path(__file__).resolve().parent / "tsm-live"
SCHEMA = CHART / "values.schema.json"

# what the chart itself decides, or what must not stand in plain text
NOT_OURS = {
    "server": ("host", "port", "grpc_port", "grpc_reflection"),
    "auth": ("required", "admin_token", "viewer_token"),
    "store": ("url", "state_url", "data_dir", "encryption_key", "encryption_key_file", "encryption_keys_old"),
}
# what a default does not tell
FURTHER: dict[str, dict[str, Any]] = {
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "redis.image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "upgrade.strategy": {"enum": ["NewCluster", "None"]},
    "rayVersion": {"pattern": r"^\d+\.\d+\.\d+$"},
    "autoscaling.minReplicas": {"minimum": 1},
    "autoscaling.maxReplicas": {"minimum": 1},
    "autoscaling.targetSlots": {"exclusiveMinimum": 0, "maximum": 1},
    "drainSeconds": {"minimum": 5},
    "gateway.replicas": {"minimum": 1},
    "externalRedis.port": {"minimum": 1, "maximum": 65535},
    "externalRedis.database": {"minimum": 1},
    "training.name": {"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 10},
    "training.workers": {"minimum": 1},
    "training.work.uri": {"pattern": "^([a-z0-9]+://.+)?$"},
}
# mappings that take further keys of the same kind
OPEN = {
    "workerGroups": "workerGroups.cpu",
}
# mappings that Kubernetes defines
KUBERNETES = ("resources", "stateResources", "podSecurityContext", "securityContext", "annotations")


def of_value(value: Any, path: str) -> dict[str, Any]:
    """The schema of a value with this default."""
    further = FURTHER.get(path, {})
    if isinstance(value, bool):
        return {"type": "boolean", **further}
    if isinstance(value, int):
        return {"type": "integer", "minimum": 0, **further}
    if isinstance(value, float):
        return {"type": "number", **further}
    if isinstance(value, str):
        return {"type": "string", **further}
    if isinstance(value, list):
        return {"type": "array", **further}
    if not value or path.rpartition(".")[2] in KUBERNETES:
        return {"type": "object", **further}
    made = {
        "type": "object",
        "properties": {key: of_value(one, f"{path}.{key}".strip(".")) for key, one in value.items()},
    }
    if path in OPEN:
        return {**made, "additionalProperties": of_value(value[OPEN[path].rpartition(".")[2]], OPEN[path])}
    return {**made, "additionalProperties": False}


def of_settings() -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings' schema without what is the chart's, and its definitions."""
    schema = Settings.model_json_schema()
    definitions: dict[str, Any] = schema.pop("$defs")
    for section, names in NOT_OURS.items():
        reference = schema["properties"][section]
        there = definitions[reference["$ref"].rpartition("/")[2]]
        for name in names:
            del there["properties"][name]
    for each in (*schema["properties"].values(), *definitions.values()):
        each.pop("default", None)
        for knob in each.get("properties", {}).values():
            knob.pop("format", None)  # of paths and passwords
    return schema, definitions


def values_schema() -> str:
    """The file's text."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = of_value(values, "")
    settings, definitions = of_settings()
    settings.pop("title", None)
    schema["properties"] |= {"config": settings, "global": {"type": "object"}}
    whole = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "tsm-live", **schema, "$defs": definitions}
    return json.dumps(whole, indent=1) + "\n"


def main() -> None:
    """Write the file, or only compare with `--check`."""
    made = values_schema()
    if SCHEMA.is_file() and SCHEMA.read_text() == made:
        return
    if "--check" in sys.argv:
        raise SystemExit(f"{SCHEMA.name} is out of date: run `make docs`")
    SCHEMA.write_text(made)


if __name__ == "__main__":
    main()
