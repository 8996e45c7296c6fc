from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from pipelines.optim import (
    UnknownParameter,
    freeze_norms,
    lr_share,
    parameter_groups,
    scaled_lr,
    set_rate,
    sgd,
    with_epochs,
)
from tsm_core.backbones import build_backbone
from tsm_core.model import build
from tsm_core.recipes import PAGE_ROWS, RECIPES, Training, twin

K400 = "tsm_r50_1x1x8_50e_kinetics400_rgb__ss256"
NON_LOCAL = "tsm_nl_embedded_gaussian_r50_1x1x8_50e_kinetics400_rgb"
MOBILE = "tsm_mobilenetv2_dense_1x1x8_100e_kinetics400_rgb"
ONE_X = "tsm_imagenet-pretrained-r50_8xb16-1x1x8-50e_kinetics400-rgb"


def training_of(name: str) -> Training:
    training = RECIPES[name].training
    assert training is not None
    return training


@pytest.fixture(scope="module", autouse=True)
def _meta():
    """Shapes alone matter here."""
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        (K400, {"first_conv_weight": 1, "normal_weight": 52, "bn": 106, "fc_weight": 1, "fc_bias": 1}),
        (
            NON_LOCAL,  # five blocks of four convolutions, three of them with bias, and a norm
            {"first_conv_weight": 1, "normal_weight": 72, "normal_bias": 15, "bn": 116, "fc_weight": 1, "fc_bias": 1},
        ),
        (MOBILE, {"first_conv_weight": 1, "normal_weight": 51, "bn": 104, "fc_weight": 1, "fc_bias": 1}),
    ],
)
def test_groups_and_their_numbers(name, tensors):
    training = training_of(name)
    groups = parameter_groups(build(RECIPES[name]).net, training)
    assert {group["name"]: len(group["params"]) for group in groups} == tensors
    factors = {"fc_weight": (5, 1), "fc_bias": (10, 0), "normal_bias": (2, 0), "bn": (1, 0)}
    for group in groups:
        lr, decay = factors.get(group["name"], (1, 1))
        assert (group["lr_factor"], group["weight_decay"]) == (lr, decay * training.weight_decay)


@pytest.mark.parametrize(
    "recipe", [*PAGE_ROWS, *(twin(row) for row in PAGE_ROWS if not row.non_local)], ids=lambda row: row.name
)
def test_every_parameter_is_in_one_group(recipe):
    net = build(recipe).net
    found = [id(parameter) for group in parameter_groups(net, recipe.training) for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in net.parameters()}


def test_first_convolution_with_bias_has_twice_the_rate_and_no_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2))
    groups = {group["name"]: group for group in parameter_groups(net, Training(weight_decay=1.0))}
    assert {name: (group["lr_factor"], group["weight_decay"]) for name, group in groups.items()} == {
        "first_conv_weight": (1, 1),
        "first_conv_bias": (2, 0),
        "normal_weight": (1, 1),
        "normal_bias": (2, 0),
        "fc_weight": (5, 1),
        "fc_bias": (10, 0),
    }
    assert len(groups["normal_weight"]["params"]) == 2


def test_layers_of_other_kinds_are_refused():
    with pytest.raises(UnknownParameter, match=r"1\.weight belongs to a LayerNorm"):
        parameter_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4)), Training())


def test_rates_keep_their_factors():
    optimiser = sgd(build(RECIPES[K400]).net, training_of(K400))
    set_rate(optimiser, 0.02)
    assert [(group["name"], group["lr"]) for group in optimiser.param_groups] == [
        ("first_conv_weight", 0.02),
        ("normal_weight", 0.02),
        ("bn", 0.02),
        ("fc_weight", 0.1),
        ("fc_bias", 0.2),
    ]
    assert optimiser.defaults["momentum"] == 0.9
    assert not optimiser.defaults["nesterov"]
    assert optimiser.defaults["dampening"] == 0


@pytest.mark.parametrize(
    ("name", "batch", "lr"),
    [(K400, 64, 0.01), (K400, 16, 0.0025), (ONE_X, 128, 0.02), (ONE_X, 64, 0.01), (NON_LOCAL, 256, 0.04)],
)
def test_rate_follows_the_batch(name, batch, lr):
    assert scaled_lr(training_of(name), batch) == pytest.approx(lr)


def test_rate_falls_at_milestones():
    shares = [lr_share(Training(epochs=50, milestones=(20, 40)), epoch, 0, 10) for epoch in (0, 19, 20, 39, 40, 49)]
    assert shares == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_rate_rises_from_a_tenth():
    training = training_of(ONE_X)
    assert (training.warmup_epochs, training.milestones) == (5, (25, 45))
    shares = [lr_share(training, step // 10, step % 10, 10) for step in range(60)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[49:] == pytest.approx([1.0] * 11)
    rises = [after - before for before, after in pairwise(shares[:50])]
    assert rises == pytest.approx([0.9 / 49] * 49)
    assert lr_share(training, 25, 0, 10) == pytest.approx(0.1)


def test_other_numbers_of_epochs_keep_the_shape():
    fewer = with_epochs(training_of(ONE_X), 10)
    assert (fewer.epochs, fewer.milestones, fewer.warmup_epochs) == (10, (5, 9), 1)
    assert with_epochs(Training(), 50) == Training()


def test_partial_batch_norm_leaves_the_first_alone():
    with torch.device("cpu"):
        net = build_backbone("resnet_small", 4)
    net.train()
    freeze_norms(net)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [True] + [False] * (len(norms) - 1)
    groups = {group["name"]: group for group in parameter_groups(net, replace(Training(), partial_bn=True))}
    assert len(groups["bn"]["params"]) == 2
