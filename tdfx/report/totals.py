"""What a plan comes to, as pairs of numbers to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdfx.plans.plan import Plan
from tdfx.text import short_number


@dataclass(frozen=True, slots=True)
class Total:
    """One quantity before and after the rewrite."""

    title: str
    before: float
    after: float
    show: Callable[[float], str]
    """Writes a value of it."""

    @property
    def change(self) -> str:
        """What became of it, in words."""
        if self.before == self.after or not self.after:
            return "unchanged" if self.before == self.after else ""
        if self.title.startswith(_TIME):
            return f"{self.before / self.after:.2f}× faster"
        return f"{self.after / self.before:.0%} left"


_TIME = "time"


def totals_of(plan: Plan) -> list[Total]:
    """Return the totals that are known: time, parameters, operations, memory."""
    found = []
    if plan.step_seconds is not None and plan.step_seconds_after is not None:
        found.append(Total(f"{_TIME} of a training step, predicted", plan.step_seconds, plan.step_seconds_after, _ms))
    pairs = [(one.seconds_before, one.seconds_after) for one in plan]
    timed = [(before, after) for before, after in pairs if before is not None and after is not None]
    if timed:
        before, after = (sum(one) for one in zip(*timed, strict=True))
        guessed = sum(one.estimated for one in plan)
        of = f"{len(timed)} measured sites" + (f", {guessed} of them by estimate" if guessed else "")
        found.append(Total(f"{_TIME} of {of}, a step", before, after, _ms))
    found.append(Total("parameters of the model", plan.parameters_before, plan.parameters_after, short_number))
    if plan.flops_before is not None and plan.flops_after is not None:
        found.append(Total("FLOPs of the sites, forward", plan.flops_before, plan.flops_after, short_number))
    if plan.memory_before is not None and plan.memory_after is not None:
        found.append(Total("bytes of the sites in training", plan.memory_before, plan.memory_after, short_number))
    return found


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
