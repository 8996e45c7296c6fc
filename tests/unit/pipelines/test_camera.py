import io
import threading
import time
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.camera import (
    Camera,
    CameraError,
    Encoder,
    FileSource,
    Knobs,
    LogEntry,
    SceneSource,
    UnusableVideo,
    burn_frame_number,
    frame_number,
    open_source,
    read_frame_number,
)
from pipelines.rtp import is_key


class Stripes:
    """A cheap source: grey rises with the number."""

    def __init__(self, fps=25.0, width=128, height=96):
        self.fps, self.shape = fps, (height, width, 3)

    def frame(self, number):
        return np.full(self.shape, 40 + number % 150, np.uint8)


class Sink:
    """A viewer that keeps what it gets."""

    def __init__(self):
        self.units, self.times, self.new = [], [], threading.Condition()

    def post(self, unit, *, gap):
        with self.new:
            self.units.append((unit, gap))
            self.times.append(time.monotonic())
            self.new.notify_all()

    def wait(self, count, timeout_s=10.0):
        with self.new:
            assert self.new.wait_for(lambda: len(self.units) >= count, timeout_s), f"{len(self.units)} of {count}"
            return [unit for unit, _ in self.units]


def write_video(
    path, *, codec="libx264", count=30, fps=15, size=(128, 96), options=None, gop=15, container_format=None
):
    """A file whose picture n shows the number n."""
    with av.open(str(path), "w", format=container_format) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, fps)
        stream.options = options or {}
        for n in range(count):
            image = burn_frame_number(np.full((size[1], size[0], 3), 90, np.uint8), n)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    return path


# --- the number in the picture


@pytest.mark.parametrize("size", [(320, 320), (128, 96), (640, 480), (1280, 720), (224, 224)])
@pytest.mark.parametrize("number", [0, 1, 15, 255, 0xFFFFF, 0xAAAAA, 123_456])
def test_number_is_read_back(size, number):
    image = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    assert read_frame_number(burn_frame_number(image, number)) == number


@pytest.mark.parametrize("scaled", [(224, 224), (160, 160), (640, 640), (320, 256), (100, 300)])
def test_number_survives_scaling_and_jpeg(scaled):
    image = burn_frame_number(SceneSource(3).frame(40), 98_765)
    data = io.BytesIO()
    Image.fromarray(image).resize(scaled, Image.Resampling.BILINEAR).save(data, "jpeg", quality=75)
    assert read_frame_number(np.asarray(Image.open(data))) == 98_765


def test_number_wraps_and_leaves_the_picture_alone():
    image = np.zeros((320, 320, 3), np.uint8)
    burnt = burn_frame_number(image, (1 << 20) + 5)
    assert read_frame_number(burnt) == 5
    assert not image.any()
    assert not burnt[:312].any()


@pytest.mark.parametrize("light", [0, 127, 255])
def test_plain_pictures_carry_no_number(light):
    assert read_frame_number(np.full((320, 320, 3), light, np.uint8)) is None


def test_a_wrong_bit_is_noticed():
    burnt = burn_frame_number(np.zeros((320, 320, 3), np.uint8), 77)
    for block in range(24):
        broken = burnt.copy()
        broken[312:, 8 * block : 8 * block + 8] = 255 - broken[312:, 8 * block : 8 * block + 8]
        assert read_frame_number(broken) is None


def test_times_give_numbers():
    assert [frame_number(n / 15, 15) for n in (0, 7, 12_345)] == [0, 7, 12_345]


# --- sources


def test_scene_knows_its_script():
    source = SceneSource(5, size_px=64)
    assert source.frame(3).shape == (64, 64, 3)
    script = source.script(300)
    assert script[0]["start_frame"] == 0
    assert script[-1]["end_frame"] >= 300
    assert all(before["end_frame"] == after["start_frame"] for before, after in pairwise(script))


