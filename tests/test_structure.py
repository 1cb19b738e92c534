"""A structural copy shares all tensors with the original, and nothing else."""

from __future__ import annotations

import collections
import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tdfx.layers.copying import shell_of
from tdfx.layers.copying import structural_copy as typed_copy


class Block(nn.Module):
    """Has a layer, a persistent and another buffer, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.missing: nn.Module | None = None
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).mean((2, 3)) * self.scale
        return out


class Pair(NamedTuple):
    """A tuple of a custom class."""

    first: nn.Module


class Settings(dict[str, Any]):
    """A dict whose values can be read as attributes, as in many configurations."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Sealed(collections.OrderedDict[str, Any]):
    """A dict that refuses new values after its construction."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.sealed = True

    def __setitem__(self, key: str, value: Any) -> None:
        if self.__dict__.get("sealed"):
            raise TypeError("this dict is sealed")
        super().__setitem__(key, value)


def structural_copy(model: nn.Module, replace: dict[nn.Module, nn.Module] | None = None) -> Any:
    """Return the copy as Any, because the tests read attributes that type checkers do not know."""
    return typed_copy(model, replace)


def build() -> Any:
    model: Any = nn.Sequential(Block(), nn.ReLU(), nn.Linear(4, 2))
    model[0].norm.eval()
    return model


def tensors(model: nn.Module) -> list[tuple[str, int]]:
    """Return names and identities of all parameters and buffers in order; tied tensors occur several times."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor)) for name, tensor in named]


def snapshot(model: nn.Module) -> list[tuple[str, int, dict[str, object]]]:
    """Return the identity of each module, and its attributes with the contents of containers."""

    def shallow(value: object) -> object:
        return value.copy() if isinstance(value, dict | list | set) else value

    return [
        (name, id(module), {key: shallow(value) for key, value in module.__dict__.items()})
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def test_tensors_are_shared_and_modules_are_not() -> None:
    model = build()
    before = snapshot(model)
    twin = structural_copy(model)
    assert tensors(twin) == tensors(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert [(name, type(module)) for name, module in twin.named_modules()] == [
        (name, type(module)) for name, module in model.named_modules()
    ]
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}
    assert snapshot(model) == before


def test_a_deep_copy_does_not_share_tensors() -> None:
    model = build()
    assert tensors(copy.deepcopy(model)) != tensors(model)


def test_modes_and_attributes_are_kept_and_independent() -> None:
    model = build()
    twin = structural_copy(model)
    assert [module.training for module in twin.modules()] == [module.training for module in model.modules()]
    assert not twin[0].norm.training
    twin.eval()
    twin[0].width = 8
    twin[0].conv = nn.Identity()
    assert model.training
    assert model[0].conv.training
    assert model[0].width == 4
    assert isinstance(model[0].conv, nn.Conv2d)


def test_the_copy_computes_the_same_and_gradients_reach_the_shared_parameters() -> None:
    model = build()
    x = torch.rand(2, 3, 8, 8)
    twin = structural_copy(model)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    twin(x).sum().backward()
    assert model[2].weight.grad is not None
    assert model[0].scale.grad is None


def test_hooks_are_copied_but_independent() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    calls: list[str] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("old"))
    twin = structural_copy(model)
    twin(torch.ones(1, 2))
    assert calls == ["old"]
    twin[0].register_forward_hook(lambda *_: calls.append("new"))
    model(torch.ones(1, 2))
    assert calls == ["old", "old"]
    handle.remove()
    twin(torch.ones(1, 2))
    assert calls == ["old", "old", "old", "new"]


