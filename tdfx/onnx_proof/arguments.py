"""Example inputs as a module's forward takes them, and which of their axes are to be dynamic."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.errors import InputError, nearest

Given = tuple[Tensor, ...] | dict[str, Tensor]
"""Example inputs, after a check: positional arguments, or keyword arguments by name."""

Axes = Mapping[str, Mapping[int, str]]
"""Argument of ``forward`` -> axis -> the name of its size; axes of one name have one size."""

Outputs = tuple[Tensor, ...]


def check_given(given: object) -> Given:
    """Return example inputs as a tuple or a dict of tensors.

    Raises:
        InputError: if they are something else.

    """
    if isinstance(given, Tensor):
        return (given,)
    if isinstance(given, Mapping) and all(isinstance(one, Tensor) for one in given.values()):
        return dict(given)
    if isinstance(given, (tuple, list)) and all(isinstance(one, Tensor) for one in given):
        return tuple(given)
    if isinstance(given, (tuple, list)):
        found = f"({', '.join(type(one).__name__ for one in given)})"
    else:
        found = f"a {type(given).__name__}"
    raise InputError(
        f"example_inputs must be a tuple of tensors, not {found}: pass example_inputs=(x,), or a dict of tensors by the "
        f"names of forward's arguments."
    )


def described(given: Given) -> str:
    """Write dtypes and shapes for a message."""
    named = given.items() if isinstance(given, dict) else (("", one) for one in given)
    texts = (f"{name}{': ' if name else ''}{str(one.dtype)[6:]}{list(one.shape)}" for name, one in named)
    return f"({', '.join(texts)})"


def in_order(module: nn.Module, given: Given) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return positional and keyword arguments, the latter in the order of ``forward``, which is that of an export."""
    if not isinstance(given, dict):
        return given, {}
    known = [name for name in inspect.signature(module.forward).parameters if name in given]
    return (), {name: given[name] for name in [*known, *(name for name in given if name not in known)]}


def names_of(module: nn.Module, given: Given) -> list[str] | None:
    """Return the names of the arguments that example inputs are passed as; None if ``forward`` does not name them."""
    arguments, named = in_order(module, given)
    try:
        bound = inspect.signature(module.forward).bind(*arguments, **named)
    except TypeError:
        return None
    kinds = {bound.signature.parameters[name].kind for name in bound.arguments}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    return list(bound.arguments)


def dynamic_shapes(module: nn.Module, given: Given, axes: Axes | None) -> dict[str, Any] | None:
    """Return dynamic axes in the form of ``torch.export``; None for none.

    Raises:
        InputError: if there is no such argument or axis.

    """
    if not axes:
        return None
    names = names_of(module, given)
    if names is None:
        raise InputError(
            f"dynamic_axes names arguments of {type(module).__name__}.forward, which does not say its arguments' names "
            f"(it takes *args or **kwargs), or does not take the example inputs. Wrap it in a module that names them."
        )
    tensors = dict(zip(names, given.values() if isinstance(given, dict) else given, strict=True))
    if isinstance(given, dict):
        tensors = {name: given[name] for name in names}
    for name, sizes in axes.items():
        if name not in tensors:
            raise InputError(
                f"dynamic_axes names {name!r}, which is none of the example inputs. Nearest: {nearest(name, names)}."
            )
        _check_axes(name, sizes, tensors[name])
    return {name: dict(axes[name]) if axes.get(name) else None for name in names}


def _check_axes(name: str, sizes: Mapping[int, str], tensor: Tensor) -> None:
    for axis, size in sizes.items():
        if not isinstance(axis, int) or not 0 <= axis < tensor.ndim:
            raise InputError(
                f"dynamic_axes names axis {axis!r} of {name!r}, whose example has the {tensor.ndim} axes of shape "
                f"{list(tensor.shape)}. Count from 0."
            )
        if not isinstance(size, str) or not size.isidentifier():
            raise InputError(
                f"dynamic_axes calls axis {axis} of {name!r} {size!r}: give it a name such as 'batch', by which axes of "
                f"one size are known."
            )


def grown(module: nn.Module, given: Given, axes: Axes) -> Given:
    """Return example inputs that are one longer in each dynamic axis; the first entry is there twice."""
    names = names_of(module, given)
    assert names is not None, "dynamic_shapes has checked this"
    values: Sequence[Tensor] = [given[name] for name in names] if isinstance(given, dict) else given
    longer = {name: _longer(one, sorted(axes.get(name, ()))) for name, one in zip(names, values, strict=True)}
    return longer if isinstance(given, dict) else tuple(longer.values())


def _longer(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        index = [0, *range(tensor.shape[axis])] if tensor.shape[axis] else []
        tensor = tensor.index_select(axis, torch.tensor(index, dtype=torch.int64, device=tensor.device))
    return tensor
