from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.box_data import BoxVideo, Objects
from pipelines.box_evaluate import is_detector_test, run_box_evaluation
from pipelines.box_judging import READ_FRAMES, found_of, watch
from pipelines.box_sets import UnknownBoxes
from pipelines.choice import BadEvaluation
from pipelines.decoding import UnreadableVideo
from pipelines.evaluate import Facts, TooManyUnreadable
from pipelines.scoring import NotFinite
from tests.unit.pipelines.box_kit import RECIPE, Blocks
from tests.unit.pipelines.vid_kit import make_vid
from tsm_core.boxes import Boxes, letterbox_of
from tsm_core.checkpoints import save_model
from tsm_core.detector import TSMDetector, build_detector
from tsm_core.model_file import ModelFileError

EAGER = replace(RECIPE, score_thresh=0.0)  # what is not trained is sure of nothing


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> TSMDetector:
    torch.manual_seed(0)
    return build_detector(EAGER).eval()


class Films(Blocks):
    """Blocks in wide films of other lengths. bad: film -> the frame that cannot be read."""

    def __init__(self, lengths: tuple[int, ...], bad: dict[int, int] | None = None) -> None:
        super().__init__(len(lengths))
        self._lengths, self._broken = lengths, bad or {}

    def video(self, index: int) -> BoxVideo:
        rng = np.random.default_rng(index)
        frames = torch.from_numpy(rng.integers(0, 255, (self._lengths[index], 3, 40, 80), dtype=np.uint8))

        def read(numbers):
            if self._broken.get(index, -1) in numbers:
                raise UnreadableVideo(f"film {index} is damaged")
            return frames[list(numbers)]

        return BoxVideo(f"film {index}", tuple(Objects.of([[4, 4, 20, 20]], [0]) for _ in frames), read)


def test_videos_side_by_side_are_found_as_alone(model):
    """Whatever their lengths: each has its own state."""
    films = Films((3, READ_FRAMES + 5, 1, 7))
    alone = {each.index: each.judged for each in watch(model, films, range(4), batch=1)}
    together = {each.index: each.judged for each in watch(model, films, range(4), batch=3, readers=2)}
    for index in range(4):
        one, other = alone[index], together[index]
        assert one is not None
        assert other is not None
        assert len(one.found) == len(films.video(index))
        for mine, theirs in zip(one.found, other.found, strict=True):
            assert len(mine) > 0
            np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=0.05)
            np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-4)


def test_frames_are_stepped_as_they_are_served(model):
    film = Films((6,)).video(0)
    arena = model.new_arena(1)
    slot = arena.allocate()
    (watched,) = watch(model, Films((6,)), [0])
    assert watched.judged is not None
    for frame, found in zip(film.frames, watched.judged.found, strict=True):
        (boxes,) = model.detect(model.step(model.preprocess(frame[None]), arena, [slot]))
        served = found_of(boxes, model.input_size, (80, 40))
        np.testing.assert_allclose(found.boxes, served.boxes, atol=1e-3)


def test_boxes_are_told_in_pixels_of_the_picture():
    box = letterbox_of((80, 40), (64, 64))
    corners = box.to_input(torch.tensor([[10.0, 5.0, 30.0, 35.0], [70.0, 30.0, 99.0, 60.0]]))
    found = found_of(Boxes(corners, torch.tensor([0.9, 0.8]), torch.tensor([1, 0])), (64, 64), (80, 40))
    assert found.boxes.round().tolist() == [[10, 5, 30, 35], [70, 30, 80, 40]]  # cut at the edges
    assert found.labels.tolist() == [1, 0]


def test_a_video_that_cannot_be_read_costs_no_other(model):
    films = Films((READ_FRAMES + 4, 5, 3), bad={0: READ_FRAMES + 1, 2: 0})
    found = {each.index: each for each in watch(model, films, range(3), batch=3)}
    assert (found[0].error, found[2].error) == ("film 0 is damaged", "film 2 is damaged")
    assert found[1].judged is not None
    assert len(found[1].judged.found) == 5


