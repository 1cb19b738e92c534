"""The weights of sites, in the form in which they are decomposed, and checks that they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tdfx.devices import has_float64, precise
from tdfx.errors import WeightError
from tdfx.factors.metric import Metric
from tdfx.factors.scheme import Factors, Lowering, Scheme
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full
from tdfx.passes.program import Site
from tdfx.ranks.rule import RankRule
from tdfx.ranks.spectrum import Spectrum


def working_weight(
    site: Site, scheme: Scheme, weight: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return a dense site's weight as a scheme decomposes it, detached.

    It is in the layout of the site's operation, in float64 or another ``dtype``, and in the site's metric. ``weight`` has
    the values of the parameter, if they were read already.
    """
    dense = site.as_dense(full(*site.weights) if weight is None else weight)
    dense = precise(dense) if dtype is None else dense.to(dtype)
    return dense if site.metric is None else metric_for(site.metric, scheme).apply(site.known_operation, dense)


def rough_weight(site: Site, scheme: Scheme, weight: Tensor) -> Tensor:
    """Return a dense site's working weight for the choice of ranks: in float32 where the parameter has no more digits."""
    takes = scheme.in_float32 and weight.dtype is not torch.float64 and has_float64(weight.device)
    return working_weight(site, scheme, weight, dtype=torch.float32 if takes else None)


def split_weight(
    site: Site, scheme: Scheme, ranks: Sequence[int], weight: Tensor, spectra: Sequence[Spectrum] | None
) -> Factors:
    """Return the factors of a dense site's weight, split in its metric; ``spectra`` are those of the same scheme."""
    operation, working = site.known_operation, working_weight(site, scheme, weight)
    factors = scheme.split(operation, working, ranks, spectra or scheme.leading_spectra(operation, working, ranks))
    if site.metric is None:
        return factors
    return metric_for(site.metric, scheme).take_back(scheme.chain(operation, ranks), factors)


def lowering_of(layer: Factorized, weights: Sequence[Tensor] | None = None, metric: Metric | None = None) -> Lowering:
    """Return how a factorized layer's factors can be split again, in the dtype in which they are decomposed.

    ``weights`` has the values of the factors, if they were read already.
    """
    scheme, operation = layer.scheme, layer.operation
    values = [full(weight) for weight in layer.weights] if weights is None else weights
    factors = tuple(map(precise, values))
    if metric is None:
        return scheme.lowering(operation, factors)
    metric = metric_for(metric, scheme)
    chain = scheme.chain(operation, layer.origin.ranks)
    lowering = scheme.lowering(operation, metric.apply_to_factors(chain, factors))
    return replace(
        lowering, split=lambda ranks: metric.take_back(scheme.chain(operation, ranks), lowering.split(ranks))
    )


def metric_for(metric: Metric, scheme: Scheme) -> Metric:
    """Return a metric as a scheme can follow it."""
    return metric if scheme.mixes_outputs else metric.by_channel()


def has_values(site: Site) -> bool:
    """Return False for a site whose weight is on the meta device, which holds shapes and no values."""
    return not any(weight.is_meta for weight in site.weights)


def check_weight(site: Site, rule: RankRule | None = None) -> None:
    """Raise WeightError if a site's weight cannot be decomposed.

    A rule that chooses ranks without reading values accepts a weight without any; without a rule the weight will be split.
    """
    problem = f"The weight of site {site.name!r} is on the meta device and has no values, "
    if has_values(site):
        for weight in map(full, site.weights):
            # Any NaN or infinity shows in the sum, which is much cheaper; but a sum of finite values may overflow.
            if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
                count = int((~torch.isfinite(weight)).sum())
                raise WeightError(
                    f"The weight of site {site.name!r} has {count} values that are NaN or infinite, so it cannot be "
                    f"decomposed; the training has diverged. Go back to a checkpoint from before, or keep the site: "
                    f"exclude=({site.name!r},)."
                )
    elif rule is None:
        raise WeightError(
            f"{problem}so it cannot be split. Load the model on a real device first, or pass init='empty' with a plan."
        )
    elif rule.reads_values:
        raise WeightError(
            f"{problem}and {rule!r} reads them. Load the model on a real device first, or take a rule that reads none: "
            f"Ratio or Fixed (ratio:0.25 on the command line)."
        )
