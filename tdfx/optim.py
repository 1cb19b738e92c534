"""Carrying optimizer state from weights to their factors, and back.

With W = join(factors), the gradient of each factor is the vector-Jacobian product of ``join`` with the gradient of W. A
momentum is a sum of gradients, so it moves the same way, exactly for the instant of the switch. A second moment is a sum
of squares and has no exact form; the estimate used here treats the entries of the gradient as uncorrelated, which turns
the same product, taken at the squared factors, into the expected square. It is positive, and exact in scale where the
second moments are all equal and the factors orthogonal; it is never let below the square of the first moment. Step
counts are kept.

Back at the merge, the first moment of W is the one of least norm whose image is the factors' moments: its projection on
the tangent space of the low-rank weights. The second moment is the average of the factors' that the estimate above would
have come from, exact where all are equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from tdfx.errors import OptimizerError, TdfxWarning
from tdfx.factors.algebra import linearize
from tdfx.layers import Factorized
from tdfx.ranks.spectrum import working_dtype

_FIRST_MOMENTS = frozenset({"momentum_buffer", "exp_avg"})
_SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
_COUNTS = frozenset({"step"})
_KNOWN = (SGD, Adam, AdamW)

Moments = tuple[Tensor, ...]


class Carrier(Protocol):
    """How the moments of some parameters become those of the parameters that take their place."""

    def first(self, moments: Moments) -> Moments:
        """Carry moments that are sums of gradients."""

    def second(self, moments: Moments) -> Moments:
        """Carry moments that are sums of squared gradients."""


@dataclass(frozen=True, slots=True)
class ToFactors:
    """From a weight to the factors of a layer that takes its place."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the vector-Jacobian product of ``join`` at the factors."""
        return self._pull_back(self.layer.weights, moments[0])

    def second(self, moments: Moments) -> Moments:
        """Return the same product at the squared factors."""
        return self._pull_back(tuple(weight.square() for weight in self.layer.weights), moments[0])

    def _pull_back(self, weights: Moments, moment: Tensor) -> Moments:
        detached = [weight.detach().to(moment.dtype) for weight in weights]
        return linearize(self.layer.join, detached).pull(self.layer.kind.to_dense(moment))


@dataclass(frozen=True, slots=True)
class ToDense:
    """From the factors of a layer to the weight that they make."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the dense moment of least norm that the factors' moments can come from."""
        weights = tuple(weight.detach().to(working_dtype(weight)) for weight in self.layer.weights)
        return (self.layer.kind.from_dense(self.layer.scheme.project(self.layer.operation, weights, moments)),)

    def second(self, moments: Moments) -> Moments:
        """Spread the factors' moments over the weight by the squared factors, and divide by what ones would give."""
        squares = [weight.detach().to(working_dtype(weight)).square() for weight in self.layer.weights]
        near = linearize(self.layer.join, squares)
        ones = near.push(near.pull(torch.ones_like(near.value)))
        average = near.push(moments) / ones.clamp_min(torch.finfo(near.value.dtype).tiny)
        return (self.layer.kind.from_dense(average),)


@dataclass(frozen=True, slots=True)
class ToFewer:
    """From factors to factors of lower ranks, by way of the dense moments."""

    old: ToDense
    new: ToFactors

    def first(self, moments: Moments) -> Moments:
        """Return what the new factors can hold of the least moment that the old ones' come from."""
        return self.new.first(self.old.first(moments))

    def second(self, moments: Moments) -> Moments:
        """Return the same by the estimates of both."""
        return self.new.second(self.old.second(moments))


@dataclass(frozen=True, slots=True)
class Exchange:
    """Parameters that leave an optimizer together, and those that take their place."""

    site: str
    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    carrier: Carrier
    rename: Callable[[str], list[str]]
    """From the first old parameter's name to the new ones', for optimizers that were made with names."""
    bias: nn.Parameter | None = None
    """The bias that stays, under another name."""
    rename_bias: Callable[[str], str] = str
    """From the bias's old name to its new one."""