def test_plain_file_is_served_as_it_is(tmp_path):
    path = write_video(tmp_path / "a.mp4", options={"bf": "0", "preset": "ultrafast"})
    source = FileSource(path)
    assert source.encoded
    assert (source.frames, source.codec, source.fps) == (30, "h264", pytest.approx(15))
    assert [n for n in range(60) if source.unit(n)[1]] == [0, 15, 30, 45]
    assert not FileSource(path, reencode=True).encoded


@pytest.mark.parametrize(
    ("name", "codec", "options", "gop"),
    [
        ("bframes.mp4", "libx264", {"bf": "2", "preset": "veryfast"}, 15),
        ("rarekeys.mp4", "libx264", {"bf": "0", "preset": "ultrafast", "sc_threshold": "0"}, 200),
        ("old.avi", "mpeg4", {}, 15),
    ],
)
def test_other_files_are_encoded_anew(tmp_path, name, codec, options, gop):
    source = FileSource(write_video(tmp_path / name, codec=codec, options=options, gop=gop, count=80))
    assert not source.encoded
    assert source.frames == 80
    # in order, over the end, back, and far ahead
    for wanted in (0, 1, 2, 79, 80, 81, 10, 75, 3):
        assert read_frame_number(source.frame(wanted)) == wanted % 80
    assert read_frame_number(source.peek().to_ndarray(format="rgb24")) == 0


def test_what_is_no_video_is_refused(tmp_path):
    text = tmp_path / "a.mp4"
    text.write_text("no video at all")
    with pytest.raises(UnusableVideo, match=r"a\.mp4 cannot be read"):
        FileSource(text)
    for mount in ("scene:x", str(tmp_path / "missing.mp4")):
        with pytest.raises(CameraError):
            open_source(mount)


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_each_picture_is_one_access_unit_at_once(codec):
    encoder, scene = Encoder(codec, 320, 320, 15.0, 1_000_000), SceneSource(4)
    decoder = av.CodecContext.create({"h264": "h264", "h265": "hevc"}[codec], "r")
    decoder.thread_count, read = 1, []
    for n in range(12):
        nals = encoder.encode(burn_frame_number(scene.frame(n), n), n, key=n % 5 == 0)
        assert is_key(nals, codec) == (n % 5 == 0)
        packet = av.Packet(b"".join(b"\0\0\0\1" + nal for nal in nals))
        read += [read_frame_number(picture.to_ndarray(format="rgb24")) for picture in decoder.decode(packet)]
    read += [read_frame_number(picture.to_ndarray(format="rgb24")) for picture in decoder.decode(None)]
    assert read == list(range(12))


# --- the camera


