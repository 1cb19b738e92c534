"""What hangs on an optimizer's step has to ask of it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tdfx.errors import OptimizerError


def refuse_closure(args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Raise OptimizerError if a step was given a closure."""
    if (len(args) > 1 and args[1] is not None) or named.get("closure") is not None:
        raise OptimizerError(
            "This acts on gradients before a step uses them, and a closure makes them inside of the step. Call backward() "
            "first, then step() without a closure."
        )


def refuse_fused(optimizer: Optimizer) -> None:
    """Raise OptimizerError for a fused optimizer."""
    if any(group.get("fused") for group in optimizer.param_groups):
        raise OptimizerError(
            "A fused optimizer undoes the scaling of gradients inside of its step, so nothing of the right size could be "
            "added before. Make it with fused=False."
        )


def leave_from_within(handle: RemovableHandle, optimizer: Optimizer) -> None:
    """Take a hook that runs after steps off the optimizer, from within the hook, where it is the last one.

    The optimizer is going through its hooks, and must not find fewer of them on the way. Where others come after it, the
    hook stays, and has to do nothing from now on.
    """
    hooks = cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks)
    if next(reversed(hooks)) == handle.id:
        handle.remove()
