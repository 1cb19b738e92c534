"""Budgets that need not be kept: followed most of the way, above the floors, and what the plan says of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from budgeted import ByFlops, plan_net, set_step_seconds
from torch import Tensor, nn

import tdfx
from tdfx import Budget, InputError, Policy, PolicyError, Reason


def test_a_budget_out_of_reach_is_followed_most_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch)
    with pytest.raises(PolicyError, match="the most that the 4 sites in question can give is speedup=") as refused:
        plan_net(rank=Budget(speedup=1e4), cost=ByFlops())
    best = float(str(refused.value).partition("speedup=")[2].partition("give is speedup=")[2].split(".")[0])
    plan = plan_net(rank=Budget(speedup=1e4, strict=False), cost=ByFlops())
    assert re.search(
        r"strict=False\) cannot be kept: speedup=[\d.]+ is the most that is possible; 90% of that", " ".join(plan.notes)
    )
    before = sum(site.seconds_before or 0 for site in plan.sites)
    after = sum(site.seconds_after or 0 for site in plan.sites)
    # The best is next to nothing, and nine tenths of the way to it leave one tenth.
    assert best > 20
    assert 0.05 * before < after < 0.2 * before


def test_a_budget_within_reach_is_kept_whether_strict_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch)
    strict = plan_net(rank=Budget(speedup=1.5), cost=ByFlops())
    not_strict = plan_net(rank=Budget(speedup=1.5, strict=False), cost=ByFlops())
    assert not_strict.sites == strict.sites
    assert not not_strict.notes


def test_several_budgets_that_cannot_be_kept_together_are_followed_together() -> None:
    plan = plan_net(rank=Budget(parameters=0.01, flops=0.2, strict=False))
    assert 0.01 < plan.parameters_after / plan.parameters_before < 0.5
    assert plan.flops_after < 0.5 * plan.flops_before  # type: ignore[operator]


def test_a_budget_that_is_kept_already_does_not_stand_in_the_way_of_one_that_cannot_be() -> None:
    alone = plan_net(rank=Budget(parameters=0.01, strict=False))
    beside = plan_net(rank=Budget(parameters=0.01, memory=10**12, strict=False))
    assert beside.parameters_after == alone.parameters_after


def test_a_budget_without_sites_has_no_note() -> None:
    plan = plan_net(rank=Budget(speedup=2, strict=False), exclude=("*",))
    assert not any("cannot be kept" in note for note in plan.notes)


def test_a_kept_site_says_whether_it_could_have_gained() -> None:
    plan = plan_net(parameters=0.97, min_gain=1.5, cost=ByFlops())
    assert {site.reason for site in plan.kept} == {Reason.NOT_NEEDED}
    assert plan_net(parameters=0.97, min_gain=0, include=("2",), rank=None, cost=ByFlops())["2"].factorized
    hopeless = plan_net(rank=Budget(parameters=0.5, strict=False), min_gain=1e9, cost=ByFlops())
    for site in hopeless:
        assert site.reason is Reason.NO_GAIN
        assert site.note == "1e+09x was asked of it, at any ranks that the budget allows"
        assert site.gain is not None
        assert 1 < site.gain < 1e9


def test_no_rank_is_below_the_floor_unless_little_is_lost() -> None:
    plan = plan_net(rank=Budget(parameters=0.1))
    assert min(map(least_share, plan.factorized)) < 0.25
    floored = plan_net(rank=Budget(parameters=0.1, strict=False, floor=0.5))
    assert floored.parameters_after > plan.parameters_after
    for site in floored.factorized:
        assert least_share(site) >= 0.5 or (site.error or 0) ** 2 <= 0.1


def least_share(site: tdfx.SitePlan) -> float:
    """Return the smallest of a site's ranks, as a share of the full rank."""
    return min(rank / most for rank, most in zip(site.ranks or (), site.full_ranks or (), strict=True))


def test_weights_of_noise_have_a_floor_of_their_own() -> None:
    torch.manual_seed(0)
    learnt, noise = nn.Linear(64, 64), nn.Linear(64, 64)
    u, s, v = torch.linalg.svd(learnt.weight.detach())
    learnt.weight.data = (u[:, :4] * 40 * s[:4]) @ v[:4] + learnt.weight.detach()
    model = nn.Sequential(learnt, noise)

    def ranks_and_notes(**settings: Any) -> tuple[int, int | None, str]:
        policy = Policy(rank=Budget(parameters=0.1, strict=False, **settings), min_gain=0, round_to=1)
        plan = tdfx.plan(model, policy)
        (of_learnt,), of_noise = plan["0"].ranks or (), plan["1"].ranks
        return of_learnt, None if of_noise is None else of_noise[0], " ".join(plan.notes)

    of_learnt, of_noise, notes = ranks_and_notes(noise_floor=0.25)
    assert of_learnt < 16
    assert of_noise is not None
    assert of_noise >= 16
    assert "1 cut weights show only noise yet; noise_floor=0.25 bounds their ranks" in notes
    _, of_noise, notes = ranks_and_notes()
    assert of_noise is not None
    assert of_noise < 16
    assert "noise_floor=1 would keep them" in notes
    of_learnt, of_noise, notes = ranks_and_notes(noise_floor=1)
    assert of_learnt < 16
    assert of_noise is None
    assert "show nothing" not in notes
    policy = Policy(rank=Budget(parameters=0.9, noise_floor=1), min_gain=0, round_to=1)
    assert tdfx.plan(model, policy).sites[1].reason is Reason.NO_SIGNAL


class WithoutGradient(nn.Module):
    """Returns nothing that has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(x).detach())


class FailsInBackward(nn.Module):
    """Changes in place what its backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.exp(self.inner(x))
        z = y * 1
        y.add_(1)
        return z


@pytest.mark.parametrize(
    ("model", "error", "note"),
    [
        (
            WithoutGradient(),
            "returns nothing in train mode that has a gradient",
            "the step as a whole was not timed, only its sites: WithoutGradient returns nothing",
        ),
        (
            FailsInBackward(),
            "The training step of FailsInBackward on the example inputs cannot be timed: RuntimeError",
            "the step as a whole was not timed",
        ),
    ],
    ids=["without_gradient", "fails_in_backward"],
)
def test_a_step_that_cannot_be_timed_is_an_error_only_where_the_budget_is_strict(
    model: nn.Module, error: str, note: str
) -> None:
    x = torch.rand(4, 64)
    with pytest.raises(InputError, match=error):
        tdfx.plan(model, Policy(speedup=1.2, cost=ByFlops()), example_inputs=(x,))
    plan = tdfx.plan(model, Policy(rank=Budget(speedup=1.2, strict=False), cost=ByFlops()), example_inputs=(x,))
    assert plan.step_seconds is None
    assert any(note in text for text in plan.notes)
    assert plan.factorized
