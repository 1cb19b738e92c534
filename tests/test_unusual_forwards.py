"""Forwards that take gradients, write to parameters by a library's function, hold proxies, wrapped or scripted layers."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)


class Net(nn.Module):
    """Two linear layers, and what a case needs beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.start()

    def start(self) -> None:
        pass

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x))


class TakesGradients(Net):
    def forward(self, x: Tensor) -> Any:
        point = (x * 0.5).requires_grad_(True)
        (slope,) = torch.autograd.grad(self.a(point).square().sum(), point, create_graph=True)
        return self.b(x) + slope


class Yields(Net):
    def forward(self, x: Tensor) -> Iterator[Any]:
        yield self.a(x)
        yield self.b(x)


class Synchronizes(Net):
    def start(self) -> None:
        self.target = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        self.target.load_state_dict(self.a.state_dict())
        return self.b(x) + self.target(x).detach()


class HoldsItsParent(Net):
    def start(self) -> None:
        self.block = Child()
        self.block.__dict__["parent"] = weakref.proxy(self)  # as an attribute it would become a child

    def forward(self, x: Tensor) -> Any:
        return self.block(self.a(x))


class Child(nn.Module):
    parent: Any

    def forward(self, x: Tensor) -> Any:
        return self.parent.b(x).relu()


class HasDefaults(Net):
    def start(self) -> None:
        self.first: Any = lambda x, layer=self.a: layer(x)
        self.second: Any = lambda x, *, layer=self.b: layer(x)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


class Maps(Net):
    def start(self) -> None:
        self.each = torch.vmap(self.a)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.each(x))


class HasScript(Net):
    def start(self) -> None:
        with warnings.catch_warnings(action="ignore"):
            self.script = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def forward(self, x: Tensor) -> Any:
        return self.b(self.script(self.a(x)))


class Restarts(Net):
    def forward(self, x: Tensor) -> Any:
        if len(x) > 100:
            self.b.reset_parameters()
        return self.b(self.a(x))


class Widens(Net):
    def start(self) -> None:
        self.convolution = nn.Conv1d(4, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Any:
        self.convolution.dilation = (2,)
        y = self.convolution(x)
        self.convolution.dilation = (1,)
        return self.b(self.a(y))


LEAST: dict[type[Net], int] = {
    TakesGradients: 2,
    Yields: 2,
    Synchronizes: 1,
    HoldsItsParent: 2,
    HasDefaults: 2,
    Maps: 1,
    HasScript: 2,
    Restarts: 1,
    Widens: 2,
}
"""Model -> sites that are factorized at least."""


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("emit", ["graph", "modules"])
@pytest.mark.parametrize("make", LEAST)
def test_such_a_model_is_rewritten(make: type[Net], emit: tdfx.Emit, given: bool) -> None:
    torch.manual_seed(0)
    dense = make().double()
    torch.manual_seed(0)
    model = make().double()
    x = torch.rand(4, 8, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    low = tdfx.rewrite(model, FULL, example_inputs=(x,) if given else None, emit=emit)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if given:
        assert sum(isinstance(module, tdfx.Factorized) for module in low.modules()) >= LEAST[make]
    del model  # which only a proxy of the original's would need
    for module in (low, tdfx.merge(low)):
        outputs, expected = (each(x) for each in (module, dense))
        if make is Yields:
            outputs, expected = list(outputs), list(expected)
        torch.testing.assert_close(outputs, expected)


class Renormalizes(Net):
    def start(self) -> None:
        self.table = nn.Embedding(8, 8, max_norm=0.1)
        self.plain = nn.Parameter(torch.rand(8, 8) + 1)

    def forward(self, x: Tensor) -> Any:
        index = torch.arange(4)
        rows = self.table(index) + F.embedding(index, self.plain, max_norm=0.1)
        return self.b(self.a(x)) + rows


class Initializes(Net):
    def forward(self, x: Tensor) -> Any:
        nn.init.constant_(self.b.bias, 0.5)
        F.relu(self.a.bias, inplace=True)
        return self.b(self.a(x))


@pytest.mark.parametrize("make", [Renormalizes, Initializes])
def test_planning_changes_no_parameter_that_a_function_of_torch_writes_to(make: type[Net]) -> None:
    model = make()
    with torch.no_grad():
        model.a.bias.sub_(1)
    before = copy.deepcopy(model.state_dict())
    tdfx.plan(model, FULL, example_inputs=(torch.rand(4, 8),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Sends(Net):
    def start(self) -> None:
        def echo() -> Any:
            value = 0
            while True:
                value = yield value

        self.echo = echo()
        next(self.echo)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x)) * self.echo.send(2)


def test_the_error_for_a_generator_that_cannot_be_set_back_does_not_blame_the_inputs() -> None:
    with pytest.raises(tdfx.ModelError, match="Sends cannot be run without a trace: its forward sends values"):
        tdfx.plan(Sends(), FULL, example_inputs=(torch.rand(4, 8),))


class Reads(Net):
    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x.to(self.a.weight.dtype))) * self.a.weight.shape[0]


def test_a_forward_that_reads_the_weight_of_factors_is_traced_by_torch_jit() -> None:
    x = torch.rand(4, 8)
    low = tdfx.rewrite(Reads(), FULL)
    with warnings.catch_warnings(action="ignore"):
        traced: Any = torch.jit.trace(low, (x,))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(x), low(x))


class Functional(Net):
    def forward(self, x: Tensor) -> Any:
        return self.b(F.linear(x, self.a.weight, self.a.bias)) @ self.w

    def start(self) -> None:
        self.w = nn.Parameter(torch.rand(8, 8))


def test_torch_jit_script_of_a_factorized_parameter_says_what_to_do() -> None:
    low = tdfx.rewrite(Functional(), FULL)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(tdfx.ModelError, match=r"torch.jit.script cannot compile .* Use torch.jit.trace or torch.export"),
    ):
        torch.jit.script(low)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Embedding(16, 8, sparse=True), nn.Linear(8, 8)

    def forward(self, index: Tensor) -> Any:
        return self.a(self.table(index))


def test_gradients_of_sparse_layout_are_compared() -> None:
    index = torch.arange(4)
    model = Sparse()
    low = tdfx.rewrite(model, FULL, example_inputs=(index,))
    torch.testing.assert_close(low(index), model(index))
