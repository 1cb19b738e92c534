"""Rules that read a rank from the sizes of the singular values, and the rounding to a device's multiple."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from matrices import noise, planted, spectrum_of
from torch import nn

import tdfx
from tdfx import VBMF, Energy, Fixed, Modelled, Policy, PolicyError, Ratio, StableRank, Threshold, plan
from tdfx.passes.pipeline import find_sites, make_plan
from tdfx.passes.planning.proposals import SiteWish
from tdfx.ranks.multiple import device_multiple, round_gently
from tdfx.ranks.rule import Choice, RankRule
from tdfx.ranks.signal import NO_SIGNAL
from tdfx.ranks.spectrum import Spectrum, spectrum
from tdfx.ranks.stable import initial_stable_rank

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def numpy_values(matrix: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.linalg.svd(matrix.numpy(), compute_uv=False)


@pytest.mark.parametrize("rule", [Threshold(above=0.1), Threshold(above=0.1, relative=True), StableRank()])
def test_noise_in_any_mode_is_no_signal(rule: RankRule) -> None:
    learnt, fresh = spectrum(planted(24, 90, 3)), spectrum(noise(24, 90))
    for spectra in ([fresh], [learnt, fresh], [fresh, learnt], [spectrum(torch.zeros(4, 9, dtype=torch.float64))]):
        choice = rule.choose("site", spectra)
        assert (choice.ranks, choice.signal, choice.kept) == ((), False, NO_SIGNAL)
    assert rule.choose("site", [learnt, learnt]).signal


@pytest.mark.parametrize("above", [0.0, 5.0, 14.0, 100.0])
def test_threshold_counts_the_values_above_it(above: float) -> None:
    matrix = planted(24, 90, 3)
    (rank,) = Threshold(above=above).choose("site", [spectrum(matrix)]).ranks
    assert rank == (numpy_values(matrix) > above).sum()


@pytest.mark.parametrize("above", [0.02, 0.06, 0.1, 0.999])
def test_a_relative_threshold_does_not_depend_on_the_scale(above: float) -> None:
    matrix, rule = planted(24, 90, 3), Threshold(above=above, relative=True)
    values = numpy_values(matrix)
    for scale in (1.0, 1e-6, 1e6):
        assert rule.choose("site", [spectrum(scale * matrix)]).ranks == ((values > above * values[0]).sum(),)
    assert Threshold(above=5.0).choose("site", [spectrum(matrix)]) != Threshold(above=5.0).choose(
        "site", [spectrum(1e6 * matrix)]
    )


def test_a_value_at_the_threshold_is_not_above_it() -> None:
    values = spectrum_of([4.0, 2.0, 1.0, 0.5], cols=4000)
    assert Threshold(above=2.0).choose("site", [values]).ranks == (1,)
    assert Threshold(above=0.25, relative=True).choose("site", [values]).ranks == (2,)


def test_a_site_with_no_value_above_is_kept() -> None:
    big, small = spectrum(planted(24, 90, 3)), spectrum(planted(24, 90, 3) / 1000)
    choice = Threshold(above=5.0).choose("site", [big, small])
    largest = float(small.values[0])
    assert (choice.ranks, choice.signal) == ((), False)
    assert choice.kept == f"no singular value is above 5: the largest is {largest:.3g}"


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "1", None])
def test_an_invalid_threshold_is_refused(value: Any) -> None:
    with pytest.raises(PolicyError, match=r"above=.* is not a number of at least 0: .* above=0\.01 with relative=True"):
        Threshold(above=value)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan"), True, "0.5", None])
def test_an_invalid_relative_threshold_is_refused(value: Any) -> None:
    with pytest.raises(PolicyError, match=r"above=.* is not in \(0, 1\): with relative=True .* pass above=0\.01\."):
        Threshold(above=value, relative=True)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(256, 256), (64, 576), (576, 64), (512, 300)])
def test_the_closed_form_is_the_stable_rank_of_random_matrices(rows: int, cols: int, uniform: bool) -> None:
    # s_max**2 is centre + width * t with t from the Tracy-Widom law, of mean -1.21 and deviation 1.27 (Johnstone 2001).
    root = math.sqrt(rows) + math.sqrt(cols)
    width = root * (1 / math.sqrt(rows) + 1 / math.sqrt(cols)) ** (1 / 3)
    deviation = (1.21 + 5 * 1.27) * width / root**2 + 5 * math.sqrt(2 / (rows * cols))
    for _ in range(5):
        matrix = torch.rand(rows, cols, dtype=torch.float64) - 0.5 if uniform else noise(rows, cols)
        values = numpy_values(matrix)
        measured = (values**2).sum() / values[0] ** 2
        assert measured == pytest.approx(initial_stable_rank(rows, cols), rel=deviation)
        assert spectrum(matrix).stable_rank() == pytest.approx(measured, rel=1e-9)
        assert initial_stable_rank(rows, cols) < 0.75 * min(rows, cols)


@pytest.mark.parametrize("layer", [torch.nn.Linear(256, 128), torch.nn.Conv2d(64, 64, 3)])
def test_weights_at_their_initialisation_score_about_their_full_rank(layer: torch.nn.Module) -> None:
    fresh = spectrum(next(layer.parameters()).detach().double().flatten(1))
    scaled = fresh.full_rank * fresh.stable_rank() / initial_stable_rank(fresh.rows, fresh.cols)
    assert 0.9 * fresh.full_rank < scaled < 1.2 * fresh.full_rank


@pytest.mark.parametrize("strength", [1.0, 3.0, 10.0])
def test_stable_rank_against_numpy(strength: float) -> None:
    matrix = planted(64, 200, 6, strength)
    values = numpy_values(matrix)
    scaled = 64 * (values**2).sum() / values[0] ** 2 / (64 * 200 / (math.sqrt(64) + math.sqrt(200)) ** 2)
    assert StableRank().choose("site", [spectrum(matrix)]).ranks == (math.ceil(scaled),)
    assert math.ceil(scaled) < 64


def test_measured_initial_stable_ranks_are_used_by_name() -> None:
    pair = [spectrum(planted(64, 200, 6)), spectrum(planted(32, 100, 6))]
    stable = [unfolding.stable_rank() for unfolding in pair]
    rule = StableRank(initial={"a.*": (4 * stable[0], 2 * stable[1]), "b": 8 * stable[0], "*": 1.0})
    assert rule.choose("a.1", pair).ranks == (16, 16)
    assert rule.choose("b", pair[:1]).ranks == (8,)
    assert rule.choose("c", pair).ranks == (64, 32)  # never above the full rank
    assert rule.patterns() == ("a.*", "b", "*")
    assert StableRank(initial={"b": 9.0}).choose("c", pair) == StableRank().choose("c", pair)


def test_initial_stable_ranks_are_a_private_copy() -> None:
    given: dict[str, Any] = {"fc": [2.0, 3.0]}
    rule = StableRank(initial=given)
    given["fc"] = 9.0
    assert rule == StableRank(initial={"fc": (2.0, 3.0)})
    assert hash(rule) == hash(StableRank(initial={"fc": (2.0, 3.0)}))
    assert rule != StableRank()
    assert eval(repr(rule)) == rule


@pytest.mark.parametrize("given", [0.5, float("nan"), float("inf"), True, "4", None, (), (4.0, 0.0)])
def test_invalid_initial_stable_ranks_are_refused(given: Any) -> None:
    with pytest.raises(
        PolicyError, match=r"initial stable rank .* for 'fc' is not a number of at least 1, nor a tuple"
    ):
        StableRank(initial={"fc": given})


def test_initial_stable_ranks_must_fit_the_scheme() -> None:
    with pytest.raises(PolicyError, match=r"initial=4\.0 does not map site patterns to stable ranks\. Pass"):
        StableRank(initial=4.0)  # type: ignore[arg-type]
    with pytest.raises(
        PolicyError,
        match=r"StableRank has 1 initial stable ranks \(4\.0,\) for site 'fc', whose scheme takes 2\. Give",
    ):
        StableRank(initial={"fc": (4.0,)}).choose("fc", [spectrum(planted(24, 90, 3))] * 2)


def test_weakening_goes_part_of_the_way_to_the_estimate() -> None:
    spectra = [spectrum(planted(64, 576, 5)), spectrum(planted(32, 576, 12))]

    def ranks(weaken: float, floor: float = 0.0) -> tuple[tuple[int, ...], str]:
        choice = VBMF(weaken=weaken, floor=floor).choose("site", spectra)
        return choice.ranks, choice.note

    assert ranks(1.0) == ((5, 12), "")
    assert ranks(0.5) == ((35, 22), "VBMF says 5/12, weakened")  # 34.5 and 22
    assert ranks(1e-9) == ((64, 32), "VBMF says 5/12, weakened")
    assert ranks(0.9, floor=0.25) == ((16, 14), "VBMF says 5/12, weakened, floored")  # 10.9 and 14
    assert ranks(0.75, floor=0.25) == ((20, 17), "VBMF says 5/12, weakened")  # 1 - floor cannot reach the floor
    assert ranks(1.0, floor=0.25) == ((16, 12), "VBMF says 5/12, floored")


def test_weakening_does_not_make_a_signal() -> None:
    assert not VBMF(weaken=0.5).choose("site", [spectrum(noise(24, 90))]).signal


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, float("nan"), True, "1"])
def test_an_invalid_weakening_is_refused(value: Any) -> None:
    with pytest.raises(
        PolicyError, match=r"weaken=.* is not in \(0, 1\]: it is the part of the way .* pass weaken=1\.$"
    ):
        VBMF(weaken=value)


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "multiple"),
    [
        (torch.float16, CUDA, (7, 5), 8),
        (torch.float32, CUDA, (7, 0), 4),
        (torch.bfloat16, CUDA, (8, 0), 64),
        (torch.float32, CUDA, (8, 6), 32),
        (torch.float64, CUDA, (9, 0), 16),
        (torch.float32, CUDA, (10, 0), 32),
        (torch.float32, CPU, "AVX512", 16),
        (torch.float64, CPU, "AVX512", 8),
        (torch.float32, CPU, "AVX2", 8),
        (torch.bfloat16, CPU, "AVX2", 16),
        (torch.float32, CPU, "DEFAULT", 4),
        (torch.float32, torch.device("mps"), None, 4),
        (torch.complex128, CPU, "DEFAULT", 1),
    ],
)
def test_the_multiple_of_a_device(dtype: torch.dtype, device: torch.device, capability: Any, multiple: int) -> None:
    assert device_multiple(dtype, device, capability=capability) == multiple


def test_the_capability_is_read_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0) if device.index else (9, 0))
    assert device_multiple(torch.float16, torch.device("cuda", 0)) == 64
    assert device_multiple(torch.float16, torch.device("cuda", 1)) == 8
    expected = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    assert device_multiple(torch.float32, CPU) == expected


@pytest.mark.parametrize("multiple", [1, 4, 8, 64])
def test_gentle_rounding_never_doubles_a_rank(multiple: int) -> None:
    for rank in range(1, 300):
        (rounded,) = round_gently((rank,), (1000,), multiple)
        assert rank <= rounded < 2 * rank
        assert rounded % multiple == 0 if rank > multiple else rounded in {1 << power for power in range(7)}
        assert round_gently((rank,), (rank,), multiple) == (rank,)


def test_a_policy_rounds_to_a_multiple_for_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256).double())

    def ranks(of: float) -> list[tuple[int, ...] | None]:
        return [site.ranks for site in plan(model, Policy(rank=Ratio(of=of), min_gain=0, round_to="auto"))]

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert ranks(20 / 256) == [(32,), (24,)]
    assert ranks(3 / 256) == [(4,), (4,)]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert ranks(20 / 256) == [(24,), (20,)]


def test_energy_and_stable_rank_of_a_spectrum_cut_short() -> None:
    whole = spectrum(planted(40, 90, 6))
    cut = Spectrum(whole.values[:12], whole.basis[:, :12], 40, 90, whole.values[12:].square().sum())
    assert cut.stable_rank() == pytest.approx(whole.stable_rank(), rel=1e-12)
    for rule in (Energy(share=0.5), StableRank(), Threshold(above=0.5, relative=True)):
        assert rule.choose("site", [cut]).ranks == rule.choose("site", [whole]).ranks


def test_spectra_are_kept_for_what_is_rewritten_only() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(512, 512))
    planned = make_plan(find_sites(model), Policy(rank=Fixed({"0": 60}) | Ratio(of=0.25), cost=Modelled()), None)
    assert [site.name for site in planned.plan.factorized] == ["1"]
    assert planned.spectra.kept_sites == {"1"}


@dataclass(frozen=True)
class HalfOfTheLargest(Ratio):
    """A rule of the user's that reads values where the rule that it is derived from does not."""

    def choose(self, site: str, spectra: Sequence[Spectrum]) -> Choice:
        return Choice(tuple(int((unfolding.values > 0.5 * unfolding.values.max()).sum()) for unfolding in spectra))


