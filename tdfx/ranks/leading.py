"""The leading singular directions of a large matrix, by a randomized method: exact values would take most of a minute."""

from __future__ import annotations

import torch
from torch import Tensor

from tdfx.ranks.spectrum import Spectrum, gram_matrix, singular_side, spectrum

_LARGE = 1024
"""Shorter side above which leading directions are worth a method of their own."""
_MOST = 0.4
"""Share of the full rank above which a full decomposition takes hardly longer."""
_OVERSAMPLED = 1 / 16
"""Directions that are computed beside those that are asked for, as a share of them: the last ones are less accurate."""


def leading_spectrum(matrix: Tensor, rank: int) -> Spectrum:
    """Decompose matrices (g, m, n) as far as splits up to a rank need it; small ones, and for high ranks, in full.

    Subspace iteration on the Gram matrix, from random directions that are the same at every call (Halko, Martinsson, Tropp,
    *Finding Structure with Randomness*, SIAM Review 53, 2011, algorithms 4.4 and 5.3). It works in float32, which is enough:
    an error of a direction enters the loss of a split by its square.

    The squares of the values are what a projection on the basis keeps, and the norm of the matrix is exact, so that the loss
    of a split up to ``rank`` is its true loss. The missing values are set to the mean of what is left: beyond ``rank`` the
    loss is an upper bound, because the true values descend.
    """
    rows, cols = matrix.shape[-2:]
    short = min(rows, cols)
    count = rank + max(8, int(_OVERSAMPLED * rank))
    if short <= _LARGE or count > _MOST * short:
        return spectrum(matrix)
    gram = gram_matrix(matrix.float(), rows <= cols)
    values, basis = _iterate(gram, count)
    squares = values[..., :rank].double().square()
    total = matrix.square().sum((-2, -1), dtype=torch.float64)
    rest = (total - squares.sum(-1)).clamp_min(0)[..., None] / (short - rank)
    # Where the last direction is inaccurate, the values must not ascend; what is left then counts as lost in any case.
    tail = torch.minimum(rest, squares[..., -1:]).expand(*squares.shape[:-1], short - rank)
    combined = torch.cat([squares, tail], -1).flatten(0, -2).sum(0)
    residual = (total.sum() - combined.sum()).clamp_min(0)
    return Spectrum(combined.sqrt(), basis[..., :rank].contiguous(), rows, cols, residual)


def _iterate(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return approximate leading singular values (..., count) and vectors (..., d, count) from Gram matrices (..., d, d)."""
    generator = torch.Generator(gram.device).manual_seed(0)
    start = torch.randn(*gram.shape[:-1], count, generator=generator, device=gram.device, dtype=gram.dtype)
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    gram = gram / scale.where(scale > 0, 1.0)
    # The lower factor of an LU decomposition spans the same space as well as an orthonormal basis, and costs a third.
    pivots, lower, _ = torch.linalg.lu(gram @ start)
    basis = torch.linalg.qr(gram @ (pivots @ lower)).Q
    values, rotation = singular_side(basis.mT @ (gram @ basis), count)
    return values * scale[..., 0].sqrt(), basis @ rotation
