"""How long the model's own training step takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from tdfx.cost.modelled import MeasuringCost
from tdfx.errors import PolicyError
from tdfx.passes.base import Lead, Pass, PassResult, Program
from tdfx.passes.observe import Inputs
from tdfx.passes.step import Step, time_steps


class Clock(Pass):
    """Time forward and backward of a throwaway copy in train mode, and add the optimizer's share as the cost counts it."""

    name = "clock"

    def __init__(self, inputs: Inputs, cost: MeasuringCost, lead: Lead) -> None:
        """Take the inputs, what measures the sites, and who does it."""
        self.inputs = inputs
        self.cost = cost
        self.lead = lead

    def requires(self, program: Program) -> None:
        """One process can run the model by itself."""
        if program.shards:
            raise PolicyError(
                "A budget of speedup= or seconds= needs the time of the training step, and a model that fully_shard was "
                "called on runs on all processes together. Give a budget of flops= or parameters=, or plan before sharding."
            )

    def run(self, program: Program) -> PassResult:
        """Time it on the first process, and tell the others."""
        return PassResult(replace(program, step_seconds=self.lead.do(partial(self._seconds, program))))

    def _seconds(self, program: Program) -> float:
        step = Step(program.module, self.inputs, self.cost.autocast)
        trained = sum(parameter.numel() for parameter in step.wanted)
        return time_steps([step])[0].seconds + self.cost.update_seconds(trained, step.device)

    def ensures(self, before: Program, result: PassResult) -> None:
        """The time is known, and nothing else has changed."""
        now = result.program
        self.check(now.step_seconds is not None and now.step_seconds > 0, "the step was timed")
        self.check(replace(now, step_seconds=before.step_seconds) == before, "nothing else has changed")
