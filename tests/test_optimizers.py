"""What each of torch's optimizers keeps, and what becomes of it, entry by entry."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim import EPS, SITES, Net, check_holds_exactly, factorized, policy, train, weight_of
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import tdfx
from tdfx import OptimizerError, TdfxWarning

Maker = Callable[[Any], Optimizer]


def maker(name: str, **settings: Any) -> Maker:
    def make(parameters: Any) -> Optimizer:
        made: Optimizer = getattr(torch.optim, name)(parameters, **settings)
        return made

    return make


MAKERS: dict[str, Maker] = {
    "sgd": maker("SGD", lr=0.01, momentum=0.9, dampening=0.1),
    "sgd fused": maker("SGD", lr=0.01, momentum=0.9, fused=True),
    "adam foreach": maker("Adam", lr=1e-3, foreach=True),
    "adam fused": maker("Adam", lr=1e-3, fused=True),
    "adam maximize": maker("Adam", lr=1e-12, maximize=True),
    "adam tensor lr": maker("Adam", lr=torch.tensor(1e-3)),
    "adamw fused amsgrad": maker("AdamW", lr=1e-3, fused=True, amsgrad=True),
    "nadam": maker("NAdam", lr=1e-3),
    "radam": maker("RAdam", lr=1e-3),
    "adamax": maker("Adamax", lr=1e-3),
    "adagrad": maker("Adagrad", lr=1e-2, initial_accumulator_value=0.1),
    "adagrad fused": maker("Adagrad", lr=1e-2, fused=True),
    "adadelta": maker("Adadelta", lr=1.0),
    "rmsprop": maker("RMSprop", lr=1e-3),
    "rmsprop momentum": maker("RMSprop", lr=1e-3, momentum=0.9),
    "rmsprop centered": maker("RMSprop", lr=1e-4, momentum=0.9, centered=True),
    "rprop": maker("Rprop", lr=1e-4),
    "asgd": maker("ASGD", lr=1e-2, t0=2),
    "adafactor": maker("Adafactor", lr=1e-2),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def trained(make: Maker, steps: int = 6) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = make(model.parameters())
    train(model, optimizer, steps)
    return model, optimizer


def shapes(optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Return what an optimizer keeps of each parameter, but for the values."""
    return [
        {
            key: (value.shape, value.dtype, value.device, value.stride()) if isinstance(value, Tensor) else value
            for key, value in optimizer.state[one].items()
        }
        for one in model.parameters()
    ]


@every_maker
@pytest.mark.parametrize("of", [1.0, 0.5])
def test_the_state_is_what_the_optimizer_itself_would_keep(make: Maker, of: float) -> None:
    model, optimizer = trained(make)
    small = tdfx.rewrite(model, policy(of), optimizer=optimizer)
    check_placed(optimizer, small, make)
    losses = train(small, optimizer, 8)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] <= losses[0] + 1e-6
    dense = tdfx.merge(small, optimizer=optimizer)
    check_placed(optimizer, dense, make)
    losses = train(dense, optimizer, 8)
    assert losses[-1] <= losses[0] + 1e-6


def check_placed(optimizer: Optimizer, model: nn.Module, make: Maker) -> None:
    """Hold the state to that of a new optimizer for a copy of the model, in shapes, dtypes and layouts."""
    twin = copy.deepcopy(model)
    fresh = make(twin.parameters())
    train(twin, fresh, 1)
    assert shapes(optimizer, model) == shapes(fresh, twin)
    counts = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1
    assert all(count > 1 for count in counts)
    for state in optimizer.state.values():
        assert all(torch.isfinite(value).all() for value in state.values() if isinstance(value, Tensor))
        positive = {"exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta", "step_size", "row_var", "col_var"}
        assert all((state[key] >= 0).all() for key in positive & state.keys())
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    assert held == {id(one) for one in model.parameters()}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_carried_beside_another_optimizer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()
    weights = [one for one in model.parameters() if one.dim() == 2]
    biases = [one for one in model.parameters() if one.dim() == 1]
    muon: Optimizer = torch.optim.Muon(weights, lr=1e-3)
    adam = torch.optim.Adam(biases, lr=1e-3)
    x = torch.randn(16, 12, dtype=torch.float64)

    def step(net: nn.Module) -> None:
        net(x).square().mean().backward()
        for one in (muon, adam):
            one.step()
            one.zero_grad()

    for _ in range(3):
        step(model)
    before = muon.state[weights[0]]["momentum_buffer"].clone()
    small = tdfx.rewrite(model, policy(0.5), optimizer=[muon, adam])
    first, last = (one.detach() for one in factorized(small, "0").weights)
    carried = [muon.state[one]["momentum_buffer"] for one in factorized(small, "0").weights]
    assert torch.allclose(carried[0], last.mT @ before, rtol=0, atol=100 * EPS * float(before.norm()))
    assert torch.allclose(carried[1], before @ first.mT, rtol=0, atol=100 * EPS * float(before.norm()))
    step(small)


