"""The registered layer kinds, and what they say about a layer."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import TypeVar

import torch
from torch import nn

from tdfx.errors import KindError, nearest
from tdfx.factors.operation import Operation
from tdfx.kinds.kind import LayerKind
from tdfx.kinds.layouts import Product
from tdfx.kinds.stock import BUILT_IN

_kinds: dict[type[nn.Module] | str, LayerKind] = {kind.layer: kind for kind in BUILT_IN}

KindT = TypeVar("KindT", bound=type[LayerKind])


def register_kind(kind: KindT) -> KindT:
    """Register a layer kind; a decorator for a subclass of ``LayerKind``.

    A kind that is registered later for the same layer class replaces the former one.

    Raises:
        KindError: It is not a subclass of LayerKind, names no layer class, or names a class that has a built-in kind.
    """
    if not (isinstance(kind, type) and issubclass(kind, LayerKind)):
        raise KindError(f"{kind!r} is not a subclass of tdfx.LayerKind. Write a class that derives from it.")
    layer = getattr(kind, "layer", None)
    if not (isinstance(layer, str) and "." in layer) and not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise KindError(
            f"{kind.__name__}.layer is {layer!r}, which names no class of layers. Set it to a subclass of "
            f"torch.nn.Module, or to its dotted name as text."
        )
    if inspect.isabstract(kind):
        raise KindError(f"{kind.__name__} does not say what a layer computes: it has no operation(). Define it.")
    if any(layer in {built_in.layer, built_in.dotted_name} for built_in in BUILT_IN):
        raise KindError(
            f"{kind.__name__} is for {layer!r}, which has a built-in kind. To treat some of these layers otherwise, derive "
            f"a class from it that has its own forward, and register a kind for that class."
        )
    _kinds[kind.layer] = kind()
    _kind_of_class.cache_clear()
    return kind


def find_kind(layer: nn.Module) -> LayerKind | None:
    """Return the kind of a layer, or None for a module of no registered kind."""
    if isinstance(layer, Product):
        return layer.layout
    layer_class: type = type(layer)
    return _kind_of_class(layer_class)


@lru_cache(maxsize=4096)
def _kind_of_class(layer: type) -> LayerKind | None:
    """Return the kind of the nearest base class that has one."""
    kinds = [kind for kind in _kinds.values() if kind.base(layer) is not None]
    return min(kinds, key=lambda kind: layer.__mro__.index(kind.base(layer)), default=None)


def kind_of(layer: nn.Module) -> LayerKind:
    """Return the kind of a layer.

    Raises:
        KindError: No kind is registered for it.
    """
    kind = find_kind(layer)
    if kind is None:
        raise KindError(
            f"No layer kind is registered for {type(layer).__name__}, but one was when the model was rewritten. Import "
            f"the code that calls tdfx.register_kind for it."
        )
    return kind


def kind_named(name: str) -> LayerKind:
    """Return the kind that plans know by a name; of several, the one that was registered last.

    >>> kind_named("Conv2d").dotted_name
    'torch.nn.modules.conv.Conv2d'

    Raises:
        KindError: No kind of that name is registered.
    """
    kinds = [kind for kind in _kinds.values() if kind.name == name]
    if not kinds:
        raise KindError(
            f"No layer kind {name!r} is registered, but one was when the model was rewritten. Import the code that calls "
            f"tdfx.register_kind for it. Nearest: {nearest(name, [kind.name for kind in _kinds.values()])}."
        )
    return kinds[-1]


def is_candidate(module: nn.Module) -> bool:
    """Return True for every layer of a registered kind, whether or not it can be rewritten."""
    return find_kind(module) is not None


def operation_of(layer: nn.Module) -> Operation | None:
    """Return what a layer computes, or None if no scheme can stand for it.

    Raises:
        KindError: The operation of its kind does not fit the shape of its weight.
    """
    kind = kind_of(layer)
    operation = kind.operation(layer)
    if not isinstance(operation, Operation | None):
        raise KindError(
            f"{type(kind).__name__}.operation returned {operation!r}, which is no tdfx.Operation. Return one, or None for a "
            f"layer that no scheme can stand for."
        )
    weight = layer._parameters.get(kind.weight)
    if operation is None or weight is None or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return operation
    dense = kind.to_dense(weight)
    if tuple(dense.shape) != operation.weight_shape or kind.from_dense(dense).shape != weight.shape:
        raise KindError(
            f"{type(kind).__name__} says that a {kind.name} computes {operation}, whose weight has the shape "
            f"{operation.weight_shape}; its to_dense gives {tuple(dense.shape)} for a parameter of shape "
            f"{tuple(weight.shape)}, and from_dense gives {tuple(kind.from_dense(dense).shape)} back. Correct the kind."
        )
    return operation
