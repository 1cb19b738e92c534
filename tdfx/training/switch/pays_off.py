"""Whether a switch pays off: the time that it is predicted to save in the steps that are left, against the time it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from tdfx.cost.measured import Measured
from tdfx.plans.plan import Plan
from tdfx.policies.policy import Policy, map_costs
from tdfx.ranks.budget import Budget

_MEASURING, _LEAST = 0.02, 10
"""Share of the time left that measuring may take, and steps that it may take in any case, so that a plan is no guess."""

_USED = 0.7
"""Share of the time that measuring may take that it is expected to take."""
_READING = 2e-10
"""Seconds that reading a weight is expected to take for each of its values and each row or column, whichever are fewer."""
_REWRITING = 3e-10
"""Seconds that splitting a weight, with its optimizer state, is expected to take for each of its values and each rank."""
_REWRITE_STEPS = 5
"""Steps that the checks and copies of a rewrite are expected to take as long as."""


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


def cannot_pay(
    policy: Policy, weights: Iterable[nn.Parameter], left: int, step_seconds: float, recompiling: float, *, times: bool
) -> str | None:
    """Return why not even the most that a switch can save would make up for what it takes, or None if it may.

    This is an estimate, before anything is spent on a plan.

    Args:
        policy: What would be switched; its measuring time counts as ``cap_measuring_time`` leaves it.
        weights: The model's parameters.
        left: Steps that are left.
        step_seconds: Time of a step in seconds; negative if none was timed.
        recompiling: Time to compile the rewritten model, in seconds.
        times: Whether there are inputs on which the policy's cost can measure.
    """
    if step_seconds < 0:
        return None
    speedup = policy.rank.speedup if isinstance(policy.rank, Budget) else None
    saving = left * step_seconds * (1 - 1 / (speedup or math.inf))
    matrices = [weight for weight in weights if weight.dim() > 1]
    takes = recompiling + _REWRITE_STEPS * step_seconds
    takes += _READING * sum(weight.numel() * min(weight.shape[0], weight[0].numel()) for weight in matrices)
    if times and isinstance(policy.cost, Measured):
        takes += _USED * min(policy.cost.budget, max(_MEASURING * left, _LEAST) * step_seconds)
    if saving > takes:
        return None
    most = f"a switch saves at most {saving:.3g} s in the {left} steps left"
    return f"{most}, and a plan and a rewrite take about {takes:.3g} s"


def pays_off(
    plan: Plan, seconds: Mapping[str, float], left: int, step_seconds: float, recompiling: float
) -> tuple[bool, str]:
    """Return whether a switch pays off in the steps that are left, and the sum in words.

    What the plan has taken is spent either way, so only what is still to be done counts: the rewrite, and compiling. Of the
    steps that are left only that gain counts which is sure.

    Args:
        plan: What would be switched, at least one site.
        seconds: Site -> modelled time as it is now, in seconds; used if the plan has no measured times.
        left: Steps that are left.
        step_seconds: Time of a step in seconds; negative if none was timed.
        recompiling: Time to compile the rewritten model, in seconds.
    """
    if step_seconds < 0:
        return left > 0, f"; {left} steps are left, and no step was timed yet"
    saving = left * _saved(plan, seconds, step_seconds)
    takes = recompiling + _REWRITE_STEPS * step_seconds
    takes += _REWRITING * sum(site.parameters_before * max(site.ranks or (0,)) for site in plan.factorized)
    words = f"saves {saving:.3g} s in the {left} steps left and still takes {takes:.3g} s"
    return saving > takes, f"; it {words}" if saving > takes else f"a switch {words}"


def _saved(plan: Plan, seconds: Mapping[str, float], step_seconds: float) -> float:
    """Return the seconds that each step would save: at least, as the plan predicts, or else from the sites' modelled times.

    The uncertainty of the prediction is taken off: what is lost by a switch that gains nothing is certain.
    """
    if all(site.seconds_after is not None for site in plan.factorized):
        return step_seconds - plan.predicted_seconds(step_seconds) * (1 + (plan.uncertainty or 0.0))
    total = sum(seconds.values())
    saved = sum(seconds.get(site.name, 0.0) * (1 - 1 / (site.gain or 1.0)) for site in plan.factorized)
    return step_seconds * (saved / total if total > 0 else 0.0)