@dataclass(slots=True)
class Surgery:
    """Everything that will be changed in the optimizers, worked out before anything is."""

    lists: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    """A list inside an optimizer, and what it will hold."""
    states: list[tuple[Optimizer, Exchange, list[dict[str, Any]]]] = field(default_factory=list)
    """An optimizer, an exchange in it, and the state of each new parameter; empty for fresh state."""

    def commit(self) -> None:
        """Change the optimizers in place; nothing here can fail."""
        for inside, content in self.lists:
            inside[:] = content
        for optimizer, exchange, states in self.states:
            for parameter in exchange.old:
                optimizer.state.pop(parameter, None)
            for parameter, state in zip(exchange.new, states, strict=False):
                optimizer.state[parameter] = state


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return the optimizers as a tuple.

    Raises:
        OptimizerError: Something else was passed.
    """
    given = list(optimizer) if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]
    found: list[Optimizer] = []
    for one in given:
        if not isinstance(one, Optimizer):
            raise OptimizerError(
                f"optimizer={one!r} is a {type(one).__name__}, not a torch.optim.Optimizer: its parameters and state could "
                f"not be moved. Pass the optimizer that trains the model, or a list of them."
            )
        if isinstance(one, LBFGS):
            raise OptimizerError(
                "LBFGS keeps one flat history for all parameters together, which cannot be carried over. Make a new one "
                "from the returned model's parameters, and pass no optimizer."
            )
        found.append(one)
    return tuple(found)


def prepare(optimizers: Sequence[Optimizer], exchanges: Iterable[Exchange]) -> Surgery:
    """Work out the new groups and states of the optimizers, changing nothing.

    New parameters stand where the first of the old ones stood, so groups keep their order and their settings.

    Raises:
        OptimizerError: A parameter that is to be replaced is in none of the optimizers, or its parts are spread over
            several groups.
    """
    surgery = Surgery()
    pending = list(exchanges)
    if not optimizers:
        return surgery
    home = _homes(optimizers)
    _check_homes(pending, home)
    for optimizer in optimizers:
        mine = [exchange for exchange in pending if home[id(exchange.old[0])][0][0] is optimizer]
        for group in optimizer.param_groups:
            # A bias may lie in another optimizer than its weight, so each group is asked for every exchange's.
            _plan_group(group, pending, surgery)
        surgery.states.extend((optimizer, exchange, _new_states(optimizer, exchange)) for exchange in mine)
        _warn_of_lost_state(optimizer, mine)
    return surgery


def _homes(optimizers: Sequence[Optimizer]) -> dict[int, list[tuple[Optimizer, int]]]:
    """Return for each parameter the optimizers that hold it and the index of its group there."""
    home: dict[int, list[tuple[Optimizer, int]]] = {}
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                home.setdefault(id(parameter), []).append((optimizer, index))
    return home


def _check_homes(exchanges: Sequence[Exchange], home: dict[int, list[tuple[Optimizer, int]]]) -> None:
    missing = [one.site for one in exchanges if any(id(parameter) not in home for parameter in one.old)]
    if missing:
        raise OptimizerError(
            f"The weights of {len(missing)} sites are in none of the optimizers given, the first being {missing[0]!r}: the "
            f"optimizer belongs to another model, or trains only a part of this one. Pass the optimizer (or all of them, "
            f"as a list) that holds this model's parameters, or keep those sites: Policy(exclude=({missing[0]!r}, ...))."
        )
    for one in exchanges:
        shared = [parameter for parameter in one.old if len(home[id(parameter)]) > 1]
        if shared:
            raise OptimizerError(
                f"The weight of site {one.site!r} is held by {len(home[id(shared[0])])} of the optimizers given, so its "
                f"state has no one place to go to. Give each parameter to one optimizer."
            )
        places = {(id(optimizer), index) for parameter in one.old for optimizer, index in home[id(parameter)]}
        if len(places) > 1:
            raise OptimizerError(
                f"The factors of site {one.site!r} are in {len(places)} parameter groups, so the merged weight has no one "
                f"place to go to. Put them into one group first."
            )


def _plan_group(group: dict[str, Any], exchanges: Sequence[Exchange], surgery: Surgery) -> None:
    """Note what a group's list of parameters, and of names where it has one, will hold."""
    by_first = {id(one.old[0]): one for one in exchanges}
    leaving = {id(parameter) for one in exchanges for parameter in one.old}
    renamed = {id(one.bias): one.rename_bias for one in exchanges if one.bias is not None}
    names = group.get("param_names")
    parameters: list[nn.Parameter] = []
    new_names: list[str] = []
    for position, parameter in enumerate(group["params"]):
        exchange = by_first.get(id(parameter))
        if exchange is not None:
            parameters.extend(exchange.new)
            new_names.extend(exchange.rename(names[position]) if names else [])
        elif id(parameter) not in leaving:
            parameters.append(parameter)
            new_names.extend([renamed.get(id(parameter), str)(names[position])] if names else [])
    surgery.lists.append((group["params"], parameters))
    if names:
        surgery.lists.append((names, new_names))


def _new_states(optimizer: Optimizer, exchange: Exchange) -> list[dict[str, Any]]:
    """Return the state of each new parameter; nothing where there is none yet, or none that can be carried."""
    old = [optimizer.state.get(parameter, {}) for parameter in exchange.old]
    if not all(old) or not _can_carry(optimizer, old[0]):
        return _fresh_states(optimizer, exchange.new)
    states: list[dict[str, Any]] = [{} for _ in exchange.new]
    for key, value in old[0].items():
        for state, carried in zip(states, _carry(key, [one[key] for one in old], value, exchange), strict=True):
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


def _carry(key: str, values: list[Any], value: Any, exchange: Exchange) -> list[Any]:
    if key in _COUNTS or value is None:
        return [value.clone() if isinstance(value, Tensor) else value for _ in exchange.new]
    moments = tuple(moment.detach().to(working_dtype(moment)) for moment in values)
    carry = exchange.carrier.first if key in _FIRST_MOMENTS else exchange.carrier.second
    return [
        torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(moment.reshape(parameter.shape))
        for parameter, moment in zip(exchange.new, carry(moments), strict=True)
    ]


def _can_carry(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    return isinstance(optimizer, _KNOWN) and set(state) <= _FIRST_MOMENTS | _SECOND_MOMENTS | _COUNTS


def _warn_of_lost_state(optimizer: Optimizer, exchanges: Sequence[Exchange]) -> None:
    states = [optimizer.state[one.old[0]] for one in exchanges if one.old[0] in optimizer.state]
    lost = [state for state in states if state and not _can_carry(optimizer, state)]
    if lost:
        warnings.warn(
            f"tdfx does not know what the state of {type(optimizer).__name__} means ({', '.join(map(str, lost[0]))}), so "
            f"the {len(lost)} rewritten weights start with fresh state; all others keep theirs. "
            f"SGD, Adam and AdamW are carried over.",
            TdfxWarning,
            stacklevel=5,
        )
