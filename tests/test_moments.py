"""Moments: the values, computed here in float64 from all rows, and a training that is the same bits with and without."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tdfx
from tdfx.distributed.processes import Solo
from tdfx.factors.moments import LARGEST_SIDE, sample_rows, second_moment
from tdfx.passes.analysis.guard import watch_custom_functions
from tdfx.passes.analysis.sandbox import random_states

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
    inputs, outputs = 0.0, 0.0
    for x, gradient in calls:
        inputs = inputs + blocks(x, groups) / rows
        moment = blocks(gradient, groups)
        mean = np.mean([np.diag(block).mean() for block in moment])
        outputs = outputs + moment / mean * len(x) / rows
    return np.asarray(inputs), np.asarray(outputs)


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


def test_the_moments_are_those_of_all_rows() -> None:
    model = net(torch.float64)
    data = batches(3, torch.float64)
    moments = tdfx.Moments(model, _share=1.0)
    # An own forward on a layer makes it another's, so the reference watches a copy that takes the same steps.
    other = copy.deepcopy(model)
    train(model.eval(), data)
    with all_rows(other, list(LAYERS)) as record:
        train(other.eval(), data)
    assert moments.units == 3
    assert_moments(moments, record, 1e-13)
    found = moments.of("grouped.weight")
    assert found is not None
    assert found.inputs is not None
    assert found.inputs.dtype == torch.float64
    assert found.inputs.shape == (2, 4, 4)
    assert moments.of("norm.weight") is None
    assert moments.of("nothing") is None


def test_a_wrong_reference_is_seen() -> None:
    model, other = net(torch.float64), net(torch.float64)
    moments = tdfx.Moments(model, _share=1.0)
    train(model.eval(), batches(3, torch.float64))
    with all_rows(other, ["mix"]) as record:
        train(other.eval(), batches(3, torch.float64), lr=0.06)
    with pytest.raises(AssertionError):
        assert_moments(moments, record, 1e-13)


def test_training_is_the_same_bits_with_dropout_and_operations_in_place() -> None:
    _, moments = run_twice(lambda model: train(model, batches(4)))
    assert moments.units == 4


def test_a_training_that_differs_is_seen() -> None:
    rates = iter((0.05, 0.051))
    with pytest.raises(AssertionError):
        run_twice(lambda model: train(model, batches(2), lr=next(rates)))


def test_under_autocast_products_are_in_float32() -> None:
    def train_once(model: nn.Module) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            return train(model, batches(3))

    _, moments = run_twice(train_once)
    found = moments.of("mix.weight")
    assert found is not None
    assert found.inputs is not None
    assert found.inputs.dtype == torch.float32
    # The products of bfloat16 numbers, summed in float32; in bfloat16 they would be no closer to float64 than 1e-3.
    model, other = net(), net()
    moments = tdfx.Moments(model.eval(), _share=1.0)
    train_once(model)
    with all_rows(other.eval(), ["mix"]) as record:
        train_once(other)
    assert_moments(moments, record, 1e-5)


def test_accumulated_gradients_are_units_of_their_own() -> None:
    def accumulate(model: nn.Module) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for index, (x, y) in enumerate(batches(4)):
            ((model(x) - y).square().mean() / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.sum().item() for parameter in model.parameters()]

    _, moments = run_twice(accumulate)
    assert moments.units == 4


def test_the_scale_of_the_loss_does_not_matter() -> None:
    def moments_at(scale: float) -> tdfx.Moments:
        model = net().eval()
        with tdfx.Moments(model, _share=1.0) as moments:
            for x, y in batches(2):
                ((model(x) - y).square().mean() * scale).backward()
        return moments

    plain, scaled = moments_at(1.0), moments_at(2.0**16)
    for name in LAYERS:
        one, other = plain.of(f"{name}.weight"), scaled.of(f"{name}.weight")
        assert one is not None
        assert other is not None
        assert one.outputs is not None
        assert other.outputs is not None
        assert torch.equal(one.outputs, other.outputs)
        assert one.outputs.diagonal(dim1=1, dim2=2).mean() == pytest.approx(1.0, rel=1e-5)


def test_a_unit_with_infinite_gradients_is_left_out() -> None:
    model = net().eval()
    moments = tdfx.Moments(model)
    (x, y), (other_x, other_y) = batches(2)
    ((model(x) - y).square().mean() * math.inf).backward()
    assert moments.units == 0
    assert moments.of("head.weight") is None
    (model(other_x) - other_y).square().mean().backward()
    assert moments.units == 1
    assert moments.nonfinite == {f"{name}.weight": 1 for name in LAYERS}
    assert len(moments.batches) == 1
    assert torch.equal(moments.batches[0][0][0], other_x)


def test_only_the_sites_with_infinite_values_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    moments = tdfx.Moments(model)
    hidden = model[0](torch.randn(8, 4))
    model[1](hidden.detach() * math.nan).sum().backward()
    hidden.sum().backward()
    assert moments.units == 1
    assert moments.of("0.weight") is not None
    assert moments.of("1.weight") is None
    assert dict(moments.nonfinite) == {"1.weight": 1}


def test_validation_and_frozen_parts_are_not_recorded() -> None:
    model = net()
    model.first.requires_grad_(False)
    moments = tdfx.Moments(model)
    (x, y), *_ = batches(1)
    (model(x) - y).square().mean().backward()
    with torch.no_grad():
        model(x * 100)
    with torch.inference_mode():
        model(x * 100)
    assert moments.units == 1
    assert moments.of("first.weight") is None
    assert moments.of("grouped.weight") is not None
    assert len(moments.batches) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_checkpointed_blocks_count_once(reentrant: bool, root: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.grouped(F.relu(self.first(x), inplace=True))
            return checkpoint(self.rest, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

        def rest(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.up(x)), inplace=True)
            x = F.relu(self.mix(x.flatten(2).mT), inplace=True)
            return self.head(F.dropout(x, 0.2, self.training).mean(1))  # type: ignore[no-any-return]

    def build() -> Any:
        torch.manual_seed(0)
        return (Net() if root else Checkpointed()).double().eval()

    def train_once(model: nn.Module) -> list[float]:
        call: Any = (lambda x: checkpoint(model, x, use_reentrant=reentrant)) if root else model
        losses = []
        for x, y in batches(3, torch.float64):
            loss = (call(x.requires_grad_()) - y).square().mean()
            loss.backward()
            losses.append(loss.item())
        return losses

    _, moments = run_twice(train_once, build)
    other = net(torch.float64).eval()
    with all_rows(other, list(LAYERS)) as record:
        for x, y in batches(3, torch.float64):
            (other(x) - y).square().mean().backward()
    assert moments.units == 3
    assert_moments(moments, record, 1e-13)
    assert len(moments.batches) == 3
