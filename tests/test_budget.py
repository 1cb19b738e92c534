"""Budgets: what is kept, at the least loss, by whichever measure; and what happens where it cannot be kept."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from budgeted import ByFlops, X, lowish, net, planned
from torch import Tensor, nn

import tdfx
from tdfx import Budget, InputError, Modelled, Policy, PolicyError, Ratio, Reason
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.kinds.registry import operation_of
from tdfx.passes.pipeline import find_sites
from tdfx.passes.planning.candidates import candidates_of
from tdfx.passes.planning.spectra import SpectrumCache
from tdfx.ranks.spectrum import spectrum


@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
@pytest.mark.parametrize("name", ["parameters", "flops", "memory"])
def test_a_share_is_kept(name: str, share: float) -> None:
    plan = planned(**{name: share})
    before, after = getattr(plan, f"{name}_before"), getattr(plan, f"{name}_after")
    # Ranks are whole numbers, so a little may be left.
    assert 0.85 * share * before < after <= share * before
    tight = planned(**{name: share / 2})
    assert tight.total_error > plan.total_error > 0


def test_an_amount_is_kept() -> None:
    plan = planned(parameters=9_000)
    assert 8_500 < plan.parameters_after <= 9_000
    assert planned(flops=5_000_000).flops_after <= 5_000_000  # type: ignore[operator]


def test_two_budgets_are_both_kept() -> None:
    one = planned(parameters=0.5)
    both = planned(parameters=0.5, flops=0.2)
    assert both.parameters_after <= 0.5 * both.parameters_before
    assert both.flops_after <= 0.2 * both.flops_before  # type: ignore[operator]
    assert one.flops_after > 0.2 * one.flops_before  # type: ignore[operator]


def test_what_is_predicted_is_what_the_rewrite_has() -> None:
    model = net()
    policy = Policy(parameters=0.4, min_gain=0, round_to=1, cost=Modelled())
    plan = tdfx.plan(model, policy)
    small = tdfx.rewrite(model, plan)
    assert sum(one.numel() for one in small.parameters()) == plan.parameters_after
    assert len({site.scheme for site in plan.factorized}) > 1


def test_no_other_choice_of_the_same_options_loses_less() -> None:
    torch.manual_seed(0)
    model = lowish(nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 24), nn.Conv1d(20, 6, 3)))
    policy = Policy(parameters=0.6, min_gain=0, round_to=4, cost=Modelled())
    plan = tdfx.plan(model, policy)
    places = []
    for site in plan.sites:
        layer = model.get_submodule(site.name)
        found = [(site.parameters_before, 0.0)]
        weight = layer.get_parameter("weight").detach().double()
        for name in ("svd", "tucker2", "tucker1_out", "tucker1_in"):
            scheme = get_scheme(name)
            operation = operation_of(layer)
            assert operation is not None
            if not scheme.fits(operation):
                continue
            full = scheme.full_ranks(operation)
            spectra = scheme.spectra(operation, weight)
            for ranks in itertools.product(*({min(most, 4 * step) for step in range(1, 7)} for most in full)):
                count = sum(one.parameters for one in scheme.chain(operation, ranks))
                found.append((count, scheme.error(operation, weight, ranks, spectra) ** 2))
        places.append(found)
    limit = int(0.6 * plan.parameters_before) - plan.other_parameters
    fits = (pick for pick in itertools.product(*map(undominated, places)) if sum(one[0] for one in pick) <= limit)
    least = min(sum(one[1] for one in pick) for pick in fits)
    # The options of a budget are fewer than all ranks, so it may lose a little more than the best of all.
    assert least <= plan.total_error * (1 + 1e-9)
    assert plan.total_error < 1.3 * least


def undominated(options: list[tuple[int, float]]) -> list[tuple[int, float]]:
    kept: list[tuple[int, float]] = []
    for one in sorted(options):
        if not kept or one[1] < kept[-1][1]:
            kept.append(one)
    return kept


def test_it_loses_less_than_one_share_for_all() -> None:
    even = tdfx.plan(net(), Policy(rank=Ratio(of=0.3), min_gain=0, round_to=1, cost=Modelled()))
    solved = planned(parameters=even.parameters_after)
    assert solved.parameters_after <= even.parameters_after
    assert solved.total_error < 0.8 * even.total_error


def test_a_speedup_is_of_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = ByFlops()
    sites = sum(one.flops_before or 0 for one in planned(parameters=0.5).sites) / 1e9
    # A quarter of the step is not the sites'.
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._seconds", lambda *_: sites / 0.75)
    plan = planned(speedup=2, cost=cost)
    assert plan.step_seconds == pytest.approx(sites / 0.75)
    assert plan.speedup is not None
    assert plan.step_seconds is not None
    assert 2 <= plan.speedup < 2.1
    after = sum(one.seconds_after for one in plan.sites)  # type: ignore[misc]
    # With four sites there are not many choices.
    assert after == pytest.approx((0.5 - 0.25) / 0.75 * sites, rel=0.12)
    assert planned(seconds=plan.step_seconds / 2, cost=cost).total_error == pytest.approx(plan.total_error)
    with pytest.raises(
        PolicyError, match=r"Budget\(speedup=5\) cannot be kept: the most that .* is speedup=3\.[0-9]+\. Ask"
    ):
        planned(speedup=5, cost=cost)


def test_what_can_be_reached_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._seconds", lambda *_: 0.02)
    for name, value in (("speedup", 90), ("seconds", 1e-6), ("parameters", 0.001), ("memory", 1), ("flops", 0.001)):
        with pytest.raises(
            PolicyError, match="cannot be kept: the most that the 4 sites in question can give"
        ) as caught:
            planned(**{name: value}, cost=ByFlops())
        said = str(caught.value).split(f"{name}=")[2].split(" ")[0].rstrip(".")
        planned(**{name: int(said) if said.isdecimal() and name != "speedup" else float(said)}, cost=ByFlops())


def test_several_budgets_that_only_together_are_too_much() -> None:
    # On large images, what flows between two factors takes more memory than the weight that they replace.
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)), torch.randn(2, 16, 128, 128)
    settings: dict[str, Any] = {"min_gain": 0, "round_to": 1, "cost": Modelled()}
    alone: list[dict[str, Any]] = [{"parameters": 0.5}, {"memory": 1.0}]
    for budget in alone:
        tdfx.plan(model, Policy(**budget, **settings), example_inputs=x)
    with pytest.raises(PolicyError, match="each of its budgets can, but not all of them together"):
        tdfx.plan(model, Policy(parameters=0.5, memory=1.0, **settings), example_inputs=x)


def test_without_a_measurement_a_speedup_is_of_the_sites() -> None:
    plan = tdfx.plan(net(), Policy(speedup=2, min_gain=0, cost=Modelled()))
    model = Modelled()
    layers = [net().get_submodule(one.name) for one in plan.sites]
    operations = [operation_of(one) for one in layers]
    before = [model.seconds([one], None) for one in operations if one is not None]
    after = [
        took / (site.gain or 1.0) if site.factorized else took for took, site in zip(before, plan.sites, strict=True)
    ]
    assert sum(before) / sum(after) >= 2
    with pytest.raises(PolicyError, match="is about the time of the training step, which is not known"):
        tdfx.plan(net(), Policy(seconds=1.0, cost=Modelled()), example_inputs=(X,))
    with pytest.raises(PolicyError, match="counts flops, which depends on what flows through each site"):
        tdfx.plan(net(), Policy(flops=0.5))


def test_sites_of_other_rules_count_with_what_they_become() -> None:
    policy = {"min_gain": 0, "round_to": 1, "cost": Modelled()}
    given = Policy(rank=Ratio(of=0.1), **policy)  # type: ignore[arg-type]
    plan = tdfx.plan(net(), Policy(parameters=0.5, overrides={"2": given}, exclude=("7",), **policy))  # type: ignore[arg-type]
    assert plan["2"].ranks == (3, 3)
    assert plan["7"].reason is Reason.EXCLUDED
    assert 0.45 < plan.parameters_after / plan.parameters_before <= 0.5


def test_a_site_that_would_not_gain_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._seconds", lambda *_: 0.02)
    plan = planned(parameters=0.9, min_gain=1.5, cost=ByFlops())
    assert plan.factorized
    assert all(site.gain is not None and site.gain >= 1.5 for site in plan.factorized)
    kept = [site for site in plan.kept if site.reason is Reason.NO_GAIN]
    assert {site.note for site in kept} <= {"within the budget as it is"}


def test_what_is_chosen_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._seconds", lambda *_: 0.02)
    cost = ByFlops()
    plan = planned(speedup=1.2, cost=cost)
    assert cost.asked
    assert all(site.seconds_after is not None for site in plan.factorized)


def test_a_factorized_model_stays_as_it_is_under_a_budget() -> None:
    small = tdfx.rewrite(net(), Policy(rank=Ratio(of=0.5), min_gain=0, cost=Modelled()))
    plan = tdfx.plan(small, Policy(parameters=1.0, min_gain=0, cost=Modelled()))
    assert {site.reason for site in plan.sites} == {Reason.FACTORIZED}
    with pytest.raises(PolicyError, match="cannot be kept: the 0 sites in question can give nothing of it"):
        tdfx.plan(small, Policy(parameters=0.5, min_gain=0, cost=Modelled()))


@pytest.mark.parametrize("scheme", ["svd", "spatial", "tucker2"])
def test_a_scheme_that_is_asked_for_is_the_only_one(scheme: str) -> None:
    plan = planned(parameters=0.95, scheme=scheme)
    assert {site.scheme for site in plan.factorized} == {scheme}


def test_candidates_have_the_errors_of_their_splits_and_survive_being_sent() -> None:
    program = find_sites(net())
    policy = Policy(parameters=0.5, round_to=4)
    site = program.sites[1]
    weight = site.weight
    assert weight is not None
    candidates = candidates_of(site, policy, SpectrumCache(), weight.detach())
    assert pickle.loads(pickle.dumps(candidates)) == candidates
    assert {each.scheme.name for each in candidates.errors} == {"tucker2", "tucker1_out", "tucker1_in", "spatial"}
    operation, dense = site.operation, weight.detach().double()
    assert operation is not None
    for candidate, error in candidates.errors.items():
        scheme = candidate.scheme
        factors = scheme.split(operation, dense, candidate.ranks, scheme.spectra(operation, dense))
        lost = dense - scheme.join(operation, factors)
        assert error**2 == pytest.approx(float(lost.square().sum() / dense.square().sum()), abs=1e-12)


@pytest.mark.parametrize("name", ["tucker2", "svd", "cp"])
def test_errors_at_many_ranks_are_those_at_each(name: str) -> None:
    torch.manual_seed(0)
    scheme = get_scheme(name)
    operation = Operation(
        in_channels=12, out_channels=8, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2
    )
    if name == "svd":
        operation = Operation(in_channels=12, out_channels=8)
    weight = torch.randn(operation.weight_shape, dtype=torch.float64)
    spectra = scheme.spectra(operation, weight)
    full = scheme.full_ranks(operation)
    grid = [tuple(max(1, most // part) for most in full) for part in (4, 2)]
    one_by_one = [scheme.error(operation, weight, ranks, spectra) for ranks in grid]
    assert scheme.errors(operation, weight, grid, spectra) == pytest.approx(one_by_one, rel=1e-9)
    assert scheme.errors(operation, 0 * weight, grid, scheme.spectra(operation, 0 * weight)) == [0.0, 0.0]


@pytest.mark.parametrize("channels", [(12, 8), (2, 40)])
def test_spectra_of_schemes_that_cut_less_are_the_same_ones(channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    operation = Operation(
        in_channels=channels[0], out_channels=channels[1], kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
    )
    weight = torch.randn(operation.weight_shape, dtype=torch.float64)
    tucker = get_scheme("tucker2")
    known = tucker.partial_spectra(tucker.spectra(operation, weight))
    assert set(known) == ({"tucker1_out", "tucker1_in"} if channels == (12, 8) else {"tucker1_in"})
    for name, spectra in known.items():
        scheme = get_scheme(name)
        (own,) = scheme.spectra(operation, weight)
        assert torch.allclose(spectra[0].values, own.values, atol=1e-12)
        first, second = (
            scheme.join(operation, scheme.split(operation, weight, (2,), one)) for one in (spectra, (own,))
        )
        assert torch.allclose(first, second, atol=1e-12)


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
    policy = Policy(speedup=2, error="outputs")
    assert policy.rank == Budget(speedup=2, error="outputs")
    assert dataclasses.replace(policy, exclude=("a",)).rank == policy.rank
    assert dataclasses.replace(policy, rank=Budget(speedup=3)) == Policy(speedup=3)
    assert Policy(rank=Budget(speedup=2)) == Policy(speedup=2)
    with pytest.raises(PolicyError, match=r"rank=Budget\(.*\) and speedup=3 both say which ranks to take"):
        dataclasses.replace(policy, speedup=3)
    assert repr(policy.rank) in repr(policy)
    assert Policy().rank == Budget(speedup=2, strict=False, floor=0.125, noise_floor=0.25)


class Drawing(nn.Module):
    """Draws from every stream of random numbers, as augmentation inside of a model does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x + torch.rand_like(x) * random.random() * float(np.random.rand()))
        return found


