"""Helpers for methods that act inside ``optimizer.step()`` through the optimizer's hooks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tdfx.errors import OptimizerError


def groups_by_parameter(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """Return the ids of the parameters that an optimizer holds, each with its parameter group."""
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise OptimizerError if a step was given a closure."""
    if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
        raise OptimizerError(
            "This acts on gradients before a step uses them, and a closure computes them inside the step. Call backward() "
            "first, then step() without a closure."
        )


def refuse_fused(optimizer: Optimizer) -> None:
    """Raise OptimizerError for a fused optimizer."""
    if any(group.get("fused") for group in optimizer.param_groups):
        raise OptimizerError(
            "A fused optimizer undoes the scaling of gradients inside its step, so nothing of the right size could be added "
            "before. Make it with fused=False."
        )


def remove_within_step(handle: RemovableHandle, optimizer: Optimizer) -> None:
    """Remove a post-step hook while it runs, if it is the optimizer's last one.

    The optimizer is iterating over its hooks, so an earlier one must not be removed now. Such a hook stays and has to do
    nothing from now on.
    """
    hooks = cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks)
    if next(reversed(hooks)) == handle.id:
        handle.remove()