def set_state(optimizer: Optimizer, model: nn.Module, **entries: Callable[[Tensor], Tensor]) -> None:
    for name in SITES:
        weight = weight_of(model, name)
        for key, make in entries.items():
            optimizer.state[weight][key] = make(weight.detach())


def factor_states(optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    return [optimizer.state[weight] for name in SITES for weight in factorized(model, name).weights]


def full(value: float) -> Callable[[Tensor], Tensor]:
    return lambda like: torch.full_like(like, value)


def test_rprop_keeps_its_step_length_where_all_are_equal() -> None:
    model, optimizer = trained(MAKERS["rprop"])
    set_state(optimizer, model, step_size=full(0.02))
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    for state in factor_states(optimizer, small):
        assert torch.allclose(state["step_size"], torch.full_like(state["step_size"], 0.02), rtol=100 * EPS, atol=0)
    dense = tdfx.merge(small, optimizer=optimizer)
    found = optimizer.state[weight_of(dense, "conv")]["step_size"]
    assert torch.allclose(found, torch.full_like(found, 0.02), rtol=100 * EPS, atol=0)


def test_adadelta_keeps_the_step_per_gradient_where_it_is_the_same_everywhere() -> None:
    model, optimizer = trained(MAKERS["adadelta"])
    for name in SITES:
        state = optimizer.state[weight_of(model, name)]
        state["acc_delta"] = 0.25 * state["square_avg"]
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    for state in factor_states(optimizer, small):
        assert torch.allclose(state["acc_delta"], 0.25 * state["square_avg"], rtol=100 * EPS, atol=0)


def test_adamax_keeps_the_root_of_what_adam_would() -> None:
    model, optimizer = trained(MAKERS["adamax"])
    set_state(optimizer, model, exp_avg=torch.zeros_like)
    expected = {name: optimizer.state[weight_of(model, name)]["exp_inf"].square() for name in SITES}
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    fc = factorized(small, "fc")
    first, last = (one.detach().square() for one in fc.weights)
    wanted = (last.mT @ expected["fc"]).sqrt(), (expected["fc"] @ first.mT).sqrt()
    for weight, root in zip(fc.weights, wanted, strict=True):
        assert torch.allclose(optimizer.state[weight]["exp_inf"], root, rtol=1e3 * EPS, atol=0)


def test_adamax_is_not_below_the_first_moment() -> None:
    model, optimizer = trained(MAKERS["adamax"])
    set_state(optimizer, model, exp_avg=full(1.0), exp_inf=full(1.0))
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    for state in factor_states(optimizer, small):
        assert (state["exp_inf"] >= state["exp_avg"].abs()).all()


def test_adafactor_rows_and_columns_are_those_of_the_carried_estimate() -> None:
    model, optimizer = trained(MAKERS["adafactor"])
    state = optimizer.state[weight_of(model, "fc")]
    row, col = state["row_var"].clone(), state["col_var"].clone()
    variance = row @ col / row.mean()
    assert torch.allclose(variance.mean(-1, keepdim=True), row * col.mean() / row.mean())
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    fc = factorized(small, "fc")
    first, last = (one.detach().square() for one in fc.weights)
    for weight, wanted in zip(fc.weights, (last.mT @ variance, variance @ first.mT), strict=True):
        found = optimizer.state[weight]
        assert torch.allclose(found["row_var"], wanted.mean(-1, keepdim=True), rtol=1e3 * EPS, atol=0)
        assert torch.allclose(found["col_var"], wanted.mean(-2, keepdim=True), rtol=1e3 * EPS, atol=0)


def test_rmsprop_momentum_is_carried_in_the_gradients_own_scale() -> None:
    model, optimizer = trained(MAKERS["rmsprop momentum"])
    state = optimizer.state[weight_of(model, "fc")]
    moment = torch.randn_like(state["square_avg"])
    state["momentum_buffer"] = moment / state["square_avg"].sqrt()
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    fc = factorized(small, "fc")
    first, last = (one.detach() for one in fc.weights)
    for weight, wanted in zip(fc.weights, (last.mT @ moment, moment @ first.mT), strict=True):
        found = optimizer.state[weight]
        error = found["momentum_buffer"] * found["square_avg"].sqrt() - wanted
        assert error.norm() <= 1e3 * EPS * moment.norm()


def test_centered_rmsprop_keeps_a_positive_variance() -> None:
    model, optimizer = trained(MAKERS["rmsprop centered"])
    set_state(optimizer, model, grad_avg=full(1.0), square_avg=full(1.0 + 1e-3))
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    for state in factor_states(optimizer, small):
        assert (state["square_avg"] - state["grad_avg"].square() >= 0).all()
    first = factorized(small, "fc").weights[1].detach().square()  # (out, rank)
    found = optimizer.state[factorized(small, "fc").weights[0]]
    variance = found["square_avg"] - found["grad_avg"].square()
    wanted = 1e-3 * first.sum(0)[:, None].expand_as(variance)
    assert torch.allclose(variance, wanted, rtol=0, atol=1e4 * EPS * float(found["square_avg"].max()))


@pytest.mark.parametrize("scheme", ["auto", "spatial", "cp"])
def test_asgd_keeps_an_average_in_the_bases_of_the_weight(scheme: str) -> None:
    model, optimizer = trained(MAKERS["asgd"])
    averages = {name: optimizer.state[weight_of(model, name)]["ax"].clone() for name in SITES}
    moved = {name: float((averages[name] - weight_of(model, name)).detach().norm()) for name in SITES}
    assert min(moved.values()) > 0
    only = () if scheme == "auto" else ("conv",)
    wish = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1, scheme=scheme, include=only or ("*",))
    small = tdfx.rewrite(model, wish, optimizer=optimizer)
    for name in only or SITES:
        layer = factorized(small, name)
        held = [optimizer.state[weight]["ax"] for weight in layer.weights]
        error = (layer.join(*held) - averages[name]).norm() / averages[name].norm()
        # A full-rank basis is inverted down to values of 1e-7 of the largest.
        assert error <= 1e-6
        apart = [
            float((one - weight.detach()).norm() / weight.detach().norm())
            for one, weight in zip(held, layer.weights, strict=True)
        ]
        assert sum(one > 0 for one in apart) == 1, "one factor is fitted, the others are the model's"
    dense = tdfx.merge(small, optimizer=optimizer)
    for name in only or SITES:
        found = optimizer.state[weight_of(dense, name)]["ax"]
        assert (found - averages[name]).norm() <= 1e-6 * averages[name].norm()


