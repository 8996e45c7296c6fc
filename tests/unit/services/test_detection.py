"""A detector on live streams: boxes, tracks, zones, and what becomes of them when a stream moves."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image

from services.engine import Engine
from services.schemas import SourceSpec
from services.snapshots import encode_snapshot
from services.store import MemoryStore, StateStore
from services.stream_models import StreamModel
from tests.unit.services.detector_kit import EYES, HEIGHT, WIDTH, Painted, paint_detector, painting
from tests.unit.services.engine_kit import (
    MODEL,
    Cameras,
    give,
    picture,
    processed,
    running,
    settings,
    small_model,
    spec,
    wait,
)
from tsm_core.crops import crop_object
from tsm_core.frame import Frame
from tsm_core.postprocess import new_smoother

FPS = 10
SIZE = (2 * WIDTH, 2 * HEIGHT)  # of the camera: the decoder halves it


@contextmanager
def watching(store: StateStore, name: str = "r1", **engine: Any) -> Iterator[tuple[Engine, Cameras]]:
    with running(store, name, using=settings(**engine), more={EYES: paint_detector()}) as (one, cameras):
        yield one, cameras


def eyes(**options: Any) -> StreamModel:
    return StreamModel(name=EYES, **options)


def show(
    engine: Engine, cameras: Cameras, stream_id: str, pictures: list[torch.Tensor], since_s: float, first: int = 0
) -> None:
    """Feed pictures at FPS and wait until each went through."""
    for n, image in enumerate(pictures, start=first):
        before = processed(engine, stream_id)
        cameras[stream_id].feed(image, since_s + n / FPS, SIZE)
        wait(lambda before=before: processed(engine, stream_id) == before + 1)


def walk(colour: str, xs: range, y: int = 20) -> list[torch.Tensor]:
    """A painted square of 16 px that walks along."""
    return [painting((colour, (x, y, x + 16, y + 16))) for x in xs]


def told(store: StateStore, stream_id: str, kind: str = "detection") -> list[dict[str, Any]]:
    return [e for e in store.events(stream_id, limit=500) if e["type"].startswith(f"tsm.v1.{kind}.")]


def phases(store: StateStore, stream_id: str) -> list[tuple[str, str]]:
    return [(event["data"]["type"], event["subject"]) for event in told(store, stream_id)]


def test_an_object_is_told_in_the_cameras_pixels_and_followed():
    store, at_s = MemoryStore(), time.time()
    with watching(store) as (engine, cameras):
        give(store, engine, spec("door", models=(eyes(),)))
        show(engine, cameras, "door", [painting()] * 2 + walk("green", range(10, 60, 2)), at_s)
        wait(lambda: len(store.scores("door")) == 27)
        records = store.scores("door")
        assert [record["objects"] for record in records[:4]] == [[], [], [], []]  # an object needs three boxes
        total = paint_detector().memory_frames
        assert [record["warmup"] for record in records[: total + 1]] == [*(f"{k}/{total}" for k in range(total)), None]
        for n, record in enumerate(records[4:], start=2):
            (found,) = record["objects"]
            assert (found["track_id"], found["label"], record["size"]) == ("door:1", "green", list(SIZE))
            left = 2 * (10 + 2 * n)  # the camera has twice the pixels of the picture
            assert found["box"] == pytest.approx([left, 40, left + 32, 72], abs=2.5)
        wait(lambda: len(phases(store, "door")) >= 3)
        new, *updates = told(store, "door")
        assert (new["type"], new["subject"], new["source"]) == ("tsm.v1.detection.new", "door:1", "/streams/door")
        data = new["data"]
        assert (data["before"], data["after"]["label"], data["model"]) == (None, "green", EYES)
        assert data["box_norm"][0] == pytest.approx(data["box"][0] / SIZE[0], abs=1e-3)
        assert {event["data"]["type"] for event in updates} == {"update"}
        assert updates[0]["data"]["before"]["box"] == data["after"]["box"]
        wait(lambda: (s := store.status("door")) is not None and s.models[0].objects == {"green": 1})
        status = store.status("door")
        assert status is not None
        assert (status.models[0].task, status.label) == ("detection", None)
        # a stream that is stopped ends what is open
        store.unassign("door")
        wait(lambda: phases(store, "door")[-1] == ("end", "door:1"))


def test_zones_and_lines_are_told():
    zone = {"name": "right", "points": [(0.5, 0), (1, 0), (1, 1), (0.5, 1)], "inertia": 2}
    line = {"name": "gate", "a": (0.3, 1), "b": (0.3, 0)}  # who walks to the right crosses it inwards
    options = eyes(zones=[zone], lines=[line])
    store, at_s = MemoryStore(), time.time()
    with watching(store) as (engine, cameras):
        give(store, engine, spec("door", models=(options,)))
        show(engine, cameras, "door", walk("red", range(4, 70, 2)), at_s)
        wait(lambda: any(event["data"]["current_zones"] for event in told(store, "door")))
        crossings = [crossing for event in told(store, "door") for crossing in event["data"]["crossings"]]
        assert crossings == [{"line": "gate", "direction": "in"}]
        entered = next(event["data"] for event in told(store, "door") if event["data"]["current_zones"])
        assert (entered["current_zones"], entered["before"]["current_zones"]) == (["right"], [])
        middle = (entered["box"][0] + entered["box"][2]) / 2 / SIZE[0]
        assert 0.5 <= middle < 0.56
        wait(lambda: store.scores("door")[-1]["objects"][0]["zones"] == ["right"])


def test_streams_that_share_a_detector_have_objects_of_their_own():
    films = {"a": walk("red", range(0, 60, 3)), "b": walk("blue", range(70, 10, -3)), "c": [painting()] * 20}
    store, at_s = MemoryStore(), time.time()
    with watching(store, max_wait_ms=200.0) as (engine, cameras):
        give(store, engine, *(spec(name, models=(eyes(),)) for name in films))
        for n in range(20):
            for name, film in films.items():
                cameras[name].feed(film[n], at_s + n / FPS, SIZE)
            wait(lambda n=n: all(processed(engine, name) == n + 1 for name in films))
        wait(lambda: all(len(store.scores(name)) == 20 for name in films))
        labels = {
            name: {(one["track_id"], one["label"]) for record in store.scores(name) for one in record["objects"]}
            for name in films
        }
    assert labels == {"a": {("a:1", "red")}, "b": {("b:1", "blue")}, "c": set()}


def test_a_moved_streams_objects_keep_their_ids():
    store, at_s = MemoryStore(), time.time() - 3
    film = walk("red", range(0, 40, 2))
    with watching(store, "r1") as (one, cameras), watching(store, "r2") as (two, others):
        give(store, one, spec("door", models=(eyes(),)))
        show(one, cameras, "door", film[:10], at_s)
        one.drain()
        assert phases(store, "door")[0] == ("new", "door:1")
        give(store, two, spec("door", models=(eyes(),)))
        assert two.sessions["door"].restored.mode == "checkpoint"
        both = [painting(("red", (x, 20, x + 16, 36)), ("blue", (70, 40, 86, 56))) for x in range(20, 40, 2)]
        show(two, others, "door", both, at_s, first=10)
        wait(lambda: len(store.scores("door")) == 20)
        ids = [[(o["track_id"], o["label"]) for o in record["objects"]] for record in store.scores("door")[10:]]
        assert ids[0] == [("door:1", "red")]
        assert sorted(ids[-1]) == [("door:1", "red"), ("door:1000001", "blue")]
        assert phases(store, "door").count(("new", "door:1")) == 1
        assert not any(phase == "end" for phase, _ in phases(store, "door"))


@pytest.mark.parametrize("saved", [True, False])
def test_after_a_crash_no_id_is_given_to_another(saved: bool):
    """The dead replica gave ids after it had saved, or never saved at all."""
    store, at_s = MemoryStore(), time.time() - 4
    both = painting(("red", (10, 10, 30, 30)), ("blue", (60, 10, 80, 30)))
    with (
        watching(store, "r1", checkpoint_interval_s=60.0) as (one, cameras),
        watching(store, "r2") as (two, others),
    ):
        give(store, one, spec("door", models=(eyes(),)))
        show(one, cameras, "door", [painting(("red", (10, 10, 30, 30)))] * 10, at_s)
        session = one.sessions["door"]
        snapshot = session.export()
        assert snapshot is not None
        show(one, cameras, "door", [both] * 6, at_s, first=10)
        wait(lambda: ("new", "door:2") in phases(store, "door"))
        if saved:
            store.save(session.lease, encode_snapshot(snapshot))
        give(store, two, spec("door", models=(eyes(),)))
        assert two.sessions["door"].restored.mode == ("checkpoint" if saved else "cold")
        show(two, others, "door", [both] * 6, at_s, first=16)
        wait(lambda: len(phases(store, "door")) >= (3 if saved else 4))
        news = [track_id for phase, track_id in phases(store, "door") if phase == "new"]
    fresh = ["door:1000001"] if saved else ["door:1000001", "door:1000002"]
    assert news == ["door:1", "door:2", *fresh]


def test_a_stream_that_changes_gives_no_id_twice():
    """Its lease stays, its state does not fit the new camera."""
    store, at_s = MemoryStore(), time.time()
    with watching(store) as (engine, cameras):
        for revision in (1, 2, 3):
            uri = f"rtsp://127.0.0.1/door{revision}"
            changed = spec("door", models=(eyes(),)).model_copy(
                update={"revision": revision, "source": SourceSpec(uri=uri)}
            )
            if revision == 1:
                give(store, engine, changed)
            else:
                store.put_stream(changed, create=False)
                wait(lambda uri=uri: cameras["door"].config.uri == uri and engine.sessions["door"].source is not None)
            show(engine, cameras, "door", walk("red", range(0, 20, 2)), at_s)
            wait(lambda revision=revision: len(phases(store, "door")) == revision)
        assert {lease.epoch for lease in store.leases().values()} == {1}
        assert phases(store, "door") == [("new", "door:1"), ("new", "door:2"), ("new", "door:3")]


def test_after_a_gap_objects_end_where_they_were_and_ids_go_on():
    store, at_s = MemoryStore(), time.time()
    with watching(store, state_max_gap_s=5.0) as (engine, cameras):
        give(store, engine, spec("door", models=(eyes(),)))
        show(engine, cameras, "door", walk("red", range(0, 20, 2)), at_s)
        show(engine, cameras, "door", walk("red", range(20, 40, 2)), at_s + 60)
        wait(lambda: ("new", "door:2") in phases(store, "door"))
        end = next(event for event in told(store, "door") if event["data"]["type"] == "end")
        assert end["subject"] == "door:1"
        assert end["data"]["end_time"] == pytest.approx(at_s + 0.9, abs=0.01)
        slot = engine.sessions["door"].analytics[EYES].slot
        assert engine.served[EYES].arena.steps(slot) == 10  # the shift state began anew, too


def test_an_object_that_is_gone_ends():
    store, at_s = MemoryStore(), time.time()
    with watching(store) as (engine, cameras):
        give(store, engine, spec("door", models=(eyes(),)))
        show(engine, cameras, "door", walk("red", range(0, 20, 2)) + [painting()] * 40, at_s)
        wait(lambda: phases(store, "door")[-1] == ("end", "door:1"))
        wait(lambda: (s := store.status("door")) is not None and s.models[0].objects == {})


def test_the_picture_carries_the_boxes_of_its_own_frame():
    store, at_s = MemoryStore(), time.time()
    with watching(store) as (engine, cameras):
        give(store, engine, spec("door", models=(eyes(),)))
        store.watch("door", 60)
        seen = 0
        for n, image in enumerate(walk("red", range(0, 60, 2))):
            show(engine, cameras, "door", [image], at_s, first=n)
            wait(lambda n=n: (p := store.preview("door")) is not None and p[0] == n)
            number, jpeg = store.preview("door")  # type: ignore[misc]
            picture = Image.open(io.BytesIO(jpeg))
            overlay = json.loads(picture.info["comment"])
            assert (overlay["number"], overlay["size"]) == (number, list(SIZE))
            for found in overlay["objects"]:
                # red is where the box is, in this very picture
                left, top, right, bottom = (round(side / 2) for side in found["box"])
                inside = picture.convert("RGB").crop((left + 2, top + 2, right - 2, bottom - 2))
                assert all(r > 200 and g < 60 for r, g, _ in inside.getdata())
                seen += 1
        assert seen == 28


def test_a_detector_beside_a_recogniser_takes_nothing_from_it():
    """Scores with a detector on the stream equal those without."""
    film, at_s = walk("green", range(0, 40, 2)), time.time()
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, models in {"alone": (MODEL,), "both": (EYES, MODEL)}.items():
        store = MemoryStore()
        with watching(store) as (engine, cameras):
            give(store, engine, spec("door", models=tuple(StreamModel(name=each) for each in models)))
            show(engine, cameras, "door", film, at_s)
            wait(lambda store=store, models=models: len(store.scores("door")) == 20 * len(models))
            rows[name] = [record["top_k"] for record in store.scores("door") if record["model"] == MODEL]
            status = engine.sessions["door"].status()
            assert status.label == rows[name][-1][0]["label"]
    for alone, both in zip(rows["alone"], rows["both"], strict=True):
        assert [one["label"] for one in alone] == [one["label"] for one in both]
        assert [one["score"] for one in alone] == pytest.approx([one["score"] for one in both], abs=2e-4)


def test_two_detectors_of_one_stream_give_no_id_twice():
    store, at_s = MemoryStore(), time.time()
    more = {EYES: paint_detector(), "others": paint_detector()}
    with running(store, more=more) as (engine, cameras):
        give(store, engine, spec("door", models=(eyes(), StreamModel(name="others"))))
        show(engine, cameras, "door", walk("red", range(0, 20, 2)), at_s)
        wait(lambda: len(phases(store, "door")) >= 2)
        assert {event["subject"] for event in told(store, "door")} == {"door:1", "door/others:1"}
        assert {event["data"]["stream_id"] for event in told(store, "door")} == {"door"}


# ---- recognition of objects and regions


def alone(pictures: list[torch.Tensor], times_s: list[float]) -> list[dict[str, float]]:
    """What the recogniser says of these pictures on a slot of its own, smoothed as on a stream."""
    model = small_model()
    arena = model.new_arena(1)
    slot, smoother = arena.allocate(), new_smoother(model.recipe)
    said = []
    for image, time_s in zip(pictures, times_s, strict=True):
        (row,) = model.step(model.preprocess([image]), arena, [slot])
        said.append(dict(zip(model.labels, smoother.update(row.tolist(), time_s), strict=True)))
    return said


def same(record: dict[str, Any], said: dict[str, float]) -> None:
    for one in record["top_k"]:
        assert one["score"] == pytest.approx(said[one["label"]], abs=2e-3)


def looks_at(**where: Any) -> StreamModel:
    return StreamModel.model_validate({"name": MODEL, "where": where})


def test_a_tracked_object_is_recognised_as_if_it_had_a_stream_of_its_own():
    """The scores of a track equal those of the recogniser alone over the crops that the track's boxes give."""
    store, at_s = MemoryStore(), time.time()
    film = [
        painting(("red", (x, 10, x + 16, 26)), ("green", (70 - x, 40, 90 - x, 60))) for x in range(0, 48, 2)
    ]  # two objects: batches of two slots of one stream
    with watching(store) as (engine, cameras):
        give(store, engine, spec("door", models=(looks_at(objects_of=EYES, margin=0.25), eyes())))
        show(engine, cameras, "door", film, at_s)
        wait(lambda: sum("objects" in record for record in store.scores("door")) == len(film))
        wait(lambda: store.scores("door")[-1].get("track_id"))
        records = store.scores("door")
    for track in ("door:1", "door:2"):
        mine = [record for record in records if record.get("track_id") == track]
        boxes = {
            record["frame_number"]: one["box"]
            for record in records
            for one in record.get("objects", ())
            if one["track_id"] == track
        }
        assert [record["frame_number"] for record in mine] == sorted(boxes)
        assert mine[0]["warmup"].startswith("0/")
        frames = [Frame("door", n, film[n], 0, 0, SIZE) for n in sorted(boxes)]
        crops = [crop_object(frame, tuple(boxes[frame.number]), 0.25) for frame in frames]  # type: ignore[arg-type]
        said = alone(crops, [at_s + frame.number / FPS for frame in frames])
        for record, one in zip(mine, said, strict=True):
            same(record, one)


