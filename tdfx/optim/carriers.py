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
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full
from tdfx.ranks.spectrum import working_dtype

Moments = tuple[Tensor, ...]


class Carrier(Protocol):
    """How the moments of some parameters become those of the parameters that take their place."""

    def first(self, moments: Moments) -> Moments:
        """Carry moments that are sums of gradients."""

    def second(self, moments: Moments) -> Moments:
        """Carry moments that are sums of squared gradients."""

    def average(self, values: Moments) -> Moments:
        """Carry positive values that do not have the gradient's scale, such as step lengths."""

    def iterate(self, values: Moments) -> Moments:
        """Carry averages of the parameters themselves."""


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

    def average(self, values: Moments) -> Moments:
        """Return the means that the squared factors weigh."""
        ones = self._pull_back(torch.ones_like(values[0]), Tensor.square)
        return tuple(_divided(one, other) for one, other in zip(self.second(values), ones, strict=True))

    def iterate(self, values: Moments) -> Moments:
        """Return the factors with one of them fitted to the dense average."""
        layer = self.layer
        weights = [full(weight).to(values[0].dtype) for weight in layer.weights]
        # An average may be on another device than its model.
        dense = layer.kind.to_dense(values[0].to(weights[0].device))
        return layer.scheme.refit(layer.operation, weights, dense)

    def _pull_back(self, moment: Tensor, change: Callable[[Tensor], Tensor]) -> Moments:
        detached = [change(full(weight)).to(moment.dtype) for weight in self.layer.weights]
        return linearize(self.layer.join, detached).pull(self.layer.kind.to_dense(moment))


@dataclass(frozen=True, slots=True)
class ToDense:
    """From the factors of a layer to the weight that they make."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the dense moment of least norm that the factors' moments can come from."""
        dense = self.layer.scheme.project(self.layer.operation, self._weights(), moments)
        return (self.layer.kind.from_dense(dense),)

    def second(self, moments: Moments) -> Moments:
        """Spread the factors' moments over the weight by the squared factors, and divide by what ones would give."""
        near = linearize(self.layer.join, [weight.square() for weight in self._weights()])
        ones = near.push(near.pull(torch.ones_like(near.value)))
        return (self.layer.kind.from_dense(_divided(near.push(moments), ones)),)

    def average(self, values: Moments) -> Moments:
        """Return the means that the squared factors weigh."""
        near = linearize(self.layer.join, [weight.square() for weight in self._weights()])
        ones = near.pull(torch.ones_like(near.value))
        spread = near.push(tuple(one * value for one, value in zip(ones, values, strict=True)))
        return (self.layer.kind.from_dense(_divided(spread, near.push(ones))),)

    def iterate(self, values: Moments) -> Moments:
        """Join the factors' averages."""
        return (self.layer.kind.from_dense(self.layer.join(*values)),)

    def _weights(self) -> Moments:
        return tuple(full(weight).to(working_dtype(weight)) for weight in self.layer.weights)


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

    def average(self, values: Moments) -> Moments:
        """Return the means of the means."""
        return self.new.average(self.old.average(values))

    def iterate(self, values: Moments) -> Moments:
        """Return the new factors with one of them fitted to what the old ones' averages make."""
        return self.new.iterate(self.old.iterate(values))


def _divided(value: Tensor, weights: Tensor) -> Tensor:
    """Divide by weights, of which those that are zero stand under a zero."""
    return value / weights.clamp_min(torch.finfo(weights.dtype).tiny)
