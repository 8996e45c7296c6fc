from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.box_sets import BOX_SETS, UnknownBoxes
from pipelines.detector_learner import BoxLearning, box_groups, freeze, rate_share
from pipelines.learners import new_study
from pipelines.rehearsal import dry_run, profile
from pipelines.study import Team
from pipelines.train import fit
from pipelines.training_data import ClipOptions, NothingReadable
from pipelines.training_job import BadOptions
from tests.unit.pipelines.box_kit import RECIPE, TRAINING, Blocks, blocks_job, with_training
from tests.unit.pipelines.training_kit import checkpoint
from tsm_core.checkpoints import load_detector
from tsm_core.detector import build_detector
from tsm_core.model_file import read_card


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def quiet(_: str) -> None:
    pass


def learning(tmp_path: Any, recipe: Any = RECIPE, **options: Any) -> BoxLearning:
    found = new_study(blocks_job(tmp_path, recipe, **options), Team(say=quiet))
    assert isinstance(found, BoxLearning)
    found.prepare()
    return found


def weights(found: BoxLearning) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in found.network.state_dict().items()}


# --- the whole


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    lines: list[str] = []
    recipe = with_training(schedule="one_cycle", epochs=8, lr=4e-3, validate_epochs=4)
    result = fit(blocks_job(place, recipe, say_every_s=0.0), Team(say=lines.append))
    return place, result, lines


def test_training_learns_to_find_blocks(trained):
    _, result, _ = trained
    assert (result.epochs, result.steps, result.bad_steps, result.replaced) == (8, 48, 0, 0)
    assert result.best["vid_all"] > 0.5
    assert result.best["vid_all"] >= result.last["vid_all"]


def test_model_file_steps_online(trained):
    _, result, _ = trained
    model = load_detector(result.model)
    arena = model.new_arena(1)
    slot = arena.allocate()
    video = Blocks(1).video(0)
    boxes = [model.detect(model.step(model.preprocess(frame[None]), arena, [slot]))[0] for frame in video.frames]
    assert all(len(each) for each in boxes)
    truth = torch.from_numpy(video.objects[-1].boxes[0])
    assert (boxes[-1].xyxy[0] - truth).abs().max() < 8


def test_card_and_table_have_the_figures_of_boxes(trained):
    place, _, lines = trained
    recipe, card = read_card(place / "best.safetensors")
    assert recipe.name == "blocks_uni"
    assert card["scores"]["best"]["vid_all"] > 0.5
    header, *rows = (place / "metrics.csv").read_text().splitlines()
    assert header == "epoch,step,lr,loss,epoch_loss,vid_all,vid_slow,vid_medium,vid_fast,coco_ap,coco_ap50,clips_per_s"
    assert len(rows) == 48
    assert (place / "curves.png").stat().st_size > 1000
    assert any("AP50" in line and "COCO AP" in line for line in lines)


@pytest.mark.parametrize("steps", [2, 6, 7])
def test_interrupted_training_ends_as_one_that_was_not(tmp_path, steps):
    fit(blocks_job(tmp_path / "whole", deterministic=True), Team(say=quiet))
    fit(blocks_job(tmp_path / "parts", steps=steps, deterministic=True), Team(say=quiet))
    fit(blocks_job(tmp_path / "parts", deterministic=True), Team(say=quiet))
    first, second = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for number, state in first["optimiser"]["state"].items():
        assert all(torch.equal(value, second["optimiser"]["state"][number][key]) for key, value in state.items())
    assert [row["loss"] for row in first["progress"]["history"]] == [
        row["loss"] for row in second["progress"]["history"]
    ]


# --- a step


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns(tmp_path, amp):
    found = learning(tmp_path, amp=amp)
    batches, before = found.batches(), weights(found)
    facts = [found.step([next(batches)], 0, number, 1e-3) for number in range(2)]
    assert all(0 < each.loss / each.clips < 10 for each in facts)
    assert any(not torch.equal(value, before[name]) for name, value in weights(found).items())
    assert all(value.dtype != torch.bfloat16 for value in weights(found).values())


def test_step_without_a_number_leaves_nothing_behind(tmp_path):
    found = learning(tmp_path)
    batch = next(found.batches())
    before = weights(found)
    poison = found.model.net.head.register_forward_hook(
        lambda *given: {name: tensor * float("nan") for name, tensor in given[2].items()}
    )
    assert found.step([batch], 0, 0, 1e-3).bad
    poison.remove()
    assert all(torch.equal(value, before[name]) for name, value in weights(found).items())
    assert not found.step([batch], 0, 1, 1e-3).bad


def test_clips_without_an_object_are_learnt_from(tmp_path):
    found = learning(tmp_path)
    batch = next(found.batches())
    empty = batch._replace(
        boxes=torch.empty(0, 4), labels=torch.empty(0, dtype=torch.int64), counts=torch.zeros_like(batch.counts)
    )
    facts = found.step([empty], 0, 0, 1e-3)
    assert (facts.bad, facts.loss > 0) == (False, True)


def test_gradient_is_the_mean_over_micro_batches(tmp_path):
    """Two micro-batches of a step, as two workers would have one each."""
    found = learning(tmp_path, with_training(freeze_norm=True))
    batches = found.batches()
    pair = [next(batches), next(batches)]
    seen: list[list[Tensor]] = []
    found.optimiser.register_step_pre_hook(lambda *_: seen.append([each.grad.clone() for each in found.parameters]))
    found.training = replace(found.training, clip_norm=1e9)
    for micro in (pair, pair[:1], pair[1:]):
        found.step(micro, 0, 0, 0.0)
    for both, one, other in zip(*seen, strict=True):
        torch.testing.assert_close(both, (one + other) / 2, rtol=1e-4, atol=1e-6)


