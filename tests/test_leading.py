"""The leading directions of large weights: what they lose is known, near the least possible, and bounded beyond them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.passes.planning import by_budget
from tdfx.ranks import leading
from tdfx.ranks.leading import leading_spectrum
from tdfx.ranks.spectrum import gram_matrix, spectrum

RANK = 40


@pytest.fixture(autouse=True)
def _small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "_LARGE", 32)


def trained(rows: int, cols: int, groups: int = 1) -> Tensor:
    """Return matrices with some directions that decay and a floor of noise, as weights have them after training."""
    torch.manual_seed(rows)
    noise = torch.randn(groups, rows, cols, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(groups, side, 30, dtype=torch.float64)).Q for side in (rows, cols))
    matrix: Tensor = noise + left @ torch.diag(200 * torch.linspace(0, -3, 30, dtype=torch.float64).exp()) @ right.mT
    return matrix


def least_loss(matrix: Tensor, rank: int) -> float:
    """Return the least relative loss at a rank (Eckart and Young), by NumPy."""
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    return float(np.sqrt(squares[..., rank:].sum() / squares.sum()))


def relative_loss(values: Tensor, residual: float | Tensor, rank: int) -> float:
    total = values.square().sum() + residual
    return float(((values[rank:].square().sum() + residual) / total).sqrt())


@pytest.mark.parametrize(("rows", "cols", "groups"), [(200, 300, 1), (300, 200, 1), (150, 150, 2)])
def test_what_is_lost_is_known_and_near_the_least(rows: int, cols: int, groups: int) -> None:
    matrix = trained(rows, cols, groups)
    found = leading_spectrum(matrix, RANK)
    assert found.basis.shape == (groups, min(rows, cols), RANK)
    assert found.basis.dtype is torch.float32
    assert found.values.shape == (min(rows, cols),)
    assert bool((found.values.diff() <= 1e-9).all())
    basis = found.basis.double()
    for rank, most in ((1, 1.0001), (10, 1.0001), (RANK, 1.03)):  # the last directions are those of noise
        kept = basis[..., :rank].mT @ matrix if rows <= cols else matrix @ basis[..., :rank]
        lost = float((1 - kept.square().sum() / matrix.square().sum()).sqrt())
        assert relative_loss(found.values, found.residual, rank) == pytest.approx(lost, rel=1e-5)
        assert least_loss(matrix, rank) * (1 - 1e-6) <= lost <= most * least_loss(matrix, rank)


def test_beyond_the_rank_the_loss_is_an_upper_bound() -> None:
    matrix = trained(200, 300)
    found = leading_spectrum(matrix, RANK)
    for rank in range(RANK, 200, 20):
        assert relative_loss(found.values, found.residual, rank) >= least_loss(matrix, rank)
    exact = spectrum(matrix)
    assert float(found.energy()[9]) == pytest.approx(float(exact.energy()[9]), rel=1e-3)
    assert float(found.values.square().sum() + found.residual) == pytest.approx(float(matrix.square().sum()))


def test_a_weight_of_exact_rank_loses_rounding_only() -> None:
    torch.manual_seed(0)
    matrix = (torch.randn(200, 20, dtype=torch.float64) @ torch.randn(20, 300, dtype=torch.float64))[None]
    found = leading_spectrum(matrix, RANK)
    kept = found.basis[..., :20].double().mT @ matrix
    assert float((matrix - found.basis[..., :20].double() @ kept).norm() / matrix.norm()) < 1e-5
    assert not leading_spectrum(torch.zeros(1, 100, 90, dtype=torch.float64), 8).values.any()


def test_high_ranks_and_small_matrices_are_decomposed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = trained(100, 120)
    assert torch.equal(leading_spectrum(matrix, 60).basis, spectrum(matrix).basis)
    monkeypatch.setattr(leading, "_LARGE", 100)
    assert torch.equal(leading_spectrum(matrix, 10).basis, spectrum(matrix).basis)


@pytest.mark.parametrize("by_rows", [True, False])
def test_gram_matrices_are_products_of_all_rows_or_columns(by_rows: bool) -> None:
    matrix = torch.randn(3, 7, 5, dtype=torch.float64)
    pair = "gma,gna->gmn" if by_rows else "gam,gan->gmn"
    expected = torch.einsum(pair, matrix, matrix)
    torch.testing.assert_close(gram_matrix(matrix, by_rows), expected)
    torch.testing.assert_close(gram_matrix(matrix[0], by_rows), expected[0])


def true_error(model: nn.Sequential, rewritten: nn.Module) -> float:
    weight, joined = (each.get_parameter("0.weight").detach().double() for each in (model, tdfx.merge(rewritten)))
    return float((weight - joined).norm() / weight.norm())


@pytest.mark.parametrize(
    "policy",
    [tdfx.Policy(rank=tdfx.Ratio(of=0.2), min_gain=0), tdfx.Policy(parameters=0.3, min_gain=0, cost=tdfx.Modelled())],
    ids=["ratio", "budget"],
)
def test_a_plan_tells_the_error_of_the_split(policy: tdfx.Policy) -> None:
    model = nn.Sequential(nn.Linear(300, 200))
    model[0].weight.data = trained(200, 300)[0].float()
    plan = tdfx.plan(model, policy)
    (site,) = plan.factorized
    assert site.error == pytest.approx(true_error(model, tdfx.rewrite(model, policy)), rel=1e-4)


def test_a_rank_beyond_the_directions_is_split_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_budget, "_LEADING", 0.1)
    model = nn.Sequential(nn.Linear(300, 200))
    model[0].weight.data = trained(200, 300)[0].float()
    policy = tdfx.Policy(parameters=0.6, min_gain=0, cost=tdfx.Modelled())
    plan = tdfx.plan(model, policy)
    (site,) = plan.factorized
    assert site.ranks is not None
    assert site.ranks[0] > 20
    assert site.error is not None
    error = true_error(model, tdfx.rewrite(model, policy))
    least = least_loss(trained(200, 300), site.ranks[0])
    assert least <= error <= 1.05 * least
    assert error < site.error
