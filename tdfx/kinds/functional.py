"""Calls of ``F.linear`` and ``F.conv*``: which argument is the weight, and what the call computes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch.nn.functional as F

from tdfx.factors.functions import CONVOLUTIONS
from tdfx.factors.operation import Operation

_ARGUMENTS = {
    False: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
"""Whether a convolution is transposed -> the order of its arguments."""
_SIGNATURES: dict[Any, tuple[int, bool, tuple[str, ...]]] = {
    F.linear: (0, False, ("input", "weight", "bias")),
    **{function: (*key, _ARGUMENTS[key[1]]) for key, function in CONVOLUTIONS.items()},
}
"""Function -> its spatial dimensions, whether it is transposed, and the order of its arguments."""


@dataclass(frozen=True, slots=True)
class FunctionCall:
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
        """Return what the call computes with a weight of this shape.

        None where no scheme can stand for the call, where an argument is not a constant, and where the shape does not
        belong to the function.
        """
        if len(weight_shape) != self.dims + 2:
            return None
        channels, per_group, *kernel = weight_shape
        settings = {"groups": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, **self.rest}
        groups, padding = settings["groups"], settings["padding"]
        if isinstance(padding, str):
            settings["padding"] = 0
        each = [
            _each_dimension(settings[name], self.dims) for name in ("stride", "padding", "dilation", "output_padding")
        ]
        if not isinstance(groups, int) or None in each:
            return None
        stride, pad, dilation, output_padding = cast("list[tuple[int, ...]]", each)
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

    def flow_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the input, with the channels as the operation has them."""
        return tuple(self.rest["input"].shape)


def parse_call(function: object, args: Sequence[Any], named: Mapping[str, Any]) -> FunctionCall | None:
    """Return the parts of a call, or None if the function does not compute a convolution or a linear map.

    >>> parse_call(F.conv2d, ("x", "w", None, 2), {"padding": 1}).rest
    {'input': 'x', 'bias': None, 'stride': 2, 'padding': 1}
    """
    signature = _SIGNATURES.get(function) if isinstance(function, Hashable) else None
    if signature is None:
        return None
    dims, transposed, order = signature
    rest = {**dict(zip(order, args, strict=False)), **named}
    weight = rest.pop("weight", None)
    return FunctionCall(f"F.{function.__name__}", dims, transposed, weight, rest)  # type: ignore[attr-defined]


def _each_dimension(value: Any, dims: int) -> tuple[int, ...] | None:
    """Return a number for each dimension; None for a value that is not made of numbers, such as a node of a graph."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * dims
    values = values * dims if len(values) == 1 else values
    return values if len(values) == dims and all(isinstance(number, int) for number in values) else None
