"""What a budget counts besides the sites that it decides, and which budgets need example inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx import Budget, Modelled, Plan, Policy, Ratio
from tdfx.cost.count import Flow
from tdfx.factors.registry import get_scheme
from tdfx.kinds.registry import operation_of

SIZES = (64, 48, 96, 32, 80)
X = torch.randn(6, SIZES[0], generator=torch.Generator().manual_seed(0))
# Layers this small spend most of their time on starting, so that no factors would pay.
COST = Modelled(seconds_per_call=0)
SETTINGS: dict[str, Any] = {"min_gain": 0, "round_to": 1, "cost": COST}


def net() -> nn.Sequential:
    """Return linear layers whose spectra decay, each at its own pace."""
    torch.manual_seed(0)
    layers = [nn.Linear(first, second) for first, second in itertools.pairwise(SIZES)]
    for number, layer in enumerate(layers):
        u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight.data = (u * torch.exp(-torch.arange(len(s)) * (0.04 + 0.05 * (number % 3)))) @ v
    return nn.Sequential(*layers)


def seconds_of(model: nn.Module, plan: Plan, inputs: Tensor | None) -> tuple[float, float]:
    """Return the modelled seconds of all sites before and after a plan, counted from the layers."""
    flow = None if inputs is None else Flow(len(inputs))
    before = after = 0.0
    for site in plan:
        operation = operation_of(model.get_submodule(site.name))
        assert operation is not None
        scheme = get_scheme(site.scheme) if site.scheme is not None else None
        before += COST.seconds([operation], flow)
        after += COST.seconds(scheme.chain(operation, site.ranks or ()) if scheme else [operation], flow)
    return before, after


def test_sites_that_a_budget_does_not_decide_take_time_too() -> None:
    overrides = {"2": Policy(rank=Ratio(of=0.125), **SETTINGS)}
    policy = Policy(speedup=1.4, exclude=("1",), overrides=overrides, **SETTINGS)
    for inputs in (X, None):
        plan = tdfx.plan(net(), policy, example_inputs=inputs)
        assert (plan["1"].factorized, plan["2"].ranks) == (False, (4,))
        before, after = seconds_of(net(), plan, inputs)
        assert 1.4 <= before / after < 1.5
    with pytest.raises(
        tdfx.PolicyError, match=r"cannot be kept: the most that the 1 sites in question can give is speedup="
    ) as error:
        tdfx.plan(net(), Policy(speedup=50, include=("0",), **SETTINGS))
    best = float(str(error.value).partition("can give is speedup=")[2].split(" ")[0].rstrip("."))
    plan = tdfx.plan(net(), Policy(speedup=best, include=("0",), **SETTINGS))
    before, after = seconds_of(net(), plan, None)
    assert best <= before / after < 2


@pytest.mark.parametrize("name", ["flops", "memory"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_budget_that_needs_inputs_says_so_even_without_candidates(name: str, strict: bool) -> None:
    settings: dict[str, Any] = {name: 0.5}
    budget = Budget(**settings, strict=strict)
    for exclude in ((), ("*",)):
        with pytest.raises(
            tdfx.PolicyError, match=f"counts {name}, which depends on what flows .* Pass example_inputs="
        ):
            tdfx.plan(net(), Policy(rank=budget, exclude=exclude))
    assert not tdfx.plan(nn.ReLU(), Policy(rank=budget)).sites
    if strict:
        with pytest.raises(tdfx.PolicyError, match="cannot be kept: the 0 sites in question can give nothing of it"):
            tdfx.plan(net(), Policy(rank=budget, exclude=("*",)), example_inputs=X)
