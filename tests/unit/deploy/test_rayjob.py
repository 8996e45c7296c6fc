"""The training job's manifest: its command parses, and KubeRay's own schema accepts it, unknown fields refused."""

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipelines.train import parser
from tsm_core.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = yaml.safe_load((ROOT / "deploy" / "rayjob-train.yaml").read_text())
CRDS = Path(os.environ.get("TSM_KUBERAY_CRDS_DIR", ROOT.parent / "shared" / "kuberay-crds"))


def strict(schema: Any) -> Any:
    """The schema with every object closed, unless it says that it keeps what it does not know."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if "properties" in closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def test_the_job_runs_a_command_that_there_is():
    program, verb, *arguments = shlex.split(MANIFEST["spec"]["entrypoint"])
    assert (program, verb) == ("tsm", "train")
    given = parser().parse_args(arguments)
    assert find_recipe(given.recipe).steppable
    workers = MANIFEST["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    assert (given.workers, given.gpus) == (workers, 1)


def test_kuberay_accepts_it():
    path = CRDS / "ray.io_rayjobs.yaml"
    if not path.is_file():
        pytest.skip(f"no schema at {path}; set TSM_KUBERAY_CRDS_DIR")
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    schema = strict(next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]["properties"]["spec"])
    validator = Draft202012Validator(schema)
    assert [error.message for error in validator.iter_errors(MANIFEST["spec"])] == []
    broken = {**MANIFEST["spec"], "entrypont": "tsm"}
    assert any("entrypont" in error.message for error in validator.iter_errors(broken))