def test_weights_are_read_only_for_rules_that_read_values(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    choose = SiteWish.choose

    def recorded(self: SiteWish, spectra: Sequence[Spectrum]) -> Choice:
        if spectra[0].values.numel():
            read.append(self.site.name)
        return choose(self, spectra)

    monkeypatch.setattr(SiteWish, "choose", recorded)
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.Conv2d(48, 96, 3), nn.Linear(96, 100))
    blind: list[RankRule] = [Ratio(of=0.5), Fixed({"*": 3}), Ratio(of=0.1).at_least(3) | Fixed({"*": 2})]
    for rule in blind:
        plan(model, Policy(rank=rule, min_gain=0))
        assert read == []
    for rule in (VBMF(), Fixed({"*": 3}) | VBMF(), Energy().at_most(4), HalfOfTheLargest()):
        plan(model, Policy(rank=rule, min_gain=0))
        assert read
        read.clear()


@dataclass(frozen=True, kw_only=True)
class Returns(tdfx.RankRule):
    """A user's rule that returns what it is given."""

    value: Any

    def choose(self, site: str, spectra: Sequence[tdfx.Spectrum]) -> Any:
        return self.value


def test_a_rule_of_a_users_own_works_from_public_names() -> None:
    plan = tdfx.plan(nn.Linear(64, 64), tdfx.Policy(rank=Returns(value=tdfx.Choice((16,))), min_gain=0))
    assert plan.sites[0].ranks == (16,)
    kept = tdfx.plan(nn.Linear(64, 64), tdfx.Policy(rank=Returns(value=tdfx.Choice((), kept="not now")), min_gain=0))
    assert kept.sites[0].note == "not now"
    bounded = Returns(value=tdfx.Choice((16,))).at_most(8) | tdfx.Ratio(of=0.5)
    assert tdfx.plan(nn.Linear(64, 64), tdfx.Policy(rank=bounded, min_gain=0)).sites[0].ranks == (8,)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            (8,),
            r"Returns\.choose returned \(8,\), which is no tdfx\.Choice\. Return for example tdfx\.Choice\(\(8,\)\)",
        ),
        (
            tdfx.Choice((8, 8)),
            r"Returns\.choose chose the ranks \(8, 8\) for 1 spectra\. Return one whole number",
        ),
        (tdfx.Choice((0,)), r"chose the ranks \(0,\) for 1 spectra"),
        (tdfx.Choice((2.5,)), r"chose the ranks \(2\.5,\) for 1 spectra\. .* or say in kept= why there are none"),  # type: ignore[arg-type]
    ],
)
def test_a_rule_that_chooses_no_ranks_is_an_error(value: Any, text: str) -> None:
    with pytest.raises(tdfx.PolicyError, match=text):
        tdfx.plan(nn.Linear(64, 64), tdfx.Policy(rank=Returns(value=value), min_gain=0))
