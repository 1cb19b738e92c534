"""Rules made of other rules: bounds, a rounding of their own, and fallbacks."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from matrices import noise, planted
from torch import nn

import tdfx
from tdfx import VBMF, Budget, Energy, Fixed, Modelled, Policy, PolicyError, Ratio, Reason, StableRank, Threshold
from tdfx.ranks.registry import parse_rule
from tdfx.ranks.rule import Choice, Fallback, RankRule
from tdfx.ranks.signal import NO_SIGNAL
from tdfx.ranks.spectrum import spectrum

LEARNT = [spectrum(planted(64, 576, 5)), spectrum(planted(32, 576, 12))]
FRESH = [spectrum(noise(64, 576)), spectrum(noise(32, 576))]
TRUST = VBMF(floor=0)
FIXED = Fixed({"fc": 20})

COMBINED = [
    TRUST.at_least(8),
    TRUST.at_least(1.0),
    TRUST.at_most(0.5).at_least(3).round_to(16),
    FIXED | Energy(share=0.5) | Ratio(of=0.5),
    (FIXED | TRUST).at_least(8) | Ratio(),
    (Ratio(of=0.5).at_least(8) | StableRank(initial={"a": 2.0})).round_to(4),
]


def ranks(rule: RankRule, site: str = "conv") -> tuple[int, ...]:
    return rule.choose(site, LEARNT).ranks


def test_at_least() -> None:
    assert ranks(TRUST) == (5, 12)
    assert ranks(TRUST.at_least(8)) == (8, 12)
    assert ranks(TRUST.at_least(40)) == (40, 32)  # cut to the full rank
    assert ranks(TRUST.at_least(0.3)) == (20, 12)  # 19.2 and 9.6, rounded up
    assert ranks(TRUST.at_least(1)) == (5, 12)  # one rank
    assert ranks(TRUST.at_least(1.0)) == (64, 32)  # every rank
    assert TRUST.at_least(8).choose("conv", LEARNT).note == "raised from 5/12"
    assert TRUST.at_least(5).choose("conv", LEARNT).note == ""
    assert VBMF().at_least(20).choose("conv", LEARNT).note == "VBMF says 5/12, floored; raised from 16/12"


def test_at_most() -> None:
    assert ranks(TRUST.at_most(8)) == (5, 8)
    assert ranks(TRUST.at_most(0.3)) == (5, 9)  # 9.6, rounded down
    assert ranks(TRUST.at_most(0.001)) == (1, 1)
    assert ranks(TRUST.at_most(1)) == (1, 1)
    assert ranks(TRUST.at_most(1.0)) == (5, 12)
    assert TRUST.at_most(8).choose("conv", LEARNT).note == "lowered from 5/12"
    assert TRUST.at_most(12).choose("conv", LEARNT).note == ""


def test_the_last_bound_decides() -> None:
    assert ranks(TRUST.at_most(8).at_least(10)) == (10, 10)
    assert ranks(TRUST.at_least(10).at_most(8)) == (8, 8)


def test_round_to() -> None:
    assert ranks(TRUST.round_to(8)) == (8, 16)
    assert ranks(TRUST.round_to(20)) == (20, 20)
    assert ranks(TRUST.round_to(48)) == (48, 32)
    assert ranks(TRUST.at_most(10).round_to(8)) == (8, 10)  # rounding stops at the ceiling
    assert ranks(TRUST.at_most(4).at_least(6).round_to(8)) == (6, 6)
    assert ranks(TRUST.at_most(8).at_most(10).round_to(9)) == (8, 8)
    assert ranks(TRUST.round_to(8).at_most(10)) == (8, 10)


@pytest.mark.parametrize("rule", [TRUST.at_least(8), TRUST.at_most(8), TRUST.round_to(8), TRUST.at_most(8).at_least(3)])
def test_a_site_that_is_kept_stays_kept(rule: RankRule) -> None:
    assert rule.choose("conv", FRESH) == Choice((), kept=NO_SIGNAL, signal=False)


def test_or_asks_the_next_rule_where_one_keeps_the_site() -> None:
    rule = FIXED | TRUST | Ratio(of=0.5)
    assert ranks(rule, "fc") == (20, 20)
    assert rule.choose("fc", LEARNT).note == ""
    learnt = rule.choose("conv", LEARNT)
    assert (learnt.ranks, learnt.note, learnt.exact) == (
        (5, 12),
        "by VBMF(floor=0.0, weaken=1.0)".replace("0.0", "0"),
        False,
    )
    fresh = rule.choose("conv", FRESH)
    assert (fresh.ranks, fresh.note) == ((32, 16), "by Ratio(of=0.5)")
    floored = (FIXED | VBMF()).choose("conv", LEARNT)
    assert floored.note == "by VBMF(floor=0.25, weaken=1.0); VBMF says 5/12, floored"


def test_without_ranks_the_missing_signal_is_the_reason() -> None:
    for rule in (FIXED | TRUST, TRUST | FIXED, FIXED | TRUST | FIXED):
        assert rule.choose("conv", FRESH) == Choice((), kept=NO_SIGNAL, signal=False)
    assert (FIXED | Fixed({"a": 1})).choose("conv", FRESH) == Choice((), kept="no pattern of Fixed matches it")


def test_exact_and_patterns_pass_through() -> None:
    assert not TRUST.at_least(8).exact
    assert FIXED.at_least(8).exact
    assert FIXED.at_least(8).choose("fc", LEARNT) == Choice((20, 20), exact=True)
    assert (TRUST | FIXED).exact
    assert (FIXED | TRUST).choose("fc", LEARNT).exact
    assert not (FIXED | TRUST).choose("conv", LEARNT).exact
    assert not (TRUST | Ratio()).exact
    for rule in (FIXED.at_least(8), FIXED.at_most(8), FIXED.round_to(8), TRUST | FIXED):
        assert rule.patterns() == ("fc",)
    assert (FIXED | StableRank(initial={"a": 2.0}).at_least(2) | Fixed({"b": 2})).patterns() == ("fc", "a", "b")


@pytest.mark.parametrize("rule", COMBINED)
def test_a_combined_rule_prints_as_it_is_written_and_compares_by_value(rule: RankRule) -> None:
    evaluated = eval(repr(rule))
    assert evaluated == rule
    assert hash(evaluated) == hash(rule)
    assert repr(evaluated) == repr(rule)
    assert pickle.loads(pickle.dumps(rule)) == rule
    policy = Policy(rank=rule, cost=Modelled())
    assert eval(repr(policy)) == policy
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rule, dataclasses.fields(rule)[0].name, TRUST)  # type: ignore[arg-type]


def test_combined_rules_that_differ_are_not_equal() -> None:
    different = {
        *COMBINED,
        TRUST.at_least(1),
        TRUST.at_least(9),
        TRUST.at_most(1),
        TRUST.at_most(1.0),
        TRUST.round_to(1),
    }
    assert len(different) == len(COMBINED) + 5
    assert TRUST.at_least(1) != TRUST.at_least(1.0)
    assert (FIXED | TRUST) != (TRUST | FIXED)
    assert (FIXED | TRUST) | Ratio() == FIXED | (TRUST | Ratio())
    assert repr((FIXED | TRUST).at_least(8)) == "(Fixed(ranks={'fc': 20}) | VBMF(floor=0, weaken=1.0)).at_least(8)"


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, 8.0, float("nan"), True, "8", None])
@pytest.mark.parametrize("method", ["at_least", "at_most"])
def test_an_invalid_bound_is_refused(method: str, value: Any) -> None:
    message = (
        rf"{method}\(.*\) is neither a whole number of ranks of at least 1 nor a share of the full rank in \(0, 1\]\. "
        rf"Pass for example {method}\(8\) for eight ranks, or {method}\(0\.25\) for a quarter"
    )
    with pytest.raises(PolicyError, match=message):
        getattr(TRUST, method)(value)


@pytest.mark.parametrize("value", [0, -8, 1.5, True, "8", "auto", None])
def test_an_invalid_rounding_is_refused(value: Any) -> None:
    with pytest.raises(
        PolicyError, match=r"round_to\(.*\) is not a whole number of at least 1: .* Pass 1 for no rounding"
    ):
        TRUST.round_to(value)


def test_only_a_rule_can_follow_another() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        TRUST | 8  # type: ignore[operator]
    assert isinstance(TRUST | FIXED, Fallback)


def planned(rule: RankRule, **settings: Any) -> list[tuple[int, ...] | str | None]:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 128))
    plan = tdfx.plan(model, Policy(rank=rule, **{"min_gain": 0, **settings}))
    return [site.ranks or site.reason for site in plan]


def test_the_plan_rounds_what_may_be_rounded() -> None:
    assert planned(Ratio(of=0.3)) == [(24,), (24,)]  # 19.2
    assert planned(Ratio(of=0.3).at_most(21)) == [(21,), (21,)]  # the policy's rounding stops at the ceiling too
    assert planned(Ratio(of=0.3).at_least(25)) == [(32,), (32,)]
    assert planned(Ratio(of=0.3).round_to(5)) == [(20,), (20,)]
    assert planned(Ratio(of=0.3).round_to(1)) == [(19,), (19,)]
    assert planned(Fixed({"0": 19}) | Ratio(of=0.3)) == [(19,), (24,)]
    assert planned(VBMF() | Fixed({"2": 19})) == [Reason.NO_SIGNAL, (19,)]


def test_small_ranks_that_rounding_would_not_give_are_tried() -> None:
    """A rank of 64 gains nothing for these layers; ranks that are not rounded up are tried before a layer is too small."""
    settings = {"min_gain": 1.5, "cost": Work()}
    assert planned(Ratio(of=0.1), **settings, round_to=64) == [Reason.TOO_SMALL, Reason.TOO_SMALL]
    assert planned(Ratio(of=0.1).at_most(6), **settings, round_to=64) == [(6,), (6,)]
    assert planned(Ratio(of=0.1).round_to(1), **settings, round_to=64) == [(6,), (6,)]
    assert planned(Ratio(of=1.0).round_to(1), **settings, round_to=64) == [Reason.NO_GAIN, Reason.NO_GAIN]
    # Where even one rank would not pay, that is the reason, and not that there is no signal.
    assert planned(VBMF().round_to(1), **{**settings, "min_gain": 1e9}) == [Reason.TOO_SMALL, Reason.TOO_SMALL]
    assert planned(VBMF().round_to(1), **settings, round_to=64) == [Reason.NO_SIGNAL, Reason.NO_SIGNAL]


class Work:
    """Counts parameters and nothing else."""

    def seconds(self, chain: Any, flow: object) -> float:
        return float(sum(operation.parameters for operation in chain))


def test_the_first_pattern_decides_for_a_layer_under_two_names() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential()
    model.add_module("a", layer)
    model.add_module("b", layer)
    rule = Fixed({"b": 5}) | Fixed({"a": 7})
    (site,) = tdfx.plan(model, Policy(rank=rule, min_gain=0))
    assert (site.name, site.ranks) == ("a", (5,))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("stable", StableRank()),
        ("Threshold:0.1", Threshold(above=0.1)),
        ("vbmf:0.25", VBMF(floor=0.25)),
        ("params:0.5", Budget(parameters=0.5)),
        ("flops:0.5", Budget(flops=0.5)),
        ("energy:0.9,at_least=8", Energy(share=0.9).at_least(8)),
        (" energy:0.9 , at_least=0.25 , at_most=1.0,round_to=16 ", Energy().at_least(0.25).at_most(1.0).round_to(16)),
        ("stable,at_most=64", StableRank().at_most(64)),
    ],
)
def test_rules_as_text(text: str, rule: RankRule) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stable:0.5", r"'stable:0\.5' has a number, and stable takes none\. Write stable\."),
        ("threshold", r"'threshold' needs a number\. Write for example threshold:0\.5\."),
        ("params", r"'params' needs a number\. Write for example params:0\.5\."),
        ("flops,at_least=8", r"'flops' needs a number\. Write for example flops:0\.5\."),
        ("params:0", r"parameters=0\.0 is neither a share in \(0, 1\] nor a whole number of at least 1"),
        (
            "energy,floor=8",
            r"'floor=8' is not a bound on ranks: 'floor' is not one of at_least, at_most, round_to\. Write",
        ),
        ("energy,", r"'' is not a bound on ranks"),
        ("energy,at_least", r"'at_least' has no number after the equals sign, but ''\. Write at_least=8"),
        ("energy,at_most=lots", r"'at_most=lots' has no number after the equals sign, but 'lots'"),
        ("energy,at_most=1.5", r"at_most\(1\.5\) is neither"),
        ("energy,round_to=0.5", r"round_to\(0\.5\) is not a whole number"),
    ],
)
def test_invalid_rules_as_text_are_refused(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse_rule(text)


def test_a_model_rewritten_by_a_combined_rule_trains() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    small = tdfx.rewrite(model, Policy(rank=(VBMF() | Ratio(of=0.25)).at_most(8), min_gain=0))
    small(torch.rand(2, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
