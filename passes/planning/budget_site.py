"""A site that a budget decides: what can be done with it, and the decision once that is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tdfx.cost.count import parameters
from tdfx.passes.planning.calibration import Calibration, Lowest, SiteCalibration
from tdfx.passes.planning.knapsack import Item
from tdfx.passes.planning.proposals import factorize
from tdfx.passes.planning.site_cost import Candidate, current_chain, flops_of, keep, memory_of
from tdfx.passes.planning.worthwhile import Place, gains_enough
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan
from tdfx.policies.policy import Policy


@dataclass(frozen=True, slots=True)
class BudgetSite:
    """A site that a budget decides, and its candidates."""

    site: Site
    policy: Policy
    """The policy in force for the site; its rank rule is the budget."""
    errors: Mapping[Candidate, float]
    """The error of each candidate, relative to the weight's norm."""

    def fastest(self, calibration: Calibration) -> Lowest:
        """Return the candidate of each scheme that is fastest by arithmetic: it is cheap to measure, and bounds the gain."""
        by_scheme: dict[str, list[Candidate]] = {}
        for candidate in self.errors:
            by_scheme.setdefault(candidate.scheme.name, []).append(candidate)
        seconds = partial(calibration.times.estimate, calibration.cost, self.site)
        return {name: min(candidates, key=seconds) for name, candidates in by_scheme.items()}

    def place(self, calibration: SiteCalibration, names: Sequence[str]) -> Place:
        """Return what can be done with the site, with what that loses and uses of each thing that a budget counts.

        Args:
            calibration: The times of the site.
            names: What the budget counts.
        """
        times, cost = calibration.calibration.times, calibration.calibration.cost
        now = calibration.seconds(None)
        place: Place = [(None, Item(0.0, _costs(self.site, None, now, names)))]
        for candidate, error in self.errors.items():
            seconds = calibration.seconds(candidate)
            estimated = times.estimated_gain(cost, self.site, candidate)
            if gains_enough(now / seconds, estimated, self.policy.min_gain):
                # Rounded, so that of candidates that lose the same the cheapest counts, whatever the last digits are.
                loss = float(f"{error**2:.6g}")
                place.append((candidate, Item(loss, _costs(self.site, candidate, seconds, names))))
        return _undominated(place)

    def decision(self, candidate: Candidate | None, calibration: SiteCalibration) -> SitePlan:
        """Return the decision for the site: to factorize it as a candidate says, or for None to keep it."""
        site, min_gain = self.site, self.policy.min_gain
        times, cost = calibration.calibration.times, calibration.calibration.cost
        before = calibration.seconds(None)
        if candidate is None:
            gain = max((before / calibration.seconds(other) for other in self.errors), default=0.0)
            if gain >= min_gain and self.errors:
                return keep(site, Reason.NOT_NEEDED)
            note = f"{min_gain:g}x was asked of it, at any ranks that the budget allows"
            return replace(keep(site, Reason.NO_GAIN, note), gain=gain or None)
        after = calibration.seconds(candidate)
        decision = factorize(keep(site, Reason.NO_GAIN), site, candidate, "", before / after)
        decision = replace(decision, error=self.errors[candidate])
        if not calibration.calibration.measured or site.is_missed:
            return decision
        measured = [times.measured(cost, site, chain) for chain in (current_chain(site), candidate)]
        return replace(decision, seconds_before=before, seconds_after=after, estimated=None in measured)


def _costs(site: Site, candidate: Candidate | None, seconds: float, names: Sequence[str]) -> tuple[float, ...]:
    """Return what a site uses of each thing that a budget counts, as it is or as a candidate."""
    chain = candidate or current_chain(site)
    amounts: dict[str, Callable[[], float | None]] = {
        "speedup": lambda: seconds,
        "seconds": lambda: seconds,
        "parameters": lambda: parameters(chain(site.known_operation)),
        "flops": lambda: flops_of(site, chain),
        "memory": lambda: memory_of(site, chain),
    }
    return tuple(float(amounts[name]() or 0) for name in names)


def _undominated(place: Place) -> Place:
    """Leave out every candidate that another one beats in loss and in all costs; it would never be chosen."""
    kept: Place = []
    for entry in sorted(place, key=lambda pair: (pair[1].loss, pair[1].costs)):
        costs = entry[1].costs
        if not any(all(a <= b for a, b in zip(other.costs, costs, strict=True)) for _, other in kept):
            kept.append(entry)
    return kept
