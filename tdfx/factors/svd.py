"""The singular value decomposition of a matrix: two factors for a linear map or a pointwise convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdfx.factors.algebra import pseudo_inverse, root_scale
from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Reduced, Scheme
from tdfx.ranks.spectrum import Spectrum, spectrum


class Svd(Scheme):
    """``w_oi = last_op @ first_pi``: the best approximation of a matrix at a given rank (Eckart and Young 1936).

    Stride and padding of a pointwise convolution go to the first factor, which has no bias: padded zeros stay zeros.
    """

    name = "svd"

    def fits(self, operation: Operation) -> bool:
        """Linear maps and convolutions whose kernel is one tap, without groups."""
        return operation.is_pointwise and operation.groups == 1 and not operation.transposed

    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """One rank, at most the shorter side."""
        return (min(operation.in_channels, operation.out_channels),)

    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Down to the rank, then up to the output."""
        (rank,) = ranks
        return (
            replace(operation, out_channels=rank),
            Operation.pointwise(rank, operation.out_channels, operation.dims),
        )

    def spectra(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return the spectrum of the matrix (o, i), from its shorter side."""
        return (spectrum(weight.flatten(1)),)

    def split(
        self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]
    ) -> tuple[Tensor, ...]:
        """Return ``first`` (p, i, 1...) and ``last`` (o, p, 1...), each with the square root of the spectrum."""
        (rank,), (one,) = ranks, spectra
        w_oi = weight.flatten(1)
        basis = one.basis[:, :rank]
        if one.rows <= one.cols:
            last_op, first_pi = basis, basis.mT @ w_oi
            scale = root_scale(first_pi.norm(dim=1))
            last_op, first_pi = last_op * scale, first_pi / scale[:, None]
        else:
            last_op, first_pi = w_oi @ basis, basis.mT
            scale = root_scale(last_op.norm(dim=0))
            last_op, first_pi = last_op / scale, first_pi * scale[:, None]
        taps = weight.shape[2:]
        return first_pi.reshape(rank, -1, *taps), last_op.reshape(-1, rank, *taps)

    def join(self, operation: Operation, factors: Sequence[Tensor]) -> Tensor:
        """Return ``last @ first`` in the shape of the dense weight."""
        first, last = factors
        w_oi = last.flatten(1) @ first.flatten(1)
        return w_oi.reshape(last.shape[0], first.shape[1], *first.shape[2:])

    def project(self, operation: Operation, factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Add what lies in the range of ``last``, known from the gradient of ``first``, and what lies outside of it."""
        first_pi, last_op = (factor.flatten(1) for factor in factors)
        by_first, by_last = (gradient.flatten(1) for gradient in gradients)
        inverse_po = pseudo_inverse(last_op)
        outside = by_last - last_op @ (inverse_po @ by_last)
        g_oi = inverse_po.mT @ by_first + outside @ pseudo_inverse(first_pi).mT
        return g_oi.reshape(g_oi.shape[0], g_oi.shape[1], *factors[0].shape[2:])

    def reduce(self, operation: Operation, factors: Sequence[Tensor]) -> Reduced:
        """Make both factors orthonormal (QR): what is left between them is as small as the rank."""
        if operation.groups > 1 or operation.transposed:
            return super().reduce(operation, factors)
        first, last = factors
        basis_ia, first_ap = torch.linalg.qr(first.flatten(1).mH)
        basis_ob, last_bp = torch.linalg.qr(last.flatten(1))
        ones = first.shape[2:]

        def restore(small: Sequence[Tensor]) -> tuple[Tensor, ...]:
            first_ra, last_br = (factor.flatten(1) for factor in small)
            outer = first_ra @ basis_ia.mH, basis_ob @ last_br
            first_ri, last_or = (one.reshape(*one.shape, *ones) for one in outer)
            return first_ri, last_or

        core_ba = last_bp @ first_ap.mH
        inner = replace(operation, in_channels=core_ba.shape[1], out_channels=core_ba.shape[0])
        return Reduced(inner, core_ba.reshape(*core_ba.shape, *ones), restore)

    def error(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> float:
        """Return the norm of the cut singular values, relative to all of them."""
        (rank,), (one,) = ranks, spectra
        total = one.values.norm()
        return float(one.values[rank:].norm() / total) if total > 0 else 0.0