def test_a_trained_step_is_unchanged_by_a_plan() -> None:
    model = net()
    before: dict[str, Tensor] = {name: one.clone() for name, one in model.state_dict().items()}
    noisy = Drawing(model)

    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = drawn()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    tdfx.plan(noisy, Policy(seconds=10.0, min_gain=0), example_inputs=(X,))
    assert drawn() == expected
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.grad is None for one in model.parameters())


def test_what_a_budget_leaves_says_whether_it_could_have_gained() -> None:
    plan = planned(parameters=0.97, min_gain=1.5, cost=ByFlops())
    assert {one.reason for one in plan.kept} == {Reason.NOT_NEEDED}
    none = planned(parameters=0.97, min_gain=0, include=("2",), rank=None, cost=ByFlops())
    assert none["2"].factorized
    hopeless = planned(rank=Budget(parameters=0.5, strict=False), min_gain=1e9, cost=ByFlops())
    for one in hopeless:
        assert (one.reason, one.note) == (Reason.NO_GAIN, "1e+09x was asked of it, at any ranks that the budget allows")
        assert one.gain is not None and 1 < one.gain < 1e9  # noqa: PT018


def test_a_budget_takes_nothing_that_gains_less_than_is_asked_for() -> None:
    loose = planned(parameters=0.97, min_gain=0.01, cost=ByFlops())
    assert min(site.gain or 0 for site in loose.factorized) < 4
    strict = planned(parameters=0.97, min_gain=4, cost=ByFlops())
    assert strict.factorized
    assert min(site.gain or 0 for site in strict.factorized) >= 4


