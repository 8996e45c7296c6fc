"""The image's recipe, the compose file and the alerts: linted, and true to what the project holds."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from services.cli import app
from services.settings import Settings
from services.telemetry import EngineFigures, Registered, SinkFigures, StreamFigures, Telemetry, Told, merge

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
ALERTS = ROOT / "helm" / "tsm-live" / "files" / "alerts.yaml"
TESTER = Path(sys.executable).parent


@pytest.fixture(scope="module")
def rehearse() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rehearse", DEPLOY / "rehearse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rehearse"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_hadolint_finds_nothing(tmp_path):
    hadolint = shutil.which("hadolint", path=TESTER)
    if hadolint is None:
        pytest.skip("hadolint has no package for this platform")
    right = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (right.returncode, right.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text((DEPLOY / "Dockerfile").read_text().replace("debian:bookworm-slim", "debian"))
    assert "DL3006" in subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True).stdout


def test_what_is_copied_is_there_and_let_in(rehearse):
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [word for one in rehearse.parse((DEPLOY / "Dockerfile").read_text()) if one.word == "COPY"
              for word in one.rest.split()[:-1]]  # fmt: skip
    assert {"tsm_core", "pipelines", "services", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


def test_the_image_suits_kuberay(rehearse):
    steps = rehearse.parse((DEPLOY / "Dockerfile").read_text())
    packages = next(one.rest for one in steps if one.word == "RUN" and "apt-get install" in one.rest).split()
    assert {"bash", "wget"} <= set(packages)
    assert [one.rest for one in steps if one.word == "USER"] == ["1000:1000"]
    assert [one.rest.split()[-1] for one in steps if one.word == "FROM"] == ["cpu", "cuda"]
    command = json.loads(next(one.rest for one in steps if one.word == "CMD"))
    check_command(command)


def test_rehearsal_copies_and_sets_as_an_engine_does(rehearse, tmp_path):
    image = rehearse.Image()
    steps = rehearse.parse(
        "# a comment\nENV A=1 PATH=/opt/bin:$PATH\nWORKDIR /srv/x\nCOPY LICENSE README.md ./\nCOPY \\\n  deploy there\n"
        'USER 5:6\nCMD ["a", "b c"]\n'
    )
    for one in steps:
        rehearse.carry_out(one, image, tmp_path)
    assert image.environment["PATH"] == "/opt/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert (image.environment["A"], image.user, image.command) == ("1", "5:6", ["a", "b c"])
    assert (tmp_path / "srv/x/README.md").read_bytes() == (ROOT / "README.md").read_bytes()
    assert (tmp_path / "srv/x/there/Dockerfile").is_file()
    with pytest.raises(ValueError, match="VOLUME is not rehearsed"):
        rehearse.carry_out(rehearse.Instruction("VOLUME", "/x"), image, tmp_path)
    with pytest.raises(ValueError, match="not an instruction"):
        rehearse.parse("hello world")
    assert rehearse.debian_release("debian:bookworm-slim") == "bookworm"
    with pytest.raises(ValueError, match="only debian:RELEASE-slim"):
        rehearse.debian_release("alpine:3")


def check_command(words: list[str]) -> None:
    """The command is `tsm ...` as the CLI has it, or a module of ours that can be run."""
    if words[0] == "python":
        assert words[1] == "-m"
        assert importlib.util.find_spec(words[2]) is not None
        return
    assert words[0] == "tsm"
    command: Any = typer.main.get_command(app)
    context = command.make_context("tsm", words[1:])
    while hasattr(command, "resolve_command"):
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, list(rest), parent=context)
    assert command.callback is not None


def test_compose_file_is_one():
    compose = pytest.importorskip("compose_spec", reason="compose-spec has no package for this platform")
    found = compose.PyCompose.from_json(json.dumps(COMPOSE))  # merge keys are YAML's: they are resolved by now
    assert {"service", "cameras", "register", "store", "state", "prometheus"} == set(found.service_names())
    wrong = {**COMPOSE, "services": {**COMPOSE["services"], "store": {"image": "x", "restrat": "always"}}}
    with pytest.raises(ValueError, match="restrat"):
        compose.PyCompose.from_json(json.dumps(wrong))


def test_compose_services_find_each_other():
    services = COMPOSE["services"]
    for name, one in services.items():
        assert set(one.get("depends_on", {})) <= set(services)
        for needed, how in one.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[needed], name
        for volume in one.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"]
        for port in one.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing is published beyond this machine"
    for variable in services["service"]["environment"]:
        section, name = variable.removeprefix("TSM_").lower().split("__")
        assert name in Settings.model_fields[section].annotation.model_fields
    check_command(services["cameras"]["command"])
    mounts = {word.split("=")[1] for word in services["cameras"]["command"] if word.startswith("--mount")}
    script = services["register"]["command"][-1]
    assert set(re.search(r"for camera in (.+);", script)[1].split()) == mounts
    for line in re.findall(r"tsm streams [^>|\n]+", script):
        check_command(line.replace('"$$camera"', "camera-1").replace('"', "").split())
    targets = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert targets["static_configs"][0]["targets"] == ["service:8000"]


def test_promtool_accepts_what_prometheus_reads(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on the path; on Debian: apt-get install prometheus")
    shutil.copy(ALERTS, tmp_path)
    token = "/run/secrets/viewer"
    assert COMPOSE["services"]["prometheus"]["secrets"] == [Path(token).name]
    (tmp_path / "viewer").write_text("a token")
    config = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    (tmp_path / "prometheus.yaml").write_text(config.replace(token, str(tmp_path / "viewer")))
    done = subprocess.run(
        [promtool, "check", "config", tmp_path / "prometheus.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ask_for_metrics_that_there_are():
    row = StreamFigures("door", "RUNNING", 15.0, 10, 7, {"queue": 2, "age": 1}, {"STREAM_STALLED": 1}, 0.5)
    telemetry = Telemetry(lambda: EngineFigures(streams=(row,), slots_total=4, store_errors={"save": 1}))
    telemetry.published("door", 0.02)
    text = merge({"r": telemetry.text()}, [Registered({}, 0), Told([SinkFigures("hook")])])
    known = set(re.findall(r"^([a-z_]+)(?:\{| )", text, re.MULTILINE)) | {"up"}
    labels = set(re.findall(r'[{,]([a-z_]+)="', text)) | {"job"}
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    words = {"sum", "max", "by", "rate", "increase", "histogram_quantile", "m"}
    for rule in rules:
        plain = re.sub(r'"[^"]*"|\[[^]]*\]', "", rule["expr"])
        asked = set(re.findall(r"[a-z_]{2,}", plain)) - words
        assert asked & known, rule["alert"]
        assert asked <= known | labels, rule["alert"]
        reasons = re.findall(r'reason=~"([^"]+)"', rule["expr"])
        assert all(set(one.split("|")) <= {"queue", "age"} for one in reasons)
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 8