class Own(Optimizer):
    """A user's: the sign of a mean of gradients."""

    def __init__(self, params: Any, rate: float) -> None:
        super().__init__(params, {"lr": rate, "extra": "x"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    mean = self.state[one].setdefault("mean", torch.zeros_like(one))
                    mean.lerp_(one.grad, 0.1)
                    one.sub_(mean.sign(), alpha=group["lr"])


class OwnToo(Own):
    """One of which tdfx is told."""


def test_an_optimizer_that_nobody_spoke_of_starts_afresh_with_a_warning() -> None:
    model, optimizer = trained(lambda parameters: Own(parameters, 1e-4))
    kept = optimizer.state[weight_of(model, "norm")]
    with pytest.warns(TdfxWarning, match=r"state of Own means \(mean\), so the 3 .*tdfx\.register_optimizer"):
        small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    check_holds_exactly(optimizer, small)
    assert optimizer.state[weight_of(small, "norm")] is kept
    assert not any(weight in optimizer.state for name in SITES for weight in factorized(small, name).weights)
    train(small, optimizer, 1)


def test_an_unknown_optimizer_without_state_is_no_reason_to_warn() -> None:
    model = Net().double()
    optimizer = Own(model.parameters(), 1e-4)
    check_holds_exactly(optimizer, tdfx.rewrite(model, policy(0.5), optimizer=optimizer))


def test_an_optimizer_of_ones_own_is_carried_once_it_is_registered() -> None:
    tdfx.register_optimizer(OwnToo, mean="first")
    model, optimizer = trained(lambda parameters: OwnToo(parameters, 1e-4))
    before = optimizer.state[weight_of(model, "fc")]["mean"].clone()
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    first, last = factorized(small, "fc").weights
    wanted = last.detach().mT @ before
    assert (optimizer.state[first]["mean"] - wanted).norm() <= 100 * EPS * before.norm()


def test_registering_what_is_no_optimizer_or_no_role() -> None:
    with pytest.raises(OptimizerError, match=r"'sgd' is not a subclass of torch\.optim\.Optimizer"):
        tdfx.register_optimizer("sgd", mean="first")  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match=r"mean='frist' is not known.* Nearest: 'first'"):
        tdfx.register_optimizer(OwnToo, mean="frist")  # type: ignore[arg-type]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda one: lr_scheduler.StepLR(one, 3, 0.5),
    "chained": lambda one: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(one, 0.1, 4), lr_scheduler.ExponentialLR(one, 0.9)]
    ),
    "sequential": lambda one: lr_scheduler.SequentialLR(
        one, [lr_scheduler.LinearLR(one, 0.1, 1, 3), lr_scheduler.CosineAnnealingLR(one, 9)], [3]
    ),
    "restarts": lambda one: lr_scheduler.CosineAnnealingWarmRestarts(one, 4),
    "one cycle": lambda one: lr_scheduler.OneCycleLR(one, 0.01, total_steps=12),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedules_go_on_as_if_nothing_had_been(schedule: Callable[[Optimizer], Any]) -> None:
    def run(switches: bool) -> list[Any]:
        torch.manual_seed(0)
        model: nn.Module = Net().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rates, plans = [], schedule(optimizer)
        for step in range(12):
            if switches and step == 5:
                model = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
            if switches and step == 9:
                model = tdfx.merge(model, optimizer=optimizer)
            train(model, optimizer, 1)
            rates.append([(float(one["lr"]), one["betas"]) for one in optimizer.param_groups])
            if step < 11:
                plans.step()
        return rates

    assert run(switches=True) == run(switches=False)


