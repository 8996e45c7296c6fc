"""What the chart gives to Ray Serve, deployed to a cluster on loopback the way KubeRay does it."""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import yaml

from services.rpc.tsm.v1 import streams_pb2 as pb
from services.rpc.tsm.v1.streams_pb2_grpc import StreamServiceStub
from tests.integration.ray_kit import Cluster, free_port, ray_cluster

ROOT = Path(__file__).resolve().parents[2]
DEPLOY_S = 400.0  # a minute where nothing else runs
TOKEN = "t0ken-" + 32 * "c"
OWN = {"authorization": f"Bearer {TOKEN}"}


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
    config["grpc_options"]["port"] = free_port()
    return config


@pytest.fixture
def cluster(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("TSM_STORE__URL", valkey_url)
    monkeypatch.setenv("TSM_STORE__ENCRYPTION_KEY", base64.b64encode(bytes(range(32))).decode())
    monkeypatch.setenv("TSM_AUTH__ADMIN_TOKEN", TOKEN)
    with ray_cluster() as found:
        yield found


@pytest.mark.timeout(900)
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
    with httpx.Client(base_url=url, timeout=30.0, trust_env=False, headers=OWN) as http:
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
    assert TOKEN not in json.dumps(details)
    target = f"127.0.0.1:{serve_config['grpc_options']['port']}"
    with grpc.insecure_channel(target) as channel:
        streams_over_grpc(StreamServiceStub(channel))
    frames_over_grpc(target)


def streams_over_grpc(streams: StreamServiceStub) -> None:
    """Register, look, listen and remove through Serve's proxy."""
    known: dict[str, Any] = {"metadata": tuple(OWN.items()), "timeout": 30}
    stream = pb.Stream(id="on-cluster", source=pb.Source(uri="rtsp://127.0.0.1:9/x"))
    with pytest.raises(grpc.RpcError) as stranger:
        streams.GetStream(pb.GetStreamRequest(stream_id="on-cluster"), timeout=30)
    assert stranger.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert dict(stranger.value.trailing_metadata())["reason"] == "token_required"
    assert streams.CreateStream(pb.CreateStreamRequest(stream=stream, probe=False), **known).id == "on-cluster"
    with pytest.raises(grpc.RpcError) as twice:
        streams.CreateStream(pb.CreateStreamRequest(stream=stream, probe=False), **known)
    assert twice.value.code() == grpc.StatusCode.ALREADY_EXISTS
    watched = streams.WatchStreams(pb.WatchStreamsRequest(stream_ids=["on-cluster"]), **known)
    heard = streams.ReceiveEvents(pb.ReceiveEventsRequest(stream_ids=["on-cluster"], earliest=True), **known)
    assert next(watched).stream.id == "on-cluster"
    assert next(one for one in heard if one.HasField("event")).event.sequence == 1
    streams.DeleteStream(pb.DeleteStreamRequest(stream_id="on-cluster"), **known)
    assert [one.deleted for one in watched if one.HasField("deleted")] == ["on-cluster"]
    assert [one.gone for one in heard if one.HasField("gone")] == ["on-cluster"], "feeds end with their stream"
    with pytest.raises(grpc.RpcError) as unseen:
        next(streams.WatchStreams(pb.WatchStreamsRequest(stream_ids=["on-cluster"]), **known))
    assert unseen.value.code() == grpc.StatusCode.NOT_FOUND


def frames_over_grpc(target: str) -> None:
    """Recognise a frame, and push a sequence over a call in both directions, through Serve's proxy."""
    frame = np.zeros((1, 64, 64, 3), np.uint8)
    tensor = tritonclient.grpc.InferInput("frame", frame.shape, "UINT8")
    tensor.set_data_from_numpy(frame)
    with tritonclient.grpc.InferenceServerClient(target) as client:
        assert client.is_model_ready("motion9", headers=OWN)
        assert client.infer("motion9", [tensor], headers=OWN).as_numpy("scores").shape[0] == 1
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)), headers=OWN)
        for number in range(3):
            client.async_stream_infer(
                "motion9", [tensor], sequence_id=7, sequence_start=number == 0, sequence_end=number == 2
            )
        for _ in range(3):
            result, error = answers.get(timeout=30)
            assert error is None, error
            assert result.as_numpy("scores").shape[0] == 1
        client.stop_stream()
