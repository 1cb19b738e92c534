"""Schemes of a user's own: registered, planned, trained, merged, saved and loaded like the built-in ones; and refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.factors import registry
from tdfx.factors.algebra import linearize
from tdfx.factors.check_scheme import check_scheme
from tdfx.factors.registry import get_scheme, scheme_names
from tdfx.factors.scheme import Factors, Scheme

TOLERANCE = 1e-10


class Orthogonal(tdfx.Scheme):
    """``w_oi = last_op @ first_pi`` for linear maps; the rows of ``first`` are orthonormal."""

    name = "orthogonal"
    in_auto = True

    def fits(self, operation: tdfx.Operation) -> bool:
        return operation.dims == 0

    def full_ranks(self, operation: tdfx.Operation) -> tuple[int, ...]:
        return (min(operation.in_channels, operation.out_channels),)

    def chain(self, operation: tdfx.Operation, ranks: Sequence[int]) -> tuple[tdfx.Operation, ...]:
        first = tdfx.Operation(in_channels=operation.in_channels, out_channels=ranks[0])
        return first, tdfx.Operation(in_channels=ranks[0], out_channels=operation.out_channels)

    def spectra(self, operation: tdfx.Operation, weight: Tensor) -> tuple[tdfx.Spectrum, ...]:
        return (tdfx.Spectrum.of(weight),)

    def split(
        self, operation: tdfx.Operation, weight: Tensor, ranks: Sequence[int], spectra: Sequence[tdfx.Spectrum]
    ) -> Factors:
        _, _, rows = torch.linalg.svd(weight, full_matrices=False)
        first = rows[: ranks[0]]
        return first, weight @ first.mT

    def join(self, operation: tdfx.Operation, factors: Sequence[Tensor]) -> Tensor:
        first, last = factors
        return last @ first


class LastDimensionFirst(tdfx.TwoFactors):
    """For a k×k kernel 1×k, then k×1."""

    name = "last_dimension_first"

    def fits(self, operation: tdfx.Operation) -> bool:
        return sum(taps > 1 for taps in operation.kernel) > 1

    def first_axes(self, operation: tdfx.Operation) -> tuple[int, ...]:
        return (max(axis for axis, taps in enumerate(operation.kernel) if taps > 1),)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    before = dict(registry._SCHEMES)
    tdfx.register_scheme(Orthogonal)
    tdfx.register_scheme(LastDimensionFirst)
    yield
    registry._SCHEMES.clear()
    registry._SCHEMES.update(before)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, stride=2), nn.Flatten(), nn.Linear(108, 40)
    ).double()


def batch() -> Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def policy(of: float = 1.0) -> tdfx.Policy:
    return tdfx.Policy(
        rank=tdfx.Ratio(of=of), scheme="last_dimension_first", min_gain=0, round_to=1,
        overrides={"4": tdfx.Policy(scheme="orthogonal")},
    )  # fmt: skip


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def test_a_model_is_rewritten_trained_and_merged() -> None:
    model, x = net(), batch()
    plan = tdfx.plan(model, policy())
    assert [site.scheme for site in plan] == ["last_dimension_first", "last_dimension_first", "orthogonal"]
    assert distance(tdfx.rewrite(model, plan)(x), model(x)) < TOLERANCE
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    low = tdfx.rewrite(model, policy(of=0.3), optimizer=optimizer)
    assert distance(low(x), model(x)) > 1e-3
    layer = low.get_submodule("4")
    assert isinstance(layer, tdfx.Factorized)
    first = layer.weights[0]
    torch.testing.assert_close(first @ first.mT, torch.eye(len(first), dtype=first.dtype))
    low(x).square().mean().backward()
    optimizer.step()
    merged = tdfx.merge(low, optimizer=optimizer)
    assert distance(merged(x), low(x)) < TOLERANCE
    assert list(merged.state_dict()) == list(model.state_dict())
    assert optimizer.state[merged.get_parameter("4.weight")]["exp_avg"].shape == (40, 108)


@pytest.mark.parametrize("cost", [tdfx.Modelled(), tdfx.Measured(budget=2)], ids=["modelled", "measured"])
def test_a_budget_chooses_its_ranks(cost: Any) -> None:
    model, x = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 512)), torch.randn(64, 256)
    plan = tdfx.plan(
        model, tdfx.Policy(parameters=0.5, scheme="orthogonal", min_gain=0, cost=cost), example_inputs=(x,)
    )
    assert {site.scheme for site in plan.factorized} == {"orthogonal"}
    assert plan.parameters_after <= plan.parameters_before / 2
    rewritten = tdfx.rewrite(model, plan)
    for site in plan.factorized:
        dense, layer = model.get_submodule(site.name), rewritten.get_submodule(site.name)
        assert isinstance(layer, tdfx.Factorized)
        weight = dense.get_parameter("weight")
        lost = (layer.weights[1] @ layer.weights[0] - weight).norm() / weight.norm()
        assert site.error == pytest.approx(float(lost.detach()), rel=1e-3)


def test_times_are_measured_and_modelled_alike() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.randn(64, 512)
    wish = tdfx.Policy(rank=tdfx.Ratio(of=0.1), scheme="orthogonal", min_gain=0.01, cost=tdfx.Measured(budget=2))
    (site,) = tdfx.plan(model, wish, example_inputs=(x,))
    assert site.seconds_after is not None
    assert site.gain is not None


def test_budgets_consider_it_where_no_scheme_is_named_if_it_says_so() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    names = [scheme.name for scheme in registry.budget_schemes("auto")]
    assert names == ["tucker2", "tucker1_out", "tucker1_in", "spatial", "svd", "orthogonal"]
    plan = tdfx.plan(model, tdfx.Policy(parameters=0.5, min_gain=0))
    assert {site.scheme for site in plan.factorized} <= {"svd", "orthogonal"}


def test_errors_follow_the_metric_of_the_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16)).double()
    moments = tdfx.Moments(model)
    scale = torch.linspace(0.01, 3, 24, dtype=torch.float64)
    for _ in range(4):
        model(torch.randn(32, 24, dtype=torch.float64) * scale).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    wish = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
    (own,) = tdfx.plan(model, tdfx.Policy(rank=wish.rank, min_gain=0, round_to=1, scheme="orthogonal"), moments=moments)
    (svd,) = tdfx.plan(model, tdfx.Policy(rank=wish.rank, min_gain=0, round_to=1, scheme="svd"), moments=moments)
    assert own.metric == svd.metric == "loss"
    assert own.error == pytest.approx(svd.error, rel=1e-6)


def test_plans_policies_and_checkpoints_name_it(tmp_path: Path) -> None:
    model, x = net(), batch()
    read = tdfx.read_policy({"rank": "ratio:0.5", "scheme": "orthogonal", "min_gain": 0})
    assert read.scheme == "orthogonal"
    plan = tdfx.plan(model, policy(of=0.5))
    assert tdfx.Plan.from_json(plan.to_json()) == plan
    low = tdfx.rewrite(model, tdfx.Plan.from_json(plan.to_json()))
    tdfx.save(low, tmp_path / "run.tdfx")
    assert distance(tdfx.load(tmp_path / "run.tdfx", net)(x), low(x)) == 0
    smaller = tdfx.rewrite(low, policy(of=0.25))
    layer = smaller.get_submodule("4")
    assert isinstance(layer, tdfx.Factorized)
    assert layer.origin.ranks == (10,)
    for name in ("orthogonal", "last_dimension_first"):
        del registry._SCHEMES[name]
    with pytest.raises(tdfx.CheckpointError, match=r"is not known: .* first import the code that calls tdfx\.regist"):
        tdfx.load(tmp_path / "run.tdfx", net)
    with pytest.raises(tdfx.PlanError, match=r"first import the code that calls tdfx\.register_scheme for it"):
        tdfx.rewrite(net(), plan)


def test_averages_go_along() -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    dense = copy.deepcopy(average.module)
    tdfx.rewrite(model, policy(), averaged=average)
    assert distance(average.module(batch()), dense(batch())) < 1e-6


@pytest.mark.parametrize("name", [*scheme_names(), "tucker2:refine=2"])
def test_the_built_in_schemes_keep_the_laws(name: str) -> None:
    check_scheme(get_scheme(name))


@pytest.mark.parametrize("name", ["svd", "tucker2", "spatial", "depthwise"])
def test_what_a_scheme_inherits_agrees_with_what_it_may_define(name: str) -> None:
    scheme = get_scheme(name)
    inherits = type("Inherits", (type(scheme),), {key: vars(Scheme)[key] for key in ("project", "refit", "error")})()
    check_scheme(inherits)
    operation = tdfx.Operation(in_channels=6, out_channels=4, kernel=(1, 1) if name == "svd" else (3, 3))
    weight = torch.randn(operation.weight_shape, dtype=torch.float64)
    spectra = scheme.spectra(operation, weight)
    ranks = tuple(max(1, rank // 2) for rank in scheme.full_ranks(operation))
    factors = scheme.split(operation, weight, ranks, spectra)
    consistent = linearize(lambda *given: scheme.join(operation, given), factors).pull(weight)
    assert (
        distance(inherits.project(operation, factors, consistent), scheme.project(operation, factors, consistent))
        < 1e-6
    )
    given = operation, weight, ranks, spectra
    assert inherits.error(*given) == pytest.approx(scheme.error(*given))


class Wrong(Orthogonal):
    name = "wrong"


def changed(**members: Any) -> type[Scheme]:
    return type("Wrong", (Wrong,), members)


def _swapped(self: Any, operation: tdfx.Operation, ranks: Sequence[int]) -> tuple[tdfx.Operation, ...]:
    return Orthogonal.chain(self, operation, ranks)[::-1]


BAD: dict[str, tuple[Any, str]] = {
    "no class": (Orthogonal(), r"is not a subclass of tdfx\.Scheme\. Write a class that derives from it"),
    "other class": (nn.Linear, r"Linear'> is not a subclass of tdfx\.Scheme"),
    "incomplete": (type("Half", (Scheme,), {"name": "half"}), "Half lacks chain, full_ranks, join, spectra, split. Define"),
    "no name": (changed(name=None), r"Wrong\.name is None, by which policies and plans shall name it\. Set it to a word"),
    "colon": (changed(name="a:b"), r"Wrong\.name is 'a:b', by which"),
    "built-in": (changed(name="svd"), r"Wrong\.name is 'svd', the name of a built-in scheme\. Give it another name"),
    "alias": (changed(name="channel"), r"'channel', the name of a built-in scheme"),
    "settings": (changed(__init__=lambda self, rounds: None), r"Wrong\(\) fails: .*'rounds'. Let every setting"),
    "fits none": (changed(fits=lambda *_: False), r"'wrong' fits none of a linear map, a 1×1 convolution, .*True for some"),
    "raises": (changed(join=lambda *_: 1 / 0), r"for a linear map, Operation\(.*, ZeroDivisionError in <lambda>\(\), line "),
    "full ranks": (changed(full_ranks=lambda *_: (0,)), r"full_ranks\(\) gives \(0,\), which are not whole numbers"),
    "spectra": (changed(spectra=lambda *_: ()), r"full_ranks\(\) gives 1 ranks, and spectra\(\) 0 objects"),
    "chain": (changed(chain=_swapped), r"chain\(\) takes the channels \[4, 6\] and gives \[4, 4\]: each operation must"),
    "shapes": (
        changed(split=lambda self, *given: tuple(f.mT for f in Orthogonal.split(self, *given))),
        r"split\(\) gives factors of shapes \[\(6, 4\), \(4, 4\)\], and chain\(\) wants \[\(4, 6\), \(4, 4\)\]",
    ),
    "join": (
        changed(join=lambda self, operation, factors: 2 * factors[1] @ factors[0]),
        r"join\(\) does not give back what split\(\) was given, at full rank: the relative difference is 1\.",
    ),
    "error": (changed(error=lambda *_: 0.0), r"error\(\) is 0 at ranks \(2,\), and split\(\) loses 0\.[1-9]"),
    "project": (changed(project=lambda self, o, f, g: 0 * self.join(o, f)), r"project\(\) gives a gradient with other grad"),
    "refit": (changed(refit=lambda self, o, f, w: f), r"refit\(\) at full rank does not give the weight: the relative"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_scheme_is_refused_before_it_is_known(case: str) -> None:
    scheme, text = BAD[case]
    before = dict(registry._SCHEMES)
    with pytest.raises(tdfx.PolicyError, match=text):
        tdfx.register_scheme(scheme)
    assert before == registry._SCHEMES


def test_registering_again_replaces_the_scheme() -> None:
    again = type("Again", (Orthogonal,), {"full_ranks": lambda self, operation: (operation.out_channels,)})
    with pytest.raises(tdfx.PolicyError, match=r"split\(\) gives factors of shapes|cannot be used"):
        tdfx.register_scheme(type("Never", (Orthogonal,), {"join": lambda self, operation, factors: factors[0]}))
    assert type(get_scheme("orthogonal")) is Orthogonal
    assert tdfx.register_scheme(again) is again
    assert type(get_scheme("orthogonal")) is again
