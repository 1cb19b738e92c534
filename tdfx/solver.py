"""Choosing one option for each of many places, so that the total loss is the least within some limits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tdfx.errors import PolicyError

_SECONDS = 20.0
"""After this the best choice found so far counts."""
_TIGHTENINGS = 10
"""Times that a solution which passes a limit by the solver's tolerance is looked for anew."""
_TIMED_OUT = 1
"""HiGHS's status for a search that ended by the clock."""
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
        PolicyError: Time ran out before one was found.

    Example:
        >>> cheap, dear = Option(2.0, (1.0,)), Option(0.0, (3.0,))
        >>> sorted(best_choice([[cheap, dear], [cheap, dear]], [4.0]))
        [0, 1]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not places:
        if any(limit < 0 for limit in limits):
            raise OutOfReachError
        return []
    options = [option for place in places for option in place]
    owner = np.repeat(np.arange(len(places)), [len(place) for place in places])
    one_each = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))))
    losses = np.array([option.loss for option in options])
    largest = losses.max()
    starts = np.cumsum([0, *(len(place) for place in places)])
    tight = [float(limit) for limit in limits]
    for _ in range(_TIGHTENINGS):
        constraints = [LinearConstraint(one_each, 1, 1)]
        for index, limit in enumerate(tight):
            # In units of the limit, since the solver's tolerances are absolute.
            unit = abs(limit) if limit else 1.0
            costs = np.array([option.costs[index] for option in options]) / unit
            constraints.append(LinearConstraint(costs[None], -np.inf, limit / unit))
        found = milp(
            losses / largest if largest > 0 else losses,
            constraints=constraints,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
        )
        if found.x is None:
            if found.status == _TIMED_OUT:
                raise PolicyError(
                    f"No choice for the {len(places)} sites was found in {_SECONDS:g} s that keeps the budget, nor that "
                    f"there is none. Ask for a little less, or leave sites out with exclude."
                )
            raise OutOfReachError
        chosen = [int(np.argmax(found.x[begin:end])) for begin, end in itertools.pairwise(starts)]
        over = [
            sum(place[pick].costs[index] for place, pick in zip(places, chosen, strict=True)) - limit
            for index, limit in enumerate(limits)
        ]
        if all(one <= 0 for one in over):
            return chosen
        # Within the solver's tolerance, and yet above the limit.
        tight = [limit - 2 * max(0.0, one) for limit, one in zip(tight, over, strict=True)]
    raise OutOfReachError


def least_totals(places: Sequence[Sequence[Option]], count: int) -> list[float]:
    """Return the least that each of ``count`` costs can come to, whatever the others come to."""
    return [sum(min(option.costs[index] for option in place) for place in places) for index in range(count)]
