"""What a policy refuses, and which sites it concerns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tdfx import Energy, Fixed, Measured, Policy, PolicyError, Ratio
from tdfx.ranks.budget import DEFAULT_RULE


def test_defaults() -> None:
    policy = Policy()
    assert (policy.rank, policy.scheme, policy.min_gain, policy.cost) == (DEFAULT_RULE, "auto", 1.05, Measured())
    assert policy.wants("any.name")
    assert policy.patterns() == {"include": (), "exclude": (), "overrides": (), "rank": ()}


@pytest.mark.parametrize("rank", [0.5, "vbmf", Energy, 16])
def test_rank_must_be_a_rule(rank: Any) -> None:
    with pytest.raises(PolicyError, match=r"rank=.* is not a rank rule: it decides .* rank=tdfx\.Energy\(share=0\.9\)"):
        Policy(rank=rank)


@pytest.mark.parametrize(("scheme", "near"), [("tuker2", "tucker2"), ("SVD", "svd"), ("svdd", "svd")])
def test_scheme_must_be_known(scheme: str, near: str) -> None:
    with pytest.raises(
        PolicyError,
        match=rf"scheme='{scheme}' is not known: the schemes are tucker2, svd, .*, or 'auto'.* Nearest: '{near}'\.",
    ):
        Policy(scheme=scheme)


@pytest.mark.parametrize("scheme", [None, 3, ("svd",), ["svd"]])
def test_scheme_must_be_a_name(scheme: Any) -> None:
    with pytest.raises(PolicyError, match=r"scheme=.* is not known"):
        Policy(scheme=scheme)


@pytest.mark.parametrize("setting", ["include", "exclude"])
@pytest.mark.parametrize("given", ["layer1.*", None, 3, ("fc", 3), {"fc": 1}])
def test_patterns_must_be_a_tuple(setting: str, given: Any) -> None:
    with pytest.raises(
        PolicyError, match=rf"{setting}=.* is not a tuple of patterns: .* {setting}=\('layer1\.\*', 'fc'\)\."
    ):
        Policy(**{setting: given})


@pytest.mark.parametrize("given", [None, "fc", ["fc"], {"fc": 8}, {1: None}, {"fc": Ratio()}, {"fc": Policy}])
def test_overrides_must_map_patterns_to_policies(given: Any) -> None:
    with pytest.raises(
        PolicyError, match=r"overrides=.* does not map patterns to policies: .* overrides=\{'layer4\.\*': "
    ):
        Policy(overrides=given)


@pytest.mark.parametrize("given", [-0.1, float("nan"), True, "1.05", None, float("-inf")])
def test_min_gain_must_be_a_number(given: Any) -> None:
    with pytest.raises(PolicyError, match=r"min_gain=.* is not a number of at least 0: .* or 0 to rewrite every site"):
        Policy(min_gain=given)


@pytest.mark.parametrize("given", [0, -8, 1.5, True, "8", None, "Auto"])
def test_round_to_must_be_a_whole_number(given: Any) -> None:
    with pytest.raises(
        PolicyError,
        match=r"round_to=.* is not a whole number of at least 1: .* Pass 'auto' for .* Pass 1 for no rounding\.",
    ):
        Policy(round_to=given)


def test_limits_of_the_ranges_are_accepted() -> None:
    assert Policy(min_gain=0).min_gain == 0
    assert Policy(round_to=1).round_to == 1
    assert Policy(round_to="auto").round_to == "auto"
    assert Policy(include=()).wants("fc") is False
    assert Policy(scheme="svd").scheme == "svd"


def test_wants() -> None:
    policy = Policy(include=("layer1.*", "fc"), exclude=("*.conv2",))
    wanted = {
        "layer1.0.conv1": True,
        "layer1.0.conv2": False,
        "layer10.0": False,
        "fc": True,
        "FC": False,
        "fc.0": False,
    }
    assert {site: policy.wants(site) for site in wanted} == wanted
    assert {site: policy.for_site(site) is policy for site in wanted} == wanted


def test_overrides() -> None:
    inner = Policy(rank=Ratio(of=0.5), exclude=("*.keep",))
    deep = Policy(rank=Ratio(of=0.25))
    middle = Policy(rank=Energy(), overrides={"a.b.*": deep, "a.c": None})
    policy = Policy(exclude=("a.b.never",), overrides={"fc": None, "x.*": inner, "a.*": middle, "*.y": deep})
    assert policy.for_site("fc") is None
    assert policy.for_site("x.1") == inner
    assert policy.for_site("x.y") == inner  # the first match counts
    assert policy.for_site("x.keep") is None
    assert policy.for_site("a.b.1") == deep
    assert policy.for_site("a.c") is None
    assert policy.for_site("a.d") == middle
    assert policy.for_site("a.b.never") is None
    assert policy.for_site("other") is policy


def test_patterns_are_listed_by_setting() -> None:
    policy = Policy(rank=Fixed({"fc": 8}), include=("a*",), exclude=("b*",), overrides={"c*": None})
    assert policy.patterns() == {"include": ("a*",), "exclude": ("b*",), "overrides": ("c*",), "rank": ("fc",)}


def test_frozen_and_private() -> None:
    given: dict[str, Policy | None] = {"fc": None}
    patterns = ["a", "b"]
    policy = Policy(overrides=given, include=patterns)  # type: ignore[arg-type]
    given["conv"] = None
    patterns.append("c")
    assert dict(policy.overrides) == {"fc": None}
    assert policy.include == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.min_gain = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Policy(Ratio())  # type: ignore[call-arg]


def test_equal_policies_have_equal_hashes() -> None:
    def make() -> Policy:
        return Policy(rank=Fixed({"fc": 8}), include=("a",), overrides={"b": None})

    assert make() == make()
    assert hash(make()) == hash(make())
    assert len({make(), make(), Policy(), Policy(rank=Ratio())}) == 3
    assert make() != Policy(rank=Fixed({"fc": 9}), include=("a",), overrides={"b": None})


def test_repr_gives_an_equal_policy() -> None:
    policy = Policy(rank=Energy(share=0.5), include=("a",), overrides={"b": None})
    assert eval(repr(policy)) == policy
