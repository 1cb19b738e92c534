"""Spectra against NumPy's singular value decomposition, and the rules that read ranks from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matrices import noise, planted, spectrum_of
from torch import Tensor

from tdfx.errors import PolicyError
from tdfx.ranks.energy import Energy
from tdfx.ranks.fixed import Fixed
from tdfx.ranks.ratio import Ratio
from tdfx.ranks.registry import parse_rule
from tdfx.ranks.rule import RankRule, round_ranks
from tdfx.ranks.signal import NO_SIGNAL
from tdfx.ranks.spectrum import Spectrum, spectrum
from tdfx.ranks.vbmf import VBMF

EPS = torch.finfo(torch.float64).eps
SHAPES = [(7, 19), (19, 7), (12, 12), (1, 5), (5, 1)]


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


@pytest.mark.parametrize("rows_side", [None, True, False])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_spectrum_equals_numpys(rows: int, cols: int, rows_side: bool | None) -> None:
    matrix = noise(rows, cols)
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    computed = spectrum(matrix, rows_side=rows_side)

    on_rows = rows <= cols if rows_side is None else rows_side
    expected = torch.from_numpy(left if on_rows else right.T)
    assert (computed.rows, computed.cols, computed.full_rank) == (rows, cols, min(rows, cols))
    assert computed.basis.shape == expected.shape
    # The Gram matrix is rounded by eps * s0**2 per term of its sums, and d(s**2) = 2 s ds.
    rounding = 4 * max(rows, cols) * EPS * values[0] ** 2
    assert np.abs(computed.values.numpy() - values).max() <= rounding / values[-1]
    for rank in range(1, min(rows, cols)):
        gap = values[rank - 1] ** 2 - values[rank] ** 2
        difference = projector(computed.basis[:, :rank]) - projector(expected[:, :rank])
        assert difference.norm() <= rounding * math.sqrt(rank) / gap


def test_projector_comparison_detects_wrong_vectors() -> None:
    computed = spectrum(noise(7, 19)).basis
    assert (projector(computed[:, :3]) - projector(computed[:, 1:4])).norm() > 1


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("rows_side", [None, True, False])
def test_basis_is_orthonormal_even_where_values_are_zero(rows: int, cols: int, rows_side: bool | None) -> None:
    for matrix in (noise(rows, 1) @ noise(1, cols), torch.zeros(rows, cols, dtype=torch.float64)):
        computed = spectrum(matrix, rows_side=rows_side)
        product = computed.basis.mT @ computed.basis
        assert (product - torch.eye(computed.full_rank, dtype=torch.float64)).norm() <= 8 * max(rows, cols) * EPS
        assert bool(torch.isfinite(computed.values).all())


def test_signs_are_fixed_by_the_largest_entry() -> None:
    matrix = noise(16, 16)
    basis = spectrum(matrix).basis
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
    assert torch.equal(basis, spectrum(matrix.clone()).basis)
    assert torch.equal(basis, spectrum(-matrix).basis)
    # Without the rule the signs are arbitrary: LAPACK's own do not satisfy it.
    plain = torch.linalg.svd(matrix)[0]
    assert not bool((plain.gather(0, plain.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_energy_is_the_fewest_values_that_hold_the_share(share: float) -> None:
    matrix = planted(24, 40, 6)
    (rank,) = Energy(share=share).choose("site", [spectrum(matrix)]).ranks
    squared = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    held = np.cumsum(squared) / squared.sum()
    assert held[rank - 1] >= share
    assert rank == 1 or held[rank - 2] < share


def test_energy_by_hand() -> None:
    values = spectrum_of([4.0, 2.0, 2.0, 1.0], cols=400)  # squares 16, 4, 4, 1 of 25
    assert values.energy().tolist() == pytest.approx([0.64, 0.80, 0.96, 1.0], abs=4 * EPS)
    assert [Energy(share=share)._rank(values) for share in (0.5, 0.64, 0.7, 0.8, 0.95, 0.97)] == [1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("decay", [1.0, 0.5, 1e-3])
def test_all_of_the_energy_means_full_rank(decay: float) -> None:
    values = spectrum_of([decay**index for index in range(6)])
    assert Energy(share=1.0)._rank(values) == 6
    assert Energy(share=0.3)._rank(values) < 6


def test_energy_chooses_for_each_mode_separately() -> None:
    choice = Energy(share=0.9).choose("site", [spectrum(planted(24, 90, 3)), spectrum(planted(12, 90, 5))])
    assert len(choice.ranks) == 2
    assert choice.signal
    assert not choice.kept


@pytest.mark.parametrize("rule", [Energy(), VBMF(), VBMF(floor=0), Energy(share=1.0)])
def test_noise_in_any_mode_is_no_signal(rule: RankRule) -> None:
    learnt, fresh = spectrum(planted(24, 90, 3)), spectrum(noise(24, 90))
    for spectra in ([fresh], [learnt, fresh], [fresh, learnt], [spectrum(torch.zeros(4, 9, dtype=torch.float64))]):
        choice = rule.choose("site", spectra)
        assert (choice.ranks, choice.signal, choice.kept) == ((), False, NO_SIGNAL)
    assert rule.choose("site", [learnt, learnt]).signal


def test_ratio_needs_no_signal() -> None:
    fresh = spectrum(noise(24, 90))
    assert Ratio(of=0.25).choose("site", [fresh]).ranks == (6,)
    assert Ratio(of=1.0).choose("site", [fresh, spectrum(noise(9, 3))]).ranks == (24, 3)
    assert Ratio(of=1e-9).choose("site", [fresh]).ranks == (1,)


def test_vbmf_floor_and_its_note() -> None:
    spectra = [spectrum(planted(64, 576, 5)), spectrum(planted(32, 576, 12))]
    trusted = VBMF(floor=0).choose("site", spectra)
    assert (trusted.ranks, trusted.note) == ((5, 12), "")
    floored = VBMF(floor=0.25).choose("site", spectra)
    assert floored.ranks == (16, 12)
    assert floored.note == "VBMF says 5/12, floored"
    below = VBMF(floor=0.05).choose("site", spectra)
    assert (below.ranks, below.note) == ((5, 12), "")
    assert VBMF(floor=0.3).choose("site", spectra).ranks == (20, 12)  # 19.2, rounded up
    assert VBMF(floor=1.0).choose("site", spectra).ranks == (64, 32)


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan"), float("inf"), True, "0.9", None])
def test_an_invalid_share_is_refused(value: float) -> None:
    with pytest.raises(PolicyError, match=r"share=.* is not in \(0, 1\]: it is the part of the squared.*share=0\.95\."):
        Energy(share=value)
    with pytest.raises(PolicyError, match=r"of=.* is not in \(0, 1\]: it is the part of each full rank.*of=0\.25\."):
        Ratio(of=value)


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), False, "0"])
def test_an_invalid_floor_is_refused(value: float) -> None:
    with pytest.raises(PolicyError, match=r"floor=.* is not in \[0, 1\]: it is the least part.*pass floor=0\.$"):
        VBMF(floor=value)


def test_fixed_takes_the_first_pattern() -> None:
    rule = Fixed({"layer1.*": 4, "layer*": (3, 2), "fc": [5]})  # type: ignore[dict-item]
    pair = [spectrum(noise(8, 27)), spectrum(noise(3, 72))]
    assert rule.choose("layer1.0", pair).ranks == (4, 3)  # one number is cut to each mode's full rank
    assert rule.choose("layer2.0", pair).ranks == (3, 2)
    assert rule.choose("fc", pair[:1]).ranks == (5,)
    other = rule.choose("stem", pair)
    assert (other.ranks, other.signal, other.kept) == ((), True, "no pattern of Fixed matches it")
    assert rule.patterns() == ("layer1.*", "layer*", "fc")
    assert rule.exact
    assert not Ratio().exact


def test_fixed_keeps_a_private_copy() -> None:
    given: dict[str, int | tuple[int, ...]] = {"fc": 4}
    rule = Fixed(given)
    given["fc"] = 9
    assert rule == Fixed({"fc": 4})
    assert hash(rule) == hash(Fixed({"fc": 4}))
    assert rule != Fixed({"fc": 9})


def test_fixed_ranks_that_do_not_fit_are_refused() -> None:
    pair = [spectrum(noise(8, 27)), spectrum(noise(3, 72))]
    with pytest.raises(
        PolicyError,
        match=r"Fixed gives 1 ranks \(4,\) for site 'conv', whose scheme takes 2\. Its full ranks are \(8, 3\)",
    ):
        Fixed({"conv": (4,)}).choose("conv", pair)
    with pytest.raises(
        PolicyError, match=r"Fixed ranks \(4, 5\) for site 'conv' are above its full ranks \(8, 3\)\. Give"
    ):
        Fixed({"conv": (4, 5)}).choose("conv", pair)


@pytest.mark.parametrize("given", [0, -1, 2.5, True, (), (4, 0), (4, True), "8", None])
def test_fixed_refuses_invalid_ranks(given: int) -> None:
    with pytest.raises(PolicyError, match=r"Fixed rank .* for 'fc' is not a whole number of at least 1.*exclude="):
        Fixed({"fc": given})


@pytest.mark.parametrize("given", [{}, None, 4, ["fc"]])
def test_fixed_refuses_other_types_than_mappings(given: dict[str, int | tuple[int, ...]]) -> None:
    with pytest.raises(
        PolicyError, match=r"names no site: it takes a mapping from site patterns to ranks\. For example"
    ):
        Fixed(given)


def test_round_ranks() -> None:
    assert round_ranks((1, 8, 9, 30), (64, 64, 64, 27), 8) == (8, 8, 16, 27)
    assert round_ranks((1, 8, 9), (64, 64, 64), 1) == (1, 8, 9)
    with pytest.raises(ValueError, match="shorter"):
        round_ranks((1, 2), (64,), 8)


def test_parse_rule() -> None:
    assert parse_rule("energy") == Energy()
    assert parse_rule(" Energy:0.8 ") == Energy(share=0.8)
    assert parse_rule("vbmf:0") == VBMF(floor=0.0)
    assert parse_rule("ratio:0.5") == Ratio(of=0.5)
    assert parse_rule("ratio:0.5") != Ratio(of=0.25)


def test_parse_rule_errors() -> None:
    with pytest.raises(
        PolicyError,
        match=r"'enrgy:0\.9' names no rank rule: 'enrgy' is not one of default, vbmf, .* Nearest: 'energy'\.",
    ):
        parse_rule("enrgy:0.9")
    with pytest.raises(
        PolicyError, match=r"'energy:high' has no number after the colon, but 'high'.* for example energy:0\.5\."
    ):
        parse_rule("energy:high")
    with pytest.raises(PolicyError, match=r"'ratio:' has no number after the colon, but ''"):
        parse_rule("ratio:")
    with pytest.raises(PolicyError, match=r"share=90\.0 is not in \(0, 1\]"):
        parse_rule("energy:90")


def test_a_truncated_spectrum_gives_the_same_ranks() -> None:
    whole = spectrum(planted(40, 90, 6, strength=1.0))
    rest = whole.values[12:].square().sum()
    cut = Spectrum(whole.values[:12], whole.basis[:, :12], 40, 90, rest)
    assert cut.energy().tolist() == pytest.approx(whole.energy()[:12].tolist(), rel=64 * EPS)
    for rule in (Energy(share=0.5), VBMF(floor=0)):
        assert rule.choose("site", [cut]).ranks == rule.choose("site", [whole]).ranks
    blind = Spectrum(whole.values[:12], whole.basis[:, :12], 40, 90)
    assert VBMF(floor=0).choose("site", [blind]).ranks != VBMF(floor=0).choose("site", [whole]).ranks
