"""What a convolution or a linear map computes, apart from the values of its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tdfx.checks import is_count
from tdfx.errors import KindError

_PER_DIMENSION = {
    "kernel": (None, 1),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "output_padding": (None, 0),
}
"""Settings with a number for each spatial dimension -> what () stands for, and the least number; None for () itself."""
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """The geometry of one linear map or convolution, of a site or of one of its factors.

    A linear map has no spatial dimensions: ``kernel``, ``stride``, ``padding`` and ``dilation`` are empty.

    Raises:
        KindError: A setting is not what its field says, or does not go with the others.

    Example:
        >>> Operation(in_channels=8, out_channels=16, kernel=(3, 3), padding=(1, 1)).stride
        (1, 1)
    """

    in_channels: int
    """Channels (features) of the input."""
    out_channels: int
    """Channels (features) of the output."""
    kernel: tuple[int, ...] = ()
    """Taps in each spatial dimension; () for a linear map."""
    stride: tuple[int, ...] = ()
    """Step in each spatial dimension, in positions; 1 by default."""
    padding: tuple[int, ...] | str = ()
    """Positions added at both ends of each spatial dimension, or ``"same"`` or ``"valid"``; 0 by default."""
    dilation: tuple[int, ...] = ()
    """Distance between taps in each spatial dimension, in positions; 1 by default."""
    groups: int = 1
    """Blocks of channels that do not see one another."""
    padding_mode: str = "zeros"
    """The values of the padding: zeros, reflect, replicate or circular."""
    transposed: bool = False
    """True for a transposed convolution: the map that carries a convolution's gradient back to its input."""
    output_padding: tuple[int, ...] = ()
    """Positions added at one end of each dimension of a transposed convolution's output; () for none."""

    def __post_init__(self) -> None:
        self._check_channels()
        for name, (default, least) in _PER_DIMENSION.items():
            value: Any = getattr(self, name)
            if name == "padding" and value in ("same", "valid"):
                continue
            if value == ():
                value = (default,) * self.dims if default is not None else ()
            if not isinstance(value, tuple | list) or any(not isinstance(size, int) or size < least for size in value):
                raise KindError(
                    f"Operation({name}={value!r}) is not a tuple of whole numbers of at least {least}, one for each spatial "
                    f"dimension. Pass for example {name}={(max(least, 1),) * 2}."
                )
            if len(value) != self.dims and (value or default is not None):
                raise KindError(
                    f"Operation({name}={tuple(value)}) does not go with kernel={self.kernel}: it needs one number for each "
                    f"of its {self.dims} dimensions. Leave it out for the default."
                )
            object.__setattr__(self, name, tuple(value))
        if self.padding_mode not in _PADDING_MODES:
            raise KindError(f"Operation(padding_mode={self.padding_mode!r}) is not one of {', '.join(_PADDING_MODES)}.")

    def _check_channels(self) -> None:
        for name in ("in_channels", "out_channels", "groups"):
            if not is_count(value := getattr(self, name)):
                raise KindError(f"Operation({name}={value!r}) is not a whole number of at least 1.")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise KindError(
                f"Operation(groups={self.groups}) does not divide in_channels={self.in_channels} and "
                f"out_channels={self.out_channels}: each group takes and gives as many channels as the others."
            )

    @classmethod
    def pointwise(cls, in_channels: int, out_channels: int, dims: int, groups: int = 1) -> Operation:
        """Return the map that mixes the channels of each position, in ``dims`` spatial dimensions."""
        return cls(in_channels=in_channels, out_channels=out_channels, groups=groups, kernel=(1,) * dims)

    def along(self, axes: Sequence[int], in_channels: int, out_channels: int, groups: int | None = None) -> Operation:
        """Return the part of the operation along some spatial dimensions, between other numbers of channels.

        Along the other dimensions it has one tap, stride 1 and no padding. Without any dimension it is a pointwise map,
        which is never transposed.
        """
        groups = self.groups if groups is None else groups
        if not axes:
            return Operation.pointwise(in_channels, out_channels, self.dims, groups)

        def kept(values: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
            return tuple(value if axis in axes else otherwise for axis, value in enumerate(values))

        return replace(
            self,
            in_channels=in_channels,
            out_channels=out_channels,
            groups=groups,
            kernel=kept(self.kernel, 1),
            stride=kept(self.stride, 1),
            padding=self.padding if isinstance(self.padding, str) else kept(self.padding, 0),
            dilation=kept(self.dilation, 1),
            output_padding=kept(self.output_padding, 0),
        )

    @property
    def dims(self) -> int:
        """Spatial dimensions: 0 for a linear map."""
        return len(self.kernel)

    @property
    def is_pointwise(self) -> bool:
        """True if every output position reads one input position."""
        return math.prod(self.kernel) == 1

    @property
    def mixes_taps_and_channels(self) -> bool:
        """True for a convolution with a kernel that is not depthwise."""
        return not self.is_pointwise and not self.is_depthwise

    @property
    def is_depthwise(self) -> bool:
        """True if every group has one input and one output channel, so that no channels are mixed."""
        return self.in_channels == self.out_channels == self.groups > 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight in torch's own layout: (out, in / groups, *kernel), transposed (in, out / groups, *kernel)."""
        channels = self.out_channels, self.in_channels
        first, second = reversed(channels) if self.transposed else channels
        return (first, second // self.groups, *self.kernel)

    @property
    def parameters(self) -> int:
        """Values in the weight; the bias does not count, because no rewrite changes it."""
        return math.prod(self.weight_shape)

    def out_size(self, in_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output for a spatial size of the input."""
        if self.padding == "same":
            return in_size
        zeros = (0,) * self.dims
        padding = zeros if isinstance(self.padding, str) else self.padding
        reaches = [dilation * (taps - 1) + 1 for dilation, taps in zip(self.dilation, self.kernel, strict=True)]
        settings = zip(in_size, self.stride, padding, reaches, self.output_padding or zeros, strict=True)
        return tuple(
            (size - 1) * stride + reach - 2 * pad + more if self.transposed else (size + 2 * pad - reach) // stride + 1
            for size, stride, pad, reach, more in settings
        )


def to_groups(operation: Operation, weight: Tensor) -> Tensor:
    """Return a view (g, o, i, k...) of a weight: g groups, and o output and i input channels in each."""
    w_gxyk = weight.reshape(operation.groups, -1, *weight.shape[1:])
    return w_gxyk.transpose(1, 2) if operation.transposed else w_gxyk


def from_groups(operation: Operation, w_goik: Tensor) -> Tensor:
    """Return a weight in torch's layout: the inverse of ``to_groups``, for any operation of the same direction."""
    return (w_goik.transpose(1, 2) if operation.transposed else w_goik).flatten(0, 1)


def grouped_shape(operation: Operation) -> tuple[int, ...]:
    """Return (g, o, i, k...) for an operation."""
    groups = operation.groups
    return groups, operation.out_channels // groups, operation.in_channels // groups, *operation.kernel
