"""Planning runs a forward: objects of libraries, settings of the process and iterators are afterwards what they were."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import functools
import itertools
import multiprocessing.sharedctypes
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
TOLERANCE = 1e-9  # relative, in float64: a few products of sixteen terms
X = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Uses something that it keeps, between two layers."""

    def __init__(self, kept: Any, use: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.kept, self.use = kept, use
        self.double()

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        factor = self.use(self.kept)
        return self.b(y) * (1.0 if factor is None else factor)


def add_one(number: Any) -> None:
    number.value += 1


class Counted:
    n = 0


COUNTED = Counted()
LOCK: Any = threading.RLock()  # one between processes would start another process


def count_on_a_library(_: Any) -> None:
    np.calls_of_a_test = getattr(np, "calls_of_a_test", 0) + 1  # type: ignore[attr-defined]


def bump(counted: Any) -> None:
    counted.n += 1


def append(log: list[int]) -> None:
    log.append(1)


def inner_optimizer() -> Any:
    code = nn.Parameter(torch.zeros(2))
    return torch.optim.SGD([code], lr=0.1, momentum=0.9)


def step(optimizer: Any) -> None:
    (code,) = optimizer.param_groups[0]["params"]
    code.grad = torch.ones(2)
    optimizer.step()


def inner_state(optimizer: Any) -> Any:
    (code,) = optimizer.param_groups[0]["params"]
    return code.tolist(), len(optimizer.state)


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "number of C": (lambda: ctypes.c_int(0), add_one, lambda number: number.value),
    "shared number": (
        lambda: multiprocessing.sharedctypes.synchronized(ctypes.c_int(0), LOCK),
        add_one,
        lambda number: number.value,
    ),
    "memory": (lambda: memoryview(bytearray(1)), lambda view: view.__setitem__(0, 5), bytes),
    "dict in order": (
        lambda: OrderedDict(a=1, b=2),
        lambda cache: cache.__setitem__("c", cache.popitem(last=False)),
        lambda cache: list(cache.items()),
    ),
    "event": (threading.Event, lambda event: event.set(), lambda event: event.is_set()),
    "semaphore": (threading.Semaphore, lambda free: free.release(), lambda free: free._value),
    "namespace": (lambda: argparse.Namespace(n=0), bump, lambda space: space.n),
    "exit stack": (
        contextlib.ExitStack,
        lambda stack: stack.callback(print) and None,
        lambda stack: len(stack._exit_callbacks),
    ),
    "low-discrepancy sequence": (
        lambda: torch.quasirandom.SobolEngine(2),  # type: ignore[no-untyped-call]
        lambda engine: engine.draw(1).sum().item(),
        lambda engine: (engine.num_generated, engine.quasi.tolist()),
    ),
    "optimizer": (inner_optimizer, step, inner_state),
    "argument of a partial function": (
        lambda: functools.partial(append, []),
        lambda function: function(),
        lambda function: list(function.args[0]),
    ),
    "weak reference": (lambda: weakref.ref(COUNTED), lambda reference: bump(reference()), lambda _: COUNTED.n),
    "proxy": (lambda: weakref.proxy(COUNTED), bump, lambda _: COUNTED.n),
    "module of a library": (object, count_on_a_library, lambda _: getattr(np, "calls_of_a_test", 0)),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_planning_leaves_objects_of_libraries_as_they_were(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COUNTED, "n", 0)
    monkeypatch.setattr(np, "calls_of_a_test", 0, raising=False)
    make, use, read = HOLDERS[kind]
    kept = make()
    model, before = Net(kept, use), read(kept)
    tdfx.plan(model, FULL, example_inputs=(X,))
    assert read(kept) == before
    model(X)
    assert read(kept) != before


def test_a_file_is_read_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "numbers").write_text("1\n2\n3\n")
    with (tmp_path / "numbers").open() as file:
        model = Net(file, lambda lines: float(lines.readline()))
        rewritten = tdfx.rewrite(model, FULL, example_inputs=(X,))
        rewritten(X)
        assert file.readline() == "2\n"


