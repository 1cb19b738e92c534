"""Models sharded by FSDP2: out of their shards, and sharded again by the same policy."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import TopologicalSorter
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tdfx.distributed.fsdp_internals import (
    Boundary,
    boundaries_of,
    carry_prefetching,
    check_use,
    give_values,
    remove_sharding,
)
from tdfx.distributed.ranks import Ranks
from tdfx.errors import ModelError
from tdfx.layers.copying import structural_copy
from tdfx.layers.placement import is_sharded


class Sharded:
    """A model that fully_shard was called on, and what is needed to shard another in the same way.

    No values move: a parameter that both models hold is the same object in both, shards included.
    """

    plain: nn.Module
    """The same modules with their original classes, without the hooks of FSDP2; the parameters are still in shards."""

    def __init__(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        self.boundaries = boundaries_of(model)
        meshes = [one.mesh for one in self.boundaries if one.mesh is not None]
        if not meshes:
            raise ModelError(
                f"fully_shard was called on {type(model).__name__}, but none of its parameters are sharded: they were all "
                f"ignored. Rewrite the model before fully_shard is called on it."
            )
        self.mesh = max(meshes, key=lambda mesh: mesh.size())
        self.ranks = Ranks.of_mesh(self.mesh)
        with self.ranks.raise_on_all():
            check_use(self.boundaries)
            _check_meshes(self.boundaries, self.mesh)
            self.plain = structural_copy(model)
            remove_sharding(self.plain, self.boundaries)

    def shard(self, made: nn.Module) -> nn.Module:
        """Shard a model of the same structure, in place, at the same modules with the same settings.

        The parameters are in shards already. What fully_shard sees are stand-ins without values, so that no process holds
        more than its own part at any time.
        """
        self._check_paths(made)
        real = {
            (id(module), name): parameter
            for module in made.modules()
            for name, parameter in module._parameters.items()
            if is_sharded(parameter) and parameter is not None
        }
        ignored = {one for one in made.parameters() if not is_sharded(one)}
        stand_ins = {id(one): _stand_in(one) for one in real.values()}
        modules = {id(module): module for module in made.modules()}
        for (module, name), parameter in real.items():
            modules[module]._parameters[name] = stand_ins[id(parameter)]
        originals = {id(stand_ins[id(one)]): one for one in real.values()}
        old = {id(one.sharded_param): one for boundary in self.boundaries for one in boundary.parameters}
        twins: dict[int, tuple[Any, Any]] = {}
        for boundary in _innermost_first(self.boundaries, made):
            parts = [made.get_submodule(path) for path in boundary.paths]
            arguments = boundary.arguments(self.mesh, originals)
            fully_shard(parts[0] if len(parts) == 1 else parts, **arguments, ignored_params=ignored)
            new = Boundary(boundary.paths, parts[0]._get_fsdp_state())  # type: ignore[operator]
            give_values(new, real, old)
            boundary.settle(new)
            twins[id(boundary.state)] = (boundary.state, new.state)
        carry_prefetching(twins)
        return made

    def _check_paths(self, made: nn.Module) -> None:
        found = {path for path, _ in made.named_modules(remove_duplicate=False)}
        lost = [path for boundary in self.boundaries for path in boundary.paths if path not in found]
        if lost:
            raise ModelError(
                f"fully_shard was called on {lost[0]!r}, which is no module of the model that comes of it, so it cannot be "
                f"sharded in the same way. Call fully_shard on the module that holds it instead."
            )


def _check_meshes(boundaries: Sequence[Boundary], mesh: DeviceMesh) -> None:
    """Raise ModelError where a parameter is not the same one on all processes, as with expert parallelism."""
    processes = set(mesh.mesh.flatten().tolist())
    for boundary in boundaries:
        for group in boundary.groups:
            if set(group.mesh_info.mesh.mesh.flatten().tolist()) != processes:
                raise ModelError(
                    f"Some parameters of {boundary.paths[0]!r} are sharded over other processes than the rest of the model, "
                    f"{sorted(processes)}, as expert parallelism does it, so they cannot work on it together. Rewrite the "
                    f"model before it is distributed."
                )


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=parameter.requires_grad)


def _innermost_first(boundaries: Sequence[Boundary], model: nn.Module) -> list[Boundary]:
    """Return the boundaries in an order in which fully_shard can be called: what lies inside a module before it."""
    own = [{id(model.get_submodule(path)) for path in one.paths} for one in boundaries]
    inside = [{id(part) for path in one.paths for part in model.get_submodule(path).modules()} for one in boundaries]
    order = TopologicalSorter(
        {
            outer: [inner for inner in range(len(boundaries)) if inner != outer and own[inner] & inside[outer]]
            for outer in range(len(boundaries))
        }
    )
    return [boundaries[index] for index in order.static_order()]
