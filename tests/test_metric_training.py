"""The metric from the user's side: policies, plans, rewrites and switches that measure errors by moments."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import tdfx
from tdfx.factors.metric import DAMPING

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)


class Net(nn.Module):
    """A convolution, a batch norm, a layer that is called twice, and a parameter that a function takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.twice = nn.Linear(12, 12)
        self.head = nn.Parameter(torch.randn(8, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.norm(self.conv(x)).relu().mean((2, 3))
        return nn.functional.linear(self.twice(self.twice(pooled).relu()), self.head)


def data(steps: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(steps, 32, 3, 8, 8, generator=generator, dtype=torch.float64).cumsum(3)
    return [(x, torch.randint(8, (32,), generator=generator)) for x in images]


def trained(steps: int = 4) -> tuple[nn.Module, tdfx.Moments, SGD]:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    with tdfx.Moments(model) as moments:
        train(model, optimizer, data(steps))
    return model, moments, optimizer


def train(model: nn.Module, optimizer: SGD, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def error_in_metric(moments: tdfx.Moments, path: str, before: Tensor, after: Tensor) -> float:
    """The relative error of a linear map in the metric of the loss, by NumPy, from the moments and both weights."""
    site = moments.of(path)
    assert site is not None
    assert site.inputs is not None
    assert site.outputs is not None
    a, g = (side[0].numpy() / np.trace(side[0].numpy()) * side.shape[1] for side in (site.inputs, site.outputs))
    a, g = (side + DAMPING * np.eye(len(side)) for side in (a, g))

    def norm(w: np.ndarray[Any, Any]) -> float:
        return float(np.trace(g @ w @ a @ w.T))

    old, new = before.detach().numpy(), after.detach().numpy()
    return math.sqrt(norm(old - new) / norm(old))


def test_a_budgets_floor_holds_in_the_metric_whatever_the_error_is() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(64, 2), torch.randn(2, 64)
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = left @ right / 8 + 1e-3 * torch.randn(64, 64)  # two ranks lose next to nothing
    model = nn.Sequential(layer)
    with tdfx.Moments(model) as moments:
        for _ in range(4):
            cast("Tensor", model(torch.randn(256, 64))).square().mean().backward()  # type: ignore[no-untyped-call]
    budget = tdfx.Budget(parameters=0.1, strict=False, floor=0.2)
    policy = tdfx.Policy(rank=budget, min_gain=0, round_to=1, cost=tdfx.Modelled())
    assert tdfx.plan(model, policy, moments=moments).sites[0].ranks == (13,)  # a fifth of 64, which is 12.8
    assert (tdfx.plan(model, policy).sites[0].ranks or (64,)) < (13,)  # the same weight without a metric


def test_the_floor_of_a_convolution_holds_for_the_product_of_both_ranks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3))
    with tdfx.Moments(model) as moments:
        for _ in range(4):
            cast("Tensor", model(torch.randn(4, 32, 8, 8))).square().mean().backward()  # type: ignore[no-untyped-call]
    without, floored = (
        tdfx.plan(
            model,
            tdfx.Policy(
                rank=tdfx.Budget(parameters=0.05, strict=False, floor=floor),
                scheme="tucker2",
                min_gain=0,
                round_to=1,
                cost=tdfx.Modelled(),
            ),
            moments=moments,
        ).sites[0]
        for floor in (0.0, 0.25)
    )
    shares = [
        [rank / most for rank, most in zip(site.ranks or (), site.full_ranks or (), strict=True)]
        for site in (without, floored)
    ]
    assert max(shares[0]) < 0.25
    assert min(shares[1]) >= 0.5  # of which a quarter is the product


def test_plan_and_rewrite_measure_errors_in_the_metric_of_the_loss() -> None:
    model, moments, optimizer = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = tdfx.plan(model, QUARTER, moments=moments)
    assert {site.metric for site in plan.factorized} == {"loss"}
    assert "in the metric of the loss" in str(plan)
    assert tdfx.Plan.from_json(plan.to_json()) == plan
    rewritten = tdfx.rewrite(model, plan, optimizer=optimizer, moments=moments)
    for name, path in (("twice", "twice.weight"), ("head", "head")):
        layer = rewritten.get_submodule(name)
        assert isinstance(layer, tdfx.Factorized)
        assert plan[name].error == pytest.approx(error_in_metric(moments, path, before[path], layer.weight), rel=1e-6)
    plain = tdfx.plan(model, QUARTER)
    assert {site.metric for site in plain.factorized} == {"weights"}
    assert "in the metric" not in str(plain)
    assert plain["twice"].error != pytest.approx(plan["twice"].error, rel=0.05)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_a_plan_made_with_moments_says_that_it_needs_them_in_the_middle_of_a_training() -> None:
    model, moments, optimizer = trained()
    plan = tdfx.plan(model, QUARTER, moments=moments)
    with pytest.warns(tdfx.TdfxWarning, match=r"The plan chose the ranks of 3 sites, 'head' first, by moments"):
        tdfx.rewrite(model, plan, optimizer=optimizer)
    fresh = Net().double()  # as in a resumed run, which loads its values afterwards
    tdfx.rewrite(fresh, plan, optimizer=SGD(fresh.parameters(), lr=0.1))


def test_at_full_rank_the_metric_changes_nothing() -> None:
    model, moments, _ = trained(steps=1)  # fewer rows than channels on some sides
    full = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
    rewritten = tdfx.rewrite(model, full, moments=moments, emit="modules").eval()
    merged = tdfx.merge(rewritten).state_dict()
    for name, value in model.state_dict().items():
        assert "running" in name or torch.allclose(merged[name], value, rtol=1e-9, atol=1e-11), name


def test_ranks_of_a_factorized_model_are_lowered_in_the_metric() -> None:
    model, _, optimizer = trained()
    rewritten = tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0), optimizer=optimizer)
    with tdfx.Moments(rewritten) as moments:
        train(rewritten, optimizer, data(4, seed=2))
    joined = cast("Tensor", rewritten.get_submodule("twice").weight).detach()
    lowered = tdfx.rewrite(rewritten, QUARTER, moments=moments)
    plan = tdfx.plan(rewritten, QUARTER, moments=moments)
    assert plan["twice"].ranks == (3,)
    layer = lowered.get_submodule("twice")
    assert isinstance(layer, tdfx.Factorized)
    error = error_in_metric(moments, "twice.weight", joined, layer.weight)
    assert plan["twice"].error == pytest.approx(error, rel=1e-6)


