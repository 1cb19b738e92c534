"""Helpers for methods that act inside ``optimizer.step()`` through the optimizer's hooks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tdfx.errors import OptimizerError, PolicyError


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


def check_holds(optimizer: Optimizer, parameters: Sequence[nn.Parameter], names: str) -> None:
    """Raise OptimizerError for a fused optimizer, and for one that holds none of the parameters that a method acts on."""
    if any(group.get("fused") for group in optimizer.param_groups):
        raise OptimizerError(
            "A fused optimizer undoes the scaling of gradients inside its step, so nothing of the right size could be added "
            "before. Make it with fused=False."
        )
    if parameters and groups_by_parameter(optimizer).keys().isdisjoint(map(id, parameters)):
        raise OptimizerError(
            f"The {type(optimizer).__name__} holds none of the {names}: it trains another model, or wider copies of the "
            f"parameters. Pass the optimizer that holds the model's own parameters."
        )


def read_state(name: str, state: object, settings: Mapping[str, Any], most: float = math.inf) -> tuple[int, bool]:
    """Return the steps taken, at most ``most``, and whether the named method had ended; check the state and its settings."""
    saved = dict(state) if isinstance(state, Mapping) else {}
    taken, done = saved.get("taken"), saved.get("done")
    is_count = isinstance(taken, int) and not isinstance(taken, bool) and 0 <= taken <= most
    if {key: saved.get(key) for key in settings} != settings or not is_count or not isinstance(done, bool):
        *first, last = (f"{key}={value!r}" for key, value in settings.items())
        raise PolicyError(
            f"This is not the state of a {name} with {', '.join(first)} and {last}: {saved!r}. Make the {name} with the "
            f"settings with which the state was saved."
        )
    return cast("int", taken), done


def remove_within_step(handle: RemovableHandle, optimizer: Optimizer) -> None:
    """Remove a post-step hook while it runs, if it is the last one: the optimizer is iterating over its hooks.

    An earlier hook stays and has to do nothing from now on.
    """
    hooks = cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks)
    if next(reversed(hooks)) == handle.id:
        handle.remove()
