"""Scheme and ranks of all sites together, within a budget: the least total error, by times measured where they matter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tdfx.cost.modelled import MeasuringCost
from tdfx.distributed.processes import Processes
from tdfx.errors import PolicyError
from tdfx.passes.planning.budget_site import BudgetSite
from tdfx.passes.planning.calibration import Calibration, Lowest, SiteCalibration
from tdfx.passes.planning.knapsack import (
    TIME_LIMIT,
    InfeasibleError,
    Item,
    Selection,
    TimeLimitError,
    least_totals,
    solve_knapsack,
)
from tdfx.passes.planning.limits import BudgetScope, Limits
from tdfx.passes.planning.site_cost import Candidate, current_chain
from tdfx.passes.planning.times import SiteTimes, TimingRequest
from tdfx.passes.planning.worthwhile import Place, sure_part, worthwhile
from tdfx.passes.program import Site
from tdfx.plans.plan import SitePlan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget

_ROUNDS = 8
"""Times that a choice is measured and made again with the result; two or three are usual."""
_PART = 0.9
"""How much of the possible reduction a budget that is out of reach gets: the last steps cost most and bring least."""
_LEAST_PART = 0.01
"""Part of the way to a budget below which nothing is cut."""
_SWEEPS = 2
"""Times that the rounds are repeated: the second sweep knows what the first was too careful about."""
_COVERED = 0.6
"""Share of the time of the sites that a scheme fits, of which its lowest ranks are timed; the rest is scaled alike."""
_CAUTION = 1.05
"""Factor by which unmeasured candidates get slower from one round to the next. The best of many estimates is usually too
low, and few sites should change once most of the chosen candidates are measured."""


@dataclass(slots=True)
class BudgetSolver:
    """Finds the candidates of least total loss, the sum of squared errors, within a budget.

    Times of candidates are estimated at first, in the scale of a few that are measured: each site as it is, and the lowest
    ranks of each scheme. What a solution chooses is measured, and the problem is solved again, until all that is chosen has
    been measured.
    """

    policy: Policy
    times: SiteTimes
    scope: BudgetScope
    sites: Sequence[BudgetSite]
    processes: Processes
    notes: list[str] = field(default_factory=list)
    calibration: Calibration = field(init=False)
    part: float = 1.0
    """Part of the reduction in time that is made: less where it is not sure."""

    def __post_init__(self) -> None:
        self.calibration = Calibration(self.times, self.policy.cost)

    @property
    def budget(self) -> Budget:
        """The budget to keep."""
        assert isinstance(self.policy.rank, Budget)
        return self.policy.rank

    @property
    def limits(self) -> Limits:
        """The limits of the budget, by the times that are known now."""
        return Limits(self.budget, self.scope, [each.site for each in self.sites], self.calibration, self.part)

    def solve(self) -> list[SitePlan]:
        """Return the decisions for the sites, in their order.

        Raises:
            PolicyError: The budget cannot be kept, or needs something that is not known.
        """
        if self._measures:
            self._calibrate()
        chosen = self._choose_until_measured()
        if (part := self._sure_part(chosen)) < 1:
            self.part = part
            chosen = self._choose()
            self.notes.append(
                f"the machine is busy and times are not sure: {part:.0%} of the reduction that {self.budget!r} wants is made"
            )
        self._note_untimed(chosen)
        pairs = zip(self.sites, chosen, strict=True)
        return [each.decision(candidate, self._site_calibration(each)) for each, candidate in pairs]

    def _calibrate(self) -> None:
        """Time every site as it is and, where sites of a scheme take most of the time, its lowest ranks; learn from that."""
        lowest = [(each.site, each.fastest(self.calibration)) for each in self.sites]
        covering = self._covering(lowest)
        self.times.prepare(
            TimingRequest(self.policy.cost, site, tuple(each[name] for name in each if site.name in covering[name]))
            for site, each in lowest
        )
        self.calibration = self.calibration.learn(lowest, self.scope.step_seconds)

    def _covering(self, lowest: Sequence[tuple[Site, Lowest]]) -> dict[str, set[str]]:
        """Return for each scheme the fewest sites that take most of the time of those that it fits, by arithmetic."""
        seconds = {site.name: self.times.estimate(self.policy.cost, site, current_chain(site)) for site, _ in lowest}
        covering: dict[str, set[str]] = {}
        for scheme in {name for _, each in lowest for name in each}:
            names = sorted(
                (site.name for site, each in lowest if scheme in each), key=seconds.__getitem__, reverse=True
            )
            before = [0.0, *itertools.accumulate(seconds[name] for name in names)]
            pairs = zip(names, before, strict=False)
            covering[scheme] = {name for name, covered in pairs if covered < _COVERED * before[-1]}
        return covering

    def _choose_until_measured(self) -> list[Candidate | None]:
        """Return the best choice once all that it chooses is measured; search again once with what is known then."""
        for _ in range(_SWEEPS):
            self.calibration = replace(self.calibration, caution=1.0)
            for _ in range(_ROUNDS):
                chosen = self._choose()
                if not self._measure(chosen):
                    break
                self.calibration = replace(self.calibration, caution=self.calibration.caution * _CAUTION)
            else:
                chosen = self._choose()
            if self.calibration.caution == 1.0:
                break  # nothing was learned that a second sweep could use
        return chosen

    def _choose(self) -> list[Candidate | None]:
        """Return the best choice by the times that are known now.

        The first process solves the problem for all: how far a solver comes within its time differs between processes, and
        what they measure together next depends on the choice.
        """
        names, bounds = list(self.budget.limits), list(map(self.limits.of, self.budget.limits))
        places = [each.place(self._site_calibration(each), names) for each in self.sites]
        places = [worthwhile(place, self._least_rate(each)) for each, place in zip(self.sites, places, strict=True)]
        picks, self.notes = self.processes.on_rank0(partial(self._pick, names, places, bounds))
        return [place[pick][0] for place, pick in zip(places, picks, strict=True)]

    def _pick(
        self, names: Sequence[str], places: Sequence[Place], bounds: Sequence[float]
    ) -> tuple[list[int], list[str]]:
        items = [[item for _, item in place] for place in places]
        try:
            return _with_note(solve_knapsack(items, bounds))
        except InfeasibleError:
            if self.budget.strict:
                raise self._out_of_reach(names, bounds, items) from None
            return self._nearest(names, items, bounds)
        except TimeLimitError:
            if self.budget.strict:
                raise PolicyError(
                    f"No choice for the {len(places)} sites was found in {TIME_LIMIT:g} s that keeps {self.budget!r}, nor "
                    f"that there is none. Ask for a little less, or leave sites out with exclude."
                ) from None
            return self._keep_all(len(places))

    def _keep_all(self, count: int) -> tuple[list[int], list[str]]:
        # The first item of each place has the least loss: as a rule, to keep the site.
        return [0] * count, [
            f"no choice for the {count} sites was found in {TIME_LIMIT:g} s that comes near {self.budget!r}, so they stay "
            f"as they are. Ask for a little less, or leave sites out with exclude"
        ]

    def _nearest(
        self, names: Sequence[str], places: Sequence[Sequence[Item]], bounds: Sequence[float]
    ) -> tuple[list[int], list[str]]:
        """Return the choice of least loss that goes most of the way to bounds that are out of reach, and remarks."""
        now = [sum(place[0].costs[index] for place in places) for index in range(len(bounds))]
        least = least_totals(places, len(bounds))
        parts = zip(now, least, bounds, strict=True)
        part = min([(most - end) / (most - bound) for most, end, bound in parts if most > bound], default=0.0)
        possible = " and ".join(filter(None, self._possible(names, bounds, least)))
        notes = []
        if possible:
            notes = [
                f"{self.budget!r} cannot be kept: {possible} is the most that is possible; {_PART:.0%} of that reduction is "
                f"made, since the last steps cost most and bring least.{self.limits.whole()}".rstrip(".")
            ]
        elif self.sites:
            notes = [f"{self.budget!r} cannot be kept, and nothing comes nearer to it"]
        while part > _LEAST_PART:
            part *= _PART
            closer = [bound + (1 - part) * max(0.0, most - bound) for most, bound in zip(now, bounds, strict=True)]
            try:
                picks, more = _with_note(solve_knapsack(places, closer))
                return picks, [*notes, *more]
            except InfeasibleError:
                continue
            except TimeLimitError:
                return self._keep_all(len(places))
        return [0] * len(places), notes

    @property
    def _measures(self) -> bool:
        decide = self.budget.is_of_time or any(each.policy.min_gain > 0 for each in self.sites)
        known = any(each.site.flows for each in self.sites)
        return decide and known and isinstance(self.policy.cost, MeasuringCost)

    def _measure(self, chosen: Sequence[Candidate | None]) -> bool:
        """Measure what was chosen, while there is time; return True if that brought anything new."""
        untimed = self._untimed(chosen)
        self.times.prepare(TimingRequest(self.policy.cost, site, (candidate,)) for site, candidate in untimed)
        return len(self._untimed(chosen)) < len(untimed)

    def _untimed(self, chosen: Sequence[Candidate | None]) -> list[tuple[Site, Candidate]]:
        """Return what was chosen and could be measured, but is not."""
        if not self._measures:
            return []
        return [
            (each.site, candidate)
            for each, candidate in zip(self.sites, chosen, strict=True)
            if candidate is not None
            and not each.site.is_missed
            and self.times.measured(self.policy.cost, each.site, candidate) is None
        ]

    def _note_untimed(self, chosen: Sequence[Candidate | None]) -> None:
        untimed = self._untimed(chosen)
        if untimed:
            count = f"{len(untimed)} sites were" if len(untimed) > 1 else "1 site was"
            self.notes.append(
                f"{count} not timed as planned, for lack of time or because the layer cannot run alone: ~ marks an "
                f"estimate. What was timed is kept, so the next plan knows more; or give more seconds with "
                f"cost=tdfx.Measured(budget=...)"
            )

    def _site_calibration(self, each: BudgetSite) -> SiteCalibration:
        lowest = each.fastest(self.calibration) if self.calibration.lowest else {}
        return self.calibration.of_site(each.site, each.errors, lowest)

    def _sure_part(self, chosen: Sequence[Candidate | None]) -> float:
        """Return the part of the wanted reduction in time that is safe to make, by a budget that need not be kept.

        All of it on a machine that does nothing else; less the busier it is and the more of what is saved is an estimate.
        """
        if self.budget.strict or not self.budget.is_of_time or not self._measures:
            return 1.0
        untimed = {site.name for site, _ in self._untimed(chosen)}
        total = unsure = 0.0
        for each, candidate in zip(self.sites, chosen, strict=True):
            if candidate is not None:
                calibration = self._site_calibration(each)
                saved = calibration.seconds(None) - calibration.seconds(candidate)
                total += saved
                unsure += saved if each.site.name in untimed else 0.0
        return sure_part(unsure / total if total > 0 else 0.0, self.scope.step_doubt, self.scope.load)

    def _least_rate(self, each: BudgetSite) -> float:
        """Return the seconds that a site has to save for each unit of loss; a budget that must be kept asks for none.

        If all sites just came to it, and were lost altogether, the step would gain what ``min_gain`` asks for.
        """
        if self.budget.strict or not self.budget.is_of_time or each.policy.min_gain <= 1:
            return 0.0
        return (1 - 1 / each.policy.min_gain) * self.limits.step_in_sites / len(self.sites)

    def _out_of_reach(
        self, names: Sequence[str], bounds: Sequence[float], places: Sequence[Sequence[Item]]
    ) -> PolicyError:
        possible = self._possible(names, bounds, least_totals(places, len(names)))
        if not possible:
            return PolicyError(
                f"{self.budget!r} cannot be kept: each of its budgets can, but not all of them together. Loosen one of them."
            )
        if not all(possible):
            return PolicyError(
                f"{self.budget!r} cannot be kept: the {len(places)} sites in question can give nothing of it. Let more "
                f"sites be rewritten (include, exclude, min_gain), or ask for something else.{self.limits.whole()}"
            )
        return PolicyError(
            f"{self.budget!r} cannot be kept: the most that the {len(places)} sites in question can give is "
            f"{' and '.join(possible)}. Ask for that, let more sites be rewritten (include, exclude, min_gain), or let "
            f"ranks be lower with round_to=1.{self.limits.whole()}"
        )

    def _possible(self, names: Sequence[str], bounds: Sequence[float], least: Sequence[float]) -> list[str]:
        """Return for each budget that cannot be kept the nearest one that can; "" where there is none."""
        limits = self.limits
        each = zip(names, bounds, least, strict=True)
        return [limits.reachable(name, total - bound) for name, bound, total in each if total > bound]


def _with_note(selection: Selection) -> tuple[list[int], list[str]]:
    if selection.proven:
        return selection.picks, []
    return selection.picks, [
        f"the solver's {TIME_LIMIT:g} s ran out: the best choice that it had found by then was taken, and there may be a "
        f"better one within the budget"
    ]
