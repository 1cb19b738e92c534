"""When to switch from dense to factorized training: one call for each training step, whose state can be saved."""

from __future__ import annotations

import glob
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

from tdfx.api import plan as make_plan
from tdfx.api import rewrite
from tdfx.errors import OptimizerError, PolicyError, TdfxWarning, nearest
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.analysis.observe import Inputs
from tdfx.plans.plan import Emit, Plan
from tdfx.plans.scalars import Writer, check_writer, log_plan
from tdfx.policies.policy import Policy
from tdfx.ranks.budget import Budget
from tdfx.training.methods.rewarm import Rewarm, check_rates
from tdfx.training.switch.events import SwitchEvent, What
from tdfx.training.switch.instalments import left_of, only
from tdfx.training.switch.outcome import Outcome
from tdfx.training.switch.pays_off import cap_measuring_time, pays_off
from tdfx.training.switch.resume import TIMES, attributes_of, rewarms_of, state_of
from tdfx.training.switch.settings import check_settings
from tdfx.training.switch.watch import RankWatch, Survey, survey
from tdfx.training.switch.when import Settled, When
from tdfx.wrappers.unwrap import Wrapped, unwrap

_OWN = ("model", "policy", "example_inputs", "optimizer")
_PASSED_ON = frozenset(inspect.signature(rewrite).parameters) - {*_OWN}
"""Arguments of ``rewrite`` that ``step`` passes on."""


