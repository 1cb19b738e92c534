"""The singular values and one singular basis of a matrix, from the eigenvalues of its Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LARGE = 2048
"""Sides above this are decomposed with all threads."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One unfolding of a weight, seen through its singular value decomposition.

    Shapes: m rows, n columns, d the length of the side that was decomposed (m or n), r = min(m, n), or less where only the
    largest values were computed. Where a weight falls into g matrices of one size that are cut at one rank, as it does by
    its groups, this is about all of them together.
    """

    values: Tensor
    """Singular values, shape (r,), descending, in the working dtype; of g matrices the root of the sum of squares of each
    one's first, second and so on, so that what they lose together at a rank is the norm of the values cut."""
    basis: Tensor
    """Orthonormal singular vectors of the decomposed side as columns, shape (d, r), or (g, d, r)."""
    rows: int
    """m, the rows of the unfolding, or of each matrix."""
    cols: int
    """n, the columns of the unfolding, or of each matrix."""
    residual: float | Tensor = 0.0
    """The sum of the squares of the values that are not given, where only the largest r < min(m, n) are; not negative."""
    original: tuple[int, int] | None = None
    """Rows and columns of the same unfolding of the weight that was factorized, where this is what factors leave of it."""

    @property
    def full_rank(self) -> int:
        """The most ranks that the unfolding can have, which shares and floors refer to: min(m, n), or the original's."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns that ranks, shares and floors refer to."""
        return (self.rows, self.cols) if self.original is None else self.original

    def leading(self, rank: int) -> Tensor:
        """Return the first columns of the basis, shape (d, rank) or (g, d, rank).

        They lie in memory in one way, whether the basis was cut before or not, so that products have the same bits.
        """
        return self.basis[..., :rank].contiguous()

    def cut(self, rank: int) -> Spectrum:
        """Return the spectrum with as much of its basis as a split at this rank needs."""
        return replace(self, basis=self.leading(rank))

    def without_basis(self) -> Spectrum:
        """Return the spectrum with its values alone, which is all that rank rules read."""
        return replace(self, basis=self.values.new_empty(0))

    def energy(self) -> Tensor:
        """Return the share of ``sum(s**2)`` held by the first 1, 2, ... values, shape (r,); zeros for a zero matrix."""
        squared = self.values.square()
        total = squared.sum() + self.residual
        return squared.cumsum(0) / total if total > 0 else torch.zeros_like(squared)

    def stable_rank(self) -> float:
        """Return ``sum(s**2) / max(s**2)``, in [1, full rank]; 0 for a zero matrix."""
        squared = self.values.square()
        largest = squared.max()
        return float((squared.sum() + self.residual) / largest) if largest > 0 else 0.0


def pack(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """Return a spectrum without its basis as two tensors: the values, and the numbers beside them."""
    original = (0, 0) if spectrum.original is None else spectrum.original
    rest = (spectrum.rows, spectrum.cols, float(spectrum.residual), *original)
    return spectrum.values, torch.tensor(rest, dtype=torch.float64)


def unpack(values: Tensor, rest: Tensor) -> Spectrum:
    """Return the spectrum that ``pack`` was given, without its basis.

    >>> one = unpack(*pack(spectrum(torch.eye(3)[:2])))
    >>> one.values.tolist(), one.shape, one.original
    ([1.0, 1.0], (2, 3), None)
    """
    rows, cols, residual, *original = rest.tolist()
    first, second = map(int, original)
    shape = (first, second) if first else None
    return Spectrum(values, values.new_empty(0), int(rows), int(cols), residual, shape)


def working_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a weight is decomposed: float64, or float32 where the device has no float64."""
    return torch.float32 if weight.device.type == "mps" else torch.float64


def spectrum(matrix: Tensor, *, rows_side: bool | None = None) -> Spectrum:
    """Decompose a matrix, or g of one size together, by the eigenvectors of the Gram matrix.

    This never forms the longer side's vectors, as a full SVD does. Values below about 1e-8 of the
    largest are rounding noise, because the Gram matrix holds their squares; no rank rule looks that deep.

    Args:
        matrix: Shape (m, n) or (g, m, n), real, finite.
        rows_side: Decompose the row space (True), the column space (False), or the shorter side (None).

    Returns:
        The spectrum, in the matrix's dtype and on its device. The sign of each vector is fixed, so that equal weights
        give equal vectors on every process.
    """
    rows, cols = matrix.shape[-2:]
    left = rows <= cols if rows_side is None else rows_side
    values, basis = singular_side(matrix @ matrix.mT if left else matrix.mT @ matrix, min(rows, cols))
    together = values if matrix.dim() == 2 else values.square().sum(0).sqrt()
    return Spectrum(together, basis, rows, cols)


def singular_side(gram: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values (..., keep) and vectors (..., d, keep) of the matrices of these Gram matrices.

    Args:
        gram: Shape (..., d, d), symmetric.
        keep: How many, at most d.
    """
    eigenvalues, vectors = symmetric_eigen(gram)
    del gram  # each of these is as large as a square weight
    values = eigenvalues.flip(-1)[..., :keep].clamp_min(0).sqrt()
    basis = vectors.flip(-1)[..., :keep]
    del vectors
    peak = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return values, basis.mul_(torch.where(peak < 0, -1.0, 1.0))


def symmetric_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ascending eigenvalues (..., d) and eigenvectors (..., d, d), as columns, of symmetric matrices.

    On a CPU whose cores are busy, as they are beside data-loading workers, LAPACK's threads wait for one another at every
    step: measured, 2.8 s instead of 0.09 s for d = 512 on two cores. Two threads gain a third at best at such sizes, so one
    thread does the work; the process's setting is put back before returning.
    """
    threads = torch.get_num_threads()
    alone = gram.device.type == "cpu" and gram.shape[-1] <= _LARGE
    try:
        if alone:
            torch.set_num_threads(1)
        eigenvalues, vectors = torch.linalg.eigh(gram)
    finally:
        if alone:
            torch.set_num_threads(threads)
    return eigenvalues, vectors
