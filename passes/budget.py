"""Scheme and ranks of all sites together, within a budget: the least total loss, by times measured as they matter."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tdfx.cost.count import parameters
from tdfx.cost.modelled import MeasuringCost
from tdfx.errors import PolicyError
from tdfx.passes.base import Site
from tdfx.passes.estimate import Chain, chain_now, flops_of, kept_plan, memory_of
from tdfx.passes.propose import Option, factorized_plan
from tdfx.passes.times import Times, Wanted
from tdfx.plan import Reason, SitePlan
from tdfx.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.solver import Option as Weighed
from tdfx.solver import OutOfReachError, best_choice, least_totals

_ROUNDS = 8
"""Times that a choice is measured and made anew with what was found; two or three are usual."""
_KNOTS = 3
"""Options of each scheme that are measured beforehand: those between them take what lies between."""

_MARGIN = 1.02
"""What is said to be possible is this many times less than what was found to be."""
_SURELY = 0.6
"""One option is faster than another beyond doubt if it is estimated to take less than this share of its time."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """A site that a budget decides, and what it may become."""

    site: Site
    options: tuple[tuple[Option, float], ...]
    """Each with its loss."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The model around the sites that a budget decides."""

    others: tuple[SitePlan, ...]
    """The decisions for all other sites."""
    other_parameters: int
    """Parameters that belong to no site's weight."""
    step_seconds: float | None
    """Measured time of the model's training step; None where it was not measured."""


