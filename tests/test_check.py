"""The prediction of a plan, held against real steps; and the step of a whole model, as it is timed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx import InputError, Measured, Modelled, PlanError, Policy, Ratio
from tdfx.passes.planning.step_time import TrainingStep, time_steps
from tdfx.training.step_check import StepCheck


class Net(nn.Module):
    """Counts its forwards, draws random numbers, keeps running statistics, and gives back more than one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.drop(self.norm(self.conv(x)).mean((2, 3)))
        return {"logits": self.head(y), "class": y.argmax(1), "name": "net"}


X = torch.randn(4, 8, 10, 10, generator=torch.Generator().manual_seed(0))


def test_a_step_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    (found,) = time_steps([TrainingStep(model, (X,))], rounds=2)
    assert found.seconds > 0
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())
    assert not model.training


def test_a_step_has_the_gradients_of_the_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    (found,) = TrainingStep(model, x).gradients()
    (expected,) = torch.autograd.grad(model(x).mean(), list(model.parameters()))
    # The loss is taken in single precision.
    assert found is not None
    assert torch.allclose(found, expected, rtol=1e-6)


class Ema(nn.Module):
    """Writes to a parameter as it runs, as momentum encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.mul_(0.9).add_(self.a.weight, alpha=0.1)
        return self.a(x) + self.b(x)  # type: ignore[no-any-return]


def test_a_step_of_a_model_that_writes_to_its_parameters_writes_to_copies() -> None:
    model = Ema()
    before = model.b.weight.detach().clone()
    TrainingStep(model, torch.randn(2, 4)).run()
    assert torch.equal(model.b.weight, before)


def test_a_step_that_cannot_be_taken_says_why() -> None:
    with pytest.raises(InputError, match=r"Linear does not run on the example inputs in train mode.*shapes cannot be"):
        TrainingStep(nn.Linear(3, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match="Flatten returns nothing in train mode that has a gradient"):
        TrainingStep(nn.Flatten(), torch.randn(2, 4)).run()


def checked(**settings: Any) -> tuple[nn.Module, nn.Module, tdfx.Plan]:
    model = Net()
    policy = Policy(rank=Ratio(of=0.25), min_gain=0.01, cost=Measured(rounds=1, cache=False), **settings)
    plan = tdfx.plan(model, policy, example_inputs=(X,))
    return model, tdfx.rewrite(model, plan), plan


def test_a_prediction_is_the_dense_step_less_what_sites_save() -> None:
    model, small, plan = checked()
    before = copy.deepcopy(small.state_dict())
    found = plan.check(small, example_inputs=(X,), dense=model, rounds=1)
    saved = sum((one.seconds_before or 0) - (one.seconds_after or 0) for one in plan.sites)
    alone = sum(one.seconds_before or 0 for one in plan.sites)
    scale = min(1.0, found.seconds_before / alone)
    assert found.seconds_predicted == pytest.approx(found.seconds_before - scale * saved)
    assert found.speedup == found.seconds_before / found.seconds_after
    assert all(torch.equal(one, before[name]) for name, one in small.state_dict().items())
    assert all(one.grad is None for one in small.parameters())
    assert "faster; " in str(found)


def test_without_the_dense_model_it_is_merged_again() -> None:
    _, small, plan = checked()
    made: list[int] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(sum(one.numel() for one in parameters))
        return torch.optim.Adam(parameters)

    found = plan.check(small, example_inputs=(X,), rounds=1, optimizer=optimizer)
    assert found.seconds_before > 0
    assert made == [plan.parameters_before, plan.parameters_after]


def test_a_check_says_how_far_it_is_off() -> None:
    found = StepCheck(seconds_before=0.4, seconds_after=0.2, seconds_predicted=0.16)
    assert (found.speedup, found.predicted_speedup) == (2.0, 2.5)
    assert found.off == pytest.approx(-0.2)
    assert str(found) == "training step 400 ms → 200 ms: 2.00x faster; 2.50x was predicted (-20% in time)"


def test_a_plan_without_times_predicts_nothing() -> None:
    model = Net()
    plan = tdfx.plan(model, Policy(rank=Ratio(of=0.25), min_gain=0, cost=Modelled()), example_inputs=(X,))
    with pytest.raises(
        PlanError, match="This plan has no measured times, so it predicts nothing that could be checked"
    ):
        plan.check(tdfx.rewrite(model, plan), example_inputs=(X,))


def test_times_survive_json() -> None:
    _, _, plan = checked()
    again = tdfx.Plan.from_json(plan.to_json())
    assert again == plan
    assert again["conv"].seconds_before is not None
    assert again.predicted_seconds(1.0) == plan.predicted_seconds(1.0)


def test_a_step_calls_nobody_with_made_up_gradients() -> None:
    model = Net()
    called: list[str] = []
    model.conv.weight.register_hook(lambda gradient: called.append("tensor"))  # type: ignore[no-untyped-call]
    model.head.register_full_backward_hook(lambda *_: called.append("module"))
    TrainingStep(model, (X,)).run()
    assert called == []
    model(X)["logits"].sum().backward()
    assert called == ["module", "tensor"]


class Sometimes(nn.Linear):
    """Writes to its weight at every second forward."""

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        if self.__dict__["count"] % 2 == 0:
            with torch.no_grad():
                self.weight.mul_(0.5)
        return super().forward(input)


def test_a_weight_that_is_written_to_now_and_then_is_the_copys() -> None:
    model = nn.Sequential(Sometimes(4, 4))
    before = model.get_parameter("0.weight").detach().clone()
    time_steps([TrainingStep(model, torch.randn(2, 4))], rounds=3)
    assert torch.equal(model.get_parameter("0.weight"), before)


def test_a_site_that_was_not_timed_is_predicted_to_save_nothing() -> None:
    model, small, plan = checked()
    sites = tuple(replace(one, seconds_before=None, seconds_after=None) if one.name == "conv" else one for one in plan)
    partly = replace(plan, sites=sites)
    assert [one.name for one in partly.factorized] == ["conv", "head"]
    head = partly["head"]
    assert head.seconds_before is not None
    assert head.seconds_after is not None
    assert partly.predicted_seconds(1.0) == pytest.approx(1.0 - head.seconds_before + head.seconds_after)
    assert partly.check(small, example_inputs=(X,), dense=model, rounds=1).seconds_predicted > 0
