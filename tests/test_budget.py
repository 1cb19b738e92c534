"""Budgets that are kept, at the least loss, in parameters, operations, memory and time."""

from __future__ import annotations

import itertools
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from budgeted import ByFlops, X, net, plan_net, set_step_seconds, sites_seconds, with_decaying_spectra
from torch import Tensor, nn

import tdfx
from tdfx import Budget, Modelled, Policy, PolicyError, Ratio, Reason, TdfxWarning
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.kinds.registry import operation_of
from tdfx.passes.pipeline import find_sites
from tdfx.passes.planning.by_budget import candidates_of
from tdfx.passes.planning.spectra import SpectrumCache


@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
@pytest.mark.parametrize("name", ["parameters", "flops", "memory"])
def test_a_share_is_kept(name: str, share: float) -> None:
    plan = plan_net(**{name: share})
    before, after = getattr(plan, f"{name}_before"), getattr(plan, f"{name}_after")
    # Ranks are whole numbers, so a little of the budget may be left.
    assert 0.85 * share * before < after <= share * before
    tighter = plan_net(**{name: share / 2})
    assert tighter.total_error > plan.total_error > 0


def test_an_amount_is_kept() -> None:
    plan = plan_net(parameters=9_000)
    assert 8_500 < plan.parameters_after <= 9_000
    assert plan_net(flops=5_000_000).flops_after <= 5_000_000  # type: ignore[operator]


def test_two_budgets_are_both_kept() -> None:
    by_parameters = plan_net(parameters=0.5)
    by_both = plan_net(parameters=0.5, flops=0.2)
    assert by_both.parameters_after <= 0.5 * by_both.parameters_before
    assert by_both.flops_after <= 0.2 * by_both.flops_before  # type: ignore[operator]
    assert by_parameters.flops_after > 0.2 * by_parameters.flops_before  # type: ignore[operator]


def test_the_rewritten_model_has_the_predicted_parameters() -> None:
    model = net()
    plan = tdfx.plan(model, Policy(parameters=0.4, min_gain=0, round_to=1, cost=Modelled()))
    small = tdfx.rewrite(model, plan)
    assert sum(parameter.numel() for parameter in small.parameters()) == plan.parameters_after
    assert len({site.scheme for site in plan.factorized}) > 1


def test_no_other_choice_of_the_same_candidates_loses_less() -> None:
    torch.manual_seed(0)
    model = with_decaying_spectra(nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 24), nn.Conv1d(20, 6, 3)))
    plan = tdfx.plan(model, Policy(parameters=0.6, min_gain=0, round_to=4, cost=Modelled()))
    options = [options_of(model.get_submodule(site.name), site.parameters_before) for site in plan.sites]
    limit = int(0.6 * plan.parameters_before) - plan.other_parameters
    choices = itertools.product(*map(undominated, options))
    least = min(sum(loss for _, loss in choice) for choice in choices if sum(count for count, _ in choice) <= limit)
    # A budget has fewer candidates than all ranks, so it may lose a little more than the best choice of all.
    assert least <= plan.total_error * (1 + 1e-9)
    assert plan.total_error < 1.3 * least


def options_of(layer: nn.Module, parameters_before: int) -> list[tuple[int, float]]:
    """Return the parameters and the loss of a layer as it is, and at multiples of four ranks by each scheme."""
    operation = operation_of(layer)
    assert operation is not None
    weight = layer.get_parameter("weight").detach().double()
    options = [(parameters_before, 0.0)]
    for scheme in map(get_scheme, ("svd", "tucker2", "tucker1_out", "tucker1_in")):
        if scheme.fits(operation):
            spectra = scheme.spectra(operation, weight)
            full = scheme.full_ranks(operation)
            for ranks in itertools.product(*({min(most, 4 * step) for step in range(1, 7)} for most in full)):
                count = sum(step.parameters for step in scheme.chain(operation, ranks))
                options.append((count, scheme.error(operation, weight, ranks, spectra) ** 2))
    return options


def undominated(options: list[tuple[int, float]]) -> list[tuple[int, float]]:
    kept: list[tuple[int, float]] = []
    for count, loss in sorted(options):
        if not kept or loss < kept[-1][1]:
            kept.append((count, loss))
    return kept


def test_it_loses_less_than_one_share_for_all() -> None:
    even = tdfx.plan(net(), Policy(rank=Ratio(of=0.3), min_gain=0, round_to=1, cost=Modelled()))
    solved = plan_net(parameters=even.parameters_after)
    assert solved.parameters_after <= even.parameters_after
    assert solved.total_error < 0.8 * even.total_error


