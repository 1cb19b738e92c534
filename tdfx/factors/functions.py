"""The functions of torch that compute an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
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


MOST_ROWS = 4096
"""Samples times positions up to which a matrix product is faster on a CPU than torch's 1x1 convolution, whose setting up
costs more than is gained: 1.1 to 1.9 times at 1,000 to 4,000 rows of 64 to 1,024 channels; ``tools/bench_pointwise.py``."""
FEWEST_SAMPLES = 16
"""Below this, and with one thread, torch computes 1x1 convolutions on a CPU without oneDNN: products are faster."""


def apply_operation(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute an operation by torch's functions, as its stock layer does.

    Args:
        operation: What to compute.
        x: Shape (samples, in, *size); any leading dimensions for a linear map.
        weight: Shape ``operation.weight_shape``.
        bias: Shape (out,), or None.
    """
    if operation.dims == 0 and operation.groups > 1:
        out = grouped_linear(x, weight, operation.groups)
        return out if bias is None else out + bias
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


def apply_factor(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute an operation as the layer of a factor does: 1x1 convolutions as matrix products where these are faster."""
    if is_1x1_conv2d(operation) and product_is_faster(x):
        return pointwise_product(x, weight, bias)
    return apply_operation(operation, x, weight, bias)


def is_1x1_conv2d(operation: Operation) -> bool:
    """Return True for a convolution of images that mixes the channels of each position alone.

    >>> is_1x1_conv2d(Operation.pointwise(64, 16, 2)), is_1x1_conv2d(Operation.pointwise(64, 16, 0))
    (True, False)
    """
    return operation == Operation.pointwise(operation.in_channels, operation.out_channels, 2)


def product_is_faster(x: Tensor) -> bool:
    """Return True if a matrix product on the channels-last view of images is faster here than a 1x1 convolution.

    Only plain tensors on a CPU are, in channels last; never while a graph is recorded, which must not depend on the size.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if x.dim() != 4 or x.stride(1) != 1 or x.dtype not in (torch.float32, torch.float64):
        return False
    samples, channels, height, width = x.shape
    if x.stride() != (height * width * channels, 1, width * channels, channels):
        return False
    few = samples < FEWEST_SAMPLES and torch.get_num_threads() == 1
    return few or samples * height * width <= MOST_ROWS


def pointwise_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a 1x1 convolution as a matrix product; in channels last no value is copied.

    Args:
        x: Shape (samples, in, height, width).
        weight: Shape (out, in, 1, 1).
        bias: Shape (out,), or None.

    Returns:
        Shape (samples, out, height, width), in channels last.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def grouped_linear(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Compute linear maps of blocks of features side by side.

    Args:
        x: Shape (..., g i), for g groups.
        weight: Shape (g o, i).
        groups: The number of groups.
    """
    x_gni = x.reshape(-1, groups, weight.shape[1]).transpose(0, 1)
    y_gno = torch.bmm(x_gni, weight.view(groups, -1, weight.shape[1]).mT)
    return y_gno.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[0])


def _both_ends(operation: Operation) -> list[int]:
    """Return the positions to add at both ends of each dimension, last dimension first, as torch pads."""
    if operation.padding == "same":
        totals = [dilation * (taps - 1) for dilation, taps in zip(operation.dilation, operation.kernel, strict=True)]
    else:
        totals = [0] * operation.dims if isinstance(operation.padding, str) else [2 * pad for pad in operation.padding]
    return [end for total in reversed(totals) for end in (total // 2, total - total // 2)]
