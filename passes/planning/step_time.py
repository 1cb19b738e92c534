"""How long the model's own training step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from tdfx.cost.measured import Measured
from tdfx.cost.modelled import MeasuringCost
from tdfx.cost.waiting import working_time
from tdfx.errors import InputError, PolicyError, TdfxError
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.base import Pass, PassResult
from tdfx.passes.planning.relative_time import StepTime, time_beside
from tdfx.passes.planning.training_step import ADVICE, TrainingStep, time_steps
from tdfx.passes.program import Program

_PART, _PART_TO_SHOW = 0.5, 0.2
"""Parts of the measuring time that the step as a whole may take: where a budget needs it, and where it is only shown."""
_MOST_DOUBT = 0.3
"""Relative error above which the time of a step is of no use."""


@dataclass(frozen=True, slots=True)
class Timed(PassResult):
    """A program whose step was timed."""

    spent: float = 0.0
    """Seconds that timing took."""


class TimeStep(Pass[Timed]):
    """Time forward and backward of a scratch copy in train mode, and add the optimizer's share as the cost counts it.

    If ``strict``, a step that cannot be timed is an error; else it is a note, if a budget ``needed`` it. A first sample that
    agrees with ``loop_seconds``, the time of a step in the training loop, or with what the cache knows of the same step,
    needs no others; then the known time counts, so that plans do not change with the noise. What contradicts is timed again,
    and noted if it stays so.
    """

    name = "time_step"

    def __init__(
        self,
        inputs: Inputs,
        cost: MeasuringCost,
        *,
        strict: bool = True,
        needed: bool = True,
        loop_seconds: float | None = None,
    ) -> None:
        self.inputs = inputs
        self.cost = cost
        self.strict = strict
        self.needed = needed
        self.loop_seconds = loop_seconds

    def requires(self, program: Program) -> None:
        """One process can run the model by itself."""
        if program.shards and self.strict:
            raise PolicyError(
                "A budget of speedup= or seconds= needs the time of the training step, and a model that fully_shard was "
                "called on runs on all processes together. Give a budget of flops= or parameters=, or plan before sharding."
            )

    def run(self, program: Program) -> Timed:
        """Time the step on all processes, which run it together as in training, and take the time of the first.

        A layer may communicate in its forward pass, as ``SyncBatchNorm`` does: run by one process it would wait for the
        others for ever.
        """
        if program.shards:
            return Timed(_with_note(program, _not_timed("a model in shards runs on all processes together")))
        try:
            with working_time() as worked, program.processes.raise_on_all():
                timed = program.processes.broadcast_object(self._timed(program))
                spent = worked()
        except InputError as error:
            if self.strict:
                raise
            return Timed(_with_note(program, _not_timed(str(error))) if self.needed else program)
        step, notes = timed
        program = replace(
            program,
            step_seconds=None if math.isnan(step.seconds) else step.seconds,
            step_doubt=step.doubt,
            load=step.load,
            notes=(*program.notes, *notes),
        )
        return Timed(program, spent=spent)

    def _timed(self, program: Program) -> tuple[StepTime, list[str]]:
        """Return the time of a step, not a number if there is no relying on it, and notes."""
        try:
            step = TrainingStep(program.module, self.inputs, self.cost.autocast)
            trained = sum(parameter.numel() for parameter in step.trained)
            processes = program.processes
            tensors = (len(step.trained),) if isinstance(self.cost, Measured) else ()
            update = processes.on_rank0(partial(self.cost.update_seconds, trained, step.device, *tensors))
            if isinstance(self.cost, Measured):
                loop_seconds = None if self.loop_seconds is None else self.loop_seconds - update
                most_seconds = self._most_seconds
                timed, notes = time_beside(step, program.sites, self.cost, loop_seconds, most_seconds, processes)
            else:
                (timing,) = time_steps([step], agree=processes.broadcast_object)
                timed, notes = StepTime.alone(timing), []
        except TdfxError:
            raise
        except Exception as error:  # whatever a backward raises, all processes have to hear of it
            raise InputError(
                f"The training step of {type(program.module).__name__} on the example inputs cannot be timed: "
                f"{type(error).__name__}: {error}. {ADVICE}"
            ) from error
        if timed.doubt <= _MOST_DOUBT or self.strict:
            return replace(timed, seconds=timed.seconds + update), notes
        varies = f"its time varies by {timed.doubt:.0%}, as on a busy machine; the layers' own times decide"
        return replace(timed, seconds=math.nan), [*notes, _not_timed(varies)] if self.needed else notes

    @property
    def _most_seconds(self) -> float:
        """About how long timing may take; the step is timed once in any case."""
        part = _PART if self.needed else _PART_TO_SHOW
        return part * self.cost.budget if isinstance(self.cost, Measured) else math.inf

    def ensures(self, before: Program, result: Timed) -> None:
        """The time is known, unless it need not be, and nothing else has changed."""
        after = result.program
        self.check((after.step_seconds or 0.0) > 0 or not self.strict, "the step was timed")
        names = ("step_seconds", "step_doubt", "load", "notes")
        same = {name: getattr(before, name) for name in names}
        self.check(replace(after, **same) == before, "nothing else has changed")


def _not_timed(why: str) -> str:
    return f"the step as a whole was not timed, only its sites: {why}"


def _with_note(program: Program, note: str) -> Program:
    return replace(program, notes=(*program.notes, note))
