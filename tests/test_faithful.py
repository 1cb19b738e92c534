"""Code that a graph would not repeat faithfully keeps the model's class, and planning changes nothing of the user's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
QUARTER = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0)
TOLERANCE = 1e4 * torch.finfo(torch.float64).eps


class Base(nn.Module):
    """Has a layer, a counter and an attribute."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))
        self.steps = 1
        self.auxiliary: Tensor | None = None


class CountsInABuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.layer(x)  # type: ignore[no-any-return]


class KeepsAnOutput(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.auxiliary = y.pow(2).mean()
        return y


class CountsInPython(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.layer(x) / self.steps  # type: ignore[no-any-return]


class StopsGradients(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = self.layer(x)
        return y


class Casts(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.layer(x)  # type: ignore[no-any-return]


class Skips(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand(1).item() < 0.5 else self.layer(x)


class Checkpoints(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)  # type: ignore[no-any-return]


class CheckpointsReentrantly(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=True)  # type: ignore[no-any-return]


class UsesIsinstance(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * 2 if isinstance(x, Tensor) else x)  # type: ignore[no-any-return]


class HasMethodGraph(Base):
    def graph(self) -> str:
        return "a method of the model"

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (CountsInABuffer, "assigns to an attribute, self.count"),
        (KeepsAnOutput, "assigns to an attribute, self.auxiliary"),
        (CountsInPython, "assigns to an attribute, self.steps"),
        (StopsGradients, "enters a context by with"),
        (Casts, "enters a context by with"),
        (Skips, "calls rand(), which leaves no trace"),
        (Checkpoints, "calls checkpoint(), which leaves no trace"),
        (CheckpointsReentrantly, "calls checkpoint(), which leaves no trace"),
        (UsesIsinstance, "asks for isinstance(x, Tensor)"),
        (HasMethodGraph, "'graph' has a name that GraphModule uses"),
    ],
)
def test_code_that_a_graph_would_not_repeat_keeps_the_class(build: Callable[[], Base], why: str) -> None:
    model = build().double()
    before = copy.deepcopy(model.state_dict())
    plan = tdfx.plan(model, FULL, example_inputs=torch.rand(2, 8, dtype=torch.float64))
    assert plan.emit == "modules"
    assert why in plan.notes[0]
    assert model.steps == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    full = tdfx.rewrite(model, FULL)
    assert type(full) is build
    x = torch.rand(4, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    # The two models share buffers and have attributes of their own; their outputs are equal in either case.
    tolerance = 1e-1 if build is Casts else TOLERANCE
    assert float((full(x) - expected).detach().abs().max()) <= tolerance


class Listed(nn.Module):
    """Has layers in ModuleList and ModuleDict."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 8)})
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        for block in self.blocks:
            x = block(x).relu()
        return self.heads["a"](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("traceable", [True, False])
def test_layers_in_lists_and_dictionaries_of_modules_are_sites(traceable: bool) -> None:
    plan = tdfx.plan(Listed(traceable), QUARTER)
    assert [site.name for site in plan.factorized] == ["blocks.0", "blocks.1", "heads.a"]
    assert plan.emit == ("graph" if traceable else "modules")


class HasClosure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.call = lambda x: self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_function_that_closes_over_the_model_calls_the_new_layer(emit: tdfx.Emit) -> None:
    low = tdfx.rewrite(HasClosure(), QUARTER, emit=emit)
    low(torch.rand(2, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in low.parameters())


def test_unknown_compiled_code_is_not_copied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model._compiled_call_impl = lambda *_: pytest.fail("the old code was called")
    with pytest.warns(
        tdfx.TdfxWarning, match=r"The model was compiled in place in a way that tdfx does not know, .* again"
    ):
        low = tdfx.rewrite(model, QUARTER)
    low(torch.rand(2, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in low.parameters())


class KeywordCall(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)  # type: ignore[no-any-return]


def test_a_layer_called_by_keyword_is_counted() -> None:
    low = tdfx.rewrite(KeywordCall(), QUARTER, example_inputs=torch.rand(3, 8))
    assert low(torch.rand(3, 8)).shape == (3, 8)
    assert tdfx.plan(KeywordCall(), QUARTER, example_inputs=torch.rand(3, 8)).flops_before == 2 * 3 * 64


class ChangesWeightsInTrain(Base):
    def train(self, mode: bool = True) -> ChangesWeightsInTrain:
        self.layer.weight.data += 1
        self.layer.requires_grad_(mode)
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_planning_does_not_call_the_models_own_train() -> None:
    model = ChangesWeightsInTrain()
    weight = model.layer.weight.detach().clone()
    tdfx.plan(model, QUARTER, example_inputs=torch.rand(2, 8))
    assert torch.equal(model.layer.weight, weight)
    assert model.layer.weight.requires_grad


def test_example_inputs_are_not_changed() -> None:
    x = torch.randn(4, 8)
    before = x.clone()
    tdfx.plan(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8)), QUARTER, example_inputs=x)
    assert torch.equal(x, before)


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.gain = nn.Parameter(torch.ones(1))


def test_a_layer_that_holds_more_than_a_weight_and_a_bias_is_kept() -> None:
    (site,) = tdfx.plan(nn.Sequential(Scaled()), QUARTER)
    assert site.reason is tdfx.Reason.CUSTOM_FORWARD
    assert site.note == "Scaled holds more than a weight and a bias"


def test_a_hook_on_a_weight_causes_a_warning() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.get_parameter("0.weight").register_hook(lambda gradient: gradient * 0)  # type: ignore[no-untyped-call]
    with pytest.warns(tdfx.TdfxWarning, match="weight of site '0' has hooks or attributes of its own"):
        tdfx.rewrite(model, QUARTER)


def test_a_plan_notes_an_encoder_layer_that_cannot_be_traced() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plan = tdfx.plan(layer, QUARTER)
    assert "given back as TransformerEncoderLayer, not as a graph" in plan.notes[0]


def test_the_result_compiles_and_exports() -> None:
    graph = tdfx.rewrite(Listed(True).double(), QUARTER)
    assert isinstance(graph, fx.GraphModule)
    x = torch.rand(3, 8, dtype=torch.float64)
    exported: Any = torch.export.export(graph.eval(), (x,)).module()
    assert float((exported(x) - graph(x)).detach().abs().max()) < TOLERANCE
    assert F.mse_loss(exported(x), graph(x)) < TOLERANCE
