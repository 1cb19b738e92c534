"""A budget that is kept in several switches, each of some sites."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tdfx.plans.plan import Plan, Reason
from tdfx.policies.changes import replace_budget
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget

_NOTHING = Budget(parameters=1.0)
"""A budget that every model keeps as it is."""
_DONE = 0.99
"""From this part of a share on there is nothing left to do."""


def left_of(policy: Policy, switched: Plan | None, seconds: Mapping[str, float]) -> Policy:
    """Return a policy of which earlier switches have done a part; one without a budget stays as it is.

    Args:
        policy: For the model as it was at first.
        switched: What was switched so far, with what the whole model had before and has after; None for nothing.
        seconds: The modelled time of each site as it is now, in seconds; what counts where no step was measured.
    """
    budget = policy.rank
    if not isinstance(budget, Budget) or switched is None:
        return policy
    have = switched.speedup or _modelled_speedup(switched, seconds)
    limits: dict[str, Any] = {name: _left(name, value, switched, have) for name, value in budget.limits.items()}
    is_kept = all(value is None for value in limits.values())
    # Weights have changed since the first plan: what is out of reach by now must not stop a run.
    rank = _NOTHING if is_kept else replace(budget, **limits, strict=False)
    return replace_budget(policy, rank)


def _left(name: str, value: float, switched: Plan, have: float) -> float | None:
    """Return one budget for the model as it is now, None where it is kept already."""
    if name == "speedup":
        return value / have if value * _DONE > have else None
    if name == "seconds" or isinstance(value, int) or value > 1:
        return value
    beside = switched.other_parameters if name == "parameters" else 0
    before, after = (
        beside + sum(getattr(one, f"{name}_{when}") or 0 for one in switched) for when in ("before", "after")
    )
    share = value * before / after if after else 1.0
    return share if share < _DONE else None


def _modelled_speedup(switched: Plan, seconds: Mapping[str, float]) -> float:
    gains = {one.name: one.gain or 1.0 for one in switched.factorized}
    now = sum(seconds.values())
    return sum(own * gains.get(name, 1.0) for name, own in seconds.items()) / now if now > 0 else 1.0


def only(plan: Plan, names: Collection[str]) -> Plan:
    """Return a plan that leaves all sites but some as they are."""
    sites = tuple(
        one
        if one.name in names or not one.factorized
        else replace(
            one,
            scheme=None,
            ranks=None,
            reason=Reason.EXCLUDED,
            note="its rank has not settled yet",
            parameters_after=one.parameters_before,
            flops_after=one.flops_before,
            memory_after=one.memory_before,
            seconds_after=one.seconds_before,
            gain=None,
            error=None,
        )
        for one in plan
    )
    return replace(plan, sites=sites)
