"""The re-warm-up of learning rates: the rate that each step uses, and the rates that others see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

import tdfx


def weight_and_optimizer(lr: float | Tensor = 0.5) -> tuple[nn.Parameter, SGD]:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return weight, SGD([weight], lr=lr)


def rate_of_step(weight: nn.Parameter, optimizer: Optimizer) -> float:
    """Take a step of SGD with a gradient of 1, and return the rate that it used."""
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return float(before - weight.detach())


def test_rates_rise_linearly_and_then_the_hooks_are_removed() -> None:
    weight, optimizer = weight_and_optimizer()
    rewarm = tdfx.Rewarm(optimizer, 4, start=0.2)
    assert [rate_of_step(weight, optimizer) for _ in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5], rel=1e-12
    )
    assert rewarm.done
    assert rewarm.factor == 1.0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_scheduler_does_not_see_the_scaled_rates() -> None:
    weight, optimizer = weight_and_optimizer()
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    tdfx.Rewarm(optimizer, 4, start=0.2)
    used, seen = [], []
    for _ in range(6):
        used.append(rate_of_step(weight, optimizer))
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == [0.5, 0.25, 0.25, 0.125, 0.125, 0.0625]
    assert used == pytest.approx([0.1, 0.2, 0.15, 0.2, 0.125, 0.125], rel=1e-12)


def test_a_tensor_that_two_groups_share_is_scaled_once_and_stays_the_same_tensor() -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    weights = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    optimizer = SGD([{"params": [weight], "lr": lr} for weight in weights])
    tdfx.Rewarm(optimizer, 4, start=0.2)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert [float(weight.detach()) for weight in weights] == pytest.approx([-0.1, -0.1], rel=1e-12)
    assert all(group["lr"] is lr for group in optimizer.param_groups)
    assert float(lr) == 0.5


class Failing(SGD):
    """Raises in its step if ``fail`` is set."""

    fail = False

    def step(self, closure: Any = None) -> Any:
        if self.fail:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("tensor", [False, True])
def test_the_rate_is_restored_after_a_step_that_raised(tensor: bool) -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Failing([weight], lr=torch.tensor(0.5, dtype=torch.float64) if tensor else 0.5)
    rewarm = tdfx.Rewarm(optimizer, 4, start=0.2)
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        rate_of_step(weight, optimizer)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    optimizer.fail = False
    assert rate_of_step(weight, optimizer) == pytest.approx(0.1, rel=1e-12)
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        rate_of_step(weight, optimizer)
    rewarm.remove()
    assert float(optimizer.param_groups[0]["lr"]) == 0.5


def test_a_rate_that_was_set_after_a_step_that_raised_is_kept() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Failing([weight], lr=0.5)
    tdfx.Rewarm(optimizer, 4, start=0.2)
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        rate_of_step(weight, optimizer)
    optimizer.fail = False
    optimizer.param_groups[0]["lr"] = 2.0
    assert rate_of_step(weight, optimizer) == pytest.approx(0.4, rel=1e-12)


def test_hooks_before_a_step_see_the_scaled_rate() -> None:
    weight, optimizer = weight_and_optimizer()
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(optimizer.param_groups[0]["lr"]))
    tdfx.Rewarm(optimizer, 4, start=0.2)
    rate_of_step(weight, optimizer)
    assert seen == pytest.approx([0.1], rel=1e-12)


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_it_goes_on_where_it_was_saved(taken: int) -> None:
    weight, optimizer = weight_and_optimizer()
    rewarm = tdfx.Rewarm(optimizer, 4, start=0.2)
    for _ in range(taken):
        rate_of_step(weight, optimizer)
    state = rewarm.state_dict()
    weight, optimizer = weight_and_optimizer()
    resumed = tdfx.Rewarm(optimizer, 4, start=0.2)
    resumed.load_state_dict(state)
    rates = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert rate_of_step(weight, optimizer) == pytest.approx(rates[taken], rel=1e-12)


def test_states_of_other_settings_are_refused() -> None:
    rewarm = tdfx.Rewarm(weight_and_optimizer()[1], 4)
    with pytest.raises(tdfx.PolicyError, match=r"not the state of a Rewarm with steps=4 and start=0\.1.*'steps': 5"):
        rewarm.load_state_dict(tdfx.Rewarm(weight_and_optimizer()[1], 5).state_dict())
    state = rewarm.state_dict()
    rewarm.remove()
    with pytest.raises(tdfx.PolicyError, match=r"This Rewarm has ended.*Make a new Rewarm"):
        rewarm.load_state_dict(state)


def test_settings_out_of_range_are_refused() -> None:
    optimizer = Adam([nn.Parameter(torch.zeros(1))])
    with pytest.raises(tdfx.PolicyError, match="steps=0 is not a whole number of at least 1"):
        tdfx.Rewarm(optimizer, 0)
    for start in (0.0, 1.5, float("nan")):
        with pytest.raises(tdfx.PolicyError, match=r"start=.* is not in \(0, 1\]"):
            tdfx.Rewarm(optimizer, 3, start=start)
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(tdfx.OptimizerError, match="Adam has a group without 'lr'"):
        tdfx.Rewarm(optimizer, 3)
    assert not optimizer._optimizer_step_pre_hooks
