import copy
import importlib.util
import json

import onnxruntime
import pytest
import torch

from tsm_core import export
from tsm_core.export import METADATA_FILE, ExportError, export_model
from tsm_core.model import NotSteppable, WindowTSM
from tsm_core.recipes import Recipe

TOLERANCE = 1e-4  # of the largest logit
FORMATS = ["onnx", "torch"]
FILES = {"onnx": "file.onnx", "torch": "file.pt2"}


def relative(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


class Onnx:
    """An ONNX file behind a call with tensors in the order of its inputs."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def __call__(self, *tensors):
        feed = {name: tensor.numpy() for name, tensor in zip(self.inputs, tensors, strict=True)}
        return [torch.from_numpy(each) for each in self.session.run(None, feed)]


class Program:
    """A torch.export program, likewise."""

    def __init__(self, path):
        extra = {METADATA_FILE: ""}
        self.module = torch.export.load(path, extra_files=extra).module()
        self.metadata = json.loads(extra[METADATA_FILE])

    def __call__(self, *tensors):
        out = self.module(*tensors)
        return [out] if isinstance(out, torch.Tensor) else list(out)


def load(format, path):
    return Onnx(path) if format == "onnx" else Program(path)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow  # tracing a ResNet-50 twice takes half a minute
def test_clips_with_non_local_blocks(model_of, tmp_path):
    model = copy.deepcopy(model_of("resnet50", "bi", frames=4, non_local="embedded_gaussian"))
    for key, value in model.state_dict().items():  # random weights make attention a knife's edge
        value.mul_(0.1 if ".theta." in key or ".phi." in key else 1)
    export_and_compare(model, tmp_path / "file.onnx", "onnx")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "network", [{"shift": "bi"}, {"shift": "uni", "start": "own"}, {"shift": "bi", "temporal_pool": True}]
)
def test_clips(model_of, tmp_path, format, network):
    model = model_of("resnet_small", frames=4, **network)
    loaded = export_and_compare(model, tmp_path / "deep" / FILES[format], format)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [FILES[format]]
    if format == "onnx":
        assert (loaded.inputs, loaded.outputs) == (["clip"], ["logits"])
    assert (loaded.metadata["form"], Recipe.from_json(loaded.metadata["recipe"])) == ("clip", model.recipe)


def export_and_compare(model, path, format):
    export_model(model, path, format)
    loaded = load(format, path)
    for batch in (1, 2, 5):
        clip = noise(batch, 4, 3, 64, 64, seed=batch)
        with torch.no_grad():
            wanted = model(clip)
        (got,) = loaded(clip)
        assert relative(got, wanted) < TOLERANCE
        # the same pixels in another order in memory
        turned = clip.transpose(3, 4).contiguous().transpose(3, 4)
        assert relative(loaded(turned)[0], wanted) < TOLERANCE
    return loaded


@pytest.mark.parametrize(
    ("format", "backbone", "start"),
    [
        *((format, "resnet_small", start) for format in FORMATS for start in ("zeros", "own")),
        ("onnx", "mobilenet_v2", "zeros"),
    ],
)
def test_steps(model_of, tmp_path, format, backbone, start):
    """States go from call to call; a batch may grow while streams are under way."""
    model = model_of(backbone, start=start)
    export_model(model, tmp_path / FILES[format], format, "step")
    loaded = load(format, tmp_path / FILES[format])
    clip = noise(3, 5, 3, 64, 64)
    with torch.no_grad():
        wanted = model.forward_frames(clip)
    spec = model.new_arena(1).spec
    states = [torch.zeros(1, *shape) for shape in spec]
    for t in range(5):  # the second and third stream come two frames late, with a past of zeros or none
        if t == 2:
            states = [torch.cat([state, torch.zeros(2, *state.shape[1:])]) for state in states]
        streams = 1 if t < 2 else 3
        frames = torch.stack([clip[n, t if n == 0 else t - 2] for n in range(streams)])
        fresh = [torch.tensor([t == 0, t == 2, t == 2][:streams])] if start == "own" else []
        logits, *states = loaded(frames, *states, *fresh)
        rows = torch.stack([wanted[n, t if n == 0 else t - 2] for n in range(streams)])
        assert relative(logits, rows) < TOLERANCE
        assert [tuple(state.shape) for state in states] == [(streams, *shape) for shape in spec]
    if format == "onnx":
        names = [f"state_{layer}" for layer in range(len(spec))]
        assert loaded.inputs == ["frames", *names, *(["fresh"] if start == "own" else [])]
        assert loaded.outputs == ["logits", *(f"next_{name}" for name in names)]
    assert loaded.metadata["form"] == "step"


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def test_a_model_made_for_inference_keeps_its_form(model_of, tmp_path, format):
    """Folded norms and channels last go out; the model itself stays as it was."""
    model = copy.deepcopy(model_of("mobilenet_v2", "bi", frames=4)).for_inference()
    export_model(WindowTSM(model), tmp_path / FILES[format], format)
    clip = noise(2, 4, 3, 64, 64)
    with torch.no_grad():
        assert relative(load(format, tmp_path / FILES[format])(clip)[0], model(clip)) < TOLERANCE
    assert model.net.features[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_exported_says_why(model_of, tmp_path, monkeypatch):
    both_ways, past = model_of("resnet_small", "bi"), model_of("resnet_small")
    with pytest.raises(NotSteppable, match="shifts both ways and cannot be stepped"):
        export_model(both_ways, tmp_path / "file", what="step")
    with pytest.raises(ExportError, match="format 'tflite' must be 'onnx' or 'torch'"):
        export_model(past, tmp_path / "file", "tflite")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    with pytest.raises(ExportError, match="ONNX needs onnxscript: pip install onnx onnxscript, or") as caught:
        export_model(past, tmp_path / "file")
    assert caught.value.reason == "missing_package"
    assert not list(tmp_path.iterdir())
