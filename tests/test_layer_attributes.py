"""What code and hooks put on a layer beside its own attributes stays possible on its factors, and is merged back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)


class Net(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a.calls = 0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        self.a.calls += 1  # type: ignore[operator, assignment]
        return self.b(self.a(x)) * self.a.calls  # type: ignore[no-any-return]


class Caches(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.a.last = y.detach()
        return self.b(y) + self.a.last.mean()  # type: ignore[no-any-return, operator]


def with_hooks() -> nn.Module:
    def keep(module: Any, inputs: Any, output: Tensor) -> None:
        module.activation = output.detach()
        module.calls = getattr(module, "calls", 0) + 1

    model = Net()
    for layer in model.children():
        layer.register_forward_hook(keep)
    return model


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize("emit", ["graph", "modules"])
@pytest.mark.parametrize("make", [Counts, Caches, with_hooks])
def test_a_layer_that_got_attributes_in_training_is_rewritten(
    make: Callable[[], nn.Module], emit: tdfx.Emit, given: bool
) -> None:
    x = torch.rand(4, 8, dtype=torch.float64)
    models: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().double())
        models[-1](x)
    dense, low = models[0], tdfx.rewrite(models[1], FULL, example_inputs=(x,) if given else None, emit=emit)
    assert sum(isinstance(module, tdfx.Factorized) for module in low.modules()) == 2
    for _ in range(3):
        torch.testing.assert_close(low(x), dense(x))
    merged: Any = tdfx.merge(low)
    for name in {"calls", "last", "activation"} & vars(dense.a).keys():
        torch.testing.assert_close(vars(merged.a)[name], vars(dense.a)[name])
    assert vars(merged.a).keys() == vars(dense.a).keys()


@pytest.mark.parametrize(("name", "value"), [("in_features", 3), ("weight", None), ("bias", None)])
def test_what_the_layer_computes_with_cannot_be_set(name: str, value: object) -> None:
    low = tdfx.rewrite(nn.Sequential(nn.Linear(8, 8)), FULL)
    with pytest.raises(tdfx.ModelError, match=f"'{name}' is an attribute of the Linear that these factors replace"):
        setattr(low[0], name, value)  # type: ignore[index]


def test_the_geometry_of_a_convolution_cannot_be_set() -> None:
    low = tdfx.rewrite(nn.Sequential(nn.Conv2d(8, 8, 3)), FULL)
    with pytest.raises(tdfx.ModelError, match="'stride' is an attribute of the Conv2d"):
        low[0].stride = (2, 2)  # type: ignore[index]
