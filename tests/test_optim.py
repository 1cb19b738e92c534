"""How an optimizer follows a rewrite and a merge, compared with torch.autograd."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import tdfx
from tdfx import Factorized, OptimizerError, TdfxWarning

EPS = torch.finfo(torch.float64).eps
Builder = Callable[[Any], Optimizer]
BUILDERS: dict[str, Builder] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda parameters: SGD(parameters, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=1e-2, betas=(0.8, 0.95)),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-2, weight_decay=0.05),
    "amsgrad": lambda parameters: AdamW(parameters, lr=1e-2, amsgrad=True),
}
SITES = ("conv", "mix", "fc")
every_optimizer = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())


class Net(nn.Module):
    """Has a site for tucker2, a pointwise convolution and a linear layer for svd, and a norm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 6, 1, bias=False)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(torch.tanh(self.norm(self.conv(x))))
        return cast("Tensor", self.fc(y.flatten(1)))


def policy(of: float) -> tdfx.Policy:
    return tdfx.Policy(rank=tdfx.Ratio(of=of), min_gain=0, round_to=1)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 4) -> list[float]:
    """Train on a fixed random batch, and return the losses."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, 2, 2, generator=generator, dtype=torch.float64)
    target = torch.randn(16, 10, generator=generator, dtype=torch.float64)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return losses


def trained(build: Builder) -> tuple[nn.Module, Optimizer]:
    model = Net().double()
    optimizer = build(model.parameters())
    train(model, optimizer)
    return model, optimizer


def factorized(model: nn.Module, name: str) -> Factorized:
    site = model.get_submodule(name)
    assert isinstance(site, Factorized)
    return site


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    return cast("nn.Parameter", model.get_submodule(name).weight)


def states(optimizer: Optimizer, model: nn.Module, key: str) -> dict[str, Tensor]:
    return {name: optimizer.state[weight_of(model, name)][key].clone() for name in SITES}


def first_key(optimizer: Optimizer) -> str:
    return "momentum_buffer" if isinstance(optimizer, SGD) else "exp_avg"


def check_holds_exactly(optimizer: Optimizer, model: nn.Module) -> None:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = list(model.parameters())
    assert len(held) == len(expected)
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in expected}
    assert {id(parameter) for parameter in optimizer.state} <= {id(parameter) for parameter in expected}
    for parameter, state in optimizer.state.items():
        assert all(v.shape == parameter.shape for k, v in state.items() if k != "step" and v is not None)


def snapshot(optimizer: Optimizer, model: nn.Module) -> list[Any]:
    """Return everything in an optimizer and a model that a failure could have changed."""
    groups = [{**group, "params": [id(parameter) for parameter in group["params"]]} for group in optimizer.param_groups]
    state = [
        (id(parameter), sorted((k, repr(v)) for k, v in held.items())) for parameter, held in optimizer.state.items()
    ]
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    values = [(name, id(parameter), repr(parameter.tolist())) for name, parameter in model.named_parameters()]
    return copy.deepcopy([groups, state, modules, values])


@every_optimizer
def test_an_optimizer_holds_exactly_the_returned_models_parameters(build: Builder) -> None:
    model, optimizer = trained(build)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    check_holds_exactly(optimizer, small)
    assert all(len(optimizer.state[weight]) > 0 for name in SITES for weight in factorized(small, name).weights)
    train(small, optimizer)
    dense = tdfx.merge(small, optimizer=optimizer)
    check_holds_exactly(optimizer, dense)
    with pytest.raises(AssertionError):
        check_holds_exactly(optimizer, small)


def test_groups_keep_order_settings_and_positions() -> None:
    model = Net().double()
    groups = [
        {"params": [model.norm.bias, model.fc.weight, model.conv.weight, model.norm.weight], "lr": 0.1},
        {"params": [model.mix.weight], "lr": 0.2, "momentum": 0.5, "custom": "kept"},
        {"params": [model.conv.bias, model.fc.bias], "weight_decay": 0.0},
    ]
    optimizer = SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-3)
    train(model, optimizer)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    lists = [id(group) for group in optimizer.param_groups]
    before = [list(group["params"]) for group in optimizer.param_groups]

    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    conv, mix, fc = (list(factorized(small, name).weights) for name in SITES)
    expected: list[list[Any]] = [
        [model.norm.bias, *fc, *conv, model.norm.weight],
        mix,
        [model.conv.bias, model.fc.bias],
    ]
    after = [group["params"] for group in optimizer.param_groups]
    assert [[id(parameter) for parameter in group] for group in after] == [
        [id(parameter) for parameter in group] for group in expected
    ]
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
    assert [id(group) for group in optimizer.param_groups] == lists

    dense = tdfx.merge(small, optimizer=optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    merged_names = {id(parameter): name for name, parameter in dense.named_parameters()}
    restored = [[merged_names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    assert restored == [[names[id(parameter)] for parameter in group] for group in before]


@every_optimizer
@pytest.mark.parametrize("of", [0.5, 1.0])
def test_first_moments_are_carried_as_autograd_carries_gradients(build: Builder, of: float) -> None:
    model, optimizer = trained(build)
    key = first_key(optimizer)
    moments = states(optimizer, model, key)
    small = tdfx.rewrite(model, policy(of), optimizer=optimizer, carry_state=True)
    for name in SITES:
        site = factorized(small, name)
        expected = torch.autograd.grad((site.weight * moments[name]).sum(), site.weights)
        for weight, gradient in zip(site.weights, expected, strict=True):
            moment = optimizer.state[weight][key]
            assert (moment - gradient).norm() <= 64 * EPS * gradient.norm()
            assert (moment + gradient).norm() > gradient.norm()


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad"])
def test_second_moments_are_positive_and_steps_kept(name: str) -> None:
    model, optimizer = trained(BUILDERS[name])
    keys = {"exp_avg_sq", *(["max_exp_avg_sq"] if name == "amsgrad" else [])}
    steps = states(optimizer, model, "step")
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, carry_state=True)
    for site in SITES:
        for weight in factorized(small, site).weights:
            state = optimizer.state[weight]
            assert set(state) == {"step", "exp_avg", *keys}
            assert all(bool((state[key] > 0).all()) for key in keys)
            assert torch.equal(state["step"], steps[site])
            assert state["step"].data_ptr() != steps[site].data_ptr()
    train(small, optimizer, steps=3)
    dense = tdfx.merge(small, optimizer=optimizer)
    for site in SITES:
        state = optimizer.state[weight_of(dense, site)]
        assert all(bool((state[key] > 0).all()) for key in keys)
        assert torch.equal(state["step"], steps[site] + 3)
    counts = [optimizer.state[weight]["step"] for weight in dense.parameters()]
    assert len({count.data_ptr() for count in counts}) == len(counts)


def test_uniform_second_moments_keep_their_scale() -> None:
    """With v = c everywhere, v of a factor's entry is c times the squared norm of the vector that it multiplies."""
    model, optimizer = trained(BUILDERS["adam"])
    for site in SITES:
        optimizer.state[weight_of(model, site)]["exp_avg_sq"].fill_(0.25)
    values = torch.linalg.svdvals(weight_of(model, "fc").detach())
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer, carry_state=True)
    first, last = factorized(small, "fc").weights
    # first = diag(sqrt s) V', last = U diag(sqrt s): the columns and rows that they multiply have the squared norm s.
    expected = 0.25 * values[: first.shape[0]]
    for moment in (optimizer.state[first]["exp_avg_sq"], optimizer.state[last]["exp_avg_sq"].mT):
        assert (moment - expected[:, None]).abs().max() <= 1e3 * EPS * expected[0]
    assert expected[0] > 1.1 * expected[-1]
    dense = tdfx.merge(small, optimizer=optimizer)
    for site in SITES:
        merged_moment = optimizer.state[weight_of(dense, site)]["exp_avg_sq"]
        assert (merged_moment - 0.25).abs().max() <= 1e3 * EPS


