"""FrobeniusDecay, LowRankPenalty, and the initialization of factors for an untrained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

import tdfx
from tdfx.layers.factorized import Factorized

QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
RATE, DECAY = 0.1, 0.3


def small() -> nn.Module:
    dense = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32)).double()
    return tdfx.rewrite(dense, QUARTER)


def data() -> Tensor:
    return torch.randn(4, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def zero_gradients(model: nn.Module) -> None:
    """Give every parameter a gradient of zero, so that a step applies only the decay or the penalty."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def backward(model: nn.Module) -> None:
    loss: Tensor = model(data()).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]


def dense_norm(model: nn.Module) -> Tensor:
    layers = [module for module in model.modules() if isinstance(module, Factorized)]
    return sum((layer.weight.square().sum() for layer in layers), torch.zeros((), dtype=torch.float64))


def expected_step(model: nn.Module, coupled: Callable[..., Optimizer] | None) -> list[Tensor]:
    """Return the parameters after one step with the decay added to the gradients, or applied before the step if None."""
    factors = {id(weight) for module in model.modules() if isinstance(module, Factorized) for weight in module.weights}
    parameters = list(model.parameters())
    decay = torch.autograd.grad(0.5 * dense_norm(model), parameters, allow_unused=True)
    # A bias is not a factor, so it keeps the plain decay.
    wanted = [
        pull if id(parameter) in factors and pull is not None else parameter.detach()
        for parameter, pull in zip(parameters, decay, strict=True)
    ]
    backward(model)
    if coupled is None:
        optimizer: Optimizer = AdamW(parameters, lr=RATE, weight_decay=0)
        with torch.no_grad():
            for parameter, pull in zip(parameters, wanted, strict=True):
                parameter.sub_(pull, alpha=RATE * DECAY)
    else:
        optimizer = coupled(parameters, lr=RATE)
        for parameter, pull in zip(parameters, wanted, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(pull, alpha=DECAY)
    optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize(
    ("build", "coupled"),
    [
        (lambda p: SGD(p, lr=RATE, weight_decay=DECAY, momentum=0.9), lambda p, lr: SGD(p, lr=lr, momentum=0.9)),
        (lambda p: Adam(p, lr=RATE, weight_decay=DECAY), Adam),
        (lambda p: Adam(p, lr=RATE, weight_decay=DECAY, decoupled_weight_decay=True), None),
        (lambda p: AdamW(p, lr=RATE, weight_decay=DECAY), None),
    ],
    ids=["SGD", "Adam", "Adam, decoupled", "AdamW"],
)
def test_a_step_decays_the_dense_weight_of_the_factors(build: Any, coupled: Any) -> None:
    model = small()
    torch.manual_seed(0)
    twin = small()
    twin.load_state_dict(model.state_dict())
    expected = expected_step(twin, coupled)
    optimizer = build(model.parameters())
    tdfx.FrobeniusDecay(model, optimizer)
    backward(model)
    optimizer.step()
    for parameter, other in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter, other, rtol=1e-11, atol=1e-13)


def test_after_remove_the_factors_have_plain_decay() -> None:
    model = small()
    twin = small()
    twin.load_state_dict(model.state_dict())
    expected = expected_step(twin, SGD)
    optimizer = SGD(model.parameters(), lr=RATE, weight_decay=DECAY)
    decay = tdfx.FrobeniusDecay(model, optimizer)
    decay.remove()
    backward(model)
    optimizer.step()
    assert not all(
        torch.allclose(parameter, other) for parameter, other in zip(model.parameters(), expected, strict=True)
    )


def test_maximizing_decays_too() -> None:
    model = small()
    optimizer = SGD(model.parameters(), lr=0.01, weight_decay=DECAY, maximize=True)
    tdfx.FrobeniusDecay(model, optimizer)
    before = float(dense_norm(model).detach())
    for _ in range(10):
        zero_gradients(model)
        optimizer.step()
    assert float(dense_norm(model).detach()) < before


def test_a_group_without_decay_and_factors_without_gradients_are_left_alone() -> None:
    model = small()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    tdfx.FrobeniusDecay(model, optimizer)
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    zero_gradients(model)
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


def test_an_optimizer_whose_decay_is_unknown_is_refused() -> None:
    model = small()
    with pytest.raises(tdfx.OptimizerError, match=r"how RMSprop uses weight_decay.*Use SGD, Adam or AdamW"):
        tdfx.FrobeniusDecay(model, RMSprop(model.parameters()))


