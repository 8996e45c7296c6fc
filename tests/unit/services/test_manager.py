"""Policy and verbs of the StreamManager over a memory store."""

import re
import socket
from pathlib import Path

import pytest

from pipelines.faults import BadSource
from services.manager import (
    ModelOptionError,
    NoCapacity,
    ServedModel,
    SourceNotAllowed,
    SourceNotFound,
    SourceUnreachable,
    StreamManager,
    describe,
    served_models,
)
from services.schemas import ReplicaInfo, SourceSpec, StreamSpec, StreamStatus
from services.settings import EngineSettings, ModelSettings, Settings, SourceSettings, StoreSettings
from services.store import MemoryStore, StreamExists, StreamNotFound
from services.stream_models import StreamModel
from tests.unit.services.http_kit import CANARY, MODELS
from tsm_core.detector_recipes import DETECTOR_RECIPES
from tsm_core.errors import CallerError
from tsm_core.postprocess import SmootherMismatch
from tsm_core.recipes import find_recipe
from tsm_core.zoo import UnknownModel


def manager_of(*roots: Path, slots: int = 0) -> StreamManager:
    store = MemoryStore(StoreSettings())
    if slots:
        store.heartbeat(ReplicaInfo(id="r1", pid=1, slots_total=slots), 60_000)
    settings = Settings(source=SourceSettings(file_roots=roots, probe_timeout_s=1.0))
    return StreamManager(store, settings, models=MODELS)


def camera(stream_id: str = "cam", uri: str = "rtsp://127.0.0.1/x", **more: object) -> StreamSpec:
    return StreamSpec(id=stream_id, source=SourceSpec(uri=uri), **more)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    (tmp_path / "films").mkdir()
    (tmp_path / "private").mkdir()
    (tmp_path / "films" / "a b.mp4").write_bytes(b"film")
    (tmp_path / "private" / "key.pem").write_bytes(b"key")
    (tmp_path / "films" / "way-out").symlink_to(tmp_path / "private")
    (tmp_path / "films" / "inside").symlink_to(tmp_path / "films" / "a b.mp4")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("films/a%20b.mp4", None),
        ("films/inside", None),
        ("films/../films/inside", None),
        ("films/none.mp4", SourceNotFound),
        ("films", SourceNotFound),
        ("private/key.pem", SourceNotAllowed),
        ("films/way-out/key.pem", SourceNotAllowed),
        ("films/../private/key.pem", SourceNotAllowed),
        ("films/%2e%2e/private/key.pem", SourceNotAllowed),
        ("filmsy/x.mp4", SourceNotAllowed),
        ("films/a%00b", BadSource),
    ],
)
def test_files_are_opened_below_the_roots_only(folders: Path, path: str, error: type[Exception] | None):
    manager = manager_of(folders / "films")
    source = SourceSpec(uri=f"file://{folders}/{path}")
    if error is None:
        # what is kept has no symlink left that could be turned later
        assert manager.allowed(source).uri == f"file://{folders}/films/a%20b.mp4"
    else:
        with pytest.raises(error):
            manager.allowed(source)


def test_no_roots_means_no_files(folders: Path):
    with pytest.raises(SourceNotAllowed, match=r"source\.file_roots"):
        manager_of().allowed(SourceSpec(uri=f"file://{folders}/films/inside"))
    with pytest.raises(BadSource):
        manager_of(folders).allowed(SourceSpec(uri=f"file://elsewhere{folders}/films/inside"))


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "169.254.0.9", "[fe80::1]", "[::ffff:169.254.169.254]", "0xa9fea9fe", "100.100.100.200"]
)
def test_metadata_and_link_local_addresses_are_never_opened(host: str):
    with pytest.raises(SourceNotAllowed, match="link-local or cloud metadata"):
        manager_of().allowed(SourceSpec(uri=f"rtsp://{host}/x"))


def test_the_settings_say_which_networks_are_opened():
    settings = Settings(source=SourceSettings(networks=("public",)))
    manager = StreamManager(MemoryStore(StoreSettings()), settings, models=MODELS)
    for host, kind in (("localhost", "loopback"), ("192.168.1.20", "private"), ("[::ffff:10.0.0.1]", "private")):
        with pytest.raises(SourceNotAllowed, match=f"a {kind} address; this service opens public"):
            manager.allowed(SourceSpec(uri=f"rtsp://{host}/x"))
    assert manager.allowed(SourceSpec(uri="rtsp://8.8.8.8/x")).uri == "rtsp://8.8.8.8/x"


