"""Factorized model -> original architecture, from the records that the rewrite left in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tdfx.distributed.processes import Task
from tdfx.errors import MergeError
from tdfx.layers.alterations import alteration_of
from tdfx.layers.attention import mark_encoders
from tdfx.layers.copying import rebind, structural_copy
from tdfx.layers.factorized import Factorized, weight_of
from tdfx.layers.parameter import FactorizedParameter, restore_parameter
from tdfx.layers.paths import parameters_by_path
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.program import PLAN_ATTRIBUTE, Program
from tdfx.passes.transform.graph_module import FactorizedGraphModule


@dataclass(frozen=True, slots=True)
class Join:
    """One factorized layer and the layer it becomes."""

    name: str
    """Path of the factorized module."""
    factorized: Factorized
    dense: nn.Module
    """The layer with the joined weight; for a factorized parameter, a layer that only carries it."""

    @property
    def weight(self) -> nn.Parameter:
        """The joined weight."""
        return weight_of(self.dense)


@dataclass(frozen=True, slots=True)
class Merged(PassResult):
    """A program of the original architecture, and the layers that were joined."""

    joins: tuple[Join, ...] = ()


def is_rewritten(module: nn.Module) -> bool:
    """Return True if a module, or a part of it, came from a rewrite."""
    return any(PLAN_ATTRIBUTE in part.__dict__ or isinstance(part, Factorized) for part in module.modules())


class Merge(Pass[Merged]):
    """Join the factors of every factorized layer and give the model its original class back."""

    name = "merge"

    def requires(self, program: Program) -> None:
        """The model came from a rewrite, and its factors are what the rewrite made, with other values at most."""
        module = program.module
        if not is_rewritten(module):
            raise MergeError(
                f"{type(module).__name__} holds no factorized layer and no record of a rewrite, so there is nothing to "
                f"merge. Pass the model that tdfx.rewrite returned."
            )
        for path, layer in module.named_modules():
            if isinstance(layer, Factorized) and (alteration := alteration_of(layer)):
                raise MergeError(
                    f"The factors of {path or 'the model'!r} are not as rewrite made them, so their product would not be "
                    f"what the layer computes: {alteration}"
                )

    @torch.no_grad()
    def run(self, program: Program) -> Merged:
        """Join each layer once, wherever it occurs; the factorized model is left as it was."""
        module = program.module
        layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, Factorized)]
        weights = program.processes.map_tasks([Task(partial(_joined, layer), layer.weights) for _, layer in layers])
        joins = tuple(
            Join(name, layer, layer.merged(weight)) for (name, layer), (weight,) in zip(layers, weights, strict=True)
        )
        replacements: dict[nn.Module, nn.Module] = {join.factorized: join.dense for join in joins}
        graph_modules = [part for part in module.modules() if isinstance(part, FactorizedGraphModule)]
        # Innermost first, because a graph module may lie inside another.
        for graph_module in reversed(graph_modules):
            replacements[graph_module] = structural_copy(graph_module._tdfx_body(), replacements)
        merged = replacements[module] if module in replacements else structural_copy(module, replacements)
        rebind(merged, module)
        _restore_slots(merged, {id(join.dense): join for join in joins})
        mark_encoders(merged)
        merged.__dict__.pop(PLAN_ATTRIBUTE, None)
        changes = tuple(Change(join.name, f"Factorized -> {type(join.dense).__name__}") for join in joins)
        return Merged(replace(program, module=merged), changes, joins)

    def ensures(self, before: Program, result: Merged) -> None:
        """No factor is left, and the keys are the original's, in the original's order."""
        merged = result.program.module
        self.check(not any(isinstance(part, Factorized) for part in merged.modules()), "no factorized layer is left")
        names = [name for name, _ in parameters_by_path(merged, remove_duplicate=False)]
        expected = list(_merged_names(before.module))
        self.check(names == expected, "parameters have the original names, in the original order")
        self.check(not isinstance(merged, FactorizedGraphModule), "the class is the original's")


def _joined(layer: Factorized, *factors: Tensor) -> tuple[Tensor, ...]:
    return (layer.joined(*factors),)


def _restore_slots(module: nn.Module, joins: Mapping[int, Join]) -> None:
    """Turn the layers that only carry a joined parameter back into parameters; ``joins`` are by identity of the layer."""
    for owner in list(module.modules()):
        joined = {name: joins[id(child)] for name, child in owner._modules.items() if id(child) in joins}
        for name, join in joined.items():
            if isinstance(join.factorized, FactorizedParameter):
                restore_parameter(owner, name, join.weight, join.factorized.siblings)


def _merged_names(module: nn.Module, path: str = "") -> Iterator[str]:
    if isinstance(module, Factorized):
        for name in module.origin.layer._parameters:
            if name != module.kind.bias or module.bias is not None:
                yield f"{path}{name}"
        return
    slots = {name: child for name, child in module._modules.items() if isinstance(child, FactorizedParameter)}
    held = [name for name, parameter in module._parameters.items() if parameter is not None]
    siblings = next((child.siblings for child in slots.values()), ())
    for name in sorted([*held, *slots], key=lambda name: siblings.index(name) if name in siblings else len(siblings)):
        yield f"{path}{name}"
    for name, child in module._modules.items():
        if name not in slots and child is not None:
            yield from _merged_names(child, f"{path}{name}.")
