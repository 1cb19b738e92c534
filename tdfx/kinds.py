"""The layer kinds that can be sites: what each computes, and how to build one from an operation."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn

from tdfx.factors.operation import Operation

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_FORWARD_CONVOLUTIONS = tuple(_CONVOLUTIONS.values())
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ALL = (nn.Linear, *_FORWARD_CONVOLUTIONS, *_TRANSPOSED)


def is_candidate(module: nn.Module) -> bool:
    """Return True for every convolution and linear layer, whether or not it can be rewritten."""
    return isinstance(module, _ALL)


def kind_of(module: nn.Module) -> str:
    """Return the stock class that a layer is or derives from, such as ``Conv2d``."""
    return next(kind.__name__ for kind in type(module).__mro__ if kind in _ALL)


def has_stock_forward(module: nn.Module) -> bool:
    """Return True if calling the layer does what its stock class does, so that another module can stand in for it."""
    stock = next(kind for kind in type(module).__mro__ if kind in _ALL)
    if "forward" in module.__dict__ or type(module).__call__ is not nn.Module.__call__:
        return False
    return all(
        getattr(type(module), name) is getattr(stock, name)
        for name in ("forward", "_conv_forward")
        if hasattr(stock, name)
    )


def operation_of(module: nn.Module) -> Operation | None:
    """Return what a layer computes, or None for a kind that no scheme can stand for yet."""
    if isinstance(module, nn.Linear):
        return Operation(in_channels=module.in_features, out_channels=module.out_features)
    if not isinstance(module, _FORWARD_CONVOLUTIONS):
        return None
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    return Operation(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=padding,
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def build_layer(operation: Operation, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """Return a stock layer for an operation that holds these very parameters.

    Args:
        operation: What the layer computes.
        weight: Shape ``operation.weight_shape``.
        bias: Shape (out,), or None.
    """
    # On the meta device the constructor neither allocates nor draws random numbers.
    meta = torch.device("meta")
    layer: nn.Module
    if operation.dims == 0:
        layer = nn.Linear(operation.in_channels, operation.out_channels, bias=bias is not None, device=meta)
    else:
        convolution = cast("type[nn.Conv2d]", _CONVOLUTIONS[operation.dims])
        layer = convolution(
            operation.in_channels,
            operation.out_channels,
            cast("tuple[int, int]", operation.kernel),
            stride=cast("tuple[int, int]", operation.stride),
            padding=cast("tuple[int, int]", operation.padding),
            dilation=cast("tuple[int, int]", operation.dilation),
            groups=operation.groups,
            bias=bias is not None,
            padding_mode=cast("Literal['zeros']", operation.padding_mode),
            device=meta,
        )
    layer.weight = weight
    layer.bias = bias
    return layer
