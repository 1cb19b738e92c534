"""Whether a plan can be carried out on a program: made for this model, with sites, shapes and ranks that fit."""

from __future__ import annotations

from collections import Counter

from tdfx.errors import PlanError, PolicyError, nearest
from tdfx.kinds.functional import FunctionCall
from tdfx.kinds.layouts import Layout, layout_named
from tdfx.layers.factorized import Factorized
from tdfx.layers.paths import parameters_by_path
from tdfx.passes.analysis.blockers import blocker_of_weight
from tdfx.passes.analysis.owners import owners_of
from tdfx.passes.planning.site_cost import Candidate
from tdfx.passes.planning.weights import check_weight
from tdfx.passes.program import ParameterSlot, Program, Site
from tdfx.plans.plan import Plan, Reason, SitePlan

_UNSEEN = (Reason.READ_ELSEWHERE, Reason.CUSTOM_FORWARD)
"""Reasons that hold only until a run with example inputs has shown that functions take the weight and nothing else does."""


def planned_sites(plan: Plan, program: Program) -> dict[str, Site]:
    """Return the program's sites by name, with those that the plan knows from example inputs."""
    sites = {site.name: site for site in program.sites}
    parameters = dict(parameters_by_path(program.module))
    owners = owners_of(program.module, program.surroundings)
    for decision in plan.factorized:
        site = sites.get(decision.name)
        weight = parameters.get(decision.parameter or "")
        layout = None if weight is None else layout_named(decision.kind, weight.shape)
        is_known = site is not None and site.reason not in _UNSEEN and not _is_seen_otherwise(decision, site, layout)
        if decision.parameter is None or weight is None or is_known:
            continue
        slot = ParameterSlot.of(decision.parameter)
        dims, rest = len(decision.shape) - 2, {"groups": decision.groups}
        call = FunctionCall(decision.kind, dims, decision.transposed, None, rest)
        operation = call.operation(weight.shape) if layout is None else layout.operation()
        # Whether anything else reads the weight was checked when the plan was made, with example inputs.
        reason, note = blocker_of_weight(weight, decision.kind, operation, owners, (), program.shards)
        sites[decision.name] = Site(
            name=decision.name,
            layer=program.module.get_submodule(slot.owner),
            kind=decision.kind,
            operation=operation,
            calls=decision.calls,
            reason=reason,
            note=note,
            slot=slot,
            layout=layout,
        )
    return sites


def _is_seen_otherwise(decision: SitePlan, site: Site, layout: Layout | None) -> bool:
    """Return True if a run with example inputs has shown a linear map of other slices than the model's code alone does."""
    if site.slot is None or site.operation is None or site.operation.dims or isinstance(site.layer, Factorized):
        return False
    return site.layout != layout or site.operation.groups != decision.groups


def check_plan(plan: Plan, program: Program, *, reads_values: bool = True) -> None:
    """Raise PlanError unless the plan can be carried out on this program.

    ``reads_values`` says whether weights will be split, so that WeightError is raised where one is not finite.
    """
    sites = planned_sites(plan, program)
    repeated = [name for name, count in Counter(decision.name for decision in plan).items() if count > 1]
    if repeated:
        raise PlanError(f"The plan decides on site {repeated[0]!r} more than once. Make it again with tdfx.plan.")
    for decision in plan:
        if decision.name not in sites and (decision.factorized or decision.parameter is None):
            raise PlanError(
                f"The plan names site {decision.name!r}, which {type(program.module).__name__} does not have: the plan was "
                f"made for another model. Nearest: {nearest(decision.name, sites)}. Make it again with tdfx.plan."
            )
        if decision.factorized:
            _check_decision(decision, sites[decision.name], reads_values)
            if reads_values and not isinstance(sites[decision.name].layer, Factorized):
                check_weight(sites[decision.name])


def _check_decision(decision: SitePlan, site: Site, reads_values: bool) -> None:
    try:
        chosen = Candidate.of(decision)
    except PolicyError as error:
        raise PlanError(f"The plan for site {site.name!r} cannot be carried out: {error}") from error
    scheme, ranks = chosen.scheme, chosen.ranks
    if isinstance(site.layer, Factorized):
        _check_lowering(decision, ranks, site.layer)
        if site.is_open or ranks == site.layer.origin.ranks:
            return
    # Values can be loaded into factors that do not train.
    if site.reason is not None and (reads_values or site.reason is not Reason.FROZEN):
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
    if not _are_within(ranks, full):
        raise PlanError(
            f"The plan gives site {site.name!r} the ranks {ranks}, and {scheme.name} takes {len(full)} ranks there, "
            f"from 1 to {full}. Change the plan's ranks."
        )


def _check_lowering(decision: SitePlan, ranks: tuple[int, ...], layer: Factorized) -> None:
    """Raise PlanError unless the plan lowers the ranks of a factorized site, or leaves them as they are."""
    current = layer.origin.ranks
    if layer.origin.scheme != decision.scheme or not _are_within(ranks, current):
        raise PlanError(
            f"Site {decision.name!r} is factorized already, by {layer.origin.scheme} at {current}, and the plan asks for "
            f"{decision.scheme} at {ranks}: ranks can be lowered, no more. Merge the model first: tdfx.merge(model)."
        )


def _are_within(ranks: tuple[int, ...], limits: tuple[int, ...]) -> bool:
    return len(ranks) == len(limits) and all(1 <= rank <= most for rank, most in zip(ranks, limits, strict=True))
