"""A model's own training step, computed on a scratch copy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tdfx.cost.machine import describe_machine
from tdfx.cost.setting import computing_in
from tdfx.cost.timing import Timing, take_turns
from tdfx.errors import InputError
from tdfx.passes.analysis.observe import Inputs, split_inputs
from tdfx.passes.analysis.sandbox import clone_parameters, isolated, remove_hooks, scratch_copy

ADVICE = (
    "Pass inputs that it trains on, or a policy whose budget and cost need no times: flops=, parameters=, "
    "cost=tdfx.Modelled()."
)
"""What to do where a step cannot be timed."""


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
                f"timed: {type(error).__name__}: {error}. {ADVICE}"
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
