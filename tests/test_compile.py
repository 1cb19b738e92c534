"""Compiled models are compiled once more, with the same settings, after a rewrite or a merge."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import tdfx
from tdfx.plans.plan import Emit

# Dynamo reads the gradient of every input of compiled code, and hides the warning unless warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

FULL = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
HALF = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1)
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class CountingBackend:
    """A backend that counts how often it compiles."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: fx.GraphModule, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_model_is_compiled_once_after_a_switch(emit: Emit) -> None:
    backend = CountingBackend()
    model = cast("nn.Module", torch.compile(net(), backend=backend, fullgraph=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
    assert backend.count == 1
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, emit=emit)
    assert isinstance(small, torch._dynamo.OptimizedModule)
    assert backend.count == 1
    for _ in range(4):
        step(small, optimizer)
    assert backend.count == 2
    dense = tdfx.merge(small, optimizer=optimizer)
    for _ in range(4):
        step(dense, optimizer)
    assert backend.count <= 3


def test_the_original_model_can_still_be_called() -> None:
    backend = CountingBackend()
    model = cast("nn.Module", torch.compile(net(), backend=backend))
    expected = model(X)
    small = tdfx.rewrite(model, FULL)
    assert torch.allclose(small(X), expected, atol=1e-5)
    assert torch.equal(model(X), expected)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + cast("torch.Tensor", self.down(torch.tanh(self.up(x))))


class Blocks(nn.Module):
    """Has blocks that are compiled separately, as is usual for large models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return cast("torch.Tensor", self.last(x))


def code_of(module: nn.Module) -> Any:
    return module.__dict__.get("_compiled_call_impl")


@pytest.mark.parametrize("emit", ["graph", "modules"])
def test_a_model_that_is_compiled_in_place_is_compiled_again(emit: Emit) -> None:
    backend = CountingBackend()
    model = net()
    model.compile(backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
    assert backend.count == 1
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, emit=emit)
    assert backend.count == 1, "the model was compiled before its first call"
    for _ in range(4):
        step(small, optimizer)
    assert backend.count == 2
    expected = copy.deepcopy(small)(X)
    assert code_of(copy.deepcopy(small)) is None, "a copy of a module has compiled code"
    assert torch.allclose(small(X), expected, atol=1e-6)
    dense = tdfx.merge(small, optimizer=optimizer)
    assert code_of(dense) is not None
    assert torch.allclose(dense(X), expected, atol=1e-5)
    for _ in range(4):
        step(dense, optimizer)
    assert backend.count <= 3


def test_the_settings_of_the_compilation_are_preserved() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return cast("torch.Tensor", self.inside(x))

    strict = Breaks()
    strict.compile(backend="eager", fullgraph=True)
    small = tdfx.rewrite(strict, HALF, emit="modules")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        small(X)
    loose = Breaks()
    loose.compile(backend="eager")
    assert tdfx.rewrite(loose, HALF, emit="modules")(X).shape == (4, 8)
    for sizes, dynamic in ((1, True), (3, False)):
        torch._dynamo.reset()
        backend = CountingBackend()
        other = net()
        other.compile(backend=backend, dynamic=dynamic)
        again = tdfx.rewrite(other, HALF)
        for size in (4, 6, 9):
            again(torch.randn(size, 16))
        assert backend.count == sizes, dynamic
    model = net()
    model.compile(disable=True)
    small = tdfx.rewrite(model, HALF)
    assert small(X).shape == (4, 8)


@pytest.mark.parametrize("emit", ["graph", "modules"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_compiled_blocks_are_compiled_again(emit: Emit, wrapped: bool) -> None:
    backend = CountingBackend()
    model = Blocks()
    for index, block in enumerate(list(model.blocks)):
        if wrapped:
            model.blocks[index] = cast("nn.Module", torch.compile(block, backend=backend, fullgraph=True))
        else:
            block.compile(backend=backend, fullgraph=True)
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step(model, optimizer)
    first = backend.count
    assert 1 <= first <= 3
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, round_to=1, exclude=("blocks.0.*", "last"))
    plan = tdfx.plan(model, policy)
    assert [site.name for site in plan.factorized] == ["first"] + [
        f"blocks.{n}.{m}" for n in (1, 2) for m in ("up", "down")
    ]
    plain = Blocks()
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()})
    expected = tdfx.rewrite(plain, policy)(X)
    assert (emit == "graph") == any(
        "it is compiled by itself" in note for note in tdfx.plan(model, policy, emit=emit).notes
    )
    small: Any = tdfx.rewrite(model, policy, optimizer=optimizer, emit=emit)
    assert isinstance(small, fx.GraphModule) == (emit == "graph")
    assert backend.count == first
    for block in small.blocks:
        assert isinstance(block, torch._dynamo.OptimizedModule) == wrapped
        assert (code_of(block) is not None) == (not wrapped)
    assert torch.allclose(small(X), expected, atol=1e-6)
    step(small, optimizer)
    second = backend.count
    assert first < second <= 2 * first, "the factors were not compiled"
    for _ in range(3):
        step(small, optimizer)
    assert backend.count == second, "the factors were compiled again"
    stem = "_orig_mod." if wrapped else ""
    assert f"blocks.1.{stem}up.factors.0.weight" in small.state_dict()
    assert small.blocks[0].up.weight is model.blocks[0].up.weight  # type: ignore[union-attr]
    dense = tdfx.merge(small, optimizer=optimizer)
    assert list(dense.state_dict()) == keys
    assert type(dense) is Blocks
    assert torch.allclose(dense(X), small(X), atol=1e-5)
    step(dense, optimizer)
    assert backend.count <= second + first
    assert [code_of(block) is not None for block in cast("Any", dense).blocks] == [not wrapped] * 3
    assert all(isinstance(block, torch._dynamo.OptimizedModule) == wrapped for block in dense.blocks)
    model.load_state_dict(dense.state_dict())


def test_a_compiled_block_is_called_by_the_graph() -> None:
    """A graph that contained the block's operations would not call its compiled code."""
    backend = CountingBackend()
    model = Blocks()
    model.blocks[1].compile(backend=backend)
    small = tdfx.rewrite(model, HALF)
    assert isinstance(small, fx.GraphModule)
    small(X)
    assert backend.count == 1
    uncompiled: Any = tdfx.rewrite(Blocks(), HALF)
    uncompiled(X)
    assert backend.count == 1
    assert "blocks_1" in small.code
    assert "blocks_0_up" in small.code


def test_a_model_and_its_blocks_are_both_compiled_again() -> None:
    outer, inner = CountingBackend(), CountingBackend()
    model = Blocks()
    model.get_submodule("blocks.0").compile(backend=inner)
    model.last = cast("Any", torch.compile(model.last, backend=inner))
    both: Any = torch.compile(model, backend=outer)
    both.register_forward_hook(lambda *_: calls.append(1))
    calls: list[int] = []
    small: Any = tdfx.rewrite(both, HALF)
    assert isinstance(small, torch._dynamo.OptimizedModule)
    inside: Any = small._orig_mod
    assert code_of(inside.blocks[0]) is not None
    assert isinstance(inside.last, torch._dynamo.OptimizedModule)
    assert isinstance(inside.last._orig_mod, tdfx.Factorized)
    assert small(X).shape == (4, 8)
    assert calls == [1], "the hook of the wrapper was lost"
    dense: Any = tdfx.merge(small)
    assert type(dense._orig_mod.last._orig_mod) is nn.Linear
    assert torch.allclose(dense(X), small(X), atol=1e-5)


def test_a_block_under_two_names_stays_the_same_block() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block = Block()
            self.fast = torch.compile(self.block, backend="eager")
            self.also = self.fast
            self.other = torch.compile(self.block, backend="aot_eager")
            self.order = [self.block, self.fast]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cast("torch.Tensor", self.also(self.fast(self.block(x))))

    model: Any = Twice()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1, include=("block.*",))
    small: Any = tdfx.rewrite(model, policy)
    assert small.fast is small.also
    assert small.other is not small.fast
    assert small.other.dynamo_ctx is model.other.dynamo_ctx
    assert small.other._orig_mod is small.block
    assert small.fast._orig_mod is small.block
    assert isinstance(small.block.up, tdfx.Factorized)
    assert torch.allclose(small(X), model(X), atol=1e-5)
    assert model.fast._orig_mod is model.block
    assert model.order == [model.block, model.fast]


