"""``LowRankPenalty``: pull dense weights towards low rank, so that a later split loses less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.errors import PlanError, PolicyError
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.kinds.functional import FunctionCall
from tdfx.kinds.kind import LayerKind
from tdfx.kinds.registry import find_kind, operation_of
from tdfx.layers.placement import full_precise, shard_like
from tdfx.plans.plan import Plan, SitePlan
from tdfx.training.methods.step_hooks import check_holds, groups_by_parameter, refuse_closure


class LowRankPenalty:
    """Pulls dense weights towards the nearest weights of a plan's ranks while they train, so that a later split loses less.

    This learning-compression scheme minimizes the loss plus ``strength/2 · |W - target|²``, where ``target`` is the weight
    split at the plan's ranks and joined again. The pull acts inside ``optimizer.step()``, before the gradients are used.
    Call ``compress`` about once an epoch: it computes the targets again, and multiplies the strength by ``growth``.

    Source: Carreira-Perpinan and Idelbayev, *Low-rank Compression of Neural Nets: Learning the Rank of Each Layer*, CVPR
    2020; Liu et al., *TDLC: Tensor decomposition-based direct learning-compression algorithm for DNN model compression*,
    Concurrency and Computation 2024 (from scratch, with tensor decompositions).

    Args:
        model: The dense model.
        plan: ``tdfx.plan(model, policy)``; the weights of its factorized sites are pulled.
        optimizer: The optimizer that trains the model.
        strength: Coefficient of the penalty, positive.
        growth: Factor on the strength at each ``compress``, at least 1.

    Raises:
        PolicyError: A coefficient is out of range.
        PlanError: The plan names a layer that the model lacks, or was made for another shape.
        OptimizerError: The optimizer is fused, or holds none of the weights, or is given a closure at a step.

    Example:
        >>> import tdfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> plan = tdfx.plan(model, tdfx.Policy(rank=tdfx.Ratio(of=0.25), min_gain=0))
        >>> penalty = tdfx.LowRankPenalty(model, plan, optimizer, strength=0.1)
        >>> penalty.compress()
        >>> 0 < penalty.distance() < 1
        True
        >>> penalty.remove()
    """

    def __init__(
        self, model: nn.Module, plan: Plan, optimizer: Optimizer, *, strength: float = 1e-3, growth: float = 1.0
    ) -> None:
        if not strength > 0 or not growth >= 1:
            raise PolicyError(
                f"strength={strength!r} and growth={growth!r}: the coefficient of the penalty must be positive, and the "
                f"factor on it at each compress() at least 1. Try strength=1e-3 and growth=1.1."
            )
        self.strength = strength
        self.growth = growth
        self._sites = [_pulled_site(model, decision) for decision in plan.factorized]
        weights = [site.weight for site in self._sites]
        check_holds(optimizer, weights, f"{len(weights)} weights of the plan")
        self._set_targets()
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def compress(self) -> None:
        """Compute the targets again from the current weights, and multiply the strength by ``growth``."""
        self.strength *= self.growth
        self._set_targets()

    @torch.no_grad()
    def distance(self) -> float:
        """Return how far the weights are from their targets: ``|W - target| / |W|`` over all weights together."""
        difference = sum(float(full_precise(site.weight - site.target).square().sum()) for site in self._sites)
        total = sum(float(full_precise(site.weight).square().sum()) for site in self._sites)
        return (difference / total) ** 0.5 if total > 0 else 0.0

    def remove(self) -> None:
        """Stop the pull, for example before a rewrite."""
        self._handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        refuse_closure(args, kwargs)
        groups = groups_by_parameter(optimizer)
        for site in self._sites:
            weight, group = site.weight, groups.get(id(site.weight))
            if weight.grad is not None and group is not None:
                sign = -1 if group.get("maximize") else 1
                weight.grad.add_(weight - site.target, alpha=sign * self.strength)

    @torch.no_grad()
    def _set_targets(self) -> None:
        for site in self._sites:
            site.target = site.nearest()


@dataclass(slots=True)
class _PulledSite:
    """A site whose weight is pulled."""

    weight: nn.Parameter
    operation: Operation
    kind: LayerKind | None
    """What the layer is; None for a parameter that a function uses."""
    decision: SitePlan
    target: Tensor

    def nearest(self) -> Tensor:
        """Return the weight split at the plan's ranks and joined again, in its own dtype and layout."""
        assert self.decision.scheme is not None
        assert self.decision.ranks is not None
        scheme = get_scheme(self.decision.scheme)
        dense = full_precise(self.weight)
        dense = self.kind.to_dense(dense) if self.kind is not None else dense
        spectra = scheme.spectra(self.operation, dense)
        joined = scheme.join(self.operation, scheme.split(self.operation, dense, self.decision.ranks, spectra))
        joined = self.kind.from_dense(joined) if self.kind is not None else joined
        return shard_like(joined.to(self.weight.dtype), self.weight)


def _pulled_site(model: nn.Module, decision: SitePlan) -> _PulledSite:
    """Find the weight of a site in the model."""
    name, modules = decision.name, dict(model.named_modules())
    layer = modules.get(name)
    kind = find_kind(layer) if layer is not None and decision.parameter is None else None
    path = decision.parameter or f"{name}.{kind.weight if kind else 'weight'}".removeprefix(".")
    weight = dict(model.named_parameters()).get(path)
    if kind is not None and layer is not None:
        operation = operation_of(layer)
    else:  # stride, padding and dilation do not affect a split
        settings = {"groups": decision.groups}
        call = FunctionCall(decision.kind, len(decision.shape) - 2, decision.transposed, None, settings)
        operation = call.operation(decision.shape)
    if weight is None or operation is None or operation.weight_shape != decision.shape:
        raise PlanError(
            f"The plan factorizes site {name!r} of shape {decision.shape}, which {type(model).__name__} does not have as a "
            f"dense weight. Make the plan for this model: tdfx.plan(model, policy)."
        )
    return _PulledSite(weight, operation, kind, decision, weight.detach())
