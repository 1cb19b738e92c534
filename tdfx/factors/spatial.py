"""Spatial decomposition: a kernel along one dimension, then one along the others."""

from __future__ import annotations

from tdfx.factors.operation import Operation
from tdfx.factors.two_factors import TwoFactors


class Spatial(TwoFactors):
    """``w_oihw = last_opw @ first_pih``: for a k×k kernel k×1, then 1×k.

    In three dimensions the first factor is along the first dimension with more than one tap, and the last along the others:
    a convolution over time, then one over the image. Depthwise convolutions fit too.

    Source: Jaderberg, Vedaldi, Zisserman, *Speeding up Convolutional Neural Networks with Low Rank Expansions*, BMVC 2014.
    """

    name = "spatial"
    in_float32 = True

    def fits(self, operation: Operation) -> bool:
        """Return True for convolutions with more than one tap in at least two dimensions."""
        return sum(taps > 1 for taps in operation.kernel) > 1

    def first_axes(self, operation: Operation) -> tuple[int, ...]:
        """Return the first dimension with more than one tap."""
        return (next(axis for axis, taps in enumerate(operation.kernel) if taps > 1),)
