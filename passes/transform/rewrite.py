"""Plan -> factorized model, or one of lower ranks, as a GraphModule or as the same class with its sites swapped."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn

from tdfx.distributed.processes import Spread, Task, alone
from tdfx.errors import PlanError, PolicyError, nearest
from tdfx.factors.registry import get_scheme
from tdfx.kinds.functional import FunctionCall, parse_call
from tdfx.kinds.stock import build_layer
from tdfx.layers.copying import rebind, structural_copy
from tdfx.layers.factorized import Factorized
from tdfx.layers.parameter import FactorizedParameter
from tdfx.passes.analysis.blockers import obstacle
from tdfx.passes.analysis.uses import owners_of
from tdfx.passes.base import Change, Pass, PassResult
from tdfx.passes.planning.spectra import KeptSpectra
from tdfx.passes.planning.weights import check_weight, lowering_of, working_weight
from tdfx.passes.program import PLAN_ATTRIBUTE, ParameterSlot, Program, Site
from tdfx.passes.transform.graph_module import FactorizedGraphModule
from tdfx.plans.plan import Plan, Reason, SitePlan

Init = Literal["weight", "variance", "empty"]
"""What factors start from: the nearest to the weight, or of its variance, or nothing, where values will be loaded."""

_UNSEEN = (Reason.READ_ELSEWHERE, Reason.CUSTOM_FORWARD)
"""Reasons for which a site is kept as long as no run has shown that functions take its weight and nothing else does."""


@dataclass(frozen=True, slots=True)
class Swap:
    """One weight and what takes its place."""

    site: str
    """Name of the site."""
    path: str
    """Path of the factorized module in the rewritten model."""
    old: tuple[nn.Parameter, ...]
    """The dense weight, as the site's layer holds it; or the factors' weights, where it is factorized already."""
    factorized: Factorized
    layer: nn.Module
    """The layer that goes, or the one whose parameter goes."""
    slot: ParameterSlot | None = None
    """The place of the parameter, where the layer stays."""


class Rewrite(Pass):
    """Put factors in the place of every layer and every parameter that the plan says, or fewer where there are some."""

    name = "rewrite"

    def __init__(self, spectra: KeptSpectra | None = None, init: Init = "weight", spread: Spread = alone) -> None:
        self.spectra = KeptSpectra() if spectra is None else spectra
        self.init = init
        self.spread = spread
        self.swaps: tuple[Swap, ...] = ()

    def requires(self, program: Program) -> None:
        """The plan is this model's: every site it names is there, with the same shape, and may be rewritten."""
        assert program.plan is not None, "select comes before rewrite"
        check_plan(program.plan, program, reads_values=self.init != "empty")

    @torch.no_grad()
    def run(self, program: Program) -> PassResult:
        """Split each weight, then build the whole model once."""
        assert program.plan is not None
        sites = _planned_sites(program.plan, program)
        todo = [one for one in program.plan.factorized if not _is_done(sites[one.name], one)]
        tasks = [Task(partial(self._factors, sites[one.name], one), sites[one.name].weights) for one in todo]
        # Factors without values are the same on every process.
        spread = alone if self.init == "empty" else self.spread
        made = zip(todo, spread(tasks), strict=True)
        self.swaps = tuple(self._swap(sites[decision.name], decision, factors) for decision, factors in made)
        module = _emit(program, self.swaps)
        rebind(module, program.module)
        module.__dict__[PLAN_ATTRIBUTE] = program.plan
        changes = tuple(Change(swap.path, f"{sites[swap.site].kind} -> Factorized") for swap in self.swaps)
        return PassResult(replace(program, module=module), changes)

    def ensures(self, before: Program, result: PassResult) -> None:
        """What was planned is factorized, and every other parameter is the model's own, in the same order."""
        module = result.program.module
        for change in result.changes:
            self.check(isinstance(module.get_submodule(change.site), Factorized), f"{change.site!r} is factorized")
        dense = {id(weight) for swap in self.swaps for weight in swap.old}
        factors = {id(weight) for swap in self.swaps for weight in swap.factorized.weights}
        kept = [id(parameter) for parameter in before.module.parameters() if id(parameter) not in dense]
        now = [id(parameter) for parameter in module.parameters() if id(parameter) not in factors]
        self.check(kept == now, "every parameter that was not factorized is shared, in the same order")

    def _factors(self, site: Site, decision: SitePlan, *weights: Tensor) -> tuple[Tensor, ...]:
        """Split a weight, or what factors stand for at lower ranks, given the values."""
        assert decision.scheme is not None
        assert decision.ranks is not None
        assert site.operation is not None
        scheme = get_scheme(decision.scheme)
        if self.init == "empty":
            # Each becomes a tensor of its own, of the weight's dtype, device and layout, when the layer is built.
            chain = scheme.chain(site.operation, decision.ranks)
            return tuple(torch.empty(step.weight_shape, device="meta") for step in chain)
        if isinstance(site.layer, Factorized):
            return lowering_of(site.layer, weights).split(decision.ranks)
        weight = working_weight(site, *weights)
        spectra = self.spectra.take(site, scheme) or scheme.spectra(site.operation, weight)
        factors = scheme.split(site.operation, weight, decision.ranks, spectra)
        if self.init == "variance":
            return _rescaled(factors, weight, scheme.join(site.operation, factors))
        return factors

    def _swap(self, site: Site, decision: SitePlan, factors: Sequence[Tensor]) -> Swap:
        """Build the layer of given factors."""
        assert decision.scheme is not None
        assert decision.ranks is not None
        assert site.operation is not None
        path = site.slot.path if site.slot is not None else site.name
        if isinstance(site.layer, Factorized):
            return Swap(site.name, path, site.layer.weights, site.layer.at_ranks(decision.ranks, factors), site.layer)
        scheme = get_scheme(decision.scheme)
        assert site.weight is not None
        if site.slot is None:
            made = Factorized.of(site.layer, scheme, decision.ranks, factors)
            return Swap(site.name, path, (site.weight,), made, site.layer)
        stand_in = build_layer(site.operation, site.weight, None).train(site.layer.training)
        parameter = FactorizedParameter.of(stand_in, scheme, decision.ranks, factors)
        stand_ins = (one for one in site.layer._modules.values() if isinstance(one, FactorizedParameter))
        earlier = next((one.siblings for one in stand_ins), ())
        parameter.__dict__["siblings"] = earlier or tuple(site.layer._parameters)
        return Swap(site.name, path, (site.weight,), parameter, site.layer, site.slot)


