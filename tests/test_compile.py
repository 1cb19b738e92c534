"""Compiled models: compiled again with the same settings, once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import tdfx
from tdfx.plan import Emit

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Counting:
    """A backend that counts how often it is asked to compile."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_one_compilation_at_the_switch_and_none_later(emit: Emit) -> None:
    backend = Counting()
    model = cast("nn.Module", torch.compile(net(), backend=backend, fullgraph=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
    assert backend.count == 1
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, emit=emit)
    assert isinstance(small, torch._dynamo.OptimizedModule)
    assert backend.count == 1
    for _ in range(4):
        step(small, optimizer)
    assert backend.count == 2
    dense = tdfx.merge(small, optimizer=optimizer)
    for _ in range(4):
        step(dense, optimizer)
    assert backend.count <= 3


def test_the_former_model_can_still_be_called() -> None:
    backend = Counting()
    model = cast("nn.Module", torch.compile(net(), backend=backend))
    expected = model(X)
    small = tdfx.rewrite(model, FULL)
    assert torch.allclose(small(X), expected, atol=1e-5)
    assert torch.equal(model(X), expected)


class Checkpointed(nn.Module):
    """Runs its inside again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inside = net()
        self.last = nn.Linear(8, 5)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.last(checkpoint(self.inside, x, use_reentrant=self.reentrant)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = Checkpointed(reentrant).double()
    x = X.double().requires_grad_()
    small = tdfx.rewrite(model, FULL)
    assert any(isinstance(one, tdfx.Factorized) for one in cast("nn.Module", small.inside).modules())
    calls: list[int] = []
    cast("Any", small).inside[0].factors[0].register_forward_hook(lambda *given: calls.append(1))
    y = x.detach().clone().requires_grad_()
    model(y).square().sum().backward()
    small(x).square().sum().backward()
    assert len(calls) == 2, "once forward, and once more in the backward pass"
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad - y.grad).norm() <= 1e-10 * y.grad.norm()
