"""What a site costs, as it is and at given ranks: parameters, operations, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

from torch import nn

from tdfx.cost.count import Flow, flops, kept_bytes, training_bytes
from tdfx.factors.operation import Operation
from tdfx.factors.registry import get_scheme
from tdfx.factors.scheme import Scheme
from tdfx.layers.factorized import Factorized
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan

Chain = Callable[[Operation], Sequence[Operation]]
"""A function from the operation of a call to the operations that compute it, one after the other."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to factorize a site: a scheme at some ranks; as a ``Chain``, it gives the operations of the factors."""

    scheme: Scheme
    ranks: tuple[int, ...]
    recompute: bool = False
    """Whether the backward pass computes what flows between the factors again."""

    @classmethod
    def named(cls, scheme: str, ranks: tuple[int, ...], recompute: bool = False) -> Self:
        """Return the candidate of a scheme given by name."""
        return cls(get_scheme(scheme), ranks, recompute)

    @classmethod
    def of(cls, decision: SitePlan) -> Self:
        """Return the candidate that a decision has chosen."""
        assert decision.scheme is not None
        assert decision.ranks is not None
        return cls.named(decision.scheme, decision.ranks, decision.recompute)

    def __call__(self, operation: Operation) -> Sequence[Operation]:
        """Return the operations of the factors."""
        return _chain(self.scheme, operation, self.ranks)

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes by the scheme's name."""
        return Candidate.named, (self.scheme.name, self.ranks, self.recompute)


@lru_cache(maxsize=2**15)
def _chain(scheme: Scheme, operation: Operation, ranks: tuple[int, ...]) -> tuple[Operation, ...]:
    """Return the operations of the factors, made once for all sites that compute the same: each is checked at birth."""
    return tuple(scheme.chain(operation, ranks))


def dense_chain(operation: Operation) -> Sequence[Operation]:
    """Return the operation itself: how a dense site is computed."""
    return (operation,)


def current_chain(site: Site) -> Chain:
    """Return how a site is computed now: dense, or by the factors that it has."""
    layer = site.layer
    if isinstance(layer, Factorized):
        return Candidate(layer.scheme, layer.origin.ranks, layer.recompute)
    return dense_chain


def calls_of(site: Site, chain: Chain) -> Iterator[tuple[Sequence[Operation], Flow | None]]:
    """Yield the operations and the flow of each call of a site; without example inputs one call of unknown size."""
    recomputes = isinstance(chain, Candidate) and chain.recompute
    for flow in site.flows or (None,):
        if flow is not None and recomputes:
            flow = replace(flow, recomputes=True)
        yield chain((flow.operation if flow is not None else None) or site.known_operation), flow


def keep(site: Site, reason: Reason, note: str = "", full: tuple[int, ...] | None = None) -> SitePlan:
    """Return the decision to keep a site, with its shape, its costs and its full ranks."""
    operation, weight = site.operation, site.weight
    count = sum(weight.numel() for weight in site.weights if not is_lazy(weight))
    operations = flops_of(site, current_chain(site)) if operation is not None else None
    memory = memory_of(site, current_chain(site)) if operation is not None else None
    activations = activations_of(site, current_chain(site)) if operation is not None else None
    shape = () if weight is None or is_lazy(weight) else tuple(weight.shape)
    return SitePlan(
        name=site.name,
        kind=site.kind,
        parameter=site.slot.path if site.slot is not None else None,
        shape=operation.weight_shape if operation is not None else shape,
        groups=operation.groups if operation is not None else 1,
        transposed=operation is not None and operation.transposed,
        calls=site.calls,
        full_ranks=full,
        reason=reason,
        note=note,
        parameters_before=count,
        parameters_after=count,
        flops_before=operations,
        flops_after=operations,
        memory_before=memory,
        memory_after=memory,
        activations_before=activations,
        activations_after=activations,
    )


def is_lazy(parameter: object) -> bool:
    """Return True for a parameter that has no shape yet."""
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def flops_of(site: Site, chain: Chain) -> int | None:
    """Return the forward operations of all calls of a site; None without example inputs."""
    if not site.flows:
        return None if site.flows is None else 0
    return sum(flops(steps, flow) for steps, flow in calls_of(site, chain) if flow is not None)


def memory_of(site: Site, chain: Chain) -> int | None:
    """Return the bytes that a site adds to a training step; None without example inputs.

    All its calls share the weights, and each keeps what flows between the factors.
    """
    return _bytes_of(site, chain, training_bytes)


def activations_of(site: Site, chain: Chain) -> int | None:
    """Return the bytes that a site keeps from its forward pass for its backward pass; None without example inputs."""
    return _bytes_of(site, chain, kept_bytes)


def _bytes_of(site: Site, chain: Chain, count: Callable[[Sequence[Operation], Sequence[Flow]], int]) -> int | None:
    if not site.flows:
        return None if site.flows is None else 0
    (steps, *_), flows = zip(*calls_of(site, chain), strict=True)
    return count(steps, [flow for flow in flows if flow is not None])
