"""What several benchmarks train on, and how: scikit-learn's digits, Python's own sources, learning rate, and one step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.demo.run import BATCH, LEARNING_RATE, Digits, jitter

Batch = tuple[Tensor, Tensor]
"""Inputs and labels."""
_MOST_BYTES = 4_000_000
"""Most bytes of source that are read for each part."""


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


def python_sources() -> tuple[Tensor, Tensor]:
    """Return bytes (n,) to train on, and bytes of every twentieth file to hold out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    training_files = [file for index, file in enumerate(files) if index % 20]
    return _read_bytes(training_files), _read_bytes(files[::20])


def _read_bytes(files: list[Path]) -> Tensor:
    content = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(content[:_MOST_BYTES]), dtype=torch.uint8).long()


def pieces(text: Tensor, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return pieces (count, length) of a text from random positions, and for each byte the one after it."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    windows = text[starts + torch.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


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
