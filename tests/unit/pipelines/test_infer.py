"""A file down the whole road: every frame has a result, equal to stepping by hand."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from pipelines.infer import BadOutput, annotate, infer_file
from pipelines.sources import BadFile, iter_file
from tsm_core.model import WindowTSM, build
from tsm_core.preprocess import PreprocessSpec
from tsm_core.recipes import Recipe
from tsm_core.zoo import UnknownModel

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
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p"
        for number in range(FRAMES):
            image = np.random.default_rng(number // 5).integers(0, 255, (72, 96, 3), np.uint8)
            picture = av.VideoFrame.from_ndarray(image, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return path


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
