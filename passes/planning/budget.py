"""Scheme and ranks of all sites together, within a budget: the least total loss, by times measured as they matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tdfx.cost.count import parameters
from tdfx.cost.modelled import MeasuringCost
from tdfx.errors import PolicyError
from tdfx.passes.planning.curve import Curve
from tdfx.passes.planning.knapsack import SECONDS, NoneFoundError, OutOfReachError, Selection, best_choice, least_totals
from tdfx.passes.planning.knapsack import Item as Weighed
from tdfx.passes.planning.limits import BudgetScope, Limits
from tdfx.passes.planning.proposals import Candidate, factorize
from tdfx.passes.planning.scales import Lowest, Scales
from tdfx.passes.planning.site_cost import current_chain, flops_of, keep, memory_of
from tdfx.passes.planning.times import SiteTimes, TimingRequest
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget

_ROUNDS = 8
"""Times that a choice is measured and made anew with what was found; two or three are usual."""
_PART = 0.9
"""How far a budget that cannot be kept, and need not, is followed: the last steps cost most and bring least."""
_LEAST_WAY = 0.01
"""Part of the way to a budget that is not worth going."""
_SWEEPS = 2
"""Times that this is begun: with what the first one learned, the second sees what it was too careful for."""
_CAUTION = 1.05
"""How many times longer what was not measured is taken to be from one round to the next: what seems best of many estimates
is, as a rule, one that is too low, and few sites are to change when most of what is chosen is known."""


@dataclass(frozen=True, slots=True)
class BudgetSite:
    """A site that a budget decides, and what it may become."""

    site: Site
    policy: Policy
    """What is in force for it; its rank rule is the budget."""
    options: tuple[tuple[Candidate, float], ...]
    """Each with its loss."""


@dataclass(slots=True)
class BudgetSolver:
    """Finds the options of least total loss within a budget.

    Times of options are estimated at first, in the scale of a few that are measured: the site as it is, and the lowest ranks
    of each scheme. What a solution chooses is measured, and it is solved anew with that, until all that is chosen is known.
    """

    policy: Policy
    times: SiteTimes
    whole: BudgetScope
    candidates: Sequence[BudgetSite]
    notes: list[str] = field(default_factory=list)
    """What there is to know of the solution."""
    caution: float = 1.0
    """How many times longer than estimated an option is taken to be that was not measured."""
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        sites = [one.site for one in self.candidates]
        self.limits = Limits(self.budget, self.policy.cost, self.times, self.whole, sites)

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
            cost = self.policy.cost
            sites = [(one.site, self._lowest(one)) for one in self.candidates]
            self.times.prepare(
                TimingRequest(cost, site, tuple(option.chain for option in lowest.values())) for site, lowest in sites
            )
            self.limits.scales = Scales.learned(self.times, cost, sites, self.whole.step_seconds)
        chosen = self._settled()
        self._note_untimed(chosen)
        return [self._decision(one, option) for one, option in zip(self.candidates, chosen, strict=True)]

    def _settled(self) -> list[Candidate | None]:
        """Return what is best when what is best has been measured, looked for anew once from what is known by then."""
        for _ in range(_SWEEPS):
            self.caution = 1.0
            for _ in range(_ROUNDS):
                chosen = self._choice()
                if not self._learned(chosen):
                    break
                self.caution *= _CAUTION
            else:
                chosen = self._choice()
        return chosen

    def _choice(self) -> list[Candidate | None]:
        """Return what is best by the times as they are known now.

        One process solves it for all: how far a solver comes in its time differs between them, and what they measure next,
        all together, depends on the choice.
        """
        names = list(self.budget.limits)
        places = [self._place(one, self._curve(one), names) for one in self.candidates]
        limits = [self.limits.of(name) for name in names]
        picks, self.notes = self.times.lead.do(partial(self._picked, names, places, limits))
        return [place[pick][0] for place, pick in zip(places, picks, strict=True)]

    def _picked(
        self,
        names: Sequence[str],
        places: Sequence[Sequence[tuple[Candidate | None, Weighed]]],
        limits: Sequence[float],
    ) -> tuple[list[int], list[str]]:
        """Return which of its options each place gets, and what there is to know of that."""
        weighed = [[option for _, option in place] for place in places]
        try:
            return _noted(best_choice(weighed, limits))
        except OutOfReachError:
            if self.budget.strict:
                raise self._out_of_reach(names, limits, weighed) from None
            return self._near(names, weighed, limits)
        except NoneFoundError:
            if self.budget.strict:
                raise PolicyError(
                    f"No choice for the {len(places)} sites was found in {SECONDS:g} s that keeps {self.budget!r}, nor that "
                    f"there is none. Ask for a little less, or leave sites out with exclude."
                ) from None
            return self._as_they_are(len(places))

    def _as_they_are(self, count: int) -> tuple[list[int], list[str]]:
        """Return what keeps all sites, and say so."""
        # The first option of each place is the one that loses least: to keep the site, as a rule.
        return [0] * count, [
            f"no choice for the {count} sites was found in {SECONDS:g} s that comes near {self.budget!r}, so they stay as "
            f"they are. Ask for a little less, or leave sites out with exclude"
        ]

    def _curve(self, one: BudgetSite) -> Curve:
        options = (option for option, _ in one.options)
        scales = self.limits.scales
        # They are looked for again only where there is something to be learned from them.
        lowest = self._lowest(one) if scales.lowest else {}
        return Curve(
            self.times, self.policy.cost, one.site, options, lowest=lowest, scales=scales, caution=self.caution
        )

    def _near(
        self, names: Sequence[str], places: Sequence[Sequence[Weighed]], limits: Sequence[float]
    ) -> tuple[list[int], list[str]]:
        """Return the choice of least loss that goes most of the way to limits which no choice keeps, and say so."""
        now = [sum(place[0].costs[index] for place in places) for index in range(len(limits))]
        least = least_totals(places, len(limits))
        ways = zip(now, least, limits, strict=True)
        way = min([(most - end) / (most - limit) for most, end, limit in ways if most > limit], default=0.0)
        told = " and ".join(filter(None, self._told(names, limits, least)))
        notes = []
        if told:
            notes = [
                f"{self.budget!r} cannot be kept: {told} is what can be had; of what that would take, {_PART:.0%} is done, "
                f"since the last steps cost most and bring least"
            ]
        elif self.candidates:
            notes = [f"{self.budget!r} cannot be kept, and nothing comes nearer to it"]
        while way > _LEAST_WAY:
            way *= _PART
            closer = [
                limit if most <= limit else most - way * (most - limit) for most, limit in zip(now, limits, strict=True)
            ]
            try:
                picks, more = _noted(best_choice(places, closer))
                return picks, [*notes, *more]
            except OutOfReachError:
                continue
            except NoneFoundError:
                return self._as_they_are(len(places))
        return [0] * len(places), notes

    @property
    def _measures(self) -> bool:
        """True if times decide anything, and can be measured."""
        decide = self.budget.is_of_time or any(one.policy.min_gain > 0 for one in self.candidates)
        known = any(one.site.flows for one in self.candidates)
        return decide and known and isinstance(self.policy.cost, MeasuringCost)

    def _lowest(self, one: BudgetSite) -> Lowest:
        """Return of each scheme what is fastest by arithmetic: it takes little to measure, and says what can be had."""
        found: dict[str, tuple[float, Candidate]] = {}
        for option, _ in one.options:
            guess = self.times.estimate(self.policy.cost, one.site, option.chain)
            if option.scheme.name not in found or guess < found[option.scheme.name][0]:
                found[option.scheme.name] = (guess, option)
        return {name: option for name, (_, option) in found.items()}

    def _learned(self, chosen: Sequence[Candidate | None]) -> bool:
        """Measure what was chosen, while there is time; return True if that told anything new."""
        new = self._untimed(chosen)
        self.times.prepare(TimingRequest(self.policy.cost, site, (option.chain,)) for site, option in new)
        return len(self._untimed(chosen)) < len(new)

    def _untimed(self, chosen: Sequence[Candidate | None]) -> list[tuple[Site, Candidate]]:
        """Return what was chosen and could be measured, but is not."""
        pairs = [
            (one.site, option)
            for one, option in zip(self.candidates, chosen, strict=True)
            if option is not None and not one.site.is_missed
        ]
        cost = self.policy.cost
        return [pair for pair in pairs if self._measures and self.times.measured(cost, pair[0], pair[1].chain) is None]

    def _note_untimed(self, chosen: Sequence[Candidate | None]) -> None:
        untimed = self._untimed(chosen)
        if untimed:
            count = f"{len(untimed)} sites were" if len(untimed) > 1 else "1 site was"
            self.notes.append(
                f"{count} not timed as planned, for want of time or for being unable to run alone: what is marked by ~ is "
                f"an estimate. What was timed is kept, so the next plan knows more; or give more seconds with "
                f"cost=tdfx.Measured(budget=...)"
            )

    def _place(self, one: BudgetSite, curve: Curve, names: Sequence[str]) -> list[tuple[Candidate | None, Weighed]]:
        """Return what can be done with a site, with loss and costs: to keep it, and the options that gain enough."""
        now = curve.seconds(None)
        found: list[tuple[Candidate | None, Weighed]] = [(None, Weighed(0.0, self._costs(one.site, None, now, names)))]
        for option, loss in one.options:
            seconds = curve.seconds(option)
            if now / seconds >= one.policy.min_gain:
                found.append((option, Weighed(loss, self._costs(one.site, option, seconds, names))))
        return _undominated(found)

    def _costs(self, site: Site, option: Candidate | None, seconds: float, names: Sequence[str]) -> tuple[float, ...]:
        chain = current_chain(site) if option is None else option.chain
        assert site.operation is not None
        known: Mapping[str, Callable[[], float | None]] = {
            "speedup": lambda: seconds,
            "seconds": lambda: seconds,
            "flops": lambda: flops_of(site, chain),
            "parameters": lambda: parameters(chain(site.operation)),  # type: ignore[arg-type]
            "memory": lambda: memory_of(site, chain),
        }
        return tuple(float(known[name]() or 0) for name in names)

    def _out_of_reach(
        self, names: Sequence[str], limits: Sequence[float], places: Sequence[Sequence[Weighed]]
    ) -> PolicyError:
        """Say which budgets cannot be kept, and what can be."""
        least = least_totals(places, len(names))
        told = self._told(names, limits, least)
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

    def _told(self, names: Sequence[str], limits: Sequence[float], least: Sequence[float]) -> list[str]:
        """Return of each budget that cannot be kept what can be."""
        each = zip(names, limits, least, strict=True)
        return [self.limits.reachable(name, total - limit) for name, limit, total in each if total > limit]

    def _decision(self, one: BudgetSite, option: Candidate | None) -> SitePlan:
        curve = self._curve(one)
        before = curve.seconds(None)
        if option is None:
            gain = max((before / curve.seconds(each) for each, _ in one.options), default=0.0)
            if gain >= one.policy.min_gain and one.options:
                return keep(one.site, Reason.NOT_NEEDED)
            note = f"{one.policy.min_gain:g}x was asked of it, at any ranks that the budget allows"
            return replace(keep(one.site, Reason.NO_GAIN, note), gain=gain or None)
        after = curve.seconds(option)
        decided = factorize(keep(one.site, Reason.NO_GAIN), one.site, option, "", before / after)
        if not self.limits.scales.measured or one.site.is_missed:
            return decided
        estimated = any(
            self.times.measured(self.policy.cost, one.site, chain) is None
            for chain in (current_chain(one.site), option.chain)
        )
        return replace(decided, seconds_before=before, seconds_after=after, estimated=estimated)


def _noted(choice: Selection) -> tuple[list[int], list[str]]:
    """Return the picks of a choice, and what there is to know of it."""
    if choice.proven:
        return choice.picks, []
    return choice.picks, [
        f"the solver's {SECONDS:g} s ran out: the best choice that it had found by then was taken, and there may be a "
        f"better one within the budget"
    ]


def _undominated(found: Sequence[tuple[Candidate | None, Weighed]]) -> list[tuple[Candidate | None, Weighed]]:
    """Leave out every option that another one beats in loss and in all costs; it would never be chosen."""
    kept: list[tuple[Candidate | None, Weighed]] = []
    for one in sorted(found, key=lambda pair: (pair[1].loss, pair[1].costs)):
        if not any(all(a <= b for a, b in zip(other.costs, one[1].costs, strict=True)) for _, other in kept):
            kept.append(one)
    return kept
