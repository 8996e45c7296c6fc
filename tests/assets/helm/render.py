"""Renders charts with Helm's own engine, in a process of its own: the engine is a Go library.

stdin: JSON list of [chart's folder, values]. stdout: JSON list of {"files": {template: text}} or {"error": text}.
"""

from __future__ import annotations

import json
import sys

import helm_python as helm


def render(folder: str, values: dict) -> dict:
    try:
        found = helm.lint(folder, values)
        if found["errors"]:
            return {"error": "; ".join(found["errors"])}
        with helm.Chart.load(folder) as chart:
            chart.validate_schema(values)
            return {"files": chart.render(values, name="demo", namespace="cameras")}
    except helm.HelmError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    json.dump([render(folder, values) for folder, values in json.load(sys.stdin)], sys.stdout)
