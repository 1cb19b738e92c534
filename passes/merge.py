"""Factorized model -> original architecture, by what the rewrite recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from tdfx.errors import MergeError
from tdfx.layers import Factorized
from tdfx.passes.base import PLAN_ATTRIBUTE, Change, Pass, PassResult, Program
from tdfx.passes.graph_module import FactorizedGraphModule
from tdfx.structure import structural_copy


@dataclass(frozen=True, slots=True)
class Join:
    """One factorized layer and the layer it becomes."""

    name: str
    factorized: Factorized
    dense: nn.Module


class Merge(Pass):
    """Join the factors of every factorized layer and give the model its original class back."""

    name = "merge"

    def __init__(self) -> None:
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
        self.joins = tuple(Join(name, layer, layer.merged()) for name, layer in found)
        dense: dict[nn.Module, nn.Module] = {join.factorized: join.dense for join in self.joins}
        graphs = [one for one in module.modules() if isinstance(one, FactorizedGraphModule)]
        # Innermost first: a body that is put in place may itself lie inside another graph.
        for graph in reversed(graphs):
            dense[graph] = structural_copy(graph._tdfx_body(), dense)
        merged = dense[module] if module in dense else structural_copy(module, dense)
        changes = tuple(Change(join.name, f"Factorized -> {type(join.dense).__name__}") for join in self.joins)
        return PassResult(replace(program, module=_plain(merged)), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """No factor is left, and the keys are the original's, in the original's order."""
        merged = result.program.module
        self.check(not any(isinstance(one, Factorized) for one in merged.modules()), "no factorized layer is left")
        expected = _merged_keys(before.module)
        found = [name for name, _ in merged.named_parameters(remove_duplicate=False)]
        self.check(found == expected, "parameters have the original names, in the original order")
        self.check(not isinstance(merged, FactorizedGraphModule), "the class is the original's")


def _plain(module: nn.Module) -> nn.Module:
    module.__dict__.pop(PLAN_ATTRIBUTE, None)
    return module


def _merged_keys(module: nn.Module) -> list[str]:
    """Return the parameter names that a factorized model will have once its layers are whole again."""
    paths = {name for name, one in module.named_modules(remove_duplicate=False) if isinstance(one, Factorized)}
    keys: list[str] = []
    for name, _ in module.named_parameters(remove_duplicate=False):
        path, found, factor = name.rpartition("factors.")
        owner = path.removesuffix(".")
        key = f"{path}{factor.partition('.')[2]}" if found and owner in paths else name
        if key not in keys[-2:]:
            keys.append(key)
    return keys
