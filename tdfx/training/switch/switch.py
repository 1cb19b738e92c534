"""``Switch``: decides at each training step whether to go from dense to factorized training now.

The order of a decision is: is it time (``when``, ``watch``), what would be switched (a plan), does that pay off
(``pays_off``), rewrite, and record what was decided (``events``). ``resume`` saves and loads all of it.
"""

from __future__ import annotations

import inspect
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from tdfx.api import PlannedRewrite, plan_rewrite, rewrite
from tdfx.errors import OptimizerError, PolicyError, TdfxWarning, nearest
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Emit, Plan, Reason
from tdfx.plans.scalars import Writer, check_writer, log_plan
from tdfx.policies.policy import Policy
from tdfx.training.methods.rewarm import Rewarm, check_rates
from tdfx.training.switch.events import SwitchEvent, What
from tdfx.training.switch.pays_off import cap_measuring_time, pays_off
from tdfx.training.switch.resume import TIMES, attributes_of, join_plans, policy_for_rest, rewarms_of, state_of
from tdfx.training.switch.settings import check_settings
from tdfx.training.switch.watch import RankWatch, modelled_seconds, survey
from tdfx.training.switch.when import Settled, When
from tdfx.wrappers.unwrap import Unwrapped, unwrap

_PASSED_ON = frozenset(inspect.signature(rewrite).parameters) - {"model", "policy", "example_inputs", "optimizer"}
"""Arguments of ``rewrite`` that ``step`` passes on."""


