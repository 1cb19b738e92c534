"""Reads and writes the undocumented internals of FSDP2; no other module of tdfx touches them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.distributed.tensor import Shard

from tdfx.errors import ModelError
from tdfx.layers.module_state import HOOKS, STATE_DICT_HOOKS

_STATE_ATTRIBUTES = ("_auto_reshard_after_forward", "_modules", "_mp_policy", "_post_forward_hook_handle", "_state_ctx")
_GROUP_ATTRIBUTES = (
    "all_reduce_grads",
    "fsdp_params",
    "mesh_info",
    "offload_policy",
    "post_forward_mesh_info",
    "reduce_grads",
    "reshard_after_backward",
)
_RECORD_ATTRIBUTES = ("_module_info", "_sharded_param_data", "fsdp_placement", "reset_sharded_param", "sharded_param")
"""The attributes of states, parameter groups and parameter records that this file needs."""

_SETTINGS = (
    "_all_gather_comm",
    "_all_reduce_hook",
    "_all_reduce_hook_stream",
    "_reduce_scatter_comm",
    "all_reduce_grads",
    "force_sum_reduction_for_comms",
    "gradient_divide_factor",
    "reduce_grads",
    "reduce_scatter_max_input_buffers",
    "reduce_scatter_unused_params",
    "reshard_after_backward",
    "unshard_async_op",
    "unshard_in_backward",
)
"""What a user may set on a parameter group after fully_shard; not every version of torch has all of them."""


@dataclass(frozen=True, slots=True)
class FSDPUnit:
    """What one call of fully_shard made: the modules, and the state from which its arguments can be read."""

    paths: tuple[str, ...]
    """The paths of the modules that it was called on."""
    state: Any
    """What FSDP2 keeps of these modules."""

    @property
    def groups(self) -> list[Any]:
        """The groups of parameters that are gathered together: one, unless parameters have meshes of their own."""
        groups = getattr(self.state, "_fsdp_param_groups", None)
        groups = [getattr(self.state, "_fsdp_param_group", None)] if groups is None else groups
        return [group for group in groups if group is not None]

    @property
    def records(self) -> list[Any]:
        """The record that FSDP2 keeps of each parameter."""
        return [record for group in self.groups for record in group.fsdp_params]

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh over which the parameters are sharded; None for a unit without parameters."""
        return self.groups[0].mesh_info.mesh if self.groups else None

    @property
    def reshard_after_forward(self) -> bool | int | None:
        """The argument of fully_shard of this name, or what was set afterwards."""
        if self.state._auto_reshard_after_forward:
            return None
        if not self.groups or self.groups[0].post_forward_mesh_info is self.groups[0].mesh_info:
            return True
        mesh = self.groups[0].post_forward_mesh_info
        return False if mesh is None else int(mesh.shard_mesh_size)

    def arguments(self, mesh: DeviceMesh, originals: Mapping[int, nn.Parameter]) -> dict[str, Any]:
        """Return the arguments of fully_shard, with a mesh for a unit without one, and originals by their stand-ins' ids."""
        return {
            "mesh": self.mesh or mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": self._precision(originals),
            "shard_placement_fn": lambda stand_in: self._placement(originals[id(stand_in)]),
            "offload_policy": self.groups[0].offload_policy if self.groups else OffloadPolicy(),
        }

    def _placement(self, parameter: Any) -> Any:
        (placement,) = (placement for placement in parameter.placements if placement.is_shard())
        shard = Shard(placement.dim)
        if len(self.groups) <= 1:
            return shard
        from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

        meshes = (group.mesh_info for group in self.groups if group.mesh_info.mesh == parameter.device_mesh)
        return ShardPlacementResult(shard, next(meshes))

    def _precision(self, originals: Mapping[int, nn.Parameter]) -> Any:
        policy = self.state._mp_policy
        overrides = {
            id(record.sharded_param): record.mp_policy.param_dtype
            for record in self.records
            if record.mp_policy.param_dtype != policy.param_dtype
        }
        if not overrides:
            return policy
        return replace(policy, param_dtype_override_fn=lambda stand_in: overrides.get(id(originals[id(stand_in)])))

    def copy_settings_to(self, other: FSDPUnit) -> None:
        """Give another unit what was set on this one after fully_shard."""
        for old, new in zip(self.groups, other.groups, strict=False):
            _copy_attributes(old, new, [name for name in _SETTINGS if hasattr(new, name)])
            _copy_attributes(old.mesh_info, new.mesh_info, ["reduce_scatter_process_group"])
        _copy_attributes(self.state, other.state, ["_auto_reshard_after_forward"])
        _copy_attributes(
            self.state._state_ctx, other.state._state_ctx, ["is_last_backward", "manual_backward_finalization"]
        )

    def restore_parameters(self, sharded: Mapping[tuple[int, str], nn.Parameter], old: Mapping[int, Any]) -> None:
        """Put sharded parameters, by their modules' ids and names, in the place of the stand-ins of fully_shard.

        A new record shares the storage of the old record of a parameter's id, padding included, as the old model does.
        """
        for record in self.records:
            info = record._module_info
            parameter = sharded[id(info.module), info.param_name]
            modules, names = [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names]
            for module, name in zip(modules, names, strict=True):
                module._parameters[name] = parameter
            if id(parameter) in old:
                _copy_attributes(old[id(parameter)], record, ["_sharded_param_data", "keep_unsharded_storage"])
            record.reset_sharded_param()


