"""The laws of rewrite and merge: full rank changes nothing, merge is exact, the model passed in is not changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.resnet import BasicBlock, ResNet

import tdfx

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0)
LOW = tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0, round_to=1)

# A chain of d layers rounds about d times, and a product of n terms, 4608 at most, rounds about sqrt(n) times.
TOLERANCE = 1e5 * torch.finfo(torch.float64).eps


def conv_net() -> nn.Module:
    """Return a network with stride, padding, dilation, "same", no bias, one tap, and a kernel that is not square."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, (3, 5), padding="same", dilation=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 10, 1, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(10, 14, 3, padding=2, padding_mode="circular"),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(14 * 64, 9),
        nn.ReLU(),
        nn.Linear(9, 5, bias=False),
    )


class Residual(nn.Module):
    """Has two skip connections, a layer that is called twice, and an attribute and a method that training code may use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.classes = 4

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.norm(self.body(x)).relu()
        x = x + self.body(x).tanh()
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]

    @property
    def width(self) -> int:
        return self.head.in_features


class NarrowResNet(ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet-18 with its own depth and forward, at a quarter of its width."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(128, 10)

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **named: Any) -> nn.Sequential:
        return cast("nn.Sequential", super()._make_layer(block, planes // 4, *arguments, **named))


Build = Callable[[], nn.Module]
NETS: dict[str, Build] = {"conv_net": conv_net, "residual": Residual, "resnet18": NarrowResNet}
EMITS = ("graph", "modules")


def inputs() -> Tensor:
    return torch.rand(4, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def distance(value: Tensor, other: Tensor) -> float:
    value, other = value.detach(), other.detach()
    return float((value - other).abs().max() / other.abs().max().clamp_min(1e-30))


def run(model: nn.Module, mode: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients of a copy, so that the model's running statistics do not change."""
    copied = copy.deepcopy(model).train(mode)
    torch.manual_seed(11)
    x = inputs().requires_grad_()
    output = copied(x)
    output.square().sum().backward()
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in copied.named_parameters() if parameter.grad is not None}
    return output.detach(), {**gradients, "(input)": x.grad}