@dataclass(slots=True)
class BudgetSolver:
    """Finds the options of least total loss within a budget.

    Times of options are estimated at first, in the scale of a few that are measured. What a solution chooses is measured,
    and it is solved anew with that, until all that is chosen is known.
    """

    policy: Policy
    times: Times
    whole: Whole
    candidates: Sequence[Candidates]

    @property
    def budget(self) -> Budget:
        """What has to be kept."""
        assert isinstance(self.policy.rank, Budget)
        return self.policy.rank

    def solve(self) -> list[SitePlan]:
        """Return the decisions for the sites, in their order.

        Raises:
            PolicyError: The budget cannot be kept, or needs what is not known.
        """
        if self._measures:
            self.times.prepare(Wanted(self.policy.cost, one.site, self._knots(one)) for one in self.candidates)
        for _ in range(_ROUNDS):
            chosen = self._choice()
            if not self._learned(chosen):
                break
        else:
            # Time and again something else was chosen that was not known yet: now what is known has to do.
            chosen = self._choice(known=True)
        return [self._decision(one.site, option) for one, option in zip(self.candidates, chosen, strict=True)]

    def _choice(self, *, known: bool = False) -> list[Option | None]:
        """Return what is best by the times as they are known now; with ``known``, among options that were measured."""
        names = list(self.budget.limits)
        places = [self._place(one, _Curve(self, one), names, known=known) for one in self.candidates]
        limits = [self._limit(name) for name in names]
        try:
            picks = best_choice([[option for _, option in place] for place in places], limits)
        except OutOfReachError:
            raise self._out_of_reach(names, limits, places) from None
        return [place[pick][0] for place, pick in zip(places, picks, strict=True)]

    @property
    def _measures(self) -> bool:
        """True if times decide anything, and can be measured."""
        decide = self.budget.is_of_time or self.policy.min_gain > 0
        known = any(one.site.flows for one in self.candidates)
        return decide and known and isinstance(self.policy.cost, MeasuringCost)

    def _knots(self, one: Candidates) -> tuple[Chain, ...]:
        """Return of each scheme the fastest, the slowest and something between, among options that may be worth it."""
        guesses = [self.times.estimate(self.policy.cost, one.site, option.chain) for option, _ in one.options]
        rated = [(guess, option, loss) for guess, (option, loss) in zip(guesses, one.options, strict=True)]
        worth = [
            (guess, option)
            for guess, option, loss in sorted(rated, key=lambda entry: entry[0])
            if not any(lost <= loss and other < _SURELY * guess for other, _, lost in rated)
        ]
        knots: list[Chain] = []
        for name in dict.fromkeys(option.scheme.name for _, option in worth):
            own = [option for _, option in worth if option.scheme.name == name]
            places = {(len(own) - 1) * step // (_KNOTS - 1) for step in range(_KNOTS)}
            knots += (own[place].chain for place in sorted(places))
        return tuple(knots)

    def _learned(self, chosen: Sequence[Option | None]) -> bool:
        """Measure what was chosen; return True if that changes anything."""
        if not self._measures:
            return False
        cost = self.policy.cost
        new = [
            (one.site, option)
            for one, option in zip(self.candidates, chosen, strict=True)
            if option is not None and self.times.measured(cost, one.site, option.chain) is None
        ]
        self.times.prepare(Wanted(cost, site, (option.chain,)) for site, option in new)
        return bool(new)

    def _place(
        self, one: Candidates, curve: _Curve, names: Sequence[str], *, known: bool
    ) -> list[tuple[Option | None, Weighed]]:
        """Return what can be done with a site, with loss and costs: to keep it, and the options that gain enough."""
        now = curve.seconds(None)
        found: list[tuple[Option | None, Weighed]] = [(None, Weighed(0.0, self._costs(one.site, None, now, names)))]
        for option, loss in one.options:
            if known and self.times.measured(self.policy.cost, one.site, option.chain) is None:
                continue
            seconds = curve.seconds(option)
            if now / seconds >= self.policy.min_gain:
                found.append((option, Weighed(loss, self._costs(one.site, option, seconds, names))))
        return _undominated(found)

    def _costs(self, site: Site, option: Option | None, seconds: float, names: Sequence[str]) -> tuple[float, ...]:
        chain = chain_now(site) if option is None else option.chain
        assert site.operation is not None
        known: Mapping[str, Callable[[], float | None]] = {
            "speedup": lambda: seconds,
            "seconds": lambda: seconds,
            "flops": lambda: flops_of(site, chain),
            "parameters": lambda: parameters(chain(site.operation)),  # type: ignore[arg-type]
            "memory": lambda: memory_of(site, chain),
        }
        return tuple(float(known[name]() or 0) for name in names)

    def _limit(self, name: str) -> float:
        """Return what the sites that the budget decides may come to, all together."""
        value = self.budget.limits[name]
        if name in {"speedup", "seconds"}:
            return self._time_limit(name, value)
        before = self._amounts(name)
        if not any(before) and self.candidates:
            raise PolicyError(
                f"{self.budget!r} counts {name}, which depends on what flows through each site. Pass example_inputs=... "
                f"(--input on the command line), or give a budget of parameters."
            )
        beside = self.whole.other_parameters if name == "parameters" else 0
        amount = value if value > 1 or isinstance(value, int) else value * (sum(before) + beside)
        return float(amount - sum(getattr(one, f"{name}_after") or 0 for one in self.whole.others) - beside)

    def _amounts(self, name: str) -> list[int]:
        """Return what each site has of something now; nothing where it is not known what flows through it."""
        kept = [kept_plan(one.site, Reason.NO_GAIN) for one in self.candidates]
        return [getattr(one, f"{name}_before") or 0 for one in (*kept, *self.whole.others)]

    def _time_limit(self, name: str, value: float) -> float:
        own = [self._seconds_now(one.site) for one in self.candidates]
        step = self.whole.step_seconds
        if step is None:
            if name == "seconds":
                raise PolicyError(
                    f"{self.budget!r} is about the time of the training step, which is not known. Pass example_inputs=... "
                    f"and a cost that measures, cost=tdfx.Measured()."
                )
            return sum(own) / value
        wanted = step / value if name == "speedup" else value
        saved = sum(before - after for before, after in self._times_of_others)
        return sum(own) - ((step - wanted) / self._scale(step) - saved)

    @property
    def _times_of_others(self) -> list[tuple[float, float]]:
        others = [(one.seconds_before, one.seconds_after) for one in self.whole.others]
        return [(before, after) for before, after in others if before is not None and after is not None]

    def _scale(self, step: float) -> float:
        """Return how much of a site's time by itself it takes in the step, which no site takes longer than."""
        alone = sum(self._seconds_now(one.site) for one in self.candidates)
        alone += sum(before for before, _ in self._times_of_others)
        return min(1.0, step / alone) if alone > 0 else 1.0

    def _seconds_now(self, site: Site) -> float:
        now = chain_now(site)
        found = self.times.measured(self.policy.cost, site, now)
        return self.times.estimate(self.policy.cost, site, now) if found is None else found

    def _out_of_reach(
        self, names: Sequence[str], limits: Sequence[float], places: Sequence[Sequence[tuple[Option | None, Weighed]]]
    ) -> PolicyError:
        """Say which budgets cannot be kept, and what can be."""
        least = least_totals([[option for _, option in place] for place in places], len(names))
        told = [
            self._reachable(name, total - limit)
            for name, limit, total in zip(names, limits, least, strict=True)
            if total > limit
        ]
        if not told:
            return PolicyError(
                f"{self.budget!r} cannot be kept: each of its budgets can, but not all of them together. Loosen one of them."
            )
        if not all(told):
            return PolicyError(
                f"{self.budget!r} cannot be kept: the {len(places)} sites in question can give nothing of it. Let more "
                f"sites be rewritten (include, exclude, min_gain), or ask for something else."
            )
        return PolicyError(
            f"{self.budget!r} cannot be kept: the most that the {len(places)} sites in question can give is "
            f"{' and '.join(told)}. Ask for that, let more sites be rewritten (include, exclude, min_gain), or let ranks be "
            f"lower with round_to=1."
        )

    def _reachable(self, name: str, missing: float) -> str:
        """Return the budget at which nothing would be missing, as a user writes it; "" where that would be none."""
        value = self.budget.limits[name]
        if name in {"speedup", "seconds"}:
            step = self.whole.step_seconds or sum(self._seconds_now(one.site) for one in self.candidates)
            least = (step / value if name == "speedup" else value) + missing * self._scale(step)
            # Times are never quite the same again.
            found = _cut(step / least / _MARGIN) if name == "speedup" else _MARGIN * least
            if name == "seconds":
                return f"seconds={found:.3g}" if found < step else ""
            return f"speedup={found:g}" if found > 1 else ""
        if value > 1 or isinstance(value, int):
            return f"{name}={int(value + missing) + 1}"
        before = sum(self._amounts(name)) + (self.whole.other_parameters if name == "parameters" else 0)
        share = value + missing / before + 5e-4 if before else 1.0
        return f"{name}={share:.3f}" if share < 1 else ""

    def _decision(self, site: Site, option: Option | None) -> SitePlan:
        assert site.operation is not None
        if option is None:
            return kept_plan(site, Reason.NO_GAIN, "within the budget as it is")
        gain = self.times.gain(self.policy.cost, site, option.chain)
        return factorized_plan(kept_plan(site, Reason.NO_GAIN), site, option, "", gain)


class _Curve:
    """The times of one site's options: measured, or estimated in the scale of those of their scheme that were measured."""

    def __init__(self, solver: BudgetSolver, one: Candidates) -> None:
        self.times, self.cost, self.site = solver.times, solver.policy.cost, one.site
        self.points: dict[str, list[tuple[float, float]]] = {}
        for option, _ in one.options:
            measured = self.times.measured(self.cost, self.site, option.chain)
            if measured is not None:
                guess = self.times.estimate(self.cost, self.site, option.chain)
                self.points.setdefault(option.scheme.name, []).append((guess, measured / guess))
        for points in self.points.values():
            points.sort()

    def seconds(self, option: Option | None) -> float:
        """Return the time of an option, or of the site as it is."""
        chain = chain_now(self.site) if option is None else option.chain
        measured = self.times.measured(self.cost, self.site, chain)
        if measured is not None:
            return measured
        guess = self.times.estimate(self.cost, self.site, chain)
        points = self.points.get(option.scheme.name, []) if option is not None else []
        if points:
            return guess * _between(points, guess)
        now = self.times.measured(self.cost, self.site, chain_now(self.site))
        return guess if now is None else guess * now / self.times.estimate(self.cost, self.site, chain_now(self.site))


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Interpolate between sorted points, and take the nearest outside of them.

    >>> _between([(1.0, 2.0), (3.0, 4.0)], 2.0), _between([(1.0, 2.0), (3.0, 4.0)], 9.0)
    (3.0, 4.0)
    """
    place = bisect.bisect([x for x, _ in points], at)
    if place in (0, len(points)):
        return points[max(0, place - 1)][1]
    (x0, y0), (x1, y1) = points[place - 1 : place + 1]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def _undominated(found: Sequence[tuple[Option | None, Weighed]]) -> list[tuple[Option | None, Weighed]]:
    """Leave out every option that another one beats in loss and in all costs; it would never be chosen."""
    kept: list[tuple[Option | None, Weighed]] = []
    for one in sorted(found, key=lambda pair: (pair[1].loss, pair[1].costs)):
        if not any(all(a <= b for a, b in zip(other.costs, one[1].costs, strict=True)) for _, other in kept):
            kept.append(one)
    return kept


def _cut(value: float) -> float:
    """Return a number with two decimals that is not above it.

    >>> _cut(2.349)
    2.34
    """
    return int(value * 100) / 100
