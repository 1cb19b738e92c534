"""The functions of torch that compute an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from tdfx.factors.operation import Operation

CONVOLUTIONS: Mapping[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
"""Spatial dimensions, and whether the convolution is transposed -> the function."""


def apply_operation(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute an operation by torch's functions, as its stock layer does.

    Args:
        operation: What to compute.
        x: Shape (samples, in, *size); any leading dimensions for a linear map.
        weight: Shape ``operation.weight_shape``.
        bias: Shape (out,), or None.
    """
    if operation.dims == 0:
        return F.linear(x, weight, bias)
    function = CONVOLUTIONS[operation.dims, operation.transposed]
    padding = operation.padding
    if operation.padding_mode != "zeros":
        x, padding = F.pad(x, _both_ends(operation), mode=operation.padding_mode), (0,) * operation.dims
    settings = {name: getattr(operation, name) for name in ("stride", "dilation", "groups")}
    if operation.transposed:
        settings["output_padding"] = operation.output_padding or 0
    return function(x, weight, bias, padding=padding, **settings)


def _both_ends(operation: Operation) -> list[int]:
    """Return the positions to add at both ends of each dimension, last dimension first, as torch pads."""
    if operation.padding == "same":
        totals = [dilation * (taps - 1) for dilation, taps in zip(operation.dilation, operation.kernel, strict=True)]
    else:
        totals = [0] * operation.dims if isinstance(operation.padding, str) else [2 * pad for pad in operation.padding]
    return [end for total in reversed(totals) for end in (total // 2, total - total // 2)]