def test_pictures_are_numbered_paced_and_begin_with_a_key():
    camera = Camera(Stripes(fps=25.0))
    camera.open()
    time.sleep(0.3)  # the clock runs while nobody looks
    joined = camera.now()
    sink = Sink()
    camera.join(sink)
    units = sink.wait(40)
    camera.close()
    numbers = [unit.number for unit in units]
    assert numbers[0] >= max(joined, 7)
    assert numbers == sorted(set(numbers))
    assert units[0].key
    for unit in units:
        assert (unit.timestamp - camera.rtp_base) * 25 == unit.number * 90_000
    keys = [unit.number for unit in units if unit.key]
    assert any(number // 25 != numbers[0] // 25 for number in keys)
    # drift would grow: the last is as punctual as the first, to the machine's jitter
    late = [at - camera._due(n) for at, n in zip(sink.times, numbers, strict=False)]
    assert min(late[-10:]) < min(late[:10]) + 0.05
    assert min(late) >= 0


def test_second_viewer_gets_a_key_at_once():
    camera = Camera(Stripes())
    camera.open()
    first, second = Sink(), Sink()
    camera.join(first)
    first.wait(5)
    camera.join(second)
    units = second.wait(3)
    camera.close()
    assert any(unit.key for unit in units[:2])


def test_nothing_is_encoded_while_nobody_looks():
    camera = Camera(Stripes())
    camera.open()
    assert camera._thread is None
    sink = Sink()
    camera.join(sink)
    sink.wait(2)
    camera.leave(sink)
    deadline = time.monotonic() + 3
    while camera._thread is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert camera._thread is None
    camera.close()


def test_dark_and_light_again():
    camera = Camera(Stripes())
    camera.open()
    sink = Sink()
    camera.join(sink)
    sink.wait(3)
    camera.set(dark=True)
    time.sleep(0.1)
    count = len(sink.units)
    time.sleep(0.3)
    assert len(sink.units) == count
    camera.set(dark=False)
    units = sink.wait(count + 2)
    camera.close()
    assert units[count].key
    assert units[count].number > units[count - 1].number + 5


def test_slow_camera_keeps_its_numbers():
    camera = Camera(Stripes(fps=50.0))
    camera.open()
    sink = Sink()
    camera.set(slow=4)
    camera.join(sink)
    sink.wait(11)
    camera.close()
    spent = sink.times[10] - sink.times[0]
    frames = sink.units[10][0].number - sink.units[0][0].number
    assert spent / frames == pytest.approx(4 / 50, rel=0.25)


def test_clock_jump_moves_timestamps_alone():
    camera = Camera(Stripes())
    before = camera.timestamp(100)
    camera.set(clock_offset_s=20.0)
    assert camera.timestamp(100) - before == 20 * 90_000
    camera.set(clock_offset_s=-3600.0)
    assert 0 <= camera.timestamp(100) < 1 << 32


def test_switch_needs_the_same_rate():
    camera = Camera(Stripes(fps=15.0))
    camera.switch("scene:3")
    assert camera.script(10)
    with pytest.raises(CameraError, match="fps"):
        camera.switch(Stripes(fps=30.0))


def test_switch_between_file_and_encoder_needs_a_key(tmp_path):
    path = write_video(tmp_path / "a.mp4", options={"bf": "0", "preset": "ultrafast"})
    camera = Camera(FileSource(path))
    camera.open()
    sink = Sink()
    camera.join(sink)
    sink.wait(2)
    camera.set(size=(160, 128))
    count = len(sink.units) + 1
    sink.wait(count + 2)
    assert any(unit.key and not gap for unit, gap in sink.units[2 : count + 2])
    camera.set(size=None)
    at = len(sink.units)
    sink.wait(at + 3)
    camera.close()
    assert any(gap for _, gap in sink.units[at : at + 3])
    with pytest.raises(CameraError, match="h265"):
        Camera(Stripes(fps=15.0), codec="h265").switch(FileSource(path))


def test_a_source_that_fails_is_said_and_tried_again(caplog):
    class Broken(Stripes):
        def frame(self, number):
            raise ValueError("no picture")

    camera = Camera(Broken())
    camera.open()
    camera.join(Sink())
    deadline = time.monotonic() + 3
    while camera._thread is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "its source or encoder failed" in caplog.text
    good, sink = Stripes(), Sink()
    camera.switch(good)
    camera.join(sink)
    sink.wait(2)
    camera.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"darkness": True},
        {"loss_rate": 1.5},
        {"bit_flip_rate": -0.1},
        {"slow": 0},
        {"size": (63, 64)},
        {"size": [64]},
        {"status": 200},
    ],
)
def test_wrong_knobs_are_refused(changes):
    with pytest.raises(CameraError, match=next(iter(changes))):
        Knobs().turned(**changes)


@pytest.mark.parametrize("wrong", [{"auth": "digest"}, {"auth": "ntlm"}, {"codec": "vp9"}])
def test_wrong_cameras_are_refused(wrong):
    with pytest.raises(CameraError):
        Camera(Stripes(), **wrong)


def test_log_is_bounded_and_counts_on():
    camera = Camera(Stripes(), log_size=10)
    for n in range(25):
        camera.sent(LogEntry(n, 0.0, "s", "ua"))
    assert [entry.frame_number for entry in camera.log()] == list(range(15, 25))
    assert [entry.frame_number for entry in camera.log(after=22)] == [22, 23, 24]
    assert [entry.frame_number for entry in camera.log(after=3, limit=2)] == [15, 16]
    assert camera.log(after=25) == []