def test_sites_that_take_longer_alone_than_the_step_count_as_parts_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = sum(one.flops_before or 0 for one in planned(parameters=0.5).sites) / 1e9
    monkeypatch.setattr("tdfx.passes.planning.step_time.TimeStep._seconds", lambda *_: sites / 2)
    plan = planned(speedup=1.5, cost=ByFlops())
    after = sum(one.seconds_after or 0 for one in plan.sites)
    # All of the step is the sites', so they have to get faster by as much.
    assert 1.5 <= sites / after < 1.8


def test_what_cannot_be_had_is_followed_most_of_the_way() -> None:
    with pytest.raises(PolicyError, match="the most that the 4 sites in question can give is speedup=") as refused:
        planned(rank=Budget(speedup=1e4), cost=ByFlops())
    most = float(str(refused.value).partition("speedup=")[2].partition("give is speedup=")[2].split(".")[0])
    plan = planned(rank=Budget(speedup=1e4, strict=False), cost=ByFlops())
    assert re.search(
        r"strict=False\) cannot be kept: speedup=[\d.]+ is the most that is possible; 90% of that", " ".join(plan.notes)
    )
    before = sum(one.seconds_before or 0 for one in plan.sites)
    after = sum(one.seconds_after or 0 for one in plan.sites)
    # Nine tenths of the way to next to nothing leave one tenth.
    assert most > 20
    assert 0.05 * before < after < 0.2 * before
    kept = planned(rank=Budget(speedup=1.5), cost=ByFlops())
    near = planned(rank=Budget(speedup=1.5, strict=False), cost=ByFlops())
    assert near.sites == kept.sites
    assert not near.notes


