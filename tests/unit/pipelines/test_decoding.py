"""Sparse frames are those of a whole decode, to the bit; what cannot be read says so."""

import os
import random
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import decoding
from pipelines.decoding import FolderReader, FrameReader, UnreadableVideo, VideoReader, matroska_end, open_frames
from pipelines.sources import find_ffmpeg, iter_file

REAL = Path(__file__).resolve().parents[4] / "shared/videos"
SIZE = (96, 64)


def picture(number):
    """Something that moves, with detail that no codec predicts wholly."""
    dice = np.random.default_rng(5)
    still = dice.integers(0, 256, (8, 12, 3)).repeat(8, 0).repeat(8, 1)
    rough = np.random.default_rng(number).integers(-9, 9, (SIZE[1], SIZE[0], 1))
    return (np.roll(still, 2 * number, axis=1) + rough).clip(0, 255).astype(np.uint8)


def write(path, codec="libx264", *, count=60, gop=12, bframes=0, times=range, options=None, muxer=None, pix="yuv420p"):
    with av.open(str(path), "w", options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, pix
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.thread_count = gop, bframes, 1
        context.time_base = Fraction(1, 25)
        stream.options = options or {}
        for number, time in zip(range(count), times(count), strict=True):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format=pix)
            frame.pts, frame.time_base = time, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def jumpy(count):
    """Frame times of a variable rate: pauses, and runs at full speed."""
    steps = random.Random(1).choices([1, 1, 1, 2, 5, 40], k=count)
    return [sum(steps[:number]) for number in range(count)]


