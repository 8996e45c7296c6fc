"""A whole evaluation from names and paths: the result, its files, what is refused before it starts."""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines import evaluate as front
from pipelines.choice import BadEvaluation
from pipelines.evaluate import evaluate, run_evaluation
from pipelines.journal import OtherJournal
from pipelines.scoring import CropDoesNotFit, Videos
from tests.unit.pipelines.evaluate_kit import make_videos, model_of, recipe_of
from tsm_core.checkpoints import save_model
from tsm_core.model_file import ModelFileError
from tsm_core.recipes import Accuracy, Checkpoint, Published, Views


@pytest.fixture(autouse=True)
def _single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


VIEWS = Views("twice", "center", 36)
RECIPE = replace(
    recipe_of(),
    efficient=Views(crop_px=36),
    accurate=VIEWS,
    published=Published("a page", accurate=Accuracy(70.5, None)),
    checkpoint=Checkpoint("https://example.org/a-00000000.pth", "00000000"),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    """Six folders; a seventh and an eighth are listed, but not there."""
    videos = make_videos(tmp_path_factory.mktemp("videos"))
    lines = [f"{each.path} {each.frames} {each.label}" for each in videos.records]
    lines[2:2] = ["gone_7 20 8", "gone_12 20 8"]
    (videos.root / "list.txt").write_text("\n".join(lines))
    return videos


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(path, model_of(RECIPE))
    return path


def run(videos: Videos, model: Path, **more: object) -> dict:
    options = {"list_file": videos.root / "list.txt", "views": "accurate", "loaders": 0, **more}
    return run_evaluation(RECIPE, model, **options)  # type: ignore[arg-type]


def same(result: dict) -> dict:
    """All but what belongs to one run."""
    return {name: value for name, value in result.items() if name != "run"}


def test_the_result_says_everything(videos, model, tmp_path):
    out = tmp_path / "deep" / "result.json"
    result = run(
        videos,
        model,
        out=out,
        predictions=tmp_path / "all.jsonl",
        confusion=tmp_path / "cm.png",
        per_class=tmp_path / "classes.csv",
        command="tsm evaluate tiny",
    )
    assert json.loads(out.read_text()) == result
    found = evaluate(model_of(RECIPE), RECIPE, videos, VIEWS, loaders=0)
    firsts, labels = [each.top[0][0] for each in found], [each.label for each in found]
    top1 = sum(one == other for one, other in zip(firsts, labels, strict=True)) / 6
    top5 = sum(each.label in [index for index, _ in each.top] for each in found) / 6
    classes = {*firsts, *labels}
    shares = [
        sum(one == index for one, label in zip(firsts, labels, strict=True) if label == index)
        / max(1, labels.count(index))
        for index in classes
    ]
    mean = sum(shares) / len(classes)
    assert result["metrics"] == {"top1_acc": top1, "top5_acc": top5, "mean_class_accuracy": pytest.approx(mean)}
    assert result["percent"]["top5_acc"] == round(100 * top5, 2)

    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert result["recipe"] == "tiny"
    assert result["checkpoint"] == {"name": "tiny.safetensors", "sha256": digest, "source": None}
    assert (result["dataset"], result["list"]) == (None, "list.txt")
    assert result["views"] == {
        "setting": "accurate",
        "clips": "twice",
        "crop": "center",
        "crop_px": 36,
        "frames": 4,
        "per_video": 2,
    }
    assert result["convention"] == {"name": "mmaction2", "averages": "probabilities"}
    assert result["counts"] == {
        "listed": 8,
        "tested": 6,
        "skipped": 2,
        "views": 12,
        "classes": 9,
        "classes_with_videos": 3,
    }
    assert result["skipped"]["reasons"] == {"does not exist": 2}
    assert [each["path"] for each in result["skipped"]["videos"]] == ["gone_7", "gone_12"]
    assert result["published"] == {
        "source": "a page",
        "setting": "accurate",
        "top1": 70.5,
        "top5": None,
        "same_checkpoint": False,
        "note": "for its own checkpoint on all validation videos; not measured here",
    }
    assert result["run"]["command"] == "tsm evaluate tiny"
    assert set(result["run"]["versions"]) == {"tsm-live", "python", "torch", "av"}
    assert result["run"]["videos_per_s"] > 0

    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines[:4]] == ["video_0", "video_1", "gone_7", "gone_12"]
    assert "does not exist" in lines[2]["error"]
    first = found[0].top[0]
    assert lines[0]["top"][0] == {"class": first[0], "name": RECIPE.labels[first[0]], "probability": first[1]}
    assert len(lines[0]["top"]) == 5
    rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [int(row["videos"]) for row in rows] == [2, 2, 2, 0, 0, 0, 0, 0, 0]
    assert Image.open(tmp_path / "cm.png").width > 500