def test_several_budgets_that_cannot_be_kept_together_are_followed_together() -> None:
    plan = planned(rank=Budget(parameters=0.01, flops=0.2, strict=False))
    assert 0.01 < plan.parameters_after / plan.parameters_before < 0.5
    assert plan.flops_after < 0.5 * plan.flops_before  # type: ignore[operator]


def test_no_rank_is_below_the_floor_unless_little_is_lost() -> None:
    low = planned(rank=Budget(parameters=0.1))
    assert min(map(_least_share, low.factorized)) < 0.25
    floored = planned(rank=Budget(parameters=0.1, strict=False, floor=0.5))
    assert floored.parameters_after > low.parameters_after
    for one in floored.factorized:
        assert _least_share(one) >= 0.5 or (one.error or 0) ** 2 <= 0.1


def _least_share(site: tdfx.SitePlan) -> float:
    return min(rank / most for rank, most in zip(site.ranks or (), site.full_ranks or (), strict=True))


def test_weights_of_noise_have_a_floor_of_their_own() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    u, s, v = torch.linalg.svd(first.weight.detach())
    first.weight.data = (u[:, :4] * 40 * s[:4]) @ v[:4] + first.weight.detach()
    model = nn.Sequential(first, second)

    def ranks(**settings: Any) -> list[tuple[int, ...] | None]:
        policy = Policy(rank=Budget(parameters=0.1, strict=False, **settings), min_gain=0, round_to=1)
        plan = tdfx.plan(model, policy)
        notes.append(" ".join(plan.notes))
        return [one.ranks for one in plan.sites]

    notes: list[str] = []
    learnt, noise = ranks(noise_floor=0.25)
    assert learnt is not None and learnt[0] < 16  # noqa: PT018
    assert noise is not None and noise[0] >= 16  # noqa: PT018
    assert (
        "1 of the weights that are cut show nothing above the noise yet ('1'); no rank there is below 0.25" in notes[-1]
    )
    learnt, noise = ranks()
    assert noise is not None and noise[0] < 16  # noqa: PT018
    assert "('1'); they have no floor" in notes[-1]
    learnt, noise = ranks(noise_floor=1)
    assert learnt is not None and noise is None  # noqa: PT018
    assert "show nothing" not in notes[-1]
    policy = Policy(rank=Budget(parameters=0.9, noise_floor=1), min_gain=0, round_to=1)
    assert tdfx.plan(model, policy).sites[1].reason is Reason.NO_SIGNAL


