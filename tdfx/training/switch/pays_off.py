"""Whether a switch pays off: the time that it is predicted to save in the steps that are left, against the time it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tdfx.cost.measured import Measured
from tdfx.plans.plan import Plan
from tdfx.policies.policy import Policy, map_costs

_MEASURING, _LEAST = 0.02, 10
"""Share of the time left that measuring may take, and steps that it may take in any case, so that a plan is no guess."""


def cap_measuring_time(policy: Policy, left: int, step_seconds: float) -> Policy:
    """Return a policy that measures for at most a fiftieth of the time that is left, or the time of ten steps.

    A lower limit of its own stays. Steps take negative seconds if none was timed; then the policy stays as it is.
    """
    most = max(_MEASURING * left, _LEAST) * step_seconds
    if most <= 0:
        return policy
    return map_costs(
        policy, lambda cost: replace(cost, budget=most) if isinstance(cost, Measured) and cost.budget > most else cost
    )


def pays_off(
    plan: Plan, seconds: Mapping[str, float], left: int, step_seconds: float, planning: float, recompiling: float
) -> tuple[bool, str]:
    """Return whether a switch pays off in the steps that are left, and the sum in words.

    Args:
        plan: What would be switched, at least one site.
        seconds: Site -> modelled time as it is now, in seconds; used if the plan has no measured times.
        left: Steps that are left.
        step_seconds: Time of a step in seconds; negative if none was timed.
        planning: Time that making the plan took, in seconds; the rewrite is assumed to take as long, which is too careful.
        recompiling: Time to compile the rewritten model, in seconds.
    """
    if step_seconds < 0:
        return left > 0, f"; {left} steps are left, and no step was timed yet"
    saving = left * _saved(plan, seconds, step_seconds)
    takes = planning + recompiling
    words = f"saves {saving:.3g} s in the {left} steps left and takes {takes:.3g} s"
    return saving > takes, f"; it {words}" if saving > takes else f"a switch {words}"


def _saved(plan: Plan, seconds: Mapping[str, float], step_seconds: float) -> float:
    """Return the seconds that each step would save: as the plan predicts, or else from the sites' modelled times."""
    if all(site.seconds_after is not None for site in plan.factorized):
        return step_seconds - plan.predicted_seconds(step_seconds)
    total = sum(seconds.values())
    saved = sum(seconds.get(site.name, 0.0) * (1 - 1 / (site.gain or 1.0)) for site in plan.factorized)
    return step_seconds * (saved / total if total > 0 else 0.0)
