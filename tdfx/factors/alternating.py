"""Alternating least squares for sums of rank-one terms, many tensors at a time.

TensorLy's ``parafac`` forms the Khatri-Rao product of all other modes. For a mode of the kernel this has o · i · R values,
R / k times as many as the weight: 100 times at usual ranks. Here only the product of the kernel's modes is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from tdfx.factors.algebra import pseudo_inverse

Modes = tuple[Tensor, ...]
"""The vectors of R components: (g, o, R), (g, i, R), and (g, k, R) for each dimension of the kernel."""

_SWEEPS, _LEAST_SWEEPS, _WORK = 200, 20, 2.5e10
"""At most ``_SWEEPS`` sweeps; fewer where values times components times sweeps would exceed ``_WORK``, some ten seconds of
one core, but at least ``_LEAST_SWEEPS``."""
_ENOUGH = 1e-4
"""Stop when a sweep lowers the squared error by less than this share of it."""
_PULL = 1e-6
"""Weight of the proximal term, relative to the mean diagonal of the normal equations, which may be singular."""
_LARGEST = 10.0
"""The summed squared norms of all components may be this many times the tensor's; orthogonal ones have one."""


def fit(w_goik: Tensor, start: Modes) -> Modes:
    """Improve a sum of components by alternating least squares; no sweep makes the error larger.

    Each step is proximal (Li, Kindermann, Navasca, *Some Convergence Results on the Regularized Alternating Least-Squares
    Method for Tensor Decomposition*, 2013), and lowers the error even where the equations are singular. The iteration stops
    before the components become much larger than the tensor.

    Args:
        w_goik: Shape (g, o, i, k), all kernel dimensions in one.
        start: Components to begin with, orthogonal or nearly so.
    """
    size = w_goik.square().sum()
    modes, best = start, _squared_error(w_goik, start)
    work = w_goik.numel() * start[0].shape[2]
    for _ in range(int(max(_LEAST_SWEEPS, min(_SWEEPS, _WORK // work)))):
        improved = _sweep(w_goik, modes)
        error = _squared_error(w_goik, improved)
        if not error < best or _norms(improved).square().sum() > _LARGEST * size:
            break
        modes, best, previous = improved, error, best
        if previous - error <= _ENOUGH * previous:
            break
    return modes


def refit(w_goik: Tensor, modes: Modes) -> Modes:
    """Solve for the longer of the two modes of channels, by least squares; shapes as for ``fit``."""
    left, right, *kernels = modes
    if left.shape[1] > right.shape[1]:
        swapped = refit(w_goik.transpose(1, 2), (right, left, *kernels))
        return swapped[1], swapped[0], *kernels
    rest = _khatri_rao([left, _khatri_rao(kernels)])
    return left, (pseudo_inverse(rest) @ w_goik.transpose(2, 3).flatten(1, 2)).mT, *kernels


def total(modes: Modes) -> Tensor:
    """Return the sum of the components, shape (g, o, i, k), all kernel dimensions in one."""
    left, right, *kernels = modes
    taps = _khatri_rao(kernels)
    rest = right[:, :, None] * taps[:, None]
    return (left @ rest.flatten(1, 2).mT).reshape(*left.shape[:2], right.shape[1], taps.shape[1])


def _sweep(w_goik: Tensor, modes: Modes) -> Modes:
    left, right, *kernels = _balance_channels(modes)
    taps = _khatri_rao(kernels)
    right = _step(_contract_channel(w_goik.transpose(1, 2), left, taps), right, [left, *kernels])
    w_gkr = _contract_channels(w_goik, left, right)
    for index, kernel in enumerate(kernels):
        others = kernels[:index] + kernels[index + 1 :]
        kernels[index] = _step(_contract_kernels(w_gkr, kernels, index), kernel, [left, right, *others])
    left = _step(_contract_channel(w_goik, right, _khatri_rao(kernels)), left, [right, *kernels])
    return left, right, *kernels


def _step(product: Tensor, old: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Solve the normal equations of one mode, with a proximal term that keeps it near its old value."""
    gram = torch.stack([other.mT @ other for other in others]).prod(dim=0)
    pull = _PULL * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    pull = pull.where(pull > 0, 1.0)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + pull * eye, product + pull * old, left=False)
    return solved


def _contract_channel(w_gabk: Tensor, other: Tensor, taps: Tensor) -> Tensor:
    """Return the tensor (g, a, b, k) times the components' vectors in b and k, shape (g, a, R)."""
    return (w_gabk.transpose(2, 3) @ other[:, None] * taps[:, None]).sum(2)


def _contract_channels(w_goik: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the tensor times the components' vectors in both channels, shape (g, k, R)."""
    return (w_goik.transpose(2, 3) @ right[:, None] * left[:, :, None]).sum(1)


def _contract_kernels(w_gkr: Tensor, kernels: Sequence[Tensor], index: int) -> Tensor:
    """Return (g, k, R), all kernel dimensions in one, times the components' vectors in all of them but one."""
    one = w_gkr.new_ones(w_gkr.shape[0], 1, w_gkr.shape[2])
    left, right = _khatri_rao([one, *kernels[:index]]), _khatri_rao([one, *kernels[index + 1 :]])
    w_gabcr = w_gkr.reshape(w_gkr.shape[0], left.shape[1], -1, right.shape[1], w_gkr.shape[2])
    return (w_gabcr * left[:, :, None, None] * right[:, None, None]).sum((1, 3))


def _khatri_rao(kernels: Sequence[Tensor]) -> Tensor:
    """Return the products of the components' vectors in all kernel dimensions, shape (g, k, R)."""
    return reduce(lambda first, kernel: (first[:, :, None] * kernel[:, None]).flatten(1, 2), kernels)


def _norms(modes: Modes) -> Tensor:
    """Return the norm of each component, shape (g, R)."""
    return torch.stack([mode.norm(dim=1) for mode in modes]).prod(dim=0)


def _balance_channels(modes: Modes) -> list[Tensor]:
    """Return the modes with kernels of norm 1 and channels of equal norm, so that the proximal term acts on all alike."""
    share = _norms(modes).sqrt()
    norms = [mode.norm(dim=1, keepdim=True) for mode in modes]
    left, right, *kernels = (mode / norm.where(norm > 0, 1.0) for mode, norm in zip(modes, norms, strict=True))
    return [left * share[:, None], right * share[:, None], *kernels]


def _squared_error(w_goik: Tensor, modes: Modes) -> Tensor:
    return (w_goik - total(modes)).square().sum()
