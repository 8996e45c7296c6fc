import json
from typing import Any

from services.overlay import MOST_BYTES, overlay


def found(number: int, score: float = 0.9, **more: Any) -> dict[str, Any]:
    return {"track_id": f"door:{number}", "label": "cat", "score": score, "box": [1, 2, 3, 4], "zones": [], **more}


def record(*objects: dict[str, Any], model: str = "eyes") -> dict[str, Any]:
    return {"model": model, "size": [64, 48], "objects": list(objects)}


def test_where_nobody_looks_for_objects_there_is_nothing_to_draw():
    assert overlay(3, []) is None
    assert overlay(3, [{"model": "motion9", "label": "left", "score": 0.5}]) is None


def test_no_object_is_something_else_than_nobody_who_looks():
    text = overlay(3, [record()])
    assert text is not None
    assert json.loads(text) == {"number": 3, "size": [64, 48], "objects": []}


def test_objects_carry_what_is_recognised_of_them():
    text = overlay(
        7,
        [
            record(found(1, 0.6), found(2, 0.8)),
            record(found(1, 0.7), model="ears"),
            {"model": "motion9", "track_id": "door:2", "label": "left", "score": 0.5},
        ],
    )
    assert text is not None
    told = json.loads(text)["objects"]
    assert [(one["model"], one["track_id"]) for one in told] == [
        ("eyes", "door:2"),
        ("ears", "door:1"),
        ("eyes", "door:1"),
    ]
    assert told[0]["actions"] == [{"model": "motion9", "label": "left", "score": 0.5}]
    assert told[2]["actions"] == []


def test_of_too_many_objects_the_best_are_left():
    many = [found(number, 1 / number, note="x" * 200) for number in range(1, 1000)]
    text = overlay(1, [record(*many)])
    assert text is not None
    assert MOST_BYTES / 2 < len(text) <= MOST_BYTES
    told = [one["track_id"] for one in json.loads(text)["objects"]]
    assert told == [one["track_id"] for one in many[: len(told)]]
