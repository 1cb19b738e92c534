"""Plan -> factorized model, or one of lower ranks, as a GraphModule or as the same class with its sites swapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, fx, nn

from tdfx.distributed.processes import Solo, Task
from tdfx.kinds.functional import parse_call
from tdfx.kinds.layouts import Product
from tdfx.kinds.stock import build_layer
from tdfx.layers.attention import mark_encoders
from tdfx.layers.copying import rebind, structural_copy
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.planning.site_cost import Candidate
from tdfx.passes.planning.spectra import SpectrumCache
from tdfx.passes.planning.weights import lowering_of, split_weight
from tdfx.passes.program import PLAN_ATTRIBUTE, ParameterSlot, Program, Site
from tdfx.passes.transform.check_plan import check_plan, planned_sites
from tdfx.passes.transform.graph_module import FactorizedGraphModule
from tdfx.plans.plan import SitePlan

Init = Literal["weight", "variance", "empty"]
"""What factors start from: the nearest to the weight; the same, scaled to the weight's variance; or nothing, where values
will be loaded."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One weight and the factors that take its place."""

    site: str
    path: str
    """Path of the factorized module in the rewritten model."""
    old: tuple[nn.Parameter, ...]
    """The dense weight, as the site's layer holds it; or the factors' weights, where the site is factorized already."""
    factorized: Factorized
    layer: nn.Module
    """The layer that is replaced, or the layer whose parameter is replaced."""
    slot: ParameterSlot | None = None
    """The place of the parameter, where the layer stays."""


@dataclass(frozen=True, slots=True)
class Rewritten(PassResult):
    """A factorized program and what was swapped in it."""

    swaps: tuple[Swap, ...] = ()


class Rewrite(Pass[Rewritten]):
    """Put factors in the place of every layer and every parameter that the plan says, or fewer where there are some.

    ``spectra`` holds what was read of the weights while the plan was made.
    """

    name = "rewrite"

    def __init__(self, spectra: SpectrumCache | None = None, init: Init = "weight") -> None:
        self.spectra = SpectrumCache() if spectra is None else spectra
        self.init = init

    def requires(self, program: Program) -> None:
        """The plan is this model's: every site it names is there, with the same shape, and may be rewritten."""
        assert program.plan is not None, "select comes before rewrite"
        check_plan(program.plan, program, reads_values=self.init != "empty")

    @torch.no_grad()
    def run(self, program: Program) -> Rewritten:
        """Split each weight, then build the whole model once."""
        assert program.plan is not None
        sites = planned_sites(program.plan, program)
        pairs = [(sites[each.name], each) for each in program.plan.factorized if not _is_done(sites[each.name], each)]
        tasks = [Task(partial(self._split, site, decision), site.weights) for site, decision in pairs]
        # Factors without values are the same on every process.
        processes = Solo() if self.init == "empty" else program.processes
        swaps = tuple(_swap(*pair, factors) for pair, factors in zip(pairs, processes.map_tasks(tasks), strict=True))
        for swap, (_, decision) in zip(swaps, pairs, strict=True):
            swap.factorized.recompute = decision.recompute
        module = _emit(program, swaps)
        rebind(module, program.module)
        module.__dict__[PLAN_ATTRIBUTE] = program.plan
        changes = tuple(Change(swap.path, f"{sites[swap.site].kind} -> Factorized") for swap in swaps)
        return Rewritten(replace(program, module=module), changes, swaps)

    def ensures(self, before: Program, result: Rewritten) -> None:
        """What was planned is factorized, and every other parameter is the model's own, in the same order."""
        module = result.program.module
        for change in result.changes:
            self.check(isinstance(module.get_submodule(change.site), Factorized), f"{change.site!r} is factorized")
        dense = {id(weight) for swap in result.swaps for weight in swap.old}
        factors = {id(weight) for swap in result.swaps for weight in swap.factorized.weights}
        expected = [id(parameter) for parameter in before.module.parameters() if id(parameter) not in dense]
        shared = [id(parameter) for parameter in module.parameters() if id(parameter) not in factors]
        self.check(expected == shared, "every parameter that was not factorized is shared, in the same order")

    def _split(self, site: Site, decision: SitePlan, *weights: Tensor) -> tuple[Tensor, ...]:
        """Split a weight, or the factors of a factorized site at lower ranks, given the values."""
        chosen = Candidate.of(decision)
        scheme, ranks = chosen.scheme, chosen.ranks
        operation = site.known_operation
        if self.init == "empty":
            # Each becomes a tensor of the weight's dtype, device and layout when the layer is built.
            return tuple(torch.empty(step.weight_shape, device="meta") for step in chosen(operation))
        if isinstance(site.layer, Factorized):
            return lowering_of(site.layer, weights, site.metric).split(ranks)
        factors = split_weight(site, scheme, ranks, weights[0], self.spectra.take(site, scheme))
        if self.init == "weight":
            return factors
        dense = site.as_dense(*weights)
        return _rescaled(factors, dense.to(factors[0]), scheme.join(operation, factors))


