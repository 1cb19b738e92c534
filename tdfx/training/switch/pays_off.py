"""Whether a switch pays: what it is predicted to save in the steps that are left, against what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tdfx.cost.measured import Measured
from tdfx.plans.plan import Plan
from tdfx.policies.changes import map_costs
from tdfx.policies.policy import Policy

_MEASURING = 0.01
"""Part of what is left of a training that measuring for it may take."""
_LEAST = 30
"""Steps in whose time the layers of most models are measured; with much less, what is planned is mostly guessed."""


def cap_measuring_time(policy: Policy, left: int, step_seconds: float) -> Policy:
    """Return a policy that measures for no longer than is in proportion to the training that it serves.

    That is a hundredth of what is left of it, but as long as a few steps in any case.

    Args:
        policy: Its own limit stays where that is less.
        left: Steps.
        step_seconds: What a step takes, in seconds; negative where none was timed, which leaves the policy as it is.
    """
    most = max(_MEASURING * left, _LEAST) * step_seconds
    if most <= 0:
        return policy
    return map_costs(
        policy, lambda cost: replace(cost, budget=most) if isinstance(cost, Measured) and cost.budget > most else cost
    )


def pays_off(
    made: Plan, seconds: Mapping[str, float], left: int, step_seconds: float, planning: float, recompiling: float
) -> tuple[bool, str]:
    """Return whether a switch pays in the steps that are left, and the sum in words.

    Args:
        made: What would be switched, at least one site.
        seconds: The modelled time of every site as it is, in seconds; what counts where the plan has no measured times.
        left: Steps.
        step_seconds: What a step takes, in seconds; negative where none was timed.
        planning: What making the plan took, in seconds; the rewrite does that work again.
        recompiling: What compiling the rewritten model takes, in seconds.
    """
    if step_seconds < 0:
        return left > 0, f"; {left} steps are left, and no step was timed yet"
    saving = left * _saved(made, seconds, step_seconds)
    takes = 2 * planning + recompiling
    sums = f"saves {saving:.3g} s in the {left} steps left and takes {takes:.3g} s"
    return saving > takes, f"; it {sums}" if saving > takes else f"a switch {sums}"


def _saved(made: Plan, seconds: Mapping[str, float], step_seconds: float) -> float:
    """Return what each step would save, in seconds: as the plan predicts, or the part of the sites' modelled time."""
    if all(one.seconds_after is not None for one in made.factorized):
        return step_seconds - made.predicted_seconds(step_seconds)
    total = sum(seconds.values())
    saved = sum(seconds.get(one.name, 0.0) * (1 - 1 / (one.gain or 1.0)) for one in made.factorized)
    return step_seconds * (saved / total if total > 0 else 0.0)
