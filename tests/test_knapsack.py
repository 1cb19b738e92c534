"""The knapsack solver against trying every selection."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import highspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdfx.passes.planning import knapsack
from tdfx.passes.planning.knapsack import (
    InfeasibleError,
    Item,
    Selection,
    TimeLimitError,
    least_totals,
    solve_knapsack,
)

Groups = list[list[Item]]

numbers = st.integers(0, 50).map(float)
items = st.builds(Item, numbers, st.tuples(numbers, numbers))
random_groups = st.lists(st.lists(items, min_size=1, max_size=4), min_size=1, max_size=5)
random_limits = st.lists(st.integers(0, 120).map(float), min_size=2, max_size=2)


def chosen(groups: Groups, selection: Selection) -> list[Item]:
    return [group[pick] for group, pick in zip(groups, selection.picks, strict=True)]


def total_loss(items: Sequence[Item]) -> float:
    return sum(item.loss for item in items)


def keeps(items: Sequence[Item], limits: list[float]) -> bool:
    return all(sum(item.costs[index] for item in items) <= limit for index, limit in enumerate(limits))


def least_loss(groups: Groups, limits: list[float]) -> float:
    """Return the least loss of all selections that keep the limits; infinite if there is none."""
    return min((total_loss(items) for items in itertools.product(*groups) if keeps(items, limits)), default=math.inf)


@settings(max_examples=150, deadline=None)
@given(random_groups, random_limits)
def test_no_selection_within_the_limits_is_better(groups: Groups, limits: list[float]) -> None:
    least = least_loss(groups, limits)
    if least == math.inf:
        with pytest.raises(InfeasibleError):
            solve_knapsack(groups, limits)
        return
    items = chosen(groups, solve_knapsack(groups, limits))
    assert keeps(items, limits)
    assert total_loss(items) == pytest.approx(least, abs=1e-4)


def test_the_best_selection_is_not_a_greedy_one() -> None:
    # Greedily, by the loss for each unit of cost saved, the first group would be cut; then the second does not fit.
    groups = [[Item(0.0, (5.0,)), Item(1.0, (4.0,))], [Item(0.0, (5.0,)), Item(2.0, (2.0,))]]
    assert solve_knapsack(groups, [7.0]).picks == [0, 1]
    assert solve_knapsack(groups, [10.0]).picks == [0, 0]
    assert solve_knapsack(groups, [6.0]).picks == [1, 1]


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e9])
def test_units_do_not_matter(scale: float) -> None:
    groups = [
        [Item(0.0, (5 * scale,)), Item(scale, (4 * scale,))],
        [Item(0.0, (5 * scale,)), Item(2 * scale, (2 * scale,))],
    ]
    assert solve_knapsack(groups, [7 * scale]).picks == [0, 1]


def test_without_groups_the_selection_is_empty() -> None:
    assert solve_knapsack([], [1.0]).picks == []


def test_least_totals_takes_each_cost_by_itself() -> None:
    groups = [[Item(0.0, (5.0, 1.0)), Item(1.0, (4.0, 2.0))], [Item(0.0, (3.0, 3.0))]]
    assert least_totals(groups, 2) == [7.0, 4.0]


def hard_problem() -> tuple[Groups, list[float]]:
    """Return groups and two limits that compete, so that the best selection is not found at once."""
    generator = random.Random(1)

    def cheap_item() -> Item:
        return Item(generator.random(), (generator.randint(1, 40), generator.randint(1, 40)))

    groups = [[Item(0.0, (50.0, 50.0)), *(cheap_item() for _ in range(12))] for _ in range(40)]
    return groups, [800.0, 800.0]


def test_the_best_selection_so_far_counts_when_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, limits = hard_problem()
    best = solve_knapsack(groups, limits)
    assert best.proven
    silent_solver = knapsack._silent_solver

    def hasty_solver() -> highspy.Highs:
        highs = silent_solver()
        highs.setOptionValue("mip_max_improving_sols", 1)
        return highs

    monkeypatch.setattr(knapsack, "_silent_solver", hasty_solver)
    first = solve_knapsack(groups, limits)
    assert not first.proven
    assert keeps(chosen(groups, first), limits)
    assert total_loss(chosen(groups, first)) > total_loss(chosen(groups, best))


def test_out_of_time_is_not_infeasible(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, limits = hard_problem()
    monkeypatch.setattr(knapsack, "TIME_LIMIT", 0.0)
    with pytest.raises(TimeLimitError):
        solve_knapsack(groups, limits)
    monkeypatch.undo()
    with pytest.raises(InfeasibleError):
        solve_knapsack(groups, [1.0, 1.0])