X264 = {"preset": "veryfast", "bf": "3", "x264-params": "log-level=none"}
X265 = {"preset": "ultrafast", "x264-params": "", "x265-params": "log-level=none:pools=none:frame-threads=1"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "16", "auto-alt-ref": "1"}
CLIPS = {
    "gop250.mp4": {"gop": 250, "count": 300, "options": X264},
    "gop12.mp4": {"count": 300, "options": X264},
    "pyramid.mkv": {"gop": 30, "count": 120, "options": X264 | {"x264-params": "log-level=none:b-pyramid=strict"}},
    "open_gop.mp4": {"options": X264 | {"x264-params": "log-level=none:open-gop=1:scenecut=0"}},
    "open_gop.ts": {"options": X264 | {"x264-params": "log-level=none:open-gop=1:scenecut=0"}},
    "refresh.ts": {"options": X264 | {"x264-params": "log-level=none:intra-refresh=1", "bf": "0"}},
    "variable.mp4": {"times": jumpy, "options": X264},
    "variable.mkv": {"times": jumpy, "options": X264},
    "interlaced.mp4": {"options": X264 | {"x264-params": "log-level=none:tff=1"}},
    "ten_bits.mkv": {"pix": "yuv420p10le", "options": X264},
    "hevc.mp4": {"codec": "libx265", "options": X265 | {"preset": "superfast"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b.avi": {"codec": "mpeg4", "bframes": 2},
    "mpeg4_b.mp4": {"codec": "mpeg4", "bframes": 2},
    "h264_b.avi": {"options": X264},
    "vp9.webm": {"codec": "libvpx-vp9", "options": VP9},
    "av1.mkv": {"codec": "libsvtav1", "count": 40, "options": {"preset": "12", "svtav1-params": "lp=1"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "bframes": 2},
    "motion.avi": {"codec": "mjpeg", "pix": "yuvj420p"},
    "one.mp4": {"count": 1, "options": X264},
    "three.webm": {"count": 3, "codec": "libvpx-vp9", "options": VP9},
}
UNTIMED = {"interlaced.mp4", "mpeg4_b.avi", "h264_b.avi"}  # whose frames are counted as they are decoded


def whole(path):
    """All frames as a plain decode from start to end has them."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return [
            torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) for frame in container.decode(stream)
        ]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A function from a clip's name to its path and all its frames, made once."""
    folder, made = tmp_path_factory.mktemp("clips"), {}

    def clip(name):
        if name not in made:
            path = write(folder / name, **CLIPS[name])
            made[name] = path, whole(path)
        return made[name]

    return clip


def assert_sparse_equals_whole(path, frames, times=8):
    with VideoReader(path) as reader:
        assert len(reader) == len(frames)
        for seed in range(times):
            dice = random.Random(seed)
            indices = [dice.randrange(len(frames)) for _ in range(dice.choice([1, 2, 8, 16]))]
            for index, image in zip(indices, reader.frames(indices), strict=True):
                assert torch.equal(image, frames[index]), f"frame {index} of {indices}"
        for index, image in enumerate(reader.frames(range(len(frames)))):
            assert torch.equal(image, frames[index]), f"frame {index} of all"


@pytest.mark.parametrize("name", CLIPS)
def test_sparse_frames_are_those_of_a_whole_decode(clips, name):
    path, frames = clips(name)
    assert len(frames) == CLIPS[name].get("count", 60)
    assert_sparse_equals_whole(path, frames)
    with VideoReader(path) as reader:
        assert reader.by_time is (name not in UNTIMED)
        assert reader.verify() == len(frames)


@pytest.mark.parametrize("name", sorted(path.name for path in REAL.glob("*.*") if path.suffix != ".md") or [None])
def test_real_clips(name):
    if name is None:
        pytest.skip("../shared/videos is not here")
    with av.open(str(REAL / name)) as container:
        count = sum(1 for _ in container.decode(container.streams.best("video")))
    indices = random.Random(name).choices(range(count), k=6)
    with VideoReader(REAL / name) as reader:
        assert len(reader) == count
        images = reader.frames(indices)
    with av.open(str(REAL / name)) as container:
        for number, frame in enumerate(container.decode(container.streams.best("video"))):
            for image in (images[place] for place, index in enumerate(indices) if index == number):
                assert np.array_equal(image.permute(1, 2, 0).numpy(), frame.to_ndarray(format="rgb24")), number


def test_indices_may_repeat_and_come_in_any_order(clips):
    path, frames = clips("gop12.mp4")
    indices = [299, 0, 17, 17, 3, 299, 150]
    with open_frames(path) as reader:
        assert isinstance(reader, FrameReader)
        assert all(torch.equal(image, frames[i]) for i, image in zip(indices, reader.frames(indices), strict=True))
        assert len(reader.frames([])) == 0
        assert reader.frames([7])[0].shape == (3, SIZE[1], SIZE[0])
        assert reader.frames([7])[0].dtype == torch.uint8


def packets_decoded(reader, indices):
    """How many packets went through the decoder, and how many of them it was told to leave out if it can."""
    seen, decode = [], reader._decode

    def spy(packet, *, skip=False):
        if packet is not None:
            seen.append(skip)
        return decode(packet, skip=skip)

    reader._decode = spy
    reader.frames(indices)
    return len(seen), sum(seen)


def test_no_more_is_decoded_than_needed(clips):
    with VideoReader(clips("gop12.mp4")[0]) as reader:
        assert packets_decoded(reader, [290])[0] <= 12
        assert packets_decoded(reader, [0])[0] == 1
    with VideoReader(clips("gop12.mp4")[0]) as reader:
        assert packets_decoded(reader, [18, 56, 93, 131, 168, 206, 243, 281])[0] <= 8 * 12
    with VideoReader(clips("gop250.mp4")[0]) as reader:
        decoded, left_out = packets_decoded(reader, [240])
        assert decoded <= 244
        assert left_out > 200
    with VideoReader(clips("gop12.mp4")[0]) as reader:
        assert packets_decoded(reader, [20, 21, 22, 23, 24, 25])[0] <= 24, "decoding goes on into the next group"


def test_a_long_file_is_read_again_rather_than_held(clips, monkeypatch):
    monkeypatch.setattr(decoding, "HELD_BYTES", 1000)
    for name in ("gop12.mp4", "vp9.webm", "mpeg4_b.avi"):
        path, frames = clips(name)
        assert_sparse_equals_whole(path, frames, times=3)
    with VideoReader(clips("gop12.mp4")[0]) as reader:
        assert packets_decoded(reader, [18, 56, 93, 131])[0] <= 4 * 12


@pytest.mark.parametrize(("name", "codec"), [("film.avi", "mpeg4"), ("film.mp4", "libx264")])
def test_a_key_frame_that_is_none_costs_time_but_no_truth(tmp_path, name, codec):
    path = write(tmp_path / name, codec, gop=250, options={"bf": "0"})
    frames = whole(path)
    with VideoReader(path) as reader:
        assert reader._keys == [(0, 0)]
        reader._keys = [(number, number) for number in range(0, 60, 9)]  # as a careless program may have marked them
        for indices in ([8], [9], [59, 20], [31, 3]):
            assert all(torch.equal(a, frames[i]) for i, a in zip(indices, reader.frames(indices), strict=True))


def test_a_turned_picture_stands_upright(clips, tmp_path):
    path, _ = clips("one.mp4")
    for degrees in (90, 180, 270):
        turned = tmp_path / f"{degrees}.mp4"
        command = [
            find_ffmpeg().path,
            "-v",
            "error",
            "-display_rotation",
            str(degrees),
            "-i",
            path,
            "-c",
            "copy",
            turned,
        ]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this ffmpeg cannot write a rotation")
        with VideoReader(turned) as reader:
            ours = reader.frames([0])[0]
        theirs = next(iter_file(turned)).image
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs.float()).abs().mean() < 3


# --- what cannot be read


def damage(path, kind, clips):
    data = clips("gop12.mp4")[0].read_bytes()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no video at all\n" * 50)
        case "head":
            path.write_bytes(data[:3000])
        case "folder":
            path.mkdir()
        case "sound":
            with av.open(str(path), "w", format="mp4") as out:
                stream = out.add_stream("aac", rate=16000)
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.rate = 16000
                out.mux(stream.encode(frame))
                out.mux(stream.encode())
        case "playlist":
            path.write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{clips('gop12.mp4')[0]}\n#EXT-X-ENDLIST\n")


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "head", "sound", "playlist"])
def test_what_is_no_video_says_so(clips, tmp_path, kind):
    path = tmp_path / f"it is {kind}.mp4"
    damage(path, kind, clips)
    with pytest.raises(UnreadableVideo, match=f"it is {kind}.mp4") as raised:
        open_frames(path)
    assert raised.value.reason == "unreadable_video"
    assert "file:" not in str(raised.value)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("name", ["fast.mp4", "mpeg4.avi", "mpeg4_b.avi", "vp9.webm", "pyramid.mkv"])
