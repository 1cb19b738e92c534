"""Checks of what a rewrite does to shards: one plan, the same factors, shared parameters, and no model in one place."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from fsdp_runs import (
    HALF,
    ROUNDING,
    Deep,
    PeakBytes,
    X,
    adamw,
    distance,
    full,
    net,
    sgd,
    sharded,
    train,
    values,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD
from two_processes import on_both

import tdfx
from tdfx.cost.count import Flow
from tdfx.layers.factorized import Factorized


def check_factors_have_the_bits_of_an_unsharded_rewrite(mesh: DeviceMesh) -> None:
    small = tdfx.rewrite(sharded(mesh=mesh), HALF, example_inputs=X)
    plain_small = tdfx.rewrite(net(), HALF, example_inputs=X, emit="modules")
    assert distance(values(small), values(plain_small)) == 0.0
    merged = values(tdfx.merge(small))
    assert distance(merged, values(tdfx.merge(plain_small))) == 0.0
    assert distance(merged, values(net())) > 1e-3, "half of the ranks lose something"
    exact = tdfx.Policy(rank=tdfx.Ratio(of=1.0), min_gain=0, round_to=1)
    assert distance(values(tdfx.merge(tdfx.rewrite(sharded(mesh=mesh), exact))), values(net())) < ROUNDING


def check_plan_is_one_for_all(mesh: DeviceMesh) -> None:
    class Biased:
        """A clock that disagrees between the processes."""

        def seconds(self, chain: Sequence[Any], flow: Flow | None) -> float:
            return float(len(chain) if dist.get_rank() else 1 / len(chain))

    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), cost=Biased(), round_to=1)
    plan = tdfx.plan(sharded(mesh=mesh), policy, example_inputs=X)
    first, second = on_both(plan.to_json())
    assert first == second
    assert len(plan.factorized) == len(plan.sites) == 7
    own_plan = tdfx.plan(net(), policy, example_inputs=X)
    assert (len(own_plan.factorized) == 0) == bool(dist.get_rank()), "by itself, each process decides otherwise"
    budget = tdfx.Policy(parameters=0.7, min_gain=0, cost=tdfx.Modelled())
    plan = tdfx.plan(sharded(mesh=mesh), budget)
    assert plan.sites == tdfx.plan(net(), budget).sites
    assert plan.emit == "modules"
    assert any("fully_shard gathers parameters where modules are called" in note for note in plan.notes)


def check_a_plan_goes_in_place_of_a_policy(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    plan = tdfx.Plan.from_json(tdfx.plan(net(), HALF, example_inputs=X).to_json())
    assert plan.emit == "graph"
    small = tdfx.rewrite(model, plan)
    assert distance(values(small), values(tdfx.rewrite(model, HALF, example_inputs=X))) == 0.0
    assert isinstance(small, FSDPModule)


def check_a_rewrite_before_and_after_the_first_forward(mesh: DeviceMesh) -> None:
    fresh = sharded(mesh=mesh)
    used = sharded(mesh=mesh)
    with torch.no_grad():
        used(X)  # leaves the root's parameters gathered
    assert not isinstance(used.kernel, DTensor)
    from_fresh, from_used = (tdfx.rewrite(model, HALF, example_inputs=X) for model in (fresh, used))
    assert distance(values(from_fresh), values(from_used)) == 0.0
    assert torch.equal(from_fresh(X), from_used(X))


def check_tied_weights_are_kept(mesh: DeviceMesh) -> None:
    model = net()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    fully_shard(model, mesh=mesh)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    assert isinstance(small.first, Factorized)
    assert small.blocks[0].up.weight is small.blocks[1].up.weight is model.blocks[0].up.weight
    assert small._tdfx_plan["blocks.0.up"].reason == tdfx.Reason.TIED
    train(small, SGD(small.parameters(), lr=0.1), 1, halves=True)
    assert small.blocks[0].up.weight is small.blocks[1].up.weight


def check_kept_parameters_are_shared_and_the_input_still_works(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    optimizer = sgd(model.parameters())
    train(model, optimizer, 1, halves=True)
    before, output = values(model), model(X).detach()
    model.reshard()
    addresses = {name: parameter.to_local().data_ptr() for name, parameter in model.named_parameters()}
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, include=("blocks.*",))
    small: Any = tdfx.rewrite(model, policy, example_inputs=X, optimizer=optimizer)
    parameters, small_parameters = dict(model.named_parameters()), dict(small.named_parameters())
    shared = [name for name in parameters if name in small_parameters]
    assert "last.weight" in shared
    assert "blocks.0.norm.weight" in shared
    assert all(parameters[name] is small_parameters[name] for name in shared)
    assert small_parameters["blocks.0.up.factors.1.bias"] is parameters["blocks.0.up.bias"]
    assert torch.equal(model(X), output)
    assert not torch.equal(small(X), output)
    model.reshard()
    assert distance(values(model), before) == 0.0
    assert {name: parameter.to_local().data_ptr() for name, parameter in model.named_parameters()} == addresses
    train(small, optimizer, 2, halves=True)
    after = values(model)
    assert not torch.equal(after["last.weight"], before["last.weight"])
    assert torch.equal(after["blocks.0.up.weight"], before["blocks.0.up.weight"])
    # The old model computes with the shards that it shares, uneven ones too.
    plain = net()
    plain.load_state_dict(after)
    assert torch.allclose(model(X), plain(X), rtol=0, atol=ROUNDING)


def check_gradients_of_kept_parameters_stay(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    model(X).sum().backward()
    gradient = model.last.bias.grad
    assert isinstance(gradient, DTensor)
    policy = tdfx.Policy(rank=tdfx.Ratio(of=0.5), min_gain=0, include=("first",))
    small: Any = tdfx.rewrite(model, policy, optimizer=SGD(model.parameters(), lr=0.1))
    assert small.last.bias.grad is gradient
    dense, (first, last) = full(model.first.weight.grad), small.first.weights
    assert torch.allclose(full(first.grad), full(last).mT @ dense, rtol=0, atol=ROUNDING)


def check_hooks_of_a_user_stay(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.first.register_forward_pre_hook(lambda *_: calls.append("first"))
    small = tdfx.rewrite(model, HALF)
    small(X)
    assert calls == ["first", "model"]
    tdfx.merge(small)(X)
    assert calls == ["first", "model"] * 2
    assert len(small._forward_pre_hooks) == len(model._forward_pre_hooks) == 1


def check_each_process_holds_only_its_shards(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    optimizer = adamw(model.parameters())
    train(model, optimizer, 1, halves=True)
    small = tdfx.rewrite(model, HALF, example_inputs=X, optimizer=optimizer)

    def assert_only_shards(model: Any) -> None:
        train(model, optimizer, 2, halves=True)
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            chunks = [chunk.shape[0] for chunk in torch.empty(parameter.shape).chunk(2)] + [0]
            assert parameter.to_local().shape == (chunks[dist.get_rank()], *parameter.shape[1:])
            state = optimizer.state[parameter]
            assert state["exp_avg"].to_local().shape == parameter.to_local().shape
            assert isinstance(state["exp_avg_sq"], DTensor)
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        total = sum(parameter.numel() for parameter in model.parameters())
        assert held < 0.6 * total, "uneven parameters give the first process a little more than half"

    assert_only_shards(small)
    assert_only_shards(tdfx.merge(small, optimizer=optimizer))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state)


def check_no_process_ever_holds_the_model(mesh: DeviceMesh) -> None:
    model = sharded(Deep().double(), mesh)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(2, 64, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    policy = tdfx.Policy(rank=tdfx.Ratio(of=1 / 8), min_gain=0)
    with PeakBytes() as rewriting:
        small = tdfx.rewrite(model, policy, example_inputs=x, optimizer=optimizer)
    assert 0 < rewriting.peak < Deep.bytes_in_float64 / 4, rewriting.peak / Deep.bytes_in_float64
    with PeakBytes() as merging:
        dense = tdfx.merge(small, optimizer=optimizer)
    assert 0 < merging.peak < Deep.bytes_in_float64 / 4, merging.peak / Deep.bytes_in_float64
    with PeakBytes() as gathering:
        gathered = [full(parameter) for parameter in dense.parameters()]
    assert gathering.peak >= Deep.bytes_in_float64, "a process that does hold the model would be seen"
    del gathered


def check_nothing_of_the_old_sharding_stays(mesh: DeviceMesh) -> None:
    model = sharded(mesh=mesh)
    model(X)
    state = weakref.ref(model._get_fsdp_state())
    group = weakref.ref(model._get_fsdp_state()._fsdp_param_group)
    small = tdfx.rewrite(model, HALF)
    del model
    gc.collect()
    assert state() is None
    assert group() is None
    small(X)
