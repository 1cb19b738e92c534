"""How long the model's own training step takes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from tdfx.cost.measured import Measured
from tdfx.cost.modelled import MeasuringCost
from tdfx.distributed.processes import Lead
from tdfx.errors import InputError, PolicyError, TdfxError
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.base import Pass, PassResult
from tdfx.passes.planning.step import TrainingStep, time_steps
from tdfx.passes.program import Program

_PART = 0.5
"""Part of what measuring may take that the step as a whole may."""


class TimeStep(Pass):
    """Time forward and backward of a throwaway copy in train mode, and add the optimizer's share as the cost counts it."""

    name = "clock"

    def __init__(self, inputs: Inputs, cost: MeasuringCost, lead: Lead, *, strict: bool = True) -> None:
        """Take the inputs, what measures the sites, who does it, and whether a step that cannot be timed is an error."""
        self.inputs = inputs
        self.cost = cost
        self.lead = lead
        self.strict = strict

    def requires(self, program: Program) -> None:
        """One process can run the model by itself."""
        if program.shards and self.strict:
            raise PolicyError(
                "A budget of speedup= or seconds= needs the time of the training step, and a model that fully_shard was "
                "called on runs on all processes together. Give a budget of flops= or parameters=, or plan before sharding."
            )

    def run(self, program: Program) -> PassResult:
        """Time it on the first process, and tell the others."""
        if program.shards:
            return PassResult(_with_note(program, "a model in shards runs on all processes together"))
        try:
            seconds = self.lead.do(partial(self._seconds, program))
        except InputError as error:
            if self.strict:
                raise
            return PassResult(_with_note(program, str(error)))
        return PassResult(replace(program, step_seconds=seconds))

    def _seconds(self, program: Program) -> float:
        try:
            step = TrainingStep(program.module, self.inputs, self.cost.autocast)
            trained = sum(parameter.numel() for parameter in step.wanted)
            (timing,) = time_steps([step], most_seconds=self._most_seconds)
            return timing.seconds + self.cost.update_seconds(trained, step.device)
        except TdfxError:
            raise
        except Exception as error:  # whatever a backward raises, all processes have to hear of it
            raise InputError(
                f"The training step of {type(program.module).__name__} on the example inputs cannot be timed: "
                f"{type(error).__name__}: {error}. Pass inputs that it trains on, or a policy whose budget and cost need no "
                f"times: flops=, parameters=, cost=tdfx.Modelled()."
            ) from error

    @property
    def _most_seconds(self) -> float:
        """About how long it may take, so that the sites are timed too; once, it is timed in any case."""
        return _PART * self.cost.budget if isinstance(self.cost, Measured) else math.inf

    def ensures(self, before: Program, result: PassResult) -> None:
        """The time is known, unless it need not be, and nothing else has changed."""
        now = result.program
        known = now.step_seconds is not None and now.step_seconds > 0
        self.check(known or not self.strict, "the step was timed")
        self.check(
            replace(now, step_seconds=before.step_seconds, notes=before.notes) == before, "nothing else has changed"
        )


def _with_note(program: Program, why: str) -> Program:
    return replace(program, notes=(*program.notes, f"the step as a whole was not timed, only its sites: {why}"))
