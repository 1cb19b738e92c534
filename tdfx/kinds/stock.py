"""The layers of torch.nn, and how to build one from an operation."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn

from tdfx.factors.operation import Operation
from tdfx.kinds.kind import LayerKind

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class _Linear(LayerKind):
    layer = nn.Linear

    def operation(self, layer: nn.Module) -> Operation:
        assert isinstance(layer, nn.Linear)
        return Operation(in_channels=layer.in_features, out_channels=layer.out_features)


class _Convolution(LayerKind):
    methods = ("forward", "_conv_forward")

    def operation(self, layer: nn.Module) -> Operation:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
        return Operation(
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            padding=padding,
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            padding_mode=layer.padding_mode,
        )


class _Conv1d(_Convolution):
    layer = nn.Conv1d


class _Conv2d(_Convolution):
    layer = nn.Conv2d


class _Conv3d(_Convolution):
    layer = nn.Conv3d


class _Transposed(LayerKind):
    methods = ("forward", "_output_padding")

    def operation(self, layer: nn.Module) -> Operation:
        assert isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        return Operation(
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            padding=tuple(cast("tuple[int, ...]", layer.padding)),
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            transposed=True,
            output_padding=tuple(layer.output_padding),
        )


class _ConvTranspose1d(_Transposed):
    layer = nn.ConvTranspose1d


class _ConvTranspose2d(_Transposed):
    layer = nn.ConvTranspose2d


class _ConvTranspose3d(_Transposed):
    layer = nn.ConvTranspose3d


STOCK: tuple[LayerKind, ...] = (
    _Linear(),
    _Conv1d(),
    _Conv2d(),
    _Conv3d(),
    _ConvTranspose1d(),
    _ConvTranspose2d(),
    _ConvTranspose3d(),
)
"""The kinds of torch.nn."""


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
    elif operation.transposed:
        layer = _TRANSPOSED[operation.dims](
            operation.in_channels,
            operation.out_channels,
            operation.kernel,
            stride=operation.stride,
            padding=operation.padding,
            output_padding=operation.output_padding or 0,
            groups=operation.groups,
            bias=bias is not None,
            dilation=operation.dilation,
            device=meta,
        )
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
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer
