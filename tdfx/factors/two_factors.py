"""The common part of the schemes that write a weight as a product of two matrices, group by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdfx.factors.algebra import pseudo_inverse, root_scale
from tdfx.factors.operation import Operation, from_groups, grouped_shape, to_groups
from tdfx.factors.scheme import Factors, Lowering, Scheme
from tdfx.ranks.leading import leading_spectrum
from tdfx.ranks.spectrum import Spectrum, spectrum


class TwoFactors(Scheme):
    """``matrix = left @ right``, the best of each rank (Eckart and Young 1936): ``last`` from left, ``first`` from right.

    The inputs are in the columns of the matrix, the outputs in its rows, and each kernel dimension in either. A scheme
    chooses the kernel dimensions of the first factor, which has their stride, padding and dilation too. The chain is exact
    at borders: the first factor has no bias, and no padding mode depends on whether dimensions are padded together or in
    turn.

    Letters: g groups, m and n rows and columns in each, p their rank.
    """

    def first_axes(self, operation: Operation) -> tuple[int, ...]:
        """Return the kernel dimensions of the first factor, here none; the last factor has the others."""
        return ()

    def full_ranks(self, operation: Operation) -> tuple[int, ...]:
        """Return one rank for all groups: the shorter side of the matrix."""
        shape = grouped_shape(operation)
        return (min(math.prod(shape[axis] for axis in side) for side in self._axes(operation)),)

    def chain(self, operation: Operation, ranks: Sequence[int]) -> tuple[Operation, ...]:
        """Return a convolution along the dimensions of the first factor, and one along the others."""
        middle = ranks[0] * operation.groups
        (_, *last), (_, *first) = self._axes(operation)
        return (
            operation.along([axis - 3 for axis in first], operation.in_channels, middle),
            operation.along([axis - 3 for axis in last], middle, operation.out_channels),
        )

    def spectra(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return the spectrum of the matrices of all groups, decomposed by their shorter side."""
        return (spectrum(self.unfold(operation, weight)),)

    def leading_spectra(self, operation: Operation, weight: Tensor, ranks: Sequence[int]) -> tuple[Spectrum, ...]:
        """Return the leading part of the spectrum, of large matrices by a randomized method."""
        return (leading_spectrum(self.unfold(operation, weight), ranks[0]),)

    def values(self, operation: Operation, weight: Tensor) -> tuple[Spectrum, ...]:
        """Return the spectrum without its basis."""
        return (spectrum(self.unfold(operation, weight), with_basis=False),)

    def split(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> Factors:
        """Return ``first`` and ``last``, each with the square roots of the singular values."""
        return self.to_factors(operation, *_halves(self.unfold(operation, weight), ranks[0], spectra[0]))

    def join(self, operation: Operation, factors: Sequence[Tensor]) -> Tensor:
        """Multiply the two matrices."""
        left, right = self.to_matrices(operation, factors)
        return self.fold(operation, left @ right)

    def project(self, operation: Operation, factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Add the part in the range of ``left``, from the gradient of ``right``, and the part outside of it."""
        left, right = self.to_matrices(operation, factors)
        by_left, by_right = self.to_matrices(operation, gradients)
        inverse = pseudo_inverse(left)
        outside = by_left - left @ (inverse @ by_left)
        return self.fold(operation, (inverse.mT @ by_right).add_(outside @ pseudo_inverse(right).mT))

    def refit(self, operation: Operation, factors: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        """Fit the matrix that has more values."""
        left, right = self.to_matrices(operation, factors)
        matrix = self.unfold(operation, weight)
        if left.shape[1] <= right.shape[2]:
            return self.to_factors(operation, left, pseudo_inverse(left) @ matrix)
        return self.to_factors(operation, matrix @ pseudo_inverse(right), right)

    def error(self, operation: Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[Spectrum]) -> float:
        """Return the norm of the cut singular values, relative to all of them."""
        return _tail(ranks[0], spectra[0])

    def lowering(self, operation: Operation, factors: Sequence[Tensor]) -> Lowering:
        """Make both matrices orthonormal (QR), and split the small matrix that is left between them."""
        left, right = self.to_matrices(operation, factors)
        (basis_left, rest_left), (basis_right, rest_right) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
        between = rest_left @ rest_right.mT
        small = replace(spectrum(between), original=(left.shape[1], right.shape[2]))

        def split(ranks: Sequence[int]) -> tuple[Tensor, ...]:
            new_left, new_right = _halves(between, ranks[0], small)
            return self.to_factors(operation, basis_left @ new_left, new_right @ basis_right.mT)

        return Lowering((small,), split, lambda ranks: _tail(ranks[0], small))

    def unfold(self, operation: Operation, weight: Tensor) -> Tensor:
        """Return the matrices (g, m, n) of a dense weight."""
        rows, columns = self._axes(operation)
        w_gmn = to_groups(operation, weight).permute(0, *rows, *columns)
        return w_gmn.flatten(1 + len(rows)).flatten(1, len(rows))

    def fold(self, operation: Operation, matrix: Tensor) -> Tensor:
        """Return the dense weight of matrices (g, m, n): the inverse of ``unfold``."""
        rows, columns = self._axes(operation)
        shape, order = grouped_shape(operation), (0, *rows, *columns)
        w_gmn = matrix.reshape([shape[axis] for axis in order])
        return from_groups(operation, w_gmn.permute([order.index(axis) for axis in range(len(order))]))

    def to_factors(self, operation: Operation, left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """Return the factors' weights for matrices (g, m, p) and (g, p, n)."""
        rank = right.shape[1]
        first, last = self.chain(operation, (rank,))
        w_first = right.reshape(grouped_shape(first))
        groups, out, _, *kernel = grouped_shape(last)
        w_last = left.reshape(groups, out, -1, rank).mT.reshape(groups, out, rank, *kernel)
        return from_groups(first, w_first), from_groups(last, w_last)

    def to_matrices(self, operation: Operation, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the matrices (g, m, p) and (g, p, n) of the factors' weights: the inverse of ``to_factors``."""
        first, last = map(to_groups, self.chain(operation, (1,)), factors)
        groups, out, rank = last.shape[:3]
        left = last.reshape(groups, out, rank, -1).mT.reshape(groups, -1, rank)
        return left, first.reshape(groups, rank, -1)

    def _axes(self, operation: Operation) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the dimensions of (g, o, i, k...) that are in the rows and in the columns."""
        first = self.first_axes(operation)
        last = (axis for axis in range(operation.dims) if axis not in first)
        return (1, *(3 + axis for axis in last)), (2, *(3 + axis for axis in first))


def _halves(matrix: Tensor, rank: int, spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """Return (g, m, p) and (g, p, n), whose product is nearest to a matrix; both have the roots of the singular values."""
    basis = spectrum.leading(rank)
    precise, matrix = matrix.dtype, matrix.to(basis.dtype)  # a product is as precise as the basis, and as fast
    if spectrum.rows <= spectrum.cols:
        right = (basis.mT @ matrix).to(precise)
        scale = root_scale(right.norm(dim=2))
        return basis * scale[:, None], right / scale[..., None]
    left = (matrix @ basis).to(precise)
    scale = root_scale(left.norm(dim=1))
    return left / scale[:, None], basis.mT * scale[..., None]


def _tail(rank: int, spectrum: Spectrum) -> float:
    total = spectrum.values.square().sum() + spectrum.residual
    lost = spectrum.values[rank:].square().sum() + spectrum.residual
    return math.sqrt(lost / total) if total > 0 else 0.0
