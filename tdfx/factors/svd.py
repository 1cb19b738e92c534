"""The singular value decomposition of a matrix: two factors for a linear map or a pointwise convolution."""

from __future__ import annotations

from tdfx.factors.operation import Operation
from tdfx.factors.two_factors import TwoFactors


class Svd(TwoFactors):
    """``w_oi = last_op @ first_pi``, in each group.

    The first factor has the stride and padding of a pointwise convolution, so that the last has less work. In a transposed
    convolution the last factor has them, for the same reason.
    """

    name = "svd"
    in_float32 = True

    def fits(self, operation: Operation) -> bool:
        """Return True for linear maps, and for convolutions with one tap that are not depthwise."""
        return operation.is_pointwise and not operation.is_depthwise

    def first_axes(self, operation: Operation) -> tuple[int, ...]:
        """Return all dimensions, or none where the operation is transposed."""
        return () if operation.transposed else tuple(range(operation.dims))