def test_a_file_that_is_cut_off(clips, tmp_path, name, share):
    whole = write(tmp_path / name, muxer={"movflags": "faststart"}) if name == "fast.mp4" else clips(name)[0]
    path = tmp_path / f"cut-{name}"
    path.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    said = "" if share < 0.1 else r" is cut off after \d+ frames"
    with pytest.raises(UnreadableVideo, match=f"cut-{name}{said}"):
        VideoReader(path)


def test_damage_inside_a_file(clips, tmp_path):
    path, frames = clips("mpeg4.avi")
    data = bytearray(path.read_bytes())
    with VideoReader(path) as reader:
        start, size = reader._held[30].pos, reader._held[30].size
    data[start : start + size] = bytes(size)
    broken = tmp_path / "broken.avi"
    broken.write_bytes(data)
    with VideoReader(broken) as reader:
        assert len(reader) == len(frames)
        assert torch.equal(reader.frames([20])[0], frames[20])
        assert torch.equal(reader.frames([50])[0], frames[50])
        with pytest.raises(UnreadableVideo, match=r"broken.avi: frame 30 cannot be decoded"):
            reader.frames([2, 30])
        with pytest.raises(UnreadableVideo, match="of 60 frames decode"):
            reader.verify()


@pytest.mark.parametrize("indices", [[60], [3, 999], [-1]])
@pytest.mark.parametrize("name", ["mpeg4.avi", "mpeg4_b.avi"])
def test_a_frame_beyond_the_end(clips, name, indices):
    with VideoReader(clips(name)[0]) as reader, pytest.raises(UnreadableVideo, match=name):
        reader.frames(indices)


def test_names_with_odd_characters(clips, tmp_path):
    for name in ("a#b&c;(d).mp4", "100%.mp4", "q?x=1.mp4", "concat:x|y.mp4", "ä b.mp4", "-i.mp4"):
        path = tmp_path / name
        path.write_bytes(clips("one.mp4")[0].read_bytes())
        with VideoReader(path) as reader:
            assert len(reader) == 1


def test_matroska_says_where_it_ends(clips):
    for name in ("vp9.webm", "pyramid.mkv", "variable.mkv"):
        data = clips(name)[0].read_bytes()
        assert matroska_end(data[:64]) == len(data)
    assert matroska_end(b"") is None
    assert matroska_end(clips("gop12.mp4")[0].read_bytes()[:64]) is None
    live = bytes.fromhex("1a45dfa3 80 18538067 01ffffffffffffff")
    assert matroska_end(live) is None
    assert matroska_end(bytes.fromhex("1a45dfa3 80 18538067 82")) == 4 + 1 + 4 + 1 + 2


