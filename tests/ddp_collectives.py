"""Checks of models whose layers communicate in their forward pass, as SyncBatchNorm does, which needs a GPU."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from ddp_runs import DDP, sgd
from torch import Tensor, nn
from two_processes import on_both

import tdfx
from tdfx.passes.analysis.observe import observe

COST = tdfx.Measured(rounds=1, cache=False, budget=2.0)
TIMED = tdfx.Policy(cost=COST)


class Sum(torch.autograd.Function):
    """The sum over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class SyncNorm(nn.Module):
    """Normalizes by the mean over the batches of all processes, in train mode, with gradients."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x - cast("Any", Sum).apply(x.mean(0)) / dist.get_world_size()
        return x + self.bias


class SyncNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(256, 512), SyncNorm(512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.down(self.norm(self.up(x)).relu()))


class Rare(nn.Module):
    """Has a layer, like an expert, to which the first process's inputs send no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[x.sum(1) > 1e6]
        return torch.cat([self.body(x), self.extra(chosen)])


def batch(scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return scale * torch.randn(64, 256, generator=generator)


def check_a_step_with_a_collective_is_timed_by_all_processes_together() -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Two processes that wait for each other on a busy machine may take very different times.
        patch.setattr("tdfx.passes.planning.step_time._MOST_DOUBT", math.inf)
        plan = tdfx.plan(DDP(SyncNet()), TIMED, example_inputs=(batch(),))
    assert plan.step_seconds is not None
    assert plan.step_seconds > 0
    assert not any("not timed" in note for note in plan.notes), plan.notes
    first, second = on_both(plan.to_json())
    assert first == second


def check_a_switch_of_a_model_with_a_collective_goes_through() -> None:
    model: Any = DDP(SyncNet())
    optimizer = sgd(model.parameters())
    switch = tdfx.Switch(TIMED, when=tdfx.AtStep(3), total_steps=10_000)
    for _ in range(5):
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()
        model = switch.step(model, optimizer=optimizer, example_inputs=(batch(),))
    assert switch.done
    first, second = on_both(str(switch.events))
    assert first == second


def check_all_processes_run_in_train_mode_or_none() -> None:
    inputs = batch(1e9 if dist.get_rank() == 1 else 1.0).abs()
    modes: list[bool] = []

    def recorded(*arguments: Any, training: bool, **settings: Any) -> Any:
        modes.append(training)
        return observe(*arguments, training=training, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tdfx.passes.analysis.shapes.observe", recorded)
        plan = tdfx.plan(DDP(Rare()), tdfx.Policy(rank=tdfx.Ratio(of=0.5), cost=COST), example_inputs=(inputs,))
    assert on_both(modes) == [[False, True], [False, True]]
    reasons = {site.name: site.reason for site in plan}
    assert reasons["extra"] is tdfx.Reason.NOT_CALLED
    first, second = on_both(plan.to_json())
    assert first == second
