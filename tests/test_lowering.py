"""Rewriting a factorized model again lowers its ranks, from the factors, and updates the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tdfx
from tdfx.layers.factorized import Factorized

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)
EPS = torch.finfo(torch.float64).eps


class Net(nn.Module):
    """Has a convolution, a parameter that it passes to F.linear, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(10, 12) / 4)
        self.head = nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.conv(x).relu().mean((2, 3)), self.mix)
        return self.head(y)  # type: ignore[no-any-return]


def inputs() -> Tensor:
    return torch.randn(6, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Tensor = model(inputs()).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()


def factorized(model: nn.Module) -> dict[str, Factorized]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}


def relative(new: Tensor, old: Tensor) -> float:
    return float(((new - old).norm() / old.norm()).detach())


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_lower_ranks_give_what_a_split_of_the_dense_weight_gives(emit: tdfx.Emit) -> None:
    half = tdfx.rewrite(Net().double(), HALF, emit=emit)
    quarter = tdfx.rewrite(half, QUARTER, emit=emit)
    assert isinstance(quarter, fx.GraphModule) == (emit == "graph")
    dense = tdfx.merge(half)
    expected = factorized(tdfx.rewrite(dense, QUARTER, emit=emit))
    for name, layer in factorized(quarter).items():
        assert layer.origin.ranks == expected[name].origin.ranks
        assert layer.origin.ranks < factorized(half)[name].origin.ranks
        # Both truncate the same weight by its singular vectors; the factors do it by a QR decomposition.
        assert relative(layer.weight, expected[name].weight) < 1e4 * EPS


def test_the_error_in_the_plan_is_the_change_of_the_weight() -> None:
    half = tdfx.rewrite(Net().double(), HALF)
    plan = tdfx.plan(half, QUARTER, example_inputs=inputs())
    low = tdfx.rewrite(half, plan)
    for site in plan:
        name = site.parameter or site.name
        old, new = factorized(half)[name], factorized(low)[name]
        assert site.error == pytest.approx(relative(new.weight, old.weight), rel=1e-9)
        assert site.parameters_before == sum(weight.numel() for weight in old.weights)
        assert site.parameters_after == sum(weight.numel() for weight in new.weights)
        assert site.note.endswith(" before")
        assert site.flops_after is not None
        assert site.flops_before is not None
        assert site.flops_after < site.flops_before


def test_the_same_policy_again_changes_nothing() -> None:
    half = tdfx.rewrite(Net().double(), HALF)
    twice = tdfx.rewrite(half, HALF)
    assert {site.reason for site in tdfx.plan(half, HALF)} == {tdfx.Reason.FACTORIZED}
    assert all(parameter is other for parameter, other in zip(half.parameters(), twice.parameters(), strict=True))
    higher = tdfx.plan(half, tdfx.Policy(rank=tdfx.Ratio(of=0.9), min_gain=0))
    assert {site.reason for site in higher} == {tdfx.Reason.FACTORIZED}


@pytest.mark.parametrize(
    "policy",
    [
        tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, exclude=("*",)),
        tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=1e9),
    ],
)
def test_a_policy_that_keeps_the_sites_keeps_the_ranks(policy: tdfx.Policy) -> None:
    half = tdfx.rewrite(Net().double(), HALF)
    assert {site.reason for site in tdfx.plan(half, policy)} == {tdfx.Reason.FACTORIZED}


def test_frozen_factors_keep_their_ranks() -> None:
    half = tdfx.rewrite(Net().double(), HALF)
    half.requires_grad_(False)
    assert {site.reason for site in tdfx.plan(half, QUARTER)} == {tdfx.Reason.FACTORIZED}


def test_a_plan_can_lower_ranks_but_not_raise_them() -> None:
    model = Net().double()
    plans = {share: tdfx.plan(model, tdfx.Policy(rank=tdfx.Ratio(of=share), min_gain=0)) for share in (0.25, 1.0)}
    half = tdfx.rewrite(model, HALF)
    with pytest.raises(
        tdfx.PlanError, match=r"factorized already, by svd at \(5,\).*\(10,\): ranks can be lowered, no more"
    ):
        tdfx.rewrite(half, plans[1.0])


