"""Objects of a user's own classes that hold layers of a model: what forward reaches through them is rewritten too."""

from __future__ import annotations

from argparse import Namespace
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx
from tdfx.layers.copying import structural_copy

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
LOG: list[float] = []


class Router:
    """Calls experts, and counts."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return sum((expert(x) for expert in self.experts), x)


@dataclass(frozen=True, slots=True)
class Stage:
    """Is frozen, and has no ``__dict__``."""

    layer: nn.Module
    name: str = "stage"


class Helper:
    """Was given the model itself."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, x: Tensor) -> Tensor:
        return self.model.block(x)  # type: ignore[no-any-return, operator]


class Net(nn.Module):
    """Has a layer, a block with a mode, and what a case needs beside them."""

    def __init__(self, start: Callable[[Any], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.BatchNorm1d(16))
        start(self)


class Routed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.router(x)  # type: ignore[no-any-return, operator]


class Boxed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.box.layer(self.a(x)))  # type: ignore[no-any-return, union-attr, operator]


class ByName(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.table["block"](self.a(x)))  # type: ignore[no-any-return, index, operator]


class Helped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.helper.run(self.a(x)))  # type: ignore[no-any-return, union-attr, operator]


class Bound(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.call(self.a(x)))  # type: ignore[no-any-return, operator]


class Listed(Net):
    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:  # type: ignore[union-attr]
            x = stage.layer(x)
        return x


def _set(**values: Callable[[Any], Any]) -> Callable[[Any], None]:
    def start(net: Any) -> None:
        for name, make in values.items():
            setattr(net, name, make(net))

    return start


def _function(helper: Helper) -> Callable[[Tensor], Tensor]:
    return lambda x: helper.run(x)


CASES: dict[str, Callable[[], nn.Module]] = {
    "a callable object": lambda: Routed(_set(router=lambda net: Router([net.a, net.block, net.b]))),
    "a namespace": lambda: Boxed(_set(box=lambda net: SimpleNamespace(layer=net.block))),
    "a namespace of argparse": lambda: Boxed(_set(box=lambda net: Namespace(layer=net.block))),
    "a frozen dataclass with slots": lambda: Boxed(_set(box=lambda net: Stage(net.block))),
    "an object in an object": lambda: Boxed(
        _set(box=lambda net: SimpleNamespace(inner=Stage(net.block), layer=net.block))
    ),
    "a UserDict": lambda: ByName(_set(table=lambda net: UserDict(block=net.block))),
    "objects in a list": lambda: Listed(_set(stages=lambda net: [Stage(net.a), Stage(net.block), Stage(net.b)])),
    "an object with the model": lambda: Helped(_set(helper=Helper)),
    "a method of an object with the model": lambda: Bound(_set(call=lambda net: Helper(net).run)),
    "a function over an object": lambda: Bound(_set(call=lambda net: _function(Helper(net)))),
}


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("emit", ["graph", "modules"])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_layers_that_objects_hold_are_rewritten(make: Callable[[], nn.Module], emit: tdfx.Emit, given: bool) -> None:
    torch.manual_seed(0)
    dense = make().double()
    torch.manual_seed(0)
    model = make().double()
    x = torch.rand(8, 16, dtype=torch.float64)
    low = tdfx.rewrite(model, FULL, example_inputs=(x,) if given else None, emit=emit)
    assert sum(isinstance(module, tdfx.Factorized) for module in low.modules()) == 3
    for module in (low, tdfx.merge(low)):
        for mode in (True, False):
            outputs = []
            for each in (module, dense):
                torch.manual_seed(1)
                outputs.append(each.train(mode)(x))
            torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    outputs[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in make().parameters())


def test_an_object_is_copied_once_and_the_users_own_is_left_alone() -> None:
    net = Routed(_set(router=lambda net: Router([net.a]), same=lambda net: net.router, other=lambda net: [net.router]))
    router: Any = net.router
    copied: Any = structural_copy(net)
    assert copied.router is copied.same is copied.other[0] is not router
    assert router.experts == [net.a]
    assert copied.router.experts == [copied.a]


def test_who_trains_the_model_is_no_part_of_it() -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model = model
            self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Caller:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def copy(self) -> nn.Module:
            return structural_copy(self.model)

    net: Any = Net(_set(helper=Helper, trainer=Trainer, caller=Caller))
    copied: Any = net.caller.copy()
    assert copied.helper.model is copied
    assert copied.trainer is net.trainer
    assert copied.trainer.model is net
    assert copied.caller is net.caller


def test_a_layer_that_a_trainer_holds_is_not_called_in_silence() -> None:
    class Trained(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.trainer.layer(x)  # type: ignore[no-any-return, union-attr, operator]

    def trainer(net: Any) -> SimpleNamespace:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return SimpleNamespace(model=net, layer=net.block, optimizer=optimizer)

    with pytest.raises(
        tdfx.ModelError, match=r"Trained calls a layer that it reaches through an object .* not as a submodule"
    ):
        tdfx.rewrite(Trained(_set(trainer=trainer)), FULL)


class Logs(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        self.log.append(float(y.detach().sum()))  # type: ignore[union-attr, operator]
        return y * len(self.seen())  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_list_that_somebody_else_holds_too_stays_the_same(emit: tdfx.Emit) -> None:
    LOG.clear()
    named = Logs(_set(log=lambda net: LOG, seen=lambda net: lambda: LOG))
    held = Logs(_set(log=lambda net: [], recorder=lambda net: SimpleNamespace(items=net.log)))
    held.seen = lambda: held.recorder.items  # type: ignore[assignment, union-attr]
    x = torch.rand(4, 16)
    for net, items in ((named, LOG), (held, held.recorder.items)):  # type: ignore[union-attr]
        low: Any = tdfx.rewrite(net, FULL, example_inputs=(x,), emit=emit)
        assert items == []
        low(x)
        low(x)
        assert len(items) == 2
        assert low.log is items


def test_a_list_of_the_models_own_is_copied() -> None:
    net: Any = Net(_set(log=lambda net: [], layers=lambda net: [net.a]))
    copied: Any = structural_copy(net)
    assert copied.log is not net.log
    assert copied.layers == [copied.a]