def test_other_views_have_no_published_figure(videos, model):
    for asked, setting in (({"views": "efficient"}, "efficient"), ({"crop": "ten"}, "other")):
        result = run(videos, model, **asked)
        assert result["views"]["setting"] == setting
        assert result["published"] is None
    mean_only = run(videos, model, metrics=["mean_class_accuracy"])
    assert list(mean_only["percent"]) == ["mean_class_accuracy"]


def test_resume_goes_on_with_the_same_and_refuses_other(videos, model, tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    whole = run(videos, model)

    class Killed(BaseException):
        pass

    def kill(done, *_):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        run(videos, model, out=out, on_progress=kill)
    assert not out.exists()
    for change, said in (
        (
            {"views": "efficient"},
            "views '2 clips x center 36 of 4 frames' there, '1 clip x center 36 of 4 frames' here",
        ),
        ({"limit": 7}, "list '.*' there, '.*' here; videos 8 there, 7 here"),
    ):
        with pytest.raises(OtherJournal, match=said):
            run(videos, model, out=out, resume=True, **change)
    other = tmp_path / "other.safetensors"
    save_model(other, model_of(RECIPE, seed=5))
    with pytest.raises(OtherJournal, match="something else: checkpoint '"):
        run(videos, other, out=out, resume=True)

    result = run(videos, model, out=out, resume=True)
    assert result["run"]["taken_from_journal"] == 3
    assert same(result) == same(whole) == same(json.loads(out.read_text()))

    monkeypatch.setattr(front, "score", lambda *_: pytest.fail("all is known"))
    again = run(videos, model, out=out, resume=True, confusion=tmp_path / "cm.png")
    assert same(again) == same(whole)
    assert (tmp_path / "cm.png").exists()


def test_what_cannot_work_is_told_before_anything_is_done(videos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(front, "evaluate", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    bad = {
        r"metrics map: there are top_k_accuracy, mean_class_accuracy": {"metrics": ["map"]},
        r"metrics none": {"metrics": []},
        r"--confusion .*cm.jpg must end in .png": {"confusion": tmp_path / "cm.jpg"},
        r"--per-class .*table must end in .csv or .md": {"per_class": tmp_path / "table"},
        r"file/result.json cannot be written: (Not a directory|File exists)": {
            "out": tmp_path / "file" / "result.json"
        },
        r"folder cannot be written: Is a directory": {"out": tmp_path / "folder"},
        r"two outputs have the same name": {"out": tmp_path / "a", "predictions": tmp_path / "a"},
        r"resume needs the --out": {"resume": True},
    }
    for said, options in bad.items():
        with pytest.raises(BadEvaluation, match=said):
            run(videos, model, **options)
    with pytest.raises(CropDoesNotFit):
        run(videos, model, crop_px=100)
    with pytest.raises(ModelFileError, match=r"frames 4 there, 8 here"):
        run_evaluation(replace(RECIPE, frames=8), model, list_file=videos.root / "list.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_conventions_judge_classes_differently(videos, tmp_path):
    """A class that was only predicted counts with one and not with the other."""
    recipe = replace(recipe_of("mit"), accurate=VIEWS)
    save_model(tmp_path / "mit.safetensors", model_of(recipe))
    result = run_evaluation(recipe, tmp_path / "mit.safetensors", list_file=videos.root / "list.txt", views="accurate")
    assert result["convention"] == {"name": "mit", "averages": "logits"}
    found = evaluate(model_of(recipe), recipe, videos, VIEWS)
    per_class = [
        [each.top[0][0] == each.label for each in found if each.label == index]
        for index in sorted({each.label for each in found})
    ]
    expected = sum(sum(hits) / len(hits) for hits in per_class) / len(per_class)
    assert result["metrics"]["mean_class_accuracy"] == pytest.approx(expected)
