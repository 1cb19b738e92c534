"""A small network whose layers can be cut unevenly, a cost that measures without a clock, and plans by the two."""

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
    """A cost that measures: a step takes as many seconds as the forward pass has billions of operations."""

    modelled = Modelled()
    autocast = None

    def __init__(self) -> None:
        self.asked: list[int] = []

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return flops(chain, flow or Flow(8, (8, 8))) / 1e9

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        found = {case: self.seconds(*case) for group in groups for case in group}
        self.asked.append(len(found))
        return found

    def update_seconds(self, values: int, device: str) -> float:
        return 0.0


def lowish(model: nn.Module) -> nn.Module:
    """Give weights spectra that fall off, each at a pace of its own."""
    for number, one in enumerate(layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)):
        flat = one.weight.detach().flatten(1).double()
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        pace = torch.exp(-torch.arange(len(s)) * (0.05 + 0.05 * (number % 3)))
        one.weight.data = (u * pace) @ v if one.weight.dim() == 2 else ((u * pace) @ v).reshape(one.weight.shape)
        one.weight.data = one.weight.data.to(torch.float32)
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    return lowish(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.Linear(64, 48)))


X = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(1))


def planned(**settings: Any) -> Plan:
    settings = {"min_gain": 0, "round_to": 1, "cost": Modelled(), **settings}
    return tdfx.plan(net(), Policy(**settings), example_inputs=(X,))