def rounding(weight: Tensor) -> float:
    """Return the relative rounding of a projection: it inverts Gram matrices, whose condition is the weight's, squared."""
    return 1e3 * EPS * float(torch.linalg.cond(weight.detach().flatten(1))) ** 2


@every_optimizer
def test_merge_restores_the_first_moment(build: Builder) -> None:
    model, optimizer = trained(build)
    key = first_key(optimizer)
    moments = states(optimizer, model, key)
    merged = tdfx.merge(tdfx.rewrite(model, policy(1.0), optimizer=optimizer, carry_state=True), optimizer=optimizer)
    for name, moment in states(optimizer, merged, key).items():
        assert (moment - moments[name]).norm() <= rounding(weight_of(merged, name)) * moments[name].norm()


@every_optimizer
def test_merge_at_low_rank_projects_the_first_moment(build: Builder) -> None:
    model, optimizer = trained(build)
    weights = {name: weight_of(model, name) for name in SITES}
    key = first_key(optimizer)
    rounds = [states(optimizer, model, key)]
    for _ in range(2):
        model = tdfx.merge(tdfx.rewrite(model, policy(0.5), optimizer=optimizer, carry_state=True), optimizer=optimizer)
        rounds.append(states(optimizer, model, key))
    for name in SITES:
        moment, once, twice = (moments[name] for moments in rounds)
        scale = moment.norm()
        assert (once - moment).norm() > 1e-3 * scale
        bound = rounding(weights[name])
        assert abs(float(((moment - once) * once).sum())) <= bound * scale**2
        assert (twice - once).norm() <= bound * scale


