"""What the chart gives to Ray Serve, deployed to a cluster on loopback the way KubeRay does it."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.test_train import Cluster, free_port

ROOT = Path(__file__).resolve().parents[2]
DEPLOY_S = 200.0  # a minute where nothing else runs


@pytest.fixture
def serve_config() -> dict[str, Any]:
    """The chart's, with autoscaling."""
    pytest.importorskip("helm_python", reason="Helm's engine has no package for this platform")
    values = {
        "autoscaling": {"enabled": True, "minReplicas": 1, "maxReplicas": 2},
        "gateway": {"replicas": 1},
        "config": {"engine": {"replicas": 1, "slots": 3}, "store": {"prefix": "chart:"}},
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "assets" / "helm" / "render.py")],
        input=json.dumps([[str(ROOT / "helm" / "tsm-live"), values]]),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    manifest = yaml.safe_load(json.loads(done.stdout)[0]["files"]["tsm-live/templates/rayservice.yaml"])
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    return config


@pytest.fixture
def cluster(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("TSM_STORE__URL", valkey_url)
    monkeypatch.setenv("TSM_STORE__ENCRYPTION_KEY", base64.b64encode(bytes(range(32))).decode())
    folder = Path(tempfile.mkdtemp(prefix="tsm-", dir="/tmp"))
    found = Cluster(folder)
    try:
        found.ready()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(600)
def test_the_charts_deployment_serves(serve_config: dict[str, Any], cluster: Cluster, valkey_url: str):
    deployed = httpx.put(f"{cluster.url}/api/serve/applications/", json=serve_config, timeout=DEPLOY_S)
    assert deployed.is_success, deployed.text
    began_s, app = time.monotonic(), {}
    while app.get("status") != "RUNNING":
        assert app.get("status") != "DEPLOY_FAILED", json.dumps(app)[-3000:]
        assert time.monotonic() - began_s < DEPLOY_S, json.dumps(app)[-3000:]
        time.sleep(0.5)
        with contextlib.suppress(httpx.HTTPError):
            details = httpx.get(f"{cluster.url}/api/serve/applications/", timeout=30).json()
            app = details["applications"].get("tsm", {})
    url = f"http://127.0.0.1:{serve_config['http_options']['port']}"
    with httpx.Client(base_url=url, timeout=30.0, trust_env=False) as http:
        assert http.get("/-/healthz").text == "success", "what the operator's probe asks"
        until_s = time.monotonic() + 20
        while not (health := http.get("/healthz")).is_success:
            assert time.monotonic() < until_s, health.text
            time.sleep(0.2)
        (replica,) = http.get("/v1/replicas").json()["replicas"]
        assert replica["slots_total"] == 3, "the chart's settings are the engine's"
        assert http.get("/v1/streams/nobody").json()["reason"] == "stream_not_found"
        with http.stream("GET", "/v1/events", headers={"Accept": "text/event-stream"}) as feed:
            assert next(feed.iter_lines()) == ": open", "feeds come through Serve's proxy"
    assert valkey_url not in json.dumps(details), "the store's address is none of Ray's business"
