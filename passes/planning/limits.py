"""What the sites that a budget decides may come to, beside all the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tdfx.cost.modelled import Cost
from tdfx.errors import PolicyError
from tdfx.factors.registry import get_scheme
from tdfx.passes.planning.scales import Scales
from tdfx.passes.planning.site_cost import current_chain, factor_chain, keep
from tdfx.passes.planning.times import SiteTimes
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan, part_of_step
from tdfx.ranks.budget import Budget

_MARGIN = 1.02
"""What is said to be possible is this many times less than what was found to be."""


@dataclass(frozen=True, slots=True)
class BudgetScope:
    """The model around the sites that a budget decides."""

    others: tuple[tuple[Site, SitePlan], ...]
    """All other sites, and the decisions for them."""
    other_parameters: int
    """Parameters that belong to no site's weight."""
    step_seconds: float | None
    """Measured time of the model's training step; None where it was not measured."""


class Limits:
    """The limits of a budget for the sites that it decides, and the budgets that limits come to."""

    def __init__(self, budget: Budget, cost: Cost, times: SiteTimes, whole: BudgetScope, sites: Sequence[Site]) -> None:
        """Take what has to be kept, by which cost and times, in which model, and the sites."""
        self.budget = budget
        self.cost = cost
        self.times = times
        self.whole = whole
        self.sites = sites
        self.scales = Scales()
        """How many times longer than estimated sites take of which nothing is known."""

    def of(self, name: str) -> float:
        """Return what the sites may come to, all together.

        Raises:
            PolicyError: The budget counts what is not known.
        """
        value = self.budget.limits[name]
        if name in {"speedup", "seconds"}:
            return self._of_time(name, value)
        before = self._amounts(name)
        if not any(before) and any(site.flows is None and site.calls for site in self._all_sites()):
            raise PolicyError(
                f"{self.budget!r} counts {name}, which depends on what flows through each site. Pass example_inputs=... "
                f"(--input on the command line), or give a budget of parameters."
            )
        beside = self.whole.other_parameters if name == "parameters" else 0
        amount = value if value > 1 or isinstance(value, int) else value * (sum(before) + beside)
        return float(amount - sum(getattr(one, f"{name}_after") or 0 for _, one in self.whole.others) - beside)

    def reachable(self, name: str, missing: float) -> str:
        """Return the budget at which nothing would be missing, as a user writes it; "" where that would be none."""
        value = self.budget.limits[name]
        if name in {"speedup", "seconds"}:
            least = (self._step / value if name == "speedup" else value) + missing * self._scale
            # Times are never quite the same again.
            found = _cut(self._step / least / _MARGIN) if name == "speedup" else _MARGIN * least
            if name == "seconds":
                return f"seconds={found:.3g}" if found < self._step else ""
            return f"speedup={found:g}" if found > 1 else ""
        if value > 1 or isinstance(value, int):
            return f"{name}={int(value + missing) + 1}"
        before = sum(self._amounts(name)) + (self.whole.other_parameters if name == "parameters" else 0)
        share = value + missing / before + 5e-4 if before else 1.0
        return f"{name}={share:.3f}" if share < 1 else ""

    def _all_sites(self) -> Iterator[Site]:
        yield from self.sites
        yield from (site for site, _ in self.whole.others)

    def _amounts(self, name: str) -> list[int]:
        """Return what each site has of something now; nothing where it is not known what flows through it."""
        kept = [keep(site, Reason.NO_GAIN) for site in self.sites]
        return [getattr(one, f"{name}_before") or 0 for one in (*kept, *(one for _, one in self.whole.others))]

    def _of_time(self, name: str, value: float) -> float:
        if name == "seconds" and self.whole.step_seconds is None:
            raise PolicyError(
                f"{self.budget!r} is about the time of the training step, which is not known. Pass example_inputs=... "
                f"and a cost that measures, cost=tdfx.Measured()."
            )
        wanted = self._step / value if name == "speedup" else value
        saved = sum(before - after for before, after in self._times_of_others())
        return self._own - ((self._step - wanted) / self._scale - saved)

    @property
    def _own(self) -> float:
        return sum(map(self._seconds_now, self.sites))

    @property
    def _step(self) -> float:
        """The time of the step as it is now; where it was not measured, that of all sites, as if nothing else took any."""
        if self.whole.step_seconds is not None:
            return self.whole.step_seconds
        return self._own + sum(before for before, _ in self._times_of_others())

    @property
    def _scale(self) -> float:
        """How much of a site's time by itself it takes in the step."""
        return part_of_step(self._own + sum(before for before, _ in self._times_of_others()), self._step)

    def _times_of_others(self) -> Iterator[tuple[float, float]]:
        """Yield for each of the other sites how long it takes before and after.

        Beside a measured step only what was measured counts; else estimates stand for the rest, so that what is left of the
        step is the same whichever of the sites are decided already.
        """
        for site, plan in self.whole.others:
            if plan.seconds_before is not None and plan.seconds_after is not None:
                yield plan.seconds_before, plan.seconds_after
            elif self.whole.step_seconds is None and site.operation is not None and site.calls and not site.is_missed:
                before = after = self._seconds_now(site)
                if plan.scheme is not None and plan.ranks is not None:
                    chain = factor_chain(get_scheme(plan.scheme), plan.ranks)
                    after = self.scales.now * self.times.estimate(self.cost, site, chain)
                yield before, after

    def _seconds_now(self, site: Site) -> float:
        now = current_chain(site)
        found = self.times.measured(self.cost, site, now)
        return self.scales.now * self.times.estimate(self.cost, site, now) if found is None else found


def _cut(value: float) -> float:
    """Return a number with two decimals that is not above it.

    >>> _cut(2.349)
    2.34
    """
    return int(value * 100) / 100