def test_a_budget_weighs_sites_by_the_metric() -> None:
    model, moments, _ = trained()
    policy = tdfx.Policy(parameters=0.5, cost=tdfx.Modelled(), min_gain=0, round_to=1)
    plan = tdfx.plan(model, policy, moments=moments)
    assert plan.factorized
    assert {site.metric for site in plan.factorized} == {"loss"}
    rewritten = tdfx.rewrite(model, plan, moments=moments)
    for site in plan.factorized:
        if len(site.shape) == 2:
            path = site.parameter or f"{site.name}.weight"
            layer = rewritten.get_submodule(site.name)
            assert isinstance(layer, tdfx.Factorized)
            measured = error_in_metric(moments, path, model.get_parameter(path), layer.weight)
            assert site.error == pytest.approx(measured, rel=1e-6)


def test_a_metric_by_name_and_overrides() -> None:
    model, moments, _ = trained()
    policy = tdfx.Policy(
        rank=tdfx.Ratio(of=0.25), min_gain=0, metric="inputs", overrides={"head": tdfx.Policy(metric="weights")}
    )
    plan = tdfx.plan(model, policy, moments=moments)
    assert {site.name: site.metric for site in plan.factorized} == {
        "conv": "inputs",
        "twice": "inputs",
        "head": "weights",
    }
    read = tdfx.read_policy(
        {"rank": "ratio:0.25", "min_gain": 0, "metric": "inputs", "overrides": {"head": {"metric": "weights"}}}
    )
    assert read == policy
    inherits = tdfx.Policy(metric="weights", overrides={"head": tdfx.Policy(scheme="svd")}).for_site("head")
    assert inherits is not None
    assert inherits.metric == "weights"
    assert tdfx.Policy().metric == "auto"


