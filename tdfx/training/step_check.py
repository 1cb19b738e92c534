"""``check_step``: compare the training step that a plan predicted with one that is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from tdfx.api import merge
from tdfx.cost.timing import take_turns
from tdfx.errors import MergeError, PlanError
from tdfx.passes.analysis.observe import Inputs
from tdfx.passes.analysis.sandbox import isolated
from tdfx.passes.planning.training_step import TrainingStep
from tdfx.passes.transform.merge import is_rewritten
from tdfx.plans.plan import Plan
from tdfx.wrappers.unwrap import unwrap

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCheck:
    """The times of a training step before and after a rewrite, and the predicted time."""

    seconds_before: float
    """Median time of the dense model's step, in seconds."""
    seconds_after: float
    """Median time of the rewritten model's step, in seconds."""
    seconds_predicted: float
    """Predicted time of the rewritten model's step, in seconds: the dense time minus what the plan's sites save."""
    estimated: int = 0
    """Number of factorized sites that were not measured; what they save is an estimate."""

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
        """Relative error of the predicted time: 0.1 if it is 10 percent too long, -0.1 if it is 10 percent too short."""
        return self.seconds_predicted / self.seconds_after - 1

    def __str__(self) -> str:
        estimated = f", {self.estimated} sites by estimate" if self.estimated else ""
        return (
            f"training step {1e3 * self.seconds_before:.4g} ms → {1e3 * self.seconds_after:.4g} ms: {self.speedup:.2f}x "
            f"faster; {self.predicted_speedup:.2f}x was predicted ({self.off:+.0%} in time{estimated})"
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
    """Time real training steps of the dense and the rewritten model by turns, and compare them with the plan's prediction.

    Each step is a forward pass, a backward pass and an optimizer step, on deep copies, both of which memory must hold.

    Args:
        plan: A plan whose sites were measured: made with example inputs and a cost that measures.
        model: The model that ``rewrite`` made by it.
        example_inputs: As for ``plan``.
        dense: The model before the rewrite; what ``merge`` returns if left out.
        optimizer: Makes an optimizer for given parameters; SGD with momentum if left out.
        autocast: The dtype of the training loop's autocast; None for no autocast.
        rounds: Undisturbed steps to time of each model, at least 1.

    Raises:
        PlanError: The plan has no measured times.
        MergeError: ``model`` did not come from ``rewrite``, and ``dense`` is left out.
        InputError: The model does not run on the inputs in train mode.
    """
    # A site that the example inputs do not reach has no times, and is predicted to save none.
    if plan.factorized and all(site.seconds_after is None for site in plan.factorized):
        raise PlanError(
            "This plan has no measured times, so it predicts nothing that could be checked. Make it with example_inputs=... "
            "and a cost that measures, Policy(cost=tdfx.Measured())."
        )
    if dense is None and not is_rewritten(unwrap(model).model):
        raise MergeError(
            f"{type(model).__name__} is dense, so its steps cannot be compared with those of a dense model. Pass the model "
            f"that tdfx.rewrite returned."
        )
    models = merge(model) if dense is None else dense, model
    steps = [TrainingStep(copy.deepcopy(unwrap(each).model), example_inputs, autocast) for each in models]
    runs = [_with_optimizer(step, optimizer) for step in steps]
    with isolated(steps[0].module):
        before, after = take_turns(runs, device=steps[0].device, rounds=rounds)
    return StepCheck(
        seconds_before=before.seconds,
        seconds_after=after.seconds,
        seconds_predicted=plan.predicted_seconds(before.seconds),
        estimated=sum(site.estimated for site in plan.factorized),
    )


def _with_optimizer(step: TrainingStep, make_optimizer: MakeOptimizer | None) -> Callable[[], None]:
    """Return a function that runs a training step with its optimizer step."""
    # With a learning rate of zero, values do not diverge, however often the same batch is used.
    optimizer = SGD(step.trained, lr=0.0, momentum=0.9) if make_optimizer is None else make_optimizer(step.trained)

    def run() -> None:
        for parameter, gradient in zip(step.trained, step.gradients(), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return run
