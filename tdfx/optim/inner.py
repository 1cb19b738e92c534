"""Optimizers inside optimizers, and what else an optimizer holds of the parameters that it trains.

Lookahead, sharpness-aware minimization and chains of optimizers are optimizers around optimizers. The inner ones go along
with a rewrite as if they had been passed. Whatever else refers to a parameter that is replaced (a list of its own, a hook, a
flat buffer) cannot be translated, so it is refused by its name before anything changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.errors import OptimizerError
from tdfx.layers.holders import Held, attributes_of, search, share_memory

_MOVED_OF_GROUP = {"params", "param_names"}

_ADVICE = (
    "tdfx moves what is in param_groups and state, and the same of optimizers inside. Rewrite without optimizer=, and make "
    "a new optimizer from the returned model's parameters."
)


def with_inner(optimizers: Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    """Return optimizers, each followed by those inside it, all of them once.

    >>> import torch
    >>> inner = torch.optim.SGD([torch.ones(2, requires_grad=True)])
    >>> outer = torch.optim.SGD([torch.ones(2, requires_grad=True)])
    >>> outer.inside = [inner]
    >>> with_inner([outer]) == (outer, inner)
    True
    """
    found: dict[int, Optimizer] = {}
    waiting = list(optimizers)[::-1]
    while waiting:
        optimizer = waiting.pop()
        if id(optimizer) not in found:
            found[id(optimizer)] = optimizer
            inner = [held.value for held in _held_by(optimizer) if isinstance(held.value, Optimizer)]
            waiting += inner[::-1]
    return tuple(found.values())


def families(optimizers: Sequence[Optimizer]) -> list[tuple[Optimizer, ...]]:
    """Group optimizers: one that lies in no other one, with all those inside it."""
    with_their_inner = [with_inner([optimizer]) for optimizer in optimizers]
    inside = {id(inner) for _, *others in with_their_inner for inner in others}
    outermost = [family for family in with_their_inner if id(family[0]) not in inside]
    # Two optimizers that lie in each other are one family.
    return outermost or with_their_inner[:1]


def check_holders(
    optimizers: Sequence[Optimizer], leaving: Mapping[str, Sequence[Tensor]], staying: nn.Module | None = None
) -> None:
    """Raise OptimizerError if an optimizer refers to parameters that leave in a way that cannot be translated.

    Args:
        optimizers: All of them, the inner ones too.
        leaving: What the parameters are, in words -> the parameters.
        staying: A module that will stay the same object with the new parameters; an optimizer may refer to it.
    """
    names = {id(tensor): name for name, tensors in leaving.items() for tensor in tensors}
    by_shape = {tuple(tensor.shape): tensor for tensors in leaving.values() for tensor in tensors if tensor.numel() > 1}
    settings = {key for optimizer in optimizers for key in optimizer.defaults}
    for optimizer in optimizers if names else ():
        kind = type(optimizer).__name__
        _check_entries_of_groups(optimizer, names, settings | _MOVED_OF_GROUP)
        count = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        for held in _held_by(optimizer):
            value = held.value
            if isinstance(value, int) and value in names:
                raise OptimizerError(f"{kind} refers to {names[value]} by its id, in {held.path}. {_ADVICE}")
            if isinstance(value, nn.Module) and not _contains(value, staying):
                name = next((names[id(each)] for each in value.parameters() if id(each) in names), None)
                if name is not None:
                    raise OptimizerError(
                        f"{kind} refers to a {type(value).__name__} with {name} in {held.path}, which another module will "
                        f"replace. {_ADVICE}"
                    )
            if not isinstance(value, Tensor) or not value.dim():
                continue
            name = names.get(id(value)) or next(
                (name for name, tensors in leaving.items() if any(share_memory(value, tensor) for tensor in tensors)),
                None,
            )
            if name is not None:
                raise OptimizerError(f"{kind} holds {name} in {held.path} too, which would keep the old one. {_ADVICE}")
            if value.numel() == count > 1 and value.dim() == 1:
                raise OptimizerError(f"{kind} holds one flat tensor for all its parameters in {held.path}. {_ADVICE}")
            if (tensor := by_shape.get(tuple(value.shape))) is not None:
                raise OptimizerError(
                    f"{kind} holds a tensor of the shape of {names[id(tensor)]} in {held.path}, such as a copy or an "
                    f"average of it, and it is not known what becomes of it. {_ADVICE}"
                )


def _check_entries_of_groups(optimizer: Optimizer, leaving: Mapping[int, str], known: Collection[str]) -> None:
    """Raise OptimizerError if a group with parameters that leave has a list with an entry for each of its parameters."""
    for index, group in enumerate(optimizer.param_groups):
        count = len(group["params"])
        name = next((leaving[id(each)] for each in group["params"] if id(each) in leaving), None)
        for key, value in group.items() if name is not None and count > 1 else ():
            is_list = isinstance(value, list | tuple) and not any(
                isinstance(each, Tensor) and each.dim() for each in value
            )
            is_list |= isinstance(value, Tensor) and value.dim() == 1
            if is_list and len(value) == count and key not in known:
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps {count} entries beside as many parameters in "
                    f"param_groups[{index}][{key!r}], and {name} will be replaced by others: it is not known what their "
                    f"entries are. {_ADVICE}"
                )


def _contains(module: nn.Module, part: nn.Module | None) -> bool:
    return part is not None and any(each is part for each in module.modules())


def _held_by(optimizer: Optimizer) -> Iterator[Held]:
    """Yield what an optimizer refers to beside the parameters in its groups and their state."""
    # Of these attributes, parameters and what belongs to one of them are moved.
    moved = {"defaults", "param_groups", "state"}
    attributes = {name: value for name, value in attributes_of(optimizer).items() if name not in moved}
    attributes |= {
        f"param_groups[{index}][{name!r}]": value
        for index, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name not in _MOVED_OF_GROUP
    }
    attributes |= {f"state[{key!r}]": value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    for name, value in attributes.items():
        yield from (held for held in search(value, name) if held.value is not optimizer)
