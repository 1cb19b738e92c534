"""However many layers there are, a switch needs a few copies of the largest weight beside what was live and what stays."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkout import needs, tool
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import tdfx
from tdfx.passes.analysis.find import Find
from tdfx.passes.analysis.trace import Trace
from tdfx.passes.planning import spectra
from tdfx.passes.planning.select import Select
from tdfx.passes.program import Program
from tdfx.passes.transform.rewrite import Rewrite

pytestmark = needs("bench_memory.py")

FEW = 14
"""Copies of the largest weight in its own dtype; a tensor in float64 counts as two copies. They are the weight, its other
unfolding, its basis and two for the kept bases; or two moments, the joined weight, its derivative and two intermediate
results. After other work in the same process a further copy was measured."""
FULL_RANK = 24
"""The same at full rank, where each factor and each intermediate result may be as large as the weight."""
MANY = 24

Call = Callable[[nn.Module, Optimizer], object]


def policy(share: float) -> tdfx.Policy:
    return tdfx.Policy(rank=tdfx.Ratio(of=share), min_gain=0, round_to=1)


def linears(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(depth)))


def convolutions(depth: int) -> nn.Sequential:
    layers = (nn.Conv2d(24, 24, 3, padding=1, bias=False) for _ in range(depth))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


Build = Callable[[int], nn.Sequential]
BUILDS: dict[Build, tuple[int, ...]] = {linears: (2, 64), convolutions: (2, 24, 4, 4)}


@pytest.fixture
def counter() -> Any:
    return tool("bench_memory").LiveBytes


def kept_tensors(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return [*parameters, *gradients, *states]


def trained(model: nn.Module, shape: tuple[int, ...]) -> Optimizer:
    """Take one step of AdamW, so that there are gradients and two moments of everything."""
    optimizer = AdamW(model.parameters())
    torch.autograd.backward(model(torch.randn(shape)).square().mean())
    optimizer.step()
    return optimizer


def copies_at_work(counter: Any, model: nn.Module, optimizer: Optimizer, call: Call) -> float:
    """Return the peak of a call minus what was live and what stays, in weights of the largest layer."""
    before = kept_tensors(model, optimizer)
    with counter(before) as live:
        before_call = live.begin()
        result = call(model, optimizer)
        gc.collect()
        at_work = live.peak - max(before_call, live.now)
    del result
    return float(at_work / largest(model))


def largest(model: nn.Module) -> int:
    def bytes_of(layer: nn.Module) -> int:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.numel() * weight.element_size()

    return max(
        bytes_of(module) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d | tdfx.Factorized)
    )


CALLS: dict[str, Call] = {
    "plan": lambda model, _: tdfx.plan(model, policy(0.25)),
    # At full rank the bases are as large as the weights, so that most of them are not kept.
    "plan at full rank": lambda model, _: tdfx.plan(model, policy(1.0)),
    "rewrite": lambda model, optimizer: tdfx.rewrite(model, policy(0.25), optimizer=optimizer),
    "rewrite at full rank": lambda model, optimizer: tdfx.rewrite(model, policy(1.0), optimizer=optimizer),
    "rewrite by a budget": lambda model, optimizer: tdfx.rewrite(
        model, tdfx.Policy(parameters=0.5, min_gain=0), optimizer=optimizer
    ),
}
LATER: dict[str, Call] = {
    "lowering": lambda model, optimizer: tdfx.rewrite(model, policy(0.1), optimizer=optimizer),
    "merge": lambda model, optimizer: tdfx.merge(model, optimizer=optimizer),
}


@pytest.mark.parametrize(
    ("name", "build"),
    [
        *((name, linears) for name in [*CALLS, *LATER]),
        # A plan, and full rank, keep and compute the same for both.
        *((name, convolutions) for name in ("rewrite", "rewrite by a budget", "lowering", "merge")),
    ],
)
def test_many_layers_need_a_few_copies_of_the_largest_weight(counter: Any, name: str, build: Build) -> None:
    model: nn.Module = build(MANY)
    optimizer = trained(model, BUILDS[build])
    if name in LATER:
        model = tdfx.rewrite(model, policy(0.25), optimizer=optimizer)
        optimizer = trained(model, BUILDS[build])
    copies = copies_at_work(counter, model, optimizer, {**CALLS, **LATER}[name])
    assert 1 < copies < (FULL_RANK if name.endswith("full rank") else FEW)


def test_keeping_the_bases_of_all_sites_would_be_noticed(counter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "_ROOM", 10**6)
    model = linears(MANY)
    optimizer = trained(model, BUILDS[linears])
    # Each basis is as large as the weight, in float64.
    assert copies_at_work(counter, model, optimizer, CALLS["plan at full rank"]) > 2 * MANY


def test_a_copy_counts_until_it_is_freed(counter: Any) -> None:
    weight = torch.zeros(1000)
    with counter([weight]) as live:
        assert live.begin() == 4000
        kept = weight.clone()
        assert (live.now, live.peak) == (8000, 8000)
        part = kept[:10].view(2, 5)
        del kept
        assert live.now == 8000, "a view keeps the whole storage"
        del part
        assert (live.now, live.peak) == (4000, 8000)


def test_a_tensor_that_only_autograd_holds_counts(counter: Any) -> None:
    x = torch.zeros(1000, requires_grad=True)
    with counter([x]) as live:
        y = x.exp().sin()  # autograd saves the exponential for the derivative
        assert live.now == 12000
        del y
        assert live.now == 4000


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_kept_truncated_and_recomputed_bases_give_the_same_bits(build: Build, share: float) -> None:
    results = []
    for room in (0, 1, 10**6):
        torch.manual_seed(0)
        program = Find()(Trace()(Program(module=build(4))).program).program
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spectra, "_ROOM", room)
            selected = Select(policy(share))(program)
        planned = selected.program
        kept = len(selected.spectra.kept_sites)
        assert (kept < 4) if room == 0 else kept > 0
        rewritten = Rewrite(selected.spectra)(planned).program.module
        assert selected.spectra.kept_sites == set(), "a used basis is still kept"
        errors = [site.error for site in planned.plan or ()]
        results.append(([parameter.detach().numpy().tobytes() for parameter in rewritten.parameters()], errors))
    assert results[0] == results[1] == results[2]
