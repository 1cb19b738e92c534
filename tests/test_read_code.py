"""Which code a trace reads, and what of it stands for nothing that runs."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

import tdfx
from tdfx.passes.analysis.libraries import keeps_state
from tdfx.passes.analysis.source import is_users_file

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)


class Optional(nn.Module):
    """A residual block; the first of a stage has a shortcut of its own."""

    def __init__(self, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        if self.shortcut is not None:
            x = self.shortcut(x)
        return y + (x if self.shortcut is None else self.shortcut(x))


class Scripted(nn.Module):
    """Has code for TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y: Tensor = self.a(x)
        if self.training and torch.jit.is_scripting():  # type: ignore[attr-defined]
            warnings.warn("always returns a tuple", stacklevel=2)
            return y, y
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y = y.log_()
        return y


class Layers(nn.ModuleDict):
    """Keeps what some of its layers give."""

    wanted = {"b": "out"}  # noqa: RUF012

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = OrderedDict()
        for name, layer in self.items():
            x = layer(x)
            if name in self.wanted:
                found[self.wanted[name]] = x
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "optional layers": lambda: nn.Sequential(Optional(nn.Linear(8, 8)), Optional(None)),
    "code for TorchScript": Scripted,
    "names of layers": lambda: Layers({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_code_that_cannot_run_or_looks_at_names_of_layers_is_in_the_graph(make: Callable[[], nn.Module]) -> None:
    model, x = make().double(), torch.rand(4, 8, dtype=torch.float64)
    low = tdfx.rewrite(model, FULL, example_inputs=(x,))
    assert isinstance(low, fx.GraphModule)
    assert not tdfx.plan(model, FULL, example_inputs=(x,)).notes
    for mode in (True, False):
        torch.testing.assert_close(low.train(mode)(x), model.train(mode)(x))


def test_an_optional_layer_that_is_set_later_runs() -> None:
    model, x = nn.Sequential(Optional(None)).double(), torch.rand(4, 8, dtype=torch.float64)
    low = tdfx.rewrite(model, FULL, example_inputs=(x,))
    for each in (model, low):
        each.get_submodule("0").shortcut = nn.Tanh()
    torch.testing.assert_close(low(x), model(x))


def test_only_the_folder_of_torch_is_torch() -> None:
    assert not is_users_file(torch.functional.__file__)
    assert is_users_file(torchvision.models.resnet.__file__)
    assert is_users_file(torch.functional.__file__.replace("/torch/", "/torch_geometric/"))


@pytest.mark.parametrize("name", ["asteroid.models", "queueing", "tdfx_train", "inspector"])
def test_a_package_whose_name_begins_like_one_of_pythons_is_the_users(name: str) -> None:
    assert keeps_state(type("Store", (), {"__module__": name})())
    assert not keeps_state(type("Store", (), {"__module__": "queue.more"})())
