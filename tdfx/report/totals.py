"""The totals of a plan before and after the rewrite, as numbers to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdfx.plans.plan import Plan
from tdfx.text import short_number


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """One quantity before and after the rewrite."""

    title: str
    before: float
    after: float
    format: Callable[[float], str]
    """Returns a value as text."""
    is_time: bool = False

    @property
    def change(self) -> str:
        """The change as text."""
        if self.before == self.after:
            return "unchanged"
        if not self.after:
            return ""
        return f"{self.before / self.after:.2f}× faster" if self.is_time else f"{self.after / self.before:.0%} left"


def totals_of(plan: Plan) -> list[BeforeAfter]:
    """Return the totals that are known: time, parameters, operations, memory."""
    result = []
    if plan.step_seconds is not None and plan.step_seconds_after is not None:
        title = "time of a training step, measured now, predicted after"
        result.append(BeforeAfter(title, plan.step_seconds, plan.step_seconds_after, _milliseconds, is_time=True))
    pairs = [(site.seconds_before, site.seconds_after) for site in plan]
    timed = [(before, after) for before, after in pairs if before is not None and after is not None]
    if timed:
        before, after = map(sum, zip(*timed, strict=True))
        estimated = sum(site.estimated for site in plan)
        sites = f"{len(timed)} measured sites" + (f", {estimated} of them estimated" if estimated else "")
        result.append(BeforeAfter(f"time of {sites}, per step", before, after, _milliseconds, is_time=True))
    counts = (
        ("parameters of the model", plan.parameters_before, plan.parameters_after),
        ("FLOPs of the sites, forward", plan.flops_before, plan.flops_after),
        ("bytes of the sites in training", plan.memory_before, plan.memory_after),
    )
    for title, count, count_after in counts:
        if count is not None and count_after is not None:
            result.append(BeforeAfter(title, count, count_after, short_number))
    return result


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
