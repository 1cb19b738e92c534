"""The state of a ``Switch``: saving it, and going on from it."""

from __future__ import annotations

import glob
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch.optim import Optimizer

from tdfx.errors import OptimizerError, PolicyError
from tdfx.plans.plan import Plan
from tdfx.policies.former import is_text_of
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.training.methods.rewarm import Rewarm
from tdfx.training.switch.events import SwitchEvent
from tdfx.training.switch.watch import RankWatch
from tdfx.training.switch.when import Settled, When

TIMES = 101
"""How many of the last step times are kept, for their median."""

_FORMAT = 1

_KEPT_BY_BUDGET = (
    "an earlier version of tdfx had switched other sites, and the rest of its budget cannot be told from the model"
)


def state_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a switch that later decisions depend on, in plain types and tensors."""
    plan, watch = attributes["_plan"], attributes["_watch"]
    return {
        "format": _FORMAT,
        "policy": _repr(attributes["policy"]),
        "when": repr(attributes["when"]),
        "step": attributes["_step"],
        "done": attributes["_done"],
        "next": attributes["_next"],
        "plan": None if plan is None else plan.to_json(indent=None),
        "events": [{**asdict(event), "sites": list(event.sites)} for event in attributes["_events"]],
        "times": list(attributes["_times"]),
        "watch": None if watch is None else watch.state_dict(),
        "rewarms": [rewarm.state_dict() for rewarm in attributes["_rewarms"] if not rewarm.done],
    }


def attributes_of(
    state: Mapping[str, Any], policy: Policy, when: When
) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Return the attributes of a switch from its state, and the states of the re-warm-ups that were under way.

    Raises:
        PolicyError: It is no state of a switch, or one with another policy or ``when``, or it is damaged.
    """
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        raise PolicyError(
            f"This is not the state of a Switch of this version: {_short(state)}. Pass what Switch.state_dict returned."
        )
    is_same = {"policy": is_text_of(str(state.get("policy")), policy), "when": state.get("when") == repr(when)}
    for key, setting in (("policy", _repr(policy)), ("when", repr(when))):
        if not is_same[key]:
            raise PolicyError(
                f"The state was saved with {key}={state.get(key)}, and this switch has {key}={setting}: it would decide "
                f"differently. Make the Switch with the same {key}, or start without the state."
            )
    try:
        return _attributes(state, policy, when), list(state["rewarms"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PolicyError(
            f"The state of this Switch is damaged ({type(error).__name__}: {error}). Pass what Switch.state_dict "
            f"returned, unchanged."
        ) from error


def _attributes(state: Mapping[str, Any], policy: Policy, when: When) -> dict[str, Any]:
    watch = state["watch"]
    attributes: dict[str, Any] = {
        "_step": int(state["step"]),
        "_done": bool(state["done"]),
        "_next": int(state["next"]),
        "_plan": None if state["plan"] is None else Plan.from_json(state["plan"]),
        "_events": tuple(SwitchEvent(**{**event, "sites": tuple(event["sites"])}) for event in state["events"]),
        "_times": deque(map(float, state["times"]), maxlen=TIMES),
        "_last": None,
        "_watch": RankWatch.of_state(when, watch) if isinstance(when, Settled) and watch is not None else None,
    }
    if attributes["_plan"] is not None and not attributes["_done"] and isinstance(policy.rank, Budget):
        # A budget counts from the model as it is, and would be taken a second time from what was switched already.
        event = SwitchEvent(step=attributes["_step"], what="kept", sites=tuple(watch["sites"]), why=_KEPT_BY_BUDGET)
        attributes |= {"_done": True, "_watch": None, "_events": (*attributes["_events"], event)}
    return attributes


def policy_for_rest(policy: Policy, watch: RankWatch) -> Policy:
    """Return a policy for the sites that are still watched after an earlier version has switched the others."""
    return replace(policy, include=tuple(glob.escape(name) for name in watch.sites))


def join_plans(earlier: Plan | None, plan: Plan) -> Plan:
    """Return one plan, counted from the dense model, for what an earlier version had switched and what is switched now."""
    if earlier is None:
        return plan
    switched = {site.name: site for site in earlier.factorized}
    return replace(
        plan,
        sites=tuple(switched.get(site.name, site) for site in plan),
        other_parameters=earlier.other_parameters,
        step_seconds=earlier.step_seconds,
    )


def rewarms_of(states: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> list[Rewarm]:
    """Start the re-warm-ups again that were under way.

    Raises:
        OptimizerError: The number of optimizers is another one.
    """
    if not states:
        return []
    if len(states) != len(optimizers):
        raise OptimizerError(
            f"A re-warm-up of {len(states)} optimizers was under way, and {len(optimizers)} are given. Pass the optimizers "
            f"that train the model: load_state_dict(state, optimizer=optimizer)."
        )
    rewarms: list[Rewarm] = []
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            rewarms.append(Rewarm(optimizer, state.get("steps", 0), start=state.get("start", 0)))
            rewarms[-1].load_state_dict(state)
    except Exception:
        for rewarm in rewarms:
            rewarm.remove()
        raise
    return rewarms


def _repr(policy: Policy) -> str:
    """Return the repr of a policy without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(policy))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
