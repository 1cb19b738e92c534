"""Change one setting of a policy, and of the overrides that give it themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tdfx.cost.modelled import Cost
from tdfx.policies.policy import Policy


def map_costs(policy: Policy, change: Callable[[Cost], Cost]) -> Policy:
    """Return a policy with its cost changed by a function, and every cost that an override gives itself."""
    return replace(_map_given(policy, change), cost=change(policy.cost))


def _map_given(policy: Policy, change: Callable[[Cost], Cost]) -> Policy:
    """Return a policy with all costs changed that it and its overrides do not leave out."""
    cost: dict[str, Any] = {} if "cost" in policy._left_out else {"cost": change(policy.cost)}
    overrides = {pattern: override and _map_given(override, change) for pattern, override in policy.overrides.items()}
    return replace(policy, overrides=overrides, **cost)
