"""A training step of a whole model on example inputs, as it is timed: forward and backward, nothing kept of either."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tdfx.cost.setting import computing_in
from tdfx.cost.timing import Timing, take_turns
from tdfx.errors import InputError
from tdfx.layers.copying import HOOKS
from tdfx.passes.analysis.observe import Inputs, split_inputs
from tdfx.passes.analysis.sandbox import isolated
from tdfx.passes.analysis.tracer import scratch_copy, with_own_parameters


class TrainingStep:
    """One model's training step, on a throwaway copy in train mode; the model, its gradients and buffers are left alone.

    The loss is the sum of the means of all that the model returns in floating point: what it is hardly takes time.

    Raises:
        InputError: The model does not run on the inputs in train mode, or gives nothing that has a gradient.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, autocast: torch.dtype | None = None) -> None:
        self.arguments, self.named = tree_map_only(Tensor, lambda one: one.detach().clone(), split_inputs(inputs))
        self.device = next((str(one.device) for one in module.parameters()), "cpu")
        self.autocast = autocast
        self.module = _without_backward_hooks(scratch_copy(module, mode=True))
        # A forward may write to its parameters, at any of its calls, and hooks hang on them.
        with_own_parameters(self.module)
        try:
            with isolated(self.module):
                self._forward()
        except Exception as error:  # whatever the model raises, it is about these inputs
            raise InputError(
                f"{type(module).__name__} does not run on the example inputs in train mode, in which its step is to be "
                f"timed: {type(error).__name__}: {error}. Pass inputs that it trains on, or a policy whose budget and cost "
                f"need no times: flops=, parameters=, cost=tdfx.Modelled()."
            ) from error
        self.wanted = [one for one in self.module.parameters() if one.requires_grad]

    def run(self) -> None:
        """Compute the loss and its gradients, and let go of them."""
        self.gradients()

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradient of the loss for each of the parameters in ``wanted``; None for one that it does not need."""
        with torch.enable_grad():
            out = self._forward()
            means = [_real(one).float().mean() for one in tree_leaves(out) if _has_gradient(one)]
            if not means:
                raise InputError(
                    f"{type(self.module).__name__} returns nothing in train mode that has a gradient, so there is no "
                    f"backward pass to be timed. Pass the model that is trained, with parameters that require gradients."
                )
            loss = torch.stack([one.to(means[0].device) for one in means]).sum()
            found: tuple[Tensor | None, ...] = torch.autograd.grad(loss, self.wanted, allow_unused=True)
        return found

    def _forward(self) -> Any:
        kind = torch.device(self.device).type
        with computing_in(self.autocast, kind) if self.autocast is not None else nullcontext():
            return self.module(*self.arguments, **self.named)


def time_steps(steps: Sequence[TrainingStep], *, rounds: int = 3, most_seconds: float = math.inf) -> list[Timing]:
    """Time the training steps of some models in turns."""
    runs: list[Callable[[], None]] = [one.run for one in steps]
    with isolated(steps[0].module):
        return take_turns(runs, device=steps[0].device, rounds=rounds, most_seconds=most_seconds)


def _without_backward_hooks(module: nn.Module) -> nn.Module:
    """Take off a throwaway copy what a user wants to be called with the gradients of the training."""
    for one in module.modules():
        for name in HOOKS:
            value = one.__dict__[name]
            if "backward" in name and hasattr(value, "clear"):
                one.__dict__[name] = type(value)()
    return module


def _has_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _real(value: Tensor) -> Tensor:
    return value.abs() if value.is_complex() else value
