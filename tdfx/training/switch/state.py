"""The state of a ``Switch``: what later decisions depend on, and how it is saved and loaded."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch.optim import Optimizer

from tdfx.errors import OptimizerError, PolicyError
from tdfx.plans.plan import Plan, Reason
from tdfx.policies.former import is_text_of
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.text import without_addresses
from tdfx.training.methods.rewarm import Rewarm
from tdfx.training.switch.watch import RankWatch
from tdfx.training.switch.when import Settled, When

TIMED_STEPS = 101
"""How many of the last step times are kept, for their median."""

_FORMAT = 1


What = Literal["switched", "waiting", "kept", "too_late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchEvent:
    """One decision of a ``Switch``."""

    step: int
    """Training steps taken by then."""
    what: What
    """``"too_late"`` is kept since too few steps are left; ``"waiting"`` is only in states of earlier versions."""
    sites: tuple[str, ...]
    """The sites that the decision concerns."""
    why: str
    """The reason in words."""

    def __str__(self) -> str:
        named = ", ".join(site or "the model itself" for site in self.sites[:3])
        more = ", ..." if len(self.sites) > 3 else ""
        which = f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} ({named}{more})" if self.sites else "no site"
        return f"step {self.step}: {self.what.replace('_', ' ')}, {which}: {self.why}"


@dataclass(frozen=True, slots=True)
class SwitchState:
    """Everything that later decisions of a switch depend on. It is immutable, so that a failed step restores it."""

    next: int
    """The step at which something is decided next."""
    step: int = 0
    """Training steps so far."""
    done: bool = False
    plan: Plan | None = None
    events: tuple[SwitchEvent, ...] = ()
    times: tuple[float, ...] = ()
    """The times of the last steps in seconds."""
    latest: int = 0
    """The step up to which to wait for learning rates that rise."""
    rate: float | None = None
    """The largest learning rate at the step before, where a decision is near."""
    watch: RankWatch | None = None
    rewarms: tuple[Rewarm, ...] = ()

    def count(self, seconds: float | None = None) -> SwitchState:
        """Return the state after one more step, which took some time in seconds if that is known."""
        times = self.times if seconds is None else (*self.times, seconds)[-TIMED_STEPS:]
        return replace(self, step=self.step + 1, times=times)

    def wait_for_rates(self, optimizers: Sequence[Optimizer], steps: int) -> SwitchState:
        """Return the state with the decision put off by some steps if it is due and the learning rates rise."""
        if self.step < self.next - 1 or not self.latest:
            return self
        rate = max((float(group["lr"]) for each in optimizers for group in each.param_groups), default=None)
        rises = rate is not None and self.rate is not None and rate > self.rate
        waits = rises and self.next <= self.step < self.latest
        return replace(self, rate=rate, next=min(self.latest, self.step + steps) if waits else self.next)

    def record(self, what: What, sites: Sequence[str], why: str) -> SwitchState:
        """Return the state after one more decision."""
        event = SwitchEvent(step=self.step, what=what, sites=tuple(sites), why=why)
        return replace(self, events=(*self.events, event))

    def finish(self, plan: Plan) -> SwitchState:
        """Return the final state: sites without signal are kept, and all sites if the plan factorizes none."""
        state = replace(self, watch=None, done=True)
        if not plan.sites:
            state = state.record("kept", (), "the model has no convolution or linear layer")
        kept = [site for site in plan.kept if site.reason is Reason.NO_SIGNAL or not plan.factorized]
        for reason in dict.fromkeys(site.reason for site in kept):
            sites = [site for site in kept if site.reason is reason]
            note = f": {sites[0].note}" if sites[0].note else ""
            state = state.record("kept", [site.name for site in sites], f"{reason}{note}")
        return state

    def policy_for_rest(self, policy: Policy) -> Policy:
        """Return a policy for the sites that are still watched, if an earlier version of tdfx has switched the others."""
        if self.plan is None or self.watch is None:
            return policy
        return replace(policy, include=tuple(map(glob.escape, self.watch.sites)))

    def join_plan(self, plan: Plan) -> Plan:
        """Return one plan, counted from the dense model, for what an earlier version had switched and for another plan."""
        if self.plan is None:
            return plan
        switched = {site.name: site for site in self.plan.factorized}
        return replace(
            plan,
            sites=tuple(switched.get(site.name, site) for site in plan),
            other_parameters=self.plan.other_parameters,
            step_seconds=self.plan.step_seconds,
        )

    def to_dict(self, policy: Policy, when: When) -> dict[str, Any]:
        """Return the state with the settings of its switch, in plain types and tensors."""
        return {
            "format": _FORMAT,
            "policy": _repr(policy),
            "when": repr(when),
            "step": self.step,
            "done": self.done,
            "next": self.next,
            "plan": None if self.plan is None else self.plan.to_json(indent=None),
            "events": [{**asdict(event), "sites": list(event.sites)} for event in self.events],
            "times": list(self.times),
            "latest": self.latest,
            "rate": self.rate,
            "watch": None if self.watch is None else self.watch.state_dict(),
            "rewarms": [rewarm.state_dict() for rewarm in self.rewarms if not rewarm.done],
        }

    @classmethod
    def load(cls, saved: Any, policy: Policy, when: When, optimizers: Sequence[Optimizer]) -> SwitchState:
        """Return the state that ``to_dict`` saved, and start the re-warm-ups again that were under way."""
        if not isinstance(saved, Mapping) or saved.get("format") != _FORMAT:
            text = repr(saved)
            raise PolicyError(
                f"This is not the state of a Switch of this version: {text if len(text) < 80 else f'{text[:77]}...'}. Pass "
                f"what Switch.state_dict returned."
            )
        _check_same("policy", saved, _repr(policy), is_text_of(str(saved.get("policy")), policy))
        _check_same("when", saved, repr(when), saved.get("when") == repr(when))
        try:
            watch = saved["watch"]
            state = cls(
                next=int(saved["next"]),
                step=int(saved["step"]),
                done=bool(saved["done"]),
                plan=None if saved["plan"] is None else Plan.from_json(saved["plan"]),
                events=tuple(SwitchEvent(**{**event, "sites": tuple(event["sites"])}) for event in saved["events"]),
                times=tuple(map(float, saved["times"]))[-TIMED_STEPS:],
                latest=int(saved.get("latest", 0)),
                rate=saved.get("rate"),
                watch=RankWatch.of_state(when, watch) if isinstance(when, Settled) and watch is not None else None,
            )
            if state.plan is not None and not state.done and isinstance(policy.rank, Budget):
                state = state._end_budget(tuple(watch["sites"]))
            rewarms = list(saved["rewarms"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PolicyError(
                f"The state of this Switch is damaged ({type(error).__name__}: {error}). Pass what Switch.state_dict "
                f"returned, unchanged."
            ) from error
        return replace(state, rewarms=_start_rewarms(rewarms, optimizers))

    def _end_budget(self, sites: tuple[str, ...]) -> SwitchState:
        """Keep the other sites: a budget counts from the model as it is, and would be taken a second time."""
        why = "an earlier version of tdfx had switched other sites, and the rest of its budget cannot be told from the model"
        return replace(self.record("kept", sites, why), done=True, watch=None)


def _check_same(key: str, saved: Mapping[str, Any], setting: str, is_same: bool) -> None:
    if not is_same:
        raise PolicyError(
            f"The state was saved with {key}={saved.get(key)}, and this switch has {key}={setting}: it would decide "
            f"differently. Make the Switch with the same {key}, or start without the state."
        )


def _start_rewarms(states: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> tuple[Rewarm, ...]:
    if states and len(states) != len(optimizers):
        raise OptimizerError(
            f"A re-warm-up of {len(states)} optimizers was under way, and {len(optimizers)} are given. Pass the optimizers "
            f"that train the model: load_state_dict(state, optimizer=optimizer)."
        )
    rewarms: list[Rewarm] = []
    try:
        for state, optimizer in zip(states, optimizers, strict=False):
            rewarms.append(Rewarm(optimizer, state.get("steps", 0), start=state.get("start", 0)))
            rewarms[-1].load_state_dict(state)
    except Exception:
        for rewarm in rewarms:
            rewarm.remove()
        raise
    return tuple(rewarms)


def _repr(policy: Policy) -> str:
    """Return the repr of a policy without addresses, which differ between processes."""
    return without_addresses(repr(policy))
