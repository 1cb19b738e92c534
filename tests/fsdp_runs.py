"""Networks, batches and training runs for the checks of models that fully_shard was called on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tdfx

HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)
X = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
ROUNDING = 1e-11
"""A dozen steps in float64 on numbers about 1: some 1e4 roundings of 1e-16, and room for what training amplifies."""


class Block(nn.Module):
    """A residual block whose sizes two processes cannot share evenly."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 33)
        self.down = nn.Linear(33, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.kernel = nn.Parameter(torch.randn(12, 24) / 5)
        self.last = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(F.linear(x, self.kernel))  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Many layers of one size, none of which is much of the model."""

    layers = 32
    bytes_in_float64 = layers * 64 * 64 * 8

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def net() -> Any:
    torch.manual_seed(0)
    return Net().double()


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01)


def sharded(model: nn.Module | None = None, mesh: DeviceMesh | None = None, **settings: Any) -> Any:
    """Call fully_shard on a model and each of its blocks."""
    model = net() if model is None else model
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def full(tensor: Any) -> Tensor:
    """Return a copy of a tensor with all its values."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in model.state_dict().items()}


def distance(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference between two state_dicts with the same keys."""
    assert list(state) == list(other), (list(state), list(other))
    return max(float((state[name] - other[name]).abs().max()) for name in state)


def batches(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield (
            torch.randn(8, 16, generator=generator, dtype=torch.float64),
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
        )


def train(model: nn.Module, optimizer: Optimizer, seed: int, *, halves: bool, count: int = 3) -> None:
    """Train on whole batches, or each process on its half: the mean of the halves' gradients is the whole's."""
    for x, y in batches(seed, count):
        if halves:
            half = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
            x, y = x[half], y[half]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


@dataclass
class Run:
    """What a training run gave: the two models, and their values as they were at the end of their training."""

    small: nn.Module
    dense: nn.Module
    factorized: dict[str, Tensor]
    merged: dict[str, Tensor]


def training_run(
    model: nn.Module,
    build_optimizer: Callable[[Any], Optimizer],
    *,
    halves: bool,
    carry: bool = True,
    policy: tdfx.Policy = HALF,
) -> Run:
    """Train, rewrite, train, merge and train.

    Args:
        model: The model.
        build_optimizer: Makes the optimizer of some parameters.
        halves: Whether each process trains on its half of a batch.
        carry: Whether the optimizer keeps its state over the rewrite.
        policy: What to rewrite.
    """
    optimizer = build_optimizer(model.parameters())
    train(model, optimizer, 1, halves=halves)
    small = tdfx.rewrite(model, policy, example_inputs=X, optimizer=optimizer, emit="modules")
    if not carry:
        optimizer.state.clear()
    train(small, optimizer, 2, halves=halves)
    factorized = values(small)
    dense = tdfx.merge(small, optimizer=optimizer)
    train(dense, optimizer, 3, halves=halves)
    return Run(small, dense, factorized, values(dense))


def assert_same_runs(sharded_run: Run, single_run: Run) -> None:
    """Assert that a run on two processes ends where the run on one process ends."""
    assert distance(sharded_run.factorized, single_run.factorized) < ROUNDING
    assert distance(sharded_run.merged, single_run.merged) < ROUNDING


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the most bytes alive at once in the plain tensors that operations have made under this mode.

    What a DTensor holds is not counted: it is this process's own part.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.references: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if type(leaf) is Tensor}
        given -= set(map(_address, self._alive()))
        result = func(*args, **(kwargs or {}))
        self.references += [
            weakref.ref(leaf) for leaf in tree_leaves(result) if type(leaf) is Tensor and _address(leaf) not in given
        ]
        sizes = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in self._alive()}
        self.peak = max(self.peak, sum(sizes.values()))
        return result

    def _alive(self) -> list[Tensor]:
        self.references = [reference for reference in self.references if reference() is not None]
        return [tensor for reference in self.references if (tensor := reference()) is not None]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
