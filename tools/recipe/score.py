"""Scores of a model on held-out data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from recipe.data import DataSet


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy and loss on held-out data."""

    accuracy: float
    """In percent."""
    loss: float
    """Mean cross entropy in nats."""


def loss_of(outputs: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of logits (..., classes) for classes (...)."""
    return F.cross_entropy(outputs.flatten(0, -2).float(), y.flatten(), label_smoothing=smoothing)


@torch.no_grad()
def score(model: nn.Module, data: DataSet, device: torch.device, layout: torch.memory_format) -> Score:
    """Score a model in eval mode, each process its part of the data; every layer keeps its mode."""
    modes = [(module, module.training) for module in model.modules()]
    if data.process.world > 1:
        # The processes have seen different batches: the statistics of the first are the model's.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, labels in data.held_out():
        outputs, y = model(to_device(x, device, layout)), labels.to(device)
        correct, count = (outputs.argmax(-1) == y).sum(), torch.tensor(y.numel())
        sums += torch.stack([value.to(sums) for value in (correct, loss_of(outputs, y) * y.numel(), count)])
    for module, mode in modes:
        module.training = mode
    if data.process.world > 1:
        dist.all_reduce(sums)
    correct_count, loss, total = sums.tolist()
    return Score(100 * correct_count / total, loss / total)


def to_device(x: Tensor, device: torch.device, layout: torch.memory_format) -> Tensor:
    """Return inputs on a device; images in a memory layout."""
    return x.to(device, memory_format=layout if x.dim() == 4 else torch.preserve_format, non_blocking=True)
