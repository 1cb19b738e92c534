"""Takes a model out of FSDP2, and shards the rewritten model at the same modules with the same settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from graphlib import TopologicalSorter
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tdfx.distributed.fsdp_internals import FSDPUnit, carry_prefetching, check_use, remove_sharding, units_of
from tdfx.distributed.ranks import Ranks
from tdfx.errors import ModelError
from tdfx.layers.copying import structural_copy
from tdfx.layers.placement import is_sharded, placeholder


class Sharded:
    """A model that ``fully_shard`` was called on, and what is needed to shard another model in the same way.

    No values move: a parameter that both models hold is the same sharded tensor in both.
    """

    model: nn.Module
    """A structural copy with the original classes and without the hooks of FSDP2; its parameters are still sharded."""
    ranks: Ranks
    """The processes that hold the shards."""

    def __init__(self, model: nn.Module) -> None:
        reshard(model)
        self.units = units_of(model)
        meshes = [unit.mesh for unit in self.units if unit.mesh is not None]
        if not meshes:
            raise ModelError(
                f"fully_shard was called on {type(model).__name__}, but none of its parameters are sharded: they were all "
                f"ignored. Rewrite the model before fully_shard is called on it."
            )
        self.mesh = max(meshes, key=lambda mesh: mesh.size())
        self.ranks = Ranks.of_mesh(self.mesh)
        with self.ranks.raise_on_all():
            check_use(self.units)
            _check_meshes(self.units, self.mesh)
            self.model = structural_copy(model)
            remove_sharding(self.model, self.units)

    def check_paths(self, rewritten: nn.Module, path: str = "") -> None:
        """Raise ModelError if a rewritten model, or the part of it at a path, lacks a module that was sharded by itself."""
        prefix = f"{path}." if path else ""
        present = {(prefix + name).rstrip(".") for name, _ in rewritten.named_modules(remove_duplicate=False)}
        units = (name for unit in self.units for name in unit.paths)
        if lost := [name for name in units if f"{name}.".startswith(prefix) and name not in present]:
            raise ModelError(
                f"fully_shard was called on {lost[0]!r}, and the rewritten model has no such module, so it cannot be "
                f"sharded in the same way. Call fully_shard on the module that holds it instead."
            )

    def shard(self, rewritten: nn.Module) -> nn.Module:
        """Shard a rewritten model in place, at the same modules with the same settings.

        ``fully_shard`` takes only whole parameters, and these are sharded already. So it is given stand-ins on the meta
        device, which are exchanged afterwards: no process ever holds more than its own shards.
        """
        self.check_paths(rewritten)
        sharded = {
            (id(module), name): parameter
            for module in rewritten.modules()
            for name, parameter in module._parameters.items()
            if is_sharded(parameter) and parameter is not None
        }
        ignored = {parameter for parameter in rewritten.parameters() if not is_sharded(parameter)}
        stand_ins = {
            id(parameter): nn.Parameter(placeholder(parameter), requires_grad=parameter.requires_grad)
            for parameter in sharded.values()
        }
        for module in rewritten.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in stand_ins:
                    module._parameters[name] = stand_ins[id(parameter)]
        originals = {id(stand_ins[id(parameter)]): parameter for parameter in sharded.values()}
        records = {id(record.sharded_param): record for unit in self.units for record in unit.records}
        states: dict[int, tuple[Any, Any]] = {}
        for unit in _innermost_first(self.units, rewritten):
            parts = [rewritten.get_submodule(path) for path in unit.paths]
            arguments = unit.arguments(self.mesh, originals)
            fully_shard(parts[0] if len(parts) == 1 else parts, **arguments, ignored_params=ignored)
            new_unit = FSDPUnit(unit.paths, parts[0]._get_fsdp_state())  # type: ignore[operator]
            new_unit.restore_parameters(sharded, records)
            unit.copy_settings_to(new_unit)
            states[id(unit.state)] = (unit.state, new_unit.state)
        carry_prefetching(states)
        return rewritten


def reshard(model: nn.Module) -> None:
    """Let every module hold its shards again, where a forward without a backward has left whole parameters in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def change_in_place(model: nn.Module, change: Callable[[], None]) -> None:
    """Take FSDP2 off a model itself, let a function replace modules in it, and shard it again at the same paths.

    FSDP2 refers to the modules that it was called on, and would go on gathering the parameters of those that were replaced.
    """
    sharded = Sharded(model)
    remove_sharding(model, sharded.units)
    change()
    sharded.shard(model)


def _check_meshes(units: Sequence[FSDPUnit], mesh: DeviceMesh) -> None:
    """Raise ModelError if some parameters are sharded over other processes than the rest, as in expert parallelism."""
    processes = set(mesh.mesh.flatten().tolist())
    for unit in units:
        if any(set(group.mesh_info.mesh.mesh.flatten().tolist()) != processes for group in unit.groups):
            raise ModelError(
                f"Some parameters of {unit.paths[0]!r} are sharded over other processes than the rest of the model, "
                f"{sorted(processes)}, as expert parallelism does it, so the processes cannot rewrite it together. Rewrite "
                f"the model before it is distributed."
            )


def _innermost_first(units: Sequence[FSDPUnit], model: nn.Module) -> list[FSDPUnit]:
    """Return the units in an order in which ``fully_shard`` accepts them: those inside a module before that module."""
    roots = [{id(model.get_submodule(path)) for path in unit.paths} for unit in units]
    contents = [{id(part) for path in unit.paths for part in model.get_submodule(path).modules()} for unit in units]
    count = range(len(units))
    order = TopologicalSorter(
        {outer: [inner for inner in count if inner != outer and roots[inner] & contents[outer]] for outer in count}
    )
    return [units[index] for index in order.static_order()]
