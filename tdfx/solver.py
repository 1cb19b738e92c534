"""Choosing one option for each of many places, so that the total loss is the least within some limits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SECONDS = 20.0
"""After this the best choice found so far counts."""
_GAP = 1e-6
"""Relative difference to the least possible loss at which the search ends."""


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that can be done in a place."""

    loss: float
    """What it adds to the total that is made small, not negative."""
    costs: tuple[float, ...]
    """What it adds to each total that is limited."""


class OutOfReachError(Exception):
    """No choice keeps the limits."""


def best_choice(places: Sequence[Sequence[Option]], limits: Sequence[float]) -> list[int]:
    """Return the index of one option for each place: a multiple-choice knapsack, solved as a mixed-integer program.

    The solver is HiGHS (Huangfu and Hall 2018), by way of ``scipy.optimize.milp``.

    Args:
        places: At least one option each.
        limits: The most that each of the costs may come to, over all places.

    Raises:
        OutOfReachError: No choice keeps the limits.

    Example:
        >>> cheap, dear = Option(2.0, (1.0,)), Option(0.0, (3.0,))
        >>> sorted(best_choice([[cheap, dear], [cheap, dear]], [4.0]))
        [0, 1]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not places:
        return []
    options = [option for place in places for option in place]
    owner = np.repeat(np.arange(len(places)), [len(place) for place in places])
    one_each = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for index, limit in enumerate(limits):
        # In units of the limit, since the solver's tolerances are absolute.
        unit = abs(limit) if limit else 1.0
        costs = np.array([option.costs[index] for option in options]) / unit
        constraints.append(LinearConstraint(costs[None], -np.inf, limit / unit))
    losses = np.array([option.loss for option in options])
    largest = losses.max()
    found = milp(
        losses / largest if largest > 0 else losses,
        constraints=constraints,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
    )
    if found.x is None:
        raise OutOfReachError
    starts = np.cumsum([0, *(len(place) for place in places)])
    return [int(np.argmax(found.x[begin:end])) for begin, end in itertools.pairwise(starts)]


def least_totals(places: Sequence[Sequence[Option]], count: int) -> list[float]:
    """Return the least that each of ``count`` costs can come to, whatever the others come to."""
    return [sum(min(option.costs[index] for option in place) for place in places) for index in range(count)]
