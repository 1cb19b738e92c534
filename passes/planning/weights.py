"""The weights of sites, as select and rewrite decompose them."""

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
        site: A site with a weight of its own.
        weight: The values of the parameter, where they were read already.
    """
    dense = site.dense if weight is None else site.as_dense(weight)
    return dense.to(working_dtype(dense))


def lowering_of(layer: Factorized, weights: Sequence[Tensor] | None = None) -> Lowering:
    """Return how a factorized layer's factors can be split anew, in the dtype in which that is done.

    Args:
        layer: It is left as it was.
        weights: The values of its factors, where they were read already.
    """
    given = [full(weight) for weight in layer.weights] if weights is None else weights
    return layer.scheme.lowering(layer.operation, [weight.to(working_dtype(weight)) for weight in given])


def has_values(site: Site) -> bool:
    """Return False for a site whose weight lies on the meta device, where there are shapes alone."""
    return not any(isinstance(weight, Tensor) and weight.is_meta for weight in site.weights)


def check_weight(site: Site, rule: RankRule | None = None) -> None:
    """Raise WeightError if a site's weight cannot be decomposed, or not even looked at.

    Args:
        site: A site that may be split.
        rule: What will look at the weight, if nothing else: one that reads no values can do without them.
    """
    if not has_values(site):
        if rule is None or rule.reads_values:
            raise WeightError(_no_values(site, rule))
        return
    for weight in site.weights:
        _check_one(site, weight)


def _no_values(site: Site, rule: RankRule | None) -> str:
    lacks = f"The weight of site {site.name!r} is on the meta device and has no values, "
    if rule is None:
        return f"{lacks}so it cannot be split. Load the model on a real device first, or pass init='empty' with a plan."
    return (
        f"{lacks}and {rule!r} reads them. Load the model on a real device first, or take a rule that reads none: "
        f"Ratio or Fixed (ratio:0.25 on the command line)."
    )


def _check_one(site: Site, weight: Tensor) -> None:
    weight = full(weight)
    # The sum shows every NaN and infinity, and is much cheaper; where it shows one, it may also have overflowed.
    if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise WeightError(
            f"The weight of site {site.name!r} has {bad} values that are NaN or infinite, so it cannot be decomposed; the "
            f"training has diverged. Go back to a checkpoint from before, or keep the site: exclude=({site.name!r},)."
        )
