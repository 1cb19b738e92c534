"""Factorized model -> original architecture, by what the rewrite recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tdfx.distributed.processes import Task
from tdfx.errors import MergeError
from tdfx.layers.copying import rebind, structural_copy
from tdfx.layers.factorized import Factorized, weight_of
from tdfx.layers.parameter import FactorizedParameter, restore_parameter
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
    """The layer with the joined weight; a stand-in, where a parameter was factorized and not a layer."""

    @property
    def weight(self) -> nn.Parameter:
        """The joined weight."""
        return weight_of(self.dense)


@dataclass(frozen=True, slots=True)
class Merged(PassResult):
    """A program of the original architecture and what was joined in it."""

    joins: tuple[Join, ...] = ()


class Merge(Pass[Merged]):
    """Join the factors of every factorized layer and give the model its original class back."""

    name = "merge"

    def requires(self, program: Program) -> None:
        """The model came from a rewrite."""
        module = program.module
        rewritten = any(PLAN_ATTRIBUTE in each.__dict__ or isinstance(each, Factorized) for each in module.modules())
        if not rewritten:
            raise MergeError(
                f"{type(module).__name__} holds no factorized layer and no record of a rewrite, so there is nothing to "
                f"merge. Pass the model that tdfx.rewrite returned."
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
        dense: dict[nn.Module, nn.Module] = {join.factorized: join.dense for join in joins}
        graphs = [submodule for submodule in module.modules() if isinstance(submodule, FactorizedGraphModule)]
        # Innermost first: a body that is put in place may itself lie inside another graph.
        for graph in reversed(graphs):
            dense[graph] = structural_copy(graph._tdfx_body(), dense)
        merged = dense[module] if module in dense else structural_copy(module, dense)
        rebind(merged, module)
        _restore_slots(merged, {id(join.dense): join for join in joins})
        merged.__dict__.pop(PLAN_ATTRIBUTE, None)
        changes = tuple(Change(join.name, f"Factorized -> {type(join.dense).__name__}") for join in joins)
        return Merged(replace(program, module=merged), changes, joins)

    def ensures(self, before: Program, result: Merged) -> None:
        """No factor is left, and the keys are the original's, in the original's order."""
        merged = result.program.module
        self.check(not any(isinstance(each, Factorized) for each in merged.modules()), "no factorized layer is left")
        names = [name for name, _ in merged.named_parameters(remove_duplicate=False)]
        expected = list(_merged_names(before.module))
        self.check(names == expected, "parameters have the original names, in the original order")
        self.check(not isinstance(merged, FactorizedGraphModule), "the class is the original's")


def _joined(layer: Factorized, *factors: Tensor) -> tuple[Tensor, ...]:
    return (layer.joined(*factors),)


def _restore_slots(module: nn.Module, joins: Mapping[int, Join]) -> None:
    """Turn the modules that stand for a parameter back into parameters; ``joins`` are by the identity of the dense layer."""
    for owner in list(module.modules()):
        children = {name: joins[id(child)] for name, child in owner._modules.items() if id(child) in joins}
        slots = {name: join for name, join in children.items() if isinstance(join.factorized, FactorizedParameter)}
        for name, join in slots.items():
            restore_parameter(owner, name, join.weight, join.factorized.siblings)


def _merged_names(module: nn.Module, path: str = "") -> Iterator[str]:
    """Yield the parameter names that a factorized model will have after the merge."""
    if isinstance(module, Factorized):
        names, children = list(module.origin.layer._parameters), []
        names = [name for name in names if name != module.kind.bias or module.bias is not None]
    else:
        slots = {name: child for name, child in module._modules.items() if isinstance(child, FactorizedParameter)}
        held = [name for name, parameter in module._parameters.items() if parameter is not None]
        siblings = next((child.siblings for child in slots.values()), ())
        names = sorted([*held, *slots], key=lambda name: siblings.index(name) if name in siblings else len(siblings))
        children = [(name, child) for name, child in module._modules.items() if name not in slots and child is not None]
    yield from (f"{path}{name}" for name in names)
    for name, child in children:
        yield from _merged_names(child, f"{path}{name}.")
