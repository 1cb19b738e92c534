"""The limits of a budget: what its sites may use, given the fixed cost of the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tdfx.errors import PolicyError
from tdfx.passes.planning.calibration import Calibration
from tdfx.passes.planning.site_cost import Candidate, current_chain, keep
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan, part_of_step
from tdfx.ranks.budget import Budget
from tdfx.text import short_number

_MARGIN = 1.02
"""How many times weaker than the best choice found a budget is that an error message calls possible: times vary."""


@dataclass(frozen=True, slots=True)
class BudgetScope:
    """The rest of the model, around the sites that a budget decides."""

    others: tuple[tuple[Site, SitePlan], ...]
    """All other sites, and the decisions for them."""
    other_parameters: int
    """Parameters that belong to no site's weight."""
    step_seconds: float | None
    """Measured time of the model's training step in seconds; None where it was not measured."""
    step_doubt: float = 0.0
    """Relative error that is to be expected of that time."""
    load: float = 1.0
    """The load of the machine now, see ``Timing``."""

    def beside(self, decided: Sequence[tuple[Site, SitePlan]]) -> BudgetScope:
        """Return the scope with more sites that are decided already."""
        return replace(self, others=(*self.others, *decided))


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a budget for the sites that it decides, and the budgets that limits amount to."""

    budget: Budget
    scope: BudgetScope
    sites: Sequence[Site]
    calibration: Calibration
    part: float = 1.0
    """Part of the reduction in time that the sites are to make."""

    def of(self, name: str) -> float:
        """Return how much the sites may use of one thing, all together.

        Raises:
            PolicyError: The budget counts something that is not known.
        """
        value = self.budget.limits[name]
        if name in {"speedup", "seconds"}:
            return self._of_time(name, value)
        before = self._amounts(name)
        sites = (*self.sites, *(site for site, _ in self.scope.others))
        if not any(before) and any(site.flows is None and site.calls for site in sites):
            raise PolicyError(
                f"{self.budget!r} counts {name}, which depends on what flows through each site. Pass example_inputs=... "
                f"(--input on the command line), or give a budget of parameters."
            )
        fixed = self._fixed(name)
        amount = value if value > 1 or isinstance(value, int) else value * (sum(before) + fixed)
        return float(amount - sum(getattr(plan, f"{name}_after") or 0 for _, plan in self.scope.others) - fixed)

    def reachable(self, name: str, missing: float) -> str:
        """Return the budget for which nothing would be missing, as a user writes it; "" if there is none."""
        value = self.budget.limits[name]
        if name in {"speedup", "seconds"}:
            least = self._wanted_seconds(name, value) + missing * self._scale
            if name == "seconds":
                seconds = _MARGIN * least
                return f"seconds={seconds:.3g}" if seconds < self._step else ""
            speedup = int(self._step / least / _MARGIN * 100) / 100
            return f"speedup={speedup:g}" if speedup > 1 else ""
        if value > 1 or isinstance(value, int):
            return f"{name}={int(value + missing) + 1}"
        before = sum(self._amounts(name)) + self._fixed(name)
        share = value + missing / before + 5e-4 if before else 1.0
        return f"{name}={share:.3f}" if share < 1 else ""

    def whole(self) -> str:
        """Return a sentence on what a share of the parameters is of; "" where the budget has none."""
        share = self.budget.parameters
        if share is None or share > 1 or isinstance(share, int):
            return ""
        total = sum(self._amounts("parameters")) + self.scope.other_parameters
        decided = sum(keep(site, Reason.NO_GAIN).parameters_before for site in self.sites)
        return f" A share is of all {short_number(total)} parameters of the model; these sites have {short_number(decided)}."

    @property
    def step_in_sites(self) -> float:
        """The time of the whole step in the scale of the sites' times."""
        return self._step / self._scale

    def _fixed(self, name: str) -> int:
        return self.scope.other_parameters if name == "parameters" else 0

    def _amounts(self, name: str) -> list[int]:
        """Return how much each site uses of one thing now; 0 where it is not known what flows through it."""
        plans = [*(keep(site, Reason.NO_GAIN) for site in self.sites), *(plan for _, plan in self.scope.others)]
        return [getattr(plan, f"{name}_before") or 0 for plan in plans]

    def _of_time(self, name: str, value: float) -> float:
        if name == "seconds" and self.scope.step_seconds is None:
            raise PolicyError(
                f"{self.budget!r} is about the time of the training step, which is not known. Pass example_inputs=... "
                f"and a cost that measures, cost=tdfx.Measured()."
            )
        saved = sum(before - after for before, after in self._times_of_others())
        return self._sites_now - (self.part * (self._step - self._wanted_seconds(name, value)) / self._scale - saved)

    def _wanted_seconds(self, name: str, value: float) -> float:
        return self._step / value if name == "speedup" else value

    @property
    def _sites_now(self) -> float:
        return sum(self.calibration.seconds(site, current_chain(site)) for site in self.sites)

    @property
    def _step(self) -> float:
        """The time of the step now; where it was not measured, that of all sites, as if nothing else took any."""
        return self._all_sites_now if self.scope.step_seconds is None else self.scope.step_seconds

    @property
    def _all_sites_now(self) -> float:
        return self._sites_now + sum(before for before, _ in self._times_of_others())

    @property
    def _scale(self) -> float:
        """How much of its time by itself a site takes in the step."""
        return part_of_step(self._all_sites_now, self._step)

    def _times_of_others(self) -> Iterator[tuple[float, float]]:
        """Yield for each of the other sites its time before and after.

        Beside a measured step only measured sites count; else estimates stand for the others, so that the remainder of the
        step is the same whichever sites are decided already.
        """
        for site, plan in self.scope.others:
            if plan.seconds_before is not None and plan.seconds_after is not None:
                yield plan.seconds_before, plan.seconds_after
            elif self.scope.step_seconds is None and site.operation is not None and site.calls and not site.is_missed:
                before = after = self.calibration.seconds(site, current_chain(site))
                if plan.factorized:
                    after = self.calibration.estimated(site, Candidate.of(plan))
                yield before, after
