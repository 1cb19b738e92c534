"""How long the model's own training step takes."""

from __future__ import annotations

from dataclasses import replace

import torch

from tdfx.errors import PolicyError
from tdfx.passes.base import Agree, Pass, PassResult, Program, itself
from tdfx.passes.observe import Inputs
from tdfx.passes.step import Step, time_steps


class Clock(Pass):
    """Time forward and backward of a throwaway copy in train mode, for a plan that has to know the whole step."""

    name = "clock"

    def __init__(
        self, inputs: Inputs, autocast: torch.dtype | None = None, agree: Agree = itself, leads: bool = True
    ) -> None:
        self.inputs = inputs
        self.autocast = autocast
        self.agree = agree
        self.leads = leads

    def requires(self, program: Program) -> None:
        """One process can run the model by itself."""
        if program.shards:
            raise PolicyError(
                "A budget of speedup= or seconds= needs the time of the training step, and a model that fully_shard was "
                "called on runs on all processes together. Give a budget of flops= or parameters=, or plan before sharding."
            )

    def run(self, program: Program) -> PassResult:
        """Time it on the first process, and tell the others."""
        own = time_steps([Step(program.module, self.inputs, self.autocast)])[0].seconds if self.leads else None
        return PassResult(replace(program, step_seconds=self.agree(own)))

    def ensures(self, before: Program, result: PassResult) -> None:
        """The time is known, and nothing else has changed."""
        now = result.program
        self.check(now.step_seconds is not None and now.step_seconds > 0, "the step was timed")
        self.check(replace(now, step_seconds=before.step_seconds) == before, "nothing else has changed")
