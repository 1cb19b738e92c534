"""What is left of a training when a switch is decided, and whether that is enough for the switch to pay off."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Self

from torch import nn

from tdfx.passes.pipeline import Planned
from tdfx.policies.policy import Policy
from tdfx.training.switch.pays_off import cannot_pay, cap_measuring_time, pays_off
from tdfx.training.switch.state import SwitchState
from tdfx.training.switch.watch import modelled_seconds
from tdfx.wrappers.compiled import seconds_spent_compiling
from tdfx.wrappers.unwrap import Unwrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """The steps that are left and what each takes; the same on all processes."""

    steps: int | None
    """Steps that are left; None if that is unknown."""
    step_seconds: float
    """Time of a step in seconds; negative if none was timed."""
    compiling: float
    """Time to compile the rewritten model, in seconds."""
    weigh: bool
    """Whether the model is switched only if that pays."""

    @classmethod
    def of(
        cls, state: SwitchState, total_steps: int | None, wrapped: Unwrapped, recompile_seconds: float, *, weigh: bool
    ) -> Self:
        """Return what is left by the count of a switch, agreed on by the processes that train the model."""
        step_seconds, compiling = statistics.median(state.times or [-1.0]), recompile_seconds
        if total_steps is None:
            return cls(steps=None, step_seconds=step_seconds, compiling=compiling, weigh=False)
        if not compiling and wrapped.compiled:
            compiling = seconds_spent_compiling()
        steps = max(0, total_steps - state.step)
        steps, step_seconds, compiling = wrapped.processes.broadcast_object([steps, step_seconds, compiling])
        return cls(steps=steps, step_seconds=step_seconds, compiling=compiling, weigh=weigh)

    @property
    def loop_seconds(self) -> float | None:
        """Time of a step in seconds; None if none was timed."""
        return self.step_seconds if self.step_seconds > 0 else None

    def why_too_late(self, policy: Policy, model: nn.Module, *, times: bool) -> str | None:
        """Return why it is too late for a switch whatever a plan would say, or None if it is not.

        ``times`` says whether there are inputs on which the policy's cost can measure.
        """
        if self.steps is None or not self.weigh:
            return None
        return cannot_pay(policy, model.parameters(), self.steps, self.step_seconds, self.compiling, times=times)

    def cap(self, policy: Policy) -> Policy:
        """Return a policy that measures for no more time than goes with the steps that are left."""
        return policy if self.steps is None else cap_measuring_time(policy, self.steps, self.step_seconds)

    def pays_off(self, policy: Policy, planned: Planned) -> tuple[bool, str]:
        """Return whether a switch by a plan pays off, and why."""
        if self.steps is None or not self.weigh or not planned.plan.factorized:
            return True, ""
        # All arguments are the same on all processes.
        seconds = modelled_seconds(policy, planned.program)
        return pays_off(planned.plan, seconds, self.steps, self.step_seconds, self.compiling)
