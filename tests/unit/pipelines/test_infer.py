"""A file down the whole road: every frame has a result, equal to stepping by hand."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from torchvision.ops import box_iou

from pipelines.infer import TRACK_COLOURS, BadOutput, NotForDetectors, annotate, infer_file
from pipelines.scene_boxes import objects_of
from pipelines.scenes import Scene
from pipelines.sources import BadFile, iter_file
from tsm_core.checkpoints import load_detector
from tsm_core.model import WindowTSM, build
from tsm_core.preprocess_spec import PreprocessSpec
from tsm_core.recipes import Recipe
from tsm_core.types import ObjectEvent
from tsm_core.zoo import UnknownModel, find_model

FRAMES, FPS = 30, 15
LABELS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    images = [np.random.default_rng(number // 5).integers(0, 255, (72, 96, 3), np.uint8) for number in range(FRAMES)]
    return written(tmp_path_factory.mktemp("film") / "film.mp4", images)


def written(path, images):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for number, image in enumerate(images):
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def scene():
    return Scene(80_000, fps=FPS)  # of no film that the detector was trained on


@pytest.fixture(scope="module")
def scene_film(scene, tmp_path_factory):
    return written(tmp_path_factory.mktemp("scene") / "scene.mp4", [scene.frame(number) for number in range(FRAMES)])


@pytest.fixture(scope="module")
def detector():
    return load_detector(find_model("scenes_detector")).for_inference()


def model_of(shift, **more):
    torch.manual_seed(3)
    spec = PreprocessSpec(input_px=64, resize="exact")
    recipe = Recipe("tiny", "resnet_small", shift, LABELS, frames=4, shift_div=4, preprocess=spec, **more)
    return build(recipe).eval()


def test_results_are_those_of_stepping(film):
    model = model_of("uni", smoothing_s=0.0, threshold=0.3, off_threshold=0.1, min_action_s=0.0)
    seen = []
    results = list(infer_file(film, model, on_progress=lambda done_s, total_s: seen.append((done_s, total_s))))
    assert [result.frame_number for result in results] == list(range(FRAMES))
    assert [result.time_s for result in results] == pytest.approx([n / FPS for n in range(FRAMES)], abs=1e-4)
    assert seen[-1] == pytest.approx(((FRAMES - 1) / FPS, FRAMES / FPS), abs=0.01)
    clip = torch.stack([model.preprocess([frame.image])[0] for frame in iter_file(film)])
    with torch.no_grad():
        expected = model.forward_frames(clip[None])[0].softmax(dim=1)
    found = torch.tensor([result.scores.values for result in results])
    assert torch.allclose(found.float(), expected, atol=1e-4)
    phases = [event.phase for result in results for event in result.events]
    assert phases.count("new") == phases.count("end") >= 1


def test_window_mode_gives_scores_where_they_are_due(film):
    model = WindowTSM(model_of("bi"), window_s=1.0, stride_s=0.5).eval()
    results = list(infer_file(film, model))
    due = [result for result in results if result.scores is not None]
    assert len(results) == FRAMES
    assert 2 <= len(due) <= 6


def test_the_annotated_video_has_every_frame_at_its_time(film, tmp_path):
    out = tmp_path / "out.mp4"
    assert annotate(film, out, model_of("uni")) == FRAMES
    with av.open(str(out)) as container:
        video = container.streams.video[0]
        pictures = list(container.decode(video))
    assert (video.width, video.height) == (96 * 7, 72 * 7)
    assert [picture.time for picture in pictures] == pytest.approx([n / FPS for n in range(FRAMES)], abs=0.002)
    plain = next(iter_file(film)).image.float().mean()
    assert abs(pictures[0].to_ndarray(format="rgb24")[: 72 * 7 // 2].mean() - plain) < 40
    strip = pictures[-1].to_ndarray(format="rgb24")[-8]
    assert (strip[:, 1].astype(int) - strip[:, 0] > 60).any()  # the green score bar


@pytest.mark.parametrize("name", ["missing.mp4", "text.mp4"])
def test_a_bad_file_is_named_and_leaves_no_output(tmp_path, name):
    (tmp_path / "text.mp4").write_text("no film")
    out = tmp_path / "out.mp4"
    with pytest.raises(BadFile, match=name):
        list(infer_file(tmp_path / name, model_of("uni"), annotate=out))
    assert not out.exists()


def test_bad_places_and_names(film, tmp_path):
    with pytest.raises(BadOutput, match="nowhere"):
        annotate(film, tmp_path / "nowhere" / "out.mp4", model_of("uni"))
    with pytest.raises(BadOutput, match=r"\.txt"):
        annotate(film, tmp_path / "out.txt", model_of("uni"))
    with pytest.raises(BadOutput, match="to be read"):
        annotate(film, film, model_of("uni"))
    with pytest.raises(UnknownModel):
        list(infer_file(film, "no-such-model"))


@pytest.mark.parametrize("min_side_px", [96, 256])
def test_a_detectors_objects_are_where_the_film_shows_them(scene, scene_film, detector, min_side_px):
    results = list(infer_file(scene_film, detector, name="eyes", stream_id="door", min_side_px=min_side_px))
    assert [result.frame_number for result in results] == list(range(FRAMES))
    assert all(result.scores is None and result.objects.source_size == (320, 320) for result in results)
    total = detector.memory_frames
    assert [result.objects.warmup for result in results] == [(min(n, total), total) for n in range(FRAMES)]
    overlaps = []
    for result, truth in zip(results, objects_of(scene, FRAMES), strict=True):
        found = torch.tensor([track.xyxy for track in result.objects.tracks]).reshape(-1, 4)
        wanted = torch.from_numpy(truth.boxes[~truth.ignore])
        overlaps += [max(row, default=0.0) for row in box_iou(wanted, found).tolist()]
    assert len(overlaps) == FRAMES
    assert np.median(overlaps) > 0.7
    assert np.mean(np.array(overlaps) > 0.5) > 0.85


def test_a_detectors_events_tell_the_life_of_each_object(scene_film, detector):
    results = list(infer_file(scene_film, detector, name="eyes", stream_id="door"))
    events = [event for result in results for event in result.events]
    assert {type(event) for event in events} == {ObjectEvent}
    assert {(event.stream_id, event.model) for event in events} == {("door", "eyes")}
    shown = {track.track_id for result in results for track in result.objects.tracks}
    for phase in ("new", "end"):
        assert sorted(event.track_id for event in events if event.phase == phase) == sorted(shown) != []
    assert results[-1].events[-1].phase == "end"


def test_threshold_decides_which_objects_are_told(scene_film, detector):
    strict = list(infer_file(scene_film, detector, threshold=1.0))
    assert [(result.objects.tracks, result.events) for result in strict] == [((), ())] * FRAMES
    with pytest.raises(NotForDetectors, match="off_threshold"):
        list(infer_file(scene_film, detector, off_threshold=0.1))


def test_the_annotated_video_has_a_box_around_each_object(scene_film, detector, tmp_path):
    out, side, line_px = tmp_path / "out.mp4", 512, 3
    results = list(infer_file(scene_film, detector, annotate=out))
    with av.open(str(out)) as container:
        drawn = [picture.to_ndarray(format="rgb24").astype(int) for picture in container.decode(video=0)]
    sources = [Image.fromarray(frame.image.permute(1, 2, 0).numpy()) for frame in iter_file(scene_film)]
    plain = [np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), int) for image in sources]
    colour = ImageColor.getrgb(TRACK_COLOURS[1])
    with_one = 0
    for result, picture, before in zip(results, drawn, plain, strict=True):
        changed = abs(picture - before).sum(axis=2)
        if not result.objects.tracks:
            assert np.median(changed) < 30
            continue
        with_one += 1
        (track,) = result.objects.tracks
        left, top, right, bottom = (round(edge * side / 320) for edge in track.xyxy)
        border, inside = np.zeros((2, side, side), bool)
        border[top : bottom + 1, left : right + 1] = True
        border[top + line_px : bottom + 1 - line_px, left + line_px : right + 1 - line_px] = False
        inside[top + 8 : bottom - 8, left + 8 : right - 8] = True
        assert np.median(abs(picture - colour).sum(axis=2)[border]) < 150 < np.median(changed[border])
        assert np.median(changed[inside]) < 30
    assert with_one > FRAMES // 2
