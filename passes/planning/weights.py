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
    """Return a dense site's weight in the layout of its operation and the dtype in which it is decomposed, detached.

    ``weight`` has the values of the parameter, if they were read already.
    """
    dense = site.as_dense(full(*site.weights) if weight is None else weight)
    return dense.to(working_dtype(dense))


def lowering_of(layer: Factorized, weights: Sequence[Tensor] | None = None) -> Lowering:
    """Return how a factorized layer's factors can be split again, in the dtype in which they are decomposed.

    ``weights`` has the values of the factors, if they were read already.
    """
    values = [full(weight) for weight in layer.weights] if weights is None else weights
    return layer.scheme.lowering(layer.operation, [weight.to(working_dtype(weight)) for weight in values])


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