def test_a_metric_that_cannot_be_had_is_refused() -> None:
    model, _, _ = trained(steps=1)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, metric="loss")
    with pytest.raises(tdfx.PolicyError, match=r"metric='loss' needs the second moments of a few training steps"):
        tdfx.plan(model, policy)
    with pytest.raises(tdfx.PolicyError, match=r"metric='gradient' is not known"):
        tdfx.Policy(metric="gradient")  # type: ignore[arg-type]


def test_moments_without_a_training_step_are_refused() -> None:
    torch.manual_seed(0)
    model = Net().double()
    with tdfx.Moments(model) as moments:
        model(data(1)[0][0])  # no backward
    with pytest.raises(tdfx.PolicyError, match=r"has seen no training step"):
        tdfx.plan(model, QUARTER, moments=moments)


def test_a_site_without_moments_is_measured_by_its_weights_and_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, both: bool = False) -> Any:
            return self.unused(self.used(x)) if both else self.used(x)

    model = Half()
    with tdfx.Moments(model) as moments:
        model(torch.randn(64, 8)).square().sum().backward()
    plan = tdfx.plan(model, QUARTER, moments=moments, example_inputs=(torch.randn(64, 8), True))
    assert plan["used"].metric == "loss"
    assert plan["unused"].metric == "weights"
    assert "no moments were seen of 'unused': errors of the weights there" in plan.notes
    assert "errors in the metric of the loss, of the weights" in str(plan)


def test_running_statistics_are_those_of_the_rewritten_model_on_the_last_batches() -> None:
    model, moments, optimizer = trained()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    rewritten = tdfx.rewrite(model, QUARTER, optimizer=optimizer, moments=moments)
    assert torch.equal(state, torch.random.get_rng_state())
    outputs = [rewritten.get_submodule("conv")(x) for x, _ in data(4)]
    means = [output.mean((0, 2, 3)) for output in outputs]
    variances = [output.transpose(0, 1).flatten(1).var(1) for output in outputs]
    norm = rewritten.get_submodule("norm")
    assert torch.allclose(norm.get_buffer("running_mean"), torch.stack(means).mean(0), rtol=1e-9)
    assert torch.allclose(norm.get_buffer("running_var"), torch.stack(variances).mean(0), rtol=1e-9)
    assert torch.equal(norm.get_buffer("num_batches_tracked"), before["norm.num_batches_tracked"])
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    without = tdfx.rewrite(model, QUARTER)
    assert torch.equal(without.get_buffer("norm.running_mean"), before["norm.running_mean"])


def test_norms_in_eval_mode_keep_their_statistics() -> None:
    model, moments, _ = trained()
    model.get_submodule("norm").eval()
    rewritten = tdfx.rewrite(model, QUARTER, moments=moments)
    assert torch.equal(rewritten.get_buffer("norm.running_mean"), model.get_buffer("norm.running_mean"))


def test_a_model_that_cannot_run_again_keeps_its_statistics_with_a_warning() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.broken = nn.Linear(8, 8), nn.BatchNorm1d(8), False

        def forward(self, x: Tensor) -> Any:
            if self.broken and self.training:
                raise RuntimeError("the data has moved on")
            return self.norm(self.layer(x))

    model = Once()
    with tdfx.Moments(model) as moments:
        model(torch.randn(64, 8)).sum().backward()
    model.broken = True
    with pytest.warns(
        tdfx.TdfxWarning, match="could not be run again on its last batches: RuntimeError: the data has moved"
    ):
        rewritten = tdfx.rewrite(model, QUARTER, optimizer=SGD(model.parameters(), lr=0.1), moments=moments)
    assert torch.equal(rewritten.get_buffer("norm.running_mean"), model.get_buffer("norm.running_mean"))


