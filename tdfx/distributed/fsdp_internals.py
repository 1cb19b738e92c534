"""What tdfx must know of the inside of FSDP2. All that torch does not document is read and written here, and only here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from tdfx.errors import ModelError
from tdfx.layers.copying import HOOKS

_HOOKS = (*HOOKS, "_load_state_dict_post_hooks", "_load_state_dict_pre_hooks", "_state_dict_pre_hooks")

_OF_STATES = ("_auto_reshard_after_forward", "_modules", "_mp_policy", "_post_forward_hook_handle", "_state_ctx")
_OF_GROUPS = (
    "all_reduce_grads",
    "fsdp_params",
    "mesh_info",
    "offload_policy",
    "post_forward_mesh_info",
    "reduce_grads",
    "reshard_after_backward",
)
_OF_PARAMETERS = ("_module_info", "_sharded_param_data", "fsdp_placement", "reset_sharded_param", "sharded_param")

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
"""What a user may have set on a group after fully_shard; not every version of torch has all of them."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """One call of fully_shard, and what can be known of its arguments."""

    paths: tuple[str, ...]
    """The modules that it was called on."""
    state: Any

    @property
    def groups(self) -> list[Any]:
        """The groups of parameters that are gathered together: one, unless parameters have meshes of their own."""
        found = getattr(self.state, "_fsdp_param_groups", None)
        one = getattr(self.state, "_fsdp_param_group", None) if found is None else None
        return list(found or ([] if one is None else [one]))

    @property
    def parameters(self) -> list[Any]:
        """What FSDP2 keeps of each parameter."""
        return [one for group in self.groups for one in group.fsdp_params]

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh that its parameters are spread over; None where it has none."""
        return self.groups[0].mesh_info.mesh if self.groups else None

    @property
    def reshard_after_forward(self) -> bool | int | None:
        """The argument of this name, or what was set later."""
        if self.state._auto_reshard_after_forward:
            return None
        if not self.groups:
            return True
        group = self.groups[0]
        if group.post_forward_mesh_info is None:
            return False
        whole = group.post_forward_mesh_info is group.mesh_info
        return True if whole else int(group.post_forward_mesh_info.shard_mesh_size)

    def arguments(self, mesh: DeviceMesh, originals: Mapping[int, nn.Parameter]) -> dict[str, Any]:
        """Return the arguments of fully_shard that do the same again.

        Args:
            mesh: For a boundary without parameters of its own.
            originals: Stand-in, by identity -> the sharded parameter for which it stands.
        """
        found: dict[str, Any] = {
            "mesh": self.mesh or mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": self._precision(originals),
            "shard_placement_fn": lambda stand_in: self._placement(originals[id(stand_in)]),
        }
        if self.groups:
            found["offload_policy"] = self.groups[0].offload_policy
        return found

    def _placement(self, parameter: Any) -> Any:
        (placement,) = (one for one in parameter.placements if one.is_shard())
        shard = Shard(placement.dim)
        if len(self.groups) <= 1:
            return shard
        from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

        meshes = (group.mesh_info for group in self.groups if group.mesh_info.mesh == parameter.device_mesh)
        return ShardPlacementResult(shard, next(meshes))

    def _precision(self, originals: Mapping[int, nn.Parameter]) -> Any:
        policy = self.state._mp_policy
        own = {
            id(one.sharded_param): one.mp_policy.param_dtype
            for one in self.parameters
            if one.mp_policy.param_dtype != policy.param_dtype
        }
        if not own:
            return policy
        return replace(policy, param_dtype_override_fn=lambda stand_in: own.get(id(originals[id(stand_in)])))

    def settle(self, made: Boundary) -> None:
        """Give a boundary that was made anew what was set on this one after fully_shard."""
        for old, new in zip(self.groups, made.groups, strict=False):
            for name in _SETTINGS:
                if hasattr(old, name) and hasattr(new, name):
                    setattr(new, name, getattr(old, name))
            if hasattr(old.mesh_info, "reduce_scatter_process_group"):
                new.mesh_info.reduce_scatter_process_group = old.mesh_info.reduce_scatter_process_group
        made.state._auto_reshard_after_forward = self.state._auto_reshard_after_forward
        for name in ("is_last_backward", "manual_backward_finalization"):
            if hasattr(self.state._state_ctx, name):
                setattr(made.state._state_ctx, name, getattr(self.state._state_ctx, name))


def boundaries_of(model: nn.Module) -> list[Boundary]:
    """Return the calls of fully_shard that sharded a model, outermost first."""
    paths = {id(module): path for path, module in model.named_modules()}
    states = {id(state): state for one in model.modules() if (state := _state_of(one)) is not None}
    found = [Boundary(tuple(paths[id(one)] for one in state._modules), state) for state in states.values()]
    for boundary in found:
        _check_known(boundary)
    return found


def _state_of(module: nn.Module) -> Any:
    return module._get_fsdp_state() if isinstance(module, FSDPModule) else None


