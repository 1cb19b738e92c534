"""``Switch``: decides at each training step whether to go from dense to factorized training now.

A decision asks: is it time (``when``, ``watch``), what would be switched (a plan), does that pay off (``pays_off``)? Then it
rewrites, and records what was decided. ``state`` saves and loads all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tdfx.api import record_dense
from tdfx.devices import synchronize
from tdfx.kinds.registry import find_kind
from tdfx.optim.surgery import as_optimizers
from tdfx.passes.analysis.loop import LoopWatch
from tdfx.passes.analysis.observe import Inputs
from tdfx.planned_rewrite import PlannedRewrite, PlanRequest, plan_rewrite
from tdfx.plans.plan import Emit
from tdfx.plans.scalars import Writer, check_writer
from tdfx.policies.policy import Policy
from tdfx.training.methods.rewarm import Rewarm, check_rates
from tdfx.training.switch.collect import COLLECTED_STEPS, Collection, wants_moments
from tdfx.training.switch.follow_up import FactorRates, log_switch
from tdfx.training.switch.remaining import Remaining
from tdfx.training.switch.replaced import ModelGuard, ReplacedModel
from tdfx.training.switch.settle import look_at_ranks
from tdfx.training.switch.state import TIMED_STEPS, SwitchState
from tdfx.training.switch.status import SwitchStatus
from tdfx.training.switch.when import AtStep, Settled, When, check_arguments, check_settings, early
from tdfx.wrappers.in_place import InPlaceModule
from tdfx.wrappers.unwrap import Unwrapped, unwrap


class Switch(SwitchStatus):
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
        when: ``AtStep``, ``AtEpoch`` or ``Settled``. Left out, it is an early step of ``total_steps``: see ``early``.
        total_steps: Steps of the whole training. With it a plan is made only if the steps that are left can save more time
            than a plan and a rewrite are estimated to take, and the model is switched only if they are predicted to save
            more than the rewrite and ``recompile_seconds``, the uncertainty of the prediction taken off: what the plan took
            is spent by then. Step times are measured; the share of a step that is saved comes from the plan's measurements,
            or else from the sites' modelled times, as if nothing else took time. Measuring layers takes at most a fiftieth
            of the time left, or the time of ten steps; the remaining layers are estimated.
        weigh: Whether the model is switched only if that pays; False switches in any case. Only with ``total_steps``.
        recompile_seconds: Time to compile or capture the rewritten model, in seconds; 0 for a compiled model means the
            time that ``torch.compile`` has taken in this process so far.
        rewarm: Steps of a re-warm-up of the learning rates after the switch, see ``Rewarm``; 0 for none.
        collect: Steps before the decision at which second moments are collected, and used as ``Policy.metric`` says; 0 for
            none. They cost a part of a step each. With ``torch.compile`` the model runs eagerly in these steps.
        factor_rate: How many times the learning rate of the factors is that of their group, for SGD only; see
            ``FactorRate``. None for its own choice where the loss was the metric, and 1 otherwise.
        writer: Where to log the plan and the step time before the switch: a ``SummaryWriter``, or anything with
            ``add_scalar(tag, value, step)``. Pass it on one process only.
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
        when: When | None = None,
        total_steps: int | None = None,
        weigh: bool = True,
        recompile_seconds: float = 0.0,
        rewarm: int = 0,
        collect: int = COLLECTED_STEPS,
        factor_rate: float | None = None,
        writer: Writer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.policy = Policy() if policy is None else policy
        when = early(total_steps) if when is None else when
        check_settings(self.policy, when, total_steps, recompile_seconds, rewarm, collect, factor_rate)
        if writer is not None:
            check_writer(writer)
        self.when = when
        self.total_steps = total_steps
        self.weigh = weigh
        self.recompile_seconds = recompile_seconds
        self.rewarm = rewarm
        self.collect = collect if wants_moments(self.policy) else 0
        self.writer = writer
        self.factor_rate = factor_rate
        self._clock = clock
        latest = when.latest if isinstance(when, AtStep) else 0
        self._state = SwitchState(next=1 if isinstance(when, Settled) else when.at, latest=latest)
        self._last: float | None = None  # when the last step ended
        self._collection = Collection(self.collect)
        self._loop = LoopWatch()
        self._rates = FactorRates()
        self._guard = ModelGuard()
        self._spent = {"watching": 0.0, "planning": 0.0, "rewriting": 0.0}

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
            ModelError: The model is the one that the switch has replaced, or the loop still trains that one; or as for
                ``plan`` and ``rewrite``, like InputError and WeightError. Then nothing was changed or counted.
        """
        self._guard.check(model)
        if self.done:
            self._state = self._state.count()
            self._record_kept(model)
            return model
        self._wait(model)
        now = self._clock()
        check_arguments(arguments, self.rewarm, optimizer)
        is_near = self._state.latest and self._state.next - self.steps <= 2
        optimizers = as_optimizers(optimizer) if is_near else ()
        before = vars(self).copy()
        counted = self._state.count(None if self._last is None else now - self._last)
        self._state = counted.wait_for_rates(optimizers, max(1, self.collect))
        if self._state.next != counted.next:
            self._collection.remove()  # what is collected later is worth more
        if self.steps >= self._state.next:
            try:
                model = self._decide(model, example_inputs, optimizer=optimizer, **arguments)
            except BaseException:
                vars(self).update(before, _last=None)
                raise
        self.begin(model)
        self._record_kept(model)
        self._last = self._clock()
        return model

    def _wait(self, model: nn.Module) -> None:
        """Wait for the device in the last steps before a decision: else their times are those of enqueueing them."""
        if self.total_steps is not None and self._state.next - self.steps <= TIMED_STEPS:
            parameter = next(model.parameters(), None)
            if parameter is not None:
                synchronize(parameter.device)

    def _record_kept(self, model: nn.Module) -> None:
        """Let ``merge`` return a model without a warning that was kept by a decision."""
        if self.done and self.plan is None:
            record_dense(model)

    def begin(self, model: nn.Module) -> None:
        """Collect moments in the next step, if it is one of those; ``step`` does so from the second step on.

        A trainer calls it before the first step, also where a state was loaded, because it knows the model by then.
        """
        if not self.done and self.steps >= self._state.next - self.collect:
            self._collection.attach(model)
        else:
            self._collection.remove()
        if self.due and not self.collect and not isinstance(model, InPlaceModule):
            self._loop.attach(model)

    def average(self, model: nn.Module) -> None:
        """Average the moments collected so far over the processes that train a model, which must call this together.

        Call it before one process saves a state that all of them will load: each has seen other data.
        """
        self._collection.average(unwrap(model).processes)

    def pause(self) -> None:
        """Take all hooks off the model until the next call of ``begin`` or ``step``; what was collected stays."""
        self._collection.detach()
        self._loop.remove()

    def _decide(self, model: nn.Module, inputs: Inputs | None, *, emit: Emit = "graph", **arguments: Any) -> nn.Module:
        """Switch if it is time and pays off; whatever is kept then is kept for good."""
        moments = self._collection.detach()
        self._loop.remove()
        wrapped = unwrap(model)
        with wrapped.processes.raise_on_all():
            why: str | None = "the step that was asked for"
            if isinstance(self.when, Settled):
                why = self._look(self.when, wrapped, inputs, emit)
            if why is None:
                return model
            left = Remaining.of(self._state, self.total_steps, wrapped, self.recompile_seconds, weigh=self.weigh)
            if late := left.why_too_late(self.policy, wrapped.model, times=inputs is not None):
                self._state = replace(
                    self._state.record("too_late", self._wanted(wrapped.model), late), watch=None, done=True
                )
                return model
            policy = left.cap(self._state.policy_for_rest(self.policy))
            began = self._clock()
            optimizer = arguments.get("optimizer")
            request = PlanRequest(policy, inputs, emit, moments, left.loop_seconds, self._loop.settings, optimizer)
            planned = plan_rewrite(model, request)
            self._spend("planning", began)
            pays, verdict = left.pays_off(self.policy, planned.planned)
            names = [site.name for site in planned.plan.factorized]
            if names and pays:
                model = self._rewrite(model, planned, **arguments)
                self._state = self._state.record("switched", names, f"{why}{verdict}")
            elif names:
                self._state = self._state.record("too_late", names, verdict)
            self._state = self._state.finish(planned.plan)
            return model

    def _look(self, when: Settled, wrapped: Unwrapped, inputs: Inputs | None, emit: Emit) -> str | None:
        """Look at the stable ranks; return why it is time to switch, or None if it is not."""
        began = self._clock()
        self._state, why = look_at_ranks(self._state, when, wrapped, self.policy, inputs, emit)
        self._spend("watching", began)
        return why

    def _wanted(self, model: nn.Module) -> list[str]:
        """Return the layers that the policy wants to rewrite."""
        layers = (name for name, layer in model.named_modules() if find_kind(layer) is not None)
        return [name for name in layers if self.policy.for_site(name) is not None]

    def _rewrite(
        self,
        model: nn.Module,
        planned: PlannedRewrite,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        **arguments: Any,
    ) -> nn.Module:
        """Rewrite the model, start the re-warm-up, and log."""
        optimizers = as_optimizers(optimizer) if self.rewarm else ()
        for each in optimizers:
            check_rates(each)  # after the rewrite it would be too late to fail
        began = self._clock()
        replaced = ReplacedModel(model, self.steps)
        model = planned.apply(optimizer=optimizer, **arguments)
        self._guard.switched(replaced, model)
        self._spend("rewriting", began)
        plan = self._state.join_plan(replace(planned.plan, policy=repr(self.policy)))
        self._state = replace(self._state, plan=plan)
        self._rates.set(model, as_optimizers(optimizer), planned.plan, self.factor_rate)
        if self.rewarm:
            for rewarm in self._state.rewarms:
                rewarm.remove()
            self._state = replace(self._state, rewarms=tuple(Rewarm(each, self.rewarm) for each in optimizers))
        log_switch(self.writer, plan, self.steps, self._state.times)
        return model

    def _spend(self, what: str, began: float) -> None:
        self._spent = {**self._spent, what: self._spent[what] + self._clock() - began}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later decisions depend on, in plain types and tensors."""
        return self._state.to_dict(self.policy, self.when) | {
            "moments": self._collection.state_dict(),
            "factor_rates": self._rates.state_dict(),
        }

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
        optimizers = as_optimizers(optimizer)
        loaded = SwitchState.load(state, self.policy, self.when, optimizers)
        for rewarm in self._state.rewarms:
            rewarm.remove()
        self._state, self._last = loaded, None
        self._guard.loaded(loaded.plan)
        self._rates.load_state_dict(state.get("factor_rates", ()), optimizers)
        self._collection.load_state_dict(state.get("moments"), optimizers)
