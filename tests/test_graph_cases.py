"""Forwards that a trace does not see all of: a graph is given only where it does what the model's own code does."""

from __future__ import annotations

import array
import copy
import functools
import heapq
import inspect
import io
import itertools
import queue
import random
import threading
from collections import UserDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import tdfx
from tdfx.passes.analysis import shapes

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
TOLERANCE = 1e-9  # relative, in float64: a few products of sixteen terms
LOG: list[Tensor] = []
ACTIVATION = nn.GELU()
NUMBERS = itertools.count()


class Pair(nn.Module):
    """Two linear layers, and what a forward may keep."""

    last: Any = None
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.kept: dict[str, Any] = {}
        self.window: deque[Any] = deque(maxlen=2)
        self.context = SimpleNamespace(value=None)
        self.counts = np.zeros(1)
        self.dice = random.Random(0)
        self.rng = np.random.default_rng(0)
        self.tune = True


def model_of(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    model: Pair = type("Net", (Pair,), {"forward": forward})()
    return model.double()


def batch(seed: int = 1) -> Tensor:
    return torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def adds_to_a_second_name(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    kept = y
    y += x
    return self.b(y) + kept


def adds_to_a_view(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    part = y[:, :4]
    part *= 2
    return self.b(y)


def collects(self: Any, x: Tensor) -> Tensor:
    found = []
    for layer in (self.a, self.b):
        x = layer(x)
        found.append(x)
    named = {"all": torch.stack(found)}
    named["sum"] = named["all"].sum(0)
    return named["sum"]


def branches_on_configuration(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    if self.tune and self.last is None and isinstance(self.b, nn.Linear):
        y = self.b(y)
    return y


def multiplies_a_transposed_view(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    part = y.T
    part *= 2
    part = y.real.data
    part += 1
    return self.b(y)


def asks_before_it_changes(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    shape, axes, version = y.shape, y.ndim, y._version
    y.unsqueeze_(0)
    y += axes * shape[0] + version
    z = y.detach().clone()
    trained = z.requires_grad
    z += y
    return self.b(z) * (2.0 + trained)


@pytest.mark.parametrize("inputs", [None, (batch(),)], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize(
    "forward",
    [
        adds_to_a_second_name,
        adds_to_a_view,
        collects,
        branches_on_configuration,
        multiplies_a_transposed_view,
        asks_before_it_changes,
    ],
)
def test_a_graph_repeats_assignments_in_place_and_code_on_configuration(
    forward: Callable[..., Any], inputs: Any
) -> None:
    dense = model_of(forward)
    rewritten = tdfx.rewrite(dense, FULL, example_inputs=inputs)
    assert isinstance(rewritten, fx.GraphModule), tdfx.plan(dense, FULL).notes
    assert any(isinstance(module, tdfx.Factorized) for module in rewritten.modules())
    for _ in range(2):
        torch.testing.assert_close(rewritten(batch()), dense(batch()), rtol=TOLERANCE, atol=TOLERANCE)


def sets_data(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    y.data = y.data.clamp(-0.3, 0.3)
    return self.b(y)


def enters_a_context(self: Any, x: Tensor) -> Any:
    with torch.set_grad_enabled(self.tune):
        y = self.a(x)
    return self.b(y)


@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def is_decorated_by_a_context(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x))


def keeps_in_a_dict(self: Any, x: Tensor) -> Any:
    self.kept["y"] = y = self.a(x)
    return self.b(y)


def keeps_in_a_deque(self: Any, x: Tensor) -> Any:
    window = self.window
    window.append(self.a(x))
    return self.b(window[-1])


def keeps_in_an_object(self: Any, x: Tensor) -> Any:
    self.context.value = y = self.a(x)
    return self.b(y)


def keeps_in_a_global(self: Any, x: Tensor) -> Any:
    LOG.append(self.a(x))
    return self.b(LOG[-1])


def keeps_in_the_class(self: Any, x: Tensor) -> Any:
    type(self).last = y = self.a(x)
    return self.b(y)


def counts_in_an_array(self: Any, x: Tensor) -> Any:
    self.counts[0] += 1
    return self.b(self.a(x)) / float(self.counts[0])


def draws_from_numpy(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) * self.rng.random()


def draws_from_python(self: Any, x: Tensor) -> Any:
    draw = self.dice.random
    return self.b(self.a(x)) * draw()


def asks_for_a_class(self: Any, x: Any) -> Any:
    return self.b(self.a(x[0] if isinstance(x, tuple) else x))


def asks_for_a_type(self: Any, x: Any) -> Any:
    return self.b(self.a(x[0] if type(x) is list else x))


def asks_for_an_attribute(self: Any, x: Any) -> Any:
    return self.b(self.a(getattr(x, "tensors", x)))


def asks_for_a_dtype(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x.double() if x.dtype is torch.uint8 else x))


def helper(x: Any) -> Any:
    return x if x is not None else 0


def asks_in_a_helper(self: Any, x: Tensor) -> Any:
    return self.b(helper(self.a(x)))


def tries(self: Any, x: Tensor) -> Any:
    try:
        count = int(x.shape[0])
    except TypeError:
        count = 1
    return self.b(self.a(x)) / count


def asks_whether_it_is_exported(self: Any, x: Tensor) -> Any:
    y = self.b(self.a(x))
    return y.sigmoid() if torch.compiler.is_exporting() else y


def makes_a_module(self: Any, x: Tensor) -> Any:
    return self.b(nn.ReLU()(self.a(x)))


def calls_a_module_of_the_file(self: Any, x: Tensor) -> Any:
    return self.b(ACTIVATION(self.a(x)))


def reads_a_gradient(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) * (1 if self.a.weight.grad is None else 2)


@dataclass
class Result:
    y: Any


def makes_a_result(self: Any, x: Tensor) -> Any:
    return Result(self.b(self.a(x))).y


UNSAFE = {
    reads_a_gradient: "reads self.a.weight.grad",
    makes_a_result: "makes a Result, an object that a graph cannot make again",
    sets_data: "assigns to an attribute, y.data",
    enters_a_context: "enters a context by with",
    is_decorated_by_a_context: "enters autocast",
    keeps_in_a_dict: "assigns to an item, self.kept['y']",
    keeps_in_a_deque: "changes a container by append()",
    keeps_in_an_object: "assigns to an attribute, self.context.value",
    keeps_in_a_global: "changes a container by append()",
    keeps_in_the_class: "assigns to an attribute, type(self).last",
    counts_in_an_array: "assigns to an item, self.counts[0]",
    draws_from_numpy: "calls Generator.random()",
    draws_from_python: "calls random()",
    asks_for_a_class: "asks for isinstance(x, tuple)",
    asks_for_a_type: "asks whether type(x) is list",
    asks_for_an_attribute: "asks for getattr(x, 'tensors', x)",
    asks_for_a_dtype: "asks whether x.dtype is torch.uint8",
    asks_in_a_helper: "asks whether x is not None",
    tries: "uses try",
    asks_whether_it_is_exported: "calls is_exporting()",
    makes_a_module: "makes a ReLU",
    calls_a_module_of_the_file: "calls a GELU that is no submodule",
}


@pytest.mark.parametrize("block", [False, True], ids=["model", "block"])
@pytest.mark.parametrize("forward", UNSAFE)
def test_code_that_is_not_known_to_be_safe_runs_as_it_is(forward: Callable[..., Any], block: bool) -> None:
    dense: nn.Module = model_of(forward)
    if block:
        dense = nn.Sequential(dense, nn.Linear(16, 4)).double()
    twin = copy.deepcopy(dense)
    LOG.clear()
    plan = tdfx.plan(dense, FULL, example_inputs=(batch(),))
    (note,) = plan.notes
    assert UNSAFE[forward] in note
    assert f"{__name__.rpartition('.')[2]}.py:" in note or "enters autocast" in note or "no submodule" in note
    assert plan.emit == ("graph" if block else "modules")
    assert not LOG
    rewritten = tdfx.rewrite(dense, FULL, example_inputs=(batch(),))
    assert any(isinstance(module, tdfx.Factorized) for module in rewritten.modules())
    for _ in range(3):
        torch.testing.assert_close(rewritten(batch()), twin(batch()), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("forward", [keeps_in_a_dict, keeps_in_an_object, keeps_in_a_deque, counts_in_an_array])
def test_planning_leaves_what_the_model_keeps_as_it_was(forward: Callable[..., Any]) -> None:
    model: Any = model_of(forward)
    draws = model.rng.bit_generator.state, model.dice.getstate()
    for inputs in (None, (batch(),)):
        tdfx.plan(model, FULL, example_inputs=inputs)
    assert (model.kept, list(model.window), model.context.value, float(model.counts[0])) == ({}, [], None, 0.0)
    assert (model.rng.bit_generator.state, model.dice.getstate()) == draws


class Tally:
    n = 0


class TallyKind(type):
    n = 0


class Dice(random.Random):
    n = 0


class Slotted:
    __slots__ = ("n",)


NAMED_BY_A_TEXT = 0


def adds_by_a_text(holder: Any) -> None:
    globals()["NAMED_BY_A_TEXT"] += 1


def adds_one(holder: Any) -> None:
    holder.n = getattr(holder, "n", 0) + 1


def reads_n(holder: Any) -> Any:
    return getattr(holder, "n", 0)


def uses_a_holder(self: Any, x: Tensor) -> Any:
    self.use(self.holder)
    return self.b(self.a(x))


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "class": (lambda: Tally, adds_one, reads_n),
    "new in a class": (lambda: type("New", (), {}), adds_one, reads_n),
    "metaclass": (lambda: TallyKind, adds_one, reads_n),
    "function": (lambda: lambda: None, adds_one, reads_n),
    "empty slot": (Slotted, adds_one, reads_n),
    "global by a text": (object, adds_by_a_text, lambda holder: NAMED_BY_A_TEXT),
    "thread": (threading.local, adds_one, reads_n),
    "random generator": (lambda: Dice(0), adds_one, reads_n),
    "mapping": (UserDict, lambda holder: holder.update(n=1), dict),
    "queue": (queue.Queue, lambda holder: holder.put(1), lambda holder: holder.qsize()),
    "text": (io.StringIO, lambda holder: holder.write("x"), lambda holder: holder.getvalue()),
    "array": (lambda: array.array("d"), lambda holder: holder.append(1.0), list),
    "context variable": (lambda: ContextVar("n", default=0), lambda holder: holder.set(1), lambda holder: holder.get()),
    "cache": (lambda: functools.cache(float), lambda holder: holder(3), lambda holder: holder.cache_info()),
    "context": (
        lambda: torch.autocast("cpu", enabled=False),
        lambda holder: holder.__enter__(),
        lambda c: set(vars(c)),
    ),
}


def entered_autocasts() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


@pytest.mark.parametrize("kind", HOLDERS)
def test_planning_leaves_what_other_objects_hold_as_it_was(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, use, read = HOLDERS[kind]
    for holder in (Tally, TallyKind):
        monkeypatch.setattr(holder, "n", 0)
    model: Any = model_of(uses_a_holder)
    model.holder, model.use = make(), use
    monkeypatch.setitem(globals(), "NAMED_BY_A_TEXT", 0)
    before, entered = read(model.holder), entered_autocasts()
    tdfx.plan(model, FULL, example_inputs=(batch(),))
    assert read(model.holder) == before
    assert entered_autocasts() == entered  # or else autocast keeps its narrow copies of weights for ever
    model(batch())
    assert read(model.holder) != before
    if kind == "context":
        model.holder.__exit__(None, None, None)
    assert entered_autocasts() == entered


TOTAL = 0


def through_a_second_name(self: Any) -> None:
    kept = self.kept
    kept["n"] += 1


def add_to(kept: dict[str, int]) -> None:
    kept["n"] += 1


def through_a_helper(self: Any) -> None:
    add_to(self.kept)


def by_a_library(self: Any) -> None:
    heapq.heappush(self.order, 1)


def in_a_global(self: Any) -> None:
    global TOTAL
    TOTAL += 1


class Keeper(nn.Module):
    """Changes what its parent reads."""

    def __init__(self, kept: dict[str, int], order: list[int], change: Callable[[Any], None]) -> None:
        super().__init__()
        self.kept, self.order, self.change = kept, order, change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return x


class Reading(Pair):
    """Reads what others change: a block, a hook, or its own ``train``."""

    def __init__(self, way: Callable[..., None] | str) -> None:
        super().__init__()
        self.kept, self.order, self.phase = {"n": 0}, [0], 1
        self.block = Keeper(self.kept, self.order, way) if callable(way) else nn.Identity()
        if way == "hook":
            self.a.register_forward_hook(lambda *_: in_a_global(None))
        self.follows = way == "train"

    def train(self, mode: bool = True) -> Any:
        if getattr(self, "follows", False):
            self.phase = 1 + mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.b(self.block(self.a(x))) * (self.kept["n"] + len(self.order) + TOTAL + self.phase)


@pytest.mark.parametrize(
    "way",
    [through_a_second_name, through_a_helper, by_a_library, in_a_global, "hook", "train"],
    ids=lambda way: getattr(way, "__name__", way),
)
def test_what_other_code_changes_is_read_when_the_model_runs(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "TOTAL", 0)
    dense = Reading(way).double()
    models = copy.deepcopy(dense), tdfx.rewrite(dense, FULL)
    results: list[list[Tensor]] = []
    for model in models:
        globals()["TOTAL"] = 0
        results.append([model.train(mode)(batch()).detach() for mode in (True, True, False)])
    torch.testing.assert_close(results[1], results[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(results[0][0], results[0][2])


class Doubling(nn.Linear):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


def test_a_call_of_ones_own_runs_once() -> None:
    dense = nn.Sequential(Doubling(16, 16), nn.Linear(16, 4))
    rewritten = tdfx.rewrite(dense.double(), FULL)
    torch.testing.assert_close(rewritten(batch()), dense(batch()), rtol=TOLERANCE, atol=TOLERANCE)


def clamps_a_weight(self: Any, x: Tensor) -> Any:
    self.b.weight.data.clamp_(-0.01, 0.01)
    return self.b(self.a(x))


def test_planning_does_not_run_a_graph_that_writes_to_parameters() -> None:
    model: Any = model_of(clamps_a_weight)
    before = model.b.weight.detach().clone()
    plan = tdfx.plan(model, FULL, example_inputs=(batch(),))
    assert torch.equal(model.b.weight, before)
    assert "changes a parameter" in plan.notes[0]


def numbers_its_calls(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) + next(self.read(self))


NUMBERING: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda net: net.kept_numbers,
    "dict": lambda net: net.kept["numbers"],
    "list": lambda net: net.window[0],
    "object": lambda net: net.context.value,
    "class": lambda net: type(net).numbers,
    "file": lambda net: NUMBERS,
}


@pytest.mark.parametrize("block", [False, True], ids=["model", "block"])
@pytest.mark.parametrize("numbers", ["count", "list"])
@pytest.mark.parametrize("where", NUMBERING)
def test_planning_leaves_iterators_where_they_are(where: str, numbers: str, block: bool, monkeypatch: Any) -> None:
    iterator: Any = itertools.count() if numbers == "count" else iter(list(range(1000)))
    net: Any = model_of(numbers_its_calls)
    net.read = NUMBERING[where]
    net.kept_numbers = net.kept["numbers"] = net.context.value = type(net).numbers = iterator
    net.window.append(iterator)
    monkeypatch.setitem(globals(), "NUMBERS", iterator)
    model = nn.Sequential(net, nn.Linear(16, 4)).double() if block else net
    tdfx.plan(model, FULL, example_inputs=(batch(),))
    assert NUMBERING[where](net) is iterator
    model(batch())
    assert next(iterator) == 1, "planning moved it, or the model does not"


class Outer(nn.Module):
    """Adds what its block has put aside."""

    def __init__(self) -> None:
        super().__init__()
        self.block: Any = model_of(keeps_in_an_object)
        self.head = nn.Linear(16, 4).double()

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.block(x))
        return y, self.block.context.value


def test_what_a_block_leaves_for_its_parent_is_read_when_the_model_runs() -> None:
    dense = Outer()
    rewritten = tdfx.rewrite(dense, FULL)
    torch.testing.assert_close(rewritten(batch())[1], dense(batch())[1], rtol=TOLERANCE, atol=TOLERANCE)


def test_code_without_a_source_gives_no_graph() -> None:
    names: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.b(self.a(x))\n", names)
    (note,) = tdfx.plan(model_of(names["forward"]), FULL).notes
    assert "its forward runs forward(), whose source cannot be had" in note


@pytest.mark.parametrize("what", ["outputs", "gradients", "buffers"])
def test_a_graph_that_differs_on_the_example_inputs_is_not_given(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).double()

    def plant(program: Any, inputs: Any) -> Any:
        graph = program.graphs[""].graphs[0]
        last = next(node for node in graph.nodes if node.target == "1")
        with graph.inserting_after(last):
            if what == "outputs":
                fault = graph.call_function(torch.mul, (last, 1.001))
            elif what == "gradients":
                fault = graph.call_method("detach", (last,))
            else:
                fault = graph.call_module("1", last.args)
        last.replace_all_uses_with(fault, delete_user_cb=lambda user: user is not fault)
        return real(program, inputs)

    real = shapes._checked_graph
    monkeypatch.setattr(shapes, "_checked_graph", plant)
    plan = tdfx.plan(model, FULL, example_inputs=(batch(),))
    assert plan.emit == "modules"
    assert "a graph of it differs in its" in plan.notes[-1]


def penalizes(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) + sum(parameter.square().sum() for parameter in self.parameters())


def renormalizes(self: Any, x: Tensor) -> Any:
    self.b.weight.data = torch.renorm(self.b.weight.data, 2, 0, 0.1)
    return self.b(self.a(x))


def penalizes_what_has_a_weight(self: Any, x: Tensor) -> Any:
    layers = [layer for layer in self.modules() if hasattr(layer, "weight")]
    return self.b(self.a(x)) + sum(layer.weight.square().sum() for layer in layers)


def checks_arguments(self: Any, x: Tensor) -> Any:
    assert len(inspect.signature(self.a.forward).parameters) == 1
    return self.b(self.a(x))


READS: list[tuple[Callable[..., Any], set[str]]] = [
    (penalizes, {"a", "b"}),
    (penalizes_what_has_a_weight, {"a", "b"}),
    (renormalizes, {"b"}),
    (checks_arguments, set()),
]


@pytest.mark.parametrize("inputs", [None, (batch(),)], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize(("forward", "read"), READS)
def test_a_weight_that_is_read_beside_its_layer_is_kept(forward: Any, read: set[str], inputs: Any) -> None:
    plan = tdfx.plan(model_of(forward), FULL, example_inputs=inputs)
    assert {site.name for site in plan if site.reason is tdfx.Reason.READ_ELSEWHERE} == read


def asks_for_the_class_of_a_layer(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    return self.b(y * 2 if isinstance(self.b, nn.Linear) else y)


def asks_for_the_classes_of_layers(self: Any, x: Tensor) -> Any:
    for layer in self.children():
        x = layer(x) if type(layer) is nn.Linear else x
    return x


@pytest.mark.parametrize("emit", ["graph", "modules"])
@pytest.mark.parametrize(
    ("forward", "asked"), [(asks_for_the_class_of_a_layer, {"b"}), (asks_for_the_classes_of_layers, {"a", "b"})]
)
def test_a_layer_whose_class_is_asked_for_is_kept_where_the_code_runs(forward: Any, asked: set[str], emit: Any) -> None:
    dense = model_of(forward)
    plan = tdfx.plan(dense, FULL, example_inputs=(batch(),), emit=emit)
    kept = {site.name for site in plan if "asks for its class" in site.note}
    assert kept == (asked if plan.emit == "modules" else set())
    rewritten = tdfx.rewrite(dense, FULL, example_inputs=(batch(),), emit=emit)
    torch.testing.assert_close(rewritten(batch()), dense(batch()), rtol=TOLERANCE, atol=TOLERANCE)


def draws_from(name: str) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Any:
        for number in self.kept[name]:
            return self.b(self.a(x)) * number
        return x

    return forward


def counting() -> Any:
    number = 0.0
    while True:
        number += 1.0
        yield number


def begun() -> Any:
    numbers = counting()
    next(numbers)
    return numbers


ITERATORS: dict[str, Callable[[], Any]] = {
    "cycle": lambda: itertools.cycle([1.0, 2.0, 3.0]),
    "cycle of a generator": lambda: itertools.cycle(number for number in [1.0, 2.0]),
    "chain": lambda: itertools.chain([1.0, 2.0], itertools.repeat(3.0)),
    "map": lambda: map(float, itertools.count(1)),
    "islice": lambda: itertools.islice(itertools.count(1.0), 999),
    "generator": counting,
    "generator that has begun": begun,
    "islice of a generator that has begun": lambda: itertools.islice(begun(), 999),
    "dict": lambda: iter({float(number): None for number in range(1, 999)}),
}


@pytest.mark.parametrize("block", [False, True], ids=["model", "block"])
@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_gives_what_it_would_have_given(kind: str, block: bool) -> None:
    models: list[Any] = []
    for _ in range(2):
        net: Any = model_of(draws_from(kind))
        net.kept[kind] = ITERATORS[kind]()
        models.append(nn.Sequential(net, nn.Linear(16, 4)).double() if block else net)
    models[1].load_state_dict(models[0].state_dict())
    dense, model = models
    for inputs in (None, (batch(),)):
        (note,) = tdfx.plan(model, FULL, example_inputs=inputs).notes
        assert "draws from an iterator that it keeps" in note
    rewritten = tdfx.rewrite(model, FULL, example_inputs=(batch(),))
    for _ in range(4):
        torch.testing.assert_close(rewritten(batch()), dense(batch()), rtol=TOLERANCE, atol=TOLERANCE)


class Final(nn.Module):
    """Must not be derived from, and takes no keyword."""

    def __init_subclass__(cls, **_: Any) -> None:
        raise TypeError("final")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Registering(type):
    """A metaclass that lists its classes."""

    classes: ClassVar[list[str]] = []

    def __init__(cls, name: str, *_: Any) -> None:
        Registering.classes.append(name)


class Registered(nn.Module, metaclass=Registering):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [Final, Registered])
def test_a_class_that_watches_its_subclasses_does_not_see_the_graphs(build: Callable[[], nn.Module]) -> None:
    rewritten = tdfx.rewrite(build(), FULL)
    assert isinstance(rewritten, fx.GraphModule)
    assert isinstance(rewritten, build)  # type: ignore[arg-type]
    assert Registering.classes == ["Registered"]


def test_modules_with_the_same_graph_share_a_class_until_one_is_changed() -> None:
    model = model_of(adds_to_a_view)
    first, second = (tdfx.rewrite(copy.deepcopy(model), FULL) for _ in range(2))
    third = tdfx.rewrite(model_of(collects), FULL)
    assert type(first) is type(second)
    assert type(first) is not type(third)
    before = second(batch())
    assert isinstance(first, fx.GraphModule)
    output = next(node for node in first.graph.nodes if node.op == "output")
    with first.graph.inserting_before(output):
        output.args = (first.graph.call_function(torch.neg, (output.args[0],)),)
    first.recompile()
    assert torch.equal(second(batch()), before)
    torch.testing.assert_close(first(batch()), -before, rtol=TOLERANCE, atol=TOLERANCE)