def _check_known(boundary: Boundary) -> None:
    """Raise ModelError where torch keeps things elsewhere."""
    known: list[tuple[Any, tuple[str, ...]]] = [(boundary.state, _OF_STATES)]
    known += [(group, _OF_GROUPS) for group in boundary.groups]
    known += [(one, _OF_PARAMETERS) for one in boundary.parameters]
    missing = [f"{type(one).__name__}.{name}" for one, names in known for name in names if not hasattr(one, name)]
    if missing:
        raise ModelError(
            f"The model is sharded by an FSDP2 that tdfx does not know: it has no {missing[0]}. Rewrite the model before "
            f"fully_shard is called on it, or install a version of torch that this version of tdfx was tested with."
        )


def check_use(boundaries: Iterable[Boundary]) -> None:
    """Raise ModelError where a use of FSDP2 is not supported, or holds what would be lost."""
    for boundary, group in [(one, group) for one in boundaries for group in one.groups]:
        spread = getattr(group.mesh_info, "dp_mesh_dims", None) is not None
        if spread or any(getattr(one, "is_dtensor", False) for one in group.fsdp_params):
            raise ModelError(
                f"Parameters of {_names(boundary)} were distributed before fully_shard was called, as tensor parallelism "
                f"does it: their layers run on parts of a weight, which no factors stand for. Rewrite the model before it "
                f"is distributed."
            )
        pending = getattr(group, "_partial_reduce_output", None) is not None
        if pending or any(_holds_gradient(one) for one in group.fsdp_params):
            raise ModelError(
                f"{_names(boundary)} holds gradients that were not reduced yet (set_requires_gradient_sync(False) or the "
                f"like). Call this after optimizer.step(), when no gradients are being accumulated."
            )


def _holds_gradient(parameter: Any) -> bool:
    whole = getattr(parameter, "_unsharded_param", None)
    kept = getattr(parameter, "unsharded_accumulated_grad", None) if whole is not None else None
    return kept is not None or (whole is not None and whole.grad is not None)


def _names(boundary: Boundary) -> str:
    return f"The part {boundary.paths[0]!r}" if boundary.paths[0] else "The model"


def remove_sharding(copy: nn.Module, boundaries: list[Boundary]) -> None:
    """Make modules that FSDP2 manages what they were before; the parameters stay in shards.

    Args:
        copy: A structural copy of the model that the boundaries are of.
        boundaries: All of them.
    """
    hooks = {number for boundary in boundaries for number in _hook_numbers(boundary)}
    for module in copy.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = _original_class(type(module))
        for key, entry in ((STATE_KEY, _by_function), (REGISTRY_KEY, _by_name)):
            kept = {name: one for name, one in module.__dict__.get(key, {}).items() if not entry(name)}
            if key in module.__dict__ and kept:
                module.__dict__[key] = kept
            else:
                module.__dict__.pop(key, None)
        for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            module.__dict__.pop(name, None)
        for name in _HOOKS:
            held = module.__dict__.get(name)
            if isinstance(held, dict):
                for number in hooks & held.keys():
                    del held[number]


def _by_function(key: Any) -> bool:
    return getattr(key, "__name__", "") == fully_shard.__name__


def _by_name(key: Any) -> bool:
    return bool(key == fully_shard.__name__)


def _original_class(kind: type) -> type:
    """Return the class that fully_shard put FSDPModule in front of."""
    bases = kind.__bases__
    if len(bases) != 2 or bases[0] is not FSDPModule:
        raise ModelError(
            f"{kind.__name__} derives from FSDPModule, but was not made by fully_shard, so it is not known how to make it "
            f"again. Rewrite the model before it is distributed, or use fully_shard."
        )
    return bases[1]


def _hook_numbers(boundary: Boundary) -> Iterator[int]:
    """Yield the numbers under which modules keep the hooks that fully_shard and the first forward registered."""
    state = boundary.state
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    handles += [one._post_load_hook_handle for one in boundary.parameters if hasattr(one, "_post_load_hook_handle")]
    for group in boundary.groups:
        for name in ("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle"):
            handles += list(getattr(group, name, {}).values())
    for handle in handles:
        for one in getattr(handle, "handles", (handle,)):
            yield one.id


def give_values(made: Boundary, parameters: Mapping[tuple[int, str], nn.Parameter], old: Mapping[int, Any]) -> None:
    """Put sharded parameters in the place of the stand-ins that were sharded.

    Args:
        made: Whose parameters are stand-ins on the meta device.
        parameters: Module, by identity, and name -> the sharded parameter to hold.
        old: Sharded parameter, by identity -> what FSDP2 kept of it before. Its storage is shared, padding included, so
            that the model it came from goes on with the same values.
    """
    for one in made.parameters:
        info = one._module_info
        real = parameters[id(info.module), info.param_name]
        modules, names = [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names]
        for module, name in zip(modules, names, strict=True):
            module._parameters[name] = real
        before = old.get(id(real))
        if before is not None:
            one._sharded_param_data = before._sharded_param_data
            if hasattr(before, "keep_unsharded_storage"):
                one.keep_unsharded_storage = before.keep_unsharded_storage
        one.reset_sharded_param()


def carry_prefetching(twins: Mapping[int, Any]) -> None:
    """Let boundaries prefetch those that stand for what the old ones prefetched.

    Args:
        twins: Old boundary's state, by identity -> (old state, new state).
    """
    for old, new in twins.values():
        for name in ("_states_to_forward_prefetch", "_states_to_backward_prefetch"):
            setattr(new, name, [twins[id(one)][1] for one in getattr(old, name, []) if id(one) in twins])
