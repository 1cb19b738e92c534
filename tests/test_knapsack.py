"""The choice within limits, against trying everything."""

from __future__ import annotations

import itertools
import math
import random

import highspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdfx.passes.planning import knapsack
from tdfx.passes.planning.knapsack import Item, NoneFoundError, OutOfReachError, best_choice, least_totals

numbers = st.integers(0, 50)
places = st.lists(
    st.lists(
        st.builds(Item, numbers.map(float), st.tuples(numbers.map(float), numbers.map(float))), min_size=1, max_size=4
    ),
    min_size=1,
    max_size=5,
)


def total(choice: list[Item], index: int) -> float:
    return sum(option.costs[index] for option in choice)


def by_trying(given: list[list[Item]], limits: list[float]) -> float:
    """Return the least loss of any choice that keeps the limits; infinite if there is none."""
    kept = (
        choice
        for choice in itertools.product(*given)
        if all(sum(one.costs[index] for one in choice) <= limit for index, limit in enumerate(limits))
    )
    return min((sum(one.loss for one in choice) for choice in kept), default=math.inf)


@settings(max_examples=150, deadline=None)
@given(places, st.lists(st.integers(0, 120).map(float), min_size=2, max_size=2))
def test_nothing_that_keeps_the_limits_is_better(given: list[list[Item]], limits: list[float]) -> None:
    least = by_trying(given, limits)
    if least == math.inf:
        with pytest.raises(OutOfReachError):
            best_choice(given, limits)
        return
    choice = [place[index] for place, index in zip(given, best_choice(given, limits).picks, strict=True)]
    assert all(total(choice, index) <= limit for index, limit in enumerate(limits))
    assert sum(one.loss for one in choice) == pytest.approx(least, abs=1e-4)


def test_a_choice_that_is_good_place_by_place_is_not_the_best() -> None:
    # Greedily, by what a unit of cost saves, the first place would be cut; then the second does not fit any more.
    given = [[Item(0.0, (5.0,)), Item(1.0, (4.0,))], [Item(0.0, (5.0,)), Item(2.0, (2.0,))]]
    assert best_choice(given, [7.0]).picks == [0, 1]
    assert best_choice(given, [10.0]).picks == [0, 0]
    assert best_choice(given, [6.0]).picks == [1, 1]


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e9])
def test_units_do_not_matter(scale: float) -> None:
    given = [
        [Item(0.0, (5 * scale,)), Item(scale, (4 * scale,))],
        [Item(0.0, (5 * scale,)), Item(2 * scale, (2 * scale,))],
    ]
    assert best_choice(given, [7 * scale]).picks == [0, 1]


def test_without_places_there_is_nothing_to_choose() -> None:
    assert best_choice([], [1.0]).picks == []


def test_the_least_of_each_cost_alone() -> None:
    given = [[Item(0.0, (5.0, 1.0)), Item(1.0, (4.0, 2.0))], [Item(0.0, (3.0, 3.0))]]
    assert least_totals(given, 2) == [7.0, 4.0]


def many() -> tuple[list[list[Item]], list[float]]:
    """Return places and two limits between which there is no easy way."""
    draw = random.Random(1)
    places = [
        [
            Item(0.0, (50.0, 50.0)),
            *(Item(draw.random(), (draw.randint(1, 40), draw.randint(1, 40))) for _ in range(12)),
        ]
        for _ in range(40)
    ]
    return places, [800.0, 800.0]


def test_what_is_found_when_time_is_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    places, limits = many()
    best = best_choice(places, limits)
    assert best.proven
    ready = knapsack._quiet

    def hasty() -> highspy.Highs:
        highs = ready()
        highs.setOptionValue("mip_max_improving_sols", 1)
        return highs

    monkeypatch.setattr(knapsack, "_quiet", hasty)
    first = best_choice(places, limits)
    assert not first.proven

    def chosen(choice: knapsack.Choice) -> list[Item]:
        return [place[pick] for place, pick in zip(places, choice.picks, strict=True)]

    assert all(total(chosen(first), index) <= limit for index, limit in enumerate(limits))
    assert sum(one.loss for one in chosen(first)) > sum(one.loss for one in chosen(best))


def test_no_time_is_not_the_same_as_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    places, limits = many()
    monkeypatch.setattr(knapsack, "SECONDS", 0.0)
    with pytest.raises(NoneFoundError):
        best_choice(places, limits)
    monkeypatch.undo()
    with pytest.raises(OutOfReachError):
        best_choice(places, [1.0, 1.0])