class Switch:
    """Decides after each training step whether to factorize the model now, and does so.

    Call ``step`` once after each optimizer step, before the next backward, and go on with the model that it returns: the
    same object, except at the step that switches. There is one switch, for all sites together: what the policy keeps then,
    for example a site whose weight shows no signal, is kept for good.

    To resume, load the state, give a freshly built model the form that ``plan`` says, then load model and optimizer::

        switch.load_state_dict(saved["switch"], optimizer=optimizer)
        if switch.plan is not None:
            model = tdfx.rewrite(model, switch.plan, optimizer=optimizer)
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])

    Args:
        policy: What to rewrite and how far; ``Policy()`` for None.
        when: ``AtStep``, ``AtEpoch`` or ``Settled``.
        total_steps: Steps of the whole training. With it the model is switched only if that pays off: if the time that the
            plan is predicted to save in the steps that are left exceeds the time that the switch takes. Step times are
            measured. If the sites were measured, the plan predicts how much of a step it saves; otherwise this is their
            share of the sites' modelled time, as if nothing else took time. A switch is counted as the time that making the
            plan took plus ``recompile_seconds``. Measuring layers for the plan takes at most a hundredth of the time that is
            left, or the time of thirty steps; what is not measured is estimated.
        recompile_seconds: Time to compile or capture the rewritten model, in seconds.
        rewarm: Steps of a re-warm-up of the learning rates after the switch, see ``Rewarm``; 0 for none.
        writer: Where to log what the switch did, as ``tdfx.report.log_plan`` does, and the step time before it: a
            ``SummaryWriter``, or anything with ``add_scalar(tag, value, step)``. Pass it on one process only.
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
        writer: Writer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.policy = Policy() if policy is None else policy
        check_settings(self.policy, when, total_steps, recompile_seconds, rewarm)
        if writer is not None:
            check_writer(writer)
        self.when = when
        self.total_steps = total_steps
        self.recompile_seconds = recompile_seconds
        self.rewarm = rewarm
        self.writer = writer
        self._clock = clock
        self._step = 0
        self._done = False
        self._plan: Plan | None = None
        self._events: tuple[SwitchEvent, ...] = ()
        self._watch: RankWatch | None = None
        self._next = 1 if isinstance(when, Settled) else when.at
        self._times: deque[float] = deque(maxlen=TIMES)
        self._last: float | None = None
        self._rewarms: list[Rewarm] = []
        self._spent = {"watching": 0.0, "planning": 0.0, "rewriting": 0.0}

    @property
    def spent(self) -> dict[str, float]:
        """Seconds spent in this process so far: ``"watching"`` ranks, ``"planning"``, and ``"rewriting"``."""
        return dict(self._spent)

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        return self._step

    @property
    def done(self) -> bool:
        """True once the decision is made, and nothing will be switched any more."""
        return self._done

    @property
    def plan(self) -> Plan | None:
        """The plan of what was switched, from the dense model; None as long as nothing was."""
        return self._plan

    @property
    def events(self) -> tuple[SwitchEvent, ...]:
        """The decisions so far, earliest first."""
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
            optimizer: The optimizer that trains it, as for ``rewrite``.
            example_inputs: As for ``plan``; used at the steps at which something is decided.
            arguments: Passed on to ``rewrite``.

        Returns:
            The model to go on with.

        Raises:
            PolicyError: ``rewrite`` has no such argument.
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
                f"rewarm={self.rewarm} scales learning rates, and step() got no optimizer=. Pass the optimizer that trains "
                f"the model, or leave rewarm out."
            )
        if self._last is not None:
            self._times.append(now - self._last)
        self._step += 1
        if self._step >= self._next:
            before = self._before_step()
            try:
                model = self._decide(model, optimizer, example_inputs, arguments)
            except BaseException:
                vars(self).update(before)
                raise
        self._last = self._clock()
        return model

    def _before_step(self) -> dict[str, Any]:
        """Return the attributes that a failed step puts back."""
        times = deque(self._times, maxlen=TIMES)
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
        """Switch if it is time."""
        wrapped = unwrap(model)
        with wrapped.processes.raise_on_all():
            why: str | None = "the step that was asked for"
            if isinstance(self.when, Settled):
                why = self._look(self.when, wrapped, inputs, arguments.get("emit", "graph"))
            return model if why is None else self._switch(model, wrapped, why, optimizer, inputs, arguments)

    def _look(self, when: Settled, wrapped: Unwrapped, inputs: Inputs | None, emit: Emit) -> str | None:
        """Look at the stable ranks; return why it is time to switch, or None if it is not."""
        began = self._clock()
        if self._watch is None:
            self._watch = RankWatch.begin(when, survey(wrapped, self.policy, inputs, emit))
            if not self._watch.sites:
                self._say("kept", (), "the policy wants no site of the model that may be rewritten")
                self._done = True
                return None
        if self._step == 1 or self._step % self._watch.interval == 0:
            self._watch = self._watch.look(wrapped.model)
        timed_out = when.timeout is not None and self._step >= when.timeout
        total = len(self._watch.sites)
        settled = 0 if timed_out else cast("int", wrapped.processes.broadcast_object(len(self._watch.settled())))
        self._spend("watching", began)
        self._next = self._watch.next_look(self._step)
        if timed_out:
            return "the timeout"
        if 2 * settled < total:
            return None
        held = f"held within {when.tolerance:g} over {when.window} looks"
        return f"the stable rank{'s' * (settled != 1)} of {settled} of {total} sites {held}"

    def _switch(
        self,
        model: nn.Module,
        wrapped: Unwrapped,
        why: str,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        inputs: Inputs | None,
        arguments: dict[str, Any],
    ) -> nn.Module:
        """Plan, and switch if that pays off; whatever is kept now is kept for good."""
        emit: Emit = arguments.get("emit", "graph")
        began = self._clock()
        policy = self.policy
        if self._plan is not None and self._watch is not None:
            policy = policy_for_rest(policy, self._watch)
        step_seconds = statistics.median(self._times) if self._times else -1.0
        left = 0
        if self.total_steps is not None:
            left, step_seconds = wrapped.processes.broadcast_object(
                [max(0, self.total_steps - self._step), step_seconds]
            )
            policy = cap_measuring_time(policy, left, step_seconds)
        planned = plan_rewrite(
            model,
            policy,
            example_inputs=inputs,
            emit=emit,
            loop_seconds=step_seconds if step_seconds > 0 else None,
        )
        plan = planned.plan
        planning = wrapped.processes.broadcast_object(self._clock() - began)
        self._spend("planning", began)
        pays, verdict = True, ""
        if self.total_steps is not None and plan.factorized:
            # All arguments are the same on all processes.
            seconds = modelled_seconds(self.policy, planned.program)
            pays, verdict = pays_off(plan, seconds, left, step_seconds, planning, self.recompile_seconds)
        names = [site.name for site in plan.factorized]
        if names and pays:
            model = self._rewrite(planned, optimizer, arguments)
            self._say("switched", names, f"{why}{verdict}")
        elif names:
            self._say("too_late", names, verdict)
        self._say_kept(plan)
        self._watch = None
        self._done = True
        return model

    def _rewrite(
        self,
        planned: PlannedRewrite,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        arguments: dict[str, Any],
    ) -> nn.Module:
        """Rewrite the model, start the re-warm-up, and log."""
        passed = {key: value for key, value in arguments.items() if key != "emit"}
        optimizers = as_optimizers(optimizer) if self.rewarm else ()
        for each in optimizers:
            # After the rewrite it would be too late to fail.
            check_rates(each)
        began = self._clock()
        model = planned.apply(optimizer=optimizer, **passed)
        self._spend("rewriting", began)
        if self.rewarm:
            for rewarm in self._rewarms:
                rewarm.remove()
            self._rewarms = [Rewarm(each, self.rewarm) for each in optimizers]
        self._plan = join_plans(self._plan, replace(planned.plan, policy=repr(self.policy)))
        self._log(self._plan)
        return model

    def _say_kept(self, plan: Plan) -> None:
        """Record which sites are kept: those without signal, and all of them if the plan factorizes none."""
        if not plan.sites:
            self._say("kept", (), "the model has no convolution or linear layer")
        kept = [site for site in plan.kept if site.reason is Reason.NO_SIGNAL or not plan.factorized]
        for reason in dict.fromkeys(site.reason for site in kept):
            sites = [site for site in kept if site.reason is reason]
            note = f": {sites[0].note}" if sites[0].note else ""
            self._say("kept", [site.name for site in sites], f"{reason}{note}")

    def _log(self, plan: Plan) -> None:
        """Log the switch; a logger that fails must not undo it, since the optimizer was changed too."""
        if self.writer is None:
            return
        try:
            log_plan(self.writer, plan, self._step)
            if self._times:
                self.writer.add_scalar("tdfx/step_ms_before_switch", 1e3 * statistics.median(self._times), self._step)
        except Exception as error:  # of whatever class the logger has
            warnings.warn(f"The switch at step {self._step} was not logged: {error!r}.", TdfxWarning, stacklevel=2)

    def _spend(self, what: str, began: float) -> None:
        self._spent = {**self._spent, what: self._spent[what] + self._clock() - began}

    def _say(self, what: What, sites: Sequence[str], why: str) -> None:
        self._events = (*self._events, SwitchEvent(step=self._step, what=what, sites=tuple(sites), why=why))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later decisions depend on, in plain types and tensors."""
        return state_of(vars(self))

    def load_state_dict(
        self, state: Mapping[str, Any], *, optimizer: Optimizer | Sequence[Optimizer] | None = None
    ) -> None:
        """Go on from a state; later decisions are the same as in a run without interruption.

        Args:
            state: What ``state_dict`` returned.
            optimizer: The optimizer that trains the model; needed if a re-warm-up was under way.

        Raises:
            PolicyError: It is no state of a switch, or one with another policy or ``when``. Then nothing was loaded.
            OptimizerError: A re-warm-up was under way, and another number of optimizers is given.
        """
        attributes, states = attributes_of(state, self.policy, self.when)
        rewarms = rewarms_of(states, as_optimizers(optimizer))
        for rewarm in self._rewarms:
            rewarm.remove()
        vars(self).update(attributes, _rewarms=rewarms)

    def __str__(self) -> str:
        head = f"Switch(when={self.when!r}): {self._step} steps, {'done' if self._done else 'waiting'}"
        return "\n".join([head, *(f"  {event}" for event in self._events)])
