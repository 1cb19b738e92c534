"""Small matrix helpers that several schemes share."""

from __future__ import annotations

import torch
from torch import Tensor

from tdfx.ranks.spectrum import symmetric_eigen


def root_scale(norms: Tensor) -> Tensor:
    """Return the square root of each component's norm, and 1 where a component is zero, shape (..., r).

    Dividing one factor by it and multiplying the other gives both the same share. A component that is zero, up to
    rounding, stays with one zero side only: with two of them its gradient would be zero for ever.
    """
    least = 1e3 * torch.finfo(norms.dtype).eps * norms.amax(-1, keepdim=True)
    return norms.sqrt().where(norms > least, norms.new_ones(()))


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """Return the Moore-Penrose inverse (..., n, m) of a matrix (..., m, n), from the Gram matrix of its shorter side.

    An eigendecomposition of the short side replaces an SVD that would form the long side's vectors. Singular values below
    about 1e-7 of the largest count as zero.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return pseudo_inverse(matrix.mT).mT
    eigenvalues, vectors = symmetric_eigen(matrix @ matrix.mT)
    least = eigenvalues[..., -1:] * eigenvalues.shape[-1] * torch.finfo(matrix.dtype).eps
    inverse = eigenvalues.reciprocal().where(eigenvalues > least, eigenvalues.new_zeros(()))
    return matrix.mT @ (vectors * inverse[..., None, :]) @ vectors.mT
