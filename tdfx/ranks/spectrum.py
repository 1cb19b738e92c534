"""The singular values and one singular basis of a matrix, from the eigenvalues of its Gram matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tdfx.devices import has_float64

_LARGE = 2048
"""Longest side that is decomposed by one thread."""
_SMALL = 256
"""Longest side that is decomposed on the CPU wherever it lies, as batches are: a GPU is assumed to take longer, and
``tools/bench_gpu.py`` times both."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values and vectors of one unfolding of a weight.

    Shapes: m rows, n columns, d the side that was decomposed (m or n), r = min(m, n), or less where only the largest values
    were computed. A weight with g groups has g matrices of one size, which are cut at the same rank.
    """

    values: Tensor
    """Singular values, shape (r,), descending, in the working dtype. For g matrices the k-th value is the root of the summed
    squares of their k-th values, so that the norm of the values cut is what all matrices lose together. They are on the CPU,
    so that rank rules wait for no device, and sum in a fixed order."""
    basis: Tensor
    """Orthonormal singular vectors of the decomposed side as columns, shape (d, r), or (g, d, r); fewer columns where only
    splits up to some rank were asked for, and float32 where directions were found by iteration."""
    rows: int
    """m, the rows of the unfolding, or of each matrix."""
    cols: int
    """n, the columns of the unfolding, or of each matrix."""
    residual: float | Tensor = 0.0
    """The sum of the squares of the missing values, where only the largest r < min(m, n) are given, and of what is lost at
    any rank; not negative."""
    original: tuple[int, int] | None = None
    """For a weight that is factorized already, the rows and columns of the same unfolding of the dense weight."""

    @classmethod
    def of(cls, matrix: Tensor) -> Spectrum:
        """Return the spectrum of a matrix (m, n), or of g matrices (g, m, n) that are cut at the same rank.

        >>> import torch
        >>> Spectrum.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).values.tolist()
        [4.0, 3.0]
        """
        return spectrum(matrix)

    @property
    def full_rank(self) -> int:
        """The full rank that shares and floors refer to: min(m, n), or that of the original."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """The rows and columns that ranks, shares and floors refer to."""
        return (self.rows, self.cols) if self.original is None else self.original

    def leading(self, rank: int) -> Tensor:
        """Return the first columns of the basis, shape (d, rank) or (g, d, rank); contiguous, for products of equal bits."""
        return self.basis[..., :rank].contiguous()

    def reaches(self, rank: int) -> bool:
        """Return True if the basis is wide enough for a split at a rank."""
        return self.basis.shape[-1] >= rank

    def cut(self, rank: int) -> Spectrum:
        """Return the spectrum with the part of its basis that a split at this rank needs."""
        return replace(self, basis=self.leading(rank))

    def without_basis(self) -> Spectrum:
        """Return the spectrum with its values alone, as rank rules need them."""
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


def spectrum(matrix: Tensor, *, rows_side: bool | None = None, with_basis: bool = True) -> Spectrum:
    """Decompose a matrix, or g matrices of one size together, by the eigenvectors of the Gram matrix.

    Unlike a full SVD this never forms the longer side's vectors. Values below about 1e-8 of the largest are rounding noise,
    because the Gram matrix holds their squares.

    Args:
        matrix: Shape (m, n) or (g, m, n), real, finite.
        rows_side: Decompose the row space (True), the column space (False), or the shorter side (None).
        with_basis: Whether to compute the basis; the values alone take about half the time.

    Returns:
        The spectrum in float64, its basis on the matrix's device; the sign of each vector is fixed. Of a matrix in float32
        the products are computed in float32: the basis is orthonormal to float64, and spans the leading directions of a
        matrix that differs by rounding, so that values below about 1e-3 of the largest are noise.
    """
    rows, cols = matrix.shape[-2:]
    by_rows = rows <= cols if rows_side is None else rows_side
    gram = gram_matrix(matrix, by_rows)
    gram = gram.double() if has_float64(gram.device) else gram
    if with_basis:
        values, basis = singular_side(gram, min(rows, cols))
    else:
        eigenvalues = _solve(torch.linalg.eigvalsh, gram)
        values, basis = eigenvalues.flip(-1)[..., : min(rows, cols)].clamp_min(0).sqrt(), gram.new_empty(0)
    combined = values if matrix.dim() == 2 else values.square().sum(0).sqrt()
    return Spectrum(combined.cpu(), basis, rows, cols)


def gram_matrix(matrix: Tensor, by_rows: bool) -> Tensor:
    """Return the products of the rows (..., m, m) or of the columns (..., n, n) of matrices (..., m, n).

    On the CPU NumPy sees that the two factors are one matrix, and computes half of the symmetric product.
    """
    if matrix.dim() == 2:
        return gram_matrix(matrix[None], by_rows)[0]
    if matrix.device.type != "cpu":
        return matrix @ matrix.mT if by_rows else matrix.mT @ matrix
    arrays = matrix.detach().numpy()
    return torch.stack([torch.from_numpy(array @ array.T if by_rows else array.T @ array) for array in arrays])


def singular_side(gram: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values (..., keep) and vectors (..., d, keep) from Gram matrices (..., d, d)."""
    eigenvalues, vectors = symmetric_eigen(gram)
    del gram  # a Gram matrix and its eigenvectors are each as large as a square weight
    values = eigenvalues.flip(-1)[..., :keep].clamp_min(0).sqrt()
    basis = vectors.flip(-1)[..., :keep]
    del vectors
    peak = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    return values, basis.mul_(torch.where(peak < 0, -1.0, 1.0))


def symmetric_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ascending eigenvalues (..., d) and eigenvectors (..., d, d), as columns, of symmetric matrices."""
    eigenvalues, vectors = _solve(torch.linalg.eigh, gram)
    return eigenvalues, vectors


def _solve(solve: Callable[[Tensor], Any], gram: Tensor) -> Any:
    """Solve an eigenproblem on the matrix's device, or on the CPU where that is faster or the device fails.

    On some CUDA devices the solver does not converge, or returns NaN, for matrices of low rank or with repeated values.
    """
    if gram.device.type == "cpu" or gram.is_meta:
        return _on_one_thread(solve, gram)
    if gram.dim() == 2 and gram.shape[-1] > _SMALL:
        with contextlib.suppress(RuntimeError):  # torch.linalg.LinAlgError is one
            solution = solve(gram)
            if all(bool(part.isfinite().all()) for part in _parts(solution)):
                return solution
    solution = _on_one_thread(solve, gram.cpu())
    moved = [part.to(gram.device) for part in _parts(solution)]
    return moved[0] if isinstance(solution, Tensor) else moved


def _parts(solution: Any) -> tuple[Tensor, ...]:
    return (solution,) if isinstance(solution, Tensor) else tuple(solution)


def _on_one_thread(solve: Callable[[Tensor], Any], gram: Tensor) -> Any:
    """Solve an eigenproblem on the CPU on one thread, if it is not very large.

    On busy CPU cores LAPACK's threads wait for one another at every step: measured, 2.8 s instead of 0.09 s for d = 512 on
    two cores. Two threads gain a third at best at such sizes.
    """
    if gram.is_meta or gram.shape[-1] > _LARGE:
        return solve(gram)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return solve(gram)
    finally:
        torch.set_num_threads(threads)
