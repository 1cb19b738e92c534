"""Modules whose inputs or outputs are more than tensors, exported as ones that take and give tensors only.

A graph has tensors for inputs and outputs. Tensors inside of lists, dicts and dataclasses become inputs of their own, with
names such as ``batch_mask``; numbers, None and text that go in are constants of the graph. Numbers that come out become
tensors, and None and text are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    GetAttrKey,
    register_pytree_node,
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)

from tdfx.errors import ExportError

Number = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, slots=True)
class Record:
    """What stands for a dataclass in a tree of arguments, since torch's trees do not look inside of dataclasses."""

    original: Any
    values: dict[str, Any]
    """The fields that its constructor takes, which may hold records too."""


register_pytree_node(
    Record,
    lambda record: (list(record.values.values()), (record.original, tuple(record.values))),
    lambda values, context: Record(context[0], dict(zip(context[1], values, strict=True))),
    flatten_with_keys_fn=lambda record: (
        [(GetAttrKey(name), value) for name, value in record.values.items()],
        (record.original, tuple(record.values)),
    ),
)


def as_records(arguments: Any) -> Any:
    """Return arguments with a record in the place of each dataclass."""

    def as_record(leaf: Any) -> Any:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return Record(leaf, {each.name: as_records(getattr(leaf, each.name)) for each in fields(leaf) if each.init})

    return tree_map(as_record, arguments)


def from_records(arguments: Any) -> Any:
    """Return arguments with a new dataclass in the place of each record; its constructor derives what it derives."""

    def from_record(leaf: Any) -> Any:
        return replace(leaf.original, **from_records(leaf.values)) if isinstance(leaf, Record) else leaf

    return tree_map(from_record, arguments, is_leaf=lambda value: isinstance(value, Record))


def named_tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among arguments and inside of them, by name.

    >>> list(named_tensors({"x": torch.ones(1), "batch": {"mask": [torch.ones(1), None]}}))
    ['x', 'batch_mask_0']
    """
    leaves, _ = tree_flatten_with_path(dict(arguments))
    named = (("_".join(map(_key, path)), leaf) for path, leaf in leaves)
    return {name: leaf for name, leaf in named if isinstance(leaf, Tensor)}


def _key(entry: Any) -> str:
    return str(next(getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name)))


def output_tensors(outputs: Any) -> tuple[Tensor, ...]:
    """Return the tensors that a forward gave, in order, with its numbers as tensors.

    >>> output_tensors({"loss": None, "logits": torch.ones(1), "count": 3})
    (tensor([1.]), tensor(3))

    Raises:
        ExportError: There is an object in which no tensors can be found.
    """
    return tuple(_output_tensors(outputs))


def _output_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Number):
        yield torch.scalar_tensor(value, dtype=_dtype_of(value))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _output_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _output_tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _output_tensors(getattr(value, entry.name))
    elif value is not None and not isinstance(value, str):
        leaves, _ = tree_flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            raise ExportError(
                f"The model gives a {type(value).__name__}, in which no tensors can be found. Wrap it in a module whose "
                f"forward returns tensors, in a tuple, a dict or a dataclass."
            )
        for leaf in leaves:
            yield from _output_tensors(leaf)


def _dtype_of(value: Any) -> torch.dtype:
    if isinstance(value, bool | torch.SymBool):
        return torch.bool
    return torch.int64 if isinstance(value, int | torch.SymInt) else torch.float32


def gives_tensors_only(outputs: Any) -> bool:
    """Return True if an exporter can take what a forward gave as it is."""
    return all(isinstance(leaf, Tensor) for leaf in tree_flatten(outputs)[0])


class PlainForward(nn.Module):
    """A module with a forward that takes the tensors of example inputs, in order, and gives a tuple of tensors.

    Args:
        module: What it calls.
        arguments: The positional arguments of the example inputs.
        named: Their keyword arguments.
    """

    PREFIX = "module."
    """What the names of all parameters and buffers begin with."""

    def __init__(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        leaves, self._structure = tree_flatten((arguments, named))
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._positions = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the module with the tensors in the places of those of the example inputs."""
        leaves = list(self._leaves)
        for position, tensor in zip(self._positions, tensors, strict=True):
            leaves[position] = tensor
        arguments, named = from_records(tree_unflatten(leaves, self._structure))
        return output_tensors(self.module(*arguments, **named))
