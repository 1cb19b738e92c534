"""The singular value decomposition of a matrix: two factors for a linear map or a pointwise convolution."""

from __future__ import annotations

from tdfx.factors.operation import Operation
from tdfx.factors.two_factors import TwoFactors


class Svd(TwoFactors):
    """``w_oi = last_op @ first_pi``, in each group.

    Stride and padding of a pointwise convolution go to the first factor, so that the last has less to do; those of a
    transposed one go to the last for the same reason.
    """

    name = "svd"

    def fits(self, operation: Operation) -> bool:
        """Linear maps and convolutions whose kernel is one tap, unless they leave every channel to itself."""
        return operation.is_pointwise and not operation.is_depthwise

    def first_axes(self, operation: Operation) -> tuple[int, ...]:
        """All, or none where the operation is transposed."""
        return () if operation.transposed else tuple(range(operation.dims))