def accumulate(model: nn.Module, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(6, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()


def test_gradients_that_wait_are_carried_by_the_chain_rule() -> None:
    torch.manual_seed(0)
    model = Net().double().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clean = tdfx.rewrite(model, policy(1.0))
    accumulate(clean, range(4))
    accumulate(model, range(2))
    before = {name: weight_of(model, name).grad for name in SITES}
    small = tdfx.rewrite(model, policy(1.0), optimizer=optimizer)
    accumulate(small, range(2, 4))
    for (name, one), other in zip(small.named_parameters(), clean.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None
        assert (one.grad - other.grad).norm() <= 1e3 * EPS * other.grad.norm(), name
    assert all(weight_of(model, name).grad is before[name] for name in SITES)


def test_a_merge_brings_waiting_gradients_back() -> None:
    torch.manual_seed(0)
    model = Net().double().eval()
    accumulate(model, range(2))
    with pytest.warns(TdfxWarning, match="No optimizer= was given"):
        small = tdfx.rewrite(model, policy(1.0))
    dense = tdfx.merge(small)
    for name in SITES:
        old, new = weight_of(model, name).grad, weight_of(dense, name).grad
        assert old is not None
        assert new is not None
        assert (old - new).norm() <= 1e-6 * old.norm()


def test_no_gradient_stays_none() -> None:
    small = tdfx.rewrite(Net(), policy(1.0))
    assert all(weight.grad is None for name in SITES for weight in factorized(small, name).weights)


def test_lower_ranks_keep_what_the_new_factors_can_hold_of_a_gradient() -> None:
    torch.manual_seed(0)
    model = Net().double().eval()
    small = tdfx.rewrite(model, policy(1.0))
    accumulate(small, range(2))
    with pytest.warns(TdfxWarning, match="No optimizer= was given"):
        lower = tdfx.rewrite(small, policy(0.5))
    accumulate(model, range(2))
    dense = weight_of(model, "fc").grad
    assert dense is not None
    first, last = factorized(lower, "fc").weights
    assert first.grad is not None
    assert (first.grad - last.detach().mT @ dense).norm() <= 1e-6 * dense.norm()


@every_maker
def test_a_state_dict_of_after_the_switch_loads_into_a_new_run(make: Maker) -> None:
    model, optimizer = trained(make)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(small)
    other = make(twin.parameters())
    other.load_state_dict(saved)
    # torch itself casts the products of NAdam to the parameters' dtype where it loads them.
    assert train(twin, other, 3) == pytest.approx(train(small, optimizer, 3), rel=1e-9)