def test_a_new_source_brings_its_own_password():
    manager = manager_of()
    manager.create(camera(uri=f"rtsp://eye:{CANARY}@127.0.0.1/x"), check=False)
    manager.update("cam", {"source": SourceSpec(uri="rtsp://127.0.0.2/x")}, check=False)
    source = manager.store.get_stream("cam").source
    assert (source.uri, source.username, source.password) == ("rtsp://127.0.0.2/x", None, None)


def test_secrets_stay_off_command_lines():
    manager = manager_of()
    with_password = SourceSpec(uri=f"rtsp://eye:{CANARY}@127.0.0.1/x")
    assert manager.allowed(with_password).decoder == "pyav"
    in_query = SourceSpec(uri=f"rtsp://127.0.0.1/x?user=eye&password={CANARY}")
    assert manager.allowed(in_query).decoder == "pyav"
    assert manager.allowed(SourceSpec(uri="rtsp://127.0.0.1/x")).decoder == "auto"
    with pytest.raises(SourceNotAllowed, match="process list") as refused:
        manager.allowed(with_password.model_copy(update={"decoder": "ffmpeg"}))
    assert CANARY not in str(refused.value)
    shown = manager.create(StreamSpec(id="q", source=in_query), check=False)
    assert CANARY not in shown.model_dump_json()
    assert CANARY in manager.store.get_stream("q").source.uri  # the camera still gets it


def test_models_are_resolved_and_checked():
    manager = manager_of()
    assert manager.create(camera("a"), check=False).models == (StreamModel(name="motion9"),)
    with pytest.raises(UnknownModel, match="served: motion9"):
        manager.create(camera("b", models=(StreamModel(name="x"),)), check=False)
    with pytest.raises(UnknownModel):
        served_models(Settings(engine=EngineSettings(models=(ModelSettings(name="nothing-of-this-name"),))))


def test_options_that_a_model_does_not_have_are_refused():
    manager = manager_of()
    for options, says in (({"stride_s": 1.0}, "stride_s of model 'motion9'"), ({"window_s": 2.0}, "stepped")):
        with pytest.raises(ModelOptionError, match=says) as refused:
            manager.create(camera("a", models=(StreamModel(name="motion9", **options),)), check=False)
        assert refused.value.reason == "model_option"
    with pytest.raises(SmootherMismatch, match="Jester's labels"):
        manager.create(camera("a", models=(StreamModel(name="motion9", smoother="gesture"),)), check=False)


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([{"name": "eyes", "smoother": "exponential"}], "smoother of model 'eyes' mean nothing: it is a detector"),
        ([{"name": "eyes", "where": {"region": "r", "box": [0, 0, 1, 1]}}], "where of model 'eyes'"),
        ([{"name": "motion9", "labels": ["left"]}], "labels of model 'motion9' mean nothing: it is a recogniser"),
        ([{"name": "eyes", "labels": ["cat", "unicorn"]}], "'eyes' has no label unicorn; its labels are cat, dog"),
        ([{"name": "eyes", "filters": {"cow": {}}}], "has no label cow"),
        ([{"name": "eyes", "lines": [{"name": "l", "a": [0, 0], "b": [1, 1], "objects": ["cow"]}]}], "no label cow"),
        ([{"name": "motion9", "where": {"objects_of": "eyes", "labels": ["cow"]}}, {"name": "eyes"}], "no label cow"),
        ([{"name": "eyes", "threshold": 0.01}], "threshold is 0.01"),
    ],
)
def test_options_of_the_other_kind_of_model_are_refused(models: list[dict[str, object]], says: str):
    store = MemoryStore(StoreSettings())
    eyes = ServedModel(name="eyes", task="detection", labels=("cat", "dog"), mode="step", input_px=320)
    manager = StreamManager(store, Settings(), models=(*MODELS, eyes))
    with pytest.raises(CallerError, match=re.escape(says)):
        manager.create(camera("a", models=tuple(map(StreamModel.model_validate, models))), check=False)
    fine = [
        {"name": "motion9", "where": {"objects_of": "eyes", "labels": ["cat"]}},
        {"name": "eyes", "labels": ["cat"]},
    ]
    manager.create(camera("b", models=tuple(map(StreamModel.model_validate, fine))), check=False)


