"""Calls of ``F.linear`` and ``F.conv*``: which argument is the weight, and what the call computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from tdfx.factors.operation import Operation

_FORWARD_ORDER = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ORDER = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_SIGNATURES: dict[Any, tuple[int, tuple[str, ...]]] = {
    F.linear: (0, ("input", "weight", "bias")),
    **{function: (dims, _FORWARD_ORDER) for dims, function in _CONVOLUTIONS.items()},
    **{function: (dims, _TRANSPOSED_ORDER) for dims, function in _TRANSPOSED.items()},
}
"""Function -> its spatial dimensions and the order of its arguments."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function that computes a convolution or a linear map."""

    name: str
    """The function as people write it, such as ``F.conv2d``."""
    dims: int
    """Spatial dimensions; 0 for a linear map."""
    transposed: bool
    """True for the transposed convolutions."""
    weight: Any
    """What is passed as the weight: a tensor, or a node of a graph."""
    rest: Mapping[str, Any] = field(default_factory=dict)
    """The other arguments by name."""

    def operation(self, weight_shape: Sequence[int]) -> Operation | None:
        """Return what the call computes with a weight of this shape; None where no scheme can stand for it.

        None too where an argument is no constant, and where the shape does not go with the function.
        """
        if len(weight_shape) != self.dims + 2:
            return None
        channels, per_group, *kernel = weight_shape
        groups = self.rest.get("groups", 1)
        padding = self.rest.get("padding", 0)
        settings = (
            self.rest.get("stride", 1),
            0 if isinstance(padding, str) else padding,
            self.rest.get("dilation", 1),
            self.rest.get("output_padding", 0),
        )
        spread = [_each_dimension(one, self.dims) for one in settings]
        if not isinstance(groups, int) or None in spread:
            return None
        stride, pad, dilation, output_padding = cast("list[tuple[int, ...]]", spread)
        return Operation(
            in_channels=channels if self.transposed else per_group * groups,
            out_channels=per_group * groups if self.transposed else channels,
            kernel=tuple(kernel),
            stride=stride,
            padding=padding if isinstance(padding, str) else pad,
            dilation=dilation,
            groups=groups,
            transposed=self.transposed,
            output_padding=output_padding if self.transposed else (),
        )


def parse_call(function: object, args: Sequence[Any], named: Mapping[str, Any]) -> Call | None:
    """Return the parts of a call, or None if the function is not one that computes a convolution or a linear map.

    >>> parse_call(F.conv2d, ("x", "w", None, 2), {"padding": 1}).rest
    {'input': 'x', 'bias': None, 'stride': 2, 'padding': 1}
    """
    known = _SIGNATURES.get(function) if _is_hashable(function) else None
    if known is None:
        return None
    dims, order = known
    given = {**dict(zip(order, args, strict=False)), **named}
    weight = given.pop("weight", None)
    name = f"F.{function.__name__}"  # type: ignore[attr-defined]
    return Call(name, dims, order is _TRANSPOSED_ORDER, weight, given)


def apply(operation: Operation, weight: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
    """Compute an operation whose padding holds zeros."""
    if operation.dims == 0:
        return F.linear(input, weight, bias)
    if operation.transposed:
        extra = operation.output_padding or 0
        settings = (operation.stride, operation.padding, extra, operation.groups, operation.dilation)
        return _TRANSPOSED[operation.dims](input, weight, bias, *settings)
    return _CONVOLUTIONS[operation.dims](
        input, weight, bias, operation.stride, operation.padding, operation.dilation, operation.groups
    )


def _each_dimension(value: Any, dims: int) -> tuple[int, ...] | None:
    """Spread a number over the dimensions; None for what is no number, as a node of a graph."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * dims
    values = values * dims if len(values) == 1 else values
    return values if len(values) == dims and all(isinstance(one, int) for one in values) else None


def _is_hashable(function: object) -> bool:
    return getattr(type(function), "__hash__", None) is not None
