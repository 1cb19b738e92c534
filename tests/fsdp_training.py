"""Checks that training in shards goes on over a rewrite and a merge as it does on one process."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fsdp_runs import (
    HALF,
    QUARTER,
    ROUNDING,
    Run,
    X,
    adamw,
    assert_same_runs,
    distance,
    net,
    sgd,
    sharded,
    train,
    training_run,
    values,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.optim import Adam, Optimizer
from two_processes import on_both

import tdfx
from tdfx.layers.factorized import Factorized


@functools.cache
def single_run(build_optimizer: Callable[[Any], Optimizer], carry: bool = True) -> Run:
    return training_run(net(), build_optimizer, halves=False, carry=carry)


def assert_like_a_single_process(
    build_optimizer: Callable[[Any], Optimizer], mesh: DeviceMesh, **settings: Any
) -> None:
    run = training_run(sharded(mesh=mesh, **settings), build_optimizer, halves=True)
    assert_same_runs(run, single_run(build_optimizer))
    assert any(".factors." in name for name in run.factorized)
    without_state = single_run(build_optimizer, carry=False)
    assert distance(run.factorized, without_state.factorized) > 1e-3, "without its state the optimizer goes elsewhere"


def check_sgd_is_the_single_process_run(mesh: DeviceMesh) -> None:
    assert_like_a_single_process(sgd, mesh)


def check_adamw_is_the_single_process_run(mesh: DeviceMesh) -> None:
    assert_like_a_single_process(adamw, mesh)


def check_always_resharded_is_the_single_process_run(mesh: DeviceMesh) -> None:
    assert_like_a_single_process(lambda parameters: Adam(parameters, lr=0.01), mesh, reshard_after_forward=True)


def check_never_resharded_is_the_single_process_run(mesh: DeviceMesh) -> None:
    assert_like_a_single_process(sgd, mesh, reshard_after_forward=False)


def check_recomputed_is_the_single_process_run(mesh: DeviceMesh) -> None:
    wish = dataclasses.replace(HALF, recompute=True)
    run = training_run(sharded(mesh=mesh, reshard_after_forward=True), sgd, halves=True, policy=wish)
    assert all(layer.recompute for layer in run.small.modules() if isinstance(layer, Factorized))
    assert_same_runs(run, single_run(sgd))


def check_hybrid_sharding_is_the_single_process_run(mesh: DeviceMesh) -> None:
    for shape in ((1, 2), (2, 1)):
        assert_like_a_single_process(sgd, init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def check_offloaded_is_the_single_process_run(mesh: DeviceMesh) -> None:
    assert_like_a_single_process(sgd, mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))


def check_shapes_smaller_than_the_mesh(mesh: DeviceMesh) -> None:
    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(16, 1), nn.Linear(1, 5)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](torch.tanh(self.blocks[0](x)))  # type: ignore[no-any-return]

    def thin() -> nn.Module:
        torch.manual_seed(0)
        return Thin().double()

    run = training_run(sharded(thin(), mesh), adamw, halves=True)
    assert_same_runs(run, training_run(thin(), adamw, halves=False))
    parameters: Any = [parameter for parameter in run.small.parameters() if parameter.shape[0] == 1]
    assert [len(parameter.to_local()) for parameter in parameters] == [1 - dist.get_rank()] * 4


def check_convolutions_and_attention(mesh: DeviceMesh) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv1d(1, 12, 3, padding=1), nn.Conv1d(12, 8, 3, bias=False)])
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.last = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x if x.dim() == 3 else x[:, None])
            x = x.mT
            if x.shape[0] > 10_000:  # what torch.fx cannot follow
                raise ValueError
            return self.last(self.attention(x, x, x)[0].mean(1))  # type: ignore[no-any-return]

    def mixed() -> nn.Module:
        torch.manual_seed(0)
        return Mixed().double()

    run = training_run(sharded(mixed(), mesh), sgd, halves=True)
    single_run = training_run(mixed(), sgd, halves=False)
    assert_same_runs(run, single_run)
    plan: Any = run.small._tdfx_plan
    assert plan["attention.in_proj_weight"].factorized
    assert plan["attention.out_proj"].factorized
    assert plan["blocks.0"].factorized
    assert plan["blocks.0"].flops_before == single_run.small._tdfx_plan["blocks.0"].flops_before  # type: ignore[index, union-attr]


def check_low_precision(mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(net().float(), mesh, mp_policy=policy)
    optimizer = adamw(model.parameters())
    x = X.float()

    def step(model: nn.Module) -> Tensor:
        output: Tensor = model(x)
        output.square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return output

    with tdfx.Moments(model) as moments:
        step(model)
    assert moments.loop is not None
    assert {seen.dtype for seen in moments.loop.sites.values()} == {torch.bfloat16}  # the shards are float32
    small = tdfx.rewrite(model, HALF, example_inputs=x, optimizer=optimizer)
    assert step(small).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert step(tdfx.merge(small, optimizer=optimizer)).dtype == torch.bfloat16


def check_ranks_are_lowered(mesh: DeviceMesh) -> None:
    def run(model: nn.Module, halves: bool) -> dict[str, Tensor]:
        optimizer = sgd(model.parameters())
        train(model, optimizer, 1, halves=halves)
        for seed, policy in ((2, HALF), (3, QUARTER)):
            model = tdfx.rewrite(model, policy, example_inputs=X, optimizer=optimizer, emit="modules")
            train(model, optimizer, seed, halves=halves)
        assert next(site.ranks for site in model._tdfx_plan.factorized) == (4,)  # type: ignore[union-attr]
        return values(model)

    assert distance(run(sharded(mesh=mesh), True), run(net(), False)) < ROUNDING


def check_decay_and_penalty_go_on(mesh: DeviceMesh) -> None:
    def run(model: nn.Module, halves: bool) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        penalty = tdfx.LowRankPenalty(model, tdfx.plan(model, HALF, example_inputs=X), optimizer, strength=0.1)
        train(model, optimizer, 1, halves=halves)
        penalty.compress()
        train(model, optimizer, 2, halves=halves)
        assert penalty.distance() > 0.1
        penalty.remove()
        small = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer, emit="modules")
        decay = tdfx.FrobeniusDecay(small, optimizer)
        train(small, optimizer, 3, halves=halves)
        decay.remove()
        return values(small)

    assert distance(run(sharded(mesh=mesh), True), run(net(), False)) < ROUNDING


def check_a_switch_comes_when_the_sites_settle(mesh: DeviceMesh) -> None:
    def run(model: nn.Module, halves: bool) -> tuple[tdfx.Switch, list[int], dict[str, Tensor]]:
        optimizer = sgd(model.parameters())
        when = tdfx.Settled(every=1, window=2, tolerance=4e-3, moved=1e-4, timeout=14)
        # Two processes scale the moments of their halves one by one, so that a metric is theirs up to more than rounding.
        switch = tdfx.Switch(HALF, when=when, collect=0)
        switched_at = []
        for step in range(16):
            train(model, optimizer, step, halves=halves, count=1)
            stepped = switch.step(model, optimizer=optimizer, emit="modules")
            switched_at += [step] if stepped is not model else []
            model = stepped
        return switch, switched_at, values(model)

    switch, switched_at, weights = run(sharded(mesh=mesh), True)
    single_switch, single_switched_at, single_weights = run(net(), False)
    assert switch.done
    assert switch.plan is not None
    assert len(switch.plan.factorized) == 7
    assert switched_at == single_switched_at
    assert len(switched_at) == 1
    assert "sites held within 0.004 over 2 looks" in str(switch), "it switches before the timeout"
    events, single_events = (
        [(event.step, event.what, event.sites) for event in each.events] for each in (switch, single_switch)
    )
    assert events == single_events
    assert distance(weights, single_weights) < 100 * ROUNDING
    bits = [weight.numpy().tobytes() for weight in weights.values()]
    first, second = on_both([str(switch), switch.plan.to_json(), bits])
    assert first == second


def check_a_switch_weighs_what_is_left(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    switch = tdfx.Switch(HALF, when=tdfx.Settled(every=1, timeout=3), total_steps=3)
    for _ in range(4):
        model = switch.step(model, example_inputs=X)
    assert switch.done
    assert [event.what for event in switch.events] == ["too_late"]
    assert not any(isinstance(module, Factorized) for module in model.modules())


def check_checkpoints(mesh: DeviceMesh) -> None:
    folder = Path(sys.argv[1])

    def factorized_model() -> tuple[Any, Optimizer]:
        model = sharded(mesh=mesh)
        optimizer = adamw(model.parameters())
        train(model, optimizer, 1, halves=True)
        return tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer), optimizer

    model, optimizer = factorized_model()
    train(model, optimizer, 2, halves=True)
    weights, states = get_state_dict(model, optimizer)
    assert list(weights) == list(model.state_dict())
    save({"model": weights, "optimizer": states}, checkpoint_id=folder / "checkpoint")
    saved = values(model)
    train(model, optimizer, 3, halves=True)
    expected = values(model)
    resumed, resumed_optimizer = factorized_model()
    assert distance(values(resumed), saved) > 1e-3
    weights, states = get_state_dict(resumed, resumed_optimizer)
    load({"model": weights, "optimizer": states}, checkpoint_id=folder / "checkpoint")
    set_state_dict(resumed, resumed_optimizer, model_state_dict=weights, optim_state_dict=states)
    assert distance(values(resumed), saved) == 0.0
    train(resumed, resumed_optimizer, 3, halves=True)
    assert distance(values(resumed), expected) == 0.0


def check_a_compiled_model_is_compiled_again(mesh: DeviceMesh) -> None:
    def run(model: nn.Module, halves: bool) -> dict[str, Tensor]:
        compiled: Any = torch.compile(model, backend="eager")
        optimizer = sgd(compiled.parameters())
        train(compiled, optimizer, 1, halves=halves)
        small: Any = tdfx.rewrite(compiled, HALF, example_inputs=X, optimizer=optimizer, emit="modules")
        assert type(small) is type(compiled)
        train(small, optimizer, 2, halves=halves)
        assert isinstance(small._orig_mod, FSDPModule) == halves
        return values(small)

    assert distance(run(sharded(mesh=mesh), True), run(net(), False)) < ROUNDING


def check_blocks_that_are_compiled_in_place_are_so_again(mesh: DeviceMesh) -> None:
    compilations = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        compilations[0] += 1
        return graph.forward

    def run(model: Any, halves: bool) -> dict[str, Tensor]:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend=backend)
        if halves:
            model = sharded(model, mesh)
        optimizer = sgd(model.parameters())
        compilations[0] = 0
        train(model, optimizer, 1, halves=halves)
        assert compilations[0] > 0
        small: Any = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer, emit="modules")
        compilations[0] = 0
        train(small, optimizer, 2, halves=halves)
        assert compilations[0] > 0
        assert all(block.__dict__["_compiled_call_impl"] is not None for block in small.blocks)
        return values(small)

    assert distance(run(net(), True), run(net(), False)) < ROUNDING
