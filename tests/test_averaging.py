"""Averages of a model, kept beside it, when its weights turn into factors and back."""

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
    """Train a little, with an average beside it."""
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


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("scheme", ["auto", "cp", "spatial", "tucker1_out", "tucker1_in"])
def test_at_full_rank_nothing_of_the_average_is_lost(scheme: str) -> None:
    model = net()
    average, optimizer = averaged(model)
    before = copy.deepcopy(average.module)
    count = int(average.n_averaged)
    wish = policy(1.0, scheme)
    if scheme.startswith("tucker1"):
        wish = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1, scheme=scheme, include=("0", "3"))
    small = tdfx.rewrite(model, wish, optimizer=optimizer, averaged=average)
    layers = {name: one for name, one in small.named_modules() if isinstance(one, Factorized)}
    assert layers
    for name in layers:
        # Bases are inverted down to values of 1e-7 of the largest.
        assert far(dense(average.module, name), dense(before, name)) < 1e-6, name
        assert far(dense(model, name), dense(before, name)) > 1e-3, "the average is not the model"
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
        mine, theirs = (cast("Factorized", one.get_submodule(name)) for one in (small, average.module))
        same = [torch.equal(a, b) for a, b in zip(mine.weights, theirs.weights, strict=True)]
        assert sum(same) == len(same) - 1, "one factor is fitted"
        best = cast("Factorized", alone.get_submodule(name))
        assert far(theirs.weight.detach(), goal[name]) < 1.1 * far(best.weight.detach(), goal[name]) + 1e-3
    far_alone = max(factor_distance(small, alone, name) for name in SITES)
    far_here = max(factor_distance(small, average.module, name) for name in SITES)
    assert far_here < 0.5 * far_alone


def factor_distance(one: nn.Module, other: nn.Module, name: str) -> float:
    mine, theirs = (cast("Factorized", model.get_submodule(name)) for model in (one, other))
    return max(far(a.detach(), b.detach()) for a, b in zip(theirs.weights, mine.weights, strict=True))


def test_averaging_goes_on_near_the_average_of_what_the_factors_stand_for() -> None:
    model = net()
    average, optimizer = averaged(model)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    kept = {name: dense(average.module, name) for name in SITES}
    for _ in range(10):
        train(small, optimizer, average, 1)
        kept = {name: 0.9 * kept[name] + 0.1 * dense(small, name) for name in SITES}
    apart = max(far(dense(average.module, name), kept[name]) for name in SITES)
    moved = max(far(dense(small, name), kept[name]) for name in SITES)
    assert apart < 0.1 * moved, "the average of the factors is that of their products but for the second order"


def test_kept_tensors_are_the_very_same_and_nothing_is_shared_with_the_model() -> None:
    model = net()
    average, optimizer = averaged(model, use_buffers=True)
    norm: Any = average.module.get_submodule("1")
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    assert average.module.get_submodule("1").weight is norm.weight
    assert average.module.get_submodule("1").running_mean is norm.running_mean
    own = {one.data_ptr() for one in [*average.module.parameters(), *average.module.buffers()]}
    theirs = {one.data_ptr() for one in [*small.parameters(), *small.buffers()]}
    assert not own & theirs
    classes = [[type(one).__name__ for one in model.modules()] for model in (average.module, small)]
    assert classes[0] == classes[1]


def test_a_merge_merges_the_average_from_its_own_factors() -> None:
    model = net()
    average, optimizer = averaged(model)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    train(small, optimizer, average, 3)
    expected = average(X).detach()
    back = tdfx.merge(small, optimizer=optimizer, averaged=average)
    assert list(average.module.state_dict()) == list(net().state_dict())
    assert far(average(X).detach(), expected) < 1e-9
    train(back, optimizer, average, 2)


def test_lower_ranks_take_the_average_along() -> None:
    model = net()
    average, optimizer = averaged(model)
    half = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=average)
    train(half, optimizer, average, 2)
    quarter = tdfx.rewrite(half, policy(0.25), optimizer=optimizer, averaged=average)
    assert [one.shape for one in average.module.parameters()] == [one.shape for one in quarter.parameters()]
    train(quarter, optimizer, average, 2)
    assert torch.isfinite(average(X)).all()


def test_an_average_of_another_dtype_keeps_it() -> None:
    model = net().bfloat16()
    average = AveragedModel(model)
    average.module.float()
    small = tdfx.rewrite(model, policy(0.5), averaged=average)
    assert {one.dtype for one in average.module.parameters()} == {torch.float32}
    assert {one.dtype for one in small.parameters()} == {torch.bfloat16}


def test_stochastic_weight_averaging_goes_on() -> None:
    model = net()
    average, optimizer = averaged(model, multi_avg_fn=None)
    schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=[average])
    train(small, optimizer, average, 2)
    schedule.step()
    update_bn([X[:8], X[8:]], average)
    assert torch.isfinite(average(X)).all()


class Holder:
    """Keeps an average in a way of its own."""

    def __init__(self, module: Any) -> None:
        self.module = module


def test_anything_that_holds_a_copy_as_module() -> None:
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
    before = average.module, [id(one) for one in optimizer.param_groups[0]["params"]]
    with pytest.raises(ModelError, match=message):
        tdfx.rewrite(model, policy(0.5), optimizer=optimizer, averaged=[average, other])
    assert before == (average.module, [id(one) for one in optimizer.param_groups[0]["params"]])


def test_an_average_left_behind_is_told_at_the_next_rewrite() -> None:
    model = net()
    average, optimizer = averaged(model)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    with pytest.raises(ModelError, match="it must have been rewritten along with it"):
        tdfx.merge(small, optimizer=optimizer, averaged=average)


def test_factors_without_values_have_no_bases_for_an_average() -> None:
    model = net()
    average, _ = averaged(model)
    model.zero_grad()
    made = tdfx.plan(model, policy(0.5))
    with pytest.raises(ModelError, match="in whose bases no average could be expressed"):
        tdfx.rewrite(model, made, init="empty", averaged=average)


def test_factors_without_values_get_no_gradients() -> None:
    model = net()
    made = tdfx.plan(model, policy(0.5))
    model(X).square().mean().backward()
    with pytest.warns(tdfx.TdfxWarning, match="No optimizer= was given"):
        small = tdfx.rewrite(model, made, init="empty")
    layers = [one for one in small.modules() if isinstance(one, Factorized)]
    assert layers
    assert all(weight.grad is None for layer in layers for weight in layer.weights)
