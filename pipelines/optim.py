"""How weights are learnt: the groups of parameters, their rates and decays, and how the rate falls.

Source: mit-han-lab's train script and MMAction2's TSMOptimizerConstructor, which agree.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tsm_core.detector_recipes import BoxTraining
from tsm_core.errors import CallerError
from tsm_core.recipes import Training

WARM_UP_FROM = 0.1
FALL = 0.1  # at each milestone


class UnknownParameter(CallerError):
    """A network has a parameter that belongs to no group."""

    reason = "unknown_parameter"


def parameter_groups(net: nn.Module, training: Training) -> list[dict[str, Any]]:
    """Groups for torch's optimisers: each trainable parameter in one, none empty, in the order of `training.groups`.

    Each has its `name`, and `lr_factor` and `weight_decay` as the recipe says; `set_rate` gives it its `lr`.
    Raises UnknownParameter for a layer of another kind than convolution, norm and linear.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name, _, _ in training.groups}
    first = next((module for module in net.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1:]
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                members[_group_of(module, path, name, module is first, module in last)].append(parameter)
    return [
        {
            "params": members[name],
            "name": name,
            "lr_factor": lr_factor,
            "weight_decay": training.weight_decay * decay_factor,
        }
        for name, lr_factor, decay_factor in training.groups
        if members[name]
    ]


def _group_of(module: nn.Module, path: str, name: str, is_first: bool, is_last: bool) -> str:
    if isinstance(module, _BatchNorm):
        return "bn"
    if isinstance(module, nn.Linear) and is_last:
        return f"fc_{name}"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        return f"first_conv_{name}" if is_first else f"normal_{name}"
    raise UnknownParameter(
        f"{path}.{name} belongs to a {type(module).__name__}; there are groups for convolutions, norms, linear layers"
    )


def sgd(net: nn.Module, training: Training) -> torch.optim.SGD:
    """The recipes' optimiser, its rate not yet set."""
    return torch.optim.SGD(parameter_groups(net, training), lr=0.0, momentum=training.momentum)


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its rate, `lr` times its factor."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_factor"]


def scaled_lr(training: Training | BoxTraining, total_batch: int) -> float:
    """The recipe's learning rate for so many videos a step."""
    return training.lr * total_batch / training.lr_batch


def lr_share(training: Training, epoch: int, step: int, steps: int) -> float:
    """The share of the learning rate in step `step` of the `steps` of an epoch; all count from 0.

    It falls to a tenth at each milestone. In the first `warmup_epochs` it rises linearly, step by step, from a tenth.
    """
    share = FALL ** sum(epoch >= milestone for milestone in training.milestones)
    warm_up = training.warmup_epochs * steps - 1
    done = epoch * steps + step
    if done < warm_up:
        share *= WARM_UP_FROM + (1 - WARM_UP_FROM) * done / warm_up
    return share


def with_epochs(training: Training, epochs: int) -> Training:
    """The same training in another number of epochs: milestones and warm-up keep their place in it."""
    scale = epochs / training.epochs
    milestones = tuple(round(milestone * scale) for milestone in training.milestones)
    warmup = min(epochs, math.ceil(training.warmup_epochs * scale))
    return replace(training, epochs=epochs, milestones=milestones, warmup_epochs=warmup)


def freeze_norms(net: nn.Module) -> None:
    """Partial batch norm: all norms but the first keep their statistics and weights. After every `net.train()`."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms[1:]:
        norm.eval().requires_grad_(requires_grad=False)
