"""Writes the generated tables: README.md's settings and measured results, docs/zoo.md's rows, the metrics.

`python docs/tables.py` writes, `python docs/tables.py --check` fails when something is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, SecretStr

from services.settings import Settings
from services.telemetry import (
    DoorTelemetry,
    EngineFigures,
    Registered,
    SinkFigures,
    StreamFigures,
    Telemetry,
    Told,
    merge,
)
from tsm_core.cost import multiply_adds, parameters
from tsm_core.recipes import JESTER_ONLINE, MIT_ROWS, PAGE_ROWS, SUCCESSOR_ROWS, Accuracy, Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "benchmark" / "results"
PARITY = ROOT / "tests" / "assets" / "parity"
BACKBONES = {"resnet50": "ResNet-50", "resnet101": "ResNet-101", "mobilenet_v2": "MobileNetV2"}


def settings_table() -> str:
    """One row per knob: environment name, default, meaning."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for section, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        for name, knob in model.model_fields.items():
            value = knob.default
            if isinstance(value, tuple):
                value = ", ".join(getattr(item, "name", str(item)) for item in value)
            shown = "" if value is None or value == "" or isinstance(value, SecretStr) else f"`{value}`"
            lines.append(f"| `TSM_{section.upper()}__{name.upper()}` | {shown} | {knob.description} |")
    return "\n".join(lines)


def metrics_table() -> str:
    """One row per metric, as an exposition with everything in it has them."""
    stream = StreamFigures("door", "RUNNING", 15.0, 1, 1, {}, {}, 1.0)
    figures = EngineFigures(streams=(stream,), models=("motion9",), requests={"motion9": 0})
    replica, door = Telemetry(lambda: figures), DoorTelemetry("gateway")
    replica.models(["motion9"])
    replica.published("door", 0.1)
    door.http("GET", "/v1/streams", 200, 0.1)
    door.grpc("/tsm.v1.StreamService/GetStream", "OK", 0.1)
    texts = {"r": replica.text(), "g": door.text()}
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in text_string_to_metric_families(merge(texts, [Registered({}, 0), Told([SinkFigures("hook")])])):
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le", "replica"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(lines)


def results_table() -> str:
    """One block per result file that the benchmark wrote: machine, command, rows."""
    blocks = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if "table" not in result:
            continue
        header, *rows = result["table"]
        blocks.append(
            "\n".join(
                [
                    f"**{result['title']}** (`{result['command']}`; {result['machine']})",
                    "",
                    "| " + " | ".join(header) + " |",
                    "|" + "---|" * len(header),
                    *("| " + " | ".join(map(str, row)) + " |" for row in rows),
                ]
            )
        )
    return "\n\n".join(blocks) or "No results yet: run `make bench`."


def page_table() -> str:
    """The page's 36 rows: what was published, and what was checked here."""
    lines = [
        "| recipe | network | frames | trained on | top-1 / top-5, efficient | accurate | reference | weights "
        "| parameters: page, here | GMAC here | recorded logits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in PAGE_ROWS:
        page = row.published
        assert page is not None
        assert row.checkpoint is not None
        assert page.params is not None
        counted = parameters(row)
        same = "=" if counted == page.params else f"{counted:,}"
        views = "" if row.accurate == row.efficient else f" ({row.accurate})"
        reference = _shown(page.reference_accurate)
        lines.append(
            f"| `{row.name}` | {_network(row)} | {row.frames} | {' '.join(filter(None, (row.dataset, row.stored)))} "
            f"| {_shown(page.efficient)} | {_shown(page.accurate)}{views} | {reference} "
            f"| [`{row.checkpoint.sha256}`]({row.checkpoint.url}) | {page.params:,} {same} "
            f"| {multiply_adds(row) / 1e9:.1f} | {_parity(row)} |"
        )
    return "\n".join(lines)


def further_table() -> str:
    """Later and other published models."""
    lines = [
        "| recipe | network | frames | trained on | views | top-1 / top-5 | weights | parameters here |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (*SUCCESSOR_ROWS, *MIT_ROWS, JESTER_ONLINE):
        assert row.published is not None
        assert row.checkpoint is not None
        sha256 = f"`{row.checkpoint.sha256}`" if row.checkpoint.sha256 else "no hash"
        lines.append(
            f"| `{row.name}` | {_network(row)} | {row.frames} | {row.dataset} "
            f"| {'frame by frame' if row.steppable and row.shift == 'uni' else row.accurate} "
            f"| {_shown(row.published.accurate)} | [{sha256}]({row.checkpoint.url}) | {parameters(row):,} |"
        )
    return "\n".join(lines)


def _network(row: Recipe) -> str:
    plain = ", no shift" if row.shift == "none" else ", one way" if row.shift == "uni" else ""
    return (
        BACKBONES[row.backbone] + (f", non-local ({row.non_local.replace('_', ' ')})" if row.non_local else "") + plain
    )


def _shown(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    return " / ".join("x" if value is None else f"{value:g}" for value in (accuracy.top1, accuracy.top5))


def _parity(row: Recipe) -> str:
    """The recorded case of an original network of this row's shape."""
    short = {"resnet50": "r50", "resnet101": "r101", "mobilenet_v2": "mobilenetv2"}[row.backbone]
    kind = f"_nl_{row.non_local}" if row.non_local else ""
    found = sorted(PARITY.glob(f"*_{short}{kind}_{row.frames}f_*.json"))
    same = [path.stem for path in found if path.stem.split("_")[-1] == str(len(row.labels))]
    # a classifier of another size changes nothing else
    return same[0] if same else f"{found[0].stem}, other head" if found else "-"


PAGES = {
    ROOT / "README.md": {"settings": settings_table, "results": results_table},
    ROOT / "docs" / "zoo.md": {"page": page_table, "further": further_table},
    ROOT / "docs" / "observability.md": {"metrics": metrics_table},
}


def render(path: Path) -> str:
    """The page's text with every generated block replaced."""
    text = path.read_text()
    for name, table in PAGES[path].items():
        pattern = re.compile(rf"(<!-- {name}: generated by docs/tables.py -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{path.name} has no block named {name}")
        made = table()
        text = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> None:
    """Write the pages, or only compare with `--check`."""
    for path in PAGES:
        new = render(path)
        if new == path.read_text():
            continue
        if "--check" in sys.argv:
            raise SystemExit(f"{path.name} is out of date: run `make docs`")
        path.write_text(new)


if __name__ == "__main__":
    main()