def test_the_slot_of_an_object_lives_as_long_as_its_track():
    store, at_s = MemoryStore(), time.time()
    model = StreamModel.model_validate(
        {"name": MODEL, "where": {"objects_of": EYES}, "threshold": 0.01, "off_threshold": 0.0}
    )
    with watching(store) as (engine, cameras):
        give(store, engine, spec("door", models=(eyes(), model)))
        arena = engine.served[MODEL].arena
        assert arena.used == 0
        show(engine, cameras, "door", walk("red", range(0, 30, 1)), at_s)
        assert arena.used == 1
        wait(lambda: (s := store.status("door")) is not None and s.models[1].objects == {"red": 1})
        wait(lambda: told(store, "door", "action"))
        assert {event["data"]["track_id"] for event in told(store, "door", "action")} == {"door:1"}
        show(engine, cameras, "door", [painting()] * 30, at_s, first=30)
        wait(lambda: phases(store, "door")[-1] == ("end", "door:1"))
        assert arena.used == 0
        wait(lambda: told(store, "door", "action")[-1]["data"]["type"] == "end")
        assert engine.sessions["door"].status().label is None  # it is no label of the stream


def test_an_object_without_a_free_slot_goes_without_until_one_is_free():
    store, at_s = MemoryStore(), time.time()
    both = painting(("red", (10, 10, 30, 30)), ("blue", (50, 10, 70, 30)))
    only = painting(("blue", (50, 10, 70, 30)))
    with watching(store, object_slots=1) as (engine, cameras):
        give(store, engine, spec("door", models=(eyes(), looks_at(objects_of=EYES))))
        show(engine, cameras, "door", [both] * 8, at_s)
        recognition = engine.sessions["door"].analytics[MODEL]
        assert len(recognition.of) == 1
        assert recognition.status().without_slot == 1  # told once, not on every frame
        (lucky,) = recognition.of
        assert {record["track_id"] for record in store.scores("door") if record["model"] == MODEL} <= {lucky}
        # slots of streams are none of an object's: another stream still finds its own
        give(store, engine, *(spec(f"more-{n}", models=(StreamModel(name=MODEL),)) for n in range(4)))
        other = only if lucky == "door:1" else painting(("red", (10, 10, 30, 30)))
        show(engine, cameras, "door", [other] * 30, at_s, first=8)
        assert [track for track in recognition.of if track != lucky] == list(recognition.of)
        assert len(recognition.of) == 1