@pytest.mark.parametrize("settings", [{"strict": 1}, {"floor": 1.5}, {"noise_floor": -1}, {"floor": "a"}])
def test_how_a_budget_is_followed_is_checked(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(PolicyError, match=rf"{name}={value!r} is n"):
        Budget(speedup=2, **settings)


def test_an_override_without_a_rank_is_part_of_the_budget() -> None:
    policy = Policy(
        rank=Budget(parameters=0.3),
        min_gain=0,
        round_to=1,
        cost=Modelled(),
        overrides={"2": Policy(scheme="tucker1_out", min_gain=0)},
    )
    assert policy.overrides["2"] == Policy(parameters=0.3, scheme="tucker1_out", min_gain=0, cost=Modelled())
    plan = tdfx.plan(net(), policy)
    assert plan["2"].scheme == "tucker1_out"
    assert plan.parameters_after <= 0.3 * plan.parameters_before
    nested = Policy(rank=Ratio(of=0.5), overrides={"a": Policy(overrides={"b": Policy(scheme="svd")})})
    assert nested.overrides["a"].overrides["b"] == Policy(rank=Ratio(of=0.5), scheme="svd")  # type: ignore[union-attr]
    with pytest.raises(PolicyError, match="An override has a budget, and a budget is for all sites together"):
        Policy(parameters=0.3, overrides={"2": Policy(parameters=0.5)})


class Deaf(nn.Module):
    """Gives nothing that has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x).detach())


def test_a_step_that_cannot_be_timed_is_no_error_where_the_budget_need_not_be_kept() -> None:
    x = torch.rand(4, 64)
    with pytest.raises(InputError, match="returns nothing in train mode that has a gradient"):
        tdfx.plan(Deaf(), Policy(speedup=1.2, cost=ByFlops()), example_inputs=(x,))
    plan = tdfx.plan(Deaf(), Policy(rank=Budget(speedup=1.2, strict=False), cost=ByFlops()), example_inputs=(x,))
    assert plan.step_seconds is None
    assert any("the step as a whole was not timed, only its sites: Deaf returns nothing" in one for one in plan.notes)
    assert plan.factorized


class Broken(nn.Module):
    """Cannot be differentiated on any input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(self.inner(x))
        z = y * 1
        y.add_(1)
        return z


def test_a_backward_that_fails_is_said_of_the_step() -> None:
    x = torch.rand(4, 64)
    with pytest.raises(
        InputError, match="The training step of Broken on the example inputs cannot be timed: RuntimeError"
    ):
        tdfx.plan(Broken(), Policy(speedup=1.2, cost=ByFlops()), example_inputs=(x,))
    plan = tdfx.plan(Broken(), Policy(rank=Budget(speedup=1.2, strict=False), cost=ByFlops()), example_inputs=(x,))
    assert any("the step as a whole was not timed" in one for one in plan.notes)


def test_a_budget_that_is_kept_already_does_not_stand_in_the_way_of_one_that_cannot_be() -> None:
    alone = planned(rank=Budget(parameters=0.01, strict=False))
    beside = planned(rank=Budget(parameters=0.01, memory=10**12, strict=False))
    assert beside.parameters_after == alone.parameters_after


def test_a_budget_of_nothing_has_no_note() -> None:
    plan = planned(rank=Budget(speedup=2, strict=False), exclude=("*",))
    assert not any("cannot be kept" in note for note in plan.notes)
