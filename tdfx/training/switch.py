"""When to switch from dense to factorized training: one call for each training step, whose state can be saved."""

from __future__ import annotations

import glob
import inspect
import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

from torch import nn
from torch.optim import Optimizer

from tdfx.api import plan as make_plan
from tdfx.api import rewrite
from tdfx.errors import OptimizerError, PolicyError, nearest
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.observe import Inputs
from tdfx.plan import Emit, Plan, Reason
from tdfx.policy import Policy
from tdfx.training.rewarm import Rewarm, check_rates
from tdfx.training.watch import Survey, Watch, survey
from tdfx.training.when import Settled, When, check_whole, is_number
from tdfx.wrappers import Wrapped, unwrap

_FORMAT = 1
_TIMES = 101
"""Step times that are kept for the median."""

_OWN = ("model", "policy", "example_inputs", "optimizer")
_PASSED_ON = frozenset(inspect.signature(rewrite).parameters) - {*_OWN}
"""Arguments of ``rewrite`` that ``step`` passes on."""

What = Literal["switched", "waiting", "kept", "too_late"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchEvent:
    """One thing that a ``Switch`` decided."""

    step: int
    """Training steps taken by then."""
    what: What
    """``"switched"``; ``"waiting"``, to be asked again later; ``"kept"`` for good; ``"too_late"``, kept since too few steps
    are left for a switch to pay."""
    sites: tuple[str, ...]
    """The sites it concerns."""
    why: str
    """The reason in words."""

    def __str__(self) -> str:
        named = ", ".join(one or "the model itself" for one in self.sites[:3]) + (
            ", ..." if len(self.sites) > 3 else ""
        )
        which = f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} ({named})" if self.sites else "no site"
        return f"step {self.step}: {self.what.replace('_', ' ')}, {which}: {self.why}"


