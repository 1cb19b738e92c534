"""What the entries of an optimizer's state mean, and what becomes of them when parameters change."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tdfx.errors import TdfxWarning
from tdfx.optim.carriers import Carrier
from tdfx.ranks.spectrum import working_dtype

_FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg"})
_SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
_COUNTS = frozenset({"step"})
_KNOWN = (SGD, Adam, AdamW)


def new_states(
    optimizer: Optimizer, old_ones: Sequence[nn.Parameter], new: Sequence[nn.Parameter], carrier: Carrier
) -> list[dict[str, Any]]:
    """Return the state of each new parameter; nothing where there is none yet, or none that can be carried."""
    old = [optimizer.state.get(parameter, {}) for parameter in old_ones]
    if not all(old) or not _can_carry(optimizer, old[0]):
        return _fresh_states(optimizer, new)
    states: list[dict[str, Any]] = [{} for _ in new]
    for key in old[0]:
        for state, carried in zip(states, _carry(key, [one[key] for one in old], new, carrier), strict=True):
            state[key] = carried
    for state in states:
        _keep_above_square(state)
    return states


def _keep_above_square(state: dict[str, Any]) -> None:
    """Hold second moments at or above the square of the first, as E[g**2] >= E[g]**2 demands.

    The estimate takes the gradient's entries as uncorrelated. Where they agree, it is too small, and Adam's first steps
    after the switch would be several times too long.
    """
    if "exp_avg" in state:
        for key in _SECOND_MOMENTS & state.keys():
            state[key] = torch.maximum(state[key], state["exp_avg"].square().to(state[key].dtype))


def _fresh_states(optimizer: Optimizer, new: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the state that the optimizer's constructor makes, for those that do not wait for the first step."""
    try:
        twin = type(optimizer)(list(new), **optimizer.defaults)
    except Exception:  # a class of somebody else's may want other arguments; then it starts with no state
        return []
    return [dict(twin.state[parameter]) for parameter in new if parameter in twin.state]


def _carry(key: str, values: list[Any], new: Sequence[nn.Parameter], carrier: Carrier) -> list[Any]:
    value = values[0]
    if key in _COUNTS or value is None:
        return [value.clone() if isinstance(value, Tensor) else value for _ in new]
    moments = tuple(moment.detach().to(working_dtype(moment)) for moment in values)
    carry = carrier.first if key in _FIRST_MOMENTS else carrier.second
    return [
        torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(moment.reshape(parameter.shape))
        for parameter, moment in zip(new, carry(moments), strict=True)
    ]


def _can_carry(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    return isinstance(optimizer, _KNOWN) and set(state) <= _FIRST_MOMENTS | _SECOND_MOMENTS | _COUNTS


def warn_of_lost_state(optimizer: Optimizer, leaving: Sequence[nn.Parameter]) -> None:
    """Say it where the state of weights that leave is not understood, so that what comes for them starts afresh."""
    states = [optimizer.state[one] for one in leaving if one in optimizer.state]
    lost = [state for state in states if state and not _can_carry(optimizer, state)]
    if lost:
        warnings.warn(
            f"tdfx does not know what the state of {type(optimizer).__name__} means ({', '.join(map(str, lost[0]))}), so "
            f"the {len(lost)} rewritten weights start with fresh state; all others keep theirs. "
            f"SGD, Adam and AdamW are carried over.",
            TdfxWarning,
            stacklevel=5,
        )
