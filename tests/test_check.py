"""The predicted step time of a plan compared with real steps, and the step of a whole model that is timed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx import InputError, Measured, Modelled, PlanError, Policy, Ratio
from tdfx.passes.planning.training_step import TrainingStep, time_steps
from tdfx.training.step_check import StepCheck


class Net(nn.Module):
    """Draws random numbers, keeps running statistics, and returns several values."""

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
    (timing,) = time_steps([TrainingStep(model, (X,))], rounds=2)
    assert timing.seconds > 0
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_a_step_has_the_gradients_of_the_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = TrainingStep(model, x).gradients()
    (expected,) = torch.autograd.grad(model(x).mean(), list(model.parameters()))
    # The loss is computed in single precision.
    assert gradient is not None
    assert torch.allclose(gradient, expected, rtol=1e-6)


class Ema(nn.Module):
    """Writes to a parameter in its forward, as momentum encoders do."""

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
    TrainingStep(model, torch.randn(2, 4)).gradients()
    assert torch.equal(model.b.weight, before)


def test_a_step_that_cannot_be_taken_says_why() -> None:
    with pytest.raises(InputError, match=r"Linear does not run on the example inputs in train mode.*shapes cannot be"):
        TrainingStep(nn.Linear(3, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match="Flatten returns nothing in train mode that has a gradient"):
        TrainingStep(nn.Flatten(), torch.randn(2, 4)).gradients()


def rewritten(**settings: Any) -> tuple[nn.Module, nn.Module, tdfx.Plan]:
    model = Net()
    policy = Policy(rank=Ratio(of=0.25), min_gain=0.01, cost=Measured(rounds=1, cache=False), **settings)
    plan = tdfx.plan(model, policy, example_inputs=(X,))
    return model, tdfx.rewrite(model, plan), plan


def test_a_prediction_is_the_dense_step_minus_what_sites_save() -> None:
    model, small, plan = rewritten()
    plan = replace(plan, step_seconds=None)
    before = copy.deepcopy(small.state_dict())
    check = plan.check(small, example_inputs=(X,), dense=model, rounds=1)
    saved = sum((site.seconds_before or 0) - (site.seconds_after or 0) for site in plan.sites)
    alone = sum(site.seconds_before or 0 for site in plan.sites)
    scale = min(1.0, check.seconds_before / alone)
    assert check.seconds_predicted == pytest.approx(check.seconds_before - scale * saved)
    assert check.speedup == check.seconds_before / check.seconds_after
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert all(parameter.grad is None for parameter in small.parameters())
    assert "faster; " in str(check)


def test_without_the_dense_model_the_rewritten_one_is_merged() -> None:
    _, small, plan = rewritten()
    counts: list[int] = []
    optimizers: list[torch.optim.Optimizer] = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        counts.append(sum(parameter.numel() for parameter in parameters))
        optimizers.append(torch.optim.Adam(parameters))
        return optimizers[-1]

    check = plan.check(small, example_inputs=(X,), rounds=1, optimizer=optimizer)
    assert check.seconds_before > 0
    assert counts == [plan.parameters_before, plan.parameters_after]
    assert all(optimizer.state for optimizer in optimizers), "no optimizer step was timed"


def test_a_check_prints_the_error_of_the_prediction() -> None:
    check = StepCheck(seconds_before=0.4, seconds_after=0.2, seconds_predicted=0.16)
    assert (check.speedup, check.predicted_speedup) == (2.0, 2.5)
    assert check.off == pytest.approx(-0.2)
    assert str(check) == "training step 400 ms → 200 ms: 2.00x faster; 2.50x was predicted (-20% in time)"


def test_a_plan_without_times_predicts_nothing() -> None:
    model = Net()
    plan = tdfx.plan(model, Policy(rank=Ratio(of=0.25), min_gain=0, cost=Modelled()), example_inputs=(X,))
    with pytest.raises(
        PlanError, match="This plan has no measured times, so it predicts nothing that could be checked"
    ):
        plan.check(tdfx.rewrite(model, plan), example_inputs=(X,))


def test_times_survive_json() -> None:
    _, _, plan = rewritten()
    loaded = tdfx.Plan.from_json(plan.to_json())
    assert loaded == plan
    assert loaded["conv"].seconds_before is not None
    assert loaded.predicted_seconds(1.0) == plan.predicted_seconds(1.0)


def test_a_timed_step_calls_no_hooks_of_gradients() -> None:
    model = Net()
    called: list[str] = []
    model.conv.weight.register_hook(lambda gradient: called.append("tensor"))  # type: ignore[no-untyped-call]
    model.head.register_full_backward_hook(lambda *_: called.append("module"))
    TrainingStep(model, (X,)).gradients()
    assert called == []
    model(X)["logits"].sum().backward()
    assert called == ["module", "tensor"]


class Sometimes(nn.Linear):
    """Writes to its weight in every second forward."""

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        if self.__dict__["count"] % 2 == 0:
            with torch.no_grad():
                self.weight.mul_(0.5)
        return super().forward(input)


def test_a_model_that_sometimes_writes_to_its_weight_writes_to_a_copy() -> None:
    model = nn.Sequential(Sometimes(4, 4))
    before = model.get_parameter("0.weight").detach().clone()
    time_steps([TrainingStep(model, torch.randn(2, 4))], rounds=3)
    assert torch.equal(model.get_parameter("0.weight"), before)


def test_a_site_that_was_not_timed_is_predicted_to_save_nothing() -> None:
    model, small, plan = rewritten()
    sites = tuple(
        replace(site, seconds_before=None, seconds_after=None) if site.name == "conv" else site for site in plan
    )
    partly = replace(plan, sites=sites, step_seconds=None)
    assert [site.name for site in partly.factorized] == ["conv", "head"]
    head = partly["head"]
    assert head.seconds_before is not None
    assert head.seconds_after is not None
    assert partly.predicted_seconds(1.0) == pytest.approx(1.0 - head.seconds_before + head.seconds_after)
    assert partly.check(small, example_inputs=(X,), dense=model, rounds=1).seconds_predicted > 0


def test_the_method_of_a_plan_is_the_function() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    plan = tdfx.plan(model, Policy(rank=Ratio(of=0.5), min_gain=0))
    plan = replace(plan, sites=tuple(replace(site, seconds_before=2e-4, seconds_after=1e-4) for site in plan))
    small = tdfx.rewrite(model, plan)
    x = torch.randn(2, 32)
    for check in (
        plan.check(small, example_inputs=x, rounds=1),
        tdfx.check_step(plan, small, example_inputs=x, rounds=1),
    ):
        assert isinstance(check, tdfx.StepCheck)
        assert check.seconds_after > 0
