"""The state of each of torch's optimizers, and how each entry of it is carried."""

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
from tdfx import Factorized, OptimizerError, TdfxWarning

Builder = Callable[[Any], Optimizer]


def builder(name: str, **settings: Any) -> Builder:
    def build(parameters: Any) -> Optimizer:
        optimizer: Optimizer = getattr(torch.optim, name)(parameters, **settings)
        return optimizer

    return build


BUILDERS: dict[str, Builder] = {
    "sgd": builder("SGD", lr=0.01, momentum=0.9, dampening=0.1),
    "sgd fused": builder("SGD", lr=0.01, momentum=0.9, fused=True),
    "adam foreach": builder("Adam", lr=1e-3, foreach=True),
    "adam fused": builder("Adam", lr=1e-3, fused=True),
    "adam maximize": builder("Adam", lr=1e-12, maximize=True),
    "adam tensor lr": builder("Adam", lr=torch.tensor(1e-3)),
    "adamw fused amsgrad": builder("AdamW", lr=1e-3, fused=True, amsgrad=True),
    "nadam": builder("NAdam", lr=1e-3),
    "radam": builder("RAdam", lr=1e-3),
    "adamax": builder("Adamax", lr=1e-3),
    "adagrad": builder("Adagrad", lr=1e-2, initial_accumulator_value=0.1),
    "adagrad fused": builder("Adagrad", lr=1e-2, fused=True),
    "adadelta": builder("Adadelta", lr=1.0),
    "rmsprop": builder("RMSprop", lr=1e-3),
    "rmsprop momentum": builder("RMSprop", lr=1e-3, momentum=0.9),
    "rmsprop centered": builder("RMSprop", lr=1e-4, momentum=0.9, centered=True),
    "rprop": builder("Rprop", lr=1e-4),
    "asgd": builder("ASGD", lr=1e-2, t0=2),
    "adafactor": builder("Adafactor", lr=1e-2),
}
every_optimizer = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


def trained(build: Builder, steps: int = 6) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = build(model.parameters())
    train(model, optimizer, steps)
    return model, optimizer


