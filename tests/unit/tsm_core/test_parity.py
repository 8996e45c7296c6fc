"""Our networks against recorded logits of MMAction2's and mit-han-lab's own, through the importer.

Weights are noise that anyone can regenerate; `tests/assets/parity` has names, shapes and results. Each test writes the
very file the other project would have written.
"""

import json
import zlib
from pathlib import Path

import pytest
import torch

from tsm_core.checkpoints import import_checkpoint
from tsm_core.recipes import generic

CASES = Path(__file__).parents[2] / "assets" / "parity"
TOLERANCE = 1e-4  # of the largest logit; a wrong shift costs 20 times as much
BACKBONES = {"resnet50": "resnet50", "resnet101": "resnet101", "mobilenetv2": "mobilenet_v2"}


def entry(key, shape, rule):
    """One generator per key, seeded with the CRC-32 of its text."""
    kind = key.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if kind == "running_var":
        return 1 + 0.1 * noise.abs()
    if kind in ("bias", "running_mean"):
        return 0.1 * noise
    if noise.ndim == 1:
        return 1 + 0.1 * noise
    soft = rule["theta_phi_gain"] is not None and (".theta." in key or ".phi." in key)
    return noise * (2 / noise[0].numel()) ** 0.5 * rule["theta_phi_gain" if soft else "gain"]


def checkpoint_of(name, case, path):
    """The case's weights in the container of its project."""
    weights = {key: entry(key, shape, case["weights_rule"]) for key, shape in case["keys"].items()}
    check = case["weights_check"]
    for key, values in check["first_values"].items():
        assert weights[key].flatten()[:4].tolist() == pytest.approx(values, abs=1e-5)
    assert len(weights) == check["n_entries"]
    if "online" in name:
        content = weights
    else:
        content = {"meta": {}, "state_dict": weights} if name.startswith("mmaction2") else {"state_dict": weights}
    torch.save(content, path)
    return path


def recipe_of(case):
    network = case["network"]
    arch = network["arch"].partition(",")[0]
    labels = [f"class {number}" for number in range(network["num_classes"])]
    non_local = network.get("non_local", {}).get("mode")
    shift = "uni" if "online" in network["arch"] else "bi"
    return generic(BACKBONES[arch], shift, labels, frames=case["input"]["shape"][1], non_local=non_local)


def input_of(case):
    x = torch.randn(case["input"]["shape"], generator=torch.Generator().manual_seed(case["input"]["seed"]))
    assert x.flatten()[:4].tolist() == pytest.approx(case["input"]["check"]["first_values"], abs=1e-5)
    return x


def load_case(name, tmp_path):
    case = json.loads((CASES / f"{name}.json").read_text())
    path = checkpoint_of(name, case, tmp_path / f"{name}.pth")
    model = import_checkpoint(path, recipe_of(case))
    path.unlink()  # up to 170 MB each
    assert sum(parameter.numel() for parameter in model.parameters()) == case["weights_check"]["n_parameters"]
    return case, model, input_of(case)


def assert_same(logits, case):
    wanted = torch.tensor(case["logits"])
    assert (logits - wanted).abs().max() <= TOLERANCE * case["max_abs_logit"]
    assert logits.topk(5).indices.tolist() == case["top5"]


@pytest.mark.parametrize("name", sorted(path.stem for path in CASES.glob("m*.json") if "online" not in path.stem))
def test_clips(name, tmp_path):
    case, model, clips = load_case(name, tmp_path)
    with torch.no_grad():
        assert_same(model(clips), case)


def test_online_demo_frame_by_frame(tmp_path):
    case, model, clip = load_case("mit_online_mobilenetv2_27", tmp_path)
    arena = model.new_arena(3)
    arena.allocate()
    slot = arena.allocate()
    assert [[1, *shape] for shape in arena.spec] == case["network"]["buffers"]
    assert_same(torch.cat([model.step(clip[:, t], arena, [slot]) for t in range(clip.shape[1])]), case)
    for state, wanted in zip(arena.gather([slot]).layers, case["buffers_at_end"], strict=True):
        slack = TOLERANCE * wanted["l2"]
        assert list(state.shape) == wanted["shape"]
        assert state.norm().item() == pytest.approx(wanted["l2"], abs=slack)
        assert state.sum().item() == pytest.approx(wanted["sum"], abs=slack * state.numel() ** 0.5)


def test_all_eight_cases_are_here():
    assert len(list(CASES.glob("m*.json"))) == 8