def test_a_speedup_is_of_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = ByFlops()
    of_sites = sites_seconds()
    set_step_seconds(monkeypatch, of_sites / 0.75)  # a quarter of the step is not the sites'
    plan = plan_net(speedup=2, cost=cost)
    assert plan.step_seconds == pytest.approx(of_sites / 0.75)
    assert plan.speedup is not None
    assert plan.step_seconds is not None
    assert 2 <= plan.speedup < 2.1
    after = sum(site.seconds_after for site in plan.sites)  # type: ignore[misc]
    # Four sites do not leave many choices.
    assert after == pytest.approx((0.5 - 0.25) / 0.75 * of_sites, rel=0.12)
    assert plan_net(seconds=plan.step_seconds / 2, cost=cost).total_error == pytest.approx(plan.total_error)
    with pytest.raises(
        PolicyError, match=r"Budget\(speedup=5\) cannot be kept: the most that .* is speedup=3\.[0-9]+\. Ask"
    ):
        plan_net(speedup=5, cost=cost)


def test_sites_that_take_longer_alone_than_the_step_count_as_parts_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    of_sites = sites_seconds()
    set_step_seconds(monkeypatch, of_sites / 2)
    plan = plan_net(speedup=1.5, cost=ByFlops())
    after = sum(site.seconds_after or 0 for site in plan.sites)
    # All of the step is the sites', so they have to get faster by as much.
    assert 1.5 <= of_sites / after < 1.8


def test_the_best_that_an_error_names_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch, 0.02)
    for name, value in (("speedup", 90), ("seconds", 1e-6), ("parameters", 0.001), ("memory", 1), ("flops", 0.001)):
        with pytest.raises(
            PolicyError, match="cannot be kept: the most that the 4 sites in question can give"
        ) as caught:
            plan_net(**{name: value}, cost=ByFlops())
        best = str(caught.value).split(f"{name}=")[2].split(" ")[0].rstrip(".")
        plan_net(**{name: int(best) if best.isdecimal() and name != "speedup" else float(best)}, cost=ByFlops())


def test_several_budgets_that_only_together_are_too_much() -> None:
    # On large images, what flows between two factors takes more memory than the weight that they replace.
    model, x = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)), torch.randn(2, 16, 128, 128)
    settings: dict[str, Any] = {"min_gain": 0, "round_to": 1, "cost": Modelled()}
    budgets: list[dict[str, Any]] = [{"parameters": 0.5}, {"memory": 1.0}]
    for budget in budgets:
        tdfx.plan(model, Policy(**budget, **settings), example_inputs=x)
    with pytest.raises(PolicyError, match="each of its budgets can, but not all of them together"):
        tdfx.plan(model, Policy(parameters=0.5, memory=1.0, **settings), example_inputs=x)


def test_without_a_measurement_a_speedup_is_of_the_sites() -> None:
    model, cost = net(), Modelled()
    plan = tdfx.plan(model, Policy(speedup=2, min_gain=0, cost=cost))
    before = after = 0.0
    for site in plan.sites:
        operation = operation_of(model.get_submodule(site.name))
        assert operation is not None
        seconds = cost.seconds([operation], None)
        before += seconds
        after += seconds / (site.gain or 1.0) if site.factorized else seconds
    assert before / after >= 2
    with pytest.raises(PolicyError, match="is about the time of the training step, which is not known"):
        tdfx.plan(net(), Policy(seconds=1.0, cost=Modelled()), example_inputs=(X,))
    with pytest.raises(PolicyError, match="counts flops, which depends on what flows through each site"):
        tdfx.plan(net(), Policy(flops=0.5))


def test_sites_of_other_rules_count_with_what_they_become() -> None:
    settings: dict[str, Any] = {"min_gain": 0, "round_to": 1, "cost": Modelled()}
    overrides = {"2": Policy(rank=Ratio(of=0.1), **settings)}
    plan = tdfx.plan(net(), Policy(parameters=0.5, overrides=overrides, exclude=("7",), **settings))
    assert plan["2"].ranks == (3, 3)
    assert plan["7"].reason is Reason.EXCLUDED
    assert 0.45 < plan.parameters_after / plan.parameters_before <= 0.5


def test_a_site_that_would_not_gain_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch, 0.02)
    plan = plan_net(parameters=0.9, min_gain=1.5, cost=ByFlops())
    assert plan.factorized
    assert all(site.gain is not None and site.gain >= 1.5 for site in plan.factorized)
    kept = [site for site in plan.kept if site.reason is Reason.NO_GAIN]
    assert {site.note for site in kept} <= {"within the budget as it is"}


def test_a_budget_takes_nothing_that_gains_less_than_is_asked_for() -> None:
    loose = plan_net(parameters=0.97, min_gain=0.01, cost=ByFlops())
    assert min(site.gain or 0 for site in loose.factorized) < 4
    strict = plan_net(parameters=0.97, min_gain=4, cost=ByFlops())
    assert strict.factorized
    assert min(site.gain or 0 for site in strict.factorized) >= 4


