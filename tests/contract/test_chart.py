"""The chart, rendered by Helm's own engine: what Kubernetes, KubeRay and Ray Serve would read of it."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import yaml
from jsonschema import Draft202012Validator
from pydantic import SecretStr
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from services.embedded import find_server
from services.settings import AuthSettings, key_bytes

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "tsm-live"
CRDS = Path(os.environ.get("TSM_KUBERAY_CRDS_DIR", ROOT.parent / "shared" / "kuberay-crds"))
SECRET = {"existingSecret": "its-password", "existingSecretPasswordKey": "key"}
EXTERNAL = {"redis": {"enabled": False}, "externalRedis": {"host": "redis.example", **SECRET}}
GPUS = {"config": {"engine": {"num_gpus": 0.5}}, "workerGroups": {"gpu": {"enabled": True, "gpus": 2}}}
WATCHED = {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}
MATRIX: dict[str, dict[str, Any]] = {
    "as it is": {},
    "external store": EXTERNAL,
    "external store over TLS": {**EXTERNAL, "externalRedis": {"host": "r", "tls": True, "username": "tsm", **SECRET}},
    "external store without password": {"redis": {"enabled": False}, "externalRedis": {"host": "redis.example"}},
    "own store, given secret": {"redis": SECRET, "gcsFaultTolerance": {"enabled": False}},
    "given tokens": {"tokens": {"existingSecret": "its-tokens", "existingSecretAdminKey": "a"}, **WATCHED},
    "given key": {"encryption": {"existingSecret": "its-key", "existingSecretKey": "base64"}},
    "own store without disk": {"redis": {"persistence": {"enabled": False}}},
    "own store on a class": {"redis": {"persistence": {"storageClass": "fast", "annotations": {"a": "b"}}}},
    "gpus": GPUS,
    "gpus alone": {**GPUS, "workerGroups": {"gpu": {"enabled": True}, "cpu": {"enabled": False}}},
    "autoscaling": {"autoscaling": {"enabled": True}},
    "autoscaling on gpus": {**GPUS, "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 16}},
    "no gRPC": {"grpc": {"enabled": False}, "ingress": {"enabled": True}},
    "both doors from outside": {
        "ingress": {"enabled": True, "className": "nginx"},
        "grpc": {"reflection": True},
        "networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"name": "ingress"}}}]},
    },
    "ingress without TLS": {"ingress": {"enabled": True, "tls": {"enabled": False}}},
    "load balancer": {"service": {"type": "LoadBalancer", "annotations": {"cloud/kind": "internal"}}},
    "watched": {
        **WATCHED,
        "prometheusRule": {"enabled": True},
        "grafanaDashboard": {"enabled": True, "labels": {"team": "video"}},
    },
    "no policy, no HAProxy": {"networkPolicy": {"enabled": False}, "proxy": {"haproxy": False}},
    "in place": {"upgrade": {"strategy": "None"}, "gateway": {"replicas": 1}},
    "settings": {
        "config": {
            "engine": {"slots": 8, "models": [{"name": "motion9", "path": "/models/motion9.safetensors"}]},
            "source": {"file_roots": ["/films"]},
            "logger": {"level": "DEBUG"},
        }
    },
    "placed": {
        "head": {"nodeSelector": {"kind": "small"}, "priorityClassName": "high", "podAnnotations": {"note": "head"}},
        "extraEnv": [{"name": "TSM_ENGINE__THREADS", "value": "2"}],
        "envFrom": [{"configMapRef": {"name": "more"}}],
        "imagePullSecrets": [{"name": "registry"}],
        "workerGroups": {
            "cpu": {
                "tolerations": [{"key": "video", "operator": "Exists"}],
                "runtimeClassName": "plain",
                "podLabels": {"team": "video"},
                "extraEnv": [{"name": "A", "value": "b"}],
                "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
                "volumeMounts": [{"name": "models", "mountPath": "/models"}],
                "topologySpreadConstraints": [
                    {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
                ],
            },
            "edge": {"enabled": True, "replicas": 1, "minReplicas": 1, "maxReplicas": 1, "gpus": 0, "resources": {}},
        },
        "commonLabels": {"owner": "video"},
        "serviceAccount": {"annotations": {"role": "none"}},
    },
    "training alone": {"service": {"enabled": False}, "training": {"enabled": True}},
    "training to a bucket": {
        "training": {
            "enabled": True,
            "workers": 4,
            "args": ["--epochs", "3"],
            "work": {"uri": "s3://bucket/run"},
            "activeDeadlineSeconds": 3600,
            "dataset": {"subPath": "kinetics400"},
        }
    },
    "training on CPUs": {"training": {"enabled": True, "gpus": 0, "tolerations": []}},
    "a long name": {"fullnameOverride": "the-video-analytics-of-the-northern-campus-and-more"},
}
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
FILE = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
Document = dict[str, Any]


def typed(line: str) -> dict[str, Any]:
    """The values of a `helm install` or `helm upgrade` line."""
    values: dict[str, Any] = copy.deepcopy(FILE) if "-f gpu.yaml" in line else {}
    for path, text in re.findall(r"--set ([\w.]+)=(\S+)", line):
        *above, last = path.split(".")
        place = values
        for key in above:
            place = place.setdefault(key, {})
        place[last] = text if last in ("strategy", "tag", "recipe", "name") else yaml.safe_load(text)
    return values


MATRIX |= {
    line: typed(line) for line in re.findall(r"^helm (?:install|upgrade) .*helm/tsm-live .*$", PAGE, re.MULTILINE)
}


def render(*cases: tuple[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the engine makes of every (chart, values)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "assets" / "helm" / "render.py")],
        input=json.dumps([[str(chart), values] for chart, values in cases]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def documents(answer: dict[str, Any]) -> list[Document]:
    assert "error" not in answer, answer
    texts = [text for name, text in sorted(answer["files"].items()) if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.load_all(text, yaml.CSafeLoader) if found]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Document]]:
    pytest.importorskip("helm_python", reason="Helm's engine has no package for this platform")
    answers = render(*((CHART, values) for values in MATRIX.values()))
    return {name: documents(answer) for name, answer in zip(MATRIX, answers, strict=True)}


@pytest.fixture(scope="module")
def kuberay() -> dict[str, Draft202012Validator]:
    """Strict validators of KubeRay's kinds: a field that is not in the schema is an error."""
    found = {}
    if not CRDS.is_dir():
        pytest.skip(f"no schemas at {CRDS}; set TSM_KUBERAY_CRDS_DIR")
    for path in (CRDS / "ray.io_rayjobs.yaml", CRDS / "ray.io_rayservices.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)
        (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
        found[definition["spec"]["names"]["kind"]] = Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))
    return found