def shapes(optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Return the state of each parameter without the values of tensors."""
    return [
        {
            key: (value.shape, value.dtype, value.device, value.stride()) if isinstance(value, Tensor) else value
            for key, value in optimizer.state[parameter].items()
        }
        for parameter in model.parameters()
    ]


@every_optimizer
@pytest.mark.parametrize("of", [1.0, 0.5])
def test_the_carried_state_has_the_form_that_the_optimizer_creates(build: Builder, of: float) -> None:
    model, optimizer = trained(build)
    small = tdfx.rewrite(model, policy(of), optimizer=optimizer, carry_state=True)
    check_form(optimizer, small, build)
    losses = train(small, optimizer, 8)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] <= losses[0] + 1e-6
    dense = tdfx.merge(small, optimizer=optimizer)
    check_form(optimizer, dense, build)
    losses = train(dense, optimizer, 8)
    assert losses[-1] <= losses[0] + 1e-6


BEGIN_ANEW = ("adam foreach", "adam fused", "adamw fused amsgrad", "nadam", "radam")


@pytest.mark.parametrize(
    ("name", "carry_state"),
    [*((name, None) for name in BEGIN_ANEW), ("nadam", False), ("sgd", False), ("adagrad", False), ("rprop", False)],
)
def test_factors_that_take_over_no_state_step_as_in_a_new_optimizer(name: str, carry_state: bool | None) -> None:
    model, optimizer = trained(BUILDERS[name])
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, carry_state=carry_state)
    twin = copy.deepcopy(small)
    fresh = BUILDERS[name](twin.parameters())
    for _ in range(3):
        train(small, optimizer, 1)
        train(twin, fresh, 1)
        for each, other in zip(small.modules(), twin.modules(), strict=True):
            if isinstance(each, Factorized) and isinstance(other, Factorized):
                assert all(map(torch.equal, each.weights, other.weights))
        twin.load_state_dict(small.state_dict())  # what takes over its state went on otherwise
    kept, new = (each.state[net.get_parameter("norm.weight")] for each, net in ((optimizer, small), (fresh, twin)))
    assert any(not torch.equal(kept[key], new[key]) for key in kept if isinstance(kept[key], Tensor))


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adamax", "rmsprop", "adafactor"])
def test_by_default_state_is_carried_where_no_count_corrects_it(name: str) -> None:
    (one, by_default), (other, carried) = (trained(BUILDERS[name]) for _ in range(2))
    small = tdfx.rewrite(one, policy(0.5), optimizer=by_default)
    twin = tdfx.rewrite(other, policy(0.5), optimizer=carried, carry_state=True)
    for mine, its in zip(small.parameters(), twin.parameters(), strict=True):
        assert by_default.state[mine].keys() == carried.state[its].keys() != set()
        assert repr(by_default.state[mine]) == repr(carried.state[its])


def test_carry_state_that_is_no_answer_is_refused_before_anything_changes() -> None:
    model, optimizer = trained(BUILDERS["adam foreach"])
    with pytest.raises(OptimizerError, match=r"carry_state='yes' is none of True, False and None.*Leave it out"):
        tdfx.rewrite(model, policy(0.5), optimizer=optimizer, carry_state="yes")  # type: ignore[arg-type]
    check_holds_exactly(optimizer, model)


def check_form(optimizer: Optimizer, model: nn.Module, build: Builder) -> None:
    """Compare shapes, dtypes and layouts of the state with those of a new optimizer for a copy of the model."""
    twin = copy.deepcopy(model)
    fresh = build(twin.parameters())
    train(twin, fresh, 1)
    assert shapes(optimizer, model) == shapes(fresh, twin)
    counts = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1
    assert all(count > 1 for count in counts)
    for state in optimizer.state.values():
        assert all(torch.isfinite(value).all() for value in state.values() if isinstance(value, Tensor))
        positive = {"exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta", "step_size", "row_var", "col_var"}
        assert all((state[key] >= 0).all() for key in positive & state.keys())
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_carried_together_with_another_optimizer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    muon: Optimizer = torch.optim.Muon(weights, lr=1e-3)
    adam = torch.optim.Adam(biases, lr=1e-3)
    x = torch.randn(16, 12, dtype=torch.float64)

    def step(model: nn.Module) -> None:
        model(x).square().mean().backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step(model)
    before = muon.state[weights[0]]["momentum_buffer"].clone()
    small = tdfx.rewrite(model, policy(0.5), optimizer=[muon, adam])
    first, last = (weight.detach() for weight in factorized(small, "0").weights)
    carried = [muon.state[weight]["momentum_buffer"] for weight in factorized(small, "0").weights]
    assert torch.allclose(carried[0], last.mT @ before, rtol=0, atol=100 * EPS * float(before.norm()))
    assert torch.allclose(carried[1], before @ first.mT, rtol=0, atol=100 * EPS * float(before.norm()))
    step(small)


def set_state(optimizer: Optimizer, model: nn.Module, **entries: Callable[[Tensor], Tensor]) -> None:
    for name in SITES:
        weight = weight_of(model, name)
        for key, value_of in entries.items():
            optimizer.state[weight][key] = value_of(weight.detach())


def factor_states(optimizer: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    return [optimizer.state[weight] for name in SITES for weight in factorized(model, name).weights]


def full(value: float) -> Callable[[Tensor], Tensor]:
    return lambda like: torch.full_like(like, value)


def test_rprop_keeps_equal_step_lengths() -> None:
    model, optimizer = trained(BUILDERS["rprop"])
    set_state(optimizer, model, step_size=full(0.02))
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    for state in factor_states(optimizer, small):
        assert torch.allclose(state["step_size"], torch.full_like(state["step_size"], 0.02), rtol=100 * EPS, atol=0)
    dense = tdfx.merge(small, optimizer=optimizer)
    lengths = optimizer.state[weight_of(dense, "conv")]["step_size"]
    assert torch.allclose(lengths, torch.full_like(lengths, 0.02), rtol=100 * EPS, atol=0)


def test_adadelta_keeps_an_equal_step_per_gradient() -> None:
    model, optimizer = trained(BUILDERS["adadelta"])
    for name in SITES:
        state = optimizer.state[weight_of(model, name)]
        state["acc_delta"] = 0.25 * state["square_avg"]
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    for state in factor_states(optimizer, small):
        assert torch.allclose(state["acc_delta"], 0.25 * state["square_avg"], rtol=100 * EPS, atol=0)


def test_adamax_keeps_the_root_of_adams_second_moment() -> None:
    model, optimizer = trained(BUILDERS["adamax"])
    set_state(optimizer, model, exp_avg=torch.zeros_like)
    expected = {name: optimizer.state[weight_of(model, name)]["exp_inf"].square() for name in SITES}
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    fc = factorized(small, "fc")
    first, last = (weight.detach().square() for weight in fc.weights)
    wanted = (last.mT @ expected["fc"]).sqrt(), (expected["fc"] @ first.mT).sqrt()
    for weight, root in zip(fc.weights, wanted, strict=True):
        assert torch.allclose(optimizer.state[weight]["exp_inf"], root, rtol=1e3 * EPS, atol=0)


def test_adamax_is_not_below_the_first_moment() -> None:
    model, optimizer = trained(BUILDERS["adamax"])
    set_state(optimizer, model, exp_avg=full(1.0), exp_inf=full(1.0))
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    for state in factor_states(optimizer, small):
        assert (state["exp_inf"] >= state["exp_avg"].abs()).all()


def test_adafactor_keeps_the_rows_and_columns_of_the_carried_estimate() -> None:
    model, optimizer = trained(BUILDERS["adafactor"])
    state = optimizer.state[weight_of(model, "fc")]
    row, col = state["row_var"].clone(), state["col_var"].clone()
    variance = row @ col / row.mean()
    assert torch.allclose(variance.mean(-1, keepdim=True), row * col.mean() / row.mean())
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    fc = factorized(small, "fc")
    first, last = (weight.detach().square() for weight in fc.weights)
    for weight, wanted in zip(fc.weights, (last.mT @ variance, variance @ first.mT), strict=True):
        factor_state = optimizer.state[weight]
        assert torch.allclose(factor_state["row_var"], wanted.mean(-1, keepdim=True), rtol=1e3 * EPS, atol=0)
        assert torch.allclose(factor_state["col_var"], wanted.mean(-2, keepdim=True), rtol=1e3 * EPS, atol=0)


def test_rmsprop_momentum_is_carried_in_the_gradients_own_scale() -> None:
    model, optimizer = trained(BUILDERS["rmsprop momentum"])
    state = optimizer.state[weight_of(model, "fc")]
    moment = torch.randn_like(state["square_avg"])
    state["momentum_buffer"] = moment / state["square_avg"].sqrt()
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    fc = factorized(small, "fc")
    first, last = (weight.detach() for weight in fc.weights)
    for weight, wanted in zip(fc.weights, (last.mT @ moment, moment @ first.mT), strict=True):
        factor_state = optimizer.state[weight]
        error = factor_state["momentum_buffer"] * factor_state["square_avg"].sqrt() - wanted
        assert error.norm() <= 1e3 * EPS * moment.norm()


def test_centered_rmsprop_keeps_a_positive_variance() -> None:
    model, optimizer = trained(BUILDERS["rmsprop centered"])
    set_state(optimizer, model, grad_avg=full(1.0), square_avg=full(1.0 + 1e-3))
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    for state in factor_states(optimizer, small):
        assert (state["square_avg"] - state["grad_avg"].square() >= 0).all()
    first = factorized(small, "fc").weights[1].detach().square()  # (out, rank)
    factor_state = optimizer.state[factorized(small, "fc").weights[0]]
    variance = factor_state["square_avg"] - factor_state["grad_avg"].square()
    wanted = 1e-3 * first.sum(0)[:, None].expand_as(variance)
    assert torch.allclose(variance, wanted, rtol=0, atol=1e4 * EPS * float(factor_state["square_avg"].max()))


@pytest.mark.parametrize("scheme", ["auto", "spatial", "cp"])
def test_asgd_keeps_an_average_in_the_bases_of_the_weight(scheme: str) -> None:
    model, optimizer = trained(BUILDERS["asgd"])
    averages = {name: optimizer.state[weight_of(model, name)]["ax"].clone() for name in SITES}
    moved = {name: float((averages[name] - weight_of(model, name)).detach().norm()) for name in SITES}
    assert min(moved.values()) > 0
    only = () if scheme == "auto" else ("conv",)
    chosen = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1, scheme=scheme, include=only or ("*",))
    small = tdfx.rewrite(model, chosen, optimizer=optimizer)
    for name in only or SITES:
        layer = factorized(small, name)
        factor_averages = [optimizer.state[weight]["ax"] for weight in layer.weights]
        error = (layer.join(*factor_averages) - averages[name]).norm() / averages[name].norm()
        # The inverse of a full-rank basis leaves out singular values below 1e-7 of the largest.
        assert error <= 1e-6
        distances = [
            float((average - weight.detach()).norm() / weight.detach().norm())
            for average, weight in zip(factor_averages, layer.weights, strict=True)
        ]
        assert sum(distance > 0 for distance in distances) == 1, "more than one factor differs from the model's"
    dense = tdfx.merge(small, optimizer=optimizer)
    for name in only or SITES:
        average = optimizer.state[weight_of(dense, name)]["ax"]
        assert (average - averages[name]).norm() <= 1e-6 * averages[name].norm()


class CustomOptimizer(Optimizer):
    """A user's optimizer: it steps by the sign of a mean of gradients."""

    def __init__(self, params: Any, rate: float) -> None:
        super().__init__(params, {"lr": rate, "extra": "x"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.1)
                    parameter.sub_(mean.sign(), alpha=group["lr"])


class RegisteredOptimizer(CustomOptimizer):
    """The same, registered with tdfx."""


def test_an_unknown_optimizer_loses_the_state_of_factors_with_a_warning() -> None:
    model, optimizer = trained(lambda parameters: CustomOptimizer(parameters, 1e-4))
    kept = optimizer.state[weight_of(model, "norm")]
    with pytest.warns(
        TdfxWarning, match=r"state of CustomOptimizer means \(mean\), so the 3 .*tdfx\.register_optimizer"
    ):
        small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    check_holds_exactly(optimizer, small)
    assert optimizer.state[weight_of(small, "norm")] is kept
    assert not any(weight in optimizer.state for name in SITES for weight in factorized(small, name).weights)
    train(small, optimizer, 1)


def test_an_unknown_optimizer_without_state_causes_no_warning() -> None:
    model = Net().double()
    optimizer = CustomOptimizer(model.parameters(), 1e-4)
    check_holds_exactly(optimizer, tdfx.rewrite(model, policy(0.5), optimizer=optimizer))


def test_a_registered_optimizer_is_carried() -> None:
    tdfx.register_optimizer(RegisteredOptimizer, mean="first")
    model, optimizer = trained(lambda parameters: RegisteredOptimizer(parameters, 1e-4))
    before = optimizer.state[weight_of(model, "fc")]["mean"].clone()
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    first, last = factorized(small, "fc").weights
    wanted = last.detach().mT @ before
    assert (optimizer.state[first]["mean"] - wanted).norm() <= 100 * EPS * before.norm()


class TwoMoments(Optimizer):
    """Keeps a mean and a mean of squares, and draws random numbers."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        torch.rand(3)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("mean", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
            state.setdefault("mean_sq", torch.zeros_like(parameter)).lerp_(parameter.grad.square(), 0.1)


class NeedsMore(TwoMoments):
    """Cannot be tried."""

    def __init__(self, params: Any, schedule: Any) -> None:
        super().__init__(params)


def test_registering_names_the_entries_that_are_left_out() -> None:
    before = torch.get_rng_state()
    text = r"TwoMoments keeps 'mean_sq', which its tdfx\.register_optimizer does not name, and does not keep 'mean_square' "
    with pytest.warns(
        TdfxWarning, match=text + r"\(nearest: 'mean_sq'\)\. Rewritten weights start with fresh state"
    ) as seen:
        tdfx.register_optimizer(TwoMoments, mean="first", mean_square="second")
    assert seen[0].filename == __file__
    assert torch.equal(torch.get_rng_state(), before)
    tdfx.register_optimizer(TwoMoments, mean="first", mean_sq="second", later="count")
    tdfx.register_optimizer(NeedsMore, mean="first")
    model, optimizer = trained(lambda parameters: NeedsMore(list(parameters), None))
    with pytest.warns(TdfxWarning, match=r"state of NeedsMore means \(mean_sq\), so the 3 "):
        tdfx.rewrite(model, policy(0.5), optimizer=optimizer)


def test_registering_another_class_or_an_unknown_role_is_refused() -> None:
    with pytest.raises(OptimizerError, match=r"'sgd' is not a subclass of torch\.optim\.Optimizer"):
        tdfx.register_optimizer("sgd", mean="first")  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match=r"mean='frist' is not known.* Nearest: 'first'"):
        tdfx.register_optimizer(RegisteredOptimizer, mean="frist")  # type: ignore[arg-type]


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.5),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, 1, 3), lr_scheduler.CosineAnnealingLR(optimizer, 9)], [3]
    ),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=12),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedules_are_not_affected(schedule: Callable[[Optimizer], Any]) -> None:
    def run(switches: bool) -> list[Any]:
        torch.manual_seed(0)
        model: nn.Module = Net().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rates, scheduler = [], schedule(optimizer)
        for step in range(12):
            if switches and step == 5:
                model = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
            if switches and step == 9:
                model = tdfx.merge(model, optimizer=optimizer)
            train(model, optimizer, 1)
            rates.append([(float(group["lr"]), group["betas"]) for group in optimizer.param_groups])
            if step < 11:
                scheduler.step()
        return rates

    assert run(switches=True) == run(switches=False)


def accumulate(model: nn.Module, seeds: range) -> None:
    for seed in seeds:
        x = torch.randn(6, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()


def test_accumulated_gradients_are_carried_by_the_chain_rule() -> None:
    torch.manual_seed(0)
    model = Net().double().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clean = tdfx.rewrite(model, policy(1.0))
    accumulate(clean, range(4))
    accumulate(model, range(2))
    before = {name: weight_of(model, name).grad for name in SITES}
    small = tdfx.rewrite(model, policy(1.0), optimizer=optimizer)
    accumulate(small, range(2, 4))
    for (name, parameter), expected in zip(small.named_parameters(), clean.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert expected.grad is not None
        assert (parameter.grad - expected.grad).norm() <= 1e3 * EPS * expected.grad.norm(), name
    assert all(weight_of(model, name).grad is before[name] for name in SITES)


def test_a_merge_restores_accumulated_gradients() -> None:
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


def test_lower_ranks_project_accumulated_gradients() -> None:
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


@every_optimizer
def test_a_state_dict_from_after_a_switch_loads_into_a_new_run(build: Builder) -> None:
    model, optimizer = trained(build)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(small)
    other = build(twin.parameters())
    other.load_state_dict(saved)
    # On loading, torch casts the products of NAdam to the dtype of the parameters.
    assert train(twin, other, 3) == pytest.approx(train(small, optimizer, 3), rel=1e-9)