SETTINGS: dict[str, tuple[Callable[[Any], object], Callable[[], object]]] = {
    "default dtype": (lambda _: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "deterministic": (lambda _: torch.use_deterministic_algorithms(True), torch.get_deterministic_debug_mode),
    "precision": (lambda _: torch.set_float32_matmul_precision("high"), torch.get_float32_matmul_precision),
    "threads": (lambda _: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads),
    "anomalies": (lambda _: torch.set_anomaly_enabled(True), torch.is_anomaly_enabled),
    "cudnn": (lambda _: setattr(torch.backends.cudnn, "benchmark", True), lambda: torch.backends.cudnn.benchmark),
    "floating point": (lambda _: np.seterr(divide="ignore") and None, np.geterr),
    "environment": (lambda _: os.environ.update(OF_A_TEST="2"), lambda: os.environ.get("OF_A_TEST")),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_planning_leaves_settings_of_the_process_as_they_were(kind: str) -> None:
    change, read = SETTINGS[kind]
    before = read()
    with tdfx.passes.analysis.process_settings.settings_kept():  # type: ignore[attr-defined]
        model = Net(None, change)
        tdfx.plan(model, FULL, example_inputs=(X,))
        assert read() == before
        model(X)
        assert read() != before


FOREIGN_ITERATORS: dict[str, Callable[[], Iterator[Any]]] = {
    "csv": lambda: csv.reader(["1", "2", "3", "4", "5", "6"]),
    "data loader": lambda: iter(DataLoader(range(1, 9), batch_size=1)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", FOREIGN_ITERATORS)
def test_an_iterator_of_a_library_gives_what_it_would_have_given(kind: str) -> None:
    dense, model = (Net(FOREIGN_ITERATORS[kind](), lambda numbers: float(next(numbers)[0])) for _ in range(2))
    rewritten = tdfx.rewrite(model, FULL, example_inputs=(X,))
    for _ in range(3):
        torch.testing.assert_close(rewritten(X), dense(X), rtol=TOLERANCE, atol=TOLERANCE)


def averages() -> Any:
    total, count, value = 0.0, 0, 0.0
    while True:
        value = yield total / max(count, 1)
        total, count = total + value, count + 1


def test_a_generator_that_is_sent_values_is_not_run() -> None:
    average = averages()
    next(average)
    model = Net(average, lambda numbers: numbers.send(4.0))
    with pytest.raises(tdfx.ModelError, match="sends values to a generator that it keeps, which cannot be set back"):
        tdfx.plan(model, FULL, example_inputs=(X,))
    rewritten = tdfx.rewrite(model, FULL)
    dense = Net(None, lambda _: 4.0)
    torch.testing.assert_close(rewritten(X), dense(X), rtol=TOLERANCE, atol=TOLERANCE)


class RoundRobin(nn.Module):
    """Uses its layers by turns."""

    def __init__(self, turns: Callable[[Any], Iterator[Any]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.scale = 2.0
        self.turns = turns(self)

    def numbers(self) -> Iterator[Any]:
        while True:
            yield lambda x: x * self.scale

    def forward(self, x: Tensor) -> Any:
        return next(self.turns)(self.layers[0](x))


@pytest.mark.parametrize(
    "turns",
    [
        lambda net: itertools.cycle(net.layers),
        lambda net: iter([net.layers[1]] * 9),
        lambda net: net.numbers(),
        lambda net: map(net.layers[1].forward, itertools.count()),
    ],
    ids=["cycle", "list", "generator of a method", "map of a method"],
)
def test_an_iterator_that_holds_modules_is_refused(turns: Callable[[Any], Iterator[Any]]) -> None:
    model = RoundRobin(turns)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(
        tdfx.ModelError, match=r"RoundRobin keeps an iterator \(.*\) that holds its (Linear|RoundRobin)"
    ):
        tdfx.rewrite(model, FULL)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


class Helper:
    def __init__(self, model: Any) -> None:
        self.model = model

    def first(self, x: Tensor) -> Any:
        return self.model.a(x)


MODELS: dict[str, Any] = {}


class Helped(nn.Module):
    """Calls one of its layers through another object."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.way = way
        if way == "helper":
            self.helper = Helper(self)
        self.holder = SimpleNamespace(first=self.a if way == "namespace" else None)
        MODELS["main"] = self

    def forward(self, x: Tensor) -> Any:
        try:  # no graph, which would see it
            if self.way == "helper":
                return self.b(self.helper.first(x))
            if self.way == "namespace":
                return self.b(self.holder.first(x))
            return self.b(MODELS["main"].a(x))
        finally:
            pass


@pytest.mark.parametrize("inputs", [None, (X,)], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("way", ["helper", "namespace", "registry"])
def test_a_layer_that_is_called_through_another_object_is_kept(way: str, inputs: Any) -> None:
    dense = Helped(way).double()
    rewritten: Any = tdfx.rewrite(dense, FULL, example_inputs=inputs)
    assert not isinstance(rewritten.a, tdfx.Factorized)
    assert rewritten.a.weight is dense.a.weight, "the layer that is called would not train"
    assert isinstance(rewritten.b, tdfx.Factorized)
    assert way != "helper" or rewritten.helper.model is rewritten


def test_a_run_sees_what_the_source_does_not_tell() -> None:
    model = Net(None, lambda _: None)
    MODELS["layers"] = [model.a, model.b]  # nothing of the model holds them
    model.use = lambda number: (MODELS["layers"] if number is None else []).pop(0)(X).mean()
    rewritten: Any = tdfx.rewrite(model, FULL, example_inputs=(X,))
    assert not isinstance(rewritten.a, tdfx.Factorized)
    assert isinstance(rewritten.b, tdfx.Factorized)


class Closing(nn.Linear):
    def __del__(self) -> None:
        pass


def test_a_finalizer_is_warned_of() -> None:
    with pytest.warns(tdfx.TdfxWarning, match=r"Closing has a __del__\(\), which Python calls for each copy"):
        tdfx.plan(nn.Sequential(Closing(16, 16), nn.ReLU()), FULL)