def _copy_attributes(old: Any, new: Any, names: Iterable[str]) -> None:
    """Copy the attributes that this version of torch has."""
    for name in names:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def units_of(model: nn.Module) -> list[FSDPUnit]:
    """Return what each call of fully_shard made of a model, outermost first."""
    paths = {id(module): path for path, module in model.named_modules()}
    states = dict.fromkeys(module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
    for state in states:
        _check_attributes(state, _STATE_ATTRIBUTES)
    units = [FSDPUnit(tuple(paths[id(module)] for module in state._modules), state) for state in states]
    for group in (group for unit in units for group in unit.groups):
        _check_attributes(group, _GROUP_ATTRIBUTES)
        for record in group.fsdp_params:
            _check_attributes(record, _RECORD_ATTRIBUTES)
    return units


def _check_attributes(internal: Any, names: Iterable[str]) -> None:
    missing = [name for name in names if not hasattr(internal, name)]
    if missing:
        raise ModelError(
            f"The model is sharded by an FSDP2 that tdfx does not know: it has no {type(internal).__name__}.{missing[0]}. "
            f"Rewrite the model before fully_shard is called on it, or install a version of torch that tdfx was tested with."
        )


def check_use(units: Iterable[FSDPUnit]) -> None:
    """Raise ModelError for a use of FSDP2 that is not supported, and for gradients that would be lost."""
    for unit in units:
        name = f"The part {unit.paths[0]!r}" if unit.paths[0] else "The model"
        for group in unit.groups:
            _check_group(name, group)


def _check_group(name: str, group: Any) -> None:
    sharded_before = getattr(group.mesh_info, "dp_mesh_dims", None) is not None
    if sharded_before or any(getattr(record, "is_dtensor", False) for record in group.fsdp_params):
        raise ModelError(
            f"{name} has parameters that were distributed before fully_shard was called, as tensor parallelism does it: "
            f"their layers compute with parts of a weight, which factors cannot replace. Rewrite the model before it is "
            f"distributed."
        )
    pending = getattr(group, "_partial_reduce_output", None) is not None
    if pending or any(_holds_gradient(record) for record in group.fsdp_params):
        raise ModelError(
            f"{name} holds gradients that were not reduced yet (set_requires_gradient_sync(False) or the like). Call this "
            f"after optimizer.step(), when no gradients are being accumulated."
        )


def _holds_gradient(record: Any) -> bool:
    unsharded = getattr(record, "_unsharded_param", None)
    if unsharded is None:
        return False
    return unsharded.grad is not None or getattr(record, "unsharded_accumulated_grad", None) is not None


def remove_sharding(model: nn.Module, units: list[FSDPUnit]) -> None:
    """Take FSDP2, in all its units, off a model or a structural copy of it; the parameters stay sharded.

    It removes class, state and hooks.
    """
    hook_ids = {hook_id for unit in units for hook_id in _hook_ids(unit)}
    for module in model.modules():
        _module_state_mapping.pop(module, None)
        if isinstance(module, FSDPModule):
            module.__class__ = _original_class(type(module))
        for attribute in (STATE_KEY, REGISTRY_KEY):
            entries = module.__dict__.pop(attribute, {})
            # A key is the undecorated function in the one, and its name in the other.
            if others := {
                key: entry for key, entry in entries.items() if getattr(key, "__name__", key) != "fully_shard"
            }:
                module.__dict__[attribute] = others
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            module.__dict__.pop(name, None)
        for name in (*HOOKS, *STATE_DICT_HOOKS):
            hooks: Any = module.__dict__.get(name)
            for hook_id in hook_ids & hooks.keys() if isinstance(hooks, dict) else ():
                del hooks[hook_id]


def _original_class(sharded_class: type) -> type:
    """Return the class that fully_shard combined with FSDPModule."""
    bases = sharded_class.__bases__
    if len(bases) != 2 or bases[0] is not FSDPModule:
        raise ModelError(
            f"{sharded_class.__name__} derives from FSDPModule, but was not made by fully_shard, so it is not known how to "
            f"make it again. Rewrite the model before it is distributed, or use fully_shard."
        )
    return bases[1]


def _hook_ids(unit: FSDPUnit) -> Iterator[int]:
    """Yield the ids of the hooks that fully_shard and the first forward registered on modules."""
    state = unit.state
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    handles += [record._post_load_hook_handle for record in unit.records if hasattr(record, "_post_load_hook_handle")]
    for group in unit.groups:
        for name in ("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle"):
            handles += list(getattr(group, name, {}).values())
    for handle in handles:
        for part in getattr(handle, "handles", (handle,)):
            yield part.id


def carry_prefetching(states: Mapping[int, tuple[Any, Any]]) -> None:
    """Let new units prefetch the same units as the old ones; ``states`` maps an old state's id to (old state, new state)."""
    for old, new in states.values():
        for name in ("_states_to_forward_prefetch", "_states_to_backward_prefetch"):
            prefetched = [states[id(state)][1] for state in getattr(old, name, []) if id(state) in states]
            setattr(new, name, prefetched)
