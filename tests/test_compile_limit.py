"""Blocks that are compiled one by one and differ after a rewrite: all of them stay compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn

import tdfx
from tdfx.wrappers.compile_limit import allow_variants, count_variants

BLOCKS = 10
X = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.up(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()


def policy(differ: bool) -> tdfx.Policy:
    ranks = {f"blocks.{index}.*": 4 + index * differ for index in range(BLOCKS)}
    return tdfx.Policy(rank=tdfx.Fixed(ranks), min_gain=0, round_to=1)


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [True, False])
def test_every_block_is_compiled_after_a_rewrite(wrapped: bool) -> None:
    compiled = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        compiled.append(inputs)
        return graph.forward

    model = Net()
    for index, block in enumerate(model.blocks):
        if wrapped:
            model.blocks[index] = cast("nn.Module", torch.compile(block, backend=backend))
        else:
            block.compile(backend=backend)
    model(X)
    assert len(compiled) == 1
    compiled.clear()
    small = tdfx.rewrite(model, policy(differ=True))
    out = small(X)
    assert len(compiled) == BLOCKS
    with torch.compiler.set_stance("force_eager"):
        assert torch.allclose(small(X), out, atol=1e-6)


def test_a_plan_of_a_compiled_model_says_that_its_layers_are_timed_eagerly() -> None:
    cost = tdfx.Measured(budget=1e-9, cache=False)  # nothing is timed for this
    plan = tdfx.Policy(rank=tdfx.Ratio(of=0.5), cost=cost)
    model, note = Net(), "its layers are timed as they run eagerly; compiled, they may gain less or more"
    assert note not in tdfx.plan(model, plan, example_inputs=(X,)).notes
    model.blocks[0].compile(backend="eager")
    assert note in tdfx.plan(model, plan, example_inputs=(X,)).notes
    assert note not in tdfx.plan(model, policy(differ=False), example_inputs=(X,)).notes


def test_a_switch_of_a_compiled_model_counts_what_compiling_took(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []

    def pays_off(*given: Any) -> tuple[bool, str]:
        counted.append(given[-1])
        return False, "not now"

    monkeypatch.setattr("tdfx.training.switch.remaining.seconds_spent_compiling", lambda: 42.0)
    monkeypatch.setattr("tdfx.training.switch.remaining.pays_off", pays_off)
    for compiled, own in ((False, 0.0), (True, 0.0), (True, 7.0)):
        model: nn.Module = Net()
        if compiled:
            model.compile(backend="eager")
        switch = tdfx.Switch(policy(differ=False), when=tdfx.AtStep(1), total_steps=9, recompile_seconds=own)
        switch.step(model)
    assert counted == [0.0, 42.0, 7.0]


def test_the_limit_is_left_alone_where_it_suffices() -> None:
    model = tdfx.rewrite(Net(), policy(differ=False))
    blocks = list(cast("Any", model).blocks)
    assert count_variants(blocks) == 1
    allow_variants(blocks)
    assert torch._dynamo.config.recompile_limit == 8


def test_too_many_variants_for_any_limit_are_said() -> None:
    model = tdfx.rewrite(Net(), policy(differ=True))
    blocks = list(cast("Any", model).blocks)
    assert count_variants(blocks) == BLOCKS
    torch._dynamo.config.accumulated_recompile_limit = 12
    with pytest.warns(tdfx.TdfxWarning, match=r"10 parts of the model .* keeps at most 12 variants, .* equal ranks"):
        allow_variants(blocks)
    assert torch._dynamo.config.recompile_limit == 12
