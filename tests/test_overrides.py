"""An override inherits every setting that it leaves out, in Python and in files, and after a change or a copy too."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import pydoc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tdfx
from tdfx import Budget, Energy, Measured, Modelled, Policy, PolicyError, Ratio
from tdfx.policies.former import is_text_of
from tdfx.policies.policy import map_costs
from tdfx.ranks.budget import DEFAULT_RULE

RULES = (Ratio(of=0.5), Energy(share=0.8), Budget(parameters=0.5), Budget(speedup=2), DEFAULT_RULE)
SETTINGS: dict[str, tuple[Any, Any]] = {
    "rank": (Ratio(of=0.5), "ratio:0.5"),
    "scheme": ("svd", "svd"),
    "min_gain": (2.0, 2.0),
    "round_to": (4, 4),
    "cost": (Modelled(seconds_per_call=0), {"use": "modelled", "seconds_per_call": 0}),
    "metric": ("inputs", "inputs"),
    "recompute": (True, True),
}
"""Every setting that is inherited, with a value for Python and for a file."""
OTHERS: dict[str, tuple[Any, Any]] = {
    "rank": (Energy(share=0.8), "energy:0.8"),
    "scheme": ("auto", "auto"),
    "min_gain": (1.05, 1.05),
    "round_to": (8, 8),
    "cost": (Measured(), "measured"),
    "metric": ("auto", "auto"),
    "recompute": (False, False),
}
"""Other values; most are the defaults, which count too where an override gives them."""


MAKERS: tuple[Callable[[dict[str, Any]], Policy], ...] = (lambda table: Policy(**table), tdfx.read_policy)
"""What makes a policy, in Python and from a file."""
INNER: tuple[Callable[[dict[str, Any]], Any], ...] = (lambda table: Policy(**table), lambda table: table)
"""What makes an override within it."""


def nested(**settings: Any) -> Policy:
    """Return a policy with overrides that inherit, two deep, one with its own rank and one that keeps its sites."""
    inner = Policy(scheme="svd", overrides={"a.b.*": Policy(round_to=1)})
    return Policy(overrides={"a.*": inner, "own": Policy(rank=Ratio(of=0.125)), "none": None}, **settings)


def in_force(policy: Policy, *names: str) -> Policy:
    """Return the policy for a site that is not to be kept."""
    resolved = policy.for_site(*names)
    assert resolved is not None
    return resolved


def evaluate_repr(policy: Policy) -> Policy:
    return eval(repr(policy), vars(tdfx) | {"inf": float("inf")})  # type: ignore[no-any-return]


CARRIERS = [
    lambda policy: policy,
    copy.copy,
    copy.deepcopy,
    lambda policy: pickle.loads(pickle.dumps(policy)),
    evaluate_repr,
]


def test_every_setting_is_inherited_or_says_which_sites_are_concerned() -> None:
    public = {setting.name for setting in dataclasses.fields(Policy) if not setting.name.startswith("_")}
    assert public == {*SETTINGS, "include", "exclude", "overrides"}


@pytest.mark.parametrize("source", [0, 1], ids=["python", "file"])
@pytest.mark.parametrize("name", SETTINGS)
def test_an_override_inherits_each_setting_that_it_leaves_out(name: str, source: int) -> None:
    make, inner = MAKERS[source], INNER[source]
    value = SETTINGS[name][source]
    # All other settings are given by the override itself, those of the override within it too.
    others = {other: OTHERS[other][source] for other in SETTINGS if other != name}
    policy = make({name: value, "overrides": {"a.*": inner({**others, "overrides": {"*.b": inner(others)}})}})
    expected = {other: OTHERS[other][0] for other in others} | {name: SETTINGS[name][0]}
    for site in ("a.c", "a.b"):
        assert {setting: getattr(in_force(policy, site), setting) for setting in SETTINGS} == expected


@pytest.mark.parametrize("source", [0, 1], ids=["python", "file"])
@pytest.mark.parametrize("name", SETTINGS)
def test_an_override_keeps_each_setting_that_it_gives(name: str, source: int) -> None:
    make, inner = MAKERS[source], INNER[source]
    outer = {setting: value[source] for setting, value in SETTINGS.items()}
    own = {name: OTHERS[name][source]}
    policy = make({**outer, "overrides": {"a.*": inner({"overrides": {"*.b": inner(own)}}), "c": inner(own)}})
    assert getattr(in_force(policy, "a.d"), name) == SETTINGS[name][0]
    for site in ("a.b", "c"):
        assert getattr(in_force(policy, site), name) == OTHERS[name][0]


def test_which_sites_an_override_concerns_is_not_inherited() -> None:
    policy = Policy(include=("a*", "b*"), exclude=("ab",), overrides={"a*": Policy(scheme="svd")})
    override = in_force(policy, "a")
    assert (override.include, override.exclude, override.overrides) == (("*",), (), {})


@pytest.mark.parametrize("carry", CARRIERS)
@pytest.mark.parametrize("after", RULES, ids=repr)
@pytest.mark.parametrize("before", RULES, ids=repr)
def test_a_changed_policy_equals_one_made_anew(before: Any, after: Any, carry: Any) -> None:
    policy = carry(nested(rank=before, cost=Modelled()))
    changed = dataclasses.replace(policy, rank=after)
    assert changed == nested(rank=after, cost=Modelled())
    assert repr(changed) == repr(nested(rank=after, cost=Modelled()))
    assert hash(changed) == hash(nested(rank=after, cost=Modelled()))
    for site in ("a.c", "a.b.c"):
        assert in_force(changed, site) == in_force(nested(rank=after, cost=Modelled()), site)
        assert in_force(changed, site).rank == after
    assert in_force(changed, "own").rank == Ratio(of=0.125)
    # The change can be undone, also after a copy.
    assert dataclasses.replace(carry(changed), rank=before) == policy


@pytest.mark.parametrize("carry", CARRIERS)
def test_the_policy_in_force_is_one_object(carry: Any) -> None:
    policy = carry(nested(rank=Ratio(of=0.5)))
    for site in ("a.c", "a.b.c", "own", "other"):
        assert policy.for_site(site) is policy.for_site(site)
    assert policy.for_site("other") is policy
    assert policy.for_site("none") is None


def test_overrides_stay_as_they_were_given() -> None:
    given = Policy(scheme="svd", overrides={"x": Policy(round_to=1)})
    policy = Policy(rank=Ratio(of=0.5), min_gain=0, overrides={"fc": given})
    assert policy.overrides["fc"] is given
    assert "overrides={'fc': Policy(scheme='svd', overrides={'x': Policy(round_to=1)}), 'no': None}" in repr(
        dataclasses.replace(policy, overrides={"fc": given, "no": None})
    )
    assert evaluate_repr(policy) == policy


def test_policies_are_equal_if_they_decide_alike() -> None:
    short = Policy(scheme="svd", min_gain=2.0, overrides={"fc": Policy(rank=Ratio())})
    assert short == Policy(
        scheme="svd", min_gain=2.0, overrides={"fc": Policy(rank=Ratio(), scheme="svd", min_gain=2.0)}
    )
    # The override looks the same, and one of the two gives the scheme itself.
    assert short != Policy(scheme="svd", min_gain=2.0, overrides={"fc": Policy(rank=Ratio(), scheme="auto")})
    assert Policy() == Policy(scheme="auto", round_to=8, cost=Measured())


def test_the_sites_of_a_budget_use_its_cost() -> None:
    given = Policy(cost=Modelled(bytes_per_second=1.0))
    policy = Policy(rank=Budget(parameters=0.5), cost=Modelled(), overrides={"a": given})
    assert in_force(policy, "a").cost == Modelled()
    assert in_force(dataclasses.replace(policy, rank=Ratio(of=0.5)), "a").cost == Modelled(bytes_per_second=1.0)
    repeated = Policy(parameters=0.5, cost=Modelled(), overrides={"a": dataclasses.replace(given, rank=policy.rank)})
    assert in_force(repeated, "a").cost == Modelled()


def test_a_changed_override_still_inherits() -> None:
    policy = nested(rank=Ratio(of=0.5))
    inner = policy.overrides["a.*"]
    assert inner is not None
    slower = dataclasses.replace(policy, overrides={"a.*": dataclasses.replace(inner, min_gain=2)})
    assert in_force(dataclasses.replace(slower, rank=Energy()), "a.c").rank == Energy()
    own = dataclasses.replace(policy, overrides={"a.*": dataclasses.replace(inner, rank=Ratio(of=0.75))})
    assert in_force(dataclasses.replace(own, rank=Energy()), "a.c").rank == Ratio(of=0.75)


def test_a_rank_that_an_override_repeats_stays() -> None:
    policy = Policy(rank=Ratio(of=0.5), overrides={"fc": Policy(rank=Ratio(of=0.5), scheme="svd")})
    assert in_force(dataclasses.replace(policy, rank=Energy()), "fc").rank == Ratio(of=0.5)
    joint = Policy(parameters=0.5, overrides={"fc": Policy(parameters=0.5)})
    with pytest.raises(
        PolicyError, match=r"the override for 'fc' has Budget\(parameters=0\.5\), and the policy Energy"
    ):
        dataclasses.replace(joint, rank=Energy())


@pytest.mark.parametrize("name", ["policy.toml", "policy.json"])
def test_overrides_from_files_follow_a_change(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".toml":
        path.write_text(
            'rank = "ratio:0.5"\nmin_gain = 0\n[overrides.fc]\nscheme = "svd"\n[overrides.fc.overrides.x]\n'
        )
    else:
        table = {"rank": "ratio:0.5", "min_gain": 0, "overrides": {"fc": {"scheme": "svd", "overrides": {"x": {}}}}}
        path.write_text(json.dumps(table))
    policy = dataclasses.replace(tdfx.read_policy(path), rank=Energy())
    python = Policy(rank=Energy(), min_gain=0, overrides={"fc": Policy(scheme="svd", overrides={"x": Policy()})})
    assert policy == python
    assert repr(policy) == repr(python)
    assert in_force(policy, "fc") == Policy(rank=Energy(), scheme="svd", min_gain=0, overrides={"x": Policy()})
    budgeted = in_force(dataclasses.replace(policy, rank=Budget(parameters=0.5)), "fc")
    assert in_force(budgeted, "x").rank == Budget(parameters=0.5)


def test_a_file_that_names_the_default_rule_gives_it() -> None:
    override = {"overrides": {"fc": {"rank": "default", "scheme": "svd"}}}
    with pytest.raises(
        PolicyError, match=r"key overrides: .*the override for 'fc' has Budget\(speedup=2\.5, strict=False"
    ):
        tdfx.read_policy({"rank": "ratio:0.5", **override})
    with pytest.raises(PolicyError, match=r"the override for 'fc' has Budget\(speedup=2\.5"):
        tdfx.read_policy({"rank": "ratio:0.5", "overrides": {"*": override}})
    joint = tdfx.read_policy(override)
    assert joint.overrides["fc"] == Policy(scheme="svd")
    assert tdfx.read_policy({"rank": "default", **override}) == joint


def test_costs_are_changed_where_they_are_given() -> None:
    inner = Policy(overrides={"b": Policy(cost=Measured(budget=1))})
    policy = Policy(cost=Measured(budget=2), overrides={"a": inner, "c": None})
    changed = map_costs(policy, lambda cost: Modelled() if cost == Measured(budget=1) else Measured(budget=3))
    expected = Policy(overrides={"b": Policy(cost=Modelled())})
    assert changed == Policy(cost=Measured(budget=3), overrides={"a": expected, "c": None})
    assert in_force(dataclasses.replace(changed, rank=Ratio(), cost=Measured(budget=4)), "a").cost == Measured(budget=4)


def test_private_settings_are_not_shown() -> None:
    parameters = inspect.signature(Policy).parameters
    assert not any(name.startswith("_") for name in parameters)
    assert parameters["min_gain"].default == 1.05
    assert parameters["rank"].default == DEFAULT_RULE
    assert "_left_out" not in pydoc.render_doc(Policy).partition("Data and other attributes")[0]


FORMER = [
    (
        "Policy(rank=Ratio(of=0.5), scheme='auto', include=('*',), exclude=(), overrides={'fc': Policy(scheme='svd', "
        "include=('*',), exclude=(), overrides={'x': Policy(scheme='svd', include=('*',), exclude=(), overrides={}, "
        "min_gain=0, round_to=8, cost=Measured(budget=15.0, rounds=3, autocast=None, cache=True, update_bytes=28))}, "
        "min_gain=0, round_to=8, cost=Measured(budget=15.0, rounds=3, autocast=None, cache=True, update_bytes=28)), "
        "'no': None}, min_gain=0, round_to=8, cost=Measured(budget=15.0, rounds=3, autocast=None, cache=True, "
        "update_bytes=28))",
        Policy(
            rank=Ratio(of=0.5),
            min_gain=0,
            overrides={"fc": Policy(scheme="svd", overrides={"x": Policy()}), "no": None},
        ),
    ),
    *(
        (
            "Policy(rank=Budget(speedup=2), scheme='auto', include=('*',), exclude=(), overrides={'fc': "
            f"Policy(scheme='svd', include=('*',), exclude=(), overrides={{}}, min_gain=1.05, round_to=8, cost={cost!r})}}, "
            f"min_gain=1.05, round_to=8, cost={Modelled()!r})",
            Policy(speedup=2, cost=Modelled(), overrides={"fc": Policy(scheme="svd")}),
        )
        for cost in (Measured(), Modelled())  # from Python, and from a file
    ),
    (
        repr(Policy(parameters=0.5)).replace("Budget(", "Target("),
        Policy(parameters=0.5),
    ),
    (
        repr(Policy(speedup=2)).replace("speedup=2", "speedup=2, error='outputs'"),
        Policy(speedup=2),
    ),
]
"""Texts that earlier versions printed, and policies that decide as those did."""


@pytest.mark.parametrize(("text", "policy"), FORMER, ids=["nested", "python", "file", "target", "outputs"])
def test_a_policy_is_recognized_by_its_former_text(text: str, policy: Policy) -> None:
    assert is_text_of(text, policy)
    assert is_text_of(repr(policy), policy)
    assert not is_text_of(text, dataclasses.replace(policy, round_to=4))
    assert not is_text_of(text, dataclasses.replace(policy, rank=Energy()))


def test_a_former_text_of_a_policy_that_decided_otherwise_is_refused() -> None:
    # An override made in Python had the default of what it left out.
    former = FORMER[0][0].replace("min_gain=0, round_to=8, cost=Measured(budget=15.0", "min_gain=1.05, round_to=8", 1)
    assert not is_text_of(former, FORMER[0][1])


@pytest.mark.parametrize("text", [text for text, _ in FORMER], ids=["nested", "python", "file", "target", "outputs"])
def test_the_state_of_a_switch_with_a_former_text_loads(text: str) -> None:
    policy = dict(FORMER)[text]
    state = tdfx.Switch(policy, when=tdfx.AtStep(3)).state_dict()
    assert state["policy"] == repr(policy)
    tdfx.Switch(policy, when=tdfx.AtStep(3)).load_state_dict({**state, "policy": text})
    with pytest.raises(PolicyError, match="The state was saved with policy="):
        tdfx.Switch(Policy(rank=Energy()), when=tdfx.AtStep(3)).load_state_dict({**state, "policy": text})
