"""What a plan predicted of the training step, held against the step as it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from tdfx.api import merge
from tdfx.cost.timing import take_turns
from tdfx.errors import PlanError
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.analysis.sandbox import isolated
from tdfx.passes.planning.step_time import TrainingStep
from tdfx.plans.plan import Plan
from tdfx.wrappers.unwrap import unwrap

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCheck:
    """How long a training step takes before and after a rewrite, and what was predicted."""

    seconds_before: float
    """Median time of the dense model's step, in seconds."""
    seconds_after: float
    """Median time of the rewritten model's step, in seconds."""
    seconds_predicted: float
    """What the plan predicts for the latter: the former, less what its sites save."""
    estimated: int = 0
    """How many of the sites that are factorized the plan had no time to measure: what those save is an estimate."""

    @property
    def speedup(self) -> float:
        """How many times faster the step is."""
        return self.seconds_before / self.seconds_after

    @property
    def predicted_speedup(self) -> float:
        """How many times faster it was predicted to be."""
        return self.seconds_before / self.seconds_predicted

    @property
    def off(self) -> float:
        """How far the prediction is from the time: 0.1 for one that is 10 percent too long, -0.1 for too short."""
        return self.seconds_predicted / self.seconds_after - 1

    def __str__(self) -> str:
        return (
            f"training step {1e3 * self.seconds_before:.4g} ms → {1e3 * self.seconds_after:.4g} ms: {self.speedup:.2f}x "
            f"faster; {self.predicted_speedup:.2f}x was predicted ({self.off:+.0%} in time"
            + (f", {self.estimated} sites by estimate)" if self.estimated else ")")
        )


def check_step(
    plan: Plan,
    model: nn.Module,
    *,
    example_inputs: Inputs,
    dense: nn.Module | None = None,
    optimizer: MakeOptimizer | None = None,
    autocast: torch.dtype | None = None,
    rounds: int = 5,
) -> StepCheck:
    """Time real training steps, dense and rewritten in turns, and hold the plan's prediction against them.

    Each step is forward, backward and the optimizer's, on deep copies: the models are left as they were. For the time of
    this call, memory holds both with gradients and optimizer state.

    Args:
        plan: One whose sites were measured: made with example inputs and a cost that measures.
        model: What ``rewrite`` made by it.
        example_inputs: As for ``plan``.
        dense: The model of before; what ``merge`` gives if left out.
        optimizer: Makes an optimizer for given parameters; SGD with momentum if left out.
        autocast: What the training loop's autocast computes in; None for none.
        rounds: Undisturbed steps to time of each, at least 1.

    Raises:
        PlanError: The plan has no measured times.
        MergeError: ``model`` did not come from ``rewrite``, and ``dense`` is left out.
        InputError: The model does not run on the inputs in train mode.
    """
    # A site that the example inputs do not reach has no times, and is predicted to save none.
    if plan.factorized and all(one.seconds_after is None for one in plan.factorized):
        raise PlanError(
            "This plan has no measured times, so it predicts nothing that could be checked. Make it with example_inputs=... "
            "and a cost that measures, Policy(cost=tdfx.Measured())."
        )
    before = unwrap(merge(model) if dense is None else dense).model
    steps = [_RealStep(one, example_inputs, optimizer, autocast) for one in (before, unwrap(model).model)]
    with isolated(steps[0].step.module):
        first, second = take_turns([one.run for one in steps], device=steps[0].step.device, rounds=rounds)
    return StepCheck(
        seconds_before=first.seconds,
        seconds_after=second.seconds,
        seconds_predicted=plan.predicted_seconds(first.seconds),
        estimated=sum(one.estimated for one in plan.factorized),
    )


class _RealStep:
    """A training step of a deep copy, with the optimizer's."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, optimizer: MakeOptimizer | None, autocast: torch.dtype | None
    ) -> None:
        own = copy.deepcopy(model)
        self.step = TrainingStep(own, inputs, autocast)
        trained = [one for one in own.parameters() if one.requires_grad]
        # At a learning rate of zero, values do not run away, however often the same batch is taken.
        self.optimizer = SGD(trained, lr=0.0, momentum=0.9) if optimizer is None else optimizer(trained)
        self.trained = trained

    def run(self) -> None:
        for parameter, gradient in zip(self.step.trained, self.step.gradients(), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
