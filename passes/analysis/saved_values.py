"""How values are saved and put back: memory, random generators, files, context variables, caches, containers."""

from __future__ import annotations

import array
import contextvars
import ctypes
import functools
import io
import random
import types
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdfx.passes.analysis.iterators import is_iterator

Saved = tuple[Any, Callable[[Any], object]]
"""What a value holds, and the function that puts it back."""

CACHE = type(functools.lru_cache(int))
"""The class of functions that remember their results."""
_CTYPES_NUMBER = ctypes.c_int.__mro__[1]
"""The class of plain numbers in C's memory."""

_PLAIN = frozenset({str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device})


def is_plain(value: Any) -> bool:
    """Return True for numbers, texts and tuples of them, which hold nothing that could change: most attributes of layers."""
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value))


def empty_again(containers: Iterable[dict[Any, Any]]) -> None:
    """Empty what was empty before."""
    for each in containers:
        if each:
            each.clear()


def saved_contents(value: Any) -> Saved | None:
    """Return what a value holds and how to put it back; None if it is no such value."""
    if isinstance(value, np.ndarray):
        return (value.copy(), functools.partial(np.copyto, value)) if value.flags.writeable else (None, id)
    if isinstance(value, random.Random):
        return value.getstate(), value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state(), value.set_state
    if isinstance(value, np.random.Generator | np.random.BitGenerator):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return bits.state, functools.partial(setattr, bits, "state")
    if isinstance(value, torch.Generator):
        return value.get_state(), value.set_state
    if isinstance(value, bytearray | array.array):
        return value[:], lambda saved: None if value == saved else value.__setitem__(slice(None), saved)
    if isinstance(value, io.StringIO | io.BytesIO) and not value.closed:
        text: Any = value
        return text.__getstate__(), lambda saved: None if text.__getstate__() == saved else text.__setstate__(saved)
    if isinstance(value, memoryview) and not value.readonly and value.c_contiguous:
        return value.tobytes(), lambda saved: value.cast("B").__setitem__(slice(None), saved)
    if isinstance(value, ctypes.Structure | ctypes.Union | ctypes.Array | _CTYPES_NUMBER):
        memory: Any = value
        address = ctypes.addressof(memory)
        return ctypes.string_at(address, ctypes.sizeof(memory)), lambda saved: ctypes.memmove(
            address, saved, len(saved)
        )
    if isinstance(value, io.IOBase) and not value.closed and value.readable() and not value.writable():
        return _position_of(value), lambda saved: None if saved is None else value.seek(saved)
    if isinstance(value, contextvars.ContextVar):
        return _value_of(value), lambda saved: None if _value_of(value) is saved else value.set(saved)
    return None


def _position_of(file: io.IOBase) -> int | None:
    """Return where a file is read; None for one that cannot be set back, such as a pipe."""
    try:
        return file.tell() if file.seekable() else None
    except OSError:  # a text that is read in a loop does not tell
        return None


def _value_of(variable: contextvars.ContextVar[Any]) -> Any:
    """Return the value of a variable or its default; None without either, for no variable can be made unset again."""
    try:
        return variable.get()
    except LookupError:
        return None


def fresh_cache(function: Any) -> Any:
    """Return a function that computes the same and remembers nothing yet."""
    return functools.lru_cache(**function.cache_parameters())(function.__wrapped__)


def restore_class(kind: type, names: Collection[str], saved: dict[str, Any]) -> None:
    """Give a class its attributes back, and take away those that it did not have under any of its names."""
    for name in [name for name in vars(kind) if name not in names and not name.startswith("__")]:
        type.__delattr__(kind, name)
    for name, value in saved.items():
        if vars(kind).get(name) is not value:
            type.__setattr__(kind, name, value)


def remove_names(names: Iterable[str], file: dict[str, Any]) -> None:
    """Remove names from a file that it did not have; but a submodule that was imported stays imported."""
    for name in names:
        if not isinstance(file.get(name), types.ModuleType):
            file.pop(name, None)


def empty_slot(value: Any, name: str, slot: Any) -> None:
    """Empty a slot that has been filled since."""
    if hasattr(value, name):
        slot.__delete__(value)


def refill(container: Any, saved: list[Any]) -> None:
    """Give a list or a deque its items back."""
    if [*map(id, container)] != [*map(id, saved)]:
        container.clear()
        container.extend(saved)


def refill_dict(base: Any, container: dict[Any, Any], saved: list[tuple[Any, Any]]) -> None:
    """Give a dict its items back, in their order, by the methods of its base class."""
    if [(id(key), id(item)) for key, item in base.items(container)] != [(id(key), id(item)) for key, item in saved]:
        base.clear(container)
        for key, item in saved:
            base.__setitem__(container, key, item)


def refill_set(container: set[Any], saved: set[Any]) -> None:
    """Give a set its items back."""
    container.clear()
    container.update(saved)


def differ(item: Any, other: Any) -> bool:
    """Return whether two items are others; iterators and caches always are, since copies of them are lent."""
    return item is not other and not is_iterator(item) and not isinstance(item, CACHE)


def holds_same(saved: Any, now: Any) -> bool:
    """Return whether two contents are the same, which may be arrays, tensors, or tuples and dicts of them."""
    if isinstance(saved, Tensor):
        return isinstance(now, Tensor) and torch.equal(saved, now)
    if isinstance(saved, np.ndarray):
        return isinstance(now, np.ndarray) and saved.tobytes() == now.tobytes()
    if isinstance(saved, tuple | list) and isinstance(now, tuple | list):
        return len(saved) == len(now) and all(map(holds_same, saved, now))
    if isinstance(saved, dict) and isinstance(now, dict):
        return saved.keys() == now.keys() and all(holds_same(saved[key], now[key]) for key in saved)
    return saved is now or bool(saved == now)
