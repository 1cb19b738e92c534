"""Twenty steps after a switch at full rank, compared with a run that was never switched."""

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


def factorized(model: nn.Module, name: str) -> Factorized:
    return cast("Factorized", model.get_submodule(name))


@torch.no_grad()
def make_orthonormal(layer: Factorized) -> None:
    """Give all factors except the largest orthonormal bases and freeze them; the largest holds the weight in these bases."""
    dense = layer.weight.detach().clone()
    core = max(layer.weights, key=lambda weight: weight.numel())
    for weight in layer.weights:
        if weight is not core:
            matrix = torch.linalg.qr(weight.flatten(1)).Q
            weight.copy_(matrix.reshape(weight.shape))
            weight.requires_grad_(False)
    fitted = layer.scheme.refit(layer.operation, [weight.detach() for weight in layer.weights], dense)
    for weight, value in zip(layer.weights, fitted, strict=True):
        weight.copy_(value)


def distance(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_in_square_orthonormal_bases_the_run_is_the_dense_run(momentum: float) -> None:
    """The chain rule turns a step of the core into the dense step: Q (core - rate · Qᵀ G P) Pᵀ = W - rate · G."""
    dense = net()
    small = tdfx.rewrite(copy.deepcopy(dense), FULL)
    for name in ("0", "3"):
        make_orthonormal(factorized(small, name))
        expected = cast("Tensor", dense.get_submodule(name).weight).detach()
        assert distance(factorized(small, name).weight.detach(), expected) < 1e-12
    trained = [parameter for parameter in small.parameters() if parameter.requires_grad]
    train(dense, SGD(dense.parameters(), lr=RATE, momentum=momentum))
    train(small, SGD(trained, lr=RATE, momentum=momentum))
    for name in ("0", "3"):
        expected = cast("Tensor", dense.get_submodule(name).weight).detach()
        # Some 1e3 roundings a step, none of which training amplifies much in so short a time.
        assert distance(factorized(small, name).weight.detach(), expected) < STEPS * 1e4 * EPS


def test_with_all_factors_training_the_run_stays_near_the_dense_run() -> None:
    """Balanced factors step by -rate · (B Bᵀ G + G Aᵀ A): the gradient weighted by the spectrum."""
    dense = net()
    train(dense, SGD(dense.parameters(), lr=RATE))
    start = {name: cast("Tensor", dense.get_submodule(name).weight).detach().clone() for name in ("0", "3")}
    dense.zero_grad()
    small = tdfx.rewrite(dense, FULL)
    train(dense, SGD(dense.parameters(), lr=RATE))
    train(small, SGD(small.parameters(), lr=RATE))
    for name in ("0", "3"):
        expected = cast("Tensor", dense.get_submodule(name).weight).detach()
        apart = distance(factorized(small, name).weight.detach(), expected)
        assert 1e-6 < apart < 3 * distance(start[name], expected)