class Switch:
    """Decides after each training step whether to factorize the model now, and does it.

    Call ``step`` once after each optimizer step, before the next backward, and go on with the model that it returns: the
    same object, but for the few steps that switch. Where sites switch at different steps, a later switch leaves the
    earlier ones as they are. A budget is for the whole model still: each site gets what is best for it in a plan for all
    that are left, and one that is not needed is asked again with the next that settles.

    To resume, load the state, give a freshly built model the form that ``plan`` says, then load model and optimizer::

        switch.load_state_dict(saved["switch"], optimizer=optimizer)
        if switch.plan is not None:
            model = tdfx.rewrite(model, switch.plan, optimizer=optimizer)
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])

    Args:
        policy: What to rewrite and how far; ``Policy()`` for None.
        when: ``AtStep``, ``AtEpoch`` or ``Settled``.
        total_steps: Steps of the whole training. With it a switch is weighed: what it is predicted to save in the steps
            that are left against what it takes. Step times are measured; what of a step a plan saves is what it predicts
            where its sites were measured, else their part of the sites' modelled time, as if nothing else took any. What a
            switch takes is counted as twice the time of making the plan, since the rewrite does that work again, and
            ``recompile_seconds``. Measuring layers for the plan then takes at most a hundredth of the time that the steps
            that are left would take, or the time of thirty steps; what there is no time for is estimated.
        recompile_seconds: What compiling the model again takes, or capturing it, in seconds.
        rewarm: Steps of a re-warm-up of the learning rates after each switch, see ``Rewarm``; 0 for none.
        writer: Where to log what each switch did, as ``tdfx.report.log_plan`` does, and how long steps took before it: a
            ``SummaryWriter``, or anything with ``add_scalar(tag, value, step)``. Pass it on one process alone.
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
        self._seconds: dict[str, float] = {}
        self._watch: RankWatch | None = None
        self._next = 1 if isinstance(when, Settled) else when.at
        self._times: deque[float] = deque(maxlen=TIMES)
        self._last: float | None = None
        self._rewarms: list[Rewarm] = []
        self._spent = {"watching": 0.0, "planning": 0.0, "rewriting": 0.0}

    @property
    def spent(self) -> dict[str, float]:
        """What it took in this process so far, in seconds: ``"watching"`` ranks, ``"planning"``, and ``"rewriting"``."""
        return dict(self._spent)

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        return self._step

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
        wrapped = unwrap(model)
        with wrapped.together():
            if isinstance(self.when, Settled):
                return self._decide_settled(self.when, model, wrapped, optimizer, inputs, arguments)
            return self._switch(model, wrapped, None, optimizer, inputs, arguments)

    def _decide_settled(
        self,
        when: Settled,
        model: nn.Module,
        wrapped: Wrapped,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        inputs: Inputs | None,
        arguments: dict[str, Any],
    ) -> nn.Module:
        """Look at the sites that wait, and switch those that are ripe."""
        began = self._clock()
        emit: Emit = arguments.get("emit", "graph")
        if self._watch is None:
            found = self._surveyed(wrapped, inputs, emit)
            sites = RankWatch.begin(when, found)
            self._watch = sites
            if not sites.sites:
                self._say("kept", (), "the policy wants no site of the model that may be rewritten")
                self._done = True
                return model
        timeout = when.timeout
        late = timeout is not None and self._step >= timeout
        if self._step == 1 or self._step % self._watch.interval == 0:
            self._watch = self._watch.look(wrapped.model)
        names = list(self._watch.sites) if late else cast("list[str]", wrapped.agree(self._watch.ripe()))
        self._spend("watching", began)
        if names:
            names += [name for name in self._watch.spare() if name not in names]
            model = self._switch(model, wrapped, names, optimizer, inputs, arguments, final=late)
        self._next = self._watch.next_look(self._step)
        return model

    def _surveyed(self, wrapped: Wrapped, inputs: Inputs | None, emit: Emit) -> Survey:
        found = survey(wrapped, self.policy, inputs, emit)
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
        in_parts = names is not None and isinstance(policy.rank, Budget)
        if in_parts:
            policy = left_of(policy, self._plan, self._seconds)
        elif names is not None:
            policy = replace(policy, include=tuple(glob.escape(name) for name in names))
        step_seconds = statistics.median(self._times) if self._times else -1.0
        left = 0
        if self.total_steps is not None:
            left, step_seconds = wrapped.agree([max(0, self.total_steps - self._step), step_seconds])
            policy = cap_measuring_time(policy, left, step_seconds)
        made = make_plan(model, policy, example_inputs=inputs, emit=emit)
        if in_parts:
            made = only(made, names or ())
        text, planning = wrapped.agree([made.to_json(indent=None), self._clock() - began])
        made = Plan.from_json(text)
        if self.total_steps is not None and not self._seconds:
            self._surveyed(wrapped, inputs, emit)
        self._spend("planning", began)
        pays, verdict = True, ""
        if self.total_steps is not None and made.factorized:
            # All of it is the same on all processes.
            pays, verdict = pays_off(made, self._seconds, left, step_seconds, planning, self.recompile_seconds)
        switched = made.factorized if pays else ()
        if switched:
            passed = {key: value for key, value in arguments.items() if key != "emit"}
            for one in as_optimizers(optimizer) if self.rewarm else ():
                # After the rewrite it would be too late to fail.
                check_rates(one)
            began = self._clock()
            model = rewrite(model, made, optimizer=optimizer, **passed)
            self._spend("rewriting", began)
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
        outcome = Outcome.of(made, names, self._watch, final)
        known = self._watch.spare() if self._watch is not None else ()
        for what, sites, why in outcome.told(known, tersely=names is None and bool(made.factorized)):
            self._say(what, sites, why)
        if names is None:
            if not made.sites:
                self._say("kept", (), "the model has no convolution or linear layer")
            self._done = True
            return
        assert self._watch is not None
        again = {*outcome.waiting, *outcome.spare}
        self._watch = self._watch.without([name for name in names if name not in again], outcome.waiting, outcome.spare)
        self._done = not self._watch.sites

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
        self._plan = replace(
            made,
            sites=whole,
            other_parameters=dense.other_parameters,
            policy=repr(self.policy),
            step_seconds=dense.step_seconds,
        )
        for one in made.factorized:
            if one.name in self._seconds and one.gain:
                self._seconds = {**self._seconds, one.name: self._seconds[one.name] / one.gain}
        self._log(self._plan)
        # Steps take another time from now on.
        self._times = deque(maxlen=TIMES)

    def _log(self, plan: Plan) -> None:
        """Log what was switched; a logger that fails must not undo it, since the optimizer has gone along already."""
        if self.writer is None:
            return
        try:
            log_plan(self.writer, plan, self._step)
            if self._times:
                self.writer.add_scalar("tdfx/step_ms_before_switch", 1e3 * statistics.median(self._times), self._step)
        except Exception as error:  # of whatever class the logger has
            warnings.warn(f"The switch at step {self._step} was not logged: {error!r}.", TdfxWarning, stacklevel=2)

    def _start_rewarm(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> None:
        if self.rewarm:
            for one in self._rewarms:
                one.remove()
            self._rewarms = [Rewarm(one, self.rewarm) for one in as_optimizers(optimizer)]

    def _spend(self, what: str, began: float) -> None:
        self._spent = {**self._spent, what: self._spent[what] + self._clock() - began}

    def _say(self, what: What, sites: Sequence[str], why: str) -> None:
        self._events = (*self._events, SwitchEvent(step=self._step, what=what, sites=tuple(sites), why=why))

    def state_dict(self) -> dict[str, Any]:
        """Return all that later decisions depend on, in plain types and tensors."""
        return state_of(vars(self))

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
        values, warming = attributes_of(state, self.policy, self.when)
        rewarms = rewarms_of(warming, as_optimizers(optimizer))
        for one in self._rewarms:
            one.remove()
        vars(self).update(values, _rewarms=rewarms)

    def __str__(self) -> str:
        head = f"Switch(when={self.when!r}): {self._step} steps, {'done' if self._done else 'waiting'}"
        return "\n".join([head, *(f"  {one}" for one in self._events)])
