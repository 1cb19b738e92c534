"""Views of a weight by groups, outputs before inputs, whatever torch's own layout is."""

from __future__ import annotations

from torch import Tensor

from tdfx.factors.operation import Operation


def to_groups(operation: Operation, weight: Tensor) -> Tensor:
    """Return a view (g, o, i, k...) of a weight: g groups, and o output and i input channels in each."""
    w_gxyk = weight.reshape(operation.groups, -1, *weight.shape[1:])
    return w_gxyk.transpose(1, 2) if operation.transposed else w_gxyk


def from_groups(operation: Operation, w_goik: Tensor) -> Tensor:
    """Return a weight in torch's layout: the inverse of ``to_groups``, for any operation of the same direction."""
    w_gxyk = w_goik.transpose(1, 2) if operation.transposed else w_goik
    return w_gxyk.flatten(0, 1)


def grouped_shape(operation: Operation) -> tuple[int, ...]:
    """Return (g, o, i, k...) for an operation."""
    groups = operation.groups
    return groups, operation.out_channels // groups, operation.in_channels // groups, *operation.kernel
