"""What a budget and a policy with one take as settings, and what overrides inherit of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from budgeted import net

import tdfx
from tdfx import Budget, Modelled, Policy, PolicyError, Ratio
from tdfx.ranks.spectrum import spectrum


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"Budget\(\) has no budget"),
        ({"speedup": 1}, r"speedup=1 is not a number above 1: it is how many times faster"),
        ({"speedup": math.nan}, r"speedup=nan is not a number above 1"),
        ({"seconds": 0}, r"seconds=0 is not a number above 0: it is what the step may take, in seconds"),
        ({"flops": 0.0}, r"flops=0\.0 is neither a share in \(0, 1\] nor a whole number"),
        ({"parameters": 1.5}, r"parameters=1\.5 is neither a share"),
        ({"memory": True}, r"memory=True is neither a share"),
        ({"speedup": 2, "error": "rank"}, r"error='rank' is not known"),
        ({"speedup": 2, "strict": 1}, "strict=1 is n"),
        ({"speedup": 2, "floor": 1.5}, r"floor=1\.5 is n"),
        ({"speedup": 2, "noise_floor": -1}, "noise_floor=-1 is n"),
        ({"speedup": 2, "floor": "a"}, "floor='a' is n"),
    ],
)
def test_what_a_budget_does_not_take(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Budget(**settings)


def test_what_a_policy_does_not_take() -> None:
    with pytest.raises(PolicyError, match=r"rank=Ratio\(of=0\.5\) and speedup=2 both say which ranks to take"):
        Policy(rank=Ratio(of=0.5), speedup=2)
    with pytest.raises(PolicyError, match="An override has a budget, and a budget is for all sites together"):
        Policy(overrides={"a": Policy(speedup=2)})
    with pytest.raises(PolicyError, match="error='outputs' says what a budget keeps small, and no budget is given"):
        Policy(error="outputs")
    with pytest.raises(PolicyError, match=r"Budget\(speedup=2\) cannot choose ranks for site 'a' alone"):
        Budget(speedup=2).choose("a", [spectrum(torch.eye(3))])


def test_a_copy_of_a_policy_keeps_its_budget() -> None:
    policy = Policy(speedup=2)
    assert policy.rank == Budget(speedup=2)
    assert dataclasses.replace(policy, exclude=("a",)).rank == policy.rank
    assert dataclasses.replace(policy, rank=Budget(speedup=3)) == Policy(speedup=3)
    assert Policy(rank=Budget(speedup=2)) == Policy(speedup=2)
    with pytest.raises(PolicyError, match=r"rank=Budget\(.*\) and speedup=3 both say which ranks to take"):
        dataclasses.replace(policy, speedup=3)
    assert repr(policy.rank) in repr(policy)
    assert Policy().rank == Budget(speedup=2.5, strict=False, floor=0.25, noise_floor=0.25)


def test_an_override_without_a_rank_is_part_of_the_budget() -> None:
    policy = Policy(
        rank=Budget(parameters=0.3),
        min_gain=0,
        round_to=1,
        cost=Modelled(),
        overrides={"2": Policy(scheme="tucker1_out", min_gain=0)},
    )
    assert policy.for_site("2") == Policy(parameters=0.3, scheme="tucker1_out", min_gain=0, round_to=1, cost=Modelled())
    plan = tdfx.plan(net(), policy)
    assert plan["2"].scheme == "tucker1_out"
    assert plan.parameters_after <= 0.3 * plan.parameters_before
    nested = Policy(rank=Ratio(of=0.5), overrides={"a*": Policy(overrides={"*b": Policy(scheme="svd")})})
    assert nested.for_site("ab") == Policy(rank=Ratio(of=0.5), scheme="svd")
    with pytest.raises(PolicyError, match="An override has a budget, and a budget is for all sites together"):
        Policy(parameters=0.3, overrides={"2": Policy(parameters=0.5)})
