"""Tucker decomposition over the channel modes: a pointwise convolution, a small full kernel, a pointwise convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdfx.factors.algebra import pseudo_inverse, root_scale
from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Reduced, Scheme
from tdfx.ranks.spectrum import Spectrum, spectrum


class Tucker2(Scheme):
    """``w_oik = last_op · core_pqk · first_qi``, by truncated higher-order SVD; ranks are (output p, input q).

    The kernel, its stride, padding and dilation stay with the core. The first factor has no bias, so that what the core
    pads is what the dense convolution would have padded, in every padding mode.

    Source: Kim et al., *Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications*,
    ICLR 2016; De Lathauwer, De Moor, Vandewalle, *A Multilinear Singular Value Decomposition*, SIAM 2000. The error is at
    most sqrt(2) times the least possible at these ranks.
    """

    name = "tucker2"

    def fits(self, operation: Operation) -> bool:
        """Convolutions with more than one tap, without groups."""
        return not operation.is_pointwise and operation.groups == 1 and not operation.transposed

    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """Return the most ranks of the output and of the input unfolding."""
        taps = operation.parameters // (operation.out_channels * operation.in_channels)
        o, i = operation.out_channels, operation.in_channels
        return min(o, i * taps), min(i, o * taps)

    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Down to the input rank, the kernel between the ranks, up to the output."""
        p, q = ranks
        return (
            Operation.pointwise(operation.in_channels, q, operation.dims),
            replace(operation, in_channels=q, out_channels=p),
            Operation.pointwise(p, operation.out_channels, operation.dims),
        )

    def spectra(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return the spectra of the unfoldings (o, i·k) and (i, o·k), each from its channel side."""
        return (
            spectrum(weight.flatten(1), rows_side=True),
            spectrum(weight.transpose(0, 1).flatten(1), rows_side=True),
        )

    def split(
        self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]
    ) -> tuple[Tensor, ...]:
        """Return ``first`` (q, i, 1...), ``core`` (p, q, k...) and ``last`` (o, p, 1...).

        Each outer factor takes the square root of its mode's spectrum from the core.
        """
        core_pqk, last_op, first_iq = _project(weight, ranks, spectra)
        scale_p = root_scale(core_pqk.flatten(1).norm(dim=1))
        scale_q = root_scale(core_pqk.transpose(0, 1).flatten(1).norm(dim=1))
        ones = (1,) * (weight.dim() - 2)
        core_pqk = core_pqk / scale_p.reshape(-1, 1, *ones) / scale_q.reshape(1, -1, *ones)
        first_qi = first_iq.mT * scale_q[:, None]
        last_op = last_op * scale_p
        return first_qi.reshape(*first_qi.shape, *ones), core_pqk, last_op.reshape(*last_op.shape, *ones)

    def join(self, operation: Operation, factors: Sequence[Tensor]) -> Tensor:
        """Multiply the core by both outer factors."""
        first, core, last = factors
        return _outer_product(last.flatten(1), core, first.flatten(1))

    def project(self, operation: Operation, factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Add three orthogonal parts: inside both bases, outside the output basis, outside the input basis.

        Source: Koch and Lubich, *Dynamical Tensor Approximation*, SIAM J. Matrix Anal. Appl. 31 (2010).
        """
        first, core, last = factors
        by_first, by_core, by_last = gradients
        first_qi, last_op = first.flatten(1), last.flatten(1)
        inverse_iq, inverse_po = pseudo_inverse(first_qi), pseudo_inverse(last_op)
        inside = _outer_product(inverse_po.mT, by_core, inverse_iq.mT)
        out_part = _outside(last_op, inverse_po, by_last.flatten(1), _mode_product(core, first_qi, 1))
        in_part = _outside(
            first_qi.mT, inverse_iq.mT, by_first.flatten(1).mT, _mode_product(core, last_op.mT, 0).transpose(0, 1)
        )
        return inside + out_part + in_part.transpose(0, 1)

    def reduce(self, operation: Operation, factors: Sequence[Tensor]) -> Reduced:
        """Make both outer factors orthonormal (QR), and give the rest of them to the core."""
        if operation.groups > 1 or operation.transposed:
            return super().reduce(operation, factors)
        first, core, last = factors
        basis_ia, first_aq = torch.linalg.qr(first.flatten(1).mH)
        basis_ob, last_bp = torch.linalg.qr(last.flatten(1))
        ones = first.shape[2:]

        def restore(small: Sequence[Tensor]) -> tuple[Tensor, ...]:
            first_sa, core_rs, last_br = small
            outer = first_sa.flatten(1) @ basis_ia.mH, basis_ob @ last_br.flatten(1)
            first_si, last_or = (one.reshape(*one.shape, *ones) for one in outer)
            return first_si, core_rs, last_or

        core_ba = _outer_product(last_bp, core, first_aq.mH)
        inner = replace(operation, in_channels=core_ba.shape[1], out_channels=core_ba.shape[0])
        return Reduced(inner, core_ba, restore)

    def error(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> float:
        """Return the norm of what the projection on both bases loses, relative to the weight's.

        The projection is orthogonal, so the squared norms of the core and of the loss add up to the weight's. Near full
        rank that difference cancels, and the norm of the difference itself is taken.
        """
        core_pqk, last_op, first_iq = _project(weight, ranks, spectra)
        total = weight.norm()
        if total == 0:
            return 0.0
        lost = 1.0 - float((core_pqk.norm() / total) ** 2)
        if lost < 1e-6:
            joined = _outer_product(last_op, core_pqk, first_iq.mT)
            return float((weight - joined).norm() / total)
        return math.sqrt(lost)


def _project(weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the core (p, q, k...) and the two truncated bases (o, p) and (i, q)."""
    (p, q), (out, inner) = ranks, spectra
    last_op, first_iq = out.basis[:, :p], inner.basis[:, :q]
    return _outer_product(last_op.mT, weight, first_iq), last_op, first_iq


def _outer_product(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """Multiply the first two modes of (a, b, k...) by (x, a) from the left and (b, y) from the right: (x, y, k...)."""
    return _mode_product(_mode_product(core, left.mT, 0), right, 1)


def _mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Replace the mode of length a by one of length x, for a matrix (a, x)."""
    product: Tensor = torch.tensordot(tensor, matrix, dims=([mode], [0]))
    return product.movedim(-1, mode)


def _outside(basis: Tensor, inverse: Tensor, gradient: Tensor, rest: Tensor) -> Tensor:
    """Return the part of a gradient outside a basis (o, p), as seen by the gradient (o, p) of that basis.

    ``inverse`` (p, o) is the basis's pseudo-inverse, ``rest`` (p, i, k...) what the basis is multiplied by.
    """
    outside_op = gradient - basis @ (inverse @ gradient)
    flat = rest.flatten(1)
    return (outside_op @ pseudo_inverse(flat).mT).reshape(-1, *rest.shape[1:])
