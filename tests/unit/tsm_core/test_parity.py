"""Our networks against recorded logits of MMAction2's and MIT's, on weights that anyone can regenerate."""

import json
import os
import re
import zlib
from pathlib import Path

import pytest
import torch

from tsm_core.backbones import build_backbone, run, state_spec
from tsm_core.shift import ClipPass, StepPass

KIT = Path(os.environ.get("TSM_PARITY_DIR", Path(__file__).parents[4] / "shared" / "parity"))
TOLERANCE = 1e-4  # of the largest logit; a wrong shift costs 20 times as much


def case_of(name):
    path = KIT / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no parity case {path}; set TSM_PARITY_DIR to the kit's folder")
    return json.loads(path.read_text())


def entry(key, shape, gain):
    """The kit's rule: one generator per key, seeded with the CRC-32 of its text."""
    kind = key.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if kind == "running_var":
        return 1 + 0.1 * noise.abs()
    if kind in ("bias", "running_mean"):
        return 0.1 * noise
    return 1 + 0.1 * noise if noise.ndim == 1 else noise * (2 / noise[0].numel()) ** 0.5 * gain


def from_mmaction2(key):
    key = key.removeprefix("backbone.").replace("cls_head.fc_cls.", "fc.").replace(".net.", ".")
    key = key.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")
    return re.sub(r"\bconv(\d)\.(conv|bn)\.", lambda found: f"{found[2]}{found[1]}.", key)


def from_mit_mobilenet(key):
    if key.startswith("classifier."):
        return key.replace("classifier.", "classifier.1.")
    found = re.fullmatch(r"features\.(\d+)\.conv\.(\d)\.(?:net\.)?(\w+)", key)
    if not found:
        return key
    block, place, name = int(found[1]), int(found[2]), found[3]
    # conv, bn, relu in one row there; conv-bn-relu groups, then conv and bn, here
    groups = (
        {0: "0.0", 1: "0.1", 3: "1", 4: "2"} if block == 1 else {0: "0.0", 1: "0.1", 3: "1.0", 4: "1.1", 6: "2", 7: "3"}
    )
    return f"features.{block}.conv.{groups[place]}.{name}"


def network_of(case, backbone, rename):
    net = build_backbone(backbone, case["network"]["num_classes"])
    weights = {key: entry(key, shape, case["weights_rule"]["gain"]) for key, shape in case["keys"].items()}
    for key, values in case["weights_check"]["first_values"].items():
        assert weights[key].flatten()[:4].tolist() == pytest.approx(values, abs=1e-5)
    net.load_state_dict({rename(key): value for key, value in weights.items()}, strict=True)
    return net.eval()


def input_of(case):
    x = torch.randn(case["input"]["shape"], generator=torch.Generator().manual_seed(case["input"]["seed"]))
    assert x.flatten()[:4].tolist() == pytest.approx(case["input"]["check"]["first_values"], abs=1e-5)
    return x


def assert_same(logits, case):
    wanted = torch.tensor(case["logits"])
    assert (logits - wanted).abs().max() <= TOLERANCE * case["max_abs_logit"]
    assert logits.topk(5).indices.tolist() == case["top5"]


def test_mmaction2_resnet50_over_clips():
    case = case_of("mmaction2_r50_8f_400_96px")
    net, clip = network_of(case, "resnet50", from_mmaction2), input_of(case)
    with torch.no_grad():
        logits = run(net, clip.flatten(0, 1), ClipPass(clip.shape[1], "bi")).view(*clip.shape[:2], -1).mean(dim=1)
    assert_same(logits, case)


def test_mit_online_mobilenet_frame_by_frame():
    case = case_of("mit_online_mobilenetv2_27")
    net, clip = network_of(case, "mobilenet_v2", from_mit_mobilenet), input_of(case)
    held = [torch.zeros(1, *shape) for shape in state_spec(net, 224)]
    assert [list(state.shape) for state in held] == case["network"]["buffers"]
    rows = []
    with torch.no_grad():
        for t in range(clip.shape[1]):
            how = StepPass(held)
            rows.append(run(net, clip[:, t], how))
            held = how.next_held
    assert_same(torch.cat(rows), case)
    for state, wanted in zip(held, case["buffers_at_end"], strict=True):
        slack = TOLERANCE * wanted["l2"]
        assert state.norm().item() == pytest.approx(wanted["l2"], abs=slack)
        assert state.sum().item() == pytest.approx(wanted["sum"], abs=slack * state.numel() ** 0.5)
