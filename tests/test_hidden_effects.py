"""Forwards whose effects no line of their code shows: seen by what has changed after a trace, and by what is looked up."""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)


class Store:
    """Has methods with the names of functions that make containers."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def list(self) -> Any:
        return self.items


class Kind(Enum):
    """A key of an output."""

    A = 1


class Pair(nn.Module):
    """Two linear layers, and what a forward may change or look up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.hits = np.zeros(2)
        self.slots = [0]
        self.base: dict[str, list[int]] = {"x": []}
        self.store = Store()
        self.table = {"add": np.add}
        self.callbacks = [functools.partial(self.slots.append, 1)]
        self.plain = torch.zeros(8, dtype=torch.float64)
        self.scale: Any = Counter(a=2)
        self.sizes = {3: 5.0}
        self.form = "rows %s"
        self.factor = np.float64(0.5)
        self.nothing = np.float64(0.0)
        self.register_buffer("n", torch.zeros(1))

    def of(self) -> Any:
        """Return the array of its calls."""
        return self.hits


def model_of(forward: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    model: nn.Module = type("Net", (Pair,), {"forward": forward})()
    return model.double()


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def adds_to_what_a_method_returns(self: Any, x: Tensor) -> Any:
    hits = self.of()
    hits += 1
    return self.b(self.a(x)) + self.hits.sum()


def adds_to_what_stands_beside_data(self: Any, x: Tensor) -> Any:
    y, hits = (self.a(x), self.hits)
    hits += 1
    return self.b(y) + self.hits.sum()


def adds_to_an_item_of_a_copied_dict(self: Any, x: Tensor) -> Any:
    base = dict(self.base)
    base["x"] += [1]
    return self.b(self.a(x)) * len(self.base["x"])


def appends_to_what_looks_new(self: Any, x: Tensor) -> Any:
    items = self.store.list()
    items.append(1)
    return self.b(self.a(x)) * len(self.store.items)


def appends_by_a_function_that_calls(self: Any, x: Tensor) -> Any:
    any(map(self.slots.append, [1]))
    return self.b(self.a(x)) * len(self.slots)


def sets_an_item_by_a_function_that_calls(self: Any, x: Tensor) -> Any:
    list(map(self.slots.__setitem__, [0], [self.slots[0] + 1]))
    return self.b(self.a(x)) * self.slots[0]


def calls_from_a_table(self: Any, x: Tensor) -> Any:
    add = self.table["add"]
    add(self.hits, 1, out=self.hits)
    return self.b(self.a(x)) + self.hits.sum()


def calls_back(self: Any, x: Tensor) -> Any:
    for callback in self.callbacks:
        callback()
    return self.b(self.a(x)) * len(self.slots)


def writes_into_a_plain_tensor(self: Any, x: Tensor) -> Any:
    torch.add(self.plain, 1, out=self.plain)
    F.relu(self.plain, inplace=True)
    return self.b(self.a(x)) + self.plain


def compares_shapes_in_a_set(self: Any, x: Tensor) -> Any:
    parts = [self.a(x), self.b(x[:2])]
    return torch.cat(parts) if len({part.shape for part in parts}) > 1 else torch.stack(parts)


def makes_a_set_of_shapes(self: Any, x: Tensor) -> Any:
    parts = [self.a(x), self.b(x[:3])]
    return torch.cat(parts) if len(set(part.shape for part in parts)) > 1 else torch.stack(parts)  # noqa: C401


def looks_up_a_size(self: Any, x: Tensor) -> Any:
    sizes = self.sizes
    return self.b(self.a(x)) * sizes.get(x.shape[0], 1.0)


def counts_a_size(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) * (1 + self.scale[x.shape[0]])


def makes_a_text_of_a_size(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) * len(self.form % x.shape[0])


def formats_a_size(self: Any, x: Tensor) -> Any:
    form = "rows {}"
    return self.b(self.a(x)) * len(form.format(x.shape[0]))


def asks_for_a_buffer_by_its_dict(self: Any, x: Tensor) -> Any:
    y = self.b(self.a(x))
    self.n.add_(1)
    return y * 2 if self._buffers["n"] > 1 else y


def asks_for_the_environment(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) * (2 if "TDFX_TEST_OF_FORWARDS" in os.environ else 3)


def multiplies_by_a_number_of_numpy(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) * self.factor


def adds_nothing_of_numpy(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x)) + self.nothing


def takes_an_argument_named_inf(self: Any, inf: Tensor) -> Any:
    return self.b(self.a(inf)).clamp(max=float("inf"))


