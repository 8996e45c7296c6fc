"""Evaluation with real processes: Ray workers, kills, data sets from their annotations, real clips."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pipelines.datasets import VideoRecord
from pipelines.evaluate import Facts, evaluate, run_evaluation
from pipelines.prepare import check, prepare
from pipelines.ray_local import ray_session
from pipelines.scoring import DecoderDied, Videos
from pipelines.sharing import WorkersDied
from tests.assets.make import make_miniature
from tsm_core.checkpoints import load_model, save_model
from tsm_core.model import build
from tsm_core.preprocess_spec import IMAGENET_MEAN, IMAGENET_STD, PreprocessSpec
from tsm_core.recipes import RECIPES, Recipe, Views, find_recipe

CLIPS = Path(os.environ.get("TSM_VIDEOS_DIR", Path(__file__).resolve().parents[3] / "shared" / "videos"))
CENTER = Views(crop_px=48)
TINY = Recipe(
    "tiny",
    backbone="resnet_small",
    shift="uni",
    labels=("a", "b", "c", "d", "e", "f"),
    frames=4,
    shift_div=4,
    preprocess=PreprocessSpec(input_px=48, resize_px=56),
)


@pytest.fixture(autouse=True)
def _single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file."""
    torch.manual_seed(1)
    model = build(TINY)
    torch.nn.init.normal_(model.net.fc.weight, std=1.0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(path, model)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    """Sixty folders of eight frames, one of them empty."""
    root = tmp_path_factory.mktemp("folders")
    dice = np.random.default_rng(0)
    records = []
    for number in range(60):
        folder = root / f"{number:02}"
        folder.mkdir()
        for frame in range(1, 9) if number != 17 else ():
            noise = dice.integers(0, 256, (7, 9, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((90, 70)).save(folder / f"img_{frame:05}.jpg")
        records.append(VideoRecord(folder.name, number % 6, 8))
    return Videos(tuple(records), root)


def write_list(videos: Videos, path: Path) -> Path:
    path.write_text("".join(f"{each.path} {each.frames} {each.label}\n" for each in videos.records))
    return path


# ---- Ray


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    """Ray on this machine, once for the tests of this file."""
    with ray_session("local", cpus=4, gpus=0) as ray:
        yield ray


def workers() -> list[psutil.Process]:
    """Processes of Ray that are at work for us."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Worker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def doors() -> set[str]:
    """Addresses that our child processes listen on."""
    return {
        door.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process().children(recursive=True)
        for door in process.net_connections("tcp")
        if door.status == psutil.CONN_LISTEN
    }


def test_workers_equal_one_process_though_one_is_killed(ray, tiny, folders):
    load = partial(load_model, tiny)
    alone = evaluate(load, TINY, folders, CENTER, batch=2, loaders=0, device="cpu")
    assert alone[17].error is not None
    killed: list[int] = []
    open_doors: set[str] = set()
    told = []

    def kill(done, total, facts):
        told.append((done, total))
        if done >= 10 and not killed:
            open_doors.update(doors())
            victim = workers()[0]
            killed.append(victim.pid)
            victim.kill()

    shared = evaluate(load, TINY, folders, CENTER, batch=2, workers=2, on_progress=kill)
    assert shared == alone
    assert killed
    assert open_doors == {"127.0.0.1"}
    assert told[-1] == (60, 60)
    until = time.monotonic() + 10
    while workers() and time.monotonic() < until:
        time.sleep(0.1)
    assert not workers()


def test_an_address_is_joined_and_its_cluster_left_as_it_was(ray, tiny, folders, tmp_path):
    listed, out = write_list(folders, tmp_path / "list.txt"), tmp_path / "result.json"
    address = ray.get_runtime_context().gcs_address
    code = "import sys; from pipelines.evaluate import run_evaluation as run; model, listed, root, out = sys.argv[1:]; "
    code += "run('tiny', model, list_file=listed, prefix=root, limit=20, crop_px=48, workers=1, out=out)"
    subprocess.run(
        [sys.executable, "-c", code, str(tiny), str(listed), str(folders.root), str(out)],
        env={**os.environ, "RAY_ADDRESS": address},
        check=True,
        timeout=120,
    )
    alone = run_evaluation("tiny", tiny, list_file=listed, prefix=folders.root, limit=20, crop_px=48)
    assert {**json.loads(out.read_text()), "run": 0} == {**alone, "run": 0}
    assert ray.cluster_resources()["CPU"] == 4


def test_a_video_that_kills_every_worker_is_named(ray, tiny, folders, tmp_path):
    (tmp_path / "poison").mkdir()
    for frame in range(1, 9):
        Image.new("RGB", (90, 70), "white").save(tmp_path / "poison" / f"img_{frame:05}.jpg")
    (tmp_path / "good").symlink_to(folders.root / "00")
    records = tuple(VideoRecord(name, 0, 8) for name in ("good", "poison"))

    def load(device: str) -> nn.Module:
        """A model that ends its process when it sees nothing but white."""
        model = load_model(tiny, device)
        model.register_forward_pre_hook(lambda _, clips: os._exit(1) if clips[0].min() > 1.5 else None)
        return model

    told = []
    with pytest.raises(WorkersDied, match="3 workers died on poison"):
        evaluate(
            load, TINY, Videos(records, tmp_path), CENTER, workers=1, on_progress=lambda done, *_: told.append(done)
        )
    assert told == [0, 1]
    assert not workers()


# ---- what ends all the same, and goes on


def test_a_decoder_that_dies_is_told(tiny, folders):
    before = {process.pid for process in psutil.Process().children()}

    def kill(done, *_):
        if done == 5:
            for process in psutil.Process().children():
                if process.pid not in before:
                    process.kill()

    with pytest.raises(DecoderDied, match="--resume goes on"):
        evaluate(load_model(tiny), TINY, folders, CENTER, loaders=1, on_progress=kill)


SLOWLY = """
import sys, time
from pipelines.evaluate import run_evaluation
import torch
torch.set_num_threads(1)
model, listed, out = sys.argv[1:]
run_evaluation("tiny", model, list_file=listed, crop_px=48, out=out, loaders=1, on_progress=lambda *_: time.sleep(0.1))
"""


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tiny, folders, tmp_path):
    listed, out = write_list(folders, folders.root / "list.txt"), tmp_path / "result.json"
    journal = tmp_path / "result.json.journal"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(tiny), str(listed), str(out)])
    until = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with journal.open("ab") as file:
        file.write(b'[{"index": 99, "pa')  # as if it had been killed in the middle of a line
    run = partial(run_evaluation, "tiny", tiny, list_file=listed, crop_px=48)
    whole, resumed = run(), run(out=out, resume=True, predictions=tmp_path / "all.jsonl")
    assert 11 <= resumed["run"]["taken_from_journal"] < 60
    assert {**resumed, "run": 0} == {**whole, "run": 0}
    assert whole["counts"]["skipped"] == 1
    run(out=tmp_path / "other.json", predictions=tmp_path / "other.jsonl")
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    assert json.loads(out.read_text()) == resumed


# ---- the seven data sets: annotations -> lists -> figures


def shown(path: Path, wanted: int, template: str, start: int) -> list[Image.Image]:
    """The middles of the segments of a folder or file, which is decoded from its beginning to its end."""
    if path.is_dir():
        names = [path / template.format(start + number) for number in range(len(list(path.iterdir())))]
        frames = [Image.open(name).convert("RGB") for name in names]
    else:
        with av.open(str(path)) as film:
            frames = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in film.decode(video=0)]
    return [frames[int((number + 0.5) * len(frames) / wanted)] for number in range(wanted)]


def prepared(frames: list[Image.Image], recipe: Recipe, px: int) -> Tensor:
    """(1, T, 3, px, px): short side 256, the middle, normalised."""
    width, height = frames[0].size
    short = min(width, height)
    if recipe.convention == "mit":
        size = 256 * width // short, 256 * height // short
        pictures = [frame.resize(size, Image.Resampling.BILINEAR) for frame in frames]
        clip = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float()
        x, y = round((clip.shape[3] - px) / 2), round((clip.shape[2] - px) / 2)
    else:
        size = int(256 / short * height + 0.5), int(256 / short * width + 0.5)
        pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2).float()
        clip = functional.interpolate(pixels, size, mode="bilinear").round()
        x, y = (clip.shape[3] - px) // 2, (clip.shape[2] - px) // 2
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((clip[:, :, y : y + px, x : x + px] / 255 - mean) / std)[None]


def teach(features: Tensor, classes: list[int], of: int) -> tuple[Tensor, Tensor]:
    """A classifier that takes each of these features for the class beside it, of so many: (weight, bias)."""
    middle = features.mean(0)
    known = torch.cat([features - middle, features.new_ones(len(features), 1)], dim=1).double()
    wanted = torch.zeros(len(features), of).double()
    wanted[range(len(features)), classes] = 8.0
    solved = torch.linalg.pinv(known) @ wanted
    weight, bias = solved[:-1].T.float(), solved[-1].float()
    return weight, bias - weight @ middle


@pytest.mark.parametrize(
    ("dataset", "name", "kind", "ends"),
    [
        ("kinetics400", "tsm_r50_1x1x8_50e_kinetics400_rgb__340x256", "rawframes", "safetensors"),
        pytest.param("sthv1", "tsm_r50_1x1x8_50e_sthv1_rgb", "rawframes", "safetensors", marks=pytest.mark.slow),
        ("sthv1", "TSM_something_RGB_resnet50_shift8_blockres_avg_segment8_e45", "rawframes", "pth"),
        pytest.param("sthv2", "tsm_r50_1x1x8_50e_sthv2_rgb", "videos", "safetensors", marks=pytest.mark.slow),
        pytest.param("jester", "tsm_r50_1x1x8_50e_jester_rgb", "rawframes", "safetensors", marks=pytest.mark.slow),
        pytest.param(
            "diving48", "tsm_r50_video_1x1x8_50e_diving48_rgb", "videos", "safetensors", marks=pytest.mark.slow
        ),
        pytest.param(
            "hmdb51", "tsm_k400_pretrained_r50_1x1x8_25e_hmdb51_rgb", "rawframes", "safetensors", marks=pytest.mark.slow
        ),
        ("ucf101", "tsm_k400_pretrained_r50_1x1x8_25e_ucf101_rgb", "videos", "safetensors"),
    ],
)
def test_a_miniature_of_each_data_set_has_the_accuracy_worked_out_beside(dataset, name, kind, ends, tmp_path):
    made = make_miniature(dataset, tmp_path, videos_per_class=1, broken=dataset in ("kinetics400", "ucf101"))
    prepare(dataset, tmp_path)
    checked = check(dataset, tmp_path, kind=kind, part="val", split=1, full=True)
    assert checked.fine != any(video.fault for video in made.videos)
    recipe = find_recipe(name)
    torch.manual_seed(0)
    model = build(recipe).eval()

    good = [video for video in made.videos if video.part == "val" and not video.fault]
    home = made.home / made.row.folder(kind, "val")
    paths = [home / (video.path + (made.suffix if kind == "videos" else "")) for video in good]
    truth = [recipe.labels.index(made.row.labels[video.label]) for video in good]
    body = build(recipe).eval()
    body.load_state_dict(model.state_dict())
    body.net.fc = nn.Identity()
    px = recipe.efficient.crop_px
    with torch.no_grad():
        clips = [prepared(shown(path, 8, made.row.template, made.row.start), recipe, px) for path in paths]
        features = torch.cat([body(clip) for clip in clips])
        wrong = (truth[2] + 1) % len(recipe.labels)
        weight, bias = teach(features, [truth[0], truth[1], wrong], len(recipe.labels))
        model.net.fc.weight.copy_(weight)
        model.net.fc.bias.copy_(bias)
        shares = (features @ weight.T + bias).softmax(1)
    first = [int(row.argmax()) for row in shares]
    assert first == [truth[0], truth[1], wrong]
    judged = set(truth) if recipe.convention == "mit" else {*truth, *first}  # each true class has one video

    file = tmp_path / f"weights.{ends}"
    if ends == "pth":
        torch.save(model.net.state_dict(), file)
    else:
        save_model(file, model)
    told: list[tuple[int, int]] = []
    result = run_evaluation(
        name,
        file,
        data_root=tmp_path,
        kind=kind,
        predictions=tmp_path / "all.jsonl",
        max_skipped=0.8,
        on_progress=lambda done, total, _: told.append((done, total)),
    )
    assert result["metrics"]["top1_acc"] == pytest.approx(2 / 3)
    assert result["metrics"]["mean_class_accuracy"] == pytest.approx(2 / len(judged))
    assert result["counts"]["tested"] == 3
    assert (result["counts"]["skipped"] > 0) == any(video.fault for video in made.videos)
    assert told[-1] == (result["counts"]["listed"],) * 2
    found = {each["path"]: each for each in map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())}
    for path, row in zip(paths, shares, strict=True):
        best = found[str(path.relative_to(home))]["top"][0]
        assert (best["class"], best["probability"]) == (int(row.argmax()), pytest.approx(float(row.max()), abs=0.02))


# ---- real clips


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the sample clips are not on this machine (TSM_VIDEOS_DIR)")
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tsm_r50_1x1x8_50e_kinetics400_rgb__ss256", "tsm_mobilenetv2_dense_1x1x8_100e_kinetics400_rgb"]
)
def test_real_clips_in_all_kinds_of_views(name, tmp_path):
    """Ten crops, three crops of two clips, and ten dense clips, with progress; no weights, so no figure to expect."""
    listed = tmp_path / "clips.txt"
    listed.write_text("k400_cleaning_pool.mp4 cleaning pool\nk400_flipping_pancake.mkv flipping pancake\n")
    torch.manual_seed(0)
    save_model(tmp_path / "random.safetensors", build(RECIPES[name]))
    few = 1 if "r50" in name else 2  # half a second a view
    settings = (
        (Views("uniform", "center"), 2),
        (Views("twice", "three", 256), 2),
        (Views("uniform", "ten"), few),
        (Views("dense", "center"), few),
    )
    for views, count in settings:
        told: list[tuple[int, int, Facts]] = []
        result = run_evaluation(
            name,
            tmp_path / "random.safetensors",
            list_file=listed,
            prefix=CLIPS,
            clips=views.clips,
            crop=views.crop,
            limit=count,
            on_progress=lambda *facts, told=told: told.append(facts),
        )
        assert result["counts"]["views"] == count * views.total
        assert result["views"]["crop_px"] == views.crop_px
        assert [(done, total) for done, total, _ in told] == [(step, count) for step in range(count + 1)]
        assert told[-1][2].videos_per_s > 0
        assert 0 <= result["metrics"]["top1_acc"] <= 1
