"""Whether a switch pays, and how long measuring for it may take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import tdfx
from tdfx.cost.modelled import Case
from tdfx.planned_rewrite import plan_rewrite
from tdfx.training.switch.pays_off import cannot_pay, cap_measuring_time, pays_off

BUDGETS: list[float] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded(tdfx.Measured):
    """A cost that records the budget of each measurement."""

    def measure(self, groups: Iterable[Sequence[Case]], *, spent: float = 0.0) -> dict[Case, float]:
        """Record the budget, and measure."""
        BUDGETS.append(self.budget)
        return tdfx.Measured.measure(self, groups, spent=spent)


def budget_of(policy: tdfx.Policy | None) -> float:
    assert policy is not None
    assert isinstance(policy.cost, tdfx.Measured)
    return policy.cost.budget


def test_measuring_takes_at_most_a_fiftieth_of_the_time_left() -> None:
    override = tdfx.Policy(rank=tdfx.Ratio(of=0.5), cost=tdfx.Measured(budget=0.5))
    policy = tdfx.Policy(overrides={"a": override, "b": None})
    short = cap_measuring_time(policy, left=10_000, step_seconds=0.01)
    assert budget_of(short) == pytest.approx(2.0)
    assert budget_of(short.overrides["a"]) == 0.5
    assert short.overrides["b"] is None
    assert budget_of(cap_measuring_time(policy, left=10_000, step_seconds=1.0)) == budget_of(policy) == 15.0
    # A short training has the time of ten steps for it.
    assert budget_of(cap_measuring_time(policy, left=100, step_seconds=0.01)) == pytest.approx(0.1)
    # No step was timed, so the time that is left is not known.
    assert cap_measuring_time(policy, left=100, step_seconds=-1.0) == policy
    modelled = tdfx.Policy(cost=tdfx.Modelled())
    assert cap_measuring_time(modelled, left=1, step_seconds=1.0) == modelled


@pytest.mark.parametrize(("total", "expected"), [(5002, 10.0), (12, 1.0), (None, 15.0)])
def test_a_switch_measures_in_proportion_to_the_steps_left(total: int | None, expected: float) -> None:
    BUDGETS.clear()
    now = itertools.count()
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), cost=Recorded(cache=False, rounds=1))
    # The clock advances a tenth of a second at each reading, and is read once between two steps.
    switch = tdfx.Switch(policy, when=tdfx.AtStep(2), total_steps=total, weigh=False, clock=lambda: next(now) / 10)
    for _ in range(3):
        model = switch.step(model, example_inputs=(torch.randn(8, 64),))
    assert switch.done
    assert BUDGETS
    assert all(budget == pytest.approx(expected) for budget in BUDGETS)


def switched(total: int, planning: float, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, float]:
    """Return what a switch after two steps of a second decides and why, and the seconds that it planned for."""
    now = 0.0

    def plan_slowly(*arguments: Any) -> Any:
        nonlocal now
        now += planning
        return plan_rewrite(*arguments)

    monkeypatch.setattr("tdfx.training.switch.switch.plan_rewrite", plan_slowly)
    model: nn.Module = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), cost=tdfx.Modelled(seconds_per_call=0))
    switch = tdfx.Switch(policy, when=tdfx.AtStep(2), total_steps=total, clock=lambda: now)
    for _ in range(2):
        now += 1.0
        model = switch.step(model)
    (event,) = switch.events
    return event.what, event.why, switch.spent["planning"]


def test_what_planning_took_is_spent_and_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # About half of each of the twenty steps that are left is saved, which is less than the plan took.
    what, why, planning = switched(22, 30.0, monkeypatch)
    assert (what, planning) == ("switched", 30.0)
    saves, takes = (float(part.split(" s")[0]) for part in (why.split("saves ")[1], why.split("still takes ")[1]))
    # The rewrite is estimated to take as long as five steps.
    assert 5.0 <= takes < 5.1 < saves < 20


def test_no_plan_is_made_where_none_could_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    what, why, planning = switched(5, 30.0, monkeypatch)
    assert (what, planning) == ("too_late", 0.0)
    assert why.startswith("a switch saves at most 3 s in the 3 steps left, and a plan and a rewrite take about 5")


def test_the_estimate_before_a_plan_counts_what_policy_and_model_ask_for() -> None:
    weights = [nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64))]

    def verdict(left: int, recompiling: float = 0.0, *, times: bool = False, **settings: Any) -> str | None:
        return cannot_pay(tdfx.Policy(**settings), weights, left, 0.1, recompiling, times=times)

    assert verdict(20) is None
    assert "saves at most 1.2 s in the 20 steps left" in str(verdict(20, recompiling=10))
    # A budget saves no more than it asks for, and to measure takes time.
    assert "saves at most 0.182 s" in str(verdict(20, speedup=1.1))
    assert verdict(18, times=True) is not None
    assert verdict(2_000, times=True) is None
    assert verdict(18, times=True, cost=tdfx.Modelled()) is None
    large = [nn.Parameter(torch.zeros(4096, 4096, device="meta"))]
    assert cannot_pay(tdfx.Policy(), large, 20, 0.1, 0.0, times=False) is not None
    assert cannot_pay(tdfx.Policy(), large, 20, -1.0, 0.0, times=True) is None


def test_only_the_gain_that_is_sure_counts() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(8, 64)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
    made = tdfx.plan(model, policy, example_inputs=(x,))
    sites = tuple(replace(site, seconds_before=0.2, seconds_after=0.1) for site in made)
    plan = replace(made, sites=sites, step_seconds=1.0)
    assert plan.step_seconds_after == pytest.approx(0.8)
    for uncertainty, saved in ((None, 0.2), (0.0, 0.2), (0.1, 0.12), (0.25, 0.0)):
        pays, why = pays_off(replace(plan, uncertainty=uncertainty), {}, 100, 1.0, 10.0)
        assert pays == (saved > 0.15)
        assert float(why.split("saves ")[1].split(" s")[0]) == pytest.approx(100 * saved, abs=1e-9)


def test_a_plan_without_times_is_weighed_by_modelled_ones() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    plan = tdfx.plan(model, tdfx.Policy(rank=tdfx.Ratio(of=0.25), cost=tdfx.Modelled(seconds_per_call=0)))
    assert len(plan.factorized) == 2
    pays, why = pays_off(plan, {"0": 1.0, "1": 1.0}, 100, 0.1, 0.0)
    assert pays
    assert "still takes 0.5" in why
    assert not pays_off(plan, {"0": 1.0, "1": 1.0}, 100, 0.1, 10.0)[0]
