"""How long the model's own training step takes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tdfx.cost.machine import describe_machine
from tdfx.cost.measured import Measured
from tdfx.cost.modelled import MeasuringCost
from tdfx.cost.setting import computing_in
from tdfx.cost.timing import Timing, take_turns
from tdfx.errors import InputError, PolicyError, TdfxError
from tdfx.passes.analysis.observe import Inputs, split_inputs
from tdfx.passes.analysis.sandbox import clone_parameters, isolated, remove_hooks, scratch_copy
from tdfx.passes.base import Pass, PassResult
from tdfx.passes.planning.beside import StepTime, time_beside
from tdfx.passes.program import Program

_PART, _PART_TO_SHOW = 0.5, 0.2
"""Parts of the measuring time that the step as a whole may take: where a budget needs it, and where it is only shown."""
_ADVICE = (
    "Pass inputs that it trains on, or a policy whose budget and cost need no times: flops=, parameters=, "
    "cost=tdfx.Modelled()."
)
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
        began = time.perf_counter()
        try:
            with program.processes.raise_on_all():
                timed = program.processes.broadcast_object(self._timed(program))
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
        return Timed(program, spent=time.perf_counter() - began)

    def _timed(self, program: Program) -> tuple[StepTime, list[str]]:
        """Return the time of a step, not a number if there is no relying on it, and notes."""
        try:
            step = TrainingStep(program.module, self.inputs, self.cost.autocast)
            trained = sum(parameter.numel() for parameter in step.trained)
            processes = program.processes
            update = processes.on_rank0(partial(self.cost.update_seconds, trained, step.device))
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
                f"{type(error).__name__}: {error}. {_ADVICE}"
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


class TrainingStep:
    """One model's training step, on a scratch copy in train mode; the model, its gradients and buffers are left alone.

    The loss is the sum of the means of all floating-point outputs: what it is hardly takes time.

    Raises:
        InputError: The model does not run on the inputs in train mode, or returns nothing that has a gradient.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, autocast: torch.dtype | None = None) -> None:
        self.arguments, self.named = tree_map_only(Tensor, lambda x: x.detach().clone(), split_inputs(inputs))
        self.device = next((str(parameter.device) for parameter in module.parameters()), "cpu")
        self.autocast = autocast
        self.module = scratch_copy(module, training=True)
        remove_hooks(self.module, backward_only=True)  # they are for the gradients of the training
        clone_parameters(self.module)  # a forward may write to its parameters, and hooks hang on them
        try:
            with isolated(self.module):
                self._forward()
        except Exception as error:  # whatever the model raises, it is about these inputs
            raise InputError(
                f"{type(module).__name__} does not run on the example inputs in train mode, in which its step is to be "
                f"timed: {type(error).__name__}: {error}. {_ADVICE}"
            ) from error
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def key(self) -> str:
        """A key for the time of the step: the machine, and a digest of the model's form and of the shapes of its inputs."""
        tensors = [
            *self.module.state_dict(keep_vars=True).items(),
            *enumerate(tree_leaves((self.arguments, self.named))),
        ]
        shapes = [
            (name, value.shape, value.stride(), value.dtype, value.requires_grad)
            if isinstance(value, Tensor)
            else value
            for name, value in tensors
        ]
        form = (
            f"{type(self.module).__name__} {self.module!r} {getattr(self.module, 'code', '')} {shapes} {self.autocast}"
        )
        return f"{describe_machine(self.device)} step {hashlib.sha256(form.encode()).hexdigest()}"

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradient of the loss for each parameter in ``trained``; None for one that the loss does not need."""
        with torch.enable_grad():
            tensors = [value for value in tree_leaves(self._forward()) if isinstance(value, Tensor)]
            outputs = [value.abs() if value.is_complex() else value for value in tensors if value.requires_grad]
            means = [value.float().mean() for value in outputs]
            if not means:
                raise InputError(
                    f"{type(self.module).__name__} returns nothing in train mode that has a gradient, so there is no "
                    f"backward pass to be timed. Pass the model that is trained, with parameters that require gradients."
                )
            loss = torch.stack([mean.to(means[0].device) for mean in means]).sum()
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, self.trained, allow_unused=True)
        return gradients

    def _forward(self) -> Any:
        kind = torch.device(self.device).type
        with computing_in(self.autocast, kind) if self.autocast is not None else nullcontext():
            return self.module(*self.arguments, **self.named)


def time_steps(
    steps: Sequence[TrainingStep],
    *,
    rounds: int = 3,
    most_seconds: float = math.inf,
    agree: Callable[[float], float] = float,
) -> list[Timing]:
    """Time the training steps of some models in turns; ``agree`` is that of ``take_turns``."""
    runs = [step.gradients for step in steps]
    with isolated(steps[0].module):
        return take_turns(runs, device=steps[0].device, rounds=rounds, most_seconds=most_seconds, agree=agree)
