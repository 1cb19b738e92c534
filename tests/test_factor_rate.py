"""FactorRate: factors move faster, and everything else is as without it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import tdfx
from tdfx.training.methods.factor_rate import product_speed

POLICY = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1, exclude=("1",))


def build() -> tuple[nn.Module, SGD]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return tdfx.rewrite(model, POLICY, optimizer=optimizer), optimizer


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, *, closure: str = "") -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = model(x).square().mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    if closure == "named":
        optimizer.step(closure=loss)  # type: ignore[arg-type]
    elif closure:
        optimizer.step(loss)  # type: ignore[arg-type]
    else:
        loss()
        optimizer.step()


def data(steps: int) -> list[Tensor]:
    return list(torch.randn(steps, 16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def in_groups(model: nn.Module, times: float) -> SGD:
    """An independent reference: the factors in a group of their own, with a rate of their own."""
    factors = [weight for module in model.modules() if isinstance(module, tdfx.Factorized) for weight in module.weights]
    others = [p for p in model.parameters() if not any(p is factor for factor in factors)]
    groups: Any = [{"params": factors, "lr": 0.05 * times}, {"params": others}]
    return SGD(groups, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("closure", ["", "positional", "named"])
def test_the_factors_move_as_in_a_group_of_their_own(closure: str) -> None:
    model, optimizer = build()
    reference = copy.deepcopy(model)
    other = in_groups(reference, 3.0)
    rate = tdfx.FactorRate(model, optimizer, times=3.0)
    for x in data(5):
        step(model, optimizer, x, closure=closure)
        step(reference, other, x)
    for expected, value in zip(reference.parameters(), model.parameters(), strict=True):
        assert torch.allclose(value, expected, rtol=1e-12)
    rate.remove()
    step(model, optimizer, data(1)[0])
    step(reference, other, data(1)[0])
    assert not torch.allclose(next(model.parameters()), next(reference.parameters()), rtol=1e-6)


def test_groups_and_gradients_are_left_as_they_were() -> None:
    model, optimizer = build()
    tdfx.FactorRate(model, optimizer, times=2.0)
    model(data(1)[0]).square().mean().backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    groups = [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]
    optimizer.step()
    assert all(
        torch.equal(grad, p.grad) for grad, p in zip(before, model.parameters(), strict=True) if p.grad is not None
    )
    assert groups == [{**group, "params": list(map(id, group["params"]))} for group in optimizer.param_groups]


def test_it_keeps_no_factor_alive_and_leaves_the_merged_weights_alone() -> None:
    model, optimizer = build()
    tdfx.FactorRate(model, optimizer, times=2.0)
    step(model, optimizer, data(1)[0])
    merged = tdfx.merge(model, optimizer=optimizer)
    del model
    gc.collect()
    assert not [
        each for each in gc.get_objects() if type(each) is nn.Parameter and each.shape == (4, 8) and each.dim() == 0
    ]
    reference = copy.deepcopy(merged)
    other = SGD(reference.parameters(), lr=0.05, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in data(3):
        step(merged, optimizer, x)
        step(reference, other, x)
    assert all(map(torch.equal, merged.parameters(), reference.parameters()))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda model, sgd: tdfx.FactorRate(model, AdamW(model.parameters())), tdfx.OptimizerError, "not proportional"),
        (lambda model, sgd: tdfx.FactorRate(nn.Linear(2, 2), sgd), tdfx.ModelError, "holds no factorized layer"),
        (lambda model, sgd: tdfx.FactorRate(build()[0], sgd), tdfx.OptimizerError, "holds none of the factors"),
        (
            lambda model, sgd: tdfx.FactorRate(model, sgd, times=0),
            tdfx.PolicyError,
            r"times=0 is not a positive number",
        ),
    ],
)
def test_mistakes_are_refused(make: Callable[..., Any], error: type[Exception], text: str) -> None:
    model, optimizer = build()
    with pytest.raises(error, match=text):
        make(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def switched(optimizer: type[Optimizer], **settings: Any) -> tuple[tdfx.Switch, Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
    made = optimizer(model.parameters(), lr=0.05)  # type: ignore[call-arg]
    switch = tdfx.Switch(POLICY, when=tdfx.AtStep(3), **settings)
    for x in data(4):
        step(model, made, x)
        model = switch.step(model, optimizer=made)
    return switch, made


@pytest.mark.parametrize(
    ("optimizer", "settings", "times"),
    [
        (SGD, {}, [2.0, 2.0]),
        (SGD, {"collect": 0}, None),
        (SGD, {"factor_rate": 3.0}, [3.0, 3.0]),
        (SGD, {"factor_rate": 1}, None),
        (AdamW, {}, None),
    ],
)
def test_a_switch_sets_the_rate_for_sgd_and_the_metric_of_the_loss(
    optimizer: type[Optimizer], settings: dict[str, Any], times: list[float] | None
) -> None:
    switch, made = switched(optimizer, **settings)
    rates = switch.state_dict()["factor_rates"]
    assert [rate["times"][:2] for rate in rates] == ([] if times is None else [times])
    assert all(set(rate["times"][2:]) == {1.0} for rate in rates)
    assert bool(made._optimizer_step_pre_hooks) == (times is not None)


def test_a_layer_that_moves_fast_already_keeps_its_rate() -> None:
    model, optimizer = build()
    slow = tdfx.FactorRate(model, optimizer).state_dict()["times"]
    with torch.no_grad():
        for weight in model[0].weights:  # type: ignore[index]
            weight.mul_(4)
    fast = tdfx.FactorRate(model, optimizer).state_dict()["times"]
    assert slow == [2.0, 2.0, 1.0, 1.0, 1.0]
    assert set(fast) == {1.0}


def test_the_speed_of_a_product_bounds_how_far_a_step_moves_it() -> None:
    torch.manual_seed(0)
    factors = [torch.randn(3, 6), torch.randn(4, 3), torch.randn(5, 4)]
    gradient = torch.randn(5, 6)
    a, b, c = (factor.requires_grad_() for factor in factors)
    moved = torch.autograd.functional.vjp(lambda *f: f[2] @ f[1] @ f[0], (a, b, c), gradient)[1]  # type: ignore[no-untyped-call]
    move = c @ b @ moved[0] + c @ moved[1] @ a + moved[2] @ b @ a
    ratio = float(move.detach().norm() / gradient.norm())
    assert 0.1 * product_speed(factors) < ratio <= product_speed(factors)


def test_a_resumed_run_has_the_rate_from_its_first_step_on() -> None:
    runs = []
    for stop in (None, 5):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        switch = tdfx.Switch(POLICY, when=tdfx.AtStep(3))
        for index, x in enumerate(data(8)):
            if index == stop:
                saved = copy.deepcopy((switch.state_dict(), model.state_dict(), optimizer.state_dict()))
                model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).double()
                optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
                switch = tdfx.Switch(POLICY, when=tdfx.AtStep(3))
                switch.load_state_dict(saved[0], optimizer=optimizer)
                assert switch.plan is not None
                model = tdfx.rewrite(model, switch.plan, optimizer=optimizer)
                model.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[2])
            step(model, optimizer, x)
            model = switch.step(model, optimizer=optimizer)
        runs.append(list(model.parameters()))
    assert all(map(torch.equal, *runs))


def test_a_rate_out_of_range_is_refused() -> None:
    with pytest.raises(tdfx.PolicyError, match=r"factor_rate=0 is not a positive number"):
        tdfx.Switch(POLICY, when=tdfx.AtStep(3), factor_rate=0)
