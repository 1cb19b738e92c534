"""The metric in which a weight is split: how much the loss feels a change of each of its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdfx.devices import precise
from tdfx.factors.moments import SiteMoments
from tdfx.factors.operation import Operation, from_groups, to_groups

MetricName = Literal["weights", "inputs", "loss"]
"""What errors are measured in: the weight itself, what it does to its inputs, or what that does to the loss."""
DAMPING = 0.01
"""Multiple of the identity that is added to a second moment of mean diagonal 1: directions that a few batches do not show
still count, and the inverse of the root is bounded."""


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """The second moments of what flows into a site and of the gradients that flow back into it, as roots.

    With A the second moment of the input channels and G that of the output gradients, A = R Rᵀ and G = L Lᵀ, a weight W
    becomes W' = Lᵀ W R. The norm of a change of W' is, to second order and if inputs and gradients are independent, what
    that change does to the loss. A low-rank W' is split as any weight; then R and L are taken out of the outer factors, so
    that every scheme works whose first factor reads all inputs of a group and whose last gives all outputs of it.

    Source: the factors A and G are those of Martens and Grosse, *Optimizing Neural Networks with Kronecker-factored
    Approximate Curvature*, ICML 2015. Roots of A alone: Wang et al., *SVD-LLM*, ICLR 2025.

    Letters: g groups, o output and i input channels in each.
    """

    inputs: Tensor | None = None
    """R, lower triangular, (g, i, i); its diagonal (g, i) where channels are weighed one by one; None for no weighing."""
    outputs: Tensor | None = None
    """L in the same way, shape (g, o, o) or (g, o)."""

    @classmethod
    def of(cls, moments: SiteMoments, name: MetricName, damping: float | None = None) -> Metric:
        """Return the metric of a name, from moments that have what it needs; ``damping`` is ``DAMPING`` for None."""
        inputs = None if name == "weights" else moments.inputs
        outputs = moments.outputs if name == "loss" else None
        return cls(*(None if moment is None else _root(moment, damping) for moment in (inputs, outputs)))

    @property
    def name(self) -> MetricName:
        """What errors are measured in."""
        return "loss" if self.outputs is not None else "weights" if self.inputs is None else "inputs"

    @property
    def is_diagonal(self) -> bool:
        """True where a side is so long that its channels are weighed one by one."""
        return any(root is not None and root.dim() == 2 for root in (self.inputs, self.outputs))

    def by_channel(self) -> Metric:
        """Return the metric that weighs output channels one by one, for schemes whose last factor does not mix them."""
        if self.outputs is None or self.outputs.dim() == 2:
            return self
        return Metric(self.inputs, self.outputs.norm(dim=2))

    def apply(self, operation: Operation, weight: Tensor) -> Tensor:
        """Return W' for a weight, both in the layout of the operation."""
        w_goik = _on_inputs(_on_outputs(to_groups(operation, weight), self.outputs), self.inputs)
        return from_groups(operation, w_goik)

    def apply_to_factors(self, chain: Sequence[Operation], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return factors whose product is W', for factors whose product is W."""
        return self._on_chain(chain, factors)

    def take_back(self, chain: Sequence[Operation], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return factors whose product is W, for factors whose product is W'; all of them get the same norm.

        Their components stay those of W', so that directions which inputs or gradients seldom take are larger in the
        factors, and learn faster. Components balanced in W itself lost accuracy on a small VGG with SGD.
        """
        return _with_equal_norms(self._on_chain(chain, factors, inverse=True))

    def _on_chain(
        self, chain: Sequence[Operation], factors: Sequence[Tensor], *, inverse: bool = False
    ) -> tuple[Tensor, ...]:
        first, *middle, last = factors
        w_first = _on_inputs(to_groups(chain[0], first), self.inputs, inverse=inverse)
        w_last = _on_outputs(to_groups(chain[-1], last), self.outputs, inverse=inverse)
        return from_groups(chain[0], w_first), *middle, from_groups(chain[-1], w_last)


def _with_equal_norms(factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return factors of the same product and of equal norms; factors of a zero weight stay as they are."""
    norms = torch.stack([factor.norm() for factor in factors])
    if not bool((norms > 0).all()):
        return tuple(factors)
    mean = norms.log().mean().exp()
    return tuple(factor * (mean / norm) for factor, norm in zip(factors, norms, strict=True))


def _root(moment: Tensor, damping: float | None) -> Tensor:
    """Return the Cholesky factor of a moment (g, n, n), or the root of a diagonal (g, n), scaled and damped, in float64."""
    moment, damping = precise(moment), DAMPING if damping is None else damping
    diagonal = moment if moment.dim() == 2 else moment.diagonal(dim1=1, dim2=2)
    scale = float(diagonal.mean())
    moment = moment / scale if scale > 0 else torch.zeros_like(moment)
    if moment.dim() == 2:
        return (moment + damping).sqrt()
    damped = moment.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping)
    root: Tensor = torch.linalg.cholesky(damped)
    return root


def _on_inputs(w_goik: Tensor, root: Tensor | None, *, inverse: bool = False) -> Tensor:
    """Multiply the input channels by a root from the right, or by its inverse."""
    if root is None:
        return w_goik
    return _on_outputs(w_goik.transpose(1, 2), root, inverse=inverse).transpose(1, 2)


def _on_outputs(w_goik: Tensor, root: Tensor | None, *, inverse: bool = False) -> Tensor:
    """Multiply the output channels by a transposed root from the left, or by its inverse."""
    if root is None:
        return w_goik
    rows = w_goik.flatten(2)
    root = root.to(rows)
    if root.dim() == 2:  # a last factor with one group for each output has more groups than the site
        root = root.reshape(len(rows), -1)
        rows = rows / root[..., None] if inverse else rows * root[..., None]
    else:
        rows = torch.linalg.solve_triangular(root.mT, rows, upper=True) if inverse else root.mT @ rows
    return rows.reshape(w_goik.shape)
