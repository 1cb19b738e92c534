"""The weights of sites, as select and rewrite decompose them."""

from __future__ import annotations

import torch
from torch import Tensor

from tdfx.errors import WeightError
from tdfx.factors.scheme import Lowering
from tdfx.layers import Factorized
from tdfx.passes.base import Site
from tdfx.ranks.spectrum import Spectrum, working_dtype

Spectra = dict[str, tuple[Spectrum, ...]]
"""Site name -> its spectra, so that the rewrite need not compute them again."""


def working_weight(site: Site) -> Tensor:
    """Return a site's weight in the layout of its operation and the dtype in which it is decomposed, detached."""
    return site.dense.to(working_dtype(site.dense))


def lowering_of(layer: Factorized) -> Lowering:
    """Return how a factorized layer's factors can be split anew, in the dtype in which that is done."""
    factors = [weight.detach().to(working_dtype(weight)) for weight in layer.weights]
    return layer.scheme.lowering(layer.operation, factors)


def check_weight(site: Site) -> None:
    """Raise WeightError if a site's weight cannot be decomposed."""
    weights = site.layer.weights if isinstance(site.layer, Factorized) else (site.dense,)
    for weight in weights:
        _check_one(site, weight.detach())


def _check_one(site: Site, weight: Tensor) -> None:
    if weight.is_meta:
        raise WeightError(
            f"The weight of site {site.name!r} is on the meta device and has no values, so its ranks cannot be read. "
            f"Load the model on a real device first."
        )
    # The sum shows every NaN and infinity, and is much cheaper; where it shows one, it may also have overflowed.
    if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise WeightError(
            f"The weight of site {site.name!r} has {bad} values that are NaN or infinite, so it cannot be decomposed; the "
            f"training has diverged. Go back to a checkpoint from before, or keep the site: exclude=({site.name!r},)."
        )