def test_objects_are_a_detectors():
    other = ServedModel(name="ears", labels=("hum",), mode="step", input_px=64)
    manager = StreamManager(MemoryStore(StoreSettings()), Settings(), models=(*MODELS, other))
    models = (
        StreamModel.model_validate({"name": "motion9", "where": {"objects_of": "ears"}}),
        StreamModel(name="ears"),
    )
    with pytest.raises(ModelOptionError, match="'ears', which is a recogniser"):
        manager.create(camera("a", models=tuple(map(StreamModel.model_validate, models))), check=False)


def test_a_detector_says_what_it_is_and_whether_it_sees_the_past():
    shown = describe("eyes", DETECTOR_RECIPES["ssdlite320_mobilenet_v3_large"])
    assert (shown.task, shown.mode, shown.shift, shown.input_px) == ("detection", "step", "none", 320)
    assert "person" in shown.labels
    sees_past, still = (describe(name, DETECTOR_RECIPES[name]) for name in ("moving_shapes_tsm", "moving_shapes_still"))
    assert (sees_past.shift, still.shift) == ("uni", "none")


def test_a_model_says_how_it_is_served():
    online = describe("g", find_recipe("mobilenetv2_jester_online"), default=True)
    assert (online.mode, online.frames_per_result, online.stride_s, online.smoother) == ("step", 1, None, "gesture")
    for name in ("tsm_r50_1x1x8_50e_kinetics400_rgb__ss256", "tsm_r50_1x1x16_50e_sthv2_rgb"):
        recipe = find_recipe(name)
        shown = describe(name, recipe)
        assert (shown.mode, shown.frames_per_result, shown.window_s) == ("window", recipe.frames, recipe.window_s)
        assert shown.stride_s == recipe.window_s / 4


def test_what_a_result_costs_is_told_by_the_replicas_that_hold_the_model():
    manager = manager_of()
    assert {model.gmac_per_result for model in manager.models()} == {None}
    name = MODELS[0].name
    told = ReplicaInfo(id="r1", pid=1, slots_total=1, models=(name,), gmac_per_result={name: 4.1})
    manager.store.heartbeat(told, 60_000)
    assert {model.name: model.gmac_per_result for model in manager.models()}[name] == 4.1


def test_camera_that_does_not_answer_is_refused_unless_told_otherwise():
    manager = manager_of()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    spec = camera(uri=f"rtsp://127.0.0.1:{port}/x")
    with pytest.raises(SourceUnreachable, match="probe=false") as refused:
        manager.create(spec)
    assert refused.value.reason == "stream_connection_failed"
    assert manager.streams() == []
    manager.create(spec, check=False)
    with pytest.raises(StreamExists):
        manager.create(spec, check=False)


def test_slots_are_counted_over_enabled_streams():
    manager = manager_of(slots=2)
    manager.create(camera("a"), check=False)
    manager.create(camera("b"), check=False)
    with pytest.raises(NoCapacity, match="2 slots"):
        manager.create(camera("c"), check=False)
    manager.create(camera("c", enabled=False), check=False)
    with pytest.raises(NoCapacity):
        manager.start("c")
    manager.stop("a")
    assert manager.start("c").status.state == "STARTING"


def test_status_follows_what_should_be_and_who_is_alive():
    manager = manager_of(slots=2)
    store = manager.store
    manager.create(camera("a"), check=False)
    store.publish(store.assign("a", "r1"), status=StreamStatus(state="RUNNING", since=1.0, worker="r1"))
    assert manager.status("a").state == "RUNNING"
    assert manager.stop("a").status.state == "STOPPING", "its replica has yet to let go"
    manager.start("a")
    store.retire("r1")
    lost = manager.status("a")
    assert (lost.state, lost.fps) == ("RESTARTING", 0.0)
    assert "r1" in lost.status_message
    assert manager.stop("a").status.state == "STOPPED"
    manager.delete("a")
    for verb in (manager.get, manager.start, manager.stop, manager.delete, manager.preview, manager.events):
        with pytest.raises(StreamNotFound):
            verb("a")


def test_start_begins_an_ended_file_anew():
    manager = manager_of(slots=2)
    manager.create(camera("a"), check=False)
    lease = manager.store.assign("a", "r1")
    manager.store.publish(lease, status=StreamStatus(state="RUNNING", since=1.0, worker="r1"))
    assert manager.start("a").revision == 1, "it runs already"
    manager.store.publish(lease, status=StreamStatus(state="ENDED", since=1.0, worker="r1"))
    assert manager.start("a").revision == 2
