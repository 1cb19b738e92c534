"""The learning rate as a function of the step, the optimizers, and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from recipe.settings import TrainingSettings


def total_steps(steps_per_epoch: int, settings: TrainingSettings) -> int:
    """Return the steps of the whole training."""
    return settings.steps or settings.epochs * steps_per_epoch


def rate_at(step: int, steps_per_epoch: int, settings: TrainingSettings) -> float:
    """Return the learning rate of a step; the first step is 0.

    >>> settings = TrainingSettings(epochs=10, lr=1.0, warmup=2)
    >>> [round(rate_at(step, 5, settings), 3) for step in (0, 9, 10, 30, 49)]
    [0.1, 1.0, 1.0, 0.5, 0.002]
    """
    warmup = settings.warmup * steps_per_epoch
    total = total_steps(steps_per_epoch, settings)
    if step + 1 < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "step":
        factor: float = settings.gamma ** sum(step >= share * total for share in settings.milestones)
        return settings.lr * factor
    begin = math.floor(warmup)
    return settings.lr * (1 + math.cos(math.pi * max(0, step - begin) / max(1, total - begin))) / 2


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainingSettings) -> Optimizer:
    """Return the optimizer of the settings."""
    if settings.optimizer == "adamw":
        return AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    momentum = settings.momentum
    return SGD(parameters, settings.lr, momentum, weight_decay=settings.weight_decay, nesterov=momentum > 0)


def make_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """Return an exponential average of weights and buffers, or None for a decay of 0.

    After n updates its decay is (1 + n) / (10 + n) as long as that is less, so that it is soon free of the random weights.
    """
    if decay == 0:
        return None

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], count: Any) -> None:
        # Each list has one dtype and device. The count stays on its device, so that nothing waits for it.
        dtype = averages[0].dtype
        updates = count.to(torch.promote_types(dtype, torch.float32))
        weight = (1 - ((1 + updates) / (10 + updates)).clamp(max=decay)).to(dtype)
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, weight) if dtype.is_floating_point else average.copy_(value)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
