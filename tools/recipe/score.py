"""Scoring a model on what is held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from recipe.data import DataSet


@dataclass(frozen=True, slots=True)
class Score:
    """What came of it."""

    accuracy: float
    """Right answers in percent."""
    loss: float
    """Mean cross entropy in nats."""


def loss_of(outputs: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of logits (..., classes) for classes (...)."""
    return F.cross_entropy(outputs.flatten(0, -2).float(), y.flatten(), label_smoothing=smoothing)


@torch.no_grad()
def score(model: nn.Module, data: DataSet, device: torch.device, layout: torch.memory_format) -> Score:
    """Score a model in eval mode, all processes their part; each layer is left in the mode that it had."""
    modes = [(one, one.training) for one in model.modules()]
    if data.place.world > 1:
        # Each process has seen other batches: the statistics of the first are the model's.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in data.held_out():
        outputs, answers = model(moved(x, device, layout)), y.to(device)
        right = (outputs.argmax(-1) == answers).sum()
        sums += torch.stack([right, loss_of(outputs, answers) * answers.numel(), torch.tensor(answers.numel())]).to(
            sums
        )
    for one, mode in modes:
        one.training = mode
    if data.place.world > 1:
        dist.all_reduce(sums)
    right, loss, count = sums.tolist()
    return Score(100 * right / count, loss / count)


def moved(x: Tensor, device: torch.device, layout: torch.memory_format) -> Tensor:
    """Return inputs on a device; images in a memory layout."""
    if x.dim() == 4:
        return x.to(device, memory_format=layout, non_blocking=True)
    return x.to(device, non_blocking=True)