class Switch:
    """Decides after each training step whether to factorize the model now, and does it.

    Call ``step`` once after each optimizer step, before the next backward, and go on with the model that it returns: the
    same object, but for the few steps that switch. Where sites switch at different steps, a later switch leaves the
    earlier ones as they are. A rule that sees all sites at once, such as ``Target``, then sees those that switch together.

    To resume, load the state, give a freshly built model the form that ``plan`` says, then load model and optimizer::

        switch.load_state_dict(saved["switch"], optimizer=optimizer)
        if switch.plan is not None:
            model = tdfx.rewrite(model, switch.plan, optimizer=optimizer)
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])

    Args:
        policy: What to rewrite and how far; ``Policy()`` for None.
        when: ``AtStep``, ``AtEpoch`` or ``Settled``.
        total_steps: Steps of the whole training. With it a switch is weighed: what it is predicted to save in the steps
            that are left against what it takes. Step times are measured; which part of a step a plan saves is the part
            of the sites' modelled time, as if nothing else took time. What a switch takes is counted as twice the time of
            making the plan, since the rewrite does that work again, and ``recompile_seconds``.
        recompile_seconds: What compiling the model again takes, or capturing it, in seconds.
        rewarm: Steps of a re-warm-up of the learning rates after each switch, see ``Rewarm``; 0 for none.
        clock: Returns the time in seconds.

    Raises:
        PolicyError: A setting is out of range.

    Example:
        >>> import tdfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> policy = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
        >>> switch = tdfx.Switch(policy, when=tdfx.AtStep(2))
        >>> for _ in range(3):
        ...     model = switch.step(model)
        >>> print(switch)
        Switch(when=AtStep(step=2)): 3 steps, done
          step 2: switched, 1 site (0): the step that was asked for
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        when: When,
        total_steps: int | None = None,
        recompile_seconds: float = 0.0,
        rewarm: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.policy = Policy() if policy is None else policy
        if not isinstance(self.policy, Policy):
            raise PolicyError(
                f"policy={policy!r} is a {type(policy).__name__}: it says what to rewrite once it is time, which a plan "
                f"made now could not know. Pass tdfx.Policy(rank=...)."
            )
        if not isinstance(when, get_args(When)):
            raise PolicyError(
                f"when={when!r} does not say when to switch. Pass for example when=tdfx.AtStep(500) or "
                f"when=tdfx.Settled(timeout=20_000)."
            )
        if total_steps is not None:
            check_whole("total_steps", total_steps, "the steps of the whole training", "total_steps=10_000")
        if not (is_number(recompile_seconds) and 0 <= recompile_seconds < math.inf):
            raise PolicyError(
                f"recompile_seconds={recompile_seconds!r} is not a time of at least 0: it is what compiling the rewritten "
                f"model takes, in seconds. Leave it out where nothing is compiled."
            )
        if rewarm != 0:
            check_whole("rewarm", rewarm, "the steps of the re-warm-up, or 0 for none", "rewarm=200")
        self.when = when
        self.total_steps = total_steps
        self.recompile_seconds = recompile_seconds
        self.rewarm = rewarm
        self._clock = clock
        self._step = 0
        self._done = False
        self._plan: Plan | None = None
        self._events: tuple[SwitchEvent, ...] = ()
        self._seconds: dict[str, float] = {}
        self._watch: Watch | None = None
        self._next = 1 if isinstance(when, Settled) else when.at
        self._times: deque[float] = deque(maxlen=_TIMES)
        self._last: float | None = None
        self._rewarms: list[Rewarm] = []

    @property
    def done(self) -> bool:
        """True once nothing will be switched any more."""
        return self._done

    @property
    def plan(self) -> Plan | None:
        """All that was switched so far, from the dense model; None as long as nothing was."""
        return self._plan

    @property
    def events(self) -> tuple[SwitchEvent, ...]:
        """What was decided so far, earliest first."""
        return self._events

    def step(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        example_inputs: Inputs | None = None,
        **arguments: Any,
    ) -> nn.Module:
        """Count a training step, and switch if it is time.

        Args:
            model: The model in training.
            optimizer: What trains it, as for ``rewrite``.
            example_inputs: As for ``plan``; used at the steps that decide.
            arguments: Passed on to ``rewrite``.

        Returns:
            The model to go on with.

        Raises:
            PolicyError: An argument is none that ``rewrite`` has.
            OptimizerError: A re-warm-up was asked for, and there is no optimizer.
            ModelError, InputError, WeightError: As for ``plan`` and ``rewrite``. Then nothing was changed or counted.
        """
        if self._done:
            self._step += 1
            return model
        now = self._clock()
        if arguments and not arguments.keys() <= _PASSED_ON:
            unknown = sorted(arguments.keys() - _PASSED_ON)[0]
            raise PolicyError(
                f"step() got {unknown!r}, which tdfx.rewrite does not take. Nearest: {nearest(unknown, _PASSED_ON)}."
            )
        if self.rewarm and optimizer is None:
            raise OptimizerError(
                f"rewarm={self.rewarm} is to scale learning rates, and step() got no optimizer=. Pass the optimizer that "
                f"trains the model, or leave rewarm out."
            )
        if self._last is not None:
            self._times.append(now - self._last)
        self._step += 1
        if self._step >= self._next:
            before = self._remembered()
            try:
                model = self._decide(model, optimizer, example_inputs, arguments)
            except BaseException:
                vars(self).update(before)
                raise
        self._last = self._clock()
        return model

    def _remembered(self) -> dict[str, Any]:
        """Return what a failed step has to put back."""
        times = deque(self._times, maxlen=_TIMES)
        if self._last is not None:
            times.pop()
        return {**vars(self), "_step": self._step - 1, "_times": times, "_last": None}

    def _decide(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        inputs: Inputs | None,
        arguments: dict[str, Any],
    ) -> nn.Module:
        wrapped = unwrap(model)
        emit: Emit = arguments.get("emit", "graph")
        if not isinstance(self.when, Settled):
            return self._switch(model, wrapped, None, optimizer, inputs, arguments)
        if self._watch is None:
            found = self._surveyed(wrapped, inputs, emit)
            sites = Watch.begin(self.when, found)
            self._watch = sites
            if not sites.sites:
                self._say("kept", (), "the policy wants no site of the model that may be rewritten")
                self._done = True
                return model
        timeout = self.when.timeout
        late = timeout is not None and self._step >= timeout
        if self._step == 1 or self._step % self._watch.interval == 0:
            self._watch = self._watch.look(wrapped.model)
        names = list(self._watch.sites) if late else cast("list[str]", wrapped.agree(self._watch.ripe()))
        if names:
            model = self._switch(model, wrapped, names, optimizer, inputs, arguments, final=late)
        self._next = self._watch.next_look(self._step)
        return model

    def _surveyed(self, wrapped: Wrapped, inputs: Inputs | None, emit: Emit) -> Survey:
        found = survey(wrapped.model, self.policy, inputs, emit)
        self._seconds = found.seconds
        return found

    def _switch(
        self,
        model: nn.Module,
        wrapped: Wrapped,
        names: Sequence[str] | None,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        inputs: Inputs | None,
        arguments: dict[str, Any],
        *,
        final: bool = True,
    ) -> nn.Module:
        """Plan for some sites, or for all; switch those for which that is worth it; say what becomes of the others."""
        emit: Emit = arguments.get("emit", "graph")
        began = self._clock()
        policy = self.policy
        if names is not None:
            policy = replace(policy, include=tuple(glob.escape(name) for name in names))
        made = make_plan(model, policy, example_inputs=inputs, emit=emit)
        numbers = [self._clock() - began, statistics.median(self._times) if self._times else -1.0]
        text, planning, step_seconds = wrapped.agree([made.to_json(indent=None), *numbers])
        made = Plan.from_json(text)
        if self.total_steps is not None and not self._seconds:
            self._surveyed(wrapped, inputs, emit)
        pays, verdict = self._weigh(made, planning, step_seconds)
        switched = made.factorized if pays else ()
        if switched:
            passed = {key: value for key, value in arguments.items() if key != "emit"}
            for one in as_optimizers(optimizer) if self.rewarm else ():
                # After the rewrite it would be too late to fail.
                check_rates(one)
            model = rewrite(model, made, optimizer=optimizer, **passed)
            self._start_rewarm(optimizer)
            self._note(made)
        why = self._why(final and names is not None)
        if switched:
            self._say("switched", [one.name for one in switched], f"{why}{verdict}")
        elif made.factorized:
            self._say("too_late", [one.name for one in made.factorized], verdict)
        self._dispose(made, names, final)
        return model

    def _dispose(self, made: Plan, names: Sequence[str] | None, final: bool) -> None:
        """Say what becomes of the sites that the plan keeps, and whether any still waits."""
        asked = [one for one in made.kept if names is None or one.name in names]
        waiting = [one.name for one in asked if one.reason is Reason.NO_SIGNAL] if not final else []
        if waiting:
            self._say("waiting", waiting, "no signal above the noise yet")
        for reason in dict.fromkeys(one.reason for one in asked if one.name not in waiting):
            of = [one for one in asked if one.reason is reason and one.name not in waiting]
            # A site that was left out from the start is no news, unless nothing at all was done.
            if names is not None or not made.factorized or reason is Reason.NO_SIGNAL:
                self._say("kept", [one.name for one in of], f"{reason}" + (f": {of[0].note}" if of[0].note else ""))
        if names is None:
            if not made.sites:
                self._say("kept", (), "the model has no convolution or linear layer")
            self._done = True
            return
        assert self._watch is not None
        self._watch = self._watch.without([name for name in names if name not in waiting], waiting)
        self._done = not self._watch.sites

    def _weigh(self, made: Plan, planning: float, step_seconds: float) -> tuple[bool, str]:
        """Return whether a switch pays in the steps that are left, and the sum in words."""
        if self.total_steps is None or not made.factorized:
            return True, ""
        left = max(0, self.total_steps - self._step)
        if step_seconds < 0:
            return left > 0, f"; {left} steps are left, and no step was timed yet"
        total = sum(self._seconds.values())
        saved = sum(self._seconds.get(one.name, 0.0) * (1 - 1 / (one.gain or 1.0)) for one in made.factorized)
        saving = left * step_seconds * (saved / total if total > 0 else 0.0)
        takes = 2 * planning + self.recompile_seconds
        sums = f"saves {saving:.3g} s in the {left} steps left and takes {takes:.3g} s"
        return saving > takes, f"; it {sums}" if saving > takes else f"a switch {sums}"

    def _why(self, timed_out: bool) -> str:
        if not isinstance(self.when, Settled):
            return "the step that was asked for"
        if timed_out:
            return "the timeout"
        return f"its stable rank held within {self.when.tolerance:g} over {self.when.window} looks"

    def _note(self, made: Plan) -> None:
        """Remember what was switched: in the plan, and in how long the sites take now."""
        earlier = {} if self._plan is None else {one.name: one for one in self._plan.factorized}
        dense = self._plan or made
        whole = tuple(earlier.get(one.name, one) for one in made)
        self._plan = replace(made, sites=whole, other_parameters=dense.other_parameters, policy=repr(self.policy))
        for one in made.factorized:
            if one.name in self._seconds and one.gain:
                self._seconds = {**self._seconds, one.name: self._seconds[one.name] / one.gain}
        # Steps take another time from now on.
        self._times = deque(maxlen=_TIMES)

    def _start_rewarm(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> None:
        if self.rewarm:
            for one in self._rewarms:
                one.remove()
            self._rewarms = [Rewarm(one, self.rewarm) for one in as_optimizers(optimizer)]

    def _say(self, what: What, sites: Sequence[str], why: str) -> None:
        self._events = (*self._events, SwitchEvent(step=self._step, what=what, sites=tuple(sites), why=why))

    def state_dict(self) -> dict[str, Any]:
        """Return all that later decisions depend on, in plain types and tensors."""
        return {
            "format": _FORMAT,
            "policy": _named(self.policy),
            "when": repr(self.when),
            "step": self._step,
            "done": self._done,
            "next": self._next,
            "plan": None if self._plan is None else self._plan.to_json(indent=None),
            "events": [{**asdict(one), "sites": list(one.sites)} for one in self._events],
            "seconds": dict(self._seconds),
            "times": list(self._times),
            "watch": None if self._watch is None else self._watch.state_dict(),
            "rewarms": [one.state_dict() for one in self._rewarms if not one.done],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], *, optimizer: Optimizer | Sequence[Optimizer] | None = None
    ) -> None:
        """Go on from what ``state_dict`` gave; later decisions are those of the run that was not interrupted.

        Args:
            state: What ``state_dict`` returned.
            optimizer: What trains the model; needed where a re-warm-up was under way.

        Raises:
            PolicyError: It is the state of something else, or of another policy or ``when``. Then nothing was loaded.
            OptimizerError: A re-warm-up was under way, and not as many optimizers are given as then.
        """
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise PolicyError(
                f"This is not the state of a Switch of this version: {_short(state)}. Pass what Switch.state_dict returned."
            )
        for key, own in (("policy", _named(self.policy)), ("when", repr(self.when))):
            if state.get(key) != own:
                raise PolicyError(
                    f"The state was saved with {key}={state.get(key)}, and this switch has {key}={own}: it would decide "
                    f"otherwise than the run it came from. Make the Switch with the same {key}, or start without the state."
                )
        try:
            events = [SwitchEvent(**{**one, "sites": tuple(one["sites"])}) for one in state["events"]]
            values: dict[str, Any] = {
                "_step": int(state["step"]),
                "_done": bool(state["done"]),
                "_next": int(state["next"]),
                "_plan": None if state["plan"] is None else Plan.from_json(state["plan"]),
                "_events": tuple(events),
                "_seconds": {str(name): float(value) for name, value in state["seconds"].items()},
                "_times": deque(map(float, state["times"]), maxlen=_TIMES),
                "_last": None,
                "_watch": None,
            }
            if isinstance(self.when, Settled) and state["watch"] is not None:
                values["_watch"] = Watch.of_state(self.when, state["watch"])
            warming = list(state["rewarms"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PolicyError(
                f"The state of this Switch is damaged ({type(error).__name__}: {error}). Pass what Switch.state_dict "
                f"returned, unchanged."
            ) from error
        rewarms = self._rewarmed(warming, as_optimizers(optimizer))
        for one in self._rewarms:
            one.remove()
        vars(self).update(values, _rewarms=rewarms)

    def _rewarmed(self, states: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> list[Rewarm]:
        """Make the re-warm-ups that were under way."""
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

    def __str__(self) -> str:
        head = f"Switch(when={self.when!r}): {self._step} steps, {'done' if self._done else 'waiting'}"
        return "\n".join([head, *(f"  {one}" for one in self._events)])


def _named(policy: Policy) -> str:
    """Return a policy as it prints itself, without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(policy))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