def _rescaled(factors: Sequence[Tensor], weight: Tensor, joined: Tensor) -> tuple[Tensor, ...]:
    """Scale factors, all by the same amount, so that their product has the variance of the weight."""
    lost = joined.norm()
    scale = (weight.norm() / lost) ** (1 / len(factors)) if lost > 0 else 1.0
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
    if isinstance(body, FactorizedGraphModule):
        graphs: Sequence[fx.Graph] = body._tdfx_graphs()
        body = body._tdfx_body()
    elif program.emit == "modules" or isinstance(body, fx.GraphModule):
        return body
    else:
        graphs = program.graphs[""].graphs
    made = FactorizedGraphModule(body, [_with_calls(copy.deepcopy(graph), slots) for graph in graphs])
    rebind(made, body)
    return made


def _with_calls(graph: fx.Graph, slots: Mapping[str, Swap]) -> fx.Graph:
    """Turn calls of functions whose weight is factorized into calls of what stands for it."""
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target not in slots:
            continue
        transposed = slots[node.target].factorized.operation.transposed
        for user in list(node.users):
            call = parse_call(user.target, user.args, user.kwargs) if user.op == "call_function" else None
            if call is None or call.weight is not node or call.transposed != transposed:
                continue
            with graph.inserting_before(user):
                made = graph.call_module(node.target, kwargs=dict(call.rest))
            made.meta = user.meta
            user.replace_all_uses_with(made)
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)
    return graph


def _planned_sites(plan: Plan, program: Program) -> dict[str, Site]:
    """Return the program's sites by name, with those that the plan knows from example inputs."""
    sites = {site.name: site for site in program.sites}
    parameters = dict(program.module.named_parameters())
    owners = owners_of(program.module)
    for decision in plan.factorized:
        found = sites.get(decision.name)
        if decision.parameter not in parameters or (found is not None and found.reason not in _UNSEEN):
            continue
        slot = ParameterSlot.of(decision.parameter)
        weight = parameters[decision.parameter]
        call = FunctionCall(
            decision.kind, len(decision.shape) - 2, decision.transposed, None, {"groups": decision.groups}
        )
        operation = call.operation(weight.shape)
        # What reads it besides was asked when the plan was made, with example inputs.
        reason, note = obstacle(weight, decision.kind, operation, owners, (), program.shards)
        sites[decision.name] = Site(
            name=decision.name,
            layer=program.module.get_submodule(slot.owner),
            kind=decision.kind,
            operation=operation,
            calls=decision.calls,
            reason=reason,
            note=note,
            slot=slot,
        )
    return sites


def check_plan(plan: Plan, program: Program, *, reads_values: bool = True) -> None:
    """Raise PlanError unless the plan can be carried out on this program.

    Args:
        plan: Made for this model, or for another instance of its class.
        program: With the sites of the model as it is now.
        reads_values: Whether weights will be split, so that WeightError is raised where one is not finite.
    """
    sites = _planned_sites(plan, program)
    twice = [name for name, count in Counter(one.name for one in plan).items() if count > 1]
    if twice:
        raise PlanError(f"The plan decides on site {twice[0]!r} more than once. Make it again with tdfx.plan.")
    for decision in plan:
        if decision.name not in sites and (decision.factorized or decision.parameter is None):
            raise PlanError(
                f"The plan names site {decision.name!r}, which {type(program.module).__name__} does not have: the plan was "
                f"made for another model. Nearest: {nearest(decision.name, sites)}. Make it again with tdfx.plan."
            )
        if decision.factorized:
            _check_decision(decision, sites[decision.name])
            if reads_values and not isinstance(sites[decision.name].layer, Factorized):
                check_weight(sites[decision.name])


def _check_decision(decision: SitePlan, site: Site) -> None:
    assert decision.scheme is not None
    assert decision.ranks is not None
    try:
        scheme = get_scheme(decision.scheme)
    except PolicyError as error:
        raise PlanError(f"The plan for site {site.name!r} cannot be carried out: {error}") from error
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


def _check_factorized(decision: SitePlan, layer: Factorized) -> None:
    """Ranks of a factorized site can be lowered; one that is already what the plan says is left alone."""
    assert decision.ranks is not None
    now = layer.origin.ranks
    lower = len(now) == len(decision.ranks) and all(
        1 <= new <= old for new, old in zip(decision.ranks, now, strict=False)
    )
    if layer.origin.scheme != decision.scheme or not lower:
        raise PlanError(
            f"Site {decision.name!r} is factorized already, by {layer.origin.scheme} at {now}, and the plan asks for "
            f"{decision.scheme} at {decision.ranks}: ranks can be lowered, no more. Merge the model first: "
            f"tdfx.merge(model)."
        )


def _is_done(site: Site, decision: SitePlan) -> bool:
    return isinstance(site.layer, Factorized) and site.layer.origin.ranks == decision.ranks
