"""What an error of a site's weight costs: in the site's outputs on real inputs, or in the loss, by its curvature."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tdfx.cost.workload import apply
from tdfx.errors import InputError
from tdfx.factors.operation import Operation
from tdfx.passes.analysis.observe import Inputs, observe
from tdfx.passes.planning.candidates import Loss
from tdfx.passes.program import Program, Site

SecondMoment = Callable[[nn.Parameter], Tensor | None]
"""Returns the second moments of a parameter's gradient, of its shape; None where no optimizer keeps any."""

_MOST_VALUES = 2**21
"""Values of each site's input that are kept for the outputs' error: whole samples, as many as fit, at least one."""


def output_losses(program: Program, inputs: Inputs) -> dict[str, Loss]:
    """Return for each site the squared error of its outputs on inputs, relative to the outputs' own square.

    For a linear map this is ``tr(E C Eᵀ) / tr(W C Wᵀ)`` with the second moments C of the inputs, E what the weight loses:
    the error of the weights whitened by the inputs. For a convolution C is that of the patches, which is never formed.

    Args:
        program: With the sites.
        inputs: What the model takes, a batch or more; it is run in eval mode on a throwaway copy, and in train mode too
            where sites are reached in no other.
    """
    entered = _entering(program, inputs, training=False)
    if any(site.flows and site.reason is None and not entered.get(site.name) for site in program.sites):
        # Where it does not run, on this process' inputs, the errors of weights stand for those of outputs.
        with contextlib.suppress(Exception):
            reached = {name: one for name, one in entered.items() if one}
            entered = _entering(program, inputs, training=True) | reached
    return {site.name: _output_loss(site, entered[site.name]) for site in program.sites if entered.get(site.name)}


def _entering(program: Program, inputs: Inputs, *, training: bool) -> dict[str, list[tuple[Operation, Tensor]]]:
    seen = observe(program.module, inputs, training=training, shards=program.shards, keep=_MOST_VALUES)
    return {site.name: _inputs_of(site, seen.kept) for site in program.sites if site.reason is None}


def _inputs_of(site: Site, kept: Mapping[object, list[Tensor]]) -> list[tuple[Operation, Tensor]]:
    """Return what entered each call of a site, with what the call computes."""
    if site.operation is None:
        return []
    entered = kept.get(site.name if site.slot is None else id(site.weight), [])
    own = [flow.operation for flow in site.flows or ()]
    return [(operation or site.operation, x) for operation, x in zip(own, entered, strict=False)]


def _output_loss(site: Site, inputs: Sequence[tuple[Operation, Tensor]]) -> Loss:
    whole = _power(site.dense, inputs)

    def loss(error: Tensor) -> float:
        return _power(error, inputs) / whole if whole > 0 else 0.0

    return loss


@torch.no_grad()
def _power(weight: Tensor, inputs: Sequence[tuple[Operation, Tensor]]) -> float:
    """Return the sum of the squares of what a weight makes of inputs."""
    total = 0.0
    for operation, x in inputs:
        wide = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
        total += float(apply(operation, wide, weight.to(wide.dtype)).double().square().sum())
    return total


def curvature_losses(program: Program, second: SecondMoment) -> dict[str, Loss]:
    """Return for each site the squares of its weight's errors, each times the second moment of its gradient.

    The second moments that Adam keeps are the diagonal of the empirical Fisher matrix, and half of this sum is the second
    term of the loss around a minimum (LeCun, Denker, Solla, *Optimal Brain Damage*, NeurIPS 1989). Sums of sites compare.

    Args:
        program: With the sites.
        second: Reads the optimizer's state.

    Raises:
        InputError: There is a site without.
    """
    found: dict[str, Loss] = {}
    for site in program.sites:
        if site.reason is None and site.operation is not None and site.weight is not None:
            moment = second(site.weight)
            if moment is None:
                raise InputError(
                    f"error='curvature' reads the optimizer's second moments, and there are none for the weight of site "
                    f"{site.name!r}. Pass optimizer=, one that keeps them (Adam, AdamW, RMSprop ...), after its first "
                    f"steps; or take error='outputs'."
                )
            found[site.name] = _curvature_loss(site.as_dense(moment.detach()))
    return found


def _curvature_loss(moment: Tensor) -> Loss:
    def loss(error: Tensor) -> float:
        return float((moment.to(error.dtype) * error.square()).sum())

    return loss
