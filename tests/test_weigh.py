"""Whether a switch pays, and how long measuring for it may take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tdfx
from tdfx.cost.modelled import Case
from tdfx.training.weigh import in_proportion

ASKED: list[float] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(tdfx.Measured):
    """A cost that measures as ever, and remembers how long it was allowed to."""

    def measure(self, groups: Iterable[Sequence[Case]], *, spent: float = 0.0) -> dict[Case, float]:
        """Measure."""
        ASKED.append(self.budget)
        return tdfx.Measured.measure(self, groups, spent=spent)


def budget_of(policy: tdfx.Policy | None) -> float:
    assert policy is not None
    assert isinstance(policy.cost, tdfx.Measured)
    return policy.cost.budget


def test_measuring_takes_a_hundredth_of_what_is_left_at_most() -> None:
    own = tdfx.Policy(rank=tdfx.Ratio(of=0.5), cost=tdfx.Measured(budget=0.5))
    policy = tdfx.Policy(overrides={"a": own, "b": None})
    short = in_proportion(policy, left=100, step_seconds=2.0)
    assert budget_of(short) == pytest.approx(2.0)
    assert budget_of(short.overrides["a"]) == 0.5
    assert short.overrides["b"] is None
    assert budget_of(in_proportion(policy, left=1000, step_seconds=2.0)) == budget_of(policy) == 15.0
    # Nothing is known of the time that is left.
    assert in_proportion(policy, left=100, step_seconds=-1.0) == policy
    modelled = tdfx.Policy(cost=tdfx.Modelled())
    assert in_proportion(modelled, left=1, step_seconds=1.0) == modelled


@pytest.mark.parametrize(("total", "expected"), [(12, 0.1), (None, 15.0)])
def test_a_switch_measures_in_proportion_to_the_steps_that_are_left(total: int | None, expected: float) -> None:
    ASKED.clear()
    now = iter(range(1000))
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), cost=Noted(cache=False, rounds=1))
    # Two readings a step and one between them: each takes a second, and ten are left.
    switch = tdfx.Switch(policy, when=tdfx.AtStep(2), total_steps=total, clock=lambda: float(next(now)))
    for _ in range(3):
        model = switch.step(model, example_inputs=(torch.randn(8, 64),))
    assert switch.done
    assert ASKED
    assert set(ASKED) == {expected}
