"""What a site costs, as it is and at given ranks: parameters, operations, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tdfx.cost.count import Flow, flops, training_bytes
from tdfx.factors.operation import Operation
from tdfx.factors.scheme import Scheme
from tdfx.layers.factorized import Factorized
from tdfx.passes.program import Site
from tdfx.plans.plan import Reason, SitePlan

Chain = Callable[[Operation], Sequence[Operation]]
"""A function from the operation of a call to the operations that compute it, one after the other."""


@dataclass(frozen=True, slots=True)
class FactorChain:
    """How a site is computed by a scheme at given ranks."""

    scheme: Scheme
    ranks: tuple[int, ...]

    def __call__(self, operation: Operation) -> Sequence[Operation]:
        """Return the operations of the factors."""
        return self.scheme.chain(operation, self.ranks)


def dense_chain(operation: Operation) -> Sequence[Operation]:
    """Return the operation itself: how a dense site is computed."""
    return (operation,)


def factor_chain(scheme: Scheme, ranks: Sequence[int]) -> Chain:
    """Return how a site is computed by a scheme at given ranks."""
    return FactorChain(scheme, tuple(ranks))


def current_chain(site: Site) -> Chain:
    """Return how a site is computed now: dense, or by the factors that it has."""
    if isinstance(site.layer, Factorized):
        return factor_chain(site.layer.scheme, site.layer.origin.ranks)
    return dense_chain


def calls_of(site: Site, chain: Chain) -> Iterator[tuple[Sequence[Operation], Flow | None]]:
    """Yield the operations and the flow of each call of a site; without example inputs one call of unknown size."""
    assert site.operation is not None
    for flow in site.flows or (None,):
        yield chain((flow.operation if flow is not None else None) or site.operation), flow


def keep(site: Site, reason: Reason, note: str = "", full: tuple[int, ...] | None = None) -> SitePlan:
    """Return the decision to keep a site, with its shape and its costs.

    Args:
        site: The site.
        reason: Why it is kept.
        note: The reason in words.
        full: Its full ranks.
    """
    shape = site.operation.weight_shape if site.operation is not None else _shape(site.weight)
    count = _count_parameters(site)
    operations = flops_of(site, current_chain(site)) if site.operation is not None else None
    memory = memory_of(site, current_chain(site)) if site.operation is not None else None
    return SitePlan(
        name=site.name,
        kind=site.kind,
        parameter=site.slot.path if site.slot is not None else None,
        shape=shape,
        groups=site.operation.groups if site.operation is not None else 1,
        transposed=site.operation is not None and site.operation.transposed,
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
    )


def is_lazy(parameter: object) -> bool:
    """Return True for a parameter that has no shape yet."""
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def _count_parameters(site: Site) -> int:
    """Count the values in a site's weight, or in its factors if it is factorized."""
    return sum(weight.numel() for weight in site.weights if isinstance(weight, Tensor) and not is_lazy(weight))


def _shape(weight: object) -> tuple[int, ...]:
    return tuple(weight.shape) if isinstance(weight, Tensor) and not is_lazy(weight) else ()


def flops_of(site: Site, chain: Chain) -> int | None:
    """Return the forward operations of all calls of a site; None without example inputs."""
    if not site.flows:
        return None if site.flows is None else 0
    return sum(flops(steps, flow) for steps, flow in calls_of(site, chain) if flow is not None)


def memory_of(site: Site, chain: Chain) -> int | None:
    """Return the bytes that a site adds to a training step; None without example inputs.

    All its calls share the weights, and each keeps what flows between the factors.
    """
    if not site.flows:
        return None if site.flows is None else 0
    (steps, *_), flows = zip(*calls_of(site, chain), strict=True)
    return training_bytes(steps, [flow for flow in flows if flow is not None])
