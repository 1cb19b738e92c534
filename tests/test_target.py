"""One ratio for all sites of a policy, against a search over every ratio that makes a difference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from matrices import planted
from tdfx.passes.planning.readings import Readings
from torch import nn

import tdfx
from tdfx import VBMF, Fixed, Modelled, Plan, Policy, PolicyError, Ratio, Reason, SitePlan, Target
from tdfx.factors.scheme import Scheme
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.planning.select import Select
from tdfx.passes.program import Program, Site
from tdfx.ranks.rule import Choice, RankRule, Total
from tdfx.ranks.spectrum import Spectrum

INPUT = torch.rand(64, 3, 16, 16)


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 48, 3),
        nn.ReLU(),
        nn.Conv2d(48, 96, 3, stride=2),
        nn.Conv2d(96, 40, 1),
        nn.Flatten(),
        nn.Linear(1440, 100),
    )


def total(sites: list[SitePlan], name: str) -> tuple[int, int]:
    before, after = (sum(getattr(one, f"{name}_{when}") for one in sites) for when in ("before", "after"))
    return before, after


def ratio_of(plan: Plan) -> float:
    (note,) = plan.notes
    rule = eval(note.partition(" came to ")[2])
    assert isinstance(rule, Ratio)
    return rule.of


def ratios(sites: list[SitePlan]) -> list[float]:
    """One ratio between each two at which some rank changes; a rank changes half way between whole numbers."""
    full = {most for one in sites for most in one.full_ranks or ()}
    edges = sorted({Fraction(2 * rank + 1, 2 * most) for most in full for rank in range(most)})
    return [float((low + high) / 2) for low, high in itertools.pairwise(edges)]


@pytest.mark.parametrize("settings", [{"min_gain": 0, "round_to": 1}, {"min_gain": 0}, {"cost": Modelled()}])
@pytest.mark.parametrize("name", ["parameters", "flops"])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
def test_the_target_is_met_as_nearly_as_ranks_allow(name: str, share: float, settings: dict[str, Any]) -> None:
    policy = Policy(rank=Target(**{name: share}), **settings)
    found = tdfx.plan(model(), policy, example_inputs=INPUT)
    before, after = total(list(found), name)
    assert after <= share * before
    some = ratios(list(found))
    # Every 97th, and all around the one that was found: to try all takes a minute.
    nearby = [one for one in some if abs(one - ratio_of(found)) < 0.004]
    best = 0
    for one in [*some[::97], *nearby]:
        trial = tdfx.plan(model(), Policy(rank=Ratio(of=one), **settings), example_inputs=INPUT)
        reached = total(list(trial), name)[1]
        best = max(best, reached) if reached <= share * before else best
    assert after == best


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_the_target_is_met_where_a_measurement_keeps_sites_that_arithmetic_would_not(share: float) -> None:
    class Contrary(tdfx.Measured):
        """Finds that nothing gains but the layer of most parameters."""

        def measure(self, groups: Any, *, spent: float = 0.0) -> dict[Any, float]:
            return {case: self._made_up(*case) for group in groups for case in group}

        def _made_up(self, chain: Any, flow: Any) -> float:
            count = sum(one.parameters for one in chain)
            return float(count) if chain[0].in_channels == 1440 else 1e6 * len(chain)

    found = tdfx.plan(model(), Policy(rank=Target(parameters=share), cost=Contrary()), example_inputs=INPUT)
    before, after = total(list(found), "parameters")
    assert [site.name for site in found.factorized] == ["5"]
    assert 0.85 * share * before < after <= share * before
    assert {site.reason for site in found.kept} <= {Reason.NO_GAIN, Reason.TOO_SMALL}


def test_sites_get_one_common_ratio() -> None:
    found = tdfx.plan(model(), Policy(rank=Target(parameters=0.5), min_gain=0, round_to=1))
    expected = tdfx.plan(model(), Policy(rank=Ratio(of=ratio_of(found)), min_gain=0, round_to=1))
    assert [one.ranks for one in found] == [one.ranks for one in expected]
    assert len({one.ranks for one in found}) == 4


def test_the_plan_records_the_target_and_what_it_came_to() -> None:
    found = tdfx.plan(model(), Policy(rank=Target(parameters=0.5), min_gain=0))
    assert "rank=Target(parameters=0.5)" in found.policy
    assert "Ratio" not in found.policy
    assert found.notes[0].startswith("Target(parameters=0.5) came to Ratio(of=0.")
    assert len(str(ratio_of(found))) <= 6  # no more decimals than make a difference
    assert found.notes[0] in str(found)
    assert Plan.from_json(found.to_json()) == found
    assert tdfx.plan(model(), Policy(rank=Ratio(of=0.5))).notes == ()


def test_a_rewrite_holds_what_the_target_says() -> None:
    net = model()
    weights = [one for one in net.parameters() if one.dim() > 1]
    small = tdfx.rewrite(net, Policy(rank=Target(parameters=0.5), min_gain=0))
    count = sum(one.numel() for one in small.parameters() if one.dim() > 1)
    whole = sum(one.numel() for one in weights)
    assert 0.45 * whole < count <= 0.5 * whole
    assert isinstance(small, nn.Module)
    assert sum(one.numel() for one in weights) == whole


def test_sites_that_the_policy_does_not_decide_do_not_count() -> None:
    found = tdfx.plan(model(), Policy(rank=Target(parameters=0.5), min_gain=0, exclude=("5",)))
    before, after = total([one for one in found if one.name != "5"], "parameters")
    assert 0.45 * before < after <= 0.5 * before
    assert found["5"].reason is Reason.EXCLUDED
    whole = tdfx.plan(model(), Policy(rank=Target(parameters=0.5), min_gain=0))
    assert total([one for one in whole if one.name != "5"], "parameters") != (before, after)


def test_each_policy_has_a_target_of_its_own() -> None:
    half = Policy(rank=Target(parameters=0.5), min_gain=0)
    quarter = Policy(rank=Target(parameters=0.25), min_gain=0)
    policy = Policy(rank=Ratio(of=0.5), min_gain=0, overrides={"5": quarter, "2": half, "3": half})
    found = tdfx.plan(model(), policy)
    for names, share in ((["2", "3"], 0.5), (["5"], 0.25)):
        before, after = total([found[name] for name in names], "parameters")
        assert 0.6 * share * before < after <= share * before
    assert found["0"].ranks == (16, 3)
    assert [note.partition(" came")[0] for note in found.notes] == ["Target(parameters=0.25)", "Target(parameters=0.5)"]


def test_sites_that_stay_dense_count_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(512, 512))
    found = tdfx.plan(net, Policy(rank=Target(parameters=0.3)))
    assert found["0"].reason is Reason.TOO_SMALL
    before, after = total(list(found), "parameters")
    assert 0.27 * before < after <= 0.3 * before


def test_a_target_inside_other_rules_counts_what_they_make_of_it() -> None:
    for rule in (Target(parameters=0.5).at_least(40), Fixed({"5": 40}) | Target(parameters=0.6)):
        found = tdfx.plan(model(), Policy(rank=rule, min_gain=0))
        before, after = total(list(found), "parameters")
        share = 0.5 if "at_least" in repr(rule) else 0.6
        assert 0.85 * share * before < after <= share * before
        assert found.notes[0].startswith(f"{rule!r} came to ")
    assert found["5"].ranks == (40,)
    alone = tdfx.plan(model(), Policy(rank=Target(parameters=0.6), min_gain=0))
    assert alone["2"].ranks != found["2"].ranks


def test_a_target_takes_the_sites_that_another_rule_keeps() -> None:
    net = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    with torch.no_grad():
        net.get_parameter("0.weight").copy_(planted(128, 128, 4))
    found = tdfx.plan(net, Policy(rank=VBMF(floor=0) | Target(parameters=0.25), min_gain=0, round_to=1))
    assert found["0"].ranks == (4,)
    assert found["1"].ranks == (28,)  # 256 * (4 + 28) of 2 * 128**2 is a quarter


def test_a_target_of_everything_rewrites_at_full_rank_if_that_costs_nothing() -> None:
    net = nn.Sequential(nn.Linear(512, 512))
    assert ratio_of(tdfx.plan(net, Policy(rank=Target(parameters=1.0)))) == 1.0  # kept, since it would not be faster
    at_most = tdfx.plan(net, Policy(rank=Target(parameters=1.0), min_gain=0, round_to=1))
    assert at_most["0"].ranks == (256,)


def test_a_target_out_of_reach_says_what_can_be_reached() -> None:
    with pytest.raises(
        PolicyError,
        match=r"Target\(parameters=0\.01\) cannot be met: the least that the sites can come to is (0\.\d+) of their "
        r"parameters now\. Ask for that, let ranks be lower with Policy\(round_to=1\), or exclude sites that stay dense\.",
    ) as caught:
        tdfx.plan(model(), Policy(rank=Target(parameters=0.01), min_gain=0))
    least = float(str(caught.value).partition("come to is ")[2].split()[0])
    found = tdfx.plan(model(), Policy(rank=Target(parameters=least), min_gain=0))
    assert {rank for one in found for rank in one.ranks or ()} == {8, 3}
    with pytest.raises(PolicyError, match="cannot be met"):
        tdfx.plan(model(), Policy(rank=Target(parameters=least - 0.002), min_gain=0))
    assert tdfx.plan(model(), Policy(rank=Target(parameters=0.02), min_gain=0, round_to=1)).factorized


def test_operations_need_example_inputs() -> None:
    with pytest.raises(
        PolicyError,
        match=r"Target\(flops=0\.5\) counts operations, .* Pass example_inputs=\.\.\. .* or give Target\(parameters=",
    ):
        tdfx.plan(model(), Policy(rank=Target(flops=0.5)))


def test_a_target_sees_all_sites_or_none() -> None:
    with pytest.raises(
        PolicyError, match=r"Target\(flops=0\.5\) cannot choose ranks for site 'fc' alone: .* use Ratio\."
    ):
        Target(flops=0.5).choose("fc", [])
    assert tdfx.plan(nn.Sequential(nn.ReLU()), Policy(rank=Target(flops=0.5))).notes == ()


@pytest.mark.parametrize("given", [{}, {"parameters": 0.5, "flops": 0.5}])
def test_a_target_takes_one_of_the_two(given: dict[str, float]) -> None:
    with pytest.raises(
        PolicyError, match=r"Target\(parameters=.*, flops=.*\) does not give exactly one of the two\. For"
    ):
        Target(**given)


@pytest.mark.parametrize("value", [0.0, 1.5, -1, float("nan"), True, "0.5"])
@pytest.mark.parametrize("name", ["parameters", "flops"])
def test_a_target_is_a_share(name: str, value: Any) -> None:
    with pytest.raises(
        PolicyError, match=rf"{name}=.* is not in \(0, 1\]: it is the part of the sites' {name} that may"
    ):
        Target(**{name: value})


def test_a_target_is_a_value() -> None:
    assert repr(Target(flops=0.5)) == "Target(flops=0.5)"
    assert {Target(flops=0.5), Target(flops=0.5), Target(parameters=0.5)} == {Target(flops=0.5), Target(parameters=0.5)}


def test_spectra_are_kept_for_what_is_rewritten_only() -> None:
    program = Find()(Trace()(Program(module=nn.Sequential(nn.Linear(64, 64), nn.Linear(512, 512)))).program).program
    select = Select(Policy(rank=Fixed({"0": 60}) | Target(parameters=0.4)))
    made = select(program).program.plan
    assert made is not None
    assert [one.name for one in made.factorized] == ["1"]
    assert select.readings.kept.names == {"1"}


class Half(tdfx.Ratio):
    """A rule of the user's that sees all sites."""

    def resolve(self, dense: Total, after: Any) -> RankRule:
        assert after(self).parameters < dense.parameters
        return Fixed({"*": 4})