def snapshot(model: nn.Module) -> dict[str, object]:
    """Return everything that must not change: tensors by identity and by value, modes, attributes, modules."""
    return {
        "tensors": [(name, id(tensor)) for name, tensor in [*model.named_parameters(), *model.named_buffers()]],
        "values": [value.detach().clone().numpy().tobytes() for value in model.state_dict().values()],
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "attributes": [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
    }


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_full_rank_changes_nothing(name: str, emit: tdfx.Emit, mode: bool) -> None:
    dense = NETS[name]().double()
    full = tdfx.rewrite(dense, FULL, emit=emit)
    assert sum(isinstance(module, tdfx.Factorized) for module in full.modules()) == len(tdfx.plan(dense, FULL)) >= 3
    expected, dense_gradients = run(dense, mode)
    output, gradients = run(full, mode)
    assert distance(output, expected) < TOLERANCE
    for key in dense_gradients.keys() & gradients.keys():
        assert distance(gradients[key], dense_gradients[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", NETS)
def test_full_rank_gradients_of_factors_follow_from_the_weights(name: str) -> None:
    dense = NETS[name]().double()
    full = tdfx.rewrite(dense, FULL)
    _, dense_gradients = run(dense, True)
    _, gradients = run(full, True)
    for path, layer in full.named_modules():
        if isinstance(layer, tdfx.Factorized):
            layer.weight.backward(dense_gradients[f"{path}.weight"])  # type: ignore[no-untyped-call]
            for index, weight in enumerate(layer.weights):
                assert weight.grad is not None
                assert distance(gradients[f"{path}.factors.{index}.weight"], weight.grad) < TOLERANCE, path


@pytest.mark.parametrize("name", NETS)
def test_low_rank_changes_the_output(name: str) -> None:
    dense = NETS[name]().double()
    assert distance(run(tdfx.rewrite(dense, LOW), True)[0], run(dense, True)[0]) > 1e-2


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("name", NETS)
def test_merge_is_exact_after_training(name: str, emit: tdfx.Emit) -> None:
    dense = NETS[name]().double()
    low = tdfx.rewrite(dense, LOW, emit=emit)
    optimizer = torch.optim.SGD(low.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        low(inputs()).square().mean().backward()
        optimizer.step()
    merged = tdfx.merge(low)
    assert type(merged) is type(dense)
    assert not any(isinstance(module, tdfx.Factorized) for module in merged.modules())
    for mode in (True, False):
        assert distance(run(merged, mode)[0], run(low, mode)[0]) < TOLERANCE
    entries = [(key, value.shape, value.dtype) for key, value in merged.state_dict().items()]
    assert entries == [(key, value.shape, value.dtype) for key, value in dense.state_dict().items()]
    NETS[name]().double().load_state_dict(merged.state_dict(), strict=True)


@pytest.mark.parametrize("emit", EMITS)
@pytest.mark.parametrize("name", NETS)
def test_the_models_passed_in_are_not_changed(name: str, emit: tdfx.Emit) -> None:
    dense = NETS[name]().double()
    dense[1].eval() if isinstance(dense, nn.Sequential) else dense.eval()
    before = snapshot(dense)
    low = tdfx.rewrite(dense, LOW, emit=emit, example_inputs=(inputs(),))
    assert snapshot(dense) == before
    during = snapshot(low)
    tdfx.merge(low)
    assert snapshot(low) == during
    assert snapshot(dense) == before


@pytest.mark.parametrize("name", NETS)
def test_parameters_that_are_not_factorized_are_shared(name: str) -> None:
    dense = NETS[name]().double()
    low = tdfx.rewrite(dense, LOW)
    shared = {id(parameter) for parameter in low.parameters()}
    weights = {f"{site.name}.weight" for site in tdfx.plan(dense, LOW).factorized}
    for key, parameter in dense.named_parameters():
        assert (id(parameter) in shared) == (key not in weights), key
    assert [id(buffer) for buffer in low.buffers()] == [id(buffer) for buffer in dense.buffers()]


@pytest.mark.parametrize("name", NETS)
def test_the_same_plan_gives_the_same_bits(name: str) -> None:
    dense = NETS[name]().double()
    plan = tdfx.plan(dense, LOW)
    planned = tdfx.rewrite(dense, plan)
    from_json = tdfx.rewrite(copy.deepcopy(dense), tdfx.Plan.from_json(plan.to_json()))
    direct = tdfx.rewrite(dense, LOW)
    models = (planned, from_json, direct)
    for parameter, *others in zip(*(model.parameters() for model in models), strict=True):
        assert all(torch.equal(parameter, other) for other in others)


@pytest.mark.parametrize("emit", EMITS)
def test_rewriting_twice_is_rewriting_once(emit: tdfx.Emit) -> None:
    plan = tdfx.plan(dense := Residual().double(), LOW, emit=emit)
    once = tdfx.rewrite(dense, plan)
    twice = tdfx.rewrite(once, plan)
    assert [id(parameter) for parameter in twice.parameters()] == [id(parameter) for parameter in once.parameters()]
    assert distance(run(twice, True)[0], run(once, True)[0]) == 0
    assert type(tdfx.merge(twice)) is Residual
    assert {site.reason for site in tdfx.plan(once, LOW)} == {tdfx.Reason.FACTORIZED}


def test_a_layer_called_twice_is_one_site_with_two_calls() -> None:
    plan = tdfx.plan(Residual(), LOW, example_inputs=(torch.rand(1, 3, 8, 8),))
    assert plan["body"].calls == 2
    assert plan["body"].flops_before == 2 * (2 * 8 * 8 * 9 * 64)


def test_a_graph_has_the_attributes_methods_and_properties_of_the_original() -> None:
    graph = tdfx.rewrite(Residual().double(), FULL)
    assert isinstance(graph, fx.GraphModule)
    assert graph.classes == 4
    assert graph.width == 8
    features = cast("Callable[[Tensor], Tensor]", graph.features)
    assert features(inputs()).shape == (4, 8)
    assert distance(graph.get_submodule("head")(features(inputs())), graph(inputs())) < TOLERANCE
    assert isinstance(graph, Residual)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = graph.nonsense


def test_a_graph_of_a_sequential_is_still_a_sequence() -> None:
    dense = conv_net().double()
    graph = tdfx.rewrite(dense, FULL)
    assert isinstance(graph, fx.GraphModule)
    assert isinstance(graph, nn.Sequential)
    assert len(graph) == len(list(graph)) == 13
    assert isinstance(graph[0], tdfx.Factorized)
    x = inputs()
    for layer in graph.eval():
        x = layer(x)
    assert distance(x, dense.eval()(inputs())) < TOLERANCE


def test_a_pickled_graph_computes_the_same() -> None:
    graph = tdfx.rewrite(Residual().double(), LOW)
    expected = run(graph, True)[0]
    graph.__dict__["classes"] = 7
    twin = pickle.loads(pickle.dumps(graph))
    assert twin.classes == 7
    assert distance(run(twin, True)[0], expected) == 0


def test_a_graph_follows_train_and_eval() -> None:
    dense = conv_net().double()
    graph = tdfx.rewrite(dense, FULL)
    assert isinstance(graph, fx.GraphModule)
    graph.train()
    assert distance(graph(inputs()), graph(inputs())) > 1e-6, "dropout is off in train mode"
    graph.eval()
    assert distance(graph(inputs()), graph(inputs())) == 0
    assert distance(graph(inputs()), dense.eval()(inputs())) < TOLERANCE


@pytest.mark.parametrize("emit", EMITS)
def test_a_rewritten_model_copies_pickles_and_loads(emit: tdfx.Emit) -> None:
    low = tdfx.rewrite(Residual().double(), LOW, emit=emit)
    expected = run(low, True)[0]
    for twin in (copy.deepcopy(low), pickle.loads(pickle.dumps(low)), copy.copy(low)):
        assert isinstance(twin, Residual)
        assert isinstance(twin, fx.GraphModule) == (emit == "graph")
        assert list(twin.state_dict()) == list(low.state_dict())
        assert distance(run(twin, True)[0], expected) == 0
        assert type(tdfx.merge(twin)) is Residual
    deep = copy.deepcopy(low)
    assert not {id(parameter) for parameter in deep.parameters()} & {id(parameter) for parameter in low.parameters()}
    other = tdfx.rewrite(Residual().double(), LOW, emit=emit)
    other.load_state_dict(low.state_dict(), strict=True)
    other.load_state_dict({key: value.clone() for key, value in low.state_dict().items()}, strict=True)
    assert distance(run(other, False)[0], run(low, False)[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rewrite_and_merge_preserve_the_dtype(dtype: torch.dtype) -> None:
    dense = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 6)).to(dtype)
    full = tdfx.rewrite(dense, FULL)
    assert {parameter.dtype for parameter in full.parameters()} == {dtype}
    merged = tdfx.merge(full)
    # Each factor is rounded once to the dtype, so that a product of three is off by a few units in the last place.
    for parameter, expected in zip(merged.parameters(), dense.parameters(), strict=True):
        assert distance(parameter.double(), expected.double()) < 30 * torch.finfo(dtype).eps


def test_a_model_that_is_itself_a_layer() -> None:
    dense = nn.Conv2d(4, 8, 3, padding=1).double()
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64)
    full = tdfx.rewrite(dense, FULL)
    assert isinstance(full, tdfx.Factorized)
    assert distance(full(x), dense(x)) < TOLERANCE
    merged = tdfx.merge(full)
    assert type(merged) is nn.Conv2d
    assert distance(merged(x), dense(x)) < TOLERANCE
    assert list(merged.state_dict()) == ["weight", "bias"]


def test_a_rewrite_that_keeps_every_site_merges_back() -> None:
    dense = Residual()
    kept = tdfx.rewrite(dense, tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=100))
    assert not any(isinstance(module, tdfx.Factorized) for module in kept.modules())
    merged = tdfx.merge(kept)
    assert type(merged) is Residual
    assert [id(parameter) for parameter in merged.parameters()] == [id(parameter) for parameter in dense.parameters()]


def test_a_rewritten_backbone_inside_a_larger_model_merges() -> None:
    backbone = Residual().double()
    model = nn.Sequential(tdfx.rewrite(backbone, LOW), nn.Linear(4, 2).double())
    merged = tdfx.merge(model)
    assert isinstance(merged, nn.Sequential)
    assert type(merged[0]) is Residual
    assert distance(merged(inputs()), model(inputs())) < TOLERANCE
