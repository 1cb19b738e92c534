"""Carrying optimizer state from weights to their factors, and back.

With W = join(factors), the gradient of each factor is the vector-Jacobian product of ``join`` with the gradient of W. A
momentum is a sum of gradients, so it moves the same way, exactly for the instant of the switch. A second moment is a sum
of squares and has no exact form; the estimate used here treats the entries of the gradient as uncorrelated, which turns
the same product, taken at the squared factors, into the expected square. It is positive, and exact in scale where the
second moments are all equal and the factors orthogonal; it is never let below the square of the first moment. Step
counts are kept.

Back at the merge, the first moment of W is the one of least norm whose image is the factors' moments: its projection on
the tangent space of the low-rank weights. The second moment is the average of the factors' that the estimate above would
have come from, exact where all are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tdfx.factors.algebra import linearize
from tdfx.layers import Factorized
from tdfx.ranks.spectrum import working_dtype
from tdfx.shards import full, placed_like

Moments = tuple[Tensor, ...]


class Carrier(Protocol):
    """How the moments of some parameters become those of the parameters that take their place."""

    def first(self, moments: Moments) -> Moments:
        """Carry moments that are sums of gradients."""

    def second(self, moments: Moments) -> Moments:
        """Carry moments that are sums of squared gradients."""


@dataclass(frozen=True, slots=True)
class ToFactors:
    """From a weight to the factors of a layer that takes its place."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the vector-Jacobian product of ``join`` at the factors."""
        return self._pull_back(moments[0], Tensor.detach)

    def second(self, moments: Moments) -> Moments:
        """Return the same product at the squared factors."""
        return self._pull_back(moments[0], Tensor.square)

    def _pull_back(self, moment: Tensor, change: Callable[[Tensor], Tensor]) -> Moments:
        detached = [change(full(weight)).to(moment.dtype) for weight in self.layer.weights]
        carried = linearize(self.layer.join, detached).pull(self.layer.kind.to_dense(full(moment)))
        return tuple(placed_like(one, weight) for one, weight in zip(carried, self.layer.weights, strict=True))


@dataclass(frozen=True, slots=True)
class ToDense:
    """From the factors of a layer to the weight that they make."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the dense moment of least norm that the factors' moments can come from."""
        weights = tuple(full(weight).to(working_dtype(weight)) for weight in self.layer.weights)
        dense = self.layer.scheme.project(self.layer.operation, weights, tuple(map(full, moments)))
        return (placed_like(self.layer.kind.from_dense(dense), self.layer.placement),)

    def second(self, moments: Moments) -> Moments:
        """Spread the factors' moments over the weight by the squared factors, and divide by what ones would give."""
        squares = [full(weight).to(working_dtype(weight)).square() for weight in self.layer.weights]
        near = linearize(self.layer.join, squares)
        ones = near.push(near.pull(torch.ones_like(near.value)))
        average = near.push(tuple(map(full, moments))) / ones.clamp_min(torch.finfo(near.value.dtype).tiny)
        return (placed_like(self.layer.kind.from_dense(average), self.layer.placement),)


@dataclass(frozen=True, slots=True)
class ToFewer:
    """From factors to factors of lower ranks, by way of the dense moments."""

    old: ToDense
    new: ToFactors

    def first(self, moments: Moments) -> Moments:
        """Return what the new factors can hold of the least moment that the old ones' come from."""
        return self.new.first(self.old.first(moments))

    def second(self, moments: Moments) -> Moments:
        """Return the same by the estimates of both."""
        return self.new.second(self.old.second(moments))
