"""Parameters that code transposes, or takes one slice of, before it multiplies with them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

_FORMS = (
    "__getitem__ chunk contiguous expand flatten gather index_select permute repeat reshape select split squeeze t to"
)
FORMS = frozenset(f"{_FORMS} transpose type unbind unflatten unsqueeze view".split())
"""Methods by which code takes parts out of a tensor or brings it into another form."""


@dataclass(frozen=True, slots=True)
class View:
    """A parameter with its dimensions in another order, or one slice of it."""

    parameter: Any
    axes: tuple[int, ...]
    """Dimension of the view -> dimension of the parameter."""
    picked: tuple[tuple[int, Any], ...] = ()
    """Dimensions of the parameter at which one slice was taken, with its index."""

    @classmethod
    def of(cls, parameter: Any) -> View | None:
        """Return a parameter as it is; None for one that has no shape yet, and for anything without a shape."""
        if isinstance(parameter, UninitializedParameter) or not hasattr(parameter, "shape"):
            return None
        return cls(parameter, tuple(range(len(parameter.shape))))


def _transposed(view: View, first: int, second: int) -> View:
    axes = list(view.axes)
    axes[first], axes[second] = axes[second], axes[first]
    return replace(view, axes=tuple(axes))


def _reversed(view: View) -> View | None:
    return replace(view, axes=view.axes[::-1]) if len(view.axes) == 2 else None


def _swapped(view: View) -> View | None:
    return _transposed(view, -2, -1) if len(view.axes) >= 2 else None


def _permuted(view: View, *dims: Any) -> View:
    order = dims[0] if len(dims) == 1 else dims
    return replace(view, axes=tuple(view.axes[dim] for dim in order))


def _slice(view: View, index: Any) -> View | None:
    is_number = isinstance(index, int) or (
        isinstance(index, Tensor) and index.dim() == 0 and index.dtype is not torch.bool
    )
    if not is_number or isinstance(index, bool) or not view.axes:
        return None
    return replace(view, axes=view.axes[1:], picked=(*view.picked, (view.axes[0], index)))


_VIEWS: dict[Any, Callable[..., View | None]] = {
    Tensor.transpose: _transposed,
    torch.transpose: _transposed,
    Tensor.t: _reversed,
    torch.t: _reversed,
    Tensor.T.__get__: _reversed,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _swapped,  # type: ignore[attr-defined]
    Tensor.permute: _permuted,
    torch.permute: _permuted,
    Tensor.__getitem__: _slice,
}


def is_view_function(function: object) -> bool:
    """Return True for a function that may make a view."""
    return isinstance(function, Hashable) and function in _VIEWS


def view_by(function: object, view: View | None, rest: Sequence[Any], named: Mapping[str, Any]) -> View | None:
    """Return the view that a function makes of a view; None if it does anything else."""
    make = _VIEWS[function] if is_view_function(function) else None
    return None if make is None or view is None or named else make(view, *rest)