def _swap(site: Site, decision: SitePlan, factors: Sequence[Tensor]) -> Swap:
    chosen = Candidate.of(decision)
    if isinstance(site.layer, Factorized):
        lowered = site.layer.at_ranks(chosen.ranks, factors)
        return Swap(site.name, site.path, site.layer.weights, lowered, site.layer)
    assert site.weight is not None
    if site.slot is None:
        factorized = Factorized.of(site.layer, chosen.scheme, chosen.ranks, factors)
        return Swap(site.name, site.path, site.weights, factorized, site.layer)
    parts = (site.known_operation, site.weight, None)
    stand_in = build_layer(*parts) if site.layout is None else Product(site.layout, site.weight)
    stand_in.train(site.layer.training)
    parameter = FactorizedParameter.of(stand_in, chosen.scheme, chosen.ranks, factors)
    factorized_before = (child for child in site.layer._modules.values() if isinstance(child, FactorizedParameter))
    siblings = next((child.siblings for child in factorized_before), ())
    parameter.__dict__["siblings"] = siblings or tuple(site.layer._parameters)
    return Swap(site.name, site.path, site.weights, parameter, site.layer, site.slot)


def _rescaled(factors: Sequence[Tensor], weight: Tensor, joined: Tensor) -> tuple[Tensor, ...]:
    """Scale factors, all by the same amount, so that their product has the variance of the weight."""
    norm = joined.norm()
    scale = (weight.norm() / norm) ** (1 / len(factors)) if norm > 0 else 1.0
    return tuple(factor * scale for factor in factors)


def _emit(program: Program, swaps: Sequence[Swap]) -> nn.Module:
    """Build the rewritten model: a graph where the program says so and a graph can stand for the model."""
    body = structural_copy(program.module, {swap.layer: swap.factorized for swap in swaps if swap.slot is None})
    slots = {swap.path: swap for swap in swaps if swap.slot is not None}
    for swap in slots.values():
        assert swap.slot is not None
        owner = body.get_submodule(swap.slot.owner)
        del owner._parameters[swap.slot.name]
        owner._modules[swap.slot.name] = swap.factorized
    mark_encoders(body)
    if isinstance(body, FactorizedGraphModule):
        graphs: Sequence[fx.Graph] = body._tdfx_graphs()
        reads, holds = body._tdfx_relied_on(), cast("FactorizedGraphModule", program.module)._tdfx_holds()
        body = body._tdfx_body()
        if not holds:
            return body
    elif program.emit == "modules" or isinstance(body, fx.GraphModule):
        return body
    else:
        graphs, reads = program.graphs[""].graphs, program.graphs[""].reads
    rewritten = FactorizedGraphModule(body, [_with_calls(copy.deepcopy(graph), slots) for graph in graphs])
    rebind(rewritten, body)
    if reads is not None:
        rewritten._tdfx_rely_on(reads)
    return rewritten


def _with_calls(graph: fx.Graph, slots: Mapping[str, Swap]) -> fx.Graph:
    """Turn calls of functions whose weight is factorized into calls of the module that takes the weight's place."""
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in slots:
            continue
        transposed = slots[node.target].factorized.operation.transposed
        for user in list(node.users):
            call = parse_call(user.target, user.args, user.kwargs) if user.op == "call_function" else None
            # Products stay: they hand themselves over to the factors, which torch's functions take for a tensor.
            is_product = isinstance(slots[node.target].factorized.origin.layer, Product)
            if call is None or call.weight is not node or call.transposed != transposed or is_product:
                continue
            with graph.inserting_before(user):
                module_call = graph.call_module(node.target, kwargs=dict(call.rest))
            module_call.meta = user.meta
            user.replace_all_uses_with(module_call)
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)
    return graph


def _is_done(site: Site, decision: SitePlan) -> bool:
    return isinstance(site.layer, Factorized) and site.layer.origin.ranks == decision.ranks
