"""The singular values of every site, with the ranks that a plan chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tdfx.errors import PlanError
from tdfx.factors.registry import get_scheme, scheme_for
from tdfx.layers.factorized import Factorized
from tdfx.passes.planning.weights import check_weight, has_values, lowering_of, working_weight
from tdfx.passes.program import Site
from tdfx.plans.plan import Plan, SitePlan
from tdfx.progress import progress
from tdfx.ranks.spectrum import Spectrum

_MODES = {2: ("output channels", "input channels")}
"""Number of a scheme's ranks -> what each of them counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectrumCurve:
    """The singular values of one unfolding of a site's weight."""

    mode: str
    """What its rank counts, for a scheme with several ranks; "" for one rank."""
    values: tuple[float, ...]
    """Descending, relative to the largest, so in [0, 1]; all zero for a zero weight."""
    rank: int | None
    """How many of them the plan keeps, or the factors have now; None for a site that is kept dense."""
    energy: float | None
    """Share of the sum of squares that these hold, in [0, 1]; None without a rank."""


def curves_of(sites: Sequence[Site], plan: Plan) -> dict[str, tuple[SpectrumCurve, ...]]:
    """Return site name -> its curves, for every site that a scheme fits and whose weight has values.

    Raises:
        PlanError: The plan was made for another model.
        WeightError: A weight holds NaN or infinity.
    """
    sites_by_name = {site.name: site for site in sites}
    _check_same_model(sites_by_name, plan)
    curves = {}
    with progress("reading spectra", len(plan)) as advance:
        for decision in plan:
            site = sites_by_name.get(decision.name)
            curves[decision.name] = () if site is None else _site_curves(site, decision)
            advance(1)
    return {name: site_curves for name, site_curves in curves.items() if site_curves}


def _check_same_model(sites_by_name: Mapping[str, Site], plan: Plan) -> None:
    for decision in plan:
        site = sites_by_name.get(decision.name)
        if site is None and decision.factorized:
            raise PlanError(
                f"The plan factorizes {decision.name!r}, and the model has no such site: the plan was made for another "
                f"model, or with example inputs that show more. Pass the model that was given to tdfx.plan, and the same "
                f"example_inputs."
            )
        operation = None if site is None else site.operation
        if operation is not None and decision.shape and operation.weight_shape != decision.shape:
            raise PlanError(
                f"The weight of {decision.name!r} has shape {operation.weight_shape}, and {decision.shape} in the plan: it "
                f"was made for another model. Pass the model that was given to tdfx.plan."
            )


@torch.no_grad()
def _site_curves(site: Site, decision: SitePlan) -> tuple[SpectrumCurve, ...]:
    operation = site.operation
    if operation is None or not site.weights or not has_values(site):
        return ()
    if any(weight.is_complex() for weight in site.weights):
        return ()
    if isinstance(site.layer, Factorized):
        check_weight(site)
        return _with_ranks(lowering_of(site.layer).spectra, decision.ranks or site.layer.origin.ranks)
    scheme = get_scheme(decision.scheme) if decision.scheme is not None else scheme_for(operation)
    if scheme is None:
        return ()
    check_weight(site)
    return _with_ranks(scheme.spectra(operation, working_weight(site, scheme)), decision.ranks)


def _with_ranks(spectra: Sequence[Spectrum], ranks: Sequence[int] | None) -> tuple[SpectrumCurve, ...]:
    modes = _MODES.get(len(spectra), ("",) * len(spectra))
    curves = []
    for mode, spectrum, rank in zip(modes, spectra, ranks or (None,) * len(spectra), strict=True):
        largest = float(spectrum.values.max())
        values = spectrum.values / largest if largest > 0 else spectrum.values
        energy = None if rank is None else float(spectrum.energy()[min(rank, len(values)) - 1])
        curves.append(SpectrumCurve(mode=mode, values=tuple(values.tolist()), rank=rank, energy=energy))
    return tuple(curves)
