"""Plan -> factorized model, as a GraphModule or as the same class with its sites swapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from tdfx.errors import PlanError, nearest
from tdfx.factors.registry import get_scheme
from tdfx.layers import Factorized
from tdfx.passes.base import PLAN_ATTRIBUTE, Change, Pass, PassResult, Program, Site
from tdfx.passes.graph_module import FactorizedGraphModule
from tdfx.passes.weights import Spectra, check_weight, working_weight
from tdfx.plan import Plan, SitePlan
from tdfx.structure import structural_copy


@dataclass(frozen=True, slots=True)
class Swap:
    """One layer and what takes its place."""

    name: str
    dense: nn.Module
    factorized: Factorized


class Rewrite(Pass):
    """Put a factorized layer in the place of every site that the plan says."""

    name = "rewrite"

    def __init__(self, spectra: Spectra | None = None) -> None:
        self.spectra = spectra or {}
        self.swaps: tuple[Swap, ...] = ()

    def requires(self, program: Program) -> None:
        """The plan is this model's: every site it names is there, with the same shape, and may be rewritten."""
        assert program.plan is not None, "select comes before rewrite"
        check_plan(program.plan, program)

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Split each weight, then build the whole model once."""
        assert program.plan is not None
        sites = {site.name: site for site in program.sites}
        todo = [one for one in program.plan.factorized if not isinstance(sites[one.name].layer, Factorized)]
        self.swaps = tuple(self._swap(sites[decision.name], decision) for decision in todo)
        swapped: dict[nn.Module, nn.Module] = {swap.dense: swap.factorized for swap in self.swaps}
        module = _emit(program, swapped)
        module.__dict__[PLAN_ATTRIBUTE] = program.plan
        changes = tuple(Change(swap.name, f"{type(swap.dense).__name__} -> Factorized") for swap in self.swaps)
        return PassResult(replace(program, module=module), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """What was planned is factorized, and every other parameter is the model's own, in the same order."""
        module = result.program.module
        for change in result.changes:
            self.check(isinstance(module.get_submodule(change.site), Factorized), f"{change.site!r} is factorized")
        dense = {id(swap.dense.weight) for swap in self.swaps}
        factors = {id(weight) for swap in self.swaps for weight in swap.factorized.weights}
        kept = [id(parameter) for parameter in before.module.parameters() if id(parameter) not in dense]
        now = [id(parameter) for parameter in module.parameters() if id(parameter) not in factors]
        self.check(kept == now, "every parameter that was not factorized is shared, in the same order")
        if isinstance(module, FactorizedGraphModule):
            module.graph.lint()

    def _swap(self, site: Site, decision: SitePlan) -> Swap:
        assert decision.scheme is not None
        assert decision.ranks is not None
        scheme = get_scheme(decision.scheme)
        weight = working_weight(site.layer)
        spectra = self.spectra.get(site.name) or scheme.spectra(weight)
        factors = scheme.split(weight, decision.ranks, spectra)
        return Swap(site.name, site.layer, Factorized.of(site.layer, scheme, decision.ranks, factors))


def _emit(program: Program, swapped: Mapping[nn.Module, nn.Module]) -> nn.Module:
    body = structural_copy(program.module, swapped)
    if isinstance(body, FactorizedGraphModule):
        return copy.copy(body)
    if program.emit == "modules" or isinstance(body, fx.GraphModule):
        return body
    (graph,) = program.graphs[""]
    return FactorizedGraphModule(body, copy.deepcopy(graph))


def check_plan(plan: Plan, program: Program) -> None:
    """Raise PlanError unless the plan can be carried out on this program, WeightError where a weight is not finite."""
    sites = {site.name: site for site in program.sites}
    for decision in plan:
        if decision.name not in sites:
            raise PlanError(
                f"The plan names site {decision.name!r}, which {type(program.module).__name__} does not have: the plan was "
                f"made for another model. Nearest: {nearest(decision.name, sites)}. Make it again with tdfx.plan."
            )
        if decision.factorized:
            _check_decision(decision, sites[decision.name])


def _check_decision(decision: SitePlan, site: Site) -> None:
    assert decision.scheme is not None
    assert decision.ranks is not None
    scheme = get_scheme(decision.scheme)
    if isinstance(site.layer, Factorized):
        _check_factorized(decision, site.layer)
        return
    if site.reason is not None:
        raise PlanError(
            f"The plan factorizes site {site.name!r}, which must be kept: {site.reason} ({site.note}). "
            f"Make the plan again for the model as it is now."
        )
    shape = site.operation.weight_shape if site.operation is not None else ()
    if site.operation is None or shape != decision.shape or not scheme.fits(site.operation):
        raise PlanError(
            f"The plan has a {decision.kind} of shape {decision.shape} split by {decision.scheme} at site {site.name!r}, "
            f"and the model has a {site.kind} of shape {shape} there. Make the plan again for this model."
        )
    full = scheme.full_ranks(site.operation)
    ranks = decision.ranks
    if len(ranks) != len(full) or any(not 1 <= rank <= most for rank, most in zip(ranks, full, strict=False)):
        raise PlanError(
            f"The plan gives site {site.name!r} the ranks {ranks}, and {scheme.name} takes {len(full)} ranks there, "
            f"from 1 to {full}. Change the plan's ranks."
        )
    check_weight(site)


def _check_factorized(decision: SitePlan, layer: Factorized) -> None:
    """A site that is already what the plan says is left alone, so that rewriting twice is rewriting once."""
    if (layer.origin.scheme, layer.origin.ranks) != (decision.scheme, decision.ranks):
        raise PlanError(
            f"Site {decision.name!r} is factorized already, by {layer.origin.scheme} at {layer.origin.ranks}, and the plan "
            f"asks for {decision.scheme} at {decision.ranks}. Merge the model first: tdfx.merge(model)."
        )