def test_what_is_chosen_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    set_step_seconds(monkeypatch, 0.02)
    cost = ByFlops()
    plan = plan_net(speedup=1.2, cost=cost)
    assert cost.requests
    assert all(site.seconds_after is not None for site in plan.factorized)


def test_a_factorized_model_stays_as_it_is_under_a_budget() -> None:
    small = tdfx.rewrite(net(), Policy(rank=Ratio(of=0.5), min_gain=0, cost=Modelled()))
    plan = tdfx.plan(small, Policy(parameters=1.0, min_gain=0, cost=Modelled()))
    assert {site.reason for site in plan.sites} == {Reason.FACTORIZED}
    with pytest.raises(PolicyError, match="cannot be kept: the 0 sites in question can give nothing of it"):
        tdfx.plan(small, Policy(parameters=0.5, min_gain=0, cost=Modelled()))


def test_a_share_of_the_parameters_is_of_the_whole_model_and_an_error_says_so() -> None:
    wide = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    model = nn.Sequential(nn.Embedding(100, 64), wide)
    plan = tdfx.plan(model, Policy(parameters=0.5, min_gain=0, cost=Modelled()))
    count = sum(map(torch.numel, model.parameters()))
    assert plan.parameters_before == count
    assert sum(map(torch.numel, tdfx.rewrite(model, plan).parameters())) == plan.parameters_after <= 0.5 * count
    text = (
        r"can give is parameters=0\.[0-9]+\. .* A share is of all 161k parameters of the model; these sites have 32\.8k"
    )
    with pytest.raises(PolicyError, match=text):
        tdfx.plan(nn.Sequential(nn.Embedding(2000, 64), wide), Policy(parameters=0.5, min_gain=0, cost=Modelled()))
    with pytest.raises(PolicyError, match=r"can give is flops=0\.[0-9]+\. .* with round_to=1\.$"):
        tdfx.plan(net(), Policy(flops=0.01, min_gain=0, cost=Modelled()), example_inputs=(X,))


@pytest.mark.parametrize("scheme", ["svd", "spatial", "tucker2"])
def test_a_scheme_that_is_asked_for_is_the_only_one(scheme: str) -> None:
    plan = plan_net(parameters=0.95, scheme=scheme)
    assert {site.scheme for site in plan.factorized} == {scheme}


@pytest.mark.parametrize("error", ["outputs", "curvature"])
def test_other_errors_are_accepted_and_mean_that_of_the_weights(error: Any) -> None:
    message = (
        f"error='{error}' was measured to be no better than the error of the weights and is treated as error='weights'"
    )
    with pytest.warns(TdfxWarning, match=message):
        budget = Budget(parameters=0.5, error=error)
    assert budget == Budget(parameters=0.5)
    with pytest.warns(TdfxWarning, match=message):
        policy = Policy(parameters=0.5, error=error, min_gain=0)
    assert policy == Policy(parameters=0.5, min_gain=0)
    with pytest.warns(TdfxWarning, match=message):
        assert tdfx.read_policy({"parameters": 0.5, "error": error, "min_gain": 0}) == policy


def test_a_plan_takes_an_optimizer_and_masters_that_it_does_not_use() -> None:
    model = nn.Linear(64, 64)
    policy = Policy(parameters=0.5, min_gain=0)
    optimizer = torch.optim.Adam(model.parameters())
    assert tdfx.plan(model, policy, optimizer=optimizer, masters={}) == tdfx.plan(model, policy)


