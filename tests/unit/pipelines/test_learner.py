from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines import learner
from pipelines.learner import CarriedPass, Learner, Learning
from pipelines.scoring import NotFinite
from pipelines.study import Team
from pipelines.training_data import ClipOptions, NothingReadable, TrainingData
from tests.unit.pipelines.training_kit import RECIPE, Moving, moving_job, with_training
from tsm_core.backbones import run
from tsm_core.model import build
from tsm_core.recipes import Recipe, generic


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def learning(tmp_path: Any, recipe: Recipe = RECIPE, **options: Any) -> Learning:
    found = Learning(moving_job(tmp_path, recipe, **options), Team(say=lambda _: None))
    found.prepare()
    return found


def weights(found: Learning) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in found.model.net.state_dict().items()}


def gradients(found: Learning, batches: list[Any]) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(*_: Any, **__: Any) -> None:
        seen.extend(parameter.grad.clone() for parameter in found.parameters)

    handle = found.optimiser.register_step_pre_hook(keep)
    found.step(batches, 0, 0, 0.1)
    handle.remove()
    return seen


def still(recipe: Recipe = RECIPE) -> Recipe:
    return replace(recipe, dropout=0.0)


# --- carried state


@pytest.mark.parametrize("start", ["zeros", "own"])
@pytest.mark.parametrize("backbone", ["resnet_small", "mobilenet_v2"])
def test_pieces_with_carried_state_equal_the_whole_clip(backbone, start):
    model = build(generic(backbone, "uni", "ab", start=start)).eval()
    clip = torch.randn(2, 12, 3, 64, 64)
    with torch.no_grad():
        whole = model.forward_frames(clip)
        network, held, pieces = Learner(model, carry=True), None, []
        for piece in torch.split(clip, 4, dim=1):
            logits, held = network(piece, held)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


def test_what_is_carried_takes_no_gradient():
    model = build(generic("resnet_small", "uni", "ab")).train()
    how = CarriedPass(2, None, "zeros")
    run(model.net, torch.randn(4, 3, 32, 32), how)
    assert how.next_held
    assert not any(held.requires_grad for held in how.next_held.values())
    later = CarriedPass(2, how.next_held, "zeros")
    run(model.net, torch.randn(4, 3, 32, 32), later).sum().backward()


def test_carried_training_steps_once_for_all_pieces(tmp_path):
    found = learning(tmp_path, still(), carry_state=True, clips=ClipOptions(frames=12))
    batch = next(found.batches())
    assert batch.pixels.shape[1] == 12
    steps = []
    found.optimiser.register_step_pre_hook(lambda *_: steps.append(1))
    facts = found.step([batch], 0, 0, 0.1)
    assert (len(steps), facts.clips, facts.bad) == (1, 4, False)


def test_loss_of_every_frame_and_of_the_mean(tmp_path):
    mean, frames = learning(tmp_path, still()), learning(tmp_path, still(), per_frame_loss=True)
    batch = next(mean.batches())
    logits = mean.model.forward_frames(torch.zeros(1, 4, 3, 32, 32))
    assert logits.shape == (1, 4, 2)
    first, second = mean.step([batch], 0, 0, 0.0), frames.step([batch], 0, 0, 0.0)
    assert first.loss != second.loss
    assert second.loss / second.clips == pytest.approx(0.7, abs=0.1)


# --- a step


