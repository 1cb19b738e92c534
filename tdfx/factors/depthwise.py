"""Network decoupling: a pointwise convolution, then a depthwise one, summed over a few terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tdfx.factors.operation import Operation, from_groups, grouped_shape, to_groups
from tdfx.factors.two_factors import TwoFactors


class Depthwise(TwoFactors):
    """``w_oik = sum over t of last_otk * first_oti``: each output channel is the sum of T pointwise maps with a kernel each.

    The rank is T, the same for every output channel. The last factor adds up the terms: it is a convolution with one group
    of T channels for each output channel, and has the kernel, its stride, padding and dilation.

    Source: Guo, Li, Lin, Chen, Li, *Network Decoupling: From Regular to Depthwise Separable Convolutions*, BMVC 2018,
    arXiv:1808.05517.
    """

    name = "depthwise"
    mixes_outputs = False

    def fits(self, operation: Operation) -> bool:
        """Return True for convolutions with more than one tap and more than one input channel in each group."""
        return not operation.is_pointwise and operation.in_channels > operation.groups

    def channels_per_rank(self, operation: Operation) -> int:
        """Return one for each output channel."""
        return operation.out_channels

    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """Return one rank: the taps or the input channels of a group, whichever are fewer."""
        return (min(operation.in_channels // operation.groups, math.prod(operation.kernel)),)

    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Return the pointwise maps to T channels for each output channel, and the convolution that adds them up."""
        out = operation.out_channels
        middle = ranks[0] * out
        return (
            operation.along((), operation.in_channels, middle),
            operation.along(range(operation.dims), middle, out, groups=out),
        )

    def unfold(self, operation: Operation, weight: Tensor) -> Tensor:
        """Return the matrices (o, k, i) of a dense weight, one for each output channel."""
        return to_groups(operation, weight).flatten(0, 1).flatten(2).mT

    def fold(self, operation: Operation, matrix: Tensor) -> Tensor:
        """Return the dense weight of matrices (o, k, i): the inverse of ``unfold``."""
        return from_groups(operation, matrix.mT.reshape(grouped_shape(operation)))