# --- folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames")
    for number in range(5):
        Image.fromarray(picture(number)).save(path / f"img_{number + 1:05}.jpg", quality=95)
    return path


def opened(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def test_frames_of_a_folder(folder):
    with open_frames(folder) as reader:
        assert isinstance(reader, FrameReader)
        assert len(reader) == 5
        images = reader.frames([4, 0, 0, 2])
    for index, image in zip([4, 0, 0, 2], images, strict=True):
        assert image.dtype == torch.uint8
        assert torch.equal(image, opened(folder / f"img_{index + 1:05}.jpg"))


def test_other_names_and_numbers(tmp_path):
    for number in (7, 8):
        Image.fromarray(picture(number)).convert("L").save(tmp_path / f"{number:06}.jpg")
    (tmp_path / "flow_x_00001.jpg").touch()
    (tmp_path / "thumbs.db").touch()
    with open_frames(tmp_path, "{:06d}.jpg", start=7) as reader:
        assert len(reader) == 2
        assert reader.frames([1])[0].shape == (3, SIZE[1], SIZE[0]), "grey becomes RGB"


def test_jpegs_of_all_kinds_are_as_pillow_has_them(tmp_path):
    """Grey, four colours, progressive, every subsampling, and bytes too many: which simplejpeg leaves to Pillow."""
    image = Image.fromarray(picture(3))
    kinds = [{"subsampling": number} for number in range(3)] + [{"progressive": True}, {"quality": 5}]
    for number, kind in enumerate(kinds):
        image.save(tmp_path / f"img_{number + 1:05}.jpg", **kind)
    for number, mode in enumerate(("L", "CMYK"), len(kinds)):
        image.convert(mode).save(tmp_path / f"img_{number + 1:05}.jpg")
    odd = (tmp_path / "img_00001.jpg").read_bytes()
    at = odd.find(b"\xff\xdb")
    (tmp_path / f"img_{len(kinds) + 3:05}.jpg").write_bytes(odd[:at] + bytes(4) + odd[at:])
    with open_frames(tmp_path) as reader:
        everything = reader.frames(range(len(reader)))
    assert len(everything) == len(kinds) + 3
    for index, pixels in enumerate(everything):
        assert torch.equal(pixels, opened(tmp_path / f"img_{index + 1:05}.jpg")), index
    Image.fromarray(picture(3)[:16]).save(tmp_path / "img_00002.jpg")
    with open_frames(tmp_path) as reader, pytest.raises(UnreadableVideo, match=r"changes its size"):
        reader.frames([0, 1])


def test_broken_folders(folder, tmp_path):
    with pytest.raises(UnreadableVideo, match="nowhere does not exist"):
        FolderReader(tmp_path / "nowhere")
    with pytest.raises(UnreadableVideo, match=r"holds no frame like img_00001.jpg"):
        len(FolderReader(tmp_path))
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "img_00003.jpg").unlink()
    reader = FolderReader(tmp_path)
    with pytest.raises(UnreadableVideo, match=r"img_00003.jpg is missing"):
        len(reader)
    with pytest.raises(UnreadableVideo, match=r"img_00003.jpg is missing"):
        reader.frames([3, 2])
    with pytest.raises(UnreadableVideo, match=r"img_00006.jpg is missing"):
        reader.frames([5])
    assert len(reader.frames([3])) == 1
    cut = tmp_path / "img_00002.jpg"
    cut.write_bytes(cut.read_bytes()[:-300])
    (tmp_path / "img_00004.jpg").write_text("text")
    (tmp_path / "img_00005.jpg").write_bytes(b"")
    huge = bytearray((folder / "img_00001.jpg").read_bytes())
    at = huge.find(b"\xff\xc0") + 5  # height and width
    huge[at : at + 4] = b"\xff\xf0\xff\xf0"
    (tmp_path / "img_00001.jpg").write_bytes(huge)
    for index in (0, 1, 3, 4):
        with pytest.raises(UnreadableVideo, match=rf"img_0000{index + 1}.jpg is no whole JPEG"):
            reader.frames([index])