def closed(schema: Any, top: bool = True) -> Any:
    """The schema with every object closed, but those that keep what they do not know, and metadata of the document."""
    if isinstance(schema, list):
        return [closed(each, False) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value, False) for key, value in schema.items()}
    if top:
        made["properties"]["metadata"] = {"type": "object"}
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def errors(found: list[Document], kuberay: dict[str, Draft202012Validator]) -> list[str]:
    """What KubeRay's schemas and Kubernetes' own have to say."""
    validate = importlib.import_module("kubernetes_validate")
    said = []
    for one in found:
        name = f"{one['kind']} {one['metadata']['name']}"
        if one["apiVersion"] == "ray.io/v1":
            said += [f"{name}: {e.json_path} {e.message}" for e in kuberay[one["kind"]].iter_errors(one)]
        elif not one["apiVersion"].startswith("monitoring.coreos.com/"):
            try:
                validate.validate(one, validate.latest_version(), strict=True)
            except validate.ValidationError as error:
                said.append(f"{name}: {error.message}")
    return said


def pods(found: list[Document]) -> Iterator[tuple[str, Document]]:
    """(what it is, pod template) of everything that runs."""
    for one in found:
        spec = one.get("spec", {})
        if one["kind"] == "Pod":
            yield "test", one
        elif one["kind"] == "StatefulSet":
            yield one["metadata"]["name"], spec["template"]
        elif one["kind"] in ("RayService", "RayJob"):
            cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
            yield "head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield group["groupName"], group["template"]
            if "submitterPodTemplate" in spec:
                yield "submitter", spec["submitterPodTemplate"]


def only(found: list[Document], kind: str, name: str = "") -> Document:
    (one,) = [each for each in found if each["kind"] == kind and each["metadata"]["name"].endswith(name)]
    return one


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    plain = selector.get("matchLabels", {}).items() <= labels.items()
    rules = selector.get("matchExpressions", ())
    return plain and all(rule["operator"] == "In" and labels.get(rule["key"]) in rule["values"] for rule in rules)