HIDDEN = [
    adds_to_what_a_method_returns,
    adds_to_what_stands_beside_data,
    adds_to_an_item_of_a_copied_dict,
    appends_to_what_looks_new,
    appends_by_a_function_that_calls,
    sets_an_item_by_a_function_that_calls,
    calls_from_a_table,
    calls_back,
    writes_into_a_plain_tensor,
    compares_shapes_in_a_set,
    makes_a_set_of_shapes,
    looks_up_a_size,
    counts_a_size,
    makes_a_text_of_a_size,
    formats_a_size,
    asks_for_a_buffer_by_its_dict,
    asks_for_the_environment,
    multiplies_by_a_number_of_numpy,
    adds_nothing_of_numpy,
    takes_an_argument_named_inf,
]


@pytest.mark.parametrize("inputs", [None, (batch(),)], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize("forward", HIDDEN)
def test_what_no_line_shows_is_seen(forward: Callable[..., Any], inputs: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TDFX_TEST_OF_FORWARDS", "1")
    dense, twin = model_of(forward), model_of(forward)
    plan = tdfx.plan(dense, FULL, example_inputs=inputs)
    assert plan.emit == "modules"
    rewritten: Any = tdfx.rewrite(dense, FULL, example_inputs=inputs)
    assert any(isinstance(module, tdfx.Factorized) for module in rewritten.modules())
    monkeypatch.delenv("TDFX_TEST_OF_FORWARDS")
    for rows in (4, 3, 4):
        torch.testing.assert_close(rewritten(batch(rows)), twin(batch(rows)), rtol=1e-9, atol=1e-9)
    assert rewritten.slots == twin.slots
    assert rewritten.base == twin.base
    assert rewritten.hits.tolist() == twin.hits.tolist()


def halves_a_number(self: Any, x: Tensor) -> Any:
    n = x.shape[1]
    half = n
    half //= 2
    y = self.a(x)
    return self.b(torch.cat([y[:, half:], y[:, :half]], 1)) * n


def multiplies_matrices(self: Any, x: Tensor) -> Any:
    y = self.a(x)
    former = y
    y @= torch.diag(x[0])
    return self.b(y) + former


def extends_a_shape(self: Any, x: Tensor) -> Any:
    y = self.b(self.a(x))
    shape = former = y.shape
    shape += (1,)
    return y.reshape(shape).reshape(former)


def unpacks_rows(self: Any, x: Tensor) -> Any:
    first, second = self.b(self.a(x))
    return first + second


@pytest.mark.parametrize("forward", [halves_a_number, multiplies_matrices, extends_a_shape])
def test_an_assignment_leaves_the_former_value_under_its_other_names(forward: Callable[..., Any]) -> None:
    dense = model_of(forward)
    rewritten = tdfx.rewrite(dense, FULL)
    assert isinstance(rewritten, fx.GraphModule)
    for model in (rewritten, copy.deepcopy(rewritten)):
        torch.testing.assert_close(model(batch()), dense(batch()), rtol=1e-9, atol=1e-9)


def test_a_graph_unpacks_only_so_many_rows_as_the_code_does() -> None:
    dense = model_of(unpacks_rows)
    rewritten = tdfx.rewrite(dense, FULL)
    assert isinstance(rewritten, fx.GraphModule)
    torch.testing.assert_close(rewritten(batch(2)), dense(batch(2)), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"too many values to unpack \(expected 2, got 3\)"):
        rewritten(batch(3))
    with pytest.raises(ValueError, match=r"not enough values to unpack \(expected 2, got 1\)"):
        rewritten(batch(1))


def test_an_output_may_have_any_keys() -> None:
    dense = model_of(lambda self, x: {Kind.A: self.b(self.a(x))})
    rewritten = tdfx.rewrite(dense, FULL)
    torch.testing.assert_close(rewritten(batch()), dense(batch()), rtol=1e-9, atol=1e-9)


def test_planning_calls_no_method_of_a_users_container_for_good() -> None:
    dense = model_of(lambda self, x: (self.note(1), self.b(self.a(x)))[1])
    dense.seen = []
    dense.note = dense.seen.append
    tdfx.plan(dense, FULL, example_inputs=(batch(),))
    assert dense.seen == []
    rewritten: Any = tdfx.rewrite(dense, FULL, example_inputs=(batch(),))
    rewritten(batch())
    assert (dense.seen, rewritten.seen) == ([], [1])


class Tick(nn.Module):
    """Counts its calls in a list of its model's."""

    def __init__(self, shared: list[int]) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        self.shared.append(1)
        return x


def test_a_list_that_a_block_changes_under_another_name_is_no_constant() -> None:
    dense = model_of(lambda self, x: self.b(self.tick(self.a(x))) * (1 + len(self.log)))
    dense.log = []
    dense.tick = Tick(dense.log)
    twin = copy.deepcopy(dense)
    rewritten = tdfx.rewrite(dense, FULL)
    for _ in range(3):
        torch.testing.assert_close(rewritten(batch()), twin(batch()), rtol=1e-9, atol=1e-9)


def with_features(net: Any) -> None:
    features = net.features = {}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        features["a"] = output

    net.a.register_forward_hook(keep)


def with_a_decorated_hook(net: Any) -> None:
    features = net.features = {}

    def keeps(function: Callable[..., Any]) -> Callable[..., Any]:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            features["a"] = function(output)

        return keep

    net.a.register_forward_hook(keeps(lambda output: output * len(net.features.keys() | {1})))


def with_a_partial(net: Any) -> None:
    net.features = {}
    net.a.register_forward_hook(functools.partial(keep_in, net.features))


def keep_in(features: dict[str, Any], module: nn.Module, inputs: Any, output: Tensor) -> None:
    features["a"] = output


def with_a_shared_number(net: Any) -> None:
    net.features = {"a": 0.0}
    calls = 0

    def before(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1

    def after(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * calls * len(net.features)

    net.a.register_forward_pre_hook(before)
    net.a.register_forward_hook(after)


def with_a_factory(net: Any) -> None:
    net.features = {"a": 0.0}
    net.defaults = defaultdict(lambda: len(net.features))
    net.a.register_forward_hook(lambda module, inputs, output: output * net.defaults["x"])


def with_a_local_list_of_layers(net: Any) -> None:
    net.features = {"a": 0.0}
    layers = [net.b]
    net.a.register_forward_hook(lambda module, inputs, output: layers[0](output) * layers[0].training)


@pytest.mark.parametrize("emit", ["graph", "modules"])
@pytest.mark.parametrize(
    "prepare",
    [
        with_a_local_list_of_layers,
        with_features,
        with_a_decorated_hook,
        with_a_partial,
        with_a_shared_number,
        with_a_factory,
    ],
)
def test_hooks_and_their_model_go_on_sharing_what_they_keep(prepare: Callable[[Any], None], emit: Any) -> None:
    models = [model_of(lambda self, x: self.b(self.a(x)) + self.features["a"]) for _ in range(2)]
    for model in models:
        prepare(model)
    dense, twin = models
    rewritten = tdfx.rewrite(dense, FULL, example_inputs=(batch(),), emit=emit)
    for rows in (4, 3):
        torch.testing.assert_close(rewritten(batch(rows)), twin(batch(rows)), rtol=1e-9, atol=1e-9)
    merged = tdfx.merge(rewritten)
    torch.testing.assert_close(merged(batch()), twin(batch()), rtol=1e-9, atol=1e-9)


class Chain(Pair):
    """Calls its layers in a loop, and asks for their class somewhere else."""

    def factor_of(self, layer: Any) -> float:
        """Ask by a function."""
        return 2.0 if isinstance(layer, nn.Linear) else 1.0

    def matched(self, layer: Any) -> float:
        """Ask by a pattern."""
        match layer:
            case nn.Linear():
                return 2.0
        return 1.0


def asks_in_a_method(self: Any, x: Tensor) -> Any:
    for layer in self.children():
        x = layer(x) * self.factor_of(layer)
    return x


def asks_by_a_pattern(self: Any, x: Tensor) -> Any:
    for layer in self.children():
        x = layer(x) * self.matched(layer)
    return x


def goes_through_modules(self: Any, x: Tensor) -> Any:
    y = self.b(self.a(x))
    for module in self.modules():
        if getattr(module, "bias", None) is not None:
            y = y + module.bias.sum()
    return y


def clamps_a_weight_at_times(self: Any, x: Tensor) -> Any:
    if x.mean() > 0:
        self.a.weight.data.clamp_(-0.1, 0.1)
    return self.b(self.a(x))


def scales_a_view_of_a_weight_at_times(self: Any, x: Tensor) -> Any:
    if x.mean() > 0:
        self.a.weight.data.view(-1)[:8] *= 0.5
    return self.b(self.a(x))


@pytest.mark.parametrize("emit", ["graph", "modules"])
@pytest.mark.parametrize("inputs", [None, (-batch().abs(),)], ids=["without inputs", "with inputs"])
@pytest.mark.parametrize(
    "forward",
    [
        asks_in_a_method,
        asks_by_a_pattern,
        goes_through_modules,
        clamps_a_weight_at_times,
        scales_a_view_of_a_weight_at_times,
    ],
)
def test_a_layer_whose_class_or_weight_the_code_uses_otherwise_is_kept(
    forward: Callable[..., Any], inputs: Any, emit: Any
) -> None:
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(type("Net", (Chain,), {"forward": forward})().double())
    dense, twin = models
    rewritten: Any = tdfx.rewrite(dense, FULL, example_inputs=inputs, emit=emit)
    for sign in (1, -1, 1):
        x = sign * batch().abs()
        torch.testing.assert_close(rewritten(x), twin(x), rtol=1e-9, atol=1e-9)
