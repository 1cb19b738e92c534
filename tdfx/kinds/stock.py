"""The built-in kinds, and how to build a layer of torch.nn from an operation."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tdfx.factors.functions import grouped_linear, is_1x1_conv2d
from tdfx.factors.operation import Operation
from tdfx.kinds.kind import LayerKind
from tdfx.kinds.pointwise import PointwiseConv2d


class _Linear(LayerKind):
    layer = nn.Linear

    def operation(self, layer: nn.Module) -> Operation:
        assert isinstance(layer, nn.Linear)
        return Operation(in_channels=layer.in_features, out_channels=layer.out_features)


class GroupedLinear(nn.Module):
    """Linear maps of blocks of features that do not see one another, side by side."""

    def __init__(self, in_features: int, out_features: int, groups: int, weight: nn.Parameter) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.groups = groups
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return grouped_linear(input, self.weight, self.groups)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={self.groups}"


class _GroupedLinear(LayerKind):
    layer = GroupedLinear
    bias = None

    def operation(self, layer: nn.Module) -> Operation:
        assert isinstance(layer, GroupedLinear)
        return Operation(in_channels=layer.in_features, out_channels=layer.out_features, groups=layer.groups)


class _Convolution(LayerKind):
    methods = ("forward", "_conv_forward")
    transposed = False

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer = layer  # type: ignore[misc]  # one kind for each number of dimensions

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


class _Transposed(_Convolution):
    methods = ("forward", "_output_padding")
    transposed = True


class _Conv1D(LayerKind):
    """The linear map of GPT-2 in Hugging Face's transformers, whose weight is (in, out)."""

    layer = "transformers.pytorch_utils.Conv1D"

    def operation(self, layer: nn.Module) -> Operation:
        in_channels, out_channels = cast("Tensor", layer.weight).shape
        return Operation(in_channels=in_channels, out_channels=out_channels)

    def to_dense(self, weight: Tensor) -> Tensor:
        return weight.mT

    from_dense = to_dense


_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BUILT_IN: tuple[LayerKind, ...] = (
    _Linear(),
    _GroupedLinear(),
    *map(_Convolution, _CONVOLUTIONS),
    _Convolution(PointwiseConv2d),
    *map(_Transposed, _TRANSPOSED),
    _Conv1D(),
)


def build_layer(operation: Operation, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """Return a stock layer for an operation that holds these very parameters.

    Args:
        operation: What the layer computes.
        weight: Shape ``operation.weight_shape``.
        bias: Shape (out,), or None.
    """
    if not operation.dims and operation.groups > 1:
        assert bias is None, "no site of several linear maps has a bias of its own"
        return GroupedLinear(operation.in_channels, operation.out_channels, operation.groups, weight)
    layer_class: type[nn.Module] = nn.Linear
    settings: dict[str, Any] = {}
    if operation.dims:
        layer_class = (_TRANSPOSED if operation.transposed else _CONVOLUTIONS)[operation.dims - 1]
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        settings = {"kernel_size": operation.kernel, **{name: getattr(operation, name) for name in names}}
    if operation.transposed:
        settings["output_padding"] = operation.output_padding or 0
    channels = operation.in_channels, operation.out_channels
    # On the meta device the constructor neither allocates nor draws random numbers.
    layer = layer_class(*channels, bias=bias is not None, device=torch.device("meta"), **settings)
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer


def build_factor(operation: Operation, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """Return the layer for a factor: the stock layer, or one that computes the same and is faster on CPUs."""
    layer = build_layer(operation, weight, bias)
    if is_1x1_conv2d(operation):
        layer.__class__ = PointwiseConv2d
    return layer
