"""Networks, batches and training runs for the checks of models in DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from two_processes import on_both

import tdfx

DDP: Any = DistributedDataParallel

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
ROUNDING = 1e-11
"""A dozen steps in float64 on numbers about 1: some 1e4 roundings of 1e-16, and room for what training amplifies."""


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(72, 24), nn.Tanh(), nn.Linear(24, 5)
    ).double()


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=3e-3)


def batches(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(8, 3, 3, 3, generator=generator, dtype=torch.float64),
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
        )


def half(x: Tensor) -> Tensor:
    """Return this process's half of a batch."""
    return x[4 * dist.get_rank() : 4 * dist.get_rank() + 4]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    return (model(x) - y).square().mean()


def train(model: nn.Module, optimizer: Optimizer, seed: int, count: int = 4) -> None:
    """Train on whole batches, or each process on its half: the mean of the halves' gradients is the whole's."""
    for x, y in batches(seed, count):
        if isinstance(model, DistributedDataParallel):
            x, y = half(x), half(y)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()


def training_run(
    model: nn.Module, build_optimizer: Callable[[Any], Optimizer], *, carry: bool = True
) -> tuple[Any, Any]:
    """Train, rewrite, train, merge and train; return the factorized and the merged model.

    Args:
        model: The model.
        build_optimizer: Makes the optimizer of some parameters.
        carry: Whether the optimizer keeps its state over the rewrite.
    """
    optimizer = build_optimizer(model.parameters())
    train(model, optimizer, 1)
    small = tdfx.rewrite(model, HALF, example_inputs=next(batches(9, 1))[0], optimizer=optimizer)
    assert_same_bits(small, optimizer)
    if not carry:
        optimizer.state.clear()
    train(small, optimizer, 2, 10)
    assert_same_bits(small, optimizer)
    dense = tdfx.merge(small, optimizer=optimizer)
    assert_same_bits(dense, optimizer)
    train(dense, optimizer, 3)
    return small, dense


def assert_same_bits(model: nn.Module, optimizer: Optimizer) -> None:
    """Assert that parameters, buffers and optimizer state are the same bits on both processes."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    first, second = on_both([tensor.detach().numpy().tobytes() for tensor in tensors])
    assert first == second


def distance(model: nn.Module, other: nn.Module) -> float:
    """Return the largest difference between two models' values."""
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def assert_whole_batch_gradients(wrapped: Any, seed: int) -> None:
    """Assert that a backward pass, each process on its half of a batch, gives the gradients of the whole batch."""
    x, y = next(batches(seed, 1))
    loss_of(wrapped, half(x), half(y)).backward()
    expected = torch.autograd.grad(loss_of(wrapped.module, x, y), list(wrapped.parameters()))
    for parameter, gradient in zip(wrapped.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() < ROUNDING
