from prometheus_client.parser import text_string_to_metric_families

from services.telemetry import EngineFigures, StreamFigures, Telemetry, merge


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