@pytest.mark.parametrize("name", MATRIX)
def test_kubernetes_and_kuberay_accept_it(rendered, kuberay, name: str):
    found = rendered[name]
    assert errors(found, kuberay) == []
    names = [(one["kind"], one["metadata"]["name"]) for one in found]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", text) for _, text in names)
    # KubeRay appends to these
    assert all(len(text) <= 47 for kind, text in names if kind.startswith("Ray"))


@pytest.mark.parametrize("name", MATRIX)
def test_pods_may_do_little_and_say_what_they_need(rendered, name: str):
    seen = 0
    for what, pod in pods(rendered[name]):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, what
        for container in spec["containers"]:
            seen += 1
            may = container["securityContext"]
            assert may["allowPrivilegeEscalation"] is False, what
            assert may["capabilities"] == {"drop": ["ALL"]}, what
            assert what == "edge" or container["resources"]["limits"]["memory"], what
            wanted = container["resources"].get("limits", {}).get("nvidia.com/gpu")
            assert wanted == container["resources"].get("requests", {}).get("nvidia.com/gpu")
    assert seen >= 2


@pytest.mark.parametrize("name", MATRIX)
def test_ray_gives_out_the_gpus_that_the_pods_ask_for(rendered, name: str):
    for one in rendered[name]:
        if one["kind"] not in ("RayService", "RayJob"):
            continue
        cluster = one["spec"].get("rayClusterConfig") or one["spec"]["rayClusterSpec"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in cluster["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"].get("limits", {})
            assert group["rayStartParams"]["num-gpus"] == limits.get("nvidia.com/gpu", "0")


@pytest.mark.parametrize("name", MATRIX)
def test_what_refers_to_something_finds_it(rendered, name: str):
    """Selectors select a pod, secrets and services are there, or named by the values."""
    found = rendered[name]
    labels = [pod["metadata"]["labels"] for _, pod in pods(found)]
    for one in found:
        spec = one.get("spec", {})
        if one["kind"] == "NetworkPolicy":
            assert any(selects(spec["podSelector"], each) for each in labels)
        elif one["kind"] == "Service":
            assert any(spec["selector"].items() <= each.items() for each in labels)
        elif one["kind"] == "PodDisruptionBudget":
            workers = only(found, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
            autoscaling = MATRIX[name].get("autoscaling", {}).get("enabled")
            least = sum(group["minReplicas" if autoscaling else "replicas"] for group in workers)
            assert spec["minAvailable"] < max(1, least)
            assert any(selects(spec["selector"], each) for each in labels)
    secrets = {one["metadata"]["name"] for one in found if one["kind"] == "Secret"} | {
        "its-password",
        "its-key",
        "its-tokens",
    }
    secrets.add(MATRIX[name].get("externalRedis", {}).get("existingSecret"))
    text = json.dumps(found)
    for reference in re.findall(r'"secretKeyRef": \{[^}]*\}', text):
        assert json.loads("{" + reference + "}")["secretKeyRef"]["name"] in secrets
    accounts = {one["metadata"]["name"] for one in found if one["kind"] == "ServiceAccount"}
    assert {pod["spec"].get("serviceAccountName") for _, pod in pods(found)} <= accounts | {None}


@pytest.mark.parametrize(
    "name", [name for name, values in MATRIX.items() if values.get("service", {}).get("enabled", True)]
)
def test_ray_serve_reads_the_deployment(rendered, monkeypatch, name: str):
    """Ray's own schema takes it, and the service's settings take its arguments."""
    from ray.serve.schema import ServeDeploySchema

    from services.app import cluster_application
    from services.scaling import SlotsInUse
    from services.settings import load_settings

    service = only(rendered[name], "RayService")
    deploy = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (app,) = deploy.applications
    assert app.import_path == f"services.app:{cluster_application.__name__}"
    for pod, template in pods([service]):
        environment = {one["name"]: one.get("value", "") for one in template["spec"]["containers"][0]["env"]}
        assert environment["RAY_AUTH_MODE"] == "disabled", pod
        assert ("RAY_SERVE_ENABLE_HA_PROXY" in environment) == MATRIX[name].get("proxy", {}).get("haproxy", True)
        assert re.fullmatch(
            r"rediss?://((tsm)?:\$\(STORE_PASSWORD\)@)?[a-z.-]+:6379/1", environment["TSM_STORE__URL"]
        ), "the password is filled in inside the pod alone"
    for variable, value in environment.items():
        if variable.startswith("TSM_") and value:  # the others come from secrets
            monkeypatch.setenv(variable, value.replace("$(STORE_PASSWORD)", "secret"))
    settings = load_settings(data=app.args)
    wanted = MATRIX[name].get("config", {}).get("engine", {})
    assert settings.engine.replicas == wanted.get("replicas", 2)
    assert settings.engine.num_gpus == wanted.get("num_gpus", 0)
    assert settings.engine.slots == wanted.get("slots", 64)
    assert deploy.http_options.port == 8000
    wanted_grpc = MATRIX[name].get("grpc", {})
    functions = deploy.grpc_options.grpc_servicer_functions
    assert len([pkgutil.resolve_name(function) for function in functions]) == 2 * wanted_grpc.get("enabled", True)
    if functions:
        assert deploy.grpc_options.port == 9000
        assert deploy.grpc_options.enable_reflection == wanted_grpc.get("reflection", False)
    deployments = {one.name: one for one in app.deployments}
    assert {"Gateway", "Controller"} <= set(deployments) <= {"Gateway", "Controller", "Engine"}
    if "Engine" in deployments:
        scaling = deployments["Engine"].autoscaling_config
        policy = scaling["policy"]
        assert policy["policy_function"] == f"{SlotsInUse.__module__}:{SlotsInUse.__name__}"
        SlotsInUse(**policy["policy_kwargs"])
        assert scaling["min_replicas"] <= scaling["initial_replicas"] <= scaling["max_replicas"]
    assert ("Engine" in deployments) == service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]


def test_a_door_that_is_shut_leaves_nothing_behind(rendered):
    found = rendered["no gRPC"]
    assert [one["metadata"]["name"] for one in found if one["kind"] == "Ingress"] == ["demo-tsm-live"]
    assert "9000" not in yaml.safe_dump(found)


def test_doors_from_outside(rendered):
    found = rendered["both doors from outside"]
    http, grpc = only(found, "Ingress", "demo-tsm-live"), only(found, "Ingress", "-grpc")
    worker = dict(pods([only(found, "RayService")]))["cpu"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    assert (ports["serve"], ports["serve-grpc"]) == (8000, 9000)
    for ingress, port in ((http, 8000), (grpc, 9000)):
        (rule,) = ingress["spec"]["rules"]
        backend = rule["http"]["paths"][0]["backend"]["service"]
        assert backend == {"name": "demo-tsm-live-serve-svc", "port": {"number": port}}
        assert ingress["spec"]["tls"] == [{"hosts": [rule["host"]], "secretName": "tsm-live-tls"}]
    assert grpc["metadata"]["annotations"]["nginx.ingress.kubernetes.io/backend-protocol"] == "GRPC"
    service = only(found, "RayService")["spec"]["serveService"]
    assert service["metadata"]["name"] == "demo-tsm-live-serve-svc"


def test_nobody_else_reaches_rays_ports(rendered):
    """Of all ports of a Ray pod, others than Ray itself, the operator and named watchers reach the doors alone."""
    policy = only(rendered["as it is"], "NetworkPolicy", "-ray")["spec"]
    among, *others = policy["ingress"]
    assert "ports" not in among
    assert [peer["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] for peer in among["from"]] == ["demo"]
    for rule in others:
        ports = {port["port"] for port in rule["ports"]}
        operator = any("kuberay" in json.dumps(peer) for peer in rule["from"])
        assert ports <= ({8000, 8265, 52365} if operator else {8000, 9000})
    store = only(rendered["as it is"], "NetworkPolicy", "-store")["spec"]
    assert store["egress"] == []
    assert {port["port"] for rule in store["ingress"] for port in rule["ports"]} == {6379}
    assert "169.254.0.0/16" in json.dumps(policy["egress"])


def test_a_pod_has_time_to_hand_over(rendered):
    worker = dict(pods([only(rendered["as it is"], "RayService")]))["cpu"]["spec"]
    (_, _, script) = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain = int(re.search(r"--deadline-remaining-seconds (\d+)", script)[1])
    assert drain < worker["terminationGracePeriodSeconds"]
    command = importlib.import_module("ray.scripts.scripts").drain_node
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", script)) <= known


def test_the_store_starts_and_wants_its_password(rendered, tmp_path):
    """The very script of the pod, with a server that is here; no command line shows the password."""
    store = only(rendered["as it is"], "StatefulSet", "-store")["spec"]["template"]["spec"]["containers"][0]
    *shell, script = store["command"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "dir /data" in script
    script = script.replace("dir /data", f"dir {tmp_path}\nport {port}\nbind 127.0.0.1")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "valkey-server").symlink_to(find_server())
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    server = subprocess.Popen([*shell, script], env={"PATH": path, "STORE_PASSWORD": "s3cret"}, stdout=subprocess.PIPE)
    try:
        client = redis.Redis(port=port, password="s3cret", retry=Retry(ConstantBackoff(0.1), 100))
        assert client.set("kept", "1")
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).get("kept")
        assert "s3cret" not in " ".join(psutil.Process(server.pid).cmdline())
    finally:
        server.terminate()
    server.communicate(timeout=20)
    assert server.returncode == 0, "the signal reaches the server, which saves"


@pytest.mark.parametrize("name", [name for name, values in MATRIX.items() if "training" in values])
def test_the_training_command_parses(rendered, name: str):
    from pipelines.train import parser
    from tsm_core.recipes import find_recipe

    spec = only(rendered[name], "RayJob")["spec"]
    program, verb, *words = spec["entrypoint"].split()
    assert (program, verb) == ("tsm", "train")
    given = parser().parse_args(words)
    assert find_recipe(given.recipe).steppable
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (given.workers, str(int(given.gpus))) == (group["replicas"], group["rayStartParams"]["num-gpus"])
    volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    assert ("work" in volumes) == (name != "training to a bucket")


@pytest.mark.parametrize(("name", "secret", "key"), [("as it is", None, "key"), ("given key", "its-key", "base64")])
def test_every_pod_of_the_service_can_open_what_is_sealed(rendered, name: str, secret: str | None, key: str):
    found = rendered[name]
    made = [one for one in found if one["kind"] == "Secret" and one["metadata"]["name"].endswith("-encryption")]
    assert len(made) == (secret is None)
    for one in made:
        assert one["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        assert len(key_bytes(SecretStr(base64.b64decode(one["data"][key]).decode()))) == 32
    for pod, template in pods([only(found, "RayService")]):
        environment = {one["name"]: one for one in template["spec"]["containers"][0]["env"]}
        asked = environment["TSM_STORE__ENCRYPTION_KEY"]["valueFrom"]["secretKeyRef"]
        assert asked == {"name": secret or made[0]["metadata"]["name"], "key": key}, pod


@pytest.mark.parametrize(
    ("name", "secret", "keys"),
    [("watched", None, ("admin", "viewer")), ("given tokens", "its-tokens", ("a", "viewer"))],
)
def test_who_asks_the_doors_has_a_token(rendered, name: str, secret: str | None, keys: tuple[str, str]):
    found = rendered[name]
    made = [one for one in found if one["kind"] == "Secret" and one["metadata"]["name"].endswith("-tokens")]
    assert len(made) == (secret is None)
    for one in made:
        assert one["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        tokens = [SecretStr(base64.b64decode(one["data"][key]).decode()) for key in keys]
        AuthSettings(admin_token=tokens[0], viewer_token=tokens[1])
        assert tokens[0] != tokens[1]
    where = secret or made[0]["metadata"]["name"]
    asked = [{"name": where, "key": key} for key in keys]
    for pod, template in pods([only(found, "RayService")]):
        environment = {one["name"]: one for one in template["spec"]["containers"][0]["env"]}
        given = [environment[f"TSM_AUTH__{who}_TOKEN"]["valueFrom"]["secretKeyRef"] for who in ("ADMIN", "VIEWER")]
        assert given == asked, pod
    assert only(found, "ScrapeConfig")["spec"]["authorization"] == {"credentials": asked[1]}
    (container,) = only(found, "Pod")["spec"]["containers"]
    assert container["env"] == [{"name": "TOKEN", "valueFrom": {"secretKeyRef": asked[1]}}]


def test_grafanas_sidecar_finds_the_dashboard(rendered):
    found = only(rendered["watched"], "ConfigMap", "-dashboard")
    assert found["metadata"]["labels"].items() >= {("grafana_dashboard", "1"), ("team", "video")}
    same = json.loads((ROOT / "deploy" / "grafana" / "tsm-live.json").read_text())
    assert {name: json.loads(text) for name, text in found["data"].items()} == {"tsm-live.json": same}
    assert not any(one["kind"] == "ConfigMap" for one in rendered["as it is"])


def test_the_page_has_commands():
    assert len(MATRIX) >= 27
    assert {"helm install", "helm upgrade"} <= {" ".join(name.split()[:2]) for name in MATRIX}


def test_versions_are_the_projects():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert (chart["version"], chart["appVersion"]) == (project, project)
    ray = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert yaml.safe_load((CHART / "values.yaml").read_text())["rayVersion"] == ray


def test_notes_name_commands_and_doubts():
    pytest.importorskip("helm_python")
    plain, doubtful = render(
        (CHART, {"training": {"enabled": True}}),
        (CHART, {**MATRIX["no policy, no HAProxy"], "redis": {"persistence": {"enabled": False}}}),
    )
    notes = plain["files"]["tsm-live/templates/NOTES.txt"]
    assert "port-forward service/demo-tsm-live-serve-svc 8000:8000" in notes
    assert "get rayjob demo-tsm-live-first" in notes
    doubts = doubtful["files"]["tsm-live/templates/NOTES.txt"]
    assert "networkPolicy.enabled is false" in doubts
    assert "redis.persistence.enabled is false" in doubts


REFUSED = {
    "workerGroups.cpu.replica": ({"workerGroups": {"cpu": {"replica": 3}}}, "replica"),
    "a word for a number": ({"workerGroups": {"cpu": {"replicas": "many"}}}, "replicas"),
    "a setting that is none": ({"config": {"engine": {"slotz": 3}}}, "slotz"),
    "a setting out of bounds": ({"config": {"engine": {"slots": 0}}}, "slots"),
    "a password in plain text": ({"config": {"store": {"url": "redis://:p@h"}}}, "url"),
    "HAProxy without policy": ({"networkPolicy": {"enabled": False}}, "listens on all interfaces"),
    "GPUs that no group has": ({"config": {"engine": {"num_gpus": 1}}}, "workerGroups.gpu"),
    "a store that is nowhere": ({"redis": {"enabled": False}}, "externalRedis.host"),
    "no workers": ({"workerGroups": {"cpu": {"enabled": False}}}, "every worker group is disabled"),
    "a group outside its limits": ({"workerGroups": {"cpu": {"replicas": 9}}}, "between its minReplicas"),
    "least above most": ({"autoscaling": {"enabled": True, "minReplicas": 9}}, "above autoscaling.maxReplicas"),
    "a place that is no URI": ({"training": {"work": {"uri": "bucket"}}}, "uri"),
}


@pytest.fixture(scope="module")
def refused() -> dict[str, str]:
    pytest.importorskip("helm_python")
    answers = render(*((CHART, values) for values, _ in REFUSED.values()))
    return {name: answer.get("error", "") for name, answer in zip(REFUSED, answers, strict=True)}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_values_are_refused_with_their_name(refused, name: str):
    assert REFUSED[name][1] in refused[name]


PLANTED = [
    ("rayservice.yaml", "rayStartParams:", "rayStartParms:", "rayStartParms"),
    ("rayservice.yaml", "containerPort: 8000", "containerPort: '8000'", "'8000' is not of type 'integer'"),
    ("networkpolicy.yaml", "podSelector:\n    matchLabels:", "podSelecter:\n    matchLabels:", "podSelecter"),
    ("store.yaml", "replicas: 1", "replicas: one", "'one' is not of type 'integer'"),
]


@pytest.mark.parametrize(("template", "right", "wrong", "told"), PLANTED)
def test_planted_mistakes_are_caught(kuberay, tmp_path, template: str, right: str, wrong: str, told: str):
    pytest.importorskip("helm_python")
    chart = tmp_path / "tsm-live"
    shutil.copytree(CHART, chart)
    path = chart / "templates" / template
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    (answer,) = render((chart, {}))
    assert any(told in each for each in errors(documents(answer), kuberay))
