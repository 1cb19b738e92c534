"""The re-warm-up of learning rates: what a step uses, and that nobody else sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

import tdfx


def one(lr: float | Tensor = 0.5) -> tuple[nn.Parameter, SGD]:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    return weight, SGD([weight], lr=lr)


def moved(weight: nn.Parameter, optimizer: Optimizer) -> float:
    """Return the rate that a step of SGD with a gradient of one used."""
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return float(before - weight.detach())


def test_rates_rise_linearly_and_then_it_is_gone() -> None:
    weight, optimizer = one()
    rewarm = tdfx.Rewarm(optimizer, 4, start=0.2)
    assert [moved(weight, optimizer) for _ in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5], rel=1e-12)
    assert rewarm.done
    assert rewarm.factor == 1.0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_scheduler_sees_nothing_of_it() -> None:
    weight, optimizer = one()
    scheduler = StepLR(optimizer, 2, gamma=0.5)
    tdfx.Rewarm(optimizer, 4, start=0.2)
    used, seen = [], []
    for _ in range(6):
        used.append(moved(weight, optimizer))
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
    """Raises in its step when told to."""

    fail = False

    def step(self, closure: Any = None) -> Any:
        if self.fail:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("tensor", [False, True])
def test_after_a_step_that_raised_the_next_one_is_right(tensor: bool) -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Failing([weight], lr=torch.tensor(0.5, dtype=torch.float64) if tensor else 0.5)
    rewarm = tdfx.Rewarm(optimizer, 4, start=0.2)
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        moved(weight, optimizer)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    optimizer.fail = False
    assert moved(weight, optimizer) == pytest.approx(0.1, rel=1e-12)
    assert float(optimizer.param_groups[0]["lr"]) == 0.5
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        moved(weight, optimizer)
    rewarm.remove()
    assert float(optimizer.param_groups[0]["lr"]) == 0.5


def test_a_rate_that_another_set_after_a_step_that_raised_is_left() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Failing([weight], lr=0.5)
    tdfx.Rewarm(optimizer, 4, start=0.2)
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        moved(weight, optimizer)
    optimizer.fail = False
    optimizer.param_groups[0]["lr"] = 2.0
    assert moved(weight, optimizer) == pytest.approx(0.4, rel=1e-12)


def test_what_acts_before_a_step_sees_the_rate_that_the_step_uses() -> None:
    weight, optimizer = one()
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(optimizer.param_groups[0]["lr"]))
    tdfx.Rewarm(optimizer, 4, start=0.2)
    moved(weight, optimizer)
    assert seen == pytest.approx([0.1], rel=1e-12)


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_it_goes_on_where_it_was_saved(taken: int) -> None:
    weight, optimizer = one()
    rewarm = tdfx.Rewarm(optimizer, 4, start=0.2)
    for _ in range(taken):
        moved(weight, optimizer)
    state = rewarm.state_dict()
    weight, optimizer = one()
    again = tdfx.Rewarm(optimizer, 4, start=0.2)
    again.load_state_dict(state)
    whole = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert moved(weight, optimizer) == pytest.approx(whole[taken], rel=1e-12)


def test_states_of_others_are_refused() -> None:
    rewarm = tdfx.Rewarm(one()[1], 4)
    with pytest.raises(tdfx.PolicyError, match=r"not the state of a Rewarm with steps=4 and start=0\.1.*'steps': 5"):
        rewarm.load_state_dict(tdfx.Rewarm(one()[1], 5).state_dict())
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
