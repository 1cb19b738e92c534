"""EVBMF ranks against a direct minimisation of the variational free energy, and what must hold for every matrix."""

from __future__ import annotations

import math
import time

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import minimize

from tdfx.ranks import evbmf
from tdfx.ranks.evbmf import _threshold, evbmf_rank, finds_signal
from tdfx.ranks.spectrum import spectrum

Floats = npt.NDArray[np.float64]


def rank_of(matrix: Floats) -> int:
    return evbmf_rank(torch.from_numpy(np.linalg.svd(matrix, compute_uv=False)), *matrix.shape)


def planted(rng: np.random.Generator, rows: int, cols: int, rank: int, strength: float) -> Floats:
    """Noise of variance 1 and ``rank`` components from 1 to 2 times ``strength`` times its largest singular value."""
    left = np.linalg.qr(rng.standard_normal((rows, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((cols, rank)))[0]
    sizes = strength * (math.sqrt(rows) + math.sqrt(cols)) * np.linspace(2, 1, rank)
    noise: Floats = rng.standard_normal((rows, cols))
    result: Floats = (left * sizes) @ right.T + noise
    return result


def component_energy(ratio: Floats, short: int, long: int) -> Floats:
    """Twice the free energy of each component at its best posterior, relative to the posterior at zero.

    For V = B A^T + noise with posterior means a, b and variances u, v of the entries of one column of A and of B, and
    with both prior variances at their best (a**2 / M + u and b**2 / L + v), equation (20) of the paper is
        M log(1 + a**2 / (M u)) + L log(1 + b**2 / (L v)) + (a**2 + M u)(b**2 + L v) / sigma**2 - 2 a b s / sigma**2.
    With p = a**2 / (a**2 + M u) and q likewise, and the common scale of u v at its best, this is
        -M log(1 - p) - L log(1 - q) - p q s**2 / sigma**2,   0 <= p, q < 1,
    which is lowered coordinate by coordinate, from p = q = 1, until nothing moves. ``ratio`` is s**2 / sigma**2.
    """
    p = np.ones_like(ratio)
    q = np.ones_like(ratio)
    with np.errstate(divide="ignore"):
        for _ in range(400):
            q = np.maximum(1 - short / (ratio * p), 0)
            p = np.maximum(1 - long / (ratio * np.maximum(q, 1e-300)), 1e-300)
        energy: Floats = -long * np.log1p(-p) - short * np.log1p(-q) - p * q * ratio
    return energy


def reference_rank(matrix: Floats) -> int:
    """Scan the noise variance, refine around the best, and count the components whose free energy is negative."""
    short, long = sorted(matrix.shape)
    squared = np.linalg.svd(matrix, compute_uv=False) ** 2

    def energy(variance: Floats) -> Floats:
        ratio = squared[None, :] / variance[:, None]
        kept = np.minimum(component_energy(ratio, short, long), 0)
        total: Floats = short * long * np.log(variance) + (ratio + kept).sum(axis=1)
        return total

    low, high = math.log(squared.mean() / long * 1e-4), math.log(squared.mean() / long * 1.1)
    for _ in range(4):
        grid = np.linspace(low, high, 300)
        best = int(energy(np.exp(grid)).argmin())
        low, high = grid[max(best - 2, 0)], grid[min(best + 2, grid.size - 1)]
    variance = math.exp((low + high) / 2)
    return int((component_energy(np.array(squared / variance), short, long) < 0).sum())


@pytest.mark.parametrize("seed", range(24))
def test_rank_is_that_of_the_least_free_energy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = (int(side) for side in rng.integers(4, 60, 2))
    rank = int(rng.integers(0, max(min(rows, cols) // 3, 1) + 1))
    # Components from far below the noise to above it: the threshold itself is tested, not only clear cases.
    matrix = planted(rng, rows, cols, rank, strength=float(rng.uniform(0.3, 1.5)))
    assert rank_of(matrix) == reference_rank(matrix)
    assert rank_of(matrix.T) == reference_rank(matrix)


@pytest.mark.parametrize(("short", "long"), [(1, 1), (30, 50), (64, 64), (16, 4096)])
def test_threshold_is_where_the_free_energy_turns_negative(short: int, long: int) -> None:
    # 400 rounds of coordinate descent leave far less than 1e-6 at the threshold, where both p and q are well above 0.
    around = _threshold(short / long) * long * np.array([1 - 1e-6, 1 + 1e-6])
    below, above = component_energy(around, short, long)
    assert above < 0 < below


def least_free_energy(ratio: float, short: int, long: int) -> float:
    """Minimise the free energy of one component over the whole posterior and both priors; ``ratio`` is s**2 / sigma**2.

    Twice equation (20) of the paper, for V = B A^T + noise: posterior means a, b, variances u, v of the entries of one
    column of A (length M) and of B (length L), prior variances c_a, c_b, all six free, in units where sigma = 1.
    """
    s = math.sqrt(ratio)

    def energy(at: Floats) -> float:
        a, b = at[:2]
        u, v, c_a, c_b = np.exp(at[2:])
        fit = (a**2 + long * u) * (b**2 + short * v) - 2 * a * b * s
        prior_a = long * (math.log(c_a / u) - 1) + (a**2 + long * u) / c_a
        prior_b = short * (math.log(c_b / v) - 1) + (b**2 + short * v) / c_b
        return float(fit + prior_a + prior_b)

    root = math.sqrt(s)
    energies = []
    for size in (1.0, 0.7):
        start = [size * root, size * root, -math.log(s), -math.log(s), math.log(s / long), math.log(s / short)]
        energies.append(minimize(energy, np.array(start), method="BFGS", options={"gtol": 1e-7}).fun)
    return float(min(energies))


@pytest.mark.parametrize(("short", "long"), [(1, 1), (3, 5), (8, 8), (6, 40)])
@pytest.mark.parametrize("times", [1.05, 1.3, 2.0, 10.0])
def test_the_reference_is_the_least_free_energy_over_all_six_variables(short: int, long: int, times: float) -> None:
    """The two variables of ``component_energy`` are a reduction; this holds it to the free energy as the paper writes it."""
    ratio = times * _threshold(short / long) * long
    (reduced,) = component_energy(np.array([ratio]), short, long)
    assert reduced < 0
    assert least_free_energy(ratio, short, long) == pytest.approx(reduced, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(60))
def test_both_orientations_have_the_same_rank(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    rows, cols = (int(side) for side in rng.integers(1, 80, 2))
    rank = int(rng.integers(0, min(rows, cols) // 2 + 1))
    matrix = planted(rng, rows, cols, rank, strength=float(rng.uniform(0.3, 2.0)))
    values = torch.from_numpy(np.linalg.svd(matrix, compute_uv=False))
    rank = evbmf_rank(values, rows, cols)
    assert evbmf_rank(values, cols, rows) == rank
    assert rank_of(matrix.T) == rank
    assert rank_of(matrix * 10.0 ** rng.integers(-9, 9)) == rank


@pytest.mark.parametrize("strength", [0.6, 0.9, 2.0])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (24, 24), (16, 400)])
@pytest.mark.parametrize("given", [9, 12, 15])
def test_the_largest_values_and_the_residual_are_enough(shape: tuple[int, int], strength: float, given: int) -> None:
    matrix = planted(np.random.default_rng(given), *shape, 6, strength)
    values = torch.from_numpy(np.linalg.svd(matrix, compute_uv=False))
    rest = values[given:].square().sum()
    whole = evbmf_rank(values, *shape)
    assert whole in range(1 if strength > 0.6 else 0, 7)
    assert evbmf_rank(values[:given], *shape, residual=rest) == whole
    assert evbmf_rank(values[:given], *shape, residual=float(rest)) == whole


def test_without_the_residual_noise_would_be_kept() -> None:
    values = torch.from_numpy(np.linalg.svd(planted(np.random.default_rng(9), 40, 60, 6, 2.0), compute_uv=False))
    assert evbmf_rank(values[:9], 40, 60) == 9
    assert evbmf_rank(values[:9], 40, 60, residual=values[9:].square().sum()) == 6


def test_a_residual_that_is_rounding_does_not_count() -> None:
    values = torch.from_numpy(np.linalg.svd(planted(np.random.default_rng(0), 30, 50, 4, 2.0), compute_uv=False))
    assert evbmf_rank(values, 30, 50, residual=-1e-12) == 4
    assert evbmf_rank(values, 30, 50, residual=1e9) == 4
    assert evbmf_rank(values[:10], 30, 50, residual=-1.0) == evbmf_rank(values[:10], 30, 50)


def test_values_that_are_missing_are_not_kept() -> None:
    # The missing values are as large as the given one: none differs from noise, and no rank exceeds the number given.
    assert evbmf_rank(torch.tensor([1.0]), 30, 50, residual=29.0) == 0
    strong = torch.full((12,), 500.0)
    assert evbmf_rank(strong[:6], 40, 60, residual=strong[6:].square().sum()) <= 6


def test_some_of_the_cases_above_are_close_calls() -> None:
    """The same strengths give a rank between none and all, so a rule that says either would fail."""
    rng = np.random.default_rng(0)
    ranks = [rank_of(planted(rng, 30, 50, 8, strength)) for strength in (0.2, 0.6, 0.8, 1.5)]
    assert ranks[0] == 0
    assert 0 < ranks[1] < ranks[2] < 8
    assert ranks[3] == 8


@pytest.mark.parametrize("rank", [1, 3, 10])
@pytest.mark.parametrize("shape", [(64, 576), (256, 64), (40, 40), (576, 64)])
def test_planted_rank_is_found(shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(rank)
    matrix = planted(rng, *shape, rank, strength=2.0)
    assert rank_of(matrix) == rank
    assert rank_of(1e-6 * matrix) == rank
    assert rank_of(1e6 * matrix) == rank
    assert rank_of(matrix.T) == rank
    assert rank_of(matrix[::-1, ::-1]) == rank


@pytest.mark.parametrize("shape", [(64, 576), (256, 64), (40, 40), (16, 27), (10, 512)])
def test_noise_has_no_rank(shape: tuple[int, int]) -> None:
    for seed in range(10):
        assert rank_of(np.random.default_rng(seed).standard_normal(shape)) == 0


def test_weights_at_initialisation_have_no_rank() -> None:
    for weight in (torch.nn.Linear(256, 128).weight, torch.nn.Conv2d(64, 64, 3).weight.flatten(1)):
        assert rank_of(weight.detach().double().numpy()) == 0


@pytest.mark.parametrize("shape", [(64, 576), (256, 64), (40, 40), (12, 200)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_exact_low_rank_is_found_without_noise(shape: tuple[int, int], rank: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        matrix = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
        assert rank_of(matrix) == rank


@pytest.mark.parametrize("shape", [(64, 576), (256, 64), (40, 40), (12, 200)])
@pytest.mark.parametrize("rank", [1, 5])
def test_rounding_of_the_gram_matrix_is_not_signal(shape: tuple[int, int], rank: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        matrix = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
        # Zero values are computed as anything up to about 1e-8 of the largest.
        computed = spectrum(torch.from_numpy(matrix))
        assert evbmf_rank(computed.values, *shape) == rank


@pytest.mark.parametrize("dead", [5, 15, 25])
@pytest.mark.parametrize("strength", [0.9, 2.0])
def test_dead_rows_do_not_change_the_objective(dead: int, strength: float) -> None:
    """Values that are exactly zero hold no noise, and so lower the noise variance that explains the others."""
    matrix = planted(np.random.default_rng(dead), 40 - dead, 60, 8, strength)
    whole = np.vstack([matrix, np.zeros((dead, 60))])
    values = np.zeros(40)
    values[: 40 - dead] = np.linalg.svd(matrix, compute_uv=False)
    assert evbmf_rank(torch.from_numpy(values), 40, 60) == reference_rank(whole)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (7, 5)])
def test_a_zero_or_empty_spectrum_has_rank_zero(shape: tuple[int, int]) -> None:
    assert rank_of(np.zeros(shape)) == 0


def test_order_and_dtype_of_the_values_do_not_matter() -> None:
    values = torch.from_numpy(np.linalg.svd(planted(np.random.default_rng(0), 30, 50, 4, 2.0), compute_uv=False))
    assert evbmf_rank(values, 30, 50) == 4
    assert evbmf_rank(values.flip(0), 30, 50) == 4
    assert evbmf_rank(values.float(), 30, 50) == 4
    assert evbmf_rank(values.bfloat16().requires_grad_(), 50, 30) == 4


def test_large_shapes_are_quick_from_values_alone() -> None:
    # Noise of variance 1 fills [sqrt(M) - sqrt(L), sqrt(M) + sqrt(L)]; any rule that forms vectors takes far longer.
    noise = torch.linspace(math.sqrt(2000) + math.sqrt(300), math.sqrt(2000) - math.sqrt(300), 290)
    values = torch.cat([torch.full((10,), 200.0), noise]).double()
    start = time.process_time()
    assert evbmf_rank(values, 2000, 300) == 10
    assert time.process_time() - start < 2


@pytest.mark.parametrize("strength", [0.0, 0.2, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(24, 90), (40, 40), (1, 30)])
def test_signal_is_found_where_the_rank_is_not_zero(shape: tuple[int, int], strength: float) -> None:
    generator = np.random.default_rng(0)
    for _ in range(8):
        direction = np.outer(generator.standard_normal(shape[0]), generator.standard_normal(shape[1]))
        matrix = generator.standard_normal(shape) + strength * direction
        values = torch.from_numpy(np.linalg.svd(matrix, compute_uv=False))
        for residual in (0.0, 3.0):
            assert finds_signal(values, *shape, residual) == (evbmf_rank(values, *shape, residual) > 0)
    assert not finds_signal(torch.zeros(3, dtype=torch.float64), 3, 5)


def test_what_stands_above_any_noise_needs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    search = evbmf._noise_variance

    def record(x_h: evbmf.Floats, short: int, alpha: float, threshold: float) -> float:
        searches.append(short)
        return search(x_h, short, alpha, threshold)

    monkeypatch.setattr(evbmf, "_noise_variance", record)
    values = torch.tensor([9.0, *[0.1] * 23], dtype=torch.float64)
    assert finds_signal(values, 24, 90)
    assert not searches
    assert evbmf_rank(values, 24, 90) == 1
    assert searches