def run(switch: tdfx.Switch, steps: int) -> tuple[nn.Module, list[int]]:
    """Train with a switch; return the model and the number of hooks in it after each step."""
    torch.manual_seed(0)
    model: nn.Module = Net().double()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    hooks = []
    for x, y in data(steps):
        train(model, optimizer, [(x, y)])
        model = switch.step(model, optimizer=optimizer, example_inputs=(x,))
        hooks.append(sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()))
    return model, hooks


def test_a_switch_collects_in_the_steps_before_it_decides_and_only_then() -> None:
    model, hooks = run(switch := tdfx.Switch(QUARTER, when=tdfx.AtStep(7), collect=3), 9)
    assert [count > 0 for count in hooks] == [False] * 3 + [True] * 3 + [False] * 3
    assert switch.plan is not None
    assert {site.metric for site in switch.plan.factorized} == {"loss"}
    assert any(isinstance(module, tdfx.Factorized) for module in model.modules())


@pytest.mark.parametrize("switch", [{"collect": 0}, {"policy": "weights"}])
def test_a_switch_collects_nothing_if_nothing_is_wanted(switch: dict[str, Any]) -> None:
    metric = "weights" if switch.pop("policy", None) else "auto"
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, metric=metric)  # type: ignore[arg-type]
    _, hooks = run(made := tdfx.Switch(policy, when=tdfx.AtStep(5), **switch), 6)
    assert hooks == [0, 0, 0, 1, 0, 0]  # it looks at the precision of the last step before the plan
    assert made.plan is not None
    assert {site.metric for site in made.plan.factorized} == {"weights"}


def test_a_switch_without_a_moment_takes_an_early_one() -> None:
    assert tdfx.Switch(QUARTER, total_steps=10_000).when == tdfx.AtStep(300, latest=2000)
    assert tdfx.Switch(QUARTER, total_steps=50).when == tdfx.AtStep(10, latest=10)
    with pytest.raises(tdfx.PolicyError, match=r"Neither when= nor total_steps= is given"):
        tdfx.Switch(QUARTER)


@pytest.mark.parametrize("stopped", range(1, 8))
def test_a_run_that_is_stopped_while_moments_are_collected_goes_on_with_the_same_bits(stopped: int) -> None:
    batches = data(9)

    def build() -> tuple[nn.Module, SGD, tdfx.Switch]:
        torch.manual_seed(0)
        model = Net().double()
        switch = tdfx.Switch(QUARTER, when=tdfx.AtStep(7), collect=4)
        return model, SGD(model.parameters(), lr=0.05, momentum=0.9), switch

    def go_on(model: nn.Module, optimizer: SGD, switch: tdfx.Switch, steps: Sequence[int]) -> nn.Module:
        for step in steps:
            train(model, optimizer, [batches[step]])
            model = switch.step(model, optimizer=optimizer)
        return model

    model, optimizer, switch = build()
    model = go_on(model, optimizer, switch, range(stopped))
    other_model: nn.Module
    other_model, other_optimizer, other_switch = build()
    other_switch.load_state_dict(switch.state_dict(), optimizer=other_optimizer)
    if other_switch.plan is not None:
        other_model = tdfx.rewrite(other_model, other_switch.plan, optimizer=other_optimizer)
    other_model.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends = [
            go_on(*run, range(stopped, 9)).state_dict()
            for run in ((model, optimizer, switch), (other_model, other_optimizer, other_switch))
        ]
    assert switch.plan == other_switch.plan
    assert all(map(torch.equal, ends[0].values(), ends[1].values()))
