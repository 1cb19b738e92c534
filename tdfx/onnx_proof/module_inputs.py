"""Example inputs of a module: check them, pass them in the order of ``forward``, and lengthen their dynamic axes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tdfx.errors import InputError, nearest
from tdfx.onnx_proof.plain_forward import Record, as_records, named_tensors

ExampleInputs = tuple[Any, ...] | dict[str, Any]
"""Example inputs after a check: positional arguments, or keyword arguments by name."""

_CONSTANTS = (bool, int, float, str, type(None))

Axes = Mapping[str, Mapping[int, str]]
"""Argument of ``forward`` -> axis -> name of its size; axes of one name have one size."""

Outputs = tuple[Tensor, ...]


def as_example_inputs(inputs: object) -> ExampleInputs:
    """Return example inputs as a tuple of arguments or a dict of named ones, or raise InputError.

    Dataclasses in them become records.
    """
    if isinstance(inputs, Tensor):
        return (inputs,)
    passed = f"a {type(inputs).__name__}"
    if isinstance(inputs, Mapping | tuple | list):
        arguments = as_records(dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs))
        leaves = tree_leaves(arguments)
        odd = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_CONSTANTS))]
        if not odd and (not arguments or any(isinstance(leaf, Tensor) for leaf in leaves)):
            return arguments  # type: ignore[no-any-return]
        passed = f"({', '.join(type(value).__name__ for value in odd or leaves)})"
    raise InputError(
        f"example_inputs must be a tuple of tensors, not {passed}: pass example_inputs=(x,), or a dict of tensors by the "
        f"names of forward's arguments. Tensors may be in lists, dicts and dataclasses, beside numbers and None; wrap a "
        f"model that takes other objects in a module whose forward makes them from tensors."
    )


def is_plain(inputs: ExampleInputs) -> bool:
    """Return True if every argument is a tensor, which an exporter can take as it is."""
    return all(isinstance(value, Tensor) for value in (inputs.values() if isinstance(inputs, dict) else inputs))


def input_tensors(inputs: ExampleInputs) -> ExampleInputs:
    """Return the tensors among the arguments and inside of them: a tuple, or a dict by name."""
    if isinstance(inputs, dict):
        return named_tensors(inputs)
    return tuple(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


def describe_inputs(inputs: ExampleInputs) -> str:
    """Return dtypes and shapes as text, for a message."""
    named = inputs.items() if isinstance(inputs, dict) else (("", value) for value in inputs)
    return f"({', '.join(f'{name}: {_describe(value)}' if name else _describe(value) for name, value in named)})"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    if isinstance(value, Record):
        values = ", ".join(f"{name}={_describe(item)}" for name, item in value.values.items())
        return f"{type(value.original).__name__}({values})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_describe(item)}' for key, item in value.items())}}}"
    return f"[{', '.join(map(_describe, value))}]" if isinstance(value, list | tuple) else repr(value)


def call_arguments(module: nn.Module, inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def graph_names(module: nn.Module, inputs: ExampleInputs) -> list[str] | None:
    """Return the names of a graph's inputs for these inputs; None if ``forward`` does not name its arguments."""
    names = argument_names(module, inputs)
    if names is None:
        return None
    values = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    return list(named_tensors({name: values[name] for name in names}))


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
    values = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    tensors = named_tensors({name: values[name] for name in names})
    for name, sizes in axes.items():
        if name not in tensors:
            raise InputError(
                f"dynamic_axes names {name!r}, which is none of the example inputs. Nearest: {nearest(name, tensors)}."
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
    return {name: dict(axes[name]) if axes.get(name) else None for name in tensors}


def known_axes(module: nn.Module, inputs: ExampleInputs, axes: Mapping[str, Sequence[str]]) -> Axes:
    """Return the dynamic axes of a graph's inputs, by name "" for fixed ones, that a module's inputs of that name have."""
    names = argument_names(module, inputs)
    if names is None:
        return {}
    values = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    tensors = named_tensors({name: values[name] for name in names})
    return {
        name: {axis: re.sub(r"\W", "_", size) for axis, size in enumerate(sizes) if size}
        for name, sizes in axes.items()
        if name in tensors and tensors[name].dim() == len(sizes) and any(sizes)
    }


def lengthen(module: nn.Module, inputs: ExampleInputs, axes: Axes) -> ExampleInputs:
    """Return example inputs that are longer by one in each dynamic axis: the first entry comes twice."""
    names = argument_names(module, inputs)
    assert names is not None, "dynamic_shapes has checked this"
    values = dict(inputs) if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    tensors = named_tensors({name: values[name] for name in names})
    lengthened = iter([_lengthened(tensor, axes.get(name, {})) for name, tensor in tensors.items()])
    longer = tree_map_only(Tensor, lambda _: next(lengthened), {name: values[name] for name in names})
    return longer if isinstance(inputs, dict) else tuple(longer.values())


def _lengthened(tensor: Tensor, axes: Iterable[int]) -> Tensor:
    for axis in axes:
        index = [0, *range(tensor.shape[axis])] if tensor.shape[axis] else []
        tensor = tensor.index_select(axis, torch.tensor(index, dtype=torch.int64, device=tensor.device))
    return tensor
