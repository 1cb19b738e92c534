"""The memory that a site takes in training: its weights with all that is kept for them, and what waits for the backward."""

from __future__ import annotations

from collections.abc import Sequence

from tdfx.cost.count import Flow, intermediate_values, parameters
from tdfx.factors.operation import Operation

_COPIES = 4
"""Numbers kept for each weight value: itself, its gradient, and two moments, as Adam keeps them."""


def training_bytes(chain: Sequence[Operation], flows: Sequence[Flow]) -> int:
    """Return the bytes that a chain adds to a training step.

    Counted are weights, gradients and two moments of each in the weight's dtype, and what flows between the operations, in
    the dtype of the products, for each call. What enters the first and leaves the last operation is the same for every chain
    in a site's place, and is not counted.

    >>> dense, half = Operation.pointwise(64, 64, 2), [Operation.pointwise(64, 16, 2), Operation.pointwise(16, 64, 2)]
    >>> training_bytes([dense], [Flow(8, (10, 10))]), training_bytes(half, [Flow(8, (10, 10))])
    (65536, 83968)
    """
    width = flows[0].setting.dtype.itemsize if flows else 4
    between = sum(intermediate_values(chain, flow) * flow.setting.computes_in.itemsize for flow in flows)
    return _COPIES * width * parameters(chain) + between
