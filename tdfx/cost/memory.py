"""The memory that a site takes in training: its weights, gradients and moments, and the activations between its factors."""

from __future__ import annotations

from collections.abc import Sequence

from tdfx.cost.count import Flow, intermediate_values, parameters
from tdfx.factors.operation import Operation

_COPIES = 4
"""Numbers kept for each weight value: the value, its gradient, and two moments, as Adam keeps them."""


def training_bytes(chain: Sequence[Operation], flows: Sequence[Flow]) -> int:
    """Return the bytes that a chain adds to a training step.

    These are the weights, gradients and two moments, in the weight's dtype, and for each call the activations between the
    operations, in the dtype of the products. Input and output are the same for every chain in a site's place: not counted.

    >>> dense, half = Operation.pointwise(64, 64, 2), [Operation.pointwise(64, 16, 2), Operation.pointwise(16, 64, 2)]
    >>> training_bytes([dense], [Flow(8, (10, 10))]), training_bytes(half, [Flow(8, (10, 10))])
    (65536, 83968)
    """
    width = flows[0].setting.dtype.itemsize if flows else 4
    activations = sum(intermediate_values(chain, flow) * flow.setting.computes_in.itemsize for flow in flows)
    return _COPIES * width * parameters(chain) + activations
