from prometheus_client.parser import text_string_to_metric_families

from services.store import MemoryStore
from services.telemetry import DROPPED, OTHER, STATES, DoorTelemetry, EngineFigures, StreamFigures, Telemetry, merge
from tests.unit.services.engine_kit import give, picture, processed, running, spec, wait


def figures(*streams: str) -> EngineFigures:
    rows = tuple(
        StreamFigures(name, "RUNNING", 15.0, 10, 7, {"queue": 2, "age": 1}, {"STREAM_STALLED": 1}, 0.5)
        for name in streams
    )
    return EngineFigures(streams=rows, slots_used=len(rows), slots_total=4)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_figures_and_histograms_carry_the_documented_names():
    telemetry = Telemetry(lambda: figures("door"))
    telemetry.stage("infer", 0.003)
    telemetry.published("door", 0.02)
    telemetry.step("motion9", 3)
    telemetry.saved(1000)
    telemetry.restored("cold")
    found = samples(telemetry.text())
    assert found["stream_frames_dropped_total", (("reason", "queue"), ("stream", "door"))] == 2
    assert found["stream_frame_counter_total", (("stream", "door"),)] == 7
    assert found["stream_reconnects_total", (("error_code", "STREAM_STALLED"), ("stream", "door"))] == 1
    assert found["stream_state", (("state", "RUNNING"), ("stream", "door"))] == 1
    assert found["stream_latency_seconds_count", (("stream", "door"),)] == 1
    assert found["stage_duration_seconds_count", (("stage", "infer"),)] == 1
    assert found["batch_size_sum", ()] == 3
    assert found["inference_count_total", (("model", "motion9"),)] == 3
    assert found["state_slots_total", ()] == 4
    assert found["state_checkpoint_bytes_total", ()] == 1000
    assert found["state_restores_total", (("mode", "cold"),)] == 1
    assert found["num_streams_running", ()] == 1


def test_a_streams_labels_end_with_its_session():
    streams = ["door", "gate"]
    telemetry = Telemetry(lambda: figures(*streams))
    for name in streams:
        telemetry.published(name, 0.02)
    streams.remove("door")
    telemetry.forget("door")
    telemetry.forget("never-seen")
    assert "door" not in telemetry.text()
    assert 'stream="gate"' in telemetry.text()


def test_merging_keeps_every_sample_under_its_replica_and_each_family_once():
    texts = {}
    for name in ("r1", "r2"):
        telemetry = Telemetry(lambda name=name: figures(f"cam-{name}"))
        telemetry.stage("infer", 0.003)
        telemetry.published(f"cam-{name}", 0.02)
        texts[name] = telemetry.text()
    text = merge(texts)
    heads = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    expected = {}
    for name, one in texts.items():
        for (sample, labels), value in samples(one).items():
            if not sample.endswith("_created"):
                expected[sample, tuple(sorted((*labels, ("replica", name))))] = value
    assert samples(text) == expected


def test_merging_nothing_gives_an_empty_exposition():
    assert samples(merge({})) == {}
    assert samples(merge({"r1": ""})) == {}


def labels_of(text: str) -> set[str]:
    return {value for (_, labels), _ in samples(text).items() for name, value in labels if name == "stream"}


def test_streams_beyond_the_limit_share_one_label_and_nothing_is_lost_of_the_sums():
    streams = [f"cam-{number}" for number in range(500)]
    telemetry = Telemetry(lambda: figures(*streams), stream_labels=10)
    for name in streams:
        telemetry.published(name, 0.02)
    found = samples(telemetry.text())
    assert labels_of(telemetry.text()) == {*streams[:10], OTHER}
    assert found["stream_frame_counter_total", (("stream", OTHER),)] == 490 * 7
    assert found["stream_latency_seconds_count", (("stream", OTHER),)] == 490
    assert found["stream_state", (("state", "RUNNING"), ("stream", OTHER))] == 490
    assert found["stream_fps", (("stream", OTHER),)] == 490 * 15
    assert found["num_streams_running", ()] == 500


def test_a_label_that_is_given_up_goes_to_another_stream():
    streams = ["a", "b", "c"]
    telemetry = Telemetry(lambda: figures(*streams), stream_labels=2)
    assert labels_of(telemetry.text()) == {"a", "b", OTHER}
    streams.remove("a")
    telemetry.forget("a")
    assert labels_of(telemetry.text()) == {"b", "c"}


def test_whatever_a_thousand_callers_do_the_number_of_series_stays():
    door = DoorTelemetry("gateway")
    for number in range(1000):
        door.http(f"METHOD{number}", None, 404, 0.1)
        door.grpc(None, "UNIMPLEMENTED", 0.1)
    found = [key for key in samples(door.text()) if key[0] in ("http_requests_total", "grpc_requests_total")]
    assert len(found) == 2


def test_what_did_not_happen_is_zero_from_the_beginning():
    row = StreamFigures("door", "STARTING", 0.0, 0, 0, {}, {}, None)
    telemetry = Telemetry(lambda: EngineFigures(streams=(row,), models=("motion9",)))
    telemetry.models(["motion9"])
    found = samples(telemetry.text())
    zeros = {
        "stream_frames_dropped_total": [(("reason", reason), ("stream", "door")) for reason in DROPPED],
        "stream_reconnects_total": [(("error_code", "STREAM_STALLED"), ("stream", "door"))],
        "stream_stalls_total": [(("stream", "door"),)],
        "rtsp_inbound_rtp_packets_lost_total": [(("stream", "door"),)],
        "inbound_frames_in_error_total": [(("stream", "door"),)],
        "inference_request_failure_total": [(("model", "motion9"), ("reason", "step_failed"))],
        "inference_pending_request_count": [(("model", "motion9"),)],
        "store_errors_total": [(("verb", "save"),)],
        "publish_lost_total": [(("kind", "event"),)],
        "stream_migrations_total": [()],
        "num_preemptions_total": [()],
        "state_restores_total": [(("mode", "checkpoint"),)],
    }
    assert {(name, labels): found[name, labels] for name in zeros for labels in zeros[name]} == {
        (name, labels): 0 for name in zeros for labels in zeros[name]
    }
    assert [labels for name, labels in found if name == "stream_state" and found[name, labels]] == [
        (("state", "STARTING"), ("stream", "door"))
    ]
    assert sum(name == "stream_state" for name, _ in found) == len(STATES)


def test_an_engine_tells_each_stage_and_a_stream_that_moves():
    store = MemoryStore()
    with running(store, "r1") as (first, cameras):
        give(store, first, spec("door"))
        for number in range(3):
            cameras["door"].feed(picture("door", number))
            wait(lambda number=number: processed(first, "door") == number + 1)
        wait(lambda: len(store.scores("door")) == 3)
        with running(store, "r2") as (second, _):
            give(store, second, spec("door"))
            wait(lambda: "door" not in first.sessions)
            left, came = samples(first.telemetry.text()), samples(second.telemetry.text())
    stages = {
        dict(labels)["stage"] for (name, labels), n in left.items() if name == "stage_duration_seconds_count" and n
    }
    assert stages == {"queue", "preprocess", "infer", "track", "publish"}
    assert (left["num_preemptions_total", ()], left["stream_migrations_total", ()]) == (1, 0)
    assert (came["num_preemptions_total", ()], came["stream_migrations_total", ()]) == (0, 1)
    assert came["model_loaded", (("model", "motion9"),)] == 1
