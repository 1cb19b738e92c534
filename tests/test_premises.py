"""A graph runs as long as what it relies on holds: numbers, flags and layers of the model, and no hooks on its blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
DOUBLED = False


class Block(nn.Module):
    """Has a number, and a layer whose number the code reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(16, 16), nn.Dropout(0.0)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), self.drop.p, self.training) * self.scale


class Net(nn.Module):
    """Reads an attribute of its class, a function, a dict, a name of this file, a list of sizes, and calls a method."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()
        self.tail = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.act: Any = torch.relu
        self.config = {"gate": {"open": True}}
        self.sizes = [4, 12]
        self.unread = 0

    def last(self, x: Tensor) -> Tensor:
        return self.tail(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        if self.config["gate"]["open"]:
            y = y * 2
        if DOUBLED:
            y = y + y
        first, second = y.split(self.sizes, dim=1)
        return self.last(self.b(torch.cat([second, first], dim=1))) / self.temperature


def _shift(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + 1


def _set(path: str, **values: Any) -> Callable[[nn.Module], object]:
    def change(net: nn.Module) -> None:
        for name, value in values.items():
            setattr(net.get_submodule(path), name, value)

    return change


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number of the class": _set("", temperature=3.0),
    "a number of a block": _set("a", scale=2.0),
    "a number of a layer": _set("b.drop", p=1.0),
    "a function": _set("", act=torch.tanh),
    "an entry of a dict in a dict": lambda net: net.config["gate"].update(open=False),
    "a list": lambda net: net.sizes.reverse(),
    "a method": _set("", last=torch.sin),
    "one more layer": lambda net: net.tail.append(nn.Tanh()),
    "one layer less": lambda net: net.tail.__delitem__(1),
    "another block": _set("", b=nn.Tanh()),
    "a hook on a block": lambda net: net.a.register_forward_hook(_shift),
    "a hook on a sequence": lambda net: net.tail.register_forward_hook(_shift),
}


@pytest.fixture
def pair() -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    dense = Net().double()
    x = torch.rand(4, 16, dtype=torch.float64)
    low = tdfx.rewrite(copy.deepcopy(dense), FULL, example_inputs=(x,))
    assert isinstance(low, fx.GraphModule)
    return dense, low, x


def agree(model: nn.Module, dense: nn.Module, x: Tensor) -> bool:
    return all(
        torch.allclose(model.train(mode)(x), dense.train(mode)(x), rtol=1e-9, atol=1e-12) for mode in (True, False)
    )


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_changed_after_a_rewrite_has_its_effect(change: Callable[[Any], object], pair: Any) -> None:
    dense, low, x = pair
    before = dense(x)
    assert agree(low, dense, x)
    change(dense)
    change(low)
    assert not torch.allclose(dense.train()(x), before)
    assert agree(low, dense, x)
    for other in (copy.copy(low), copy.deepcopy(low), pickle.loads(pickle.dumps(low)), tdfx.merge(low)):
        assert agree(other, dense, x)
        assert not isinstance(other, fx.GraphModule)
    again = tdfx.rewrite(low, FULL)
    assert agree(again, dense, x)
    assert not isinstance(again, fx.GraphModule)


def test_what_is_changed_back_runs_the_graph_again(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, low, x = pair
    calls: list[int] = []
    run = Net.forward

    def counted(self: Net, h: Tensor) -> Tensor:
        calls.append(1)
        return run(self, h)

    monkeypatch.setattr(Net, "forward", counted)
    low(x)
    assert not calls
    low.temperature = 2.0
    low(x)
    assert len(calls) == 1
    low.temperature = 1.0
    low(x)
    low.unread = 5
    low(x)
    assert len(calls) == 1
    assert isinstance(copy.deepcopy(low), fx.GraphModule)


def test_a_name_of_the_file_is_followed(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, low, x = pair
    monkeypatch.setitem(Net.forward.__globals__, "DOUBLED", True)
    assert agree(low, dense, x)


def test_hooks_on_the_model_itself_run_once_in_both_forms(pair: Any) -> None:
    dense, low, x = pair
    for model in (dense, low):
        model.register_forward_hook(_shift)
    assert agree(low, dense, x)
    for model in (dense, low):
        model.temperature = 2.0
    assert agree(low, dense, x)


def test_hooks_on_all_modules_see_the_blocks(pair: Any) -> None:
    _, low, x = pair
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        low(x)
    finally:
        handle.remove()
    assert {low, low.a, low.b, low.tail} <= set(seen)


def test_a_graph_that_was_changed_by_hand_runs_in_any_case(pair: Any) -> None:
    _, low, x = pair
    last = next(node for node in reversed(low.graph.nodes) if node.op == "call_function")
    last.args = (last.args[0], 4.0)
    low.recompile()
    expected = low(x)
    low.temperature = 3.0
    assert torch.equal(low(x), expected)


def test_compiled_code_follows(pair: Any) -> None:
    dense, low, x = pair
    compiled: Any = torch.compile(low, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), dense(x))
    for model in (dense, low):
        model.temperature = 3.0
        model.a.scale = 2.0
    assert torch.allclose(compiled(x), dense(x))


class HasSuchNames(nn.Module):
    """Uses names that a graph might use for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self._premises, self.reads = 2.0, 3.0

    def rely_on(self, x: Tensor) -> Any:
        return x * self._premises

    def does_hold(self, x: Tensor) -> Any:
        return x + self.reads

    def forward(self, x: Tensor) -> Any:
        return self.does_hold(self.rely_on(self.layer(x)))


def test_names_of_the_users_are_not_taken() -> None:
    torch.manual_seed(0)
    dense: Any = HasSuchNames().double()
    x = torch.rand(4, 16, dtype=torch.float64)
    low: Any = tdfx.rewrite(dense, FULL, example_inputs=(x,))
    assert agree(low, dense, x)
    assert torch.equal(low.does_hold(x), dense.does_hold(x))
    assert torch.equal(low.rely_on(x), dense.rely_on(x))
    assert low._premises == 2.0
    assert isinstance(low, fx.GraphModule)


def test_pickles_of_earlier_versions_have_no_premises(pair: Any) -> None:
    dense, low, x = pair
    restore, (body, graphs, _) = low.__reduce__()
    old = restore(body, graphs)
    assert isinstance(old, fx.GraphModule)
    assert agree(old, dense, x)
