"""Carries optimizer state from weights to their factors, and back.

With W = join(factors), the gradient of each factor is the vector-Jacobian product of ``join`` with the gradient of W. A
first moment is a sum of gradients, so it is carried by the same product, exactly for the moment of the switch. A second
moment is a sum of squares, for which there is no exact rule. The estimate used here assumes that the entries of the
gradient are uncorrelated: the same product, taken at the squared factors, is then the expected square. It is positive, and
its scale is exact where the second moments are all equal and the factors orthogonal. It is never less than the square of
the first moment. Step counts are kept.

At the merge, the first moment of W is the one of least norm that the rule above carries to the factors' moments: their
projection on the tangent space of the low-rank weights. The second moment is a weighted average of the factors' second
moments, exact where all of these are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tdfx.factors.algebra import linearize
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full, full_precise

Moments = tuple[Tensor, ...]
"""One tensor of optimizer state for each of the parameters that are exchanged together."""


class Carrier(Protocol):
    """Carries the state of some parameters to the parameters that replace them; one method for each role of an entry."""

    def first(self, moments: Moments) -> Moments:
        """Carry sums of gradients."""

    def second(self, moments: Moments) -> Moments:
        """Carry sums of squared gradients."""

    def average(self, values: Moments) -> Moments:
        """Carry positive values that do not scale with the gradient, such as step sizes."""

    def iterate(self, values: Moments) -> Moments:
        """Carry averages of the parameters themselves."""


@dataclass(frozen=True, slots=True)
class ToFactors:
    """From a weight to the factors of the layer that replaces it."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the vector-Jacobian product of ``join`` at the factors."""
        return self._pull_back(moments[0], Tensor.detach)

    def second(self, moments: Moments) -> Moments:
        """Return the vector-Jacobian product of ``join`` at the squared factors."""
        return self._pull_back(moments[0], Tensor.square)

    def average(self, values: Moments) -> Moments:
        """Return means weighted by the squared factors."""
        weights = self._pull_back(torch.ones_like(values[0]), Tensor.square)
        return tuple(_divide(total, weight) for total, weight in zip(self.second(values), weights, strict=True))

    def iterate(self, values: Moments) -> Moments:
        """Return the factors, one of them fitted to the dense average."""
        layer = self.layer
        weights = [full(weight).to(values[0].dtype) for weight in layer.weights]
        # An average may be on another device than its model.
        dense = layer.kind.to_dense(values[0].to(weights[0].device))
        return layer.scheme.refit(layer.operation, weights, dense)

    def _pull_back(self, moment: Tensor, change: Callable[[Tensor], Tensor]) -> Moments:
        """Return the vector-Jacobian product of ``join`` with a dense moment, at the factors after a change."""
        factors = [change(full(weight)).to(moment.dtype) for weight in self.layer.weights]
        return linearize(self.layer.join, factors).pull(self.layer.kind.to_dense(moment))


@dataclass(frozen=True, slots=True)
class ToDense:
    """From the factors of a layer to the dense weight."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the dense moment of least norm that is carried to the factors' moments."""
        dense = self.layer.scheme.project(self.layer.operation, self._weights(), moments)
        return (self.layer.kind.from_dense(dense),)

    def second(self, moments: Moments) -> Moments:
        """Return the factors' moments pushed forward at the squared factors, relative to what moments of 1 would give."""
        linear = linearize(self.layer.join, [weight.square() for weight in self._weights()])
        ones = linear.push(linear.pull(torch.ones_like(linear.value)))
        return (self.layer.kind.from_dense(_divide(linear.push(moments), ones)),)

    def average(self, values: Moments) -> Moments:
        """Return means weighted by the squared factors."""
        linear = linearize(self.layer.join, [weight.square() for weight in self._weights()])
        weights = linear.pull(torch.ones_like(linear.value))
        totals = linear.push(tuple(weight * value for weight, value in zip(weights, values, strict=True)))
        return (self.layer.kind.from_dense(_divide(totals, linear.push(weights))),)

    def iterate(self, values: Moments) -> Moments:
        """Return the join of the factors' averages."""
        return (self.layer.kind.from_dense(self.layer.join(*values)),)

    def _weights(self) -> Moments:
        return tuple(map(full_precise, self.layer.weights))


@dataclass(frozen=True, slots=True)
class ToLowerRank:
    """From factors to factors of lower ranks, by way of the dense weight."""

    to_dense: ToDense
    to_factors: ToFactors

    def first(self, moments: Moments) -> Moments:
        """Return the first moments of the new factors."""
        return self.to_factors.first(self.to_dense.first(moments))

    def second(self, moments: Moments) -> Moments:
        """Return the second moments of the new factors."""
        return self.to_factors.second(self.to_dense.second(moments))

    def average(self, values: Moments) -> Moments:
        """Return means of the dense means."""
        return self.to_factors.average(self.to_dense.average(values))

    def iterate(self, values: Moments) -> Moments:
        """Return the new factors, one of them fitted to the join of the old factors' averages."""
        return self.to_factors.iterate(self.to_dense.iterate(values))


def _divide(total: Tensor, weights: Tensor) -> Tensor:
    """Divide by weights; where a weight is zero, the total is zero too, and so is the result."""
    return total / weights.clamp_min(torch.finfo(weights.dtype).tiny)
