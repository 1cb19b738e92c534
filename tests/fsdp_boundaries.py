"""Checks that a rewrite calls fully_shard as the user did: with the same boundaries, settings, placements and meshes."""

from __future__ import annotations

from typing import Any

import torch
from fsdp_runs import HALF, ROUNDING, X, distance, net, sgd, sharded, train, training_run, values
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from two_processes import refused

import tdfx


def plain_output() -> Any:
    """Return what an unsharded rewrite computes."""
    return tdfx.rewrite(net(), HALF, example_inputs=X, emit="modules")(X)


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
