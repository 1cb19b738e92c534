"""Tucker decomposition of one channel mode: the kernel and a pointwise convolution, in either order."""

from __future__ import annotations

from tdfx.factors.operation import Operation
from tdfx.factors.two_factors import TwoFactors


class Tucker1Out(TwoFactors):
    """``w_oik = last_op @ first_pik``: the whole kernel to fewer outputs, then up to all of them.

    The decomposition is also called channel decomposition: Zhang et al., *Accelerating Very Deep Convolutional
    Networks for Classification and Detection*, IEEE TPAMI 38 (2016); Elhoushi et al., arXiv:1909.05675.
    """

    name = "tucker1_out"

    def first_axes(self, operation: Operation) -> tuple[int, ...]:
        """Return all dimensions."""
        return tuple(range(operation.dims))


class Tucker1In(TwoFactors):
    """``w_oik = last_oqk @ first_qi``: down to fewer inputs, then the whole kernel."""

    name = "tucker1_in"
