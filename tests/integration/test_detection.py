"""Objects live: a real Valkey, RTSP cameras, two engines, the page in a browser; streams that move and are cut off."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from pipelines.simulator import SimulatorProcess, start_simulator
from services.controller import Controller
from services.engine import Engine
from services.manager import ServedModel, StreamManager
from services.schemas import SourceSpec, StreamSpec, StreamStatus
from services.settings import EngineSettings, ModelSettings, Settings, StoreSettings
from services.store import RedisStore, StateStore
from services.stream_models import StreamModel
from tests.integration.test_page import BROWSERS, FLAGS
from tests.unit.services.detector_kit import EYES, LABELS, paint_detector
from tests.unit.services.engine_kit import MODEL, small_model, wait
from tsm_core.recipes import MOTION9

WIDE, HIGH, FPS, SECONDS = 192, 128, 15, 20  # slow enough to be followed when a busy machine drops frames
RIGHT = {"name": "right", "points": [(0.5, 0), (1, 0), (1, 1), (0.5, 1)]}
GATE = {"name": "gate", "a": (0.3, 1), "b": (0.3, 0)}
EYES_OPTIONS: dict[str, Any] = {"name": EYES, "zones": [RIGHT], "lines": [GATE]}
CROPS_OPTIONS = {"name": MODEL, "where": {"objects_of": EYES, "labels": ["red"]}}
pytestmark = pytest.mark.timeout(400)


def picture(number: int) -> torch.Tensor:
    """A red square that walks to and fro, and a blue one that stands."""
    place = number % (SECONDS * FPS) / (SECONDS * FPS) * 2
    left = round(8 + 144 * (place if place < 1 else 2 - place))
    image = torch.full((3, HIGH, WIDE), 90, dtype=torch.uint8)
    for colour, x, y in (("red", left, 16), ("blue", 80, 88)):
        image[:, y : y + 32, x : x + 32] = 0
        image[LABELS.index(colour), y : y + 32, x : x + 32] = 255
    return image


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorProcess]:
    path = tmp_path_factory.mktemp("film") / "squares.mp4"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "12"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDE, HIGH, "yuv420p", FPS
        for number in range(SECONDS * FPS):
            frame = av.VideoFrame.from_ndarray(picture(number).permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with start_simulator({"yard": str(path)}) as simulator:
        yield simulator


@pytest.fixture
def using(valkey_url: str, tmp_path: Path) -> Settings:
    return Settings(
        store=StoreSettings(url=valkey_url, prefix=f"{tmp_path.name}:"),
        engine=EngineSettings(
            slots=4,
            object_slots=2,
            max_frame_age_s=3.0,  # a busy test machine is no reason to drop, nor to call a replica dead
            heartbeat_ttl_ms=2000,
            checkpoint_interval_s=0.3,
            models=(ModelSettings(name=MODEL), ModelSettings(name=EYES)),
        ),
    )


@pytest.fixture
def store(using: Settings) -> Iterator[StateStore]:
    store = RedisStore(using.store)
    yield store
    store.close()


def new_engine(using: Settings, name: str) -> Engine:
    return Engine(using, RedisStore(using.store), name, {EYES: paint_detector(), MODEL: small_model()})


@pytest.fixture
def engines(using: Settings, store: StateStore) -> Iterator[dict[str, Engine]]:
    engines = {name: new_engine(using, name) for name in ("r1", "r2")}
    controller = Controller(store, using.controller, "c1")
    for engine in engines.values():
        engine.start()
    wait(lambda: len(store.replicas()) == 2)
    controller.start()
    yield engines
    controller.stop()
    for engine in engines.values():
        engine.stop()
        engine.store.close()


def serve(store: StateStore, camera: SimulatorProcess, *models: dict[str, Any]) -> None:
    spec = {"id": "yard", "source": SourceSpec(uri=camera.urls[0]), "models": [StreamModel(**each) for each in models]}
    store.put_stream(StreamSpec.model_validate(spec), create=True)


def status(store: StateStore) -> StreamStatus | None:
    return store.status("yard")


def objects_in_view(store: StateStore, model: str = EYES) -> dict[str, int] | None:
    found = status(store)
    return next((each.objects for each in found.models if each.name == model), None) if found else None


def events(store: StateStore, kind: str) -> list[dict[str, Any]]:
    return [
        event["data"] | {"at": event["subject"]} for event in store.events("yard", 0, 10_000) if kind in event["type"]
    ]


def ids_in_view(store: StateStore) -> dict[str, str]:
    """Track ids by label, of the newest frame that showed both squares."""
    records = [record for record in store.scores("yard", limit=200) if len(record.get("objects", ())) == 2]
    return {one["label"]: one["track_id"] for one in records[-1]["objects"]} if records else {}


def test_objects_are_found_followed_recognised_and_keep_their_ids_when_the_stream_moves(camera, store, engines):
    serve(store, camera, EYES_OPTIONS, CROPS_OPTIONS)
    wait(lambda: objects_in_view(store) == {"red": 1, "blue": 1}, 60)
    for record in (record for record in store.scores("yard") if "objects" in record):
        assert record["size"] == [WIDE, HIGH]
        for one in record["objects"]:
            left, top, right, bottom = one["box"]
            assert (right - left, bottom - top) == pytest.approx((32, 32), abs=6)
            assert top == pytest.approx({"red": 16, "blue": 88}[one["label"]], abs=4)
    # zones and lines: the red square passes both within one turn
    wait(lambda: any(data["crossings"] for data in events(store, ".detection.")), 60)
    wait(lambda: any("right" in data["current_zones"] and data["label"] == "red" for data in events(store, ".det")), 60)
    crossing = next(data for data in events(store, ".detection.") if data["crossings"])
    assert (crossing["label"], crossing["crossings"][0]["line"]) == ("red", "gate")
    # the recogniser looks at the red one alone
    wait(lambda: objects_in_view(store, MODEL) == {"red": 1}, 60)
    records = store.scores("yard", limit=1000)
    reds = {one["track_id"] for record in records for one in record.get("objects", ()) if one["label"] == "red"}
    scores = [record for record in records if record["model"] == MODEL]
    assert scores
    assert {record["track_id"] for record in scores} <= reds
    assert scores[-1]["label"] in MOTION9.labels

    owner = status(store).worker  # type: ignore[union-attr]
    ids = ids_in_view(store)
    told = len(events(store, ".detection."))
    leaving = engines[str(owner)]
    leaving.drain()
    wait(lambda: (s := status(store)) is not None and s.worker not in (None, owner) and s.state == "RUNNING", 60)
    wait(lambda: objects_in_view(store) == {"red": 1, "blue": 1}, 60)
    restored = status(store).restored  # type: ignore[union-attr]
    assert restored is not None
    assert restored.mode == "checkpoint"
    assert ids_in_view(store)["blue"] == ids["blue"]
    assert not [
        data for data in events(store, ".detection.")[told:] if data["type"] == "new" and data["label"] == "blue"
    ]


ALONE = """
import sys, threading
from services.engine import Engine
from services.settings import Settings
from services.store import RedisStore
from tests.unit.services.detector_kit import EYES, paint_detector
from tests.unit.services.engine_kit import MODEL, small_model