def test_saving_and_loading_ignore_the_compilation(tmp_path: Path) -> None:
    model = Blocks()
    model.blocks[0] = cast("nn.Module", torch.compile(model.blocks[0], backend="eager"))
    model.blocks[1].compile(backend="eager")
    average = AveragedModel(Blocks())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step(model, optimizer)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer, averaged=average)
    tdfx.save(small, tmp_path / "run.tdfx", optimizer=optimizer)
    again = tdfx.load(tmp_path / "run.tdfx", Blocks())
    assert torch.allclose(again(X), small(X), atol=1e-6)
    backend = CountingBackend()
    fresh = Blocks()
    fresh.blocks[0].compile(backend=backend)
    other: Any = tdfx.load(tmp_path / "run.tdfx", fresh)
    assert code_of(other.blocks[0]) is not None
    assert torch.allclose(other(X), small(X), atol=1e-6)
    assert backend.count == 1, "the loaded graph does not call the compiled block"
    assert not any("_orig_mod" in name for name in average.module.state_dict())


def test_a_compiled_merged_model_can_be_verified() -> None:
    model = net()
    model.compile(backend="eager")
    dense = tdfx.merge(tdfx.rewrite(model, HALF))
    assert code_of(dense) is not None
    reference = net()
    reference.load_state_dict(dense.state_dict())
    report = tdfx.verify(dense, reference, example_inputs=(X,))
    assert report.ok, report


def test_compiled_factors_have_the_gradients_of_uncompiled_factors() -> None:
    model = Blocks()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step(model, optimizer)
    small = tdfx.rewrite(model, HALF, optimizer=optimizer)
    step(small, optimizer)
    plain = copy.deepcopy(small)
    for either in (small, plain):
        either.zero_grad()
        either(X).square().sum().backward()
    for parameter, expected in zip(small.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert torch.allclose(parameter.grad, expected.grad, atol=1e-4)
    step(tdfx.merge(small, optimizer=optimizer), optimizer)


class Checkpointed(nn.Module):
    """Recomputes its inner network in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inside = net()
        self.last = nn.Linear(8, 5)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.last(checkpoint(self.inside, x, use_reentrant=self.reentrant)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = Checkpointed(reentrant).double()
    x = X.double().requires_grad_()
    small = tdfx.rewrite(model, FULL)
    assert any(isinstance(module, tdfx.Factorized) for module in cast("nn.Module", small.inside).modules())
    calls: list[int] = []
    cast("Any", small).inside[0].factors[0].register_forward_hook(lambda *_: calls.append(1))
    y = x.detach().clone().requires_grad_()
    model(y).square().sum().backward()
    small(x).square().sum().backward()
    assert len(calls) == 2, "the backward pass did not recompute the forward"
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad - y.grad).norm() <= 1e-10 * y.grad.norm()
