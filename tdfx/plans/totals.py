"""The totals of a plan, in lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tdfx.plans.decisions import Decisions
from tdfx.plans.site import SitePlan
from tdfx.text import before_after, milliseconds, share, times_faster


def totals(plan: Decisions) -> list[str]:
    """Return a line for each total that is known, over all sites of the plan."""
    lines = [_decisions(plan)]
    counts = {
        "parameters": (plan.parameters_before, plan.parameters_after),
        "FLOPs of the sites, forward": (plan.flops_before, plan.flops_after),
    }
    if plan.memory_before != plan.memory_after:
        counts["bytes of the sites in training"] = plan.memory_before, plan.memory_after
    lines += [
        f"{name} {before_after(before, after)}" + _in_brackets(share(before, after))
        for name, (before, after) in counts.items()
        if before is not None
    ]
    timed = [site for site in plan.sites if site.seconds_before is not None and site.seconds_after is not None]
    if timed:
        before, after = (sum(getattr(site, f"seconds_{when}") for site in timed) for when in ("before", "after"))
        lines.append(
            f"measured, {len(timed)} sites{_by_estimate(timed)}: {milliseconds(before, after)} ms a step"
            + _in_brackets(times_faster(before, after))
        )
    if plan.step_seconds is not None:
        lines.append(
            f"training step {milliseconds(plan.step_seconds, plan.step_seconds_after)} ms"
            + _in_brackets(times_faster(plan.step_seconds, plan.step_seconds_after))
            + ", as predicted"
        )
    if plan.factorized and plan.total_error > 0:
        lines.append(f"total error {plan.total_error:.3g} (the squares of the sites' errors, summed)")
    return lines


def _decisions(plan: Decisions) -> str:
    kept = Counter(str(site.reason) for site in plan.kept)
    reasons = ", ".join(f"{count} {reason}" for reason, count in kept.most_common())
    return f"{plan.model or 'model'}: {len(plan.factorized)} of {len(plan)} sites factorized" + (
        f"; kept: {reasons}" if reasons else ""
    )


def _by_estimate(timed: Sequence[SitePlan]) -> str:
    count = sum(site.estimated for site in timed)
    return f", {count} of them by estimate" if count else ""


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""
