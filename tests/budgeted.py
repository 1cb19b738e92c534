"""A small network whose layers lose unevenly when cut, a cost that measures without a clock, and plans made with both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import tdfx
from tdfx import Modelled, Plan, Policy
from tdfx.cost.count import Flow, flops
from tdfx.factors.operation import Operation
from tdfx.passes.planning.relative_time import StepTime

X = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(1))


class ByFlops:
    """A cost that measures one second for each billion operations of the forward pass."""

    modelled = Modelled()
    autocast = None

    def __init__(self) -> None:
        self.requests: list[int] = []
        """The number of cases in each request for measurements."""

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return flops(chain, flow or Flow(8, (8, 8))) / 1e9

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        times = {case: self.seconds(*case) for group in groups for case in group}
        self.requests.append(len(times))
        return times

    def update_seconds(self, values: int, device: str) -> float:
        return 0.0


class Scaled(ByFlops):
    """Takes a fixed number of times as long as estimated; measures some of the sites of the first request, or all of each.

    Args:
        scale: How many times longer.
        sites: Which sites to measure; None for all.
    """

    modelled = Modelled(seconds_per_call=0)

    def __init__(self, scale: float, sites: slice | None = None) -> None:
        super().__init__()
        self.scale = scale
        self.sites = sites

    def seconds(self, chain: Sequence[Operation], flow: Flow | None) -> float:
        return self.scale * self.modelled.seconds(chain, flow)

    def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
        if self.sites is not None:
            groups = [] if self.requests else list(groups)[self.sites]
        return super().measure(groups)


def with_decaying_spectra(model: nn.Module) -> nn.Module:
    """Give the weights of a model spectra that decay, each at a pace of its own."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for number, layer in enumerate(layers):
        u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1).double(), full_matrices=False)
        decay = torch.exp(-torch.arange(len(s)) * (0.05 + 0.05 * (number % 3)))
        layer.weight.data = ((u * decay) @ v).reshape(layer.weight.shape).float()
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    return with_decaying_spectra(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.Linear(64, 48))
    )


def plan_net(**settings: Any) -> Plan:
    """Return a plan for ``net`` by a policy with these settings, any gain and any rank allowed."""
    settings = {"min_gain": 0, "round_to": 1, "cost": Modelled(), **settings}
    return tdfx.plan(net(), Policy(**settings), example_inputs=(X,))


def set_step_seconds(monkeypatch: pytest.MonkeyPatch, seconds: float | None = None) -> None:
    """Let the training step of any model take this long, or by default as long as the sites of ``net`` by ``ByFlops``."""
    seconds = sites_seconds() if seconds is None else seconds
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._timed", lambda *_: (StepTime(seconds, 0.0), []))


def sites_seconds() -> float:
    """Return the time of all sites of ``net`` by ``ByFlops``."""
    return sum(site.flops_before or 0 for site in plan_net(parameters=0.5).sites) / 1e9
