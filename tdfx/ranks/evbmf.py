"""The analytic solution of empirical variational Bayesian matrix factorization, from singular values alone.

Source: Nakajima, Sugiyama, Babacan, Tomioka, *Global Analytic Solution of Fully-observed Variational Bayesian Matrix
Factorization*, JMLR 14 (2013), 1-37: Theorem 2 (the threshold), Theorem 3 and Corollary 3 (the noise variance).
Symbols are the paper's: L <= M the sides of the matrix, alpha = L / M, tau, x = s**2 / (M sigma**2).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

Floats = npt.NDArray[np.float64]

_GRID = 256
"""Trial values of the noise variance: the free energy has several minima, and a bounded search alone may miss the best."""
_ROUNDING = float(np.finfo(np.float64).eps)
"""Squared singular values below this share of the largest, times the longer side, are rounding only."""


def evbmf_rank(values: Tensor, rows: int, cols: int, residual: float | Tensor = 0.0) -> int:
    """Return how many of r components EVBMF keeps, estimating the noise variance; 0 if nothing stands above the noise.

    The result depends neither on the scale of the matrix nor on which side is the longer. The smallest values may be left
    out, as long as none of them would be kept: such a component enters the free energy by its square, and by a logarithm
    that does not depend on the noise variance, so that the sum of the squares is enough.

    Args:
        values: Singular values, shape (r,), any order, finite: all min(m, n) of them, or the largest r.
        rows: m, at least 1.
        cols: n, at least 1.
        residual: The sum of the squares of the min(m, n) - r missing values, spread evenly over them; a negative sum, which
            rounding can cause, counts as zero, and so does any sum where no value is missing.
    """
    if (x_h := _normalized(values, rows, cols, residual)) is None:
        return 0
    alpha = min(rows, cols) / max(rows, cols)
    threshold = _threshold(alpha)
    return int((x_h > _noise_variance(x_h, min(rows, cols), alpha, threshold) * threshold).sum())


def finds_signal(values: Tensor, rows: int, cols: int, residual: float | Tensor = 0.0) -> bool:
    """Return whether EVBMF keeps any component; the arguments are those of ``evbmf_rank``.

    The noise variance is at most the mean of all, so a value that stands above that needs no search for it.
    """
    if (x_h := _normalized(values, rows, cols, residual)) is None:
        return False
    short, long = sorted((rows, cols))
    if x_h[0] > _threshold(short / long) * float(x_h.sum()) / short:
        return True
    return evbmf_rank(values, rows, cols, residual) > 0


def _normalized(values: Tensor, rows: int, cols: int, residual: float | Tensor) -> Floats | None:
    """Return the squares of all singular values, descending, relative to the largest and the longer side; None for zeros."""
    short, long = sorted((rows, cols))
    squares = np.sort(values.detach().double().cpu().numpy().astype(np.float64) ** 2)[::-1][:short]
    if squares.size == 0 or squares[0] <= 0:
        return None
    missing = short - squares.size
    squared = np.append(squares, np.full(missing, float(residual) / max(missing, 1)))
    # A zero, exact or up to rounding, counts as the noise that rounding makes.
    x_h: Floats = np.maximum(squared / squared[0], long * _ROUNDING) / long
    return x_h


@lru_cache(maxsize=1024)
def _threshold(alpha: float) -> float:
    """Return the value of x above which a component is kept (Theorem 2): the root of the paper's Xi, then x(tau)."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    tau = float(brentq(lambda tau: phi(tau) + phi(tau / alpha), 2.4 * alpha, 2.6, xtol=1e-14))
    return (1 + tau) * (1 + alpha / tau)


def _noise_variance(x_h: Floats, short: int, alpha: float, threshold: float) -> float:
    """Minimise the free energy over sigma**2 between the bounds of Corollary 3; x_h = s**2 / M, largest first."""
    most_kept = min(math.ceil(short / (1 + alpha)) - 1, x_h.size - 1)
    tail = x_h[max(most_kept, 0) :]
    upper = float(x_h.sum()) / short
    lower = max(float(tail[0]) / threshold, float(tail.mean()))
    if lower >= upper:
        return upper
    grid = np.geomspace(lower, upper, _GRID)
    best = int(np.argmin(_free_energy(grid, x_h, alpha, threshold)))
    minimum = minimize_scalar(
        lambda log_variance: float(_free_energy(np.exp(np.array([log_variance])), x_h, alpha, threshold)[0]),
        bounds=(math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, _GRID - 1)])),
        method="bounded",
        options={"xatol": 1e-12},
    )
    return math.exp(float(minimum.x))


def _free_energy(variance: Floats, x_h: Floats, alpha: float, threshold: float) -> Floats:
    """Return the free energy, up to a constant, for each trial variance, shape (g,) (Theorem 3)."""
    x = x_h[None, :] / variance[:, None]
    kept = x > threshold
    excess = np.where(kept, x, threshold) - (1 + alpha)
    tau = 0.5 * (excess + np.sqrt(np.maximum(excess**2 - 4 * alpha, 0)))
    gain = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    energy: Floats = (x - np.log(x) + np.where(kept, gain, 0.0)).sum(axis=1)
    return energy