class Functional(nn.Module):
    """Calls the function of a convolution on a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, padding=1)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv1d(6, 8, 3), nn.Tanh(), nn.Conv1d(8, 6, 3)), (6, 40)),
        (
            lambda: nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(8, 6, 3)),
            (6, 9, 9),
        ),
        (lambda: nn.Sequential(nn.Conv3d(6, 8, 3, groups=2)), (6, 5, 5, 5)),
        (lambda: nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 6)), (40,)),
        (Functional, (6, 9, 9)),
    ],
    ids=["1d", "2d", "3d", "linear", "functional"],
)
def test_one_sample_without_a_batch_is_planned_as_a_batch_of_one(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    policy = Policy(parameters=0.6, min_gain=0, round_to=1, cost=Modelled())
    alone, batch = (tdfx.plan(model, policy, example_inputs=(one,)) for one in (x, x[None]))
    assert alone.factorized
    assert [(site.scheme, site.ranks, site.flops_before) for site in alone] == [
        (site.scheme, site.ranks, site.flops_before) for site in batch
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_candidates_have_the_errors_of_their_splits_and_survive_being_sent(dtype: torch.dtype) -> None:
    site = find_sites(net().to(dtype)).sites[1]
    weight = site.weight
    assert weight is not None
    candidates = candidates_of(site, Policy(parameters=0.5, round_to=4), SpectrumCache(), weight.detach())
    assert pickle.loads(pickle.dumps(candidates)) == candidates
    schemes = {candidate.scheme.name for candidate in candidates.errors}
    assert schemes == {"tucker2", "tucker1_out", "tucker1_in", "spatial"}
    operation, dense = site.operation, weight.detach().double()
    assert operation is not None
    for candidate, error in candidates.errors.items():
        scheme = candidate.scheme
        factors = scheme.split(operation, dense, candidate.ranks, scheme.spectra(operation, dense))
        lost = dense - scheme.join(operation, factors)
        # Of float32, products are in float32: squares of the values are right to a few roundings of the largest.
        bound = 1e-12 if dtype is torch.float64 else 16 * torch.finfo(dtype).eps
        assert error**2 == pytest.approx(float(lost.square().sum() / dense.square().sum()), abs=bound)


def test_bases_are_kept_as_far_as_there_is_room() -> None:
    sites = find_sites(nn.Sequential(*(nn.Linear(size, size) for size in (8, 8, 4, 8)))).sites
    scheme = get_scheme("svd")
    cache = SpectrumCache()
    cache.room = 2 * 8 * 8 * 8
    for index, kept in ((0, {"0"}), (1, {"0", "1"}), (2, {"0", "1"})):  # the largest stay
        weight = sites[index].weight
        assert weight is not None
        cache.hold(sites[index], scheme, scheme.spectra(sites[index].known_operation, weight.detach().double()))
        assert cache.kept_sites == kept
    cache.evict(sites[0])
    last = sites[3].weight
    assert last is not None
    cache.hold(sites[3], scheme, scheme.spectra(sites[3].known_operation, last.detach().double()))
    assert cache.kept_sites == {"1", "3"}


def test_no_ranks_have_no_errors() -> None:
    operation = Operation(in_channels=4, out_channels=6, kernel=(3, 3))
    weight = torch.randn(operation.weight_shape, dtype=torch.float64)
    for name in ("tucker2", "svd", "spatial"):
        scheme = get_scheme(name)
        assert scheme.errors(operation, weight, [], scheme.spectra(operation, weight)) == []


@pytest.mark.parametrize("name", ["tucker2", "svd", "cp"])
def test_errors_at_many_ranks_are_those_at_each(name: str) -> None:
    torch.manual_seed(0)
    scheme = get_scheme(name)
    operation = Operation(
        in_channels=12, out_channels=8, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2
    )
    if name == "svd":
        operation = Operation(in_channels=12, out_channels=8)
    weight = torch.randn(operation.weight_shape, dtype=torch.float64)
    spectra = scheme.spectra(operation, weight)
    full = scheme.full_ranks(operation)
    grid = [tuple(max(1, most // part) for most in full) for part in (4, 2)]
    one_by_one = [scheme.error(operation, weight, ranks, spectra) for ranks in grid]
    assert scheme.errors(operation, weight, grid, spectra) == pytest.approx(one_by_one, rel=1e-9)
    assert scheme.errors(operation, 0 * weight, grid, scheme.spectra(operation, 0 * weight)) == [0.0, 0.0]


@pytest.mark.parametrize("channels", [(12, 8), (2, 40)])
def test_partial_spectra_are_those_of_the_schemes_that_cut_less(channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    operation = Operation(
        in_channels=channels[0], out_channels=channels[1], kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
    )
    weight = torch.randn(operation.weight_shape, dtype=torch.float64)
    tucker = get_scheme("tucker2")
    partial = tucker.partial_spectra(tucker.spectra(operation, weight))
    assert set(partial) == ({"tucker1_out", "tucker1_in"} if channels == (12, 8) else {"tucker1_in"})
    for name, spectra in partial.items():
        scheme = get_scheme(name)
        (expected,) = scheme.spectra(operation, weight)
        assert torch.allclose(spectra[0].values, expected.values, atol=1e-12)
        joined, joined_expected = (
            scheme.join(operation, scheme.split(operation, weight, (2,), each)) for each in (spectra, (expected,))
        )
        assert torch.allclose(joined, joined_expected, atol=1e-12)


class DrawsNumbers(nn.Module):
    """Draws from every random generator, as augmentation inside of a model does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x + torch.rand_like(x) * random.random() * float(np.random.rand()))


def test_timing_the_step_leaves_the_model_and_the_random_generators_alone() -> None:
    model = net()
    before: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}

    def seed() -> None:
        torch.manual_seed(5), random.seed(5), np.random.seed(5)

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    seed()
    expected = draw()
    seed()
    tdfx.plan(DrawsNumbers(model), Policy(seconds=10.0, min_gain=0), example_inputs=(X,))
    assert draw() == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
