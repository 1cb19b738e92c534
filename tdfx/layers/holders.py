"""Finding tensors in what surrounds a model or an optimizer: lists, dicts, closures, hooks, objects of other classes."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

_FRAMEWORKS = {"accelerate", "builtins", "lightning", "numpy", "pytorch_lightning", "tdfx", "torch", "transformers"}
"""Packages whose objects are not searched: they refer to all of a training, or are known to hold no parameters."""

_MAPPINGS = (dict, types.MappingProxyType, WeakIdKeyDictionary)
_CONTAINERS = (list, tuple, set, frozenset, deque)
_MOST_ITEMS = 10_000
"""Items of one container that are looked at: a data set of plain numbers may be a list of millions."""


@dataclass(frozen=True, slots=True)
class Held:
    """Something that was found, and where."""

    path: str
    """As code would name it, such as ``decayed[0]``."""
    value: Any
    """A tensor, a module, an optimizer, or a whole number, which may be the ``id`` of one."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The model around a part of it that is rewritten by itself."""

    whole: nn.Module
    part: nn.Module
    """The part, as the whole holds it."""

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules outside of the part by their paths; a module in both belongs to the part."""
        inside = set(self.part.modules())
        return {path: module for path, module in self.whole.named_modules() if module not in inside}


@dataclass(slots=True)
class _Search:
    objects: int
    """How many objects of a user's classes may lie inside one another."""
    seen: set[int] = field(default_factory=set)

    def __call__(self, value: Any, path: str, depth: int = 0) -> Iterator[Held]:
        if type(value) in weakref.ProxyTypes:
            value = referent(value)
        if isinstance(value, Tensor | nn.Module | Optimizer | int):
            yield Held(path, value)
            return
        if isinstance(value, str | bytes | float | type | types.ModuleType | fx.Graph) or id(value) in self.seen:
            return
        self.seen.add(id(value))
        for part_path, part, inner in self._parts(value, path, depth):
            yield from self(part, part_path, inner)

    def _parts(self, value: Any, path: str, depth: int) -> Iterator[tuple[str, Any, int]]:
        """Yield what a value refers to: where that is, and how deep."""
        if isinstance(value, _MAPPINGS):
            for key, item in islice(list(value.items()), _MOST_ITEMS):
                yield f"{path}[{key!r}]" if isinstance(key, str | int) else f"a value of {path}", item, depth
                if not isinstance(key, str):
                    yield f"a key of {path}", key, depth
        elif isinstance(value, _CONTAINERS):
            items = islice(list(value), _MOST_ITEMS)
            yield from ((f"{path}[{index}]", item, depth) for index, item in enumerate(items))
        elif isinstance(value, functools.partial):
            yield from ((path, part, depth) for part in (value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            yield f"the object of {path}", value.__self__, depth
            yield path, value.__func__, depth
        elif isinstance(value, types.FunctionType):
            yield from self._function_parts(value, path, depth)
        elif isinstance(value, weakref.ref):
            yield path, value(), depth
        elif depth < self.objects and (isinstance(value, LRScheduler) or not is_of_framework(type(value))):
            yield from ((f"{path}.{name}", part, depth + 1) for name, part in attributes_of(value).items())

    def _function_parts(self, function: types.FunctionType, path: str, depth: int) -> Iterator[tuple[str, Any, int]]:
        if is_of_framework(function):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield f"{name!r} in a function of {path}", cell.cell_contents, depth
            except ValueError:  # an empty cell: the name was never assigned
                continue
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        yield from ((f"a default of a function of {path}", default, depth) for default in defaults)


def search(value: Any, path: str, *, objects: int = 2) -> Iterator[Held]:
    """Yield the tensors, modules, optimizers and whole numbers that a value refers to, without looking inside them.

    Args:
        value: Anything.
        path: Its name, with which the paths of what is found begin.
        objects: How many objects of a user's classes may lie inside one another.
    """
    return _Search(objects)(value, path)


def is_of_framework(value: type | types.FunctionType) -> bool:
    """Return True for a class or a function of a package whose objects are not searched."""
    return (value.__module__ or "").partition(".")[0] in _FRAMEWORKS


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    slots = (name for base in type(value).__mro__ for name in _names(base.__dict__.get("__slots__", ())))
    attributes = {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)}
    return {**attributes, **getattr(value, "__dict__", {})}


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def referent(value: Any) -> Any:
    """Return what a weak reference or a proxy stands for; None if that is gone."""
    if type(value) not in weakref.ProxyTypes:
        return value()
    try:
        return value.__repr__.__self__
    except ReferenceError:
        return None


def memory_of(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return the storage of a tensor, by identity, and the range of bytes in it; None if it has none of its own."""
    if is_traceable_wrapper_subclass(tensor):
        return None
    try:
        storage, offset = tensor.untyped_storage()._cdata, cast("int", tensor.storage_offset())
        spans = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        reach = sum(spans) + 1 if tensor.numel() else 0
    except (RuntimeError, NotImplementedError, ValueError):  # a lazy parameter, or a subclass without a storage
        return None
    return storage, offset * tensor.element_size(), (offset + reach) * tensor.element_size()


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Return True if a write to one tensor may change the other.

    >>> import torch
    >>> weight = torch.ones(4, 4)
    >>> share_memory(weight, weight.t()), share_memory(weight[:2], weight[2:]), share_memory(weight, weight.clone())
    (True, False, False)
    """
    if first is second:
        return True
    memory, other = memory_of(first), memory_of(second)
    if memory is None or other is None or memory[0] != other[0]:
        return False
    return max(memory[1], other[1]) < min(memory[2], other[2])
