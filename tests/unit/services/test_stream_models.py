import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from services.schemas import StreamSpec
from services.stream_models import DETECTOR_OPTIONS, RECOGNISER_OPTIONS, ObjectsOf, StreamModel

SQUARE = [[0.1, 0.1], [0.9, 0.1], [0.9, 0.9], [0.1, 0.9]]
BOWTIE = [[0.1, 0.1], [0.9, 0.9], [0.9, 0.1], [0.1, 0.9]]
DETECTOR = {
    "name": "eyes",
    "labels": ["cat", "dog"],
    "min_score": 0.4,
    "threshold": 0.7,
    "filters": {"cat": {"min_score": 0.3, "max_area": 0.5}},
    "zones": [
        {"name": "yard", "points": SQUARE, "objects": ["cat"], "inertia": 5, "loitering_s": 30},
        {"name": "road", "points": SQUARE, "kind": "exclude"},
    ],
    "lines": [{"name": "gate", "a": [0, 0.5], "b": [1, 0.5]}],
    "required_zones": ["yard"],
}


def test_what_a_detector_is_told_becomes_rules():
    rules = StreamModel.model_validate(DETECTOR).object_rules()
    assert rules.labels == ("cat", "dog")
    assert (rules.filter.min_score, rules.filter.threshold) == (0.4, 0.7)
    cat = rules.filter_of("cat")
    assert (cat.min_score, cat.threshold, cat.max_area) == (0.3, 0.7, 0.5)  # what is left out is as for the others
    yard, road = rules.zones
    assert (yard.inertia, yard.loitering_s, yard.objects, road.kind) == (5, 30, ("cat",), "exclude")
    assert (rules.lines[0].b, rules.required_zones) == ((1.0, 0.5), ("yard",))


def test_the_documented_example_is_accepted():
    text = (Path(__file__).resolve().parents[3] / "docs" / "service.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    spec = StreamSpec.model_validate(
        {"id": "yard", "source": {"uri": "rtsp://cam/"}, "models": yaml.safe_load(example)}
    )
    detector, *_, of_objects = spec.models
    assert [zone.kind for zone in detector.object_rules().zones] == ["include", "exclude"]
    assert of_objects.of_objects is not None
    assert of_objects.of_objects.objects_of == detector.name


def test_options_survive_the_registry():
    stream = {"id": "door", "source": {"uri": "rtsp://cam/"}}
    looks = {"name": "motion9", "where": {"objects_of": "eyes", "labels": ["cat"], "margin": 0.2}}
    part = {"name": "other", "where": {"region": "left", "box": [0, 0, 0.5, 1]}}
    spec = StreamSpec.model_validate({**stream, "models": [looks, part, DETECTOR]})
    again = StreamSpec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert again.models[0].of_objects == ObjectsOf(objects_of="eyes", labels=("cat",), margin=0.2)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"zones": [{"name": "z", "points": BOWTIE}]}, "crosses or touches itself"),
        ({"zones": [{"name": "z", "points": SQUARE[:2]}]}, "at least 3"),
        ({"zones": [{"name": "z", "points": [[0, 0], [1, 0], [1, 1.2]]}]}, "less than or equal to 1"),
        ({"zones": [{"name": "gate", "points": SQUARE}]}, "called 'gate'"),
        ({"lines": [{"name": "l", "a": [0.5, 0.5], "b": [0.5, 0.5]}]}, "two different points"),
        ({"filters": {"cat": {"min_area": 0.6, "max_area": 0.5}}}, "min_area"),
        ({"filters": {"cat": {"areas": 1}}}, "Extra inputs"),
        ({"min_score": 0.01}, "greater than or equal to 0.1"),
        ({"required_zones": ["cellar"]}, "'cellar' is none"),
        ({"colour": "red"}, "Extra inputs"),
        ({"where": {"region": "thin", "box": [0.5, 0, 0.5, 1]}}, "'thin' must be at least"),
        ({"where": {"objects_of": "x", "speed": 3}}, "Extra inputs"),
        ({"where": "everywhere"}, "'frame'"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_reason(change, word):
    with pytest.raises(ValidationError, match=word):
        StreamModel.model_validate({**DETECTOR, **change})


@pytest.mark.parametrize(
    ("models", "word"),
    [
        ([{"name": "a"}, {"name": "a"}], "named twice"),
        ([{"name": "a", "where": {"objects_of": "b"}}], "'b', which the stream does not run"),
        ([{"name": "a", "where": {"objects_of": "a"}}], "'a', which the stream does not run"),
    ],
)
def test_models_of_one_stream_must_fit_each_other(models, word):
    with pytest.raises(ValidationError, match=word):
        StreamSpec.model_validate({"id": "door", "source": {"uri": "rtsp://cam/"}, "models": models})


def test_defaults_are_not_given():
    plain = StreamModel.model_validate({"name": "a", "where": "frame", "zones": [], "filters": {}})
    assert plain.given((*RECOGNISER_OPTIONS, *DETECTOR_OPTIONS)) == []
    assert StreamModel.model_validate(DETECTOR).given(RECOGNISER_OPTIONS) == []
    assert StreamModel.model_validate(DETECTOR).given(DETECTOR_OPTIONS) == list(DETECTOR_OPTIONS)
