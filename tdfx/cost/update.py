"""How long an optimizer takes to update weights, measured on values of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam, optimizer

from tdfx.cost.timing import take_turns

_LARGE = 2**21
"""Values of the tensor whose time is that of its values: with the optimizer's state more than most caches hold."""
_SMALL, _TENSORS = 16, 16
"""Values and number of the tensors whose time is that of the calls."""
_UNLIKE = (LBFGS, SparseAdam)
"""Optimizers whose step needs more than gradients."""


@dataclass(frozen=True, slots=True)
class UpdateTime:
    """What an optimizer's step takes, in seconds."""

    per_value: float
    per_tensor: float

    def seconds(self, values: int, tensors: int) -> float:
        """Return the time to update so many values in so many tensors."""
        return self.per_value * values + self.per_tensor * tensors


def time_update(optimizers: Sequence[Optimizer], rounds: int = 3) -> UpdateTime | None:
    """Time steps of an optimizer of the same class and settings as the one that has most values, on values of its own.

    Returns None where that would say nothing: no optimizer of ``torch.optim``, parameters without values, or hooks on all
    optimizers, which would see these steps.
    """
    pairs = [(each, group) for each in optimizers for group in getattr(each, "param_groups", ())]
    if not pairs or any(not getattr(hook, "__module__", "").startswith("tdfx.") for hook in _hooks_of_all()):
        return None
    chosen, group = max(pairs, key=lambda pair: _count(pair[1]["params"]))
    kind, like = type(chosen), max(group["params"], key=_values, default=None)
    if not kind.__module__.startswith("torch.optim.") or issubclass(kind, _UNLIKE) or like is None or like.is_meta:
        return None
    names = inspect.signature(kind).parameters.keys() & group.keys() - {"params"}
    settings = {name: group[name] for name in names}
    try:
        runs = [_step(kind, settings, like, *shape).step for shape in ((1, _LARGE), (_TENSORS, _SMALL))]
        large, small = (timing.seconds for timing in take_turns(runs, device=like.device, rounds=rounds))
    except (RuntimeError, TypeError, ValueError):  # such as settings that only go with capturing, or no memory left
        return None
    per_tensor = small / _TENSORS
    return UpdateTime(max(0.0, large - per_tensor) / _LARGE, per_tensor)


def _step(kind: type[Any], settings: dict[str, Any], like: Tensor, tensors: int, values: int) -> Any:
    """Return an optimizer of some tensors that have gradients, with settings of its own."""
    parameters = [nn.Parameter(torch.zeros(values, dtype=like.dtype, device=like.device)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in settings.items()}
    return kind(parameters, **own)


def _hooks_of_all() -> Iterator[Any]:
    """Yield the hooks that see the steps of all optimizers, tdfx's own among them."""
    for hooks in (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks):
        yield from hooks.values()


def _count(parameters: Sequence[Tensor]) -> int:
    return sum(map(_values, parameters))


def _values(parameter: Tensor) -> int:
    return 0 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.numel()
