"""Overrides that give no rank have the policy's own, and go on having it when the policy is varied, copied or read."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import tdfx
from tdfx import Budget, Energy, Measured, Modelled, Policy, PolicyError, Ratio
from tdfx.ranks.budget import DEFAULT_RULE

RULES = (Ratio(of=0.5), Energy(share=0.8), Budget(parameters=0.5), Budget(speedup=2), DEFAULT_RULE)


def made(**settings: Any) -> Policy:
    """Return a policy with overrides that inherit, two deep, one with its own rank and one that keeps."""
    inner = Policy(scheme="svd", overrides={"a.b.*": Policy(round_to=1)})
    return Policy(overrides={"a.*": inner, "own": Policy(rank=Ratio(of=0.125)), "none": None}, **settings)


def everything(policy: Policy) -> object:
    """Return all that a policy says, its overrides too; equality alone would do, and names less of what differs."""
    inside = {key: None if one is None else everything(one) for key, one in policy.overrides.items()}
    return policy.rank, policy.cost, policy.scheme, policy.round_to, policy.min_gain, inside


def read_back(policy: Policy) -> Policy:
    return eval(repr(policy), vars(tdfx) | {"inf": float("inf")})  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "carried", [lambda one: one, copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), read_back]
)
@pytest.mark.parametrize("after", RULES, ids=repr)
@pytest.mark.parametrize("before", RULES, ids=repr)
def test_a_policy_that_is_varied_is_the_one_that_would_have_been_made(before: Any, after: Any, carried: Any) -> None:
    policy = carried(made(rank=before, cost=Modelled()))
    varied = dataclasses.replace(policy, rank=after)
    assert everything(varied) == everything(made(rank=after, cost=Modelled()))
    assert varied == made(rank=after, cost=Modelled())
    assert hash(varied) == hash(made(rank=after, cost=Modelled()))
    inner = varied.overrides["a.*"]
    assert inner is not None and inner.rank == after  # noqa: PT018
    assert inner.overrides["a.b.*"].rank == after
    assert varied.overrides["own"].rank == Ratio(of=0.125)
    # And the way back, from there and not from where it began.
    assert everything(dataclasses.replace(carried(varied), rank=before)) == everything(policy)


def test_an_override_follows_the_cost_of_a_budget_alone() -> None:
    policy = dataclasses.replace(made(rank=Budget(parameters=0.5), cost=Modelled()), cost=Modelled(seconds_per_call=0))
    assert policy.overrides["a.*"].cost == Modelled(seconds_per_call=0)  # type: ignore[union-attr]
    apart = dataclasses.replace(policy, rank=Ratio(of=0.5))
    assert apart.overrides["a.*"].cost == Measured()  # type: ignore[union-attr]


def test_an_override_that_is_varied_itself_still_inherits() -> None:
    policy = made(rank=Ratio(of=0.5))
    inner = policy.overrides["a.*"]
    assert inner is not None
    whole = dataclasses.replace(policy, overrides={"a.*": dataclasses.replace(inner, min_gain=2)})
    assert dataclasses.replace(whole, rank=Energy()).overrides["a.*"].rank == Energy()  # type: ignore[union-attr]
    own = dataclasses.replace(policy, overrides={"a.*": dataclasses.replace(inner, rank=Ratio(of=0.75))})
    assert dataclasses.replace(own, rank=Energy()).overrides["a.*"].rank == Ratio(of=0.75)  # type: ignore[union-attr]


def test_a_rank_that_an_override_gives_itself_stays() -> None:
    policy = Policy(rank=Ratio(of=0.5), overrides={"fc": Policy(rank=Ratio(of=0.5), scheme="svd")})
    assert dataclasses.replace(policy, rank=Energy()).overrides["fc"].rank == Ratio(of=0.5)  # type: ignore[union-attr]
    joint = Policy(parameters=0.5, overrides={"fc": Policy(parameters=0.5)})
    with pytest.raises(
        PolicyError, match=r"the override for 'fc' has Budget\(parameters=0\.5\), and the policy Energy"
    ):
        dataclasses.replace(joint, rank=Energy())


@pytest.mark.parametrize("name", ["policy.toml", "policy.json"])
def test_overrides_from_files_follow_too(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".toml":
        path.write_text(
            'rank = "ratio:0.5"\nmin_gain = 0\n[overrides.fc]\nscheme = "svd"\n[overrides.fc.overrides.x]\n'
        )
    else:
        path.write_text(
            json.dumps(
                {"rank": "ratio:0.5", "min_gain": 0, "overrides": {"fc": {"scheme": "svd", "overrides": {"x": {}}}}}
            )
        )
    policy = dataclasses.replace(tdfx.read_policy(path), rank=Energy())
    assert policy.overrides["fc"] == Policy(
        rank=Energy(), scheme="svd", min_gain=0, overrides={"x": Policy(scheme="svd", min_gain=0)}
    )
    again = dataclasses.replace(policy, rank=Budget(parameters=0.5))
    assert again.overrides["fc"].overrides["x"].rank == Budget(parameters=0.5)  # type: ignore[union-attr]


def test_a_file_that_says_default_means_it() -> None:
    override = {"overrides": {"fc": {"rank": "default", "scheme": "svd"}}}
    with pytest.raises(
        PolicyError, match=r"key overrides: .*the override for 'fc' has Budget\(speedup=2\.0, strict=False"
    ):
        tdfx.read_policy({"rank": "ratio:0.5", **override})
    with pytest.raises(PolicyError, match=r"the override for 'fc' has Budget\(speedup=2\.0"):
        tdfx.read_policy({"rank": "ratio:0.5", "overrides": {"*": override}})
    joint = tdfx.read_policy(override)
    assert joint.overrides["fc"] == Policy(scheme="svd")
    assert tdfx.read_policy({"rank": "default", **override}) == joint