class Read(tdfx.Ratio):
    """A rule of the user's that looks where the one it is made of does not."""

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        return Choice(tuple(int((one.values > 0.5 * one.values.max()).sum()) for one in spectra))


def test_only_rules_that_look_make_a_site_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    right = Readings.spectra_of

    def noted(self: Readings, site: Site, scheme: Scheme) -> tuple[Spectrum, ...]:
        read.append(site.name)
        return right(self, site, scheme)

    monkeypatch.setattr(Readings, "spectra_of", noted)
    blind = [Ratio(of=0.5), Fixed({"*": 4}), Ratio(of=0.1).at_least(3) | Fixed({"*": 2}), Target(parameters=0.5)]
    for rule in blind:
        tdfx.plan(model(), Policy(rank=rule, min_gain=0))
        assert read == []
    for rule in (tdfx.VBMF(), Fixed({"*": 4}) | tdfx.VBMF(), tdfx.Energy().at_most(4), Read()):
        tdfx.plan(model(), Policy(rank=rule, min_gain=0))
        assert read
        read.clear()


def test_a_rule_of_the_users_may_see_all_sites() -> None:
    found = tdfx.plan(model(), Policy(rank=Half(of=0.1), min_gain=0))
    assert {rank for one in found for rank in one.ranks or ()} == {4, 3}
