"""What is seen of the real service: no query of the dashboard or the alerts is empty, and its actors' log lines."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipelines.simulator import SimulatorProcess, start_simulator
from tests.integration.conftest import RunningService

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "tsm-live.json").read_text())
ALERTS = yaml.safe_load((ROOT / "helm" / "tsm-live" / "files" / "alerts.yaml").read_text())
VARIABLES = {"$stream": ".*", "$__rate_interval": "30s"}
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def cameras() -> Iterator[SimulatorProcess]:
    with start_simulator({f"seen{n}": f"scene:{n}" for n in range(2)}) as simulator:
        yield simulator


@pytest.fixture
def streams(service: RunningService, cameras: SimulatorProcess) -> Iterator[list[str]]:
    names = ["seen-0", "seen-1"]
    for name, url in zip(names, cameras.urls, strict=True):
        service.add(name, url)
    yield names
    for name in names:
        service.http.delete(f"/v1/streams/{name}")


@pytest.fixture
def prometheus(service: RunningService, tmp_path: Path) -> Iterator[httpx.Client]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on the path; on Debian: apt-get install prometheus")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "tsm-live", "static_configs": [{"targets": [service.url.removeprefix("http://")]}]}
        ],
    }
    (tmp_path / "prometheus.yaml").write_text(json.dumps(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        program,
        f"--config.file={tmp_path / 'prometheus.yaml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10.0, trust_env=False) as http:
            service.wait(lambda: _ready(http, process, tmp_path), 30, "Prometheus is up")
            yield http
    finally:
        process.terminate()
        process.wait(20)


def _ready(http: httpx.Client, process: subprocess.Popen[bytes], folder: Path) -> bool:
    assert process.poll() is None, (folder / "log").read_text()[-2000:]
    try:
        return http.get("/-/ready").is_success
    except httpx.TransportError:
        return False


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """What Prometheus is asked, by who asks; an alert's without the comparison that makes it fire."""
    found = {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels() for target in panel["targets"]}
    for rule in (rule for group in ALERTS["groups"] for rule in group["rules"]):
        expr, replaced = re.subn(r"\s*(==|>|<)\s*[\d.]+\s*$", "", rule["expr"])
        assert replaced == 1, rule["expr"]
        found[rule["alert"]] = expr
    for variable, value in VARIABLES.items():
        found = {who: expr.replace(variable, value) for who, expr in found.items()}
    return found


def ask(prometheus: httpx.Client, expr: str) -> list[dict[str, Any]]:
    answer = prometheus.get("/api/v1/query", params={"query": expr})
    assert answer.is_success, f"{expr}: {answer.text}"
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def test_every_panel_and_every_alert_has_data(
    service: RunningService, streams: list[str], prometheus: httpx.Client
) -> None:
    for name in streams:
        service.wait(lambda name=name: service.status(name)["checkpoint_age_s"] is not None, 30, f"{name} is saved")
    waiting = queries()
    assert len(waiting) > 50

    def all_told() -> bool:
        for who in [who for who, expr in waiting.items() if ask(prometheus, expr)]:
            del waiting[who]
        return not waiting

    try:
        service.wait(all_told, 60, "data")
    except AssertionError:
        pytest.fail(f"no data for {json.dumps(waiting, indent=1)}")

    # and what is told is what is; streams of other tests go with the next scrapes
    def fps() -> dict[str, float]:
        rows = ask(prometheus, "sum by (stream) (stream_fps)")
        return {row["metric"]["stream"]: float(row["value"][1]) for row in rows}

    service.wait(lambda: set(fps()) == set(streams) and min(fps().values()) > 1, 20, "two streams with frames")
    stages = {row["metric"]["stage"] for row in ask(prometheus, "stage_duration_seconds_count > 0")}
    assert stages == {"connect", "queue", "preprocess", "infer", "track", "publish"}


def test_the_engines_lines_come_out_of_the_service(service: RunningService, streams: list[str]) -> None:
    opened = re.compile(r"INFO engine-\S+ services\.engine: seen-(\d): epoch \d+, cold start")
    service.wait(lambda: set(opened.findall(service.log.read_text())) == {"0", "1"}, 30, "a line for each stream")


def test_the_dashboard_is_one_that_grafana_can_lay_out() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("tsm-live", "tsm-live")
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "stream"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        "Service", "Streams", "Latency and stages", "State", "Inference requests", "Store and publishing"
    ]  # fmt: skip
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"], panel["title"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert set(re.findall(r"\$\w+", json.dumps(panel["targets"]))) <= {*VARIABLES, "$datasource"}