def test_frozen_norms_keep_their_statistics_and_learn_the_rest(tmp_path):
    found = learning(tmp_path, with_training(freeze_norm=True))
    before = weights(found)
    found.step([next(found.batches())], 0, 0, 1e-3)
    found.judge()
    found.step([next(found.batches())], 0, 1, 1e-3)
    after = weights(found)
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name)
    assert not torch.equal(before["backbone.stem.1.weight"], after["backbone.stem.1.weight"])


def test_frozen_parts_do_not_learn(tmp_path):
    found = learning(tmp_path, with_training(frozen=("backbone.stem", "backbone.layer1.0")))
    before = weights(found)
    found.step([next(found.batches())], 0, 0, 1e-2)
    kept = {
        name
        for name, value in weights(found).items()
        if torch.equal(value, before[name]) and not name.endswith(("running_mean", "running_var", "tracked"))
    }
    assert {name.split(".")[1] for name in kept} == {"stem", "layer1"}
    with pytest.raises(BadOptions, match=r"no part .backbone.layer9.; its parts are .*backbone"):
        freeze(found.network, ("backbone.layer9",))


def test_groups_hold_each_parameter_once():
    net = build_detector(RECIPE).net
    groups = box_groups(net, replace(TRAINING, backbone_lr=0.1, weight_decay=0.01))
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len({id(each) for each in members}) == len(list(net.parameters()))
    assert sorted((group["lr_factor"], group["weight_decay"]) for group in groups) == [
        (0.1, 0.0),
        (0.1, 0.01),
        (1.0, 0.0),
        (1.0, 0.01),
    ]
    assert all(each.ndim == 1 for group in groups for each in group["params"] if not group["weight_decay"])


# --- rates


def test_milestones_may_lie_within_an_epoch():
    training = replace(TRAINING, epochs=2, milestones=(4 / 3,), warmup_steps=0)
    shares = [rate_share(training, epoch, step, 6) for epoch in range(2) for step in range(6)]
    assert shares == pytest.approx([1.0] * 8 + [0.1] * 4)


def test_rate_rises_to_begin_with():
    training = replace(TRAINING, epochs=1, milestones=(), warmup_steps=4)
    assert [rate_share(training, 0, step, 6) for step in range(6)] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1, 1])


def test_one_cycle_is_torchs():
    training = replace(TRAINING, schedule="one_cycle", epochs=4)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, total_steps=40, cycle_momentum=False)
    for done in range(40):
        assert rate_share(training, done // 10, done % 10, 10) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimiser.step()
        theirs.step()


# --- validation


def test_validation_counts_unreadable_videos(tmp_path):
    found = learning(tmp_path, max_skipped=0.2)
    found.data = found.data._replace(val=Blocks(6, bad=(2,)))
    assert found.judge()["val_unreadable"] == 1
    found.data = found.data._replace(val=Blocks(6, bad=(2, 3)))
    with pytest.raises(NothingReadable, match="2 of 6 validation videos cannot be read"):
        found.judge()


def test_a_validation_without_objects_has_no_figures(tmp_path):
    found = learning(tmp_path)

    class Empty(Blocks):
        def video(self, index: int) -> Any:
            video = super().video(index)
            return type(video)(video.name, tuple(each.only(each.labels < 0) for each in video.objects), video.read)

    found.data = found.data._replace(val=Empty(3))
    assert found.judge() == {"val_unreadable": 0.0}
    assert not any(math.isnan(value) for value in found.judge().values())


# --- what is asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carry_state": True}, "carry_state: blocks_uni is a detector"),
        ({"per_frame_loss": True, "partial_bn": True}, "per_frame_loss, partial_bn: blocks_uni is a detector"),
        ({"clips": ClipOptions(kind="videos")}, "kind: blocks_uni"),
    ],
)
def test_what_is_for_recognisers_is_refused(tmp_path, options, message):
    with pytest.raises(BadOptions, match=message):
        blocks_job(tmp_path, **options)


def test_options_change_the_recipe(tmp_path):
    job = blocks_job(tmp_path, px=32, epochs=4, clips=ClipOptions(max_stride=9))
    assert job.recipe.input_size == (32, 32)
    assert (job.training.epochs, job.training.milestones, job.training.strides) == (4, (3.0,), (1, 9))


def test_unknown_data_is_told(tmp_path):
    with pytest.raises(UnknownBoxes, match="no data set with boxes is called 'nowhere'"):
        fit(blocks_job(tmp_path, replace(RECIPE, dataset="nowhere")), Team(say=quiet))
    assert "blocks" in BOX_SETS


# --- rehearsal


def test_dry_run_draws_the_boxes(tmp_path):
    lines: list[str] = []
    found = dry_run(blocks_job(tmp_path), workers=2, say=lines.append)
    assert (found.total_batch, found.steps_per_epoch) == (4, 3)
    assert found.momentum_bytes > 2 * found.gradients_bytes  # AdamW's two averages
    assert found.labels[0] in ("bright", "dark")
    assert (tmp_path / "first_batch.png").stat().st_size > 500
    assert any("blocks_uni begins with random weights" in line for line in lines)


def test_profile_measures_boxes_too(tmp_path):
    found = profile(blocks_job(tmp_path), steps=2, say=quiet)
    assert min(found.data, found.compute, found.together) > 0