def test_gradient_is_the_mean_over_all_clips_of_a_step(tmp_path):
    """Whatever the sizes of its micro-batches, as long as norms do not look at the batch."""
    whole, parts = learning(tmp_path, still(), batch=4), learning(tmp_path, still(), batch=3, accumulate=2)
    batches = list(islice(parts.batches(), 4))
    assert [len(batch.labels) for batch in batches] == [3, 3, 3, 1]
    one = learner.Batch(
        torch.cat([batches[2].pixels, batches[3].pixels]), torch.cat([batches[2].labels, batches[3].labels]), []
    )
    for found in (whole, parts):
        found.model.net.eval()
    for mine, theirs in zip(gradients(whole, [one]), gradients(parts, batches[2:]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_gradient_is_clipped(tmp_path):
    found = learning(tmp_path, with_training(clip_norm=0.01))
    seen = gradients(found, [next(found.batches())])
    assert float(torch.stack([grad.norm() for grad in seen]).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_step_without_a_number_leaves_nothing_behind(tmp_path, monkeypatch, number):
    found = learning(tmp_path)
    batches = found.batches()
    found.step([next(batches)], 0, 0, 0.1)
    before, momenta = weights(found), {name: dict(state) for name, state in found.optimiser.state.items()}
    normalise = learner.normalise
    monkeypatch.setattr(learner, "normalise", lambda pixels, spec: normalise(pixels, spec) * number)
    facts = found.step([next(batches)], 0, 1, 0.1)
    assert facts.bad
    assert not facts.overflow
    assert all(torch.equal(value, before[name]) for name, value in weights(found).items())
    for name, state in found.optimiser.state.items():
        assert torch.equal(state["momentum_buffer"], momenta[name]["momentum_buffer"])
    monkeypatch.undo()
    assert not found.step([next(batches)], 0, 2, 0.1).bad


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns(tmp_path, amp):
    found = learning(tmp_path, amp=amp)
    batches = found.batches()
    before = weights(found)
    losses = [found.step([next(batches)], 0, number, 0.01) for number in range(3)]
    assert all(0 < facts.loss / facts.clips < 5 for facts in losses)
    assert not torch.equal(before["conv1.weight"], found.model.net.conv1.weight)
    assert found.model.net.conv1.weight.dtype == torch.float32


def test_fp16_overflow_lowers_the_scale_and_is_no_fault_of_the_loss(tmp_path):
    found = learning(tmp_path, amp="fp16")
    found.scaler.scale(torch.zeros(1))  # so that there is a scale
    found.scaler.load_state_dict({**found.scaler.state_dict(), "scale": 2.0**40})
    facts = found.step([next(found.batches())], 0, 0, 0.1)
    assert facts.bad
    assert facts.overflow
    assert found.scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("blend", ["mixup", "cutmix"])
def test_blended_batches_learn_soft_labels(tmp_path, blend, monkeypatch):
    seen = []
    soft_loss = learner.soft_cross_entropy
    monkeypatch.setattr(
        learner, "soft_cross_entropy", lambda logits, soft: seen.append(soft) or soft_loss(logits, soft)
    )
    found = learning(tmp_path, with_training(blend=blend))
    batches = found.batches()
    for number in range(3):
        assert not found.step([next(batches)], 0, number, 0.01).bad
    assert all(torch.allclose(soft.sum(1), torch.ones(len(soft))) for soft in seen)
    assert any(((soft > 0.01) & (soft < 0.99)).any() for soft in seen)


def test_partial_batch_norm_keeps_statistics(tmp_path):
    found = learning(tmp_path, with_training(partial_bn=True))
    found.judge()
    before = weights(found)
    found.step([next(found.batches())], 0, 0, 0.1)
    norms = [name for name, module in found.model.net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    changed = {
        name
        for name in norms
        if not torch.equal(before[f"{name}.running_mean"], weights(found)[f"{name}.running_mean"])
    }
    assert changed == {"bn1"}
    assert torch.equal(before["layer1.0.bn1.weight"], found.model.net.layer1[0].bn1.weight)


def test_draws_belong_to_the_step(tmp_path):
    """Dropout of a step is the same, whatever was drawn before."""
    first, second = learning(tmp_path), learning(tmp_path)
    batch = next(first.batches())
    torch.rand(100)
    one = first.step([batch], 0, 0, 0.0)
    torch.rand(7)
    assert second.step([batch], 0, 0, 0.0).loss == one.loss
    assert second.step([batch], 0, 1, 0.0).loss != one.loss


# --- validation


def test_validation_counts_hits(tmp_path):
    found = learning(tmp_path)
    found.model.net.fc.weight.data.zero_()
    found.model.net.fc.bias.data.copy_(torch.tensor([1.0, 0.0]))
    figures = found.judge()
    assert figures["top1"] == figures["mean_class"] == 0.5
    assert figures["top5"] == 1.0
    assert figures["val_loss"] == pytest.approx((0.3133 + 1.3133) / 2, abs=1e-3)
    assert found.model.net.training


def test_validation_counts_unreadable_videos(tmp_path):
    found = learning(tmp_path, max_skipped=0.2)
    found.data = TrainingData(found.data.train, Moving(6, 4, bad=(2,)))
    assert found.judge()["val_unreadable"] == 1
    found.data = TrainingData(found.data.train, Moving(6, 4, bad=(2, 3)))
    with pytest.raises(NothingReadable, match="2 of 6 validation videos cannot be read") as caught:
        found.judge()
    assert caught.value.reason == "too_many_unreadable"


def test_scores_that_are_no_numbers_are_told(tmp_path):
    found = learning(tmp_path)
    found.model.net.fc.weight.data.fill_(float("nan"))
    with pytest.raises(NotFinite):
        found.judge()
