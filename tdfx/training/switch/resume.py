"""The state of a ``Switch`` as it is saved, and the way back."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch.optim import Optimizer

from tdfx.errors import OptimizerError, PolicyError
from tdfx.plans.plan import Plan
from tdfx.policies.former import is_text_of
from tdfx.policies.policy import Policy
from tdfx.training.methods.rewarm import Rewarm
from tdfx.training.switch.events import SwitchEvent
from tdfx.training.switch.watch import RankWatch
from tdfx.training.switch.when import Settled, When

TIMES = 101
"""Step times that are kept for the median."""

_FORMAT = 1


def state_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return in plain types and tensors what the attributes of a switch say that later decisions depend on."""
    plan, watch = attributes["_plan"], attributes["_watch"]
    return {
        "format": _FORMAT,
        "policy": _named(attributes["policy"]),
        "when": repr(attributes["when"]),
        "step": attributes["_step"],
        "done": attributes["_done"],
        "next": attributes["_next"],
        "plan": None if plan is None else plan.to_json(indent=None),
        "events": [{**asdict(one), "sites": list(one.sites)} for one in attributes["_events"]],
        "seconds": dict(attributes["_seconds"]),
        "times": list(attributes["_times"]),
        "watch": None if watch is None else watch.state_dict(),
        "rewarms": [one.state_dict() for one in attributes["_rewarms"] if not one.done],
    }


def attributes_of(
    state: Mapping[str, Any], policy: Policy, when: When
) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Return the attributes of a switch for a state, and the states of the re-warm-ups that were under way.

    Raises:
        PolicyError: It is the state of something else, or of another policy or ``when``, or it is damaged.
    """
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
        raise PolicyError(
            f"This is not the state of a Switch of this version: {_short(state)}. Pass what Switch.state_dict returned."
        )
    is_same = {"policy": is_text_of(str(state.get("policy")), policy), "when": state.get("when") == repr(when)}
    for key, own in (("policy", _named(policy)), ("when", repr(when))):
        if not is_same[key]:
            raise PolicyError(
                f"The state was saved with {key}={state.get(key)}, and this switch has {key}={own}: it would decide "
                f"otherwise than the run it came from. Make the Switch with the same {key}, or start without the state."
            )
    try:
        return _attributes(state, when), list(state["rewarms"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PolicyError(
            f"The state of this Switch is damaged ({type(error).__name__}: {error}). Pass what Switch.state_dict "
            f"returned, unchanged."
        ) from error


def _attributes(state: Mapping[str, Any], when: When) -> dict[str, Any]:
    watch = state["watch"]
    return {
        "_step": int(state["step"]),
        "_done": bool(state["done"]),
        "_next": int(state["next"]),
        "_plan": None if state["plan"] is None else Plan.from_json(state["plan"]),
        "_events": tuple(SwitchEvent(**{**one, "sites": tuple(one["sites"])}) for one in state["events"]),
        "_seconds": {str(name): float(value) for name, value in state["seconds"].items()},
        "_times": deque(map(float, state["times"]), maxlen=TIMES),
        "_last": None,
        "_watch": RankWatch.of_state(when, watch) if isinstance(when, Settled) and watch is not None else None,
    }


def rewarms_of(states: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> list[Rewarm]:
    """Make the re-warm-ups that were under way.

    Raises:
        OptimizerError: There are not as many optimizers as there were.
    """
    if not states:
        return []
    if len(states) != len(optimizers):
        raise OptimizerError(
            f"A re-warm-up of {len(states)} optimizers was under way, and {len(optimizers)} are given. Pass those that "
            f"train the model: load_state_dict(state, optimizer=optimizer)."
        )
    made: list[Rewarm] = []
    try:
        for one, state in zip(optimizers, states, strict=True):
            made.append(Rewarm(one, state.get("steps", 0), start=state.get("start", 0)))
            made[-1].load_state_dict(state)
    except Exception:
        for rewarm in made:
            rewarm.remove()
        raise
    return made


def _named(policy: Policy) -> str:
    """Return a policy as it prints itself, without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(policy))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
