"""Checks of what a rewrite does to shards: one plan, the same factors, the same boundaries, and no model in one place."""

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
    training_run,
    values,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD
from two_processes import on_both, refused

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


def check_boundaries_and_settings_are_as_before(mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float64)
    model = net()
    first, second = model.blocks
    fully_shard(first, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    fully_shard(second, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    fully_shard(model, mesh=mesh)
    model.blocks[0].set_modules_to_forward_prefetch([second])
    model.blocks[1].set_requires_all_reduce(False)
    model.blocks[1].set_reshard_after_backward(False)
    model.set_is_last_backward(False)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    dense: Any = tdfx.merge(small)
    paths = ["", "blocks.0", "blocks.1"]
    for rewritten in (small, dense):
        assert [path for path, module in rewritten.named_modules() if isinstance(module, FSDPModule)] == paths
        assert type(rewritten) is type(model)
        states = {path: rewritten.get_submodule(path)._get_fsdp_state() for path in paths}
        groups = {path: state._fsdp_param_group for path, state in states.items()}
        assert all(group.mesh_info.mesh is mesh for group in groups.values())
        assert groups["blocks.0"].post_forward_mesh_info is None
        assert groups["blocks.1"].post_forward_mesh_info is groups["blocks.1"].mesh_info
        assert [states[path]._auto_reshard_after_forward for path in states] == [True, False, True]
        assert states["blocks.0"]._mp_policy == policy
        assert states["blocks.1"]._mp_policy == MixedPrecisionPolicy()
        assert isinstance(groups["blocks.1"].offload_policy, CPUOffloadPolicy)
        assert not isinstance(groups["blocks.0"].offload_policy, CPUOffloadPolicy)
        assert states["blocks.0"]._states_to_forward_prefetch == [states["blocks.1"]]
        assert not groups["blocks.1"].all_reduce_grads
        assert groups["blocks.0"].all_reduce_grads
        assert not groups["blocks.1"].reshard_after_backward
        assert not states[""]._state_ctx.is_last_backward
        assert len(groups["blocks.0"].fsdp_params) == len(list(rewritten.blocks[0].parameters()))
    assert small.blocks[0].up.factors[0].weight.placements == (Shard(0),)
    assert not any(isinstance(module, FSDPModule) for module in tdfx.rewrite(net(), HALF).modules())


def check_a_site_may_be_a_boundary(mesh: DeviceMesh) -> None:
    model = net()
    fully_shard(model.first, mesh=mesh)
    model.last.bias = None
    fully_shard(model.last, mesh=mesh)
    fully_shard(model, mesh=mesh)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    group = small.last._get_fsdp_state()._fsdp_param_group
    assert [parameter._module_info.module for parameter in group.fsdp_params] == list(small.last.factors)
    assert type(small.last).__name__ == "FSDPFactorized"
    plain = net()
    plain.last.bias = None
    assert torch.equal(small(X), tdfx.rewrite(plain, HALF, example_inputs=X, emit="modules")(X))
    assert type(tdfx.merge(small).last).__name__ == "FSDPLinear"


def plain_output() -> Any:
    """Return what an unsharded rewrite computes."""
    return tdfx.rewrite(net(), HALF, example_inputs=X, emit="modules")(X)


def check_several_modules_in_one_boundary(mesh: DeviceMesh) -> None:
    model = net()
    first, second = model.blocks
    fully_shard([first, second], mesh=mesh)
    fully_shard(model, mesh=mesh)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    state = small.blocks[0]._get_fsdp_state()
    assert state is small.blocks[1]._get_fsdp_state()
    assert len(state._fsdp_param_group.fsdp_params) == 2 * len(list(small.blocks[0].parameters()))
    assert torch.equal(small(X), plain_output())


def check_only_a_part_is_sharded(mesh: DeviceMesh) -> None:
    model = net()
    fully_shard(model.blocks[0], mesh=mesh)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    assert type(small).__name__ == "Net"
    assert [isinstance(block, FSDPModule) for block in small.blocks] == [True, False]
    assert not isinstance(small.first.factors[0].weight, DTensor)
    assert torch.equal(small(X), plain_output())


def check_ignored_parameters_stay_plain(mesh: DeviceMesh) -> None:
    model = net()
    fully_shard(model, mesh=mesh, ignored_params={model.first.weight, model.last.bias})
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    plain = {name for name, parameter in small.named_parameters() if not isinstance(parameter, DTensor)}
    assert plain == {"first.factors.0.weight", "first.factors.1.weight", "last.factors.1.bias"}
    assert torch.equal(small(X), plain_output())


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


def check_placements_of_the_users_own(mesh: DeviceMesh) -> None:
    def along_columns(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % 2 == 0 else None

    model = sharded(mesh=mesh, shard_placement_fn=along_columns)
    assert model.first.weight.placements == (Shard(1),)
    assert model.blocks[0].down.weight.placements == (Shard(0),)
    optimizer = sgd(model.parameters())
    train(model, optimizer, 1, halves=True)
    policy = tdfx.Policy(rank=tdfx.Fixed({"*": 7}), min_gain=0, exclude=("last",))
    small: Any = tdfx.rewrite(model, policy, example_inputs=X, optimizer=optimizer)
    assert small.last.weight.placements == (Shard(1),)
    assert small.first.factors[0].weight.placements == (Shard(1),)
    assert small.first.factors[1].weight.placements == (Shard(0),), "seven columns do not divide evenly"
    train(small, optimizer, 2, halves=True)
    dense: Any = tdfx.merge(small, optimizer=optimizer)
    assert dense.first.weight.placements == (Shard(1),)
    train(dense, optimizer, 3, halves=True)
    single_run = training_run(net(), sgd, halves=False, policy=policy)
    assert distance(values(dense), single_run.merged) < ROUNDING


def check_precision_of_single_parameters(mesh: DeviceMesh) -> None:
    if "param_dtype_override_fn" not in MixedPrecisionPolicy.__dataclass_fields__:
        return  # this version of torch has no such setting
    override: dict[str, Any] = {
        "param_dtype_override_fn": lambda parameter: torch.float32 if parameter.dim() == 1 else None
    }
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, **override)
    model = net().float()
    fully_shard(model, mesh=mesh, mp_policy=policy)
    small: Any = tdfx.rewrite(model, HALF)
    group = small._get_fsdp_state()._fsdp_param_group
    dtypes = {len(parameter.sharded_param.shape): parameter.mp_policy.param_dtype for parameter in group.fsdp_params}
    assert dtypes == {1: torch.float32, 2: torch.bfloat16}


def check_a_mesh_for_single_parameters(mesh: DeviceMesh) -> None:
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        return  # this version of torch has no such setting
    hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    usual = FSDPMeshInfo(mesh, shard_mesh_dim=0)
    special: Any = HSDPMeshInfo(hybrid, shard_mesh_dim=1, replicate_mesh_dim=0)

    def placement(parameter: nn.Parameter) -> Any:
        return ShardPlacementResult(Shard(0), special if parameter.shape[0] == 33 else usual)

    model = net()
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    small: Any = tdfx.rewrite(model, HALF, example_inputs=X)
    groups = {group.mesh_info.mesh: group for group in small._get_fsdp_state()._fsdp_param_groups}
    assert {mesh.ndim: len(group.fsdp_params) for mesh, group in groups.items()} == {1: 18, 2: 6}
    assert torch.equal(small(X), plain_output())
    special = FSDPMeshInfo(hybrid["shard"], shard_mesh_dim=0)
    model = net()
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    with refused(tdfx.ModelError, "are sharded over other processes than the rest of the model, [0, 1]"):
        tdfx.rewrite(model, HALF)


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
