"""Matrix functions that several schemes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tdfx.ranks.spectrum import symmetric_eigen

_STEPS, _LEAST_STEPS, _WORK = 1000, 100, 2**25
"""At most ``_STEPS`` steps of conjugate gradients; fewer where steps times values would exceed ``_WORK``, but at least
``_LEAST_STEPS``. Measured on a CP of 128 by 128 channels, this gives 227 steps, which leave an error below a percent."""


def root_scale(norms: Tensor) -> Tensor:
    """Return the square root of each component's norm, and 1 where a component is zero, shape (..., r).

    Dividing one factor by it and multiplying the other gives both the same norm. A component that is zero, up to rounding,
    keeps only one zero side: with two zero sides its gradient would be zero for ever.
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


@dataclass(frozen=True, slots=True)
class Linearized:
    """A map of some tensors to one, and its derivative at a point in both directions."""

    value: Tensor
    """The map's value at the point."""
    pull: Callable[[Tensor], tuple[Tensor, ...]]
    """The vector-Jacobian product: from a cotangent of the value to one tensor for each argument."""

    def push(self, moves: Sequence[Tensor]) -> Tensor:
        """Return the Jacobian-vector product: the vector-Jacobian product of ``pull``, which is linear."""
        zeros = self.value.new_zeros(()).expand_as(self.value)  # takes no memory
        return cast("Tensor", torch.func.vjp(self.pull, zeros)[1](tuple(moves))[0])


def linearize(join: Callable[..., Tensor], factors: Sequence[Tensor]) -> Linearized:
    """Return the linearization of a map, made of differentiable operations, at given arguments."""
    return Linearized(*torch.func.vjp(join, *factors)[:2])


def least_norm(join: Callable[..., Tensor], factors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return the tensor of least norm whose vector-Jacobian product with ``join`` at the factors is nearest ``gradients``.

    This uses conjugate gradients on the normal equations. They never form the Jacobian, and each step adds a tensor in the
    range of the Jacobian, so that the norm is the least (Björck, *Numerical Methods for Least Squares Problems*, SIAM 1996,
    section 7.4).

    Args:
        join: A map of the factors to a tensor, made of differentiable operations.
        factors: Where to take the derivative.
        gradients: One for each factor.
    """
    near = linearize(join, factors)
    residual = tuple(gradients)
    solution, image = torch.zeros_like(near.value), near.push(residual)
    direction, size = image, image.square().sum()
    least = 1e-24 * size
    for _ in range(max(_LEAST_STEPS, min(_STEPS, _WORK // max(1, near.value.numel())))):
        if not size > least:
            break
        pulled = near.pull(direction)
        length = size / sum(part.square().sum() for part in pulled)
        solution = solution + length * direction
        residual = tuple(part - length * change for part, change in zip(residual, pulled, strict=True))
        image = near.push(residual)
        size, before = image.square().sum(), size
        direction = image + size / before * direction
    return solution
