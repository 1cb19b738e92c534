"""Change one setting of a policy, and of the overrides that give it themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tdfx.cost.modelled import Cost
from tdfx.policies.policy import Policy


def map_costs(policy: Policy, change: Callable[[Cost], Cost]) -> Policy:
    """Return a policy with its cost changed, and every cost that an override gives itself.

    Args:
        policy: It stays as it is.
        change: Takes a cost and returns the one to use in its place.
    """
    return replace(policy, cost=change(policy.cost), overrides=_map_given(policy.overrides, "cost", change))


def _map_given(
    overrides: Mapping[str, Policy | None], name: str, change: Callable[[Any], Any]
) -> dict[str, Policy | None]:
    """Return overrides with one setting changed in those that give it themselves."""
    changed: dict[str, Policy | None] = {}
    for pattern, override in overrides.items():
        if override is None:
            changed[pattern] = None
            continue
        settings = {} if name in override._left_out else {name: change(getattr(override, name))}
        changed[pattern] = replace(override, overrides=_map_given(override.overrides, name, change), **settings)
    return changed