CONTAINERS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], object]]] = {
    "module": (lambda layer: (layer,), lambda held: held[0]),
    "list": (lambda layer: [layer], lambda held: held[0]),
    "nested": (lambda layer: {"a": [(layer, 1)]}, lambda held: held["a"][0][0]),
    "dict": (lambda layer: {"a": layer}, lambda held: held["a"]),
    "default dict": (lambda layer: collections.defaultdict(list, a=layer), lambda held: held["a"]),
    "dict of modules": (lambda layer: {layer: "a"}, lambda held: next(iter(held))),
    "set": (lambda layer: {layer}, lambda held: next(iter(held))),
    "frozen set": (lambda layer: frozenset({layer}), lambda held: next(iter(held))),
    "named tuple": (Pair, lambda held: held.first),
    "deque": (lambda layer: collections.deque([layer]), lambda held: held[0]),
    "bound method": (lambda layer: layer.forward, lambda held: held.__self__),
    "partial": (lambda layer: functools.partial(layer.forward), lambda held: held.func.__self__),
    "partial argument": (lambda layer: functools.partial(map, layer, key=1), lambda held: held.args[0]),
    "partial keyword": (lambda layer: functools.partial(map, key=layer), lambda held: held.keywords["key"]),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_attributes_refer_to_the_submodules_of_the_copy(case: str) -> None:
    wrap, unwrap = CONTAINERS[case]
    model = nn.Sequential(nn.Linear(2, 2))
    container = wrap(model[0])
    model.held = container
    twin = structural_copy(model)
    assert unwrap(twin.held) is twin[0]
    assert type(twin.held) is type(container)
    assert model.held is container
    assert unwrap(container) is model[0]


@pytest.mark.parametrize(
    "settings",
    [Settings(width=4), Sealed({"width": 4}), collections.Counter("ab")],
    ids=lambda settings: type(settings).__name__,
)
def test_a_dict_of_another_class_keeps_its_class(settings: dict[str, Any]) -> None:
    model: Any = nn.Linear(2, 2)
    model.settings = settings
    copied = structural_copy(model).settings
    assert type(copied) is type(settings)
    assert copied == settings


def test_a_module_of_another_model_is_not_copied() -> None:
    teacher = nn.Linear(2, 2)
    model = nn.Linear(2, 2)
    model.__dict__["teacher"] = [teacher]
    assert structural_copy(model).teacher[0] is teacher


def test_a_module_registered_twice_is_one_module_in_the_copy() -> None:
    layer = nn.Linear(2, 2)
    twin = structural_copy(nn.Sequential(layer, nn.ReLU(), layer))
    assert twin[0] is twin[2]
    assert twin[0] is not layer


def test_tied_parameters_stay_tied() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    twin = structural_copy(model)
    assert twin[1].weight is twin[0].weight is model[0].weight
    assert twin[1] is not twin[0]


def test_parametrized_layers_are_copied_with_their_parametrizations() -> None:
    model: Any = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    twin = structural_copy(model)
    assert tensors(twin) == tensors(model)
    assert torch.equal(twin[0].weight, model[0].weight)
    first = twin[0].parametrizations.weight
    assert first is not model[0].parametrizations.weight
    assert type(twin[0]) is type(model[0])


def test_replace_takes_effect_at_every_path() -> None:
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model: Any = nn.Sequential(layer, nn.Sequential(layer), nn.Linear(2, 2))
    model.layers = [layer]
    twin = structural_copy(model, {layer: other})
    assert twin[0] is twin[1][0] is twin.layers[0] is other
    assert twin[2] is not model[2]
    assert model[0] is model[1][0] is model.layers[0] is layer
    assert structural_copy(layer, {layer: other}) is other


def test_a_replacement_may_contain_the_replaced_module() -> None:
    layer = nn.Linear(2, 2)
    wrapper = nn.Sequential(layer)
    twin = structural_copy(nn.Sequential(layer), {layer: wrapper})
    assert twin[0] is wrapper
    assert wrapper[0] is layer


def test_script_modules_are_shared() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit warns that it is deprecated
        scripted = torch.jit.script(nn.Linear(2, 2))
    twin = structural_copy(nn.Sequential(scripted))
    assert twin[0] is scripted


def test_a_shell_has_no_memory_and_keeps_the_settings_of_its_parameters() -> None:
    layer = nn.Conv2d(2, 3, 3, dtype=torch.float16, padding_mode="circular").eval()
    layer.weight.requires_grad_(False)
    before = snapshot(layer)
    shell = shell_of(layer)
    assert [(name, parameter.device.type, parameter.requires_grad) for name, parameter in shell.named_parameters()] == [
        ("weight", "meta", False),
        ("bias", "meta", True),
    ]
    assert shell.weight.shape == layer.weight.shape
    assert shell.weight.dtype == torch.float16
    assert (type(shell), shell.padding_mode, shell.training) == (nn.Conv2d, "circular", False)
    assert snapshot(layer) == before
    assert layer.weight.device.type == "cpu"
    assert shell_of(nn.Linear(2, 2, bias=False)).bias is None
