"""Carries optimizer state from weights to their factors, and back.

With W = join(factors), the gradient of each factor is the vector-Jacobian product of ``join`` with the gradient of W. A
first moment is a sum of gradients, so it is carried by the same product, exactly for the moment of the switch. A second
moment is a sum of squares, for which there is no exact rule. The estimate used here assumes that the entries of the
gradient are uncorrelated: the same product, taken at the squared factors, is then the expected square. It is positive, and
its scale is exact where the second moments are all equal and the factors orthogonal. It is never less than the square of
the first moment. Step counts are kept. Where an optimizer corrects its moments by their counts, as Adam does, factors
begin with none by default: see ``StateFormat.begins``.

At the merge, the first moment of W is the one of least norm that the rule above carries to the factors' moments: their
projection on the tangent space of the low-rank weights. The second moment is a weighted average of the factors' second
moments, exact where all of these are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdfx.factors.algebra import Linearized, linearize
from tdfx.layers.factorized import Factorized
from tdfx.layers.placement import full, full_precise

Moments = tuple[Tensor, ...]
"""One tensor of optimizer state for each of the parameters that are exchanged together."""


@dataclass(frozen=True, slots=True)
class ToFactors:
    """From a weight to the factors of the layer that replaces it; one method for each role of an entry of the state."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the vector-Jacobian product of ``join`` at the factors."""
        return self._pull_back(moments[0], Tensor.detach)

    def second(self, moments: Moments) -> Moments:
        """Return the vector-Jacobian product of ``join`` at the squared factors."""
        return self._pull_back(moments[0], Tensor.square)

    def average(self, values: Moments) -> Moments:
        """Return means weighted by the squared factors."""
        return tuple(map(_divide, self.second(values), self.second((torch.ones_like(values[0]),))))

    def iterate(self, values: Moments) -> Moments:
        """Return the factors, one of them fitted to the dense average."""
        layer = self.layer
        weights = [full(weight).to(values[0]) for weight in layer.weights]
        # An average may be on another device than its model.
        dense = layer.kind.to_dense(values[0])
        return layer.scheme.refit(layer.operation, weights, dense)

    def _pull_back(self, moment: Tensor, change: Callable[[Tensor], Tensor]) -> Moments:
        """Return the vector-Jacobian product of ``join`` with a dense moment, at the factors after a change."""
        factors = [change(full(weight)).to(moment) for weight in self.layer.weights]
        return linearize(self.layer.join, factors).pull(self.layer.kind.to_dense(moment))


@dataclass(frozen=True, slots=True)
class ToDense:
    """From the factors of a layer to the dense weight; one method for each role of an entry of the state."""

    layer: Factorized

    def first(self, moments: Moments) -> Moments:
        """Return the dense moment of least norm that is carried to the factors' moments."""
        layer = self.layer
        weights = tuple(map(full_precise, layer.weights))
        return (layer.kind.from_dense(layer.scheme.project(layer.operation, weights, moments)),)

    def second(self, moments: Moments) -> Moments:
        """Return the factors' moments pushed forward at the squared factors, relative to what moments of 1 would give."""
        linear, weights = self._at_squares()
        return (self.layer.kind.from_dense(_divide(linear.push(moments), linear.push(weights))),)

    def average(self, values: Moments) -> Moments:
        """Return means weighted by the squared factors."""
        weights = self._at_squares()[1]
        return self.second(tuple(map(torch.mul, weights, values)))

    def iterate(self, values: Moments) -> Moments:
        """Return the join of the factors' averages."""
        return (self.layer.kind.from_dense(self.layer.join(*values)),)

    def _at_squares(self) -> tuple[Linearized, Moments]:
        """Return ``join`` linearized at the squared factors, and what it carries to the factors from moments of 1."""
        linear = linearize(self.layer.join, [full_precise(weight).square() for weight in self.layer.weights])
        return linear, linear.pull(torch.ones_like(linear.value))


Carrier = ToFactors | ToDense


def carry(carriers: Sequence[Carrier], role: str, values: Moments) -> Moments:
    """Carry an entry of the state by each carrier in turn; the role is the name of its method."""
    for carrier in carriers:
        values = getattr(carrier, role)(values)
    return values


def _divide(total: Tensor, weights: Tensor) -> Tensor:
    """Divide by weights; where a weight is zero, the total is zero too, and so is the result."""
    return total / weights.clamp_min(torch.finfo(weights.dtype).tiny)
