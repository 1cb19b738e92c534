"""A pull of dense weights towards low rank, so that a later split loses less.

Like the decay, it acts inside an optimizer's ``step``, before the gradients are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tdfx.errors import OptimizerError, PlanError, PolicyError
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.kinds.functional import FunctionCall
from tdfx.kinds.kind import LayerKind
from tdfx.kinds.registry import find_kind, operation_of
from tdfx.layers.placement import full, shard_like
from tdfx.plans.plan import Plan, SitePlan
from tdfx.ranks.spectrum import working_dtype
from tdfx.training.methods.hooks import refuse_closure, refuse_fused


class LowRankPenalty:
    """Pulls dense weights towards the nearest weights of a plan's ranks while they train, so that a later split loses less.

    The learning-compression scheme: minimise the loss plus ``strength/2 · |W - target|²``, where ``target`` is the weight
    split at the plan's ranks and joined again. The pull acts at every step of the optimizer; ``compress`` makes the targets
    anew from the weights as they are, and multiplies the strength by ``growth``. Call it once an epoch or so.

    Source: Carreira-Perpinan and Idelbayev, *Low-rank Compression of Neural Nets: Learning the Rank of Each Layer*, CVPR
    2020; Liu et al., *TDLC: Tensor decomposition-based direct learning-compression algorithm for DNN model compression*,
    Concurrency and Computation 2024 (from scratch, with tensor decompositions).

    Args:
        model: The dense model.
        plan: ``tdfx.plan(model, policy)``; its factorized sites are pulled.
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
                f"strength={strength!r} and growth={growth!r}: the first is the coefficient of the penalty, positive, the "
                f"second multiplies it at each compress(), at least 1. Try strength=1e-3 and growth=1.1."
            )
        refuse_fused(optimizer)
        self.strength = strength
        self.growth = growth
        self._pulled = [_pulled(model, site) for site in plan.factorized]
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        if self._pulled and not any(id(one.weight) in held for one in self._pulled):
            raise OptimizerError(
                f"The {type(optimizer).__name__} holds none of the {len(self._pulled)} weights of the plan: it trains "
                f"another model, or wider copies of the parameters, which this does not know. Pass the optimizer that holds "
                f"the model's own parameters."
            )
        self._fresh = True
        self.compress()
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def compress(self) -> None:
        """Make the targets anew from the weights as they are; from the second time on, raise the strength."""
        if not self._fresh:
            self.strength *= self.growth
        self._fresh = False
        for one in self._pulled:
            one.target = one.nearest()

    @torch.no_grad()
    def distance(self) -> float:
        """Return how far the weights are from their targets: ``|W - target| / |W|`` over all of them."""
        apart = sum(float(full((one.weight - one.target).double().square().sum())) for one in self._pulled)
        total = sum(float(full(one.weight.double().square().sum())) for one in self._pulled)
        return (apart / total) ** 0.5 if total > 0 else 0.0

    def remove(self) -> None:
        """Stop the pull, as before a rewrite."""
        self._handle.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        refuse_closure(args, kwargs)
        signs = {
            id(one): -1 if group.get("maximize") else 1 for group in optimizer.param_groups for one in group["params"]
        }
        for one in self._pulled:
            if one.weight.grad is not None and id(one.weight) in signs:
                one.weight.grad.add_(one.weight - one.target, alpha=signs[id(one.weight)] * self.strength)


@dataclass(slots=True)
class _Pulled:
    """One weight and what it is pulled towards."""

    weight: nn.Parameter
    operation: Operation
    kind: LayerKind | None
    site: SitePlan
    target: Tensor

    def nearest(self) -> Tensor:
        """Return the weight split at the plan's ranks and joined again, in its own dtype and layout."""
        assert self.site.scheme is not None
        assert self.site.ranks is not None
        scheme = get_scheme(self.site.scheme)
        dense = full(self.weight).to(working_dtype(self.weight))
        dense = self.kind.to_dense(dense) if self.kind is not None else dense
        spectra = scheme.spectra(self.operation, dense)
        joined = scheme.join(self.operation, scheme.split(self.operation, dense, self.site.ranks, spectra))
        joined = self.kind.from_dense(joined) if self.kind is not None else joined
        return shard_like(joined.to(self.weight.dtype), self.weight)


def _pulled(model: nn.Module, site: SitePlan) -> _Pulled:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    layer = modules.get(site.name)
    kind = find_kind(layer) if layer is not None and site.parameter is None else None
    weight = parameters.get(site.parameter or f"{site.name}.{kind.weight if kind else 'weight'}".removeprefix("."))
    operation = operation_of(layer) if kind is not None and layer is not None else _operation_of_shape(site)
    if weight is None or operation is None or operation.weight_shape != site.shape:
        raise PlanError(
            f"The plan factorizes site {site.name!r} of shape {site.shape}, which {type(model).__name__} does not have as a "
            f"dense weight. Make the plan for this model: tdfx.plan(model, policy)."
        )
    return _Pulled(weight, operation, kind, site, weight.detach())


def _operation_of_shape(site: SitePlan) -> Operation | None:
    """Return what functions compute with a parameter, apart from stride, padding and dilation, which no split depends on."""
    call = FunctionCall(site.kind, len(site.shape) - 2, site.transposed, None, {"groups": site.groups})
    return call.operation(site.shape)