settings = Settings.model_validate_json(sys.stdin.readline())
Engine(settings, RedisStore(settings.store), "doomed", {EYES: paint_detector(), MODEL: small_model()}).start()
threading.Event().wait()
"""


def test_a_killed_replicas_objects_keep_their_ids(camera, using, store):
    values = using.model_dump(mode="json")
    values["store"]["url"] = using.store.url.get_secret_value() if using.store.url else None
    doomed = subprocess.Popen([sys.executable, "-c", ALONE], stdin=subprocess.PIPE, text=True)
    assert doomed.stdin is not None
    doomed.stdin.write(json.dumps(values) + "\n")
    doomed.stdin.flush()
    controller = Controller(store, using.controller, "c1")
    heir = new_engine(using, "heir")
    try:
        wait(lambda: [replica.id for replica in store.replicas()] == ["doomed"], 150)
        controller.start()
        serve(store, camera, EYES_OPTIONS)
        wait(lambda: objects_in_view(store) == {"red": 1, "blue": 1}, 60)
        number = last_frame(store)
        wait(lambda: (s := status(store)) is not None and s.checkpoint_age_s is not None, 20)
        wait(lambda: last_frame(store) >= number + 2 * FPS, 60)  # saved since both were told
        heir.start()
        wait(lambda: len(store.replicas()) == 2, 20)
        ids = ids_in_view(store)
        assert sorted(ids) == ["blue", "red"]

        doomed.kill()
        doomed.wait()
        wait(lambda: (s := status(store)) is not None and s.worker == "heir" and s.restored is not None, 60)
        number = last_frame(store)
        wait(lambda: last_frame(store) >= number + FPS and objects_in_view(store) == {"red": 1, "blue": 1}, 60)
        assert status(store).restored.mode == "checkpoint"  # type: ignore[union-attr]
        assert ids_in_view(store)["blue"] == ids["blue"]  # it stood still meanwhile
        news = [data["at"] for data in events(store, ".detection.new")]
        assert len(news) == len(set(news))  # no id is given twice
        assert news.count(ids["blue"]) == 1
    finally:
        doomed.kill()
        doomed.stdin.close()
        doomed.wait()
        controller.stop()
        heir.stop()
        heir.store.close()


def last_frame(store: StateStore) -> int:
    """Number of the newest frame that anything was told of."""
    records = store.scores("yard", limit=1)
    return int(records[-1]["frame_number"]) if records else -1


SHOWN = """([image, drawing]) => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const boxes = [...drawing.querySelectorAll("rect.object")].map((box) => {
    const [x, y, wide, high] = ["x", "y", "width", "height"].map((name) => box[name].baseVal.value);
    const middle = [...context.getImageData(Math.round(x + wide / 2), Math.round(y + high / 2), 1, 1).data];
    const edges = [[x + 3, y + high / 2], [x + wide - 3, y + high / 2]].map(
      ([at, row]) => [...context.getImageData(Math.round(at), Math.round(row), 1, 1).data]);
    return { track: box.dataset.track, colour: getComputedStyle(box).stroke, middle, edges };
  });
  return { frame: image.dataset.frame, drawn: drawing.dataset.frame, boxes };
}"""  # what the tile shows at one moment: numbers of picture and drawing, and the pixels under each box


def test_the_page_draws_the_boxes_of_the_very_frame_it_shows(camera, using, store, engines, tmp_path):
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser on this machine: install one of {', '.join(BROWSERS)}")
    from tests.unit.services.http_kit import serving

    models = (
        ServedModel(name=MODEL, labels=MOTION9.labels, mode="step", input_px=128, default=True),
        ServedModel(name=EYES, task="detection", labels=LABELS, mode="step", input_px=96),
    )
    manager = StreamManager(store, using, models=models)
    with serving(manager) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url}/")
        serve(store, camera, {"name": MODEL}, EYES_OPTIONS)
        tile = page.locator('[data-stream="yard"]')
        expect(tile.locator(".badge")).to_have_text("running", timeout=60_000)
        expect(tile.locator("rect.object")).to_have_count(2, timeout=30_000)
        expect(tile.locator(".found .zone, .found .line")).to_have_count(2)
        expect(tile.locator(".objects li")).to_have_count(2)
        expect(tile.locator(".objects")).to_contain_text("red")

        colours: dict[str, set[str]] = {}
        frames: set[str] = set()
        for _ in range(40):
            picture, drawing = tile.locator("img.live"), tile.locator("svg.found")
            shown = page.evaluate(SHOWN, [picture.element_handle(), drawing.element_handle()])
            if not shown["frame"] or shown["drawn"] != shown["frame"]:
                continue  # the picture was replaced between the two handles
            frames.add(shown["frame"])
            for box in shown["boxes"]:
                colours.setdefault(box["track"], set()).add(box["colour"])
                for red, _, blue, _ in (box["middle"], *box["edges"]):
                    assert abs(red - blue) > 100, "a box lies on paint, edge to edge: it is this frame's"
            page.wait_for_timeout(60)
        assert len(frames) >= 5
        assert all(len(seen) == 1 for seen in colours.values()), "a track keeps its colour"
        assert len({colour for seen in colours.values() for colour in seen}) == len(colours)
        expect(page.locator(".event", has_text="blue")).to_have_count(1, timeout=10_000)
        expect(tile.locator(".objects .object-note", has_text="in right")).not_to_have_count(0, timeout=20_000)
        page.screenshot(path=tmp_path / "objects.png")

        answer = page.request.get(f"{url}/v1/streams/yard/latest.jpg")
        overlay = json.loads(Image.open(io.BytesIO(answer.body())).info["comment"])
        assert str(overlay["number"]) == answer.headers["x-frame-number"]
        assert errors == []
        browser.close()