@pytest.mark.parametrize("bias", [False, True])
def test_parameter_names_follow(bias: bool) -> None:
    model = Net().double()
    named = [(name, parameter) for name, parameter in model.named_parameters() if bias or not name.endswith("bias")]
    optimizer = SGD(named, lr=0.01, momentum=0.9)
    train(model, optimizer)
    (group,) = optimizer.param_groups

    def check(model: nn.Module) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]

    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    check(small)
    assert "conv.factors.1.weight" in group["param_names"]
    check(tdfx.merge(small, optimizer=optimizer))
    assert group["param_names"] == [name for name, _ in named]


@every_optimizer
def test_training_continues_and_the_state_dict_loads(build: Builder) -> None:
    model, optimizer = trained(build)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    losses = train(small, optimizer, steps=40)
    assert losses[-1] < 0.9 * losses[0]
    other = build([parameter for group in optimizer.param_groups for parameter in group["params"]])
    other.load_state_dict(optimizer.state_dict())
    dense = tdfx.merge(small, optimizer=optimizer)
    further = train(dense, optimizer, steps=40)
    assert further[0] < losses[0]
    assert further[-1] < 0.99 * further[0]


def test_a_scheduler_continues() -> None:
    model, optimizer = trained(BUILDERS["sgd"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    train(small, optimizer, steps=1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    dense = tdfx.merge(small, optimizer=optimizer)
    train(dense, optimizer, steps=1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    optimizer.param_groups[0]["lr"] = 0.0
    before = weight_of(dense, "fc").detach().clone()
    train(dense, optimizer, steps=1)
    assert torch.equal(weight_of(dense, "fc"), before)


def test_a_plain_step_at_full_rank_follows_its_formula() -> None:
    """W = B A has the gradient G: after the step, B A = W - lr (G A'A + B B'G) + lr**2 G W'G, with primes for transposes."""
    lr = 0.01
    model = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    optimizer = SGD(model.parameters(), lr=lr)
    small = tdfx.rewrite(model, policy(1.0), optimizer=optimizer)
    x = torch.randn(5, 6, dtype=torch.float64)
    small(x).square().sum().backward()
    w = weight_of(model, "0").detach()
    g = 2 * (x @ w.mT).mT @ x
    a, b = (weight.detach().clone() for weight in factorized(small, "0").weights)
    optimizer.step()
    expected = w - lr * (g @ a.mT @ a + b @ b.mT @ g) + lr**2 * g @ w.mT @ g
    weight = factorized(small, "0").weight.detach()
    assert (weight - expected).norm() <= 100 * EPS * (w.norm() + g.norm())
    assert (weight - (w - lr * g)).norm() > 0.1 * lr * g.norm()


@every_optimizer
def test_an_optimizer_of_another_model_changes_nothing(build: Builder) -> None:
    (model, optimizer), (other, foreign) = trained(build), trained(build)
    text = r"The weights of 3 sites are in none of the optimizers given, the first being 'conv'"
    before = [snapshot(optimizer, model), snapshot(foreign, other)]
    with pytest.raises(OptimizerError, match=text):
        tdfx.rewrite(model, policy(0.5), optimizer=foreign)
    assert [snapshot(optimizer, model), snapshot(foreign, other)] == before

    small = tdfx.rewrite(model, policy(0.5), optimizer=optimizer)
    assert snapshot(optimizer, model) != before[0]
    before = [snapshot(optimizer, small), snapshot(foreign, other)]
    with pytest.raises(OptimizerError, match=text):
        tdfx.merge(small, optimizer=foreign)
    assert [snapshot(optimizer, small), snapshot(foreign, other)] == before


def test_an_optimizer_of_a_part_of_the_model_is_refused() -> None:
    model = Net().double()
    optimizer = SGD([model.conv.weight, model.fc.weight], lr=0.01)
    with pytest.raises(
        OptimizerError, match=r"1 sites .* first being 'mix'.*keep those sites: Policy\(exclude=\('mix', "
    ):
        tdfx.rewrite(model, policy(0.5), optimizer=optimizer)


def test_factors_in_two_groups_cannot_be_merged() -> None:
    small = tdfx.rewrite(Net().double(), policy(0.5))
    first, *rest = factorized(small, "mix").weights
    others = [parameter for parameter in small.parameters() if parameter is not first]
    optimizer = SGD([{"params": [first]}, {"params": others}], lr=0.01)
    with pytest.raises(OptimizerError, match="factors of site 'mix' are in 2 parameter groups, so it is not known"):
        tdfx.merge(small, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][0] is first
    assert len(rest) == 1


@pytest.mark.parametrize("wrong", ["sgd", [None], [1, 2], SGD, 0.1, nn.Linear(2, 2)], ids=str)
def test_other_objects_are_refused_as_optimizers(wrong: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    small = tdfx.rewrite(model, policy(0.5))
    text = r"optimizer=.* is a .*, not a torch\.optim\.Optimizer: .* or a list of them\."
    with pytest.raises(OptimizerError, match=text):
        tdfx.rewrite(model, policy(0.5), optimizer=wrong)
    with pytest.raises(OptimizerError, match=text):
        tdfx.merge(small, optimizer=wrong)


def test_several_optimizers_are_updated() -> None:
    model = Net().double()
    pair = [
        SGD([model.conv.weight, model.norm.weight, model.norm.bias], lr=0.01, momentum=0.9),
        Adam([*model.mix.parameters(), *model.fc.parameters(), cast("nn.Parameter", model.conv.bias)], lr=0.01),
    ]
    for optimizer in pair:
        train(model, optimizer, steps=2)
    small = tdfx.rewrite(model, policy(0.5), optimizer=pair)
    sizes = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in pair]
    assert sizes == [[5], [6]]
    held = itertools.chain.from_iterable(group["params"] for optimizer in pair for group in optimizer.param_groups)
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in small.parameters()}
    assert all("momentum_buffer" in pair[0].state[weight] for weight in factorized(small, "conv").weights)
    assert all("exp_avg" in pair[1].state[weight] for weight in factorized(small, "fc").weights)


def test_gradients_without_an_optimizer_cause_a_warning() -> None:
    model = Net().double()
    tdfx.rewrite(model, policy(0.5))  # no gradients, no warning: warnings are errors here
    model(torch.randn(3, 4, 2, 2, dtype=torch.float64)).sum().backward()
    text = r"No optimizer= was given, but the weights of 3 rewritten sites have gradients, 'conv' first: .* Pass optimizer="
    with pytest.warns(TdfxWarning, match=text):
        tdfx.rewrite(model, policy(0.5))


def test_a_weight_held_by_two_optimizers_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    both = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(tdfx.OptimizerError, match="weight of site '0' is held by 2 of the optimizers given"):
        tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0), optimizer=both)
    assert [optimizer.param_groups[0]["params"][0] is model[0].weight for optimizer in both] == [True, True]


def test_second_moments_are_not_below_the_squares_of_the_first() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).double()
    weight = model.get_parameter("0.weight")
    optimizer = torch.optim.Adam(model.parameters())
    loss = model(torch.ones(4, 16, dtype=torch.float64)).sum()
    loss.backward()
    optimizer.step()
    # If all entries agree, the estimate for uncorrelated entries is too small.
    optimizer.state[weight]["exp_avg"].fill_(1.0)
    optimizer.state[weight]["exp_avg_sq"].fill_(1.0)
    small = tdfx.rewrite(model, tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0), optimizer=optimizer)
    for factor in small.get_submodule("0.factors").children():
        state = optimizer.state[factor.get_parameter("weight")]
        assert bool((state["exp_avg_sq"] >= state["exp_avg"].square()).all())
