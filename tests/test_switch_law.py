"""How twenty steps after a switch at full rank follow the run that was never switched."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import tdfx
from tdfx import Factorized

EPS = torch.finfo(torch.float64).eps
STEPS, RATE = 20, 0.05
FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 10)).double()


def train(model: nn.Module, optimizer: Optimizer, steps: int = STEPS) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 6, 4, 4, generator=generator, dtype=torch.float64)
        y = torch.randn(16, 10, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def layer(model: nn.Module, name: str) -> Factorized:
    return cast("Factorized", model.get_submodule(name))


@torch.no_grad()
def make_orthonormal(one: Factorized) -> nn.Parameter:
    """Give all factors but one orthonormal bases and freeze them; return the one, which then holds the weight in them."""
    dense = one.weight.detach().clone()
    core = max(one.weights, key=lambda weight: weight.numel())
    for weight in one.weights:
        if weight is not core:
            matrix = torch.linalg.qr(weight.flatten(1)).Q
            weight.copy_(matrix.reshape(weight.shape))
            weight.requires_grad_(False)
    fitted = one.scheme.refit(one.operation, [weight.detach() for weight in one.weights], dense)
    for weight, value in zip(one.weights, fitted, strict=True):
        weight.copy_(value)
    return core


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_in_square_orthonormal_bases_the_run_is_the_dense_one(momentum: float) -> None:
    """The chain rule turns a step of the core into the dense step: Q (core - rate · Qᵀ G P) Pᵀ = W - rate · G."""
    dense = net()
    small = tdfx.rewrite(copy.deepcopy(dense), FULL)
    for name in ("0", "3"):
        make_orthonormal(layer(small, name))
        whole = cast("Tensor", dense.get_submodule(name).weight).detach()
        assert far(layer(small, name).weight.detach(), whole) < 1e-12
    trained = [parameter for parameter in small.parameters() if parameter.requires_grad]
    train(dense, SGD(dense.parameters(), lr=RATE, momentum=momentum))
    train(small, SGD(trained, lr=RATE, momentum=momentum))
    for name in ("0", "3"):
        expected = cast("Tensor", dense.get_submodule(name).weight).detach()
        # Some 1e3 roundings a step, none of which training amplifies much in so short a time.
        assert far(layer(small, name).weight.detach(), expected) < STEPS * 1e4 * EPS


def test_with_all_factors_training_the_run_is_another_but_near() -> None:
    """Balanced factors step by -rate · (B Bᵀ G + G Aᵀ A): the gradient weighed by the spectrum, not the gradient."""
    dense = net()
    train(dense, SGD(dense.parameters(), lr=RATE))
    start = {name: cast("Tensor", dense.get_submodule(name).weight).detach().clone() for name in ("0", "3")}
    dense.zero_grad()
    small = tdfx.rewrite(dense, FULL)
    train(dense, SGD(dense.parameters(), lr=RATE))
    train(small, SGD(small.parameters(), lr=RATE))
    for name in ("0", "3"):
        expected = cast("Tensor", dense.get_submodule(name).weight).detach()
        apart = far(layer(small, name).weight.detach(), expected)
        assert 1e-6 < apart < 3 * far(start[name], expected)
