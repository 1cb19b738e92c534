"""Averages of a model follow its rewrites and merges."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import tdfx
from tdfx import Factorized, ModelError

X = torch.randn(16, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(200, 10),
    ).double()


EMA: Any = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
SITES = ("0", "3", "5")


def policy(of: float, scheme: str = "auto") -> tdfx.Policy:
    sites = ("0", "3") if scheme in {"cp", "spatial"} else SITES
    return tdfx.Policy(rank=tdfx.Ratio(of=of), min_gain=0, round_to=1, scheme=scheme, include=sites)


def averaged(model: nn.Module, steps: int = 8, **settings: Any) -> tuple[AveragedModel, torch.optim.Optimizer]:
    """Train a few steps with an average of the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    average = AveragedModel(model, **({"multi_avg_fn": EMA} | settings))
    train(model, optimizer, average, steps)
    return average, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)


def dense(model: nn.Module, name: str) -> Tensor:
    return cast("Tensor", model.get_submodule(name).weight).detach()


def relative_distance(value: Tensor, other: Tensor) -> float:
    return float((value - other).norm() / other.norm())


@pytest.mark.parametrize("scheme", ["auto", "cp", "spatial", "tucker1_out", "tucker1_in"])
def test_at_full_rank_the_average_is_preserved(scheme: str) -> None:
    model = net()
    average, optimizer = averaged(model)
    before = copy.deepcopy(average.module)
    count = int(average.n_averaged)
    chosen = policy(1.0, scheme)
    if scheme.startswith("tucker1"):
        chosen = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1, scheme=scheme, include=("0", "3"))
    small = tdfx.rewrite(model, chosen, optimizer=optimizer, averaged=average)
    layers = {name: module for name, module in small.named_modules() if isinstance(module, Factorized)}
    assert layers
    for name in layers:
        # The inverse of a basis leaves out singular values below 1e-7 of the largest.
        assert relative_distance(dense(average.module, name), dense(before, name)) < 1e-6, name
        assert relative_distance(dense(model, name), dense(before, name)) > 1e-3, "the average is the model"
    assert int(average.n_averaged) == count
    train(small, optimizer, average, 3)
    assert list(average.module.state_dict()) == list(small.state_dict())


def test_the_average_is_in_the_bases_of_the_model() -> None:
    model = net()
    average, optimizer = averaged(model)
    alone = tdfx.rewrite(average.module, policy(0.5))
    goal = {name: dense(average.module, name) for name in SITES}
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    for name in SITES:
        layer, averaged_layer = (cast("Factorized", each.get_submodule(name)) for each in (small, average.module))
        same = [torch.equal(a, b) for a, b in zip(layer.weights, averaged_layer.weights, strict=True)]
        assert sum(same) == len(same) - 1, "not exactly one factor is fitted"
        best = cast("Factorized", alone.get_submodule(name))
        assert (
            relative_distance(averaged_layer.weight.detach(), goal[name])
            < 1.1 * relative_distance(best.weight.detach(), goal[name]) + 1e-3
        )
    distance_alone = max(factor_distance(small, alone, name) for name in SITES)
    distance_together = max(factor_distance(small, average.module, name) for name in SITES)
    assert distance_together < 0.5 * distance_alone


def factor_distance(model: nn.Module, other: nn.Module, name: str) -> float:
    layer, other_layer = (cast("Factorized", each.get_submodule(name)) for each in (model, other))
    pairs = zip(other_layer.weights, layer.weights, strict=True)
    return max(relative_distance(a.detach(), b.detach()) for a, b in pairs)


def test_averaged_factors_are_close_to_the_average_of_their_products() -> None:
    model = net()
    average, optimizer = averaged(model)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    expected = {name: dense(average.module, name) for name in SITES}
    for _ in range(10):
        train(small, optimizer, average, 1)
        expected = {name: 0.9 * expected[name] + 0.1 * dense(small, name) for name in SITES}
    distance = max(relative_distance(dense(average.module, name), expected[name]) for name in SITES)
    change = max(relative_distance(dense(small, name), expected[name]) for name in SITES)
    assert distance < 0.1 * change, "the average of the factors differs by more than a second-order term"