class Mixed(nn.Module):
    """A linear layer, a convolution, and a parameter that a function uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)
        self.head = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(self.conv(x).mean((2, 3)), self.mix)
        return self.head(y)  # type: ignore[no-any-return]


def test_the_pull_is_the_gradient_of_the_penalty() -> None:
    model = Mixed().double()
    plan = tdfx.plan(model, QUARTER)
    optimizer = SGD(model.parameters(), lr=RATE)
    tdfx.LowRankPenalty(model, plan, optimizer, strength=0.5)
    low = tdfx.rewrite(model, plan)
    modules = {site.name: low.get_submodule(site.parameter or site.name) for site in plan}
    targets = {name: module for name, module in modules.items() if isinstance(module, Factorized)}
    weights = {"conv": model.conv.weight, "mix": model.mix, "head": model.head.weight}
    assert set(targets) == set(weights)
    expected = {
        name: (weight - RATE * 0.5 * (weight - targets[name].weight)).detach() for name, weight in weights.items()
    }
    zero_gradients(model)
    optimizer.step()
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name], rtol=1e-11, atol=1e-12)
        assert not torch.allclose(weight, targets[name].weight)


def test_weights_reach_their_ranks_and_a_split_then_loses_nothing() -> None:
    model = Mixed().double()
    plan = tdfx.plan(model, QUARTER)
    optimizer = SGD(model.parameters(), lr=0.5)
    penalty = tdfx.LowRankPenalty(model, plan, optimizer, strength=1.0, growth=1.05)
    first = penalty.distance()
    for _ in range(40):
        zero_gradients(model)
        optimizer.step()
        penalty.compress()
    assert penalty.strength == pytest.approx(1.05**40)
    assert first > 0.3
    assert penalty.distance() < 1e-4 * first
    errors = [site.error for site in tdfx.plan(model, QUARTER)]
    assert max(error for error in errors if error is not None) < 1e-3
    penalty.remove()
    before = model.mix.detach().clone()
    zero_gradients(model)
    optimizer.step()
    assert torch.equal(model.mix, before)


@pytest.mark.parametrize(("strength", "growth"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.5), (float("nan"), 1.0)])
def test_coefficients_out_of_range_are_refused(strength: float, growth: float) -> None:
    model = Mixed()
    with pytest.raises(tdfx.PolicyError, match=r"the coefficient of the penalty must be positive"):
        tdfx.LowRankPenalty(
            model, tdfx.plan(model, QUARTER), SGD(model.parameters(), lr=1.0), strength=strength, growth=growth
        )


def test_a_plan_for_another_model_is_refused() -> None:
    model = Mixed()
    plan = tdfx.plan(nn.Sequential(nn.Linear(64, 64)), QUARTER)
    with pytest.raises(tdfx.PlanError, match=r"factorizes site '0' of shape \(64, 64\), which Mixed does not have"):
        tdfx.LowRankPenalty(model, plan, SGD(model.parameters(), lr=1.0))


def deep(convolutions: bool) -> nn.Module:
    """Return twenty layers with ReLUs and He initialization, through which a signal keeps its size."""
    layers: list[nn.Module] = []
    for _ in range(20):
        layer = nn.Conv2d(48, 48, 3, padding=1, padding_mode="circular") if convolutions else nn.Linear(192, 192)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def sizes(model: nn.Module, convolutions: bool) -> tuple[float, float]:
    """Return the root mean square of the last activations, and of the gradient at the input."""
    x = torch.randn((2, 48, 6, 6) if convolutions else (64, 192), requires_grad=True)
    y = model(x)
    (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
    return float(y.detach().square().mean().sqrt()), float(gradient.square().mean().sqrt())


@pytest.mark.parametrize("convolutions", [False, True], ids=["linear", "convolutions"])
def test_an_untrained_model_keeps_the_size_of_its_signals_through_twenty_layers(convolutions: bool) -> None:
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        dense = deep(convolutions)
        low = tdfx.rewrite(dense, QUARTER, init="variance")
        split = tdfx.rewrite(dense, QUARTER)
        for name, layer in dense.named_children():
            if not isinstance(layer, nn.ReLU):
                factorized = low.get_submodule(name)
                assert isinstance(factorized, Factorized)
                norm = float(dense.get_parameter(f"{name}.weight").detach().norm())
                assert float(factorized.weight.detach().norm()) == pytest.approx(norm, rel=1e-4)
        reference = sizes(dense, convolutions)
        ratios.append([new / old for new, old in zip(sizes(low, convolutions), reference, strict=True)])
        # Factors split from the weight lose a fifth to a half of the size in every layer.
        assert all(new / old < 0.05 for new, old in zip(sizes(split, convolutions), reference, strict=True))
    forward, back = (sum(column) / len(ratios) for column in zip(*ratios, strict=True))
    assert 0.4 < forward < 2.5
    assert 0.4 < back < 2.5


def test_a_weight_of_zeros_stays_zero() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    nn.init.zeros_(model.get_parameter("0.weight"))
    factorized = tdfx.rewrite(model, QUARTER, init="variance").get_submodule("0")
    assert isinstance(factorized, Factorized)
    assert float(factorized.weight.detach().abs().max()) == 0.0


def test_an_unknown_initialization_is_refused() -> None:
    with pytest.raises(tdfx.PolicyError, match="init='random' is not known: factors start from the 'weight'"):
        tdfx.rewrite(Mixed(), QUARTER, init="random")  # type: ignore[arg-type]


def test_closures_fused_optimizers_and_dense_models_are_refused() -> None:
    model = small()
    optimizer = SGD(model.parameters(), lr=RATE, weight_decay=DECAY)
    tdfx.FrobeniusDecay(model, optimizer)
    with pytest.raises(tdfx.OptimizerError, match="a closure computes them inside the step"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(tdfx.OptimizerError, match="Make it with fused=False"):
        tdfx.FrobeniusDecay(model, Adam(model.parameters(), fused=True))
    dense = Mixed()
    with pytest.raises(tdfx.ModelError, match="Mixed holds no factorized layer"):
        tdfx.FrobeniusDecay(dense, SGD(dense.parameters(), lr=RATE))


def test_a_frozen_factor_is_left_alone() -> None:
    model = small()
    first = next(module for module in model.modules() if isinstance(module, Factorized)).weights[0]
    first.requires_grad_(False)
    before = first.detach().clone()
    optimizer = SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=RATE, weight_decay=DECAY
    )
    tdfx.FrobeniusDecay(model, optimizer)
    backward(model)
    optimizer.step()
    assert torch.equal(first, before)
