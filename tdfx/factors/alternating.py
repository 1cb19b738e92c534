"""Alternating least squares for sums of rank-one terms, many tensors at a time.

TensorLy's ``parafac`` forms the Khatri-Rao product of all other modes, which for a kernel's mode is o · i · R values, R / k
times the weight: 100 times at usual ranks. Here the product of the kernel's modes alone is formed, which is short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tdfx.factors.algebra import pseudo_inverse

Modes = tuple[Tensor, ...]
"""The vectors of R components: (g, o, R), (g, i, R), and (g, k, R) for each dimension of the kernel."""

_SWEEPS, _LEAST_SWEEPS, _WORK = 200, 20, 2.5e10
"""Sweeps: at most the first number, fewer where values times components times sweeps would be more than work allows, but at
least the second. That is some ten seconds of one core for a weight."""
_ENOUGH = 1e-4
"""Stop where a sweep lowers the squared error by less than this part of it."""
_PULL = 1e-6
"""How much a step is held back, relative to the mean diagonal of its normal equations: they may be singular."""
_LARGEST = 10.0
"""The squared norms of all components together may be this many times the tensor's; orthogonal ones have 1."""


def fit(w_goik: Tensor, start: Modes) -> Modes:
    """Improve a sum of components by alternating least squares; no sweep makes the error larger.

    Each step is a proximal one (Li, Kindermann, Navasca, *Some Convergence Results on the Regularized Alternating
    Least-Squares Method for Tensor Decomposition*, 2013), which lowers the error even where the equations are singular. What
    is returned is the last result whose components are of the tensor's size.

    Args:
        w_goik: Shape (g, o, i, k), all kernel dimensions in one.
        start: Components to begin with, orthogonal or nearly so.
    """
    size = w_goik.square().sum()
    modes, best = start, _squared_error(w_goik, start)
    work = w_goik.numel() * start[0].shape[2]
    for _ in range(int(max(_LEAST_SWEEPS, min(_SWEEPS, _WORK // work)))):
        found = _sweep(w_goik, modes)
        lost = _squared_error(w_goik, found)
        if not lost < best or _sizes(found).square().sum() > _LARGEST * size:
            break
        done = best - lost <= _ENOUGH * best
        modes, best = found, lost
        if done:
            break
    return modes


def refit(w_goik: Tensor, modes: Modes) -> Modes:
    """Solve for the longer of the two modes of channels alone, by least squares; shapes as for ``fit``."""
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
    left, right, *kernels = _even(modes)
    taps = _khatri_rao(kernels)
    right = _step(_seen(w_goik.transpose(1, 2), left, taps), right, [left, *kernels])
    seen = _kernel_seen(w_goik, left, right)
    for index, kernel in enumerate(kernels):
        others = kernels[:index] + kernels[index + 1 :]
        kernels[index] = _step(_contract(seen, kernels, index), kernel, [left, right, *others])
    left = _step(_seen(w_goik, right, _khatri_rao(kernels)), left, [right, *kernels])
    return left, right, *kernels


def _step(product: Tensor, old: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Solve the normal equations of one mode, held a little to what it was."""
    gram = torch.stack([other.mT @ other for other in others]).prod(dim=0)
    pull = _PULL * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    pull = pull.where(pull > 0, 1.0)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(gram + pull * eye, product + pull * old, left=False)
    return solved


def _seen(w_gabk: Tensor, other: Tensor, taps: Tensor) -> Tensor:
    """Return the tensor (g, a, b, k) times the components' vectors in b and k, shape (g, a, R)."""
    per_tap = w_gabk.transpose(2, 3) @ other[:, None]
    return (per_tap * taps[:, None]).sum(2)


def _kernel_seen(w_goik: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the tensor times the components' vectors in the channels, shape (g, k, R)."""
    per_tap = w_goik.transpose(2, 3) @ right[:, None]
    return (per_tap * left[:, :, None]).sum(1)


def _contract(seen: Tensor, kernels: Sequence[Tensor], index: int) -> Tensor:
    """Return (g, k, R), of all kernel dimensions in one, times the components' vectors in all of them but one."""
    groups, _, rank = seen.shape
    sizes = [kernel.shape[1] for kernel in kernels]
    before, after = math.prod(sizes[:index]), math.prod(sizes[index + 1 :])
    left = _khatri_rao(kernels[:index]) if index else seen.new_ones(groups, 1, rank)
    right = _khatri_rao(kernels[index + 1 :]) if after > 1 else seen.new_ones(groups, 1, rank)
    apart = seen.reshape(groups, before, sizes[index], after, rank)
    return (apart * left[:, :, None, None] * right[:, None, None]).sum((1, 3))


def _khatri_rao(kernels: Sequence[Tensor]) -> Tensor:
    """Return the products of the components' vectors in all kernel dimensions, shape (g, k, R)."""
    first, *rest = kernels
    for kernel in rest:
        first = (first[:, :, None] * kernel[:, None]).flatten(1, 2)
    return first


def _sizes(modes: Modes) -> Tensor:
    """Return the norm of each component, shape (g, R)."""
    return torch.stack([mode.norm(dim=1) for mode in modes]).prod(dim=0)


def _even(modes: Modes) -> list[Tensor]:
    """Return the modes with kernels of norm 1 and the rest shared by the channels, so that no step is held back more."""
    share = _sizes(modes).sqrt()
    units = []
    for mode in modes:
        norm = mode.norm(dim=1, keepdim=True)
        units.append(mode / norm.where(norm > 0, 1.0))
    left, right, *kernels = units
    return [left * share[:, None], right * share[:, None], *kernels]


def _squared_error(w_goik: Tensor, modes: Modes) -> Tensor:
    return (w_goik - total(modes)).square().sum()
