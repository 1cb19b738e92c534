"""A multiple-choice knapsack: one item from each group, of least total loss within limits."""

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

TIME_LIMIT = 20.0
"""Seconds after which the best selection so far counts."""
_STDOUT = 1
"""File descriptor of the process's stdout; Python's ``sys.stdout`` may be another file."""
_TIGHTENINGS = 10
"""How often to solve again with tighter limits after a solution that exceeds a limit within the solver's tolerance."""
_GAP = 1e-6
"""Relative difference to the least possible loss at which the search ends."""


@dataclass(frozen=True, slots=True)
class Item:
    """One option of a group."""

    loss: float
    """What it adds to the total loss; not negative."""
    costs: tuple[float, ...]
    """What it adds to each total that has a limit."""


@dataclass(frozen=True, slots=True)
class Selection:
    """One item of each group."""

    picks: list[int]
    """The index of the item in each group."""
    proven: bool
    """True if no selection within the limits is better; False if time ran out before that was known."""


class InfeasibleError(Exception):
    """No selection keeps the limits."""


class TimeLimitError(Exception):
    """Time ran out before the solver found a selection that keeps the limits, or proved that there is none."""


def solve_knapsack(groups: Sequence[Sequence[Item]], limits: Sequence[float]) -> Selection:
    """Select an item from each group, as a mixed-integer program.

    The solver is HiGHS (Huangfu and Hall 2018), by its own package, because the copy inside scipy prints a line now and
    then. Its result depends on a clock: where several processes need one selection, one of them has to make it for all.

    Args:
        groups: At least one item each.
        limits: The most that each of the costs may total.

    Raises:
        InfeasibleError: No selection keeps the limits.
        TimeLimitError: Time ran out before one was found.

    Example:
        >>> cheap, dear = Item(2.0, (1.0,)), Item(0.0, (3.0,))
        >>> sorted(solve_knapsack([[cheap, dear], [cheap, dear]], [4.0]).picks)
        [0, 1]
    """
    if not groups:
        if any(limit < 0 for limit in limits):
            raise InfeasibleError
        return Selection([], proven=True)
    tightened = [float(limit) for limit in limits]
    for _ in range(_TIGHTENINGS):
        selection = _solve(groups, tightened)
        items = [group[pick] for group, pick in zip(groups, selection.picks, strict=True)]
        excess = [sum(item.costs[index] for item in items) - limit for index, limit in enumerate(limits)]
        if all(amount <= 0 for amount in excess):
            return selection
        tightened = [limit - 2 * max(0.0, amount) for limit, amount in zip(tightened, excess, strict=True)]
    raise InfeasibleError


def least_totals(groups: Sequence[Sequence[Item]], count: int) -> list[float]:
    """Return the least possible total of each of ``count`` costs, whatever the other costs are."""
    return [sum(min(item.costs[index] for item in group) for group in groups) for index in range(count)]


def _solve(groups: Sequence[Sequence[Item]], limits: Sequence[float]) -> Selection:
    """Solve a mixed-integer program with a binary variable for each item, of which one in each group is 1."""
    import highspy

    items = [item for group in groups for item in group]
    ranges = list(itertools.pairwise(np.cumsum([0, *map(len, groups)])))
    losses = np.array([item.loss for item in items])
    highs = _silent_solver()
    highs.setOptionValue("time_limit", TIME_LIMIT)
    highs.setOptionValue("parallel", "off")  # threads that wait would disturb what is timed next
    highs.setOptionValue("mip_rel_gap", _GAP)
    variables = np.arange(len(items), dtype=np.int32)
    highs.addVars(len(items), np.zeros(len(items)), np.ones(len(items)))
    highs.changeColsCost(len(items), variables, losses / (losses.max() or 1.0))  # HiGHS's tolerances are absolute
    highs.changeColsIntegrality(len(items), variables, np.ones(len(items), np.uint8))
    for begin, end in ranges:
        highs.addRow(1.0, 1.0, end - begin, variables[begin:end], np.ones(end - begin))
    for costs, limit in zip(np.array([item.costs for item in items]).T, limits, strict=True):
        unit = abs(limit) or 1.0
        highs.addRow(-highspy.kHighsInf, limit / unit, len(items), variables, costs / unit)
    highs.run()
    values = np.array(highs.getSolution().col_value)
    status = highs.getModelStatus()
    if highs.getInfo().primal_solution_status != highspy.kSolutionStatusFeasible:
        infeasible = {highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible}
        raise InfeasibleError if status in infeasible else TimeLimitError
    picks = [int(np.argmax(values[begin:end])) for begin, end in ranges]
    return Selection(picks, proven=status == highspy.HighsModelStatus.kOptimal)


def _silent_solver() -> highspy.Highs:
    """Return a solver that prints nothing; some versions print a greeting when the first one is made."""
    import highspy

    with _discarded_stdout():
        highs = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.silent()
    return highs


@contextmanager
def _discarded_stdout() -> Iterator[None]:
    """Discard what a library in C writes to the process's stdout."""
    try:
        saved = os.dup(_STDOUT)
    except OSError:  # the process has no stdout
        yield
        return
    try:
        with Path(os.devnull).open("wb") as sink:
            os.dup2(sink.fileno(), _STDOUT)
        yield
    finally:
        os.dup2(saved, _STDOUT)
        os.close(saved)
