"""What a structural copy of a model cannot take along: iterators that hold its modules, and finalizers."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from tdfx.errors import ModelError, TdfxWarning
from tdfx.passes.analysis.iterators import is_iterator, parts_of
from tdfx.passes.analysis.libraries import is_of_library


def refuse_iterators_of_modules(model: nn.Module, iterators: Iterable[Any]) -> None:
    """Raise ModelError for an iterator that would go on using the modules of the old model after a rewrite."""
    modules = {id(module) for module in model.modules()}
    for iterator in iterators:
        if held := next((part for part in _parts(iterator, set()) if id(part) in modules), None):
            name = getattr(iterator, "__qualname__", type(iterator).__name__)
            raise ModelError(
                f"{type(model).__name__} keeps an iterator ({name}) that holds its {type(held).__name__}: it would go on "
                f"using the old one after a rewrite, since an iterator cannot be copied. Let forward make it, or keep a "
                f"number in its place, such as the index of the next layer."
            )


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    """Yield what an iterator draws from, uses or calls, however deep."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if is_iterator(value):
        parts: Iterable[Any] = parts_of(value)
    elif isinstance(value, list | tuple):
        parts = value
    elif isinstance(value, types.MethodType):
        parts = (value.__self__,)
    else:
        yield value
        return
    for part in parts:
        yield from _parts(part, seen)


def warn_of_finalizers(model: nn.Module) -> None:
    """Warn of classes whose ``__del__`` Python calls for every copy: what it closes or removes, the copies share."""
    for kind in {type(module) for module in model.modules()}:
        owner = next((base for base in kind.__mro__ if "__del__" in vars(base)), None)
        if owner is not None and not is_of_library(owner.__module__) and inspect.isfunction(vars(owner)["__del__"]):
            warnings.warn(
                f"{owner.__name__} has a __del__(), which Python calls for each copy of the model that tdfx drops, and for "
                f"yours once the rewritten model has taken its place: what it closes or removes is shared by all of them. "
                f"Do that in a method that you call.",
                TdfxWarning,
                stacklevel=2,
            )
