"""The layers of torch.nn, and how to build one from an operation."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import nn

from tdfx.factors.operation import Operation
from tdfx.kinds.kind import LayerKind


class _Stock(LayerKind):
    """A kind of torch.nn."""

    layer: ClassVar[type[nn.Module]]
    dims: ClassVar[int]
    """Spatial dimensions; 0 for a linear map."""
    transposed: ClassVar[bool] = False
    """True for a transposed convolution."""


class _Linear(_Stock):
    layer, dims = nn.Linear, 0

    def operation(self, layer: nn.Module) -> Operation:
        assert isinstance(layer, nn.Linear)
        return Operation(in_channels=layer.in_features, out_channels=layer.out_features)


class _Convolution(_Stock):
    methods = ("forward", "_conv_forward")

    def operation(self, layer: nn.Module) -> Operation:
        convolution = cast("nn.Conv2d", layer)  # all of them, transposed or not, hold the same settings
        padding = convolution.padding
        return Operation(
            in_channels=convolution.in_channels,
            out_channels=convolution.out_channels,
            kernel=tuple(convolution.kernel_size),
            stride=tuple(convolution.stride),
            padding=padding if isinstance(padding, str) else tuple(padding),
            dilation=tuple(convolution.dilation),
            groups=convolution.groups,
            padding_mode=convolution.padding_mode,
            transposed=self.transposed,
            output_padding=tuple(convolution.output_padding) if self.transposed else (),
        )


class _Conv1d(_Convolution):
    layer, dims = nn.Conv1d, 1


class _Conv2d(_Convolution):
    layer, dims = nn.Conv2d, 2


class _Conv3d(_Convolution):
    layer, dims = nn.Conv3d, 3


class _Transposed(_Convolution):
    methods = ("forward", "_output_padding")
    transposed = True


class _ConvTranspose1d(_Transposed):
    layer, dims = nn.ConvTranspose1d, 1


class _ConvTranspose2d(_Transposed):
    layer, dims = nn.ConvTranspose2d, 2


class _ConvTranspose3d(_Transposed):
    layer, dims = nn.ConvTranspose3d, 3


STOCK: tuple[_Stock, ...] = (
    _Linear(),
    _Conv1d(),
    _Conv2d(),
    _Conv3d(),
    _ConvTranspose1d(),
    _ConvTranspose2d(),
    _ConvTranspose3d(),
)
"""The kinds of torch.nn."""
_LAYERS: dict[tuple[int, bool], Any] = {(kind.dims, kind.transposed): kind.layer for kind in STOCK}


def build_layer(operation: Operation, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """Return a stock layer for an operation that holds these very parameters.

    Args:
        operation: What the layer computes.
        weight: Shape ``operation.weight_shape``.
        bias: Shape (out,), or None.
    """
    settings: dict[str, Any] = {}
    if operation.dims:
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        settings = {"kernel_size": operation.kernel, **{name: getattr(operation, name) for name in names}}
    if operation.transposed:
        settings["output_padding"] = operation.output_padding or 0
    channels = operation.in_channels, operation.out_channels
    # On the meta device the constructor neither allocates nor draws random numbers.
    layer: nn.Module = _LAYERS[operation.dims, operation.transposed](
        *channels, bias=bias is not None, device=torch.device("meta"), **settings
    )
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer
