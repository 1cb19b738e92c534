"""How long measuring for a switch may take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tdfx
from tdfx.cost.modelled import Case
from tdfx.training.switch.pays_off import cap_measuring_time

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
    switch = tdfx.Switch(policy, when=tdfx.AtStep(2), total_steps=total, clock=lambda: next(now) / 10)
    for _ in range(3):
        model = switch.step(model, example_inputs=(torch.randn(8, 64),))
    assert switch.done
    assert BUDGETS
    assert all(budget == pytest.approx(expected) for budget in BUDGETS)
