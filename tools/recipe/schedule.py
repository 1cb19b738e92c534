"""Learning rates as a function of the step alone, optimizers, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from recipe.settings import Training


def rate_at(step: int, steps_per_epoch: int, wish: Training) -> float:
    """Return the learning rate of a step, the first of which is 0.

    >>> wish = Training(epochs=10, lr=1.0, warmup=2)
    >>> [round(rate_at(step, 5, wish), 3) for step in (0, 9, 10, 30, 49)]
    [0.1, 1.0, 1.0, 0.5, 0.002]
    """
    warm = wish.warmup * steps_per_epoch
    total = wish.epochs * steps_per_epoch
    if step + 1 < warm:
        return wish.lr * (step + 1) / warm
    if wish.schedule == "step":
        passed: float = wish.gamma ** sum(step >= part * total for part in wish.milestones)
        return wish.lr * passed
    begin = math.floor(warm)
    return wish.lr * (1 + math.cos(math.pi * max(0, step - begin) / max(1, total - begin))) / 2


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all groups a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(parameters: Iterable[nn.Parameter], wish: Training) -> Optimizer:
    """Return what trains the parameters."""
    if wish.optimizer == "adamw":
        return AdamW(parameters, lr=wish.lr, weight_decay=wish.weight_decay)
    nesterov = wish.momentum > 0
    return SGD(parameters, lr=wish.lr, momentum=wish.momentum, nesterov=nesterov, weight_decay=wish.weight_decay)


def make_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """Return an exponential average of weights and buffers, or None for a decay of 0.

    Early on it forgets faster, so that it is not for long one of random weights: after n updates its decay is
    (1 + n) / (10 + n) as long as that is less.
    """
    if decay == 0:
        return None

    @torch.no_grad()
    def toward(averages: Sequence[Tensor], values: Sequence[Tensor], count: Any) -> None:
        # The lists are of one dtype and device each. The count stays on its device, so that nothing waits for it.
        kind = averages[0].dtype
        if not kind.is_floating_point:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)
            return
        done = count.to(torch.promote_types(kind, torch.float32))
        weight = (1 - ((1 + done) / (10 + done)).clamp(max=decay)).to(kind)
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, weight)

    return AveragedModel(model, multi_avg_fn=toward, use_buffers=True)
