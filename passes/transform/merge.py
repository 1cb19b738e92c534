"""Factorized model -> original architecture, by what the rewrite recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tdfx.distributed.processes import Spread, Task, alone
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


class Merge(Pass):
    """Join the factors of every factorized layer and give the model its original class back."""

    name = "merge"

    def __init__(self, spread: Spread = alone) -> None:
        self.spread = spread
        self.joins: tuple[Join, ...] = ()

    def requires(self, program: Program) -> None:
        """The model came from a rewrite."""
        module = program.module
        known = any(PLAN_ATTRIBUTE in one.__dict__ or isinstance(one, Factorized) for one in module.modules())
        if not known:
            raise MergeError(
                f"{type(module).__name__} holds no factorized layer and no record of a rewrite, so there is nothing to "
                f"merge. Pass the model that tdfx.rewrite returned."
            )

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Join each layer once, wherever it occurs; the factorized model is left as it was."""
        module = program.module
        found = [(name, one) for name, one in module.named_modules() if isinstance(one, Factorized)]
        joined = self.spread([Task(partial(_joined, layer), layer.weights) for _, layer in found])
        self.joins = tuple(
            Join(name, layer, layer.merged(weight)) for (name, layer), (weight,) in zip(found, joined, strict=True)
        )
        dense: dict[nn.Module, nn.Module] = {join.factorized: join.dense for join in self.joins}
        graphs = [one for one in module.modules() if isinstance(one, FactorizedGraphModule)]
        # Innermost first: a body that is put in place may itself lie inside another graph.
        for graph in reversed(graphs):
            dense[graph] = structural_copy(graph._tdfx_body(), dense)
        merged = dense[module] if module in dense else structural_copy(module, dense)
        rebind(merged, module)
        _restore_slots(merged, {id(join.dense): join for join in self.joins})
        changes = tuple(Change(join.name, f"Factorized -> {type(join.dense).__name__}") for join in self.joins)
        return PassResult(replace(program, module=_plain(merged)), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """No factor is left, and the keys are the original's, in the original's order."""
        merged = result.program.module
        self.check(not any(isinstance(one, Factorized) for one in merged.modules()), "no factorized layer is left")
        expected = list(_merged_keys(before.module))
        found = [name for name, _ in merged.named_parameters(remove_duplicate=False)]
        self.check(found == expected, "parameters have the original names, in the original order")
        self.check(not isinstance(merged, FactorizedGraphModule), "the class is the original's")


def _joined(layer: Factorized, *factors: Tensor) -> tuple[Tensor, ...]:
    return (layer.joined(*factors),)


def _plain(module: nn.Module) -> nn.Module:
    module.__dict__.pop(PLAN_ATTRIBUTE, None)
    return module


def _restore_slots(module: nn.Module, joins: Mapping[int, Join]) -> None:
    """Make parameters again of what stands for a parameter."""
    for owner in list(module.modules()):
        found = {name: joins[id(child)] for name, child in owner._modules.items() if id(child) in joins}
        slots = {name: join for name, join in found.items() if isinstance(join.factorized, FactorizedParameter)}
        for name, join in slots.items():
            restore_parameter(owner, name, join.weight, join.factorized.siblings)


def _merged_keys(module: nn.Module, path: str = "") -> Iterator[str]:
    """Yield the parameter names that a factorized model will have once its layers are whole again."""
    if isinstance(module, Factorized):
        own, children = list(module.origin.layer._parameters), []
        own = [name for name in own if name != module.kind.bias or module.bias is not None]
    else:
        slots = {name: one for name, one in module._modules.items() if isinstance(one, FactorizedParameter)}
        held = [name for name, one in module._parameters.items() if one is not None]
        siblings = next((one.siblings for one in slots.values()), ())
        own = sorted([*held, *slots], key=lambda name: siblings.index(name) if name in siblings else len(siblings))
        children = [(name, child) for name, child in module._modules.items() if name not in slots and child is not None]
    yield from (f"{path}{name}" for name in own)
    for name, child in children:
        yield from _merged_keys(child, f"{path}{name}.")