def test_a_recognised_object_moves_with_its_state():
    store, at_s = MemoryStore(), time.time() - 3
    film = walk("red", range(0, 60, 2))
    models = (looks_at(objects_of=EYES), eyes())
    with watching(store, "r1") as (one, cameras), watching(store, "r2") as (two, others):
        give(store, one, spec("door", models=models))
        show(one, cameras, "door", film[:20], at_s)
        one.drain()
        give(store, two, spec("door", models=models))
        show(two, others, "door", film[20:], at_s, first=20)
        wait(lambda: store.scores("door")[-1]["frame_number"] == 29)
        records = [record for record in store.scores("door") if record["model"] == MODEL]
    total = small_model().memory_frames
    assert {record["track_id"] for record in records} == {"door:1"}
    assert [record["warmup"] for record in records[total:]] == [None] * (len(records) - total)  # warm after the move


def test_a_region_is_recognised_as_if_it_were_the_picture():
    store, at_s = MemoryStore(), time.time()
    film = [picture("door", n) for n in range(10)]  # 64 x 48
    with watching(store) as (engine, cameras):
        give(store, engine, spec("door", models=(looks_at(region="left", box=(0.0, 0.25, 0.5, 1.0)),)))
        show(engine, cameras, "door", film, at_s)
        wait(lambda: len(store.scores("door")) == 10)
        records = store.scores("door")
        assert {record["region"] for record in records} == {"left"}
        assert engine.sessions["door"].status().models[0].region == "left"
    said = alone([image[:, 12:, :32] for image in film], [at_s + n / FPS for n in range(10)])
    for record, one in zip(records, said, strict=True):
        same(record, one)


@pytest.mark.parametrize("boxes", [0, 1])
def test_the_detectors_slot_is_given_back(boxes: int):
    store, at_s = MemoryStore(), time.time()
    painted: list[Painted] = [("red", (10, 10, 30, 30))][:boxes]
    with watching(store) as (engine, cameras):
        give(store, engine, spec("door", models=(eyes(),)))
        show(engine, cameras, "door", [painting(*painted)] * 5, at_s)
        assert engine.served[EYES].arena.used == 1
        store.delete_stream("door")
        wait(lambda: not engine.sessions)
        assert engine.served[EYES].arena.used == 0
