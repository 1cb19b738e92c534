"""Networks, training runs and the independent reference for the tests of Moments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdfx

Rows = list[tuple[np.ndarray, np.ndarray]]


class Net(nn.Module):
    """Convolutions of several kinds, a ReLU in place, dropout, and a linear map over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, groups=3)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = F.relu(self.norm(self.up(self.grouped(x))), inplace=True)
        x = F.relu(self.mix(x.flatten(2).mT), inplace=True)
        return self.head(F.dropout(x, 0.2, self.training).mean(1))  # type: ignore[no-any-return]


LAYERS = {"first": 1, "grouped": 2, "up": 3, "mix": 1, "head": 1}
"""Layer of ``Net`` -> its groups."""


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    shapes = (6, 3, 9, 7), (6, 4)
    return [tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes) for _ in range(count)]  # type: ignore[misc]


def net(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return Net().to(dtype)


def train(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]], *, lr: float = 0.05) -> list[float]:
    """Train as a user does; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def rows_of(x: Tensor, layer: nn.Module) -> np.ndarray:
    values = x.detach().double().numpy()
    values = values if isinstance(layer, nn.Linear) else np.moveaxis(values, 1, -1)
    return values.reshape(-1, values.shape[-1])


@contextmanager
def all_rows(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Rows]]:
    """Record all rows of the inputs and output gradients of some layers, call by call."""
    record: dict[str, Rows] = {name: [] for name in names}

    def watch(name: str, layer: Any) -> Any:
        forward = type(layer).forward

        def run(x: Tensor) -> Tensor:
            output = forward(layer, x)
            if output.requires_grad:
                rows = rows_of(x, layer)
                output = output.clone()  # so that nothing in place reaches the tensor that is watched
                output.register_hook(lambda gradient: record[name].append((rows, rows_of(gradient, layer))))
            return output  # type: ignore[no-any-return]

        return run

    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.forward = watch(name, layer)
    yield record
    for layer in layers.values():
        del layer.forward


def reference(calls: Rows, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both moments, each call being a unit of its own."""
    rows = sum(len(x) for x, _ in calls)
    inputs, outputs = np.zeros(()), np.zeros(())
    for x, gradient in calls:
        inputs = inputs + blocks(x, groups) / rows
        moment = blocks(gradient, groups)
        mean = np.mean([np.diag(block).mean() for block in moment])
        outputs = outputs + moment / mean * len(x) / rows
    return inputs, outputs


def blocks(rows: np.ndarray, groups: int) -> np.ndarray:
    return np.stack([part.T @ part for part in np.split(rows, groups, axis=1)])


def assert_moments(moments: tdfx.Moments, record: dict[str, Rows], tolerance: float, groups: Any = LAYERS) -> None:
    for name, calls in record.items():
        assert calls
        found = moments.of(f"{name}.weight")
        assert found is not None
        assert found.samples == sum(len(x) for x, _ in calls)
        for value, expected in zip((found.inputs, found.outputs), reference(calls, groups[name]), strict=True):
            assert value is not None
            assert value.shape == expected.shape
            error = np.abs(value.double().numpy() - expected).max() / np.abs(expected).max()
            assert error < tolerance, (name, error)


def run_twice(
    train_once: Callable[[nn.Module], list[float]], build: Callable[[], Any] = net
) -> tuple[Any, tdfx.Moments]:
    """Train with and without Moments; assert the same bits of losses, parameters, buffers and random generators."""
    results: list[Any] = []
    moments = None
    for attached in (False, True):
        model = build()
        torch.manual_seed(1)
        if attached:
            moments = tdfx.Moments(model, _share=1.0)
        losses = train_once(model)
        state = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
        results.append((losses, state, torch.get_rng_state().numpy().tobytes(), random.getstate()))
    assert results[0] == results[1]
    assert moments is not None
    moments.remove()
    return model, moments


class Scaled(nn.Linear):
    """A layer that is no stock layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2


class Functional(nn.Module):
    """Parameters that functions take, one of them in a layer, a layer called twice, and a layer with its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3) / 3)
        self.matrix = nn.Parameter(torch.randn(5, 6) / 3)
        self.scaled = Scaled(5, 5)
        self.twice = nn.Linear(5, 5)
        self.outside = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, self.kernel, groups=2, padding=1)
        x = F.linear(x.mT, weight=self.matrix)
        x = F.linear(self.scaled(x), self.outside.weight)
        return self.twice(torch.tanh(self.twice(x)))  # type: ignore[no-any-return]


def functional() -> Any:
    torch.manual_seed(0)
    return Functional().double()


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 6, 9, dtype=torch.float64, generator=generator) for _ in range(2)]


def functional_moments(model: Any) -> tdfx.Moments:
    with tdfx.Moments(model, _share=1.0) as moments:
        for x in sequences():
            model(x).square().mean().backward()
    return moments