def test_weights_that_diverged_are_told(model):
    broken = build_detector(EAGER).eval()
    broken.net.backbone.stem[0].weight.data.fill_(float("nan"))
    with pytest.raises(NotFinite, match="diverged"):
        list(watch(broken, Films((2,)), [0]))


# --- the whole test


@pytest.fixture(scope="module")
def file(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("models") / "blocks_uni.safetensors"
    save_model(path, model)
    return path


def test_result_says_all_that_makes_it_comparable(tmp_path, file):
    told: list[tuple[int, int, Facts]] = []
    out = tmp_path / "result.json"
    result = run_box_evaluation(
        "blocks_uni",
        file,
        limit=4,
        batch=2,
        out=out,
        on_progress=lambda *facts: told.append(facts),
        command="a command",
    )
    assert json.loads(out.read_text()) == result
    assert (result["recipe"], result["dataset"], result["part"], result["shift"]) == (
        "blocks_uni",
        "blocks",
        "val",
        "uni",
    )
    assert (result["counts"]["tested"], result["counts"]["frames"], result["counts"]["objects"]["all"]) == (4, 24, 24)
    assert set(result["per_class"]) == {"bright", "dark"}
    assert result["detection"]["score_thresh"] == 0.0
    assert len(result["checkpoint"]["sha256"]) == 64
    assert 0 <= result["metrics"]["vid_all"] <= 1
    assert result["percent"]["vid_all"] == round(100 * result["metrics"]["vid_all"], 2)
    assert [each[:2] for each in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_list_of_ones_own(tmp_path, file):
    frames = tmp_path / "pictures"
    frames.mkdir()
    from PIL import Image

    Image.new("RGB", (64, 64), (9, 9, 9)).save(frames / "a.png")
    made = {
        "categories": [{"id": 44, "name": "dark"}],
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 44, "bbox": [2, 2, 20, 20]}],
    }
    (tmp_path / "list.json").write_text(json.dumps(made))
    result = run_box_evaluation("blocks_uni", file, list_file=tmp_path / "list.json", prefix=frames)
    assert (result["dataset"], result["list"], result["counts"]["tested"]) == (None, "list.json", 1)
    assert result["per_class"]["bright"] is None
    (frames / "a.png").unlink()
    with pytest.raises(TooManyUnreadable, match=r"a\.png"):
        run_box_evaluation("blocks_uni", file, list_file=tmp_path / "list.json", prefix=frames)
    with pytest.raises(UnreadableVideo):
        run_box_evaluation("blocks_uni", file, list_file=tmp_path / "list.json", prefix=frames, on_error="raise")


def test_what_does_not_fit_is_told_before_the_test(tmp_path, file):
    with pytest.raises(ModelFileError, match="holds blocks_uni, which is not moving_shapes_tsm"):
        run_box_evaluation("moving_shapes_tsm", file)
    with pytest.raises(BadEvaluation, match="limit 0"):
        run_box_evaluation("blocks_uni", file, limit=0)
    with pytest.raises(BadEvaluation, match="cannot be written"):
        run_box_evaluation("blocks_uni", file, out=tmp_path)
    nowhere = tmp_path / "nowhere_uni.safetensors"
    save_model(nowhere, build_detector(replace(EAGER, name="nowhere_uni", dataset="nowhere")))
    with pytest.raises(UnknownBoxes):
        run_box_evaluation("nowhere_uni", nowhere)


def test_detectors_are_known_by_recipe_or_file(tmp_path, file):
    assert is_detector_test("fcos_resnet50_fpn", "whatever.pth")
    assert is_detector_test("blocks_uni", file)
    assert not is_detector_test("tsm_r50_1x1x8_50e_sthv1_rgb", "whatever.pth")
    assert not is_detector_test("blocks_uni", tmp_path / "absent.safetensors")
    make_vid(tmp_path)  # a folder is no model
    assert not is_detector_test("blocks_uni", tmp_path / "imagenet_vid")
