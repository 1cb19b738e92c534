"""Choosing one option for each of many places, so that the total loss is the least within some limits."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import highspy

_STDOUT = 1
"""The process's own, which Python's may stand before."""
SECONDS = 20.0
"""After this the best choice found so far counts."""
_TIGHTENINGS = 10
"""Times that a solution which passes a limit by the solver's tolerance is looked for anew."""
_GAP = 1e-6
"""Relative difference to the least possible loss at which the search ends."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that can be done in a place."""

    loss: float
    """What it adds to the total that is made small, not negative."""
    costs: tuple[float, ...]
    """What it adds to each total that is limited."""


@dataclass(frozen=True, slots=True)
class Selection:
    """One option for each place."""

    picks: list[int]
    """The index of each."""
    proven: bool
    """True if nothing better keeps the limits; False where time ran out before that was known."""


class OutOfReachError(Exception):
    """No choice keeps the limits."""


class NoneFoundError(Exception):
    """Time ran out before a choice was found that keeps the limits, or it was known that there is none."""


def best_choice(places: Sequence[Sequence[Item]], limits: Sequence[float]) -> Selection:
    """Return an option for each place: a multiple-choice knapsack, solved as a mixed-integer program.

    The solver is HiGHS (Huangfu and Hall 2018), by its own package: the copy inside scipy prints a line now and then. What
    it finds depends on a clock: where several processes need one choice, one of them has to make it for all.

    Args:
        places: At least one option each.
        limits: The most that each of the costs may come to, over all places.

    Raises:
        OutOfReachError: No choice keeps the limits.
        NoneFoundError: Time ran out before one was found.

    Example:
        >>> cheap, dear = Option(2.0, (1.0,)), Option(0.0, (3.0,))
        >>> sorted(best_choice([[cheap, dear], [cheap, dear]], [4.0]).picks)
        [0, 1]
    """
    if not places:
        if any(limit < 0 for limit in limits):
            raise OutOfReachError
        return Selection([], proven=True)
    search = _Search(places)
    tight = [float(limit) for limit in limits]
    for _ in range(_TIGHTENINGS):
        chosen = search.within(tight)
        over = [
            sum(place[pick].costs[index] for place, pick in zip(places, chosen.picks, strict=True)) - limit
            for index, limit in enumerate(limits)
        ]
        if all(one <= 0 for one in over):
            return chosen
        # Within the solver's tolerance, and yet above the limit.
        tight = [limit - 2 * max(0.0, one) for limit, one in zip(tight, over, strict=True)]
    raise OutOfReachError


class _Search:
    """A binary variable for each option, of which one in each place is 1."""

    def __init__(self, places: Sequence[Sequence[Item]]) -> None:
        options = [option for place in places for option in place]
        losses = np.array([option.loss for option in options])
        # HiGHS's tolerances are absolute.
        self.losses = losses / (losses.max() or 1.0)
        self.costs = np.array([option.costs for option in options])
        self.starts = np.cumsum([0, *(len(place) for place in places)])

    def within(self, limits: Sequence[float]) -> Selection:
        """Return an option for each place, of least loss; what was found by then where time runs out.

        Raises:
            OutOfReachError: No choice keeps the limits.
            NoneFoundError: Time ran out before one was found.
        """
        import highspy

        highs = _quiet()
        highs.setOptionValue("time_limit", SECONDS)
        highs.setOptionValue("parallel", "off")  # threads that wait would disturb what is timed next
        highs.setOptionValue("mip_rel_gap", _GAP)
        everything = np.arange(len(self.losses), dtype=np.int32)
        highs.addVars(len(everything), np.zeros(len(everything)), np.ones(len(everything)))
        highs.changeColsCost(len(everything), everything, self.losses)
        highs.changeColsIntegrality(len(everything), everything, np.ones(len(everything), np.uint8))
        for begin, end in itertools.pairwise(self.starts):
            highs.addRow(1.0, 1.0, end - begin, everything[begin:end], np.ones(end - begin))
        for costs, limit in zip(self.costs.T, limits, strict=True):
            unit = abs(limit) or 1.0
            highs.addRow(-highspy.kHighsInf, limit / unit, len(everything), everything, costs / unit)
        highs.run()
        values = np.array(highs.getSolution().col_value)
        status = highs.getModelStatus()
        if highs.getInfo().primal_solution_status != highspy.kSolutionStatusFeasible:
            none = {highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible}
            raise OutOfReachError if status in none else NoneFoundError
        picks = [int(np.argmax(values[begin:end])) for begin, end in itertools.pairwise(self.starts)]
        return Selection(picks, proven=status == highspy.HighsModelStatus.kOptimal)


def _quiet() -> highspy.Highs:
    """Return a solver that prints nothing; some versions greet on the process's own stdout when the first one is made."""
    import highspy

    with _stdout_closed():
        highs = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.silent()
    return highs


@contextmanager
def _stdout_closed() -> Iterator[None]:
    """Send to nowhere what a library writes to the process's stdout, past Python."""
    try:
        kept = os.dup(_STDOUT)
    except OSError:  # there is none
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), _STDOUT)
        yield
    finally:
        os.dup2(kept, _STDOUT)
        os.close(kept)


def least_totals(places: Sequence[Sequence[Item]], count: int) -> list[float]:
    """Return the least that each of ``count`` costs can come to, whatever the others come to."""
    return [sum(min(option.costs[index] for option in place) for place in places) for index in range(count)]