def test_other_tensors_of_the_average_are_kept_and_not_shared_with_the_model() -> None:
    model = net()
    average, optimizer = averaged(model, use_buffers=True)
    norm: Any = average.module.get_submodule("1")
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    assert average.module.get_submodule("1").weight is norm.weight
    assert average.module.get_submodule("1").running_mean is norm.running_mean
    average_memory = {tensor.data_ptr() for tensor in [*average.module.parameters(), *average.module.buffers()]}
    model_memory = {tensor.data_ptr() for tensor in [*small.parameters(), *small.buffers()]}
    assert not average_memory & model_memory
    classes = [[type(module).__name__ for module in model.modules()] for model in (average.module, small)]
    assert classes[0] == classes[1]


def test_a_merge_merges_the_average_from_its_own_factors() -> None:
    model = net()
    average, optimizer = averaged(model)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    train(small, optimizer, average, 3)
    expected = average(X).detach()
    merged = tdfx.merge(small, optimizer=optimizer, averaged=average)
    assert list(average.module.state_dict()) == list(net().state_dict())
    assert relative_distance(average(X).detach(), expected) < 1e-9
    train(merged, optimizer, average, 2)


def test_lower_ranks_are_applied_to_the_average_too() -> None:
    model = net()
    average, optimizer = averaged(model)
    half = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    train(half, optimizer, average, 2)
    quarter = tdfx.rewrite(half, policy(0.25), optimizer=optimizer, averaged=average)
    assert [parameter.shape for parameter in average.module.parameters()] == [
        parameter.shape for parameter in quarter.parameters()
    ]
    train(quarter, optimizer, average, 2)
    assert torch.isfinite(average(X)).all()


def test_an_average_keeps_its_own_dtype() -> None:
    model = net().bfloat16()
    average = AveragedModel(model)
    average.module.float()
    small = tdfx.rewrite(model, policy(0.5), averaged=average)
    assert {parameter.dtype for parameter in average.module.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


def test_stochastic_weight_averaging_continues() -> None:
    model = net()
    average, optimizer = averaged(model, multi_avg_fn=None)
    schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=[average])
    train(small, optimizer, average, 2)
    schedule.step()
    update_bn([X[:8], X[8:]], average)
    assert torch.isfinite(average(X)).all()


class Holder:
    """Keeps an average as ``module``, and is not an AveragedModel."""

    def __init__(self, module: Any) -> None:
        self.module = module


def test_any_object_with_a_copy_as_module_is_accepted() -> None:
    model = net()
    holder = Holder(copy.deepcopy(model))
    small = tdfx.rewrite(model, policy(0.5), averaged=holder)
    assert list(holder.module.state_dict()) == list(small.state_dict())


def test_a_compiled_average_is_compiled_again() -> None:
    model = net()
    holder = Holder(torch.compile(copy.deepcopy(model), backend="eager"))
    tdfx.rewrite(model, policy(0.5), averaged=holder)
    assert isinstance(holder.module, torch._dynamo.OptimizedModule)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Holder(nn.Linear(3, 3)), r"averaged copy in Holder is not one of this model: '0\.bias' is None there"),
        (Holder(None), r"averaged=Holder holds no averaged copy of the model as \.module"),
        (nn.Linear(3, 3), r"averaged=Linear holds no averaged copy"),
    ],
)
def test_an_average_of_another_model_changes_nothing(other: Any, message: str) -> None:
    model = net()
    average, optimizer = averaged(model)
    before = average.module, [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    with pytest.raises(ModelError, match=message):
        tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=[average, other])
    assert before == (average.module, [id(parameter) for parameter in optimizer.param_groups[0]["params"]])


def test_an_average_that_was_not_rewritten_is_refused_at_the_merge() -> None:
    model = net()
    average, optimizer = averaged(model)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    with pytest.raises(ModelError, match="it must have been rewritten along with it"):
        tdfx.merge(small, optimizer=optimizer, averaged=average)


def test_factors_without_values_have_no_bases_for_an_average() -> None:
    model = net()
    average, _ = averaged(model)
    model.zero_grad()
    plan = tdfx.plan(model, policy(0.5))
    with pytest.raises(ModelError, match="in whose bases no average could be expressed"):
        tdfx.rewrite(model, plan, init="empty", averaged=average)


def test_factors_without_values_get_no_gradients() -> None:
    model = net()
    plan = tdfx.plan(model, policy(0.5))
    model(X).square().mean().backward()
    with pytest.warns(tdfx.TdfxWarning, match="No optimizer= was given"):
        small = tdfx.rewrite(model, plan, init="empty")
    layers = [module for module in small.modules() if isinstance(module, Factorized)]
    assert layers
    assert all(weight.grad is None for layer in layers for weight in layer.weights)
