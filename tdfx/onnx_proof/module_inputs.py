"""Example inputs of a module: check them, pass them in the order of ``forward``, and lengthen their dynamic axes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdfx.errors import InputError, nearest

ExampleInputs = tuple[Tensor, ...] | dict[str, Tensor]
"""Example inputs after a check: positional arguments, or keyword arguments by name."""

Axes = Mapping[str, Mapping[int, str]]
"""Argument of ``forward`` -> axis -> name of its size; axes of one name have one size."""

Outputs = tuple[Tensor, ...]


def as_example_inputs(inputs: object) -> ExampleInputs:
    """Return example inputs as a tuple or a dict of tensors, or raise InputError."""
    if isinstance(inputs, Tensor):
        return (inputs,)
    if isinstance(inputs, Mapping) and all(isinstance(tensor, Tensor) for tensor in inputs.values()):
        return dict(inputs)
    if isinstance(inputs, (tuple, list)) and all(isinstance(tensor, Tensor) for tensor in inputs):
        return tuple(inputs)
    kinds = ", ".join(type(value).__name__ for value in inputs) if isinstance(inputs, (tuple, list)) else ""
    passed = f"({kinds})" if isinstance(inputs, (tuple, list)) else f"a {type(inputs).__name__}"
    raise InputError(
        f"example_inputs must be a tuple of tensors, not {passed}: pass example_inputs=(x,), or a dict of tensors by the "
        f"names of forward's arguments."
    )


def describe_inputs(inputs: ExampleInputs) -> str:
    """Return dtypes and shapes as text, for a message."""
    named = inputs.items() if isinstance(inputs, dict) else (("", tensor) for tensor in inputs)
    texts = (f"{name}{': ' if name else ''}{str(tensor.dtype)[6:]}{list(tensor.shape)}" for name, tensor in named)
    return f"({', '.join(texts)})"


def call_arguments(module: nn.Module, inputs: ExampleInputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return positional and keyword arguments; the latter in the order of ``forward``, which an export uses."""
    if not isinstance(inputs, dict):
        return inputs, {}
    names = [name for name in inspect.signature(module.forward).parameters if name in inputs]
    return (), {name: inputs[name] for name in dict.fromkeys([*names, *inputs])}


def argument_names(module: nn.Module, inputs: ExampleInputs) -> list[str] | None:
    """Return the names of the arguments that the inputs are passed as; None if ``forward`` does not name them."""
    arguments, named = call_arguments(module, inputs)
    try:
        bound = inspect.signature(module.forward).bind(*arguments, **named)
    except TypeError:
        return None
    kinds = {bound.signature.parameters[name].kind for name in bound.arguments}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    return list(bound.arguments)


def dynamic_shapes(module: nn.Module, inputs: ExampleInputs, axes: Axes | None) -> dict[str, Any] | None:
    """Return dynamic axes as ``torch.export`` takes them, None if there are none; raise InputError for unknown ones."""
    if not axes:
        return None
    names = argument_names(module, inputs)
    if names is None:
        raise InputError(
            f"dynamic_axes names arguments of {type(module).__name__}.forward, which does not name its arguments (it takes "
            f"*args or **kwargs), or does not take the example inputs. Wrap it in a module that names them."
        )
    tensors = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    for name, sizes in axes.items():
        if name not in tensors:
            raise InputError(
                f"dynamic_axes names {name!r}, which is none of the example inputs. Nearest: {nearest(name, names)}."
            )
        shape = list(tensors[name].shape)
        for axis, size in sizes.items():
            if not isinstance(axis, int) or not 0 <= axis < len(shape):
                raise InputError(
                    f"dynamic_axes names axis {axis!r} of {name!r}, whose example has the {len(shape)} axes of shape "
                    f"{shape}. Count from 0."
                )
            if not isinstance(size, str) or not size.isidentifier():
                raise InputError(
                    f"dynamic_axes calls axis {axis} of {name!r} {size!r}: give it a name such as 'batch'. Axes with one "
                    f"name have one size."
                )
    return {name: dict(axes[name]) if axes.get(name) else None for name in names}


def lengthen(module: nn.Module, inputs: ExampleInputs, axes: Axes) -> ExampleInputs:
    """Return example inputs that are longer by one in each dynamic axis: the first entry comes twice."""
    names = argument_names(module, inputs)
    assert names is not None, "dynamic_shapes has checked this"
    longer = dict(inputs) if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    for name, sizes in axes.items():
        for axis in sizes:
            tensor = longer[name]
            index = [0, *range(tensor.shape[axis])] if tensor.shape[axis] else []
            longer[name] = tensor.index_select(axis, torch.tensor(index, dtype=torch.int64, device=tensor.device))
    return {name: longer[name] for name in names} if isinstance(inputs, dict) else tuple(longer.values())
