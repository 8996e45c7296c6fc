"""What travels on the wire checks itself, and keeps a password to itself."""

import json

import pytest
from pydantic import ValidationError

from services.schemas import SourceSpec, StreamSpec, cloud_event, score_record, state_event
from services.stream_models import StreamModel
from tsm_core.types import ActionEvent, Scores


@pytest.mark.parametrize(
    ("uri", "clean", "username", "password"),
    [
        ("rtsp://cam/live", "rtsp://cam/live", None, None),
        ("rtsp://me:canary@cam:8554/live?a=1", "rtsp://cam:8554/live?a=1", "me", "canary"),
        ("rtsp://me:can@ary@cam/live", "rtsp://cam/live", "me", "can@ary"),
        ("rtsp://me:can%2Fary@cam/live", "rtsp://cam/live", "me", "can/ary"),
        ("RTSP://me@[::1]:554/@live", "rtsp://[::1]:554/@live", "me", None),
        ("file:///films/a@b.mp4", "file:///films/a@b.mp4", None, None),
    ],
)
def test_userinfo_leaves_the_address(uri: str, clean: str, username: str | None, password: str | None):
    source = SourceSpec.model_validate({"uri": uri})
    assert (source.uri, source.username) == (clean, username)
    assert (source.password.get_secret_value() if source.password else None) == password


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://cam/live", "use rtsp://"),
        ("rtsp:///live", "no host"),
        ("rtsp://me:zap/ped@cam/live", "%2F"),
        ("rtsp://[zap/live", "cannot be read"),
        ("rtsp://cam:99999/live", "cannot be read"),
        ("", "at least 1 character"),
    ],
)
def test_what_is_no_address_is_refused_without_repeating_it(uri: str, says: str):
    with pytest.raises(ValidationError, match=says) as refused:
        SourceSpec.model_validate({"uri": uri})
    assert all("zap" not in error["msg"] for error in refused.value.errors())


def test_the_password_is_not_shown():
    spec = StreamSpec.model_validate({"id": "door", "source": {"uri": "rtsp://me:canary@cam/live"}})
    assert "canary" not in repr(spec) + str(spec) + spec.model_dump_json()


@pytest.mark.parametrize("stream_id", ["", "-a", "a b", "a/b", "a" * 64, "ü"])
def test_ids_are_plain(stream_id: str):
    with pytest.raises(ValidationError, match="id"):
        StreamSpec.model_validate({"id": stream_id, "source": {"uri": "rtsp://cam/"}})


def test_unknown_keys_and_crossed_thresholds_are_errors():
    with pytest.raises(ValidationError, match="Extra inputs"):
        StreamSpec.model_validate({"id": "a", "source": {"uri": "rtsp://cam/", "codec": "h264"}})
    with pytest.raises(ValidationError, match=r"off_threshold 0\.9 is above threshold 0\.5"):
        StreamModel(name="motion9", threshold=0.5, off_threshold=0.9)


def test_an_action_becomes_a_cloud_event():
    event = ActionEvent(
        stream_id="door",
        action_id="a1",
        phase="end",
        label="left",
        score=0.31,
        top_score=0.97,
        top_k=(("left", 0.31), ("still", 0.2)),
        model="motion9",
        frame_number=45,
        pts_s=3.0,
        frame_time_s=1_000_003.0,
        start_time_s=1_000_001.0,
        start_pts_s=1.0,
        end_time_s=1_000_003.0,
    )
    told = cloud_event(event)
    assert (told["specversion"], told["type"], told["source"]) == ("1.0", "tsm.v1.action.end", "/streams/door")
    assert (told["subject"], told["time"]) == ("a1", "1970-01-12T13:46:43.000+00:00")
    assert told["data"]["top_k"][0] == {"label": "left", "score": 0.31}
    assert told["data"]["end_time"] - told["data"]["start_time"] == 2.0
    assert json.loads(json.dumps(told)) == told
    assert cloud_event(event)["id"] != told["id"]


def test_a_change_of_state_becomes_a_cloud_event():
    told = state_event("door", "STARTING", "RUNNING", "320x320 px", 1_000_000.5)
    assert told["type"] == "tsm.v1.stream.state"
    assert (told["data"]["before"], told["data"]["after"]) == ("STARTING", "RUNNING")


def test_a_score_record_tells_the_best_and_the_warm_up():
    cold = Scores(("left", "still"), (0.25, 0.75), warmup_frames=3, warmup_total=7)
    record = score_record("door", "motion9", 3, 0.2, 1_000_000.2, cold)
    assert (record["label"], record["score"], record["warmup"]) == ("still", 0.75, "3/7")
    warm = Scores(("left", "still"), (0.25, 0.75), warmup_frames=7, warmup_total=7)
    assert score_record("door", "motion9", 9, 0.6, 1_000_000.6, warm)["warmup"] is None
