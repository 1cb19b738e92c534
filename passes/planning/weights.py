"""The weights of sites, in the form in which they are decomposed, and checks that they can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdfx.errors import WeightError
from tdfx.factors.scheme import Lowering
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full
from tdfx.passes.program import Site
from tdfx.ranks.rule import RankRule
from tdfx.ranks.spectrum import working_dtype


def working_weight(site: Site, weight: Tensor | None = None) -> Tensor:
    """Return a site's weight in the layout of its operation and the dtype in which it is decomposed, detached.

    Args:
        site: A site that is not factorized.
        weight: The values of the parameter, if they were read already.
    """
    dense = site.dense if weight is None else site.as_dense(weight)
    return dense.to(working_dtype(dense))


def lowering_of(layer: Factorized, weights: Sequence[Tensor] | None = None) -> Lowering:
    """Return how a factorized layer's factors can be split again, in the dtype in which they are decomposed.

    Args:
        layer: It is left as it was.
        weights: The values of its factors, if they were read already.
    """
    values = [full(weight) for weight in layer.weights] if weights is None else weights
    return layer.scheme.lowering(layer.operation, [weight.to(working_dtype(weight)) for weight in values])


def has_values(site: Site) -> bool:
    """Return False for a site whose weight is on the meta device, which holds shapes and no values."""
    return not any(isinstance(weight, Tensor) and weight.is_meta for weight in site.weights)


def check_weight(site: Site, rule: RankRule | None = None) -> None:
    """Raise WeightError if a site's weight cannot be decomposed.

    Args:
        site: A site that may be split.
        rule: The rule that will choose its ranks; a rule that reads no values accepts a weight without values. None if the
            weight will be split in any case.
    """
    if has_values(site):
        for weight in site.weights:
            _check_finite(site, weight)
    elif rule is None or rule.reads_values:
        raise WeightError(_no_values(site, rule))


def _no_values(site: Site, rule: RankRule | None) -> str:
    problem = f"The weight of site {site.name!r} is on the meta device and has no values, "
    if rule is None:
        return (
            f"{problem}so it cannot be split. Load the model on a real device first, or pass init='empty' with a plan."
        )
    return (
        f"{problem}and {rule!r} reads them. Load the model on a real device first, or take a rule that reads none: "
        f"Ratio or Fixed (ratio:0.25 on the command line)."
    )


def _check_finite(site: Site, weight: Tensor) -> None:
    weight = full(weight)
    # Any NaN or infinity shows in the sum, which is much cheaper; but a sum of finite values may overflow.
    if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise WeightError(
            f"The weight of site {site.name!r} has {count} values that are NaN or infinite, so it cannot be decomposed; the "
            f"training has diverged. Go back to a checkpoint from before, or keep the site: exclude=({site.name!r},)."
        )