def test_vbmf_on_factors_respects_the_floor_of_the_original() -> None:
    model = nn.Sequential(nn.Linear(64, 64)).double()
    signal = torch.randn(64, 3, dtype=torch.float64) @ torch.randn(3, 64, dtype=torch.float64)
    model.get_parameter("0.weight").data.copy_(signal + 0.01 * torch.randn(64, 64))
    half = tdfx.rewrite(model, HALF)
    with_floor = tdfx.plan(half, tdfx.Policy(rank=tdfx.VBMF(floor=0.125), min_gain=0, round_to=1))
    assert with_floor.sites[0].ranks == (8,)
    without_floor = tdfx.plan(half, tdfx.Policy(rank=tdfx.VBMF(floor=0), min_gain=0, round_to=1))
    assert without_floor.sites[0].ranks == (3,)


def test_the_optimizer_state_is_carried_to_the_new_factors() -> None:
    model = Net().double()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer)
    half = tdfx.rewrite(model, HALF, optimizer=optimizer)
    train(half, optimizer)
    state = optimizer.state
    before = {
        name: [state[weight]["momentum_buffer"] for weight in layer.weights] for name, layer in factorized(half).items()
    }
    quarter = tdfx.rewrite(half, QUARTER, optimizer=optimizer)
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == set(
        map(id, quarter.parameters())
    )
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in quarter.named_parameters())
    for name, layer in factorized(quarter).items():
        old = factorized(half)[name]
        weights = [weight.detach() for weight in old.weights]
        dense = old.scheme.project(old.operation, weights, before[name])
        pull_back: Callable[..., Any] = torch.func.vjp(
            lambda *factors, layer=layer: layer.scheme.join(layer.operation, factors),
            *(weight.detach() for weight in layer.weights),
        )[1]
        for weight, expected in zip(layer.weights, pull_back(dense), strict=True):
            assert relative(optimizer.state[weight]["momentum_buffer"], expected) < 1e4 * EPS
    old_weights = {id(weight) for layer in factorized(half).values() for weight in layer.weights}
    assert not old_weights & set(map(id, state))
    train(quarter, optimizer)


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_merge_after_two_rewrites_restores_the_original(emit: tdfx.Emit) -> None:
    model: nn.Module = Net().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimizer)
    low = model
    for policy in (HALF, QUARTER):
        low = tdfx.rewrite(low, policy, optimizer=optimizer, emit=emit)
        train(low, optimizer)
    merged = tdfx.merge(low, optimizer=optimizer)
    assert type(merged) is Net
    assert list(merged.state_dict()) == list(model.state_dict())
    Net().double().load_state_dict(merged.state_dict(), strict=True)
    assert relative(merged(inputs()), low(inputs())) < 1e4 * EPS
    train(merged, optimizer)


def test_the_model_passed_in_keeps_its_factors() -> None:
    half = tdfx.rewrite(Net().double(), HALF)
    before = {name: value.clone() for name, value in half.state_dict().items()}
    tdfx.rewrite(half, QUARTER)
    now = half.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in now.items())


def test_hooks_mode_and_layout_of_a_layer_are_preserved() -> None:
    calls: list[str] = []
    half = tdfx.rewrite(Net().double().to(memory_format=torch.channels_last), HALF)
    half.get_submodule("conv").register_forward_hook(lambda *_: calls.append("conv"))
    half.get_submodule("conv").eval()
    low = tdfx.rewrite(half, QUARTER)
    low(inputs())
    assert calls == ["conv"]
    assert not low.get_submodule("conv.factors").training
    assert low.get_parameter("conv.factors.1.weight").is_contiguous(memory_format=torch.channels_last)


def test_factors_that_diverged_are_refused() -> None:
    half = tdfx.rewrite(Net().double(), HALF)
    half.get_parameter("head.factors.0.weight").data.fill_(float("nan"))
    with pytest.raises(tdfx.WeightError, match=r"weight of site 'head' has .* NaN"):
        tdfx.plan(half, QUARTER)
