"""``Target``, the former name of a budget of parameters or operations."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import tdfx
from tdfx import Budget, Plan, Policy, PolicyError, Target, TdfxWarning
from tdfx.ranks.registry import parse_rule


@pytest.mark.parametrize("name", ["parameters", "flops"])
def test_a_target_is_the_budget_of_its_share(name: str) -> None:
    settings: dict[str, Any] = {name: 0.5}
    message = rf"Target\({name}=0\.5\) now returns Budget\({name}=0\.5\), .* Pass tdfx\.Budget\({name}=0\.5\) instead\."
    with pytest.warns(TdfxWarning, match=message) as caught:
        assert Target(**settings) == Budget(**settings)
    assert caught[0].filename == __file__


def test_one_as_a_target_is_a_share_and_not_an_amount() -> None:
    with pytest.warns(TdfxWarning, match="Target"):
        assert Target(parameters=1) == Budget(parameters=1.0)


def test_the_short_forms_are_budgets_without_a_warning() -> None:
    assert parse_rule("params:0.5") == Budget(parameters=0.5)
    assert parse_rule("flops:0.5") == Budget(flops=0.5)
    assert tdfx.read_policy({"rank": "params:0.5"}) == Policy(parameters=0.5)


def test_what_was_saved_with_a_target_loads() -> None:
    plan = tdfx.plan(nn.Linear(64, 64), Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
    text = plan.to_json().replace("Ratio(of=0.25)", "Target(parameters=0.5)")
    assert "Target(parameters=0.5)" in Plan.from_json(text).policy
    # Such a rule loads as it did, and says what is wrong with it when it is used.
    policy = tdfx.read_policy({"rank": "params:0.5,at_least=8", "min_gain": 0})
    with pytest.raises(
        PolicyError, match=r"Budget\(parameters=0\.5\) cannot choose ranks for site '' alone: it weighs"
    ):
        tdfx.plan(nn.Linear(64, 64), policy)


@pytest.mark.parametrize("given", [{}, {"parameters": 0.5, "flops": 0.5}])
def test_a_target_takes_one_of_the_two(given: dict[str, float]) -> None:
    with pytest.raises(
        PolicyError, match=r"Target\(parameters=.*, flops=.*\) does not give exactly one of the two\. For"
    ):
        Target(**given)


@pytest.mark.parametrize("value", [0.0, 1.5, -1, float("nan"), True, "0.5"])
@pytest.mark.parametrize("name", ["parameters", "flops"])
def test_a_target_is_a_share(name: str, value: Any) -> None:
    with pytest.raises(PolicyError, match=rf"{name}=.* is not in \(0, 1\]: it is the part of the {name} that may"):
        Target(**{name: value})
