"""What looking at a module puts back: hooks that a forward adds, and attributes that it changes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from tdfx.layers.copying import structural_copy
from tdfx.layers.module_state import HOOKS
from tdfx.passes.analysis.user_state import UserState


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize("before", [0, 1])
def test_hooks_that_a_forward_adds_are_taken_off_and_others_stay(before: int) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    handles = [each.register_forward_hook(nothing) for each in model for _ in range(before)]
    state = UserState(model)
    for each in model:
        each.register_forward_hook(nothing)
        each.register_forward_pre_hook(nothing)
        each.register_full_backward_hook(nothing)
    state.restore()
    for layer, handle in zip(model, handles or (None, None), strict=True):
        left = [key for name in HOOKS for key in getattr(layer, name)]
        assert left == ([] if handle is None else [handle.id])


@pytest.mark.parametrize("value", [1, "text", None, (1, 2), [1], {"a": 1}, {"a": [1]}], ids=str)
def test_attributes_of_stock_layers_are_put_back(value: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    layer: Any = model[0]
    layer.own, layer.held = value, {"key": value}
    text = repr(value)
    state = UserState(model)
    layer.own, layer.new, layer.out_features = "changed", 1, 7
    layer.held["key"] = layer.held["more"] = "changed"
    if isinstance(value, list):
        value.append(2)
    if isinstance(value, dict):
        value["a"] = value["b"] = 0
    state.restore()
    assert (layer.own, layer.held, layer.out_features) == (value, {"key": value}, 2)
    assert repr(value) == text
    assert not hasattr(layer, "new")


class Slotted(nn.Module):
    """Keeps its layer in a slot besides, as only classes with ``__slots__`` can."""

    __slots__ = ("besides",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        object.__setattr__(self, "besides", [self.layer])


class Derived(Slotted):
    """Inherits the slot, and has a ``__dict__`` of its own."""


@pytest.mark.parametrize("kind", [Slotted, Derived])
def test_slots_of_a_class_and_of_its_bases_are_copied(kind: type[Slotted]) -> None:
    model: Any = kind()
    copied: Any = structural_copy(model)
    assert copied.besides[0] is copied.layer
    assert copied.layer is not model.layer
    assert copied.layer.weight is model.layer.weight
    assert isinstance(copied.layer.weight, nn.Parameter)
    assert torch.equal(copied.layer.bias, model.layer.bias)


COUNTED: OrderedDict[str, int] = OrderedDict(a=1)


class Counts(nn.Module):
    """Adds to an ordered mapping of its file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        COUNTED["b"] = 2
        COUNTED.move_to_end("a")
        return x


def test_an_ordered_mapping_is_put_back_with_its_order() -> None:
    state, model = UserState(Counts()), Counts()
    model(torch.zeros(1))
    assert list(COUNTED) == ["b", "a"]
    state.restore()
    assert list(COUNTED.items()) == [("a", 1)]
    COUNTED["c"] = 3
    assert list(COUNTED) == ["a", "c"]
    del COUNTED["c"]
