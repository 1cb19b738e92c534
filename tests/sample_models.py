"""The networks of the files in ``samples/``, in a module of their own because pickles name the module of each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(x))
        y = torch.relu(self.conv2(y))
        out: Tensor = self.fc(y.mean((2, 3)))
        return out


class FunctionalNet(nn.Module):
    """A parameter that ``F.linear`` takes as its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(24, 8) / 3)
        self.fc = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(F.linear(x.mean((2, 3)), self.kernel))
        out: Tensor = self.fc(y)
        return out


def batch() -> Tensor:
    """Return the input of both networks."""
    return torch.sin(0.7 * torch.arange(2 * 8 * 6 * 6)).reshape(2, 8, 6, 6)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    """Take training steps on the input, each with the same loss."""
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(model(batch()).square().mean())
        optimizer.step()
