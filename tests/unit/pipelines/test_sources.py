"""Configurations, commands and the small arithmetic of sources."""

import os

import pytest

from pipelines.decoder_child import scaled_size
from pipelines.faults import BadSource
from pipelines.sources import (
    FFmpegMissing,
    Source,
    SourceConfig,
    _child_job,
    _Gaps,
    _mend_first_pts,
    decoder_command,
    find_ffmpeg,
)

SECRETS = [
    {"uri": "rtsp://me:canary@cam/live"},
    {"uri": "rtsp://cam/live", "username": "me", "password": "canary"},
    {"uri": "rtsp://cam/live?user=me&password=canary"},
    {"uri": "rtsp://cam/live", "username": "me", "password": "canary", "decoder": "ffmpeg"},
]


@pytest.mark.parametrize("fields", SECRETS)
def test_a_password_goes_to_the_child_on_stdin_alone(fields):
    config = SourceConfig("cam", **fields)
    command, job = _child_job(config)
    assert config.own_decoder
    assert not any("canary" in word for word in command)
    assert b"canary" in job


def test_a_config_does_not_show_its_password():
    config = SourceConfig("cam", "rtsp://me:canary@cam/live")
    assert "canary" not in repr(config)
    assert (config.uri, config.username, config.password) == ("rtsp://cam/live", "me", "canary")


def test_the_command_reads_rtsp_with_little_delay():
    command = decoder_command(SourceConfig("cam", "rtsp://cam:8554/live", min_side_px=180))
    assert command[command.index("-i") + 1] == "rtsp://cam:8554/live"
    before = command[: command.index("-i")]
    for option, value in (("-rtsp_transport", "tcp"), ("-timeout", "4000000"), ("-flags", "low_delay")):
        assert before[before.index(option) + 1] == value
    assert "file" not in before[before.index("-protocol_whitelist") + 1]
    assert command.count("-threads") == 2  # decoder and encoder: each thread would hold a frame


def test_the_command_of_a_file_may_open_files_alone():
    command = decoder_command(SourceConfig("film", "file:///films/-a%20b.mp4", loop=True))
    assert command[command.index("-i") + 1] == "file:/films/-a b.mp4"
    assert command[command.index("-protocol_whitelist") + 1] == "file"
    assert command[command.index("-stream_loop") + 1] == "-1"


@pytest.mark.parametrize("uri", ["http://cam/x.m3u8", "concat:/etc/passwd", "pipe:0", "file://host/x", "udp://x:1"])
def test_other_schemes_are_refused(uri):
    with pytest.raises(BadSource):
        SourceConfig("cam", uri)


@pytest.mark.parametrize(
    ("source", "side", "size"),
    [
        ((1920, 1080), 256, (456, 256)),
        ((1080, 1920), 256, (256, 456)),
        ((320, 240), 256, (320, 240)),
        ((341, 255), 256, (340, 256)),
        ((64, 2), 256, (64, 2)),
    ],
)
def test_scaled_size_is_even_and_keeps_the_aspect(source, side, size):
    assert scaled_size(*source, side) == size


def test_a_chosen_ffmpeg_must_exist(monkeypatch):
    monkeypatch.setenv("FFMPEG_BINARY", "/nowhere/ffmpeg")
    with pytest.raises(FFmpegMissing, match="/nowhere/ffmpeg"):
        find_ffmpeg()


def test_an_old_ffmpeg_on_the_path_is_passed_over(monkeypatch, tmp_path):
    old = tmp_path / "ffmpeg"
    old.write_text("#!/bin/sh\necho ffmpeg version 4.4.2-0ubuntu0\n")
    old.chmod(0o755)
    monkeypatch.delenv("FFMPEG_BINARY", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = find_ffmpeg()
    assert found.path != str(old)
    assert found.version >= (5, 0)


def gaps(pairs):
    counter = _Gaps()
    told = [counter.update(pts_s, arrival_s) for pts_s, arrival_s in pairs]
    return sum(lost for lost, _ in told), sum(jumped for _, jumped in told)


STEADY = [(n / 10, 100 + n / 10) for n in range(20)]


def test_jitter_is_how_unevenly_pictures_arrive():
    steady, uneven = _Gaps(), _Gaps()
    for pts_s, arrival_s in STEADY:
        steady.update(pts_s, arrival_s)
        uneven.update(pts_s, arrival_s + (0.02 if round(10 * pts_s) % 2 else 0.0))
    assert steady.jitter_s < 1e-9
    assert 0.01 < uneven.jitter_s < 0.02  # 20 ms early or late each time, as far as 19 steps of a sixteenth go


@pytest.mark.parametrize(
    ("then", "lost", "jumps"),
    [
        ([(2.0, 102.0)], 0, 0),
        ([(2.3, 102.3)], 3, 0),  # three pictures are missing
        ([(2.0, 104.9), (2.1, 104.9)], 0, 0),  # late, not lost
        ([(3600.0, 102.0), (3600.1, 102.1)], 0, 1),  # the clock jumped, no time passed
        ([(-3600.0, 102.0), (-3599.9, 102.1)], 0, 1),
        ([(1.90001, 102.0), (1.90002, 102.1), (2.2, 102.2)], 2, 0),
    ],
)
def test_missing_frames_are_told_from_late_ones_and_from_clock_jumps(then, lost, jumps):
    assert gaps(STEADY + then) == (lost, jumps)


@pytest.mark.parametrize(
    ("pts", "mended"),
    [
        ([0.0, 4.1, 4.2, 4.3], [4.0, 4.1, 4.2, 4.3]),
        ([0.0, 0.1, 0.2, 0.3], [0.0, 0.1, 0.2, 0.3]),
        ([7.0, 7.1], [7.0, 7.1]),
        ([0.0, 4.1], [0.0, 4.1]),
        ([], []),
    ],
)
def test_the_first_picture_of_a_session_gets_a_time(pts, mended):
    out = [pts_s for _, pts_s, _ in _mend_first_pts((None, pts_s, 0.0) for pts_s in pts)]
    assert out == pytest.approx(mended)


def test_waits_double_with_full_jitter_up_to_the_cap():
    from pipelines.faults import Fault

    source = Source(SourceConfig("cam", "rtsp://cam/live"), print, print)
    soon = Fault.of("STREAM_STALLED")
    for failures, most in ((0, 0.5), (1, 1.0), (3, 4.0), (9, 15.0), (500, 15.0)):
        waits = [source._delay(soon, failures) for _ in range(200)]
        assert 0 <= min(waits) < most / 4
        assert most * 3 / 4 < max(waits) <= most
    assert source._delay(Fault.of("STREAM_AUTH_FAILED"), 0) == pytest.approx(60, rel=0.11)
    assert source._delay(Fault.of("STREAM_FILE_NOT_FOUND"), 0) is None
