"""A small network whose layers can be cut unevenly, a cost that measures without a clock, and plans with both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import tdfx
from tdfx import Modelled, Plan, Policy
from tdfx.cost.count import Flow, flops
from tdfx.factors.operation import Operation


class ByFlops:
    """A cost that measures one second for each billion operations of the forward pass."""

    modelled = Modelled()
    autocast = None

    def __init__(self) -> None:
        self.asked: list[int] = []

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return flops(chain, flow or Flow(8, (8, 8))) / 1e9

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        times = {case: self.seconds(*case) for group in groups for case in group}
        self.asked.append(len(times))
        return times

    def update_seconds(self, values: int, device: str) -> float:
        return 0.0


def lowish(model: nn.Module) -> nn.Module:
    """Give weights spectra that decay at different rates."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for number, layer in enumerate(layers):
        u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1).double(), full_matrices=False)
        decay = torch.exp(-torch.arange(len(s)) * (0.05 + 0.05 * (number % 3)))
        layer.weight.data = ((u * decay) @ v).reshape(layer.weight.shape).to(torch.float32)
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    return lowish(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.Linear(64, 48)))


X = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(1))


def planned(**settings: Any) -> Plan:
    settings = {"min_gain": 0, "round_to": 1, "cost": Modelled(), **settings}
    return tdfx.plan(net(), Policy(**settings), example_inputs=(X,))
