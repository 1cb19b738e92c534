"""Tracing and planning do not change a model, and do not mistake other code for sites."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import Function

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)
TOLERANCE = 1e4 * torch.finfo(torch.float64).eps


def batch() -> Tensor:
    return torch.rand(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def distance(value: Tensor, other: Tensor) -> float:
    return float((value - other).detach().abs().max())


class MovingAverage(nn.Module):
    """Has a layer whose weights are a moving average of another layer's, as in MoCo; written in several ways."""

    def __init__(self, way: str, traceable: bool) -> None:
        super().__init__()
        self.online = nn.Linear(16, 16)
        self.target = nn.Linear(16, 16).requires_grad_(False)
        self.way = way
        self.traceable = traceable

    @torch.no_grad()
    def update(self) -> None:
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            if self.way == "data":
                target.data = target.data * 0.9 + online.data * 0.1
            elif self.way == "in place":
                target.mul_(0.9).add_(online, alpha=0.1)
            else:
                torch._foreach_lerp_([target], [online], 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        if self.training:
            self.update()
        return self.online(x) * self.target(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("given", [None, batch()], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("way", ["data", "in place", "foreach"])
def test_a_forward_that_writes_to_parameters_keeps_the_class(way: str, traceable: bool, given: Tensor | None) -> None:
    model = MovingAverage(way, traceable).double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = tdfx.plan(model, FULL, example_inputs=given)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert plan.emit == "modules"
    assert {site.reason for site in plan} <= {tdfx.Reason.READ_ELSEWHERE, tdfx.Reason.FROZEN}
    assert "its forward calls torch.nn.modules" not in plan.notes[0]
    unchanged = tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, include=()))
    target = unchanged.get_parameter("target.weight").detach().clone()
    unchanged.train()(batch())
    assert distance(unchanged.get_parameter("target.weight"), target) > 1e-3


class DoubleGradient(Function):
    """A custom autograd function, whose backward differs from that of F.linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * gradient @ weight, 2 * gradient.mT @ x


class AppliesFunction(nn.Module):
    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.layer = nn.Linear(16, 16)
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.layer(DoubleGradient.apply(x, self.weight))  # type: ignore[no-any-return]


@pytest.mark.parametrize("given", [None, batch()], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("traceable", [True, False])
def test_a_weight_in_a_custom_autograd_function_is_not_a_site(traceable: bool, given: Tensor | None) -> None:
    model = AppliesFunction(traceable).double()
    plan = tdfx.plan(model, QUARTER, example_inputs=given)
    assert [site.name for site in plan.factorized] == ["layer"]
    low = tdfx.rewrite(model, plan)
    loss: Tensor = low(batch()).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = low.get_parameter("weight").grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


class Scales(nn.Module):
    """Converts its mode to a number."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        flag = self.training
        ways: dict[str, Any] = {
            "float": lambda: 1 + float(flag),
            "int": lambda: 1 + int(flag),
            "index": lambda: (1, 2)[flag],
            "comparison": lambda: 2 if flag >= 1 else 1,
            "modulo": lambda: 1 + flag % 2,
        }
        factor = ways[self.way]()
        return self.layer(x) * factor  # type: ignore[no-any-return]


class Outer(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner = Scales(way)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(x)) * (3.0 if self.training else 1.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["float", "int", "index", "comparison", "modulo"])
def test_a_number_calculated_from_a_mode_follows_that_mode(way: str) -> None:
    model = Outer(way).double()
    full = tdfx.rewrite(model, FULL)
    assert isinstance(full, fx.GraphModule)
    for outer in (True, False):
        for inner in (True, False):
            for either in (model, full):
                either.train(outer)
                either.get_submodule("inner").train(inner)
            assert distance(full(batch()), model(batch())) < TOLERANCE, (outer, inner)


class HooksItsLayer(nn.Module):
    """Registers one of its own methods as a hook of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.modes: list[bool] = []
        self.layer.register_forward_hook(self.after)

    def after(self, layer: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        self.modes.append(self.training)
        return output * (2.0 if self.training else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_hook_that_is_a_method_of_the_model_is_bound_to_the_copy(emit: tdfx.Emit) -> None:
    model = HooksItsLayer().double()
    full = tdfx.rewrite(model, FULL, emit=emit)
    merged = tdfx.merge(full)
    for either in (full, merged):
        assert isinstance(either, HooksItsLayer)
        for mode in (True, False):
            either.train(mode)
            model.train(mode)
            either.modes.clear()
            assert distance(either(batch()), model(batch())) < TOLERANCE
            assert either.modes == [mode]


def test_a_method_that_was_replaced_on_an_instance_is_respected() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)).double()

    def tiled(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    model[0].__dict__["_conv_forward"] = types.MethodType(tiled, model[0])
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    for emit in ("graph", "modules"):
        full = tdfx.rewrite(model, FULL, emit=emit)
        assert distance(full(x), model(x)) < TOLERANCE


class TwoWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(16, 16))
        self.w = nn.Parameter(torch.randn(16, 16))
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(x, self.w), self.v) if x.sum() > -1e9 else x
        return self.head(y)  # type: ignore[no-any-return]


def test_a_partly_rewritten_model_can_be_planned_again() -> None:
    model = TwoWeights().double()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, include=("w",))
    partly = tdfx.rewrite(model, policy, example_inputs=batch())
    plan = tdfx.plan(partly, QUARTER, example_inputs=batch())
    assert {site.name for site in plan.factorized} == {"v", "w", "head"}
    merged = tdfx.merge(tdfx.rewrite(partly, plan))
    assert list(merged.state_dict()) == list(model.state_dict())


def test_rank_rules_see_the_shape_of_the_original_weight() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Conv2d(16, 16, 3)).double()
    parts = {"0.weight": (128, 128), "1.weight": (16, 144)}
    for name, (rows, cols) in parts.items():
        signal = torch.randn(rows, 4, dtype=torch.float64) @ torch.randn(4, cols, dtype=torch.float64)
        weight = model.get_parameter(name)
        weight.data = (signal + 0.5 * torch.randn(rows, cols)).reshape(weight.shape)
    policy = tdfx.Policy(rank=tdfx.StableRank(), min_gain=0, round_to=1)
    large = tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=0.9), min_gain=0, round_to=1))
    dense = {site.name: site.ranks for site in tdfx.plan(tdfx.merge(large), policy)}
    assert {site.name: site.ranks for site in tdfx.plan(large, policy)} == dense


def test_planning_does_not_repeat_the_models_own_warnings() -> None:
    class Warns(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            torch.nn.functional.softmax(x)  # torch warns about the missing dimension
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]

    plan = tdfx.plan(Warns(nn.Linear(16, 16)).double(), QUARTER, example_inputs=batch())
    assert plan["0"].factorized


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)  # type: ignore[no-any-return]


def test_a_keyword_argument_does_not_prevent_a_graph() -> None:
    assert isinstance(tdfx.rewrite(ByName(), QUARTER), fx.GraphModule)


def test_an_optimizer_with_a_common_history_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(tdfx.OptimizerError, match="LBFGS keeps one flat history"):
        tdfx.rewrite(model, QUARTER, optimizer=torch.optim.LBFGS(model.parameters()))


def test_a_plan_that_decides_twice_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    plan = tdfx.plan(model, QUARTER)
    twice = tdfx.Plan(sites=plan.sites + plan.sites)
    with pytest.raises(tdfx.PlanError, match="decides on site '0' more than once"):
        tdfx.rewrite(model, twice)
