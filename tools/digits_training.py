"""Training on scikit-learn's handwritten digits, as several benchmarks do it: batches, learning rate, and one step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.demo.run import BATCH, LEARNING_RATE, Digits, jitter

Batch = tuple[Tensor, Tensor]
"""Inputs and labels."""


def batches(digits: Digits, seed: int, *, drop_last: bool = True) -> Iterator[Batch]:
    """Yield batches endlessly; the seed determines their order and their jitter.

    ``drop_last`` leaves out the last, smaller batch of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(digits.train_x)
    used = count // BATCH * BATCH if drop_last else count
    while True:
        order = torch.randperm(count, generator=generator)
        for indices in torch.split(order[:used], BATCH):
            yield jitter(digits.train_x[indices], generator), digits.train_y[indices]


def learning_rate(progress: float) -> float:
    """Return the learning rate after a share of the training, in [0, 1]: up for three tenths, then down to zero.

    >>> [round(learning_rate(progress) / LEARNING_RATE, 2) for progress in (0.0, 0.3, 1.0)]
    [0.0, 1.0, 0.0]
    """
    phase = progress / 0.3 if progress < 0.3 else (1 - progress) / 0.7
    return LEARNING_RATE * (1 - math.cos(math.pi * phase)) / 2


def loss_of(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (..., classes) for classes (...)."""
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten())


def train_step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Take one training step and return its loss."""
    loss = loss_of(model(x), y)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()
